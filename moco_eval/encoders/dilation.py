"""A stage of a ResNet that keeps the resolution of the stage before it."""

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
