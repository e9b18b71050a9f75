"""The networks we train and load: torchvision's ResNets with their wider, narrower and CIFAR forms, ViTs, timm's zoo.

A name may go on after a comma: `resnet18,channels=4` takes images of four channels, and timm's networks take arguments
of their constructors, `timm:vit_base_patch16_224,global_pool=avg`.
"""

import ast
import re
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from moco_eval.config.load import did_you_mean
from moco_eval.encoders.conv_stem import ConvStem
from moco_eval.errors import InputError
from moco_eval.preprocessing import Preprocessing
from moco_eval.runtime.device import borrowed_generator


@dataclass(frozen=True)
class Architecture:
    """A ResNet: its block, blocks per stage, width against the standard 64, groups of the 3x3 convolutions, and stem.

    `width` widens every layer (R50w2x and R50w4x of the MoCo v1 paper), unlike torchvision's wide_resnet50_2, which
    widens the 3x3 convolutions alone.
    `groups` and `group_width`: ResNeXt's; 32x8d is 32 groups of 8 channels in the first stage.
    `cifar_stem`: 3x3 convolution of stride 1 and no max-pooling, for 32-pixel images; `stem_padding` is its padding, 1
    as a rule and 2 in solo-learn, which the shapes do not tell.
    `stride_in_1x1`: a bottleneck strides in its first convolution, as MSRA's original weights do; torchvision's
    strides in the 3x3. The shapes do not tell.
    `channels`: of the images.
    """

    block: type[BasicBlock] | type[Bottleneck]
    layers: tuple[int, int, int, int]
    width: float = 1.0
    cifar_stem: bool = False
    stem_padding: int = 1
    groups: int = 1
    group_width: int = 64
    stride_in_1x1: bool = False
    channels: int = 3

    size = None  # any

    @property
    def feature_dim(self) -> int:
        """Length of the pooled feature."""
        return int(512 * self.width) * self.block.expansion


@dataclass(frozen=True)
class VisionTransformer:
    """A ViT with a class token, whose normalised last value is the pooled feature.

    Attributes:
        dim, depth, heads: of the tokens, blocks and attention. The shapes do not tell the heads.
        patch, size: pixels along one side of a patch and of the image.
        channels: of the images.
        conv_stem: patches come from MoCo v3's convolutions.
    """

    dim: int
    depth: int
    heads: int
    patch: int
    size: int
    channels: int = 3
    conv_stem: bool = False

    @property
    def feature_dim(self) -> int:
        return self.dim


@dataclass(frozen=True)
class TimmNetwork:
    """Any network of timm's, with arguments of its constructor.

    Attributes:
        name: timm's, without the tag of published weights.
        arguments: (name, value) in the order given, such as ("img_size", 256).
    """

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    @cached_property
    def layers(self) -> nn.Module:
        """The network without memory, for its facts."""
        with torch.device("meta"):
            return self.build()

    @property
    def feature_dim(self) -> int:
        """Length of the pooled feature."""
        return int(getattr(self.layers, "head_hidden_size", None) or self.layers.num_features)

    @property
    def channels(self) -> int:
        """Of the images."""
        return int(dict(self.arguments).get("in_chans", 3))

    @property
    def size(self) -> int | None:
        """Pixels along one side of the image; None where any will do."""
        if getattr(self.layers, "dynamic_img_size", False):
            return None  # rotary positions, as DINOv3 has
        settings: Any = self.layers.pretrained_cfg
        size = dict(self.arguments).get("img_size", settings["input_size"][-1])
        return int(size) if settings.get("fixed_input_size") or "img_size" in dict(self.arguments) else None

    def build(self) -> nn.Module:
        """Randomly initialised; its output is the pooled feature.

        Raises:
            InputError: timm does not build it with these arguments.
        """
        import timm

        try:
            return timm.create_model(self.name, pretrained=False, num_classes=0, **dict(self.arguments))
        except Exception as error:  # whatever its constructor raises
            reason = " ".join(str(error).split())[:200]
            given = ", ".join(f"{key}={value}" for key, value in self.arguments) or "no arguments"
            raise InputError(f"timm does not build {self.name} with {given}: {reason}") from None


