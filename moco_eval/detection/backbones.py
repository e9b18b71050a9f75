"""The maps a detector looks at, made of an encoder: C4, dilated C5, or a feature pyramid.

A ViT's simple pyramid is in plain_transformer.py.

Each backbone has `body`, the encoder's own modules by their own names, or its `Network`; `strides`, of its maps;
`channels`, of each of them; `multiple`, of which the sides of its input must be; and `square`, the side that all its
input is padded to (0: none). Images (N, 3, H, W) go in, a list of maps comes out.
Source: He et al. 2020, arXiv:1911.05722, appendix; Lin et al. 2017, arXiv:1612.03144 (FPN).
"""

import copy
import inspect
from collections import OrderedDict
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moco_eval.encoders.architectures import ARCHITECTURES, TimmNetwork, architecture
from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.network import Network, Stage, network_of
from moco_eval.runtime.device import borrowed_generator

STRIDES = (4, 8, 16, 32)  # of the maps that make a feature pyramid
PARTS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")


class C4(nn.Module):
    """All up to layer3; layer4 works on each region."""

    strides = (16,)
    multiple = 1
    square = 0

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
    square = 0
    channels = 512

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.body = _body(encoder, PARTS)
        _dilate(self.body.layer4)
        self.reduce = _convolution(encoder.feature_dim, self.channels, 3)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.reduce(self.body(images))]


class Pyramid(nn.Module):
    """The maps p2 to p5 of strides 4 to 32, each with what the coarser ones know, and p6, every other place of p5.

    Of a ResNet they are made of layer1 to layer4, of another network of its last stage of each stride.
    """

    strides = (*STRIDES, 64)
    multiple = 32
    square = 0
    channels = 256

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.body: nn.Module
        if encoder.arch in ARCHITECTURES:
            self.body = _body(encoder, PARTS)
            widths = [encoder.feature_dim // 2**down for down in (3, 2, 1, 0)]
        else:
            self.body, stages = _any_size(encoder), pyramid_stages(encoder.network)
            self.stages, widths = [stage.name for stage in stages], [stage.channels for stage in stages]
        self.lateral = nn.ModuleList(_convolution(width, self.channels, 1) for width in widths)
        self.output = nn.ModuleList(_convolution(self.channels, self.channels, 3) for _ in widths)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.body.maps(images, self.stages) if isinstance(self.body, Network) else self._layers(images)
        merged = self.lateral[-1](maps[-1])
        pyramid = [self.output[-1](merged)]
        for level in (2, 1, 0):
            merged = self.lateral[level](maps[level]) + F.interpolate(merged, scale_factor=2.0, mode="nearest")
            pyramid.insert(0, self.output[level](merged))
        return [*pyramid, pyramid[-1][:, :, ::2, ::2]]

    def _layers(self, x: Tensor) -> list[Tensor]:
        """The maps of a ResNet."""
        maps = []
        for name, part in self.body.named_children():
            x = part(x)
            if name.startswith("layer"):
                maps.append(x)
        return maps


def pyramid_stages(network: Network) -> list[Stage]:
    """The last stage of each of the strides of a pyramid; fewer where the network does not have them all."""
    last = {stage.stride: stage for stage in network.stages}
    return [last[stride] for stride in STRIDES if stride in last]


def takes_any_size(network: Network) -> bool:
    """Whether images of any size can be given to it, or to the same network built for them."""
    return network.size is None or "strict_img_size" in inspect.signature(type(network.backbone)).parameters


def _any_size(encoder: Encoder) -> Network:
    """A copy of an encoder's network that takes images of any size; a Swin is built anew for them."""
    arch, backbone = architecture(encoder.arch), copy.deepcopy(encoder.backbone)
    if encoder.network.size is not None:
        assert isinstance(arch, TimmNetwork)
        arch = replace(arch, arguments=(*arch.arguments, ("strict_img_size", False)))
        with borrowed_generator():
            backbone = arch.build()
        backbone.load_state_dict(encoder.backbone.state_dict())
    return network_of(backbone, arch)


def hold_still_what_no_map_needs(backbone: nn.Module) -> None:
    """Weights behind the last map (a final norm, a class token) get no gradient: optimizer and DDP pass over them."""
    training, images = backbone.training, torch.zeros(1, 3, 64, 64)
    weights = list(backbone.parameters())
    with torch.enable_grad():
        maps = backbone.eval()(images)
        gradients = torch.autograd.grad(sum(level.sum() for level in maps), weights, allow_unused=True)
    for weight, gradient in zip(weights, gradients):
        weight.requires_grad_(gradient is not None)
    backbone.train(training)


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
