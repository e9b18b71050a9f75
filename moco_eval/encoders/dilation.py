"""Stages of a ResNet that keep the resolution of the stage before them."""

from torch import nn


def dilate(stage: nn.Module, dilation: int, first: int) -> None:
    """Stride 1, and a dilation in every 3x3 convolution; that of the first block may be another.

    torchvision's `replace_stride_with_dilation` has half of it there, for the output on the finer grid is what the
    convolutions after it see; MoCo's FCN-16s has the same in all blocks.
    """
    for number, block in enumerate(stage.children()):
        wanted = dilation if number else first
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
                if module.kernel_size == (3, 3):
                    module.dilation = module.padding = (wanted, wanted)


def refine(stage: nn.Module, times: int) -> None:
    """The same stage on a grid `times` as fine, a power of 2, without a stride of its own.

    On the places of the coarse grid its output is unchanged: each convolution takes the same places as before.
    """
    for module in stage.modules():
        if isinstance(module, nn.Conv2d):
            dilation = times // 2 if module.stride == (2, 2) else times
            module.stride = (1, 1)
            if module.kernel_size == (3, 3):
                module.dilation = module.padding = (dilation, dilation)