AnyArchitecture = Architecture | VisionTransformer | TimmNetwork


def _resnets() -> dict[str, Architecture]:
    depths: dict[str, tuple[type, tuple[int, int, int, int]]] = {
        "resnet18": (BasicBlock, (2, 2, 2, 2)),
        "resnet34": (BasicBlock, (3, 4, 6, 3)),
        "resnet50": (Bottleneck, (3, 4, 6, 3)),
        "resnet101": (Bottleneck, (3, 4, 23, 3)),
        "resnet152": (Bottleneck, (3, 8, 36, 3)),
        "resnet200": (Bottleneck, (3, 24, 36, 3)),
    }
    family = {name: Architecture(block, layers) for name, (block, layers) in depths.items()}
    for name, (block, layers) in depths.items():
        family[f"{name}_cifar"] = Architecture(block, layers, cifar_stem=True)
        family[f"{name}_cifar_pad2"] = Architecture(block, layers, cifar_stem=True, stem_padding=2)
    for name in ("resnet18", "resnet50"):
        block, layers = depths[name]
        family[f"{name}_quarter"] = Architecture(block, layers, width=0.25)
        family[f"{name}_quarter_cifar"] = Architecture(block, layers, width=0.25, cifar_stem=True)
    for width in (2, 4, 5):  # 5: SwAV's
        family[f"resnet50_w{width}"] = Architecture(*depths["resnet50"], width=float(width))
    family["resnet200_w2"] = Architecture(*depths["resnet200"], width=2.0)  # VICReg's
    for name in ("resnet50", "resnet101"):
        family[f"wide_{name}_2"] = Architecture(*depths[name], group_width=128)
        family[f"{name}_msra"] = Architecture(*depths[name], stride_in_1x1=True)
    # 50_32x8d is RX50 of the MoCo v1 paper, which torchvision does not have
    for depth, groups, width in (("50", 32, 4), ("50", 32, 8), ("101", 32, 8), ("101", 64, 4)):
        plain = family[f"resnet{depth}"]
        family[f"resnext{depth}_{groups}x{width}d"] = replace(plain, groups=groups, group_width=width)
    return family


