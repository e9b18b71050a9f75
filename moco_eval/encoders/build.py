"""The ResNets we train and load: torchvision's own, wider or narrower ones, and the CIFAR stem."""

from dataclasses import dataclass

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from moco_eval.config import did_you_mean
from moco_eval.errors import InputError


@dataclass(frozen=True)
class Architecture:
    """A ResNet: its block, blocks per stage, width against the standard 64, groups of the 3x3 convolutions, and stem.

    `width` widens every layer (R50w2x and R50w4x of the MoCo v1 paper), unlike torchvision's wide_resnet50_2.
    `groups` and `group_width`: ResNeXt's; 32x8d is 32 groups of 8 channels in the first stage.
    `cifar_stem`: 3x3 convolution of stride 1 and no max-pooling, for 32-pixel images.
    """

    block: type[BasicBlock] | type[Bottleneck]
    layers: tuple[int, int, int, int]
    width: float = 1.0
    cifar_stem: bool = False
    groups: int = 1
    group_width: int = 64

    @property
    def feature_dim(self) -> int:
        """Length of the pooled feature."""
        return int(512 * self.width) * self.block.expansion


def _family() -> dict[str, Architecture]:
    depths: dict[str, tuple[type, tuple[int, int, int, int]]] = {
        "resnet18": (BasicBlock, (2, 2, 2, 2)),
        "resnet34": (BasicBlock, (3, 4, 6, 3)),
        "resnet50": (Bottleneck, (3, 4, 6, 3)),
        "resnet101": (Bottleneck, (3, 4, 23, 3)),
        "resnet152": (Bottleneck, (3, 8, 36, 3)),
    }
    family = {name: Architecture(block, layers) for name, (block, layers) in depths.items()}
    for name in ("resnet18", "resnet50"):
        block, layers = depths[name]
        family[f"{name}_cifar"] = Architecture(block, layers, cifar_stem=True)
        family[f"{name}_quarter"] = Architecture(block, layers, width=0.25)
        family[f"{name}_quarter_cifar"] = Architecture(block, layers, width=0.25, cifar_stem=True)
    for name, width in (("resnet50_w2", 2.0), ("resnet50_w4", 4.0)):
        family[name] = Architecture(*depths["resnet50"], width=width)
    for depth in ("50", "101"):  # RX50 of the MoCo v1 paper; torchvision has the other one only
        family[f"resnext{depth}_32x8d"] = Architecture(*depths[f"resnet{depth}"], groups=32, group_width=8)
    return family


ARCHITECTURES = _family()


def architecture(name: str) -> Architecture:
    """Raises InputError for an unknown name, with the nearest known one."""
    if name not in ARCHITECTURES:
        raise InputError(f"unknown architecture {name!r}.{did_you_mean(name, ARCHITECTURES)}")
    return ARCHITECTURES[name]


class _WidthResNet(ResNet):
    """torchvision's ResNet with every layer's width multiplied; the stem is replaced by `build_resnet`."""

    def __init__(self, arch: Architecture, num_classes: int):
        self._arch = arch
        super().__init__(arch.block, list(arch.layers), num_classes=num_classes)
        stem = int(64 * arch.width)
        self.conv1 = nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.fc = nn.Linear(arch.feature_dim, num_classes)

    def _make_layer(self, block, planes, *args, **kwargs):
        if planes == 64:
            self.inplanes = int(64 * self._arch.width)
        return super()._make_layer(block, int(planes * self._arch.width), *args, **kwargs)


def build_resnet(name: str, num_classes: int = 1000) -> ResNet:
    """A randomly initialised ResNet with torchvision's module names and initialisation.

    Args:
        name: a key of ARCHITECTURES.
        num_classes: width of `fc`, an ordinary linear layer on the pooled feature.
    """
    arch = architecture(name)
    if arch.width == 1.0:
        shape = {"groups": arch.groups, "width_per_group": arch.group_width}
        net = ResNet(arch.block, list(arch.layers), num_classes=num_classes, **shape)
    else:
        net = _WidthResNet(arch, num_classes)
    if arch.cifar_stem:
        net.conv1 = nn.Conv2d(3, net.conv1.out_channels, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    return net


def build_backbone(name: str) -> ResNet:
    """A ResNet whose output is the pooled feature, (N, feature_dim): `fc` is the identity."""
    with torch.random.fork_rng(devices=[]):
        net = build_resnet(name)
    net.fc = nn.Identity()
    return net
