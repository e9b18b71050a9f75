"""The maps a detector looks at, made of an encoder: C4, dilated C5, or a feature pyramid.

Each backbone has `body`, the encoder's own modules by their own names; `strides`, of its maps; `channels`, of each of
them; and `multiple`, of which the sides of its input must be. Images (N, 3, H, W) go in, a list of maps comes out.
Source: He et al. 2020, arXiv:1911.05722, appendix; Lin et al. 2017, arXiv:1612.03144 (FPN).
"""

import copy
from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional as F

from moco_eval.encoders.encoder import Encoder

PARTS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")


class C4(nn.Module):
    """All up to layer3; layer4 works on each region."""

    strides = (16,)
    multiple = 1

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.body = _body(encoder, PARTS[:-1])
        self.channels = encoder.feature_dim // 2

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.body(images)]


class DilatedC5(nn.Module):
    """layer4 at stride 16, dilated, then a 3x3 convolution with BN to 512 channels, which no activation follows."""

    strides = (16,)
    multiple = 1
    channels = 512

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.body = _body(encoder, PARTS)
        _dilate(self.body.layer4)
        self.reduce = _convolution(encoder.feature_dim, self.channels, 3)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.reduce(self.body(images))]


class Pyramid(nn.Module):
    """The maps p2 to p5 of layer1 to layer4, each with what the coarser ones know, and p6, every other place of p5."""

    strides = (4, 8, 16, 32, 64)
    multiple = 32
    channels = 256

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.body = _body(encoder, PARTS)
        widths = [encoder.feature_dim // 2**down for down in (3, 2, 1, 0)]
        self.lateral = nn.ModuleList(_convolution(width, self.channels, 1) for width in widths)
        self.output = nn.ModuleList(_convolution(self.channels, self.channels, 3) for _ in widths)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps, x = [], images
        for name, part in self.body.named_children():
            x = part(x)
            if name.startswith("layer"):
                maps.append(x)
        merged = self.lateral[-1](maps[-1])
        pyramid = [self.output[-1](merged)]
        for level in (2, 1, 0):
            merged = self.lateral[level](maps[level]) + F.interpolate(merged, scale_factor=2.0, mode="nearest")
            pyramid.insert(0, self.output[level](merged))
        return [*pyramid, pyramid[-1][:, :, ::2, ::2]]


Backbone = C4 | DilatedC5 | Pyramid
BACKBONES: dict[str, type[C4] | type[DilatedC5] | type[Pyramid]] = {
    "r50_c4": C4,
    "r50_dc5": DilatedC5,
    "r50_fpn": Pyramid,
}


def _body(encoder: Encoder, names: tuple[str, ...]) -> nn.Sequential:
    return nn.Sequential(OrderedDict((name, copy.deepcopy(getattr(encoder.backbone, name))) for name in names))


def _dilate(layer4: nn.Module) -> None:
    """Stride 1, and dilation 2 in every 3x3 convolution: the first block's too, which torchvision would leave at 1."""
    for module in layer4.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
            if module.kernel_size == (3, 3):
                module.dilation = module.padding = (2, 2)


def _convolution(channels: int, to: int, side: int) -> nn.Sequential:
    """A convolution with BN, drawn as Caffe2's Xavier fill draws it: uniform, variance one over the inputs."""
    convolution = nn.Conv2d(channels, to, side, padding=side // 2, bias=False)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    return nn.Sequential(OrderedDict(conv=convolution, norm=nn.BatchNorm2d(to)))
