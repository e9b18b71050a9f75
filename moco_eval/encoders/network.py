"""The contract of a network: what protocols, detection and segmentation may ask of any backbone.

A ResNet, a network of timm's and somebody's own module answer the same questions: the pooled feature, the stages with
their strides, features and maps of several stages in one pass, the channels and sizes of the images they take.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

from moco_eval.encoders.architectures import AnyArchitecture, Architecture


@dataclass(frozen=True)
class Stage:
    """A part of a network after which its feature may be taken.

    Attributes:
        name: of the module, such as 'layer3' or 'blocks.8'.
        stride: pixels of the image from one place of its map to the next.
        channels: of its map.
    """

    name: str
    stride: int
    channels: int


@dataclass(frozen=True)
class Outputs:
    """What one pass gives.

    Attributes:
        pooled: (N, D); None where nobody asked.
        maps: by stage, (N, C, H, W); of a transformer, its normalised patch tokens in their places.
        tokens: by stage, the normalised class token, (N, C), of a transformer that has one.
    """

    pooled: Tensor | None
    maps: dict[str, Tensor]
    tokens: dict[str, Tensor] = field(default_factory=dict)


class Network(nn.Module):
    """A backbone with the facts about it; called on images (N, C, H, W) it gives the pooled feature (N, D).

    Attributes:
        backbone: the module itself.
        stages: from the first to the last; empty where nothing is known of them.
        pooling: what the pooled feature is, in words.
        in_channels: of the images.
        size: pixels along one side of the only images that it takes; None where others will do.
    """

    def __init__(
        self, backbone: nn.Module, stages: tuple[Stage, ...], pooling: str, in_channels: int, size: int | None
    ):
        super().__init__()
        self.backbone, self.stages, self.pooling = backbone, stages, pooling
        self.in_channels, self.size = in_channels, size

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images)

    def outputs(self, images: Tensor, names: Sequence[str], pooled: bool = True) -> Outputs:
        """Several stages in one pass, which ends at the last of them where no pooled feature is wanted."""
        if not names:
            return Outputs(self.backbone(images), {})
        if isinstance(self.backbone, ResNet):
            return _of_resnet(self.backbone, images, names, pooled)
        return _of_timm(self, images, names, pooled)

    def features(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """'pooled' and stages, each as (N, C): its normalised class token, or its map averaged over the places."""
        stages = [name for name in names if name != "pooled"]
        outputs = self.outputs(images, stages, "pooled" in names)
        features = {name: outputs.tokens.get(name) for name in stages}
        features = {
            name: outputs.maps[name].mean(dim=(2, 3)) if token is None else token for name, token in features.items()
        }
        return features if outputs.pooled is None else features | {"pooled": outputs.pooled.flatten(1)}

    def maps(self, images: Tensor, names: Sequence[str]) -> list[Tensor]:
        """The maps of stages, (N, C, H, W) each, in the order of their names."""
        outputs = self.outputs(images, names, pooled=False)
        return [outputs.maps[name] for name in names]


def network_of(backbone: nn.Module, arch: AnyArchitecture | None, in_channels: int = 3) -> Network:
    """The contract of a backbone.

    Args:
        arch: what it was built as; None for somebody's own module and for raw pixels, which have no stages.
        in_channels: of the images, where there is no `arch`.
    """
    if arch is None:
        return Network(backbone, (), "the network's own", in_channels, None)
    if isinstance(arch, Architecture):
        return Network(backbone, _resnet_stages(arch), "mean over places", arch.channels, None)
    return Network(backbone, _timm_stages(backbone), _pooling(backbone), arch.channels, arch.size)


def _resnet_stages(arch: Architecture) -> tuple[Stage, ...]:
    first = 1 if arch.cifar_stem else 4
    width = int(64 * arch.width) * arch.block.expansion
    return tuple(Stage(f"layer{i + 1}", first * 2**i, width * 2**i) for i in range(4))


def _timm_stages(backbone: Any) -> tuple[Stage, ...]:
    """As timm lists them; none where it has no way to their maps."""
    if not hasattr(backbone, "forward_intermediates"):
        return ()
    listed = getattr(backbone.feature_info, "info", backbone.feature_info)
    return tuple(Stage(entry["module"], int(entry["reduction"]), int(entry["num_chs"])) for entry in listed)


def _pooling(backbone: Any) -> str:
    pool: Any = getattr(backbone, "global_pool", None)
    if has_tokens(backbone):
        means = {"token": "class token", "avg": "mean of the patch tokens", "map": "attention over the patch tokens"}
        return means.get(pool, f"timm's {pool!r}")
    layer = pool if isinstance(pool, nn.Module) else getattr(getattr(backbone, "head", None), "global_pool", pool)
    kind = getattr(layer, "pool_type", layer)
    return "mean over places" if kind == "avg" else f"timm's {kind!r}"


def has_tokens(backbone: Any) -> bool:
    """Whether it is a transformer with patch tokens in all its stages."""
    passes = getattr(backbone, "forward_intermediates", None)
    return passes is not None and "return_prefix_tokens" in inspect.signature(passes).parameters


def _of_resnet(backbone: ResNet, images: Tensor, names: Sequence[str], pooled: bool) -> Outputs:
    maps: dict[str, Tensor] = {}
    x = images
    for name, module in backbone.named_children():
        if name == "fc":
            break
        x = module(x)
        if name in names:
            maps[name] = x
        if not pooled and len(maps) == len(set(names)):
            return Outputs(None, maps)
    return Outputs(backbone.fc(torch.flatten(x, 1)), maps)


def _of_timm(network: Network, images: Tensor, names: Sequence[str], pooled: bool) -> Outputs:
    backbone: Any = network.backbone
    order = [stage.name for stage in network.stages]
    taken = sorted({order.index(name) for name in names})
    tokens = has_tokens(backbone)
    prefix = tokens and getattr(backbone, "num_prefix_tokens", 0) > 0
    settings: dict[str, Any] = {"norm": True} if tokens else {}
    if prefix:
        settings["return_prefix_tokens"] = True
    passed = backbone.forward_intermediates(
        images, indices=taken, stop_early=not pooled, intermediates_only=not pooled, **settings
    )
    last, outputs = passed if pooled else (None, passed)
    maps = {order[i]: output[0] if prefix else output for i, output in zip(taken, outputs)}
    first = prefix and getattr(backbone, "cls_token", None) is not None
    of_class = {order[i]: output[1][:, 0] for i, output in zip(taken, outputs)} if first else {}
    return Outputs(backbone.forward_head(last) if pooled else None, maps, of_class)