ARCHITECTURES = _resnets()
# dim, depth, heads: DeiT's, DINO's and timm's; MoCo v3 has 12 heads in each. The narrow ones are for trials.
TRANSFORMERS = {
    "narrow": (48, 2, 3),
    "narrow_12h": (48, 2, 12),
    "tiny": (192, 12, 3),
    "tiny_12h": (192, 12, 12),
    "small": (384, 12, 6),
    "small_12h": (384, 12, 12),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
_VIT = re.compile(rf"vit_({'|'.join(TRANSFORMERS)})_patch(\d{{1,2}})_(\d{{2,4}})")
# MoCo v3's networks with a stem of convolutions in place of one block; 12 heads; 224 pixels where none are said
CONV_STEMS = ("narrow", "small", "base")
_VIT_CONV = re.compile(rf"vit_conv_({'|'.join(CONV_STEMS)})(?:_(\d{{2,4}}))?")


def names() -> list[str]:
    """Every ResNet, and each ViT at 224 pixels with its usual patches; others go by the same pattern."""
    transformers = [f"vit_{size}_patch{patch}_224" for size in TRANSFORMERS for patch in (8, 14, 16, 32)]
    return [*ARCHITECTURES, *transformers, *(f"vit_conv_{size}" for size in CONV_STEMS)]


@cache
def architecture(name: str) -> AnyArchitecture:
    """Raises InputError for an unknown name, with the nearest known one, or an argument that it does not take."""
    plain, *given = name.split(",")
    if plain.startswith("timm:"):
        return _timm_network(plain.removeprefix("timm:"), _arguments(name, given, TIMM_ARGUMENTS))
    network = _plain(plain)
    return replace(network, **dict(_arguments(name, given, ("channels",))))


# what facebookresearch/moco-v3 calls its networks
OFFICIAL = {"vit_small": "vit_small_12h_patch16_224", "vit_base": "vit_base_patch16_224"}


def _plain(name: str) -> Architecture | VisionTransformer:
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if match := _VIT_CONV.fullmatch(name):
        return _conv_transformer(name, match[1], int(match[2] or 224))
    if not (match := _VIT.fullmatch(name)):
        near = f" Did you mean {OFFICIAL[name]!r}?" if name in OFFICIAL else did_you_mean(name, names())
        raise InputError(f"unknown architecture {name!r}.{near}")
    patch, size = int(match[2]), int(match[3])
    if not 0 < patch <= size or size % patch or size > 1024:
        raise InputError(f"{name}: {size} pixels (at most 1024) must divide into patches of {patch}")
    return VisionTransformer(*TRANSFORMERS[match[1]], patch, size)


def _conv_transformer(name: str, width: str, size: int) -> VisionTransformer:
    dim, depth, _ = TRANSFORMERS[width]
    if size % 16 or not 0 < size <= 1024:
        raise InputError(f"{name}: {size} pixels (at most 1024) must divide into patches of 16")
    return VisionTransformer(dim, depth - 1, 12, 16, size, conv_stem=True)


# of timm's constructors: what changes the network's tensors or what it computes
TIMM_ARGUMENTS = (
    *("act_layer", "class_token", "depth", "embed_dim", "fc_norm", "final_norm", "global_pool", "img_size", "in_chans"),
    *("init_values", "mlp_ratio", "no_embed_class", "num_heads", "patch_size", "pre_norm", "qk_norm", "qkv_bias"),
    *("bn_eps", "num_reg_tokens", "reg_tokens", "swiglu_align_to", "swiglu_mlp", "use_abs_pos_emb", "use_fc_norm"),
    *("use_rel_pos_bias", "use_shared_rel_pos_bias", "window_size"),
)
MOST = {"channels": 64, "in_chans": 64, "depth": 256, "reg_tokens": 256}  # a stranger's file may say it
LARGEST = 16384  # other whole numbers


def _arguments(name: str, given: list[str], known: tuple[str, ...]) -> tuple[tuple[str, Any], ...]:
    """`key=value` after an architecture's name; numbers, true and false, and words."""
    arguments: dict[str, Any] = {}
    for pair in given:
        key, equals, text = pair.partition("=")
        if key not in known or not equals or not text or key in arguments:
            raise InputError(f"architecture {name!r}: {pair!r} is not an argument of it.{did_you_mean(key, known)}")
        value, most, least = _value(text), MOST.get(key, LARGEST), 0 if key == "reg_tokens" else 1
        counts = key in MOST or type(value) is int
        if counts and not (type(value) is int and least <= value <= most):
            raise InputError(f"architecture {name!r}: {key} is {text}; it must be a whole number of {least} to {most}")
        arguments[key] = value
    return tuple(arguments.items())


def with_argument(name: str, key: str, value: object) -> str:
    """An architecture's name with an argument, in the place of the one that it had."""
    kept = [part for part in name.split(",") if not part.startswith(f"{key}=")]
    return ",".join([*kept, f"{key}={value}"])


def _value(text: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return value if isinstance(value, (bool, int, float)) else text


def _timm_network(name: str, arguments: tuple[tuple[str, Any], ...]) -> TimmNetwork:
    import timm

    plain = name.partition(".")[0]
    if not timm.is_model(plain):
        near = did_you_mean(plain, timm.list_models())
        raise InputError(f"timm has no network {plain!r}.{near}")
    network = TimmNetwork(plain, arguments)
    assert network.layers is not None  # refuses arguments that do not fit
    return network


def resnet(name: str) -> Architecture:
    """Raises InputError where the name is no ResNet's."""
    arch = architecture(name)
    if not isinstance(arch, Architecture):
        raise InputError(f"{name} is not a ResNet; this takes one of {', '.join(ARCHITECTURES)}")
    return arch


class _WidthResNet(ResNet):
    """torchvision's ResNet with every layer's width multiplied; the stem is replaced by `build_resnet`."""

    def __init__(self, arch: Architecture, num_classes: int):
        self._arch = arch
        super().__init__(arch.block, list(arch.layers), num_classes=num_classes)
        stem = int(64 * arch.width)
        self.conv1 = _stem(3, stem)
        self.bn1 = nn.BatchNorm2d(stem)
        self.fc = nn.Linear(arch.feature_dim, num_classes)

    def _make_layer(self, block, planes, *args, **kwargs):
        if planes == 64:
            self.inplanes = int(64 * self._arch.width)
        return super()._make_layer(block, int(planes * self._arch.width), *args, **kwargs)


def _stem(channels: int, width: int) -> nn.Conv2d:
    """torchvision's first convolution, as it initialises it."""
    convolution = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution


def build_resnet(name: str, num_classes: int = 1000) -> ResNet:
    """A randomly initialised ResNet with torchvision's module names and initialisation; a CIFAR stem with torch's own.

    Args:
        name: a key of ARCHITECTURES, perhaps with `,channels=N`.
        num_classes: width of `fc`, an ordinary linear layer on the pooled feature.
    """
    arch = resnet(name)
    if arch.width == 1.0:
        shape = {"groups": arch.groups, "width_per_group": arch.group_width}
        net = ResNet(arch.block, list(arch.layers), num_classes=num_classes, **shape)
    else:
        net = _WidthResNet(arch, num_classes)
    if arch.cifar_stem:
        # initialised as torch does by itself (uniform, standard deviation 0.111), as in the CIFAR-10 demo
        shape = {"kernel_size": 3, "stride": 1, "padding": arch.stem_padding}
        net.conv1 = nn.Conv2d(arch.channels, net.conv1.out_channels, **shape, bias=False)
        net.maxpool = nn.Identity()
    elif arch.channels != 3:
        net.conv1 = _stem(arch.channels, net.conv1.out_channels)
    if arch.stride_in_1x1:
        for block in net.modules():
            if isinstance(block, Bottleneck):
                block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    return net


def build_transformer(name: str, num_classes: int = 0) -> nn.Module:
    """A randomly initialised timm VisionTransformer; without classes its output is the pooled feature.

    Raises:
        InputError: the name is no ViT's.
    """
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import VisionTransformer as TimmTransformer

    arch = architecture(name)
    if not isinstance(arch, VisionTransformer):
        raise InputError(f"{name} is not a vision transformer")
    return TimmTransformer(
        img_size=arch.size,
        patch_size=arch.patch,
        in_chans=arch.channels,
        embed_dim=arch.dim,
        depth=arch.depth,
        num_heads=arch.heads,
        num_classes=num_classes,
        embed_layer=ConvStem if arch.conv_stem else PatchEmbed,
    )


def build_backbone(name: str, fork: bool = True) -> nn.Module:
    """A network whose output is the pooled feature, (N, feature_dim); a ResNet's `fc` is the identity.

    Args:
        fork: draw from a copy of torch's generator, so that it is as before afterwards.
    """
    arch = architecture(name)
    with borrowed_generator() if fork else nullcontext():
        if isinstance(arch, TimmNetwork):
            return arch.build()
        if isinstance(arch, VisionTransformer):
            return build_transformer(name)
        net = build_resnet(name)
    net.fc = nn.Identity()
    return net


def sized(pixels: Preprocessing, arch: AnyArchitecture) -> Preprocessing:
    """The same for the only image size that a network takes."""
    if arch.size is None:
        return pixels
    return replace(pixels, size=arch.size, resize=arch.size * pixels.resize // pixels.size)
