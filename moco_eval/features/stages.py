"""The network that gives a feature: pooled, the head's, or a stage's."""

from collections.abc import Sequence

import torch
from torch import nn

from moco_eval.encoders.encoder import Encoder
from moco_eval.errors import InputError
from moco_eval.runtime.device import place


def network(encoder: Encoder, feature: str) -> nn.Module:
    """What gives a feature: (N, C, H, W) to (N, D).

    Args:
        feature: `pooled`, the backbone's output; `head`, the projection head's; or a stage of the network, averaged
            over its places (`layer3` of a ResNet) or its normalised class token (`blocks.8` of a ViT).
    Raises:
        InputError: a head or stage that the encoder does not have.
    """
    if feature == "pooled":
        return encoder.backbone
    if feature != "head":
        return _Stage(encoder, feature)
    if encoder.head is None:
        raise InputError(
            f"{encoder.source} has no projection head ({encoder.origin}); evaluate its pooled feature instead "
            "(--feature pooled)"
        )
    return nn.Sequential(encoder.backbone, encoder.head)


def placed(net: nn.Module, encoder: Encoder, device: torch.device) -> nn.Module:
    """The network of an encoder's feature on a device, evaluating; a network of the caller's own keeps its layout."""
    return (net.to(device) if encoder.wrapped else place(net, device)).eval()


class _Stage(nn.Module):
    """The backbone up to one of its stages."""

    def __init__(self, encoder: Encoder, stage: str):
        super().__init__()
        _require_stage(encoder, stage)
        self.network, self.stage = encoder.network, stage

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network.features(images, [self.stage])[self.stage]


def _require_stage(encoder: Encoder, stage: str) -> None:
    stages = [known.name for known in encoder.network.stages]
    if stage not in stages:
        has = f"it has pooled, head and {', '.join(stages)}" if stages else "it has pooled alone"
        raise InputError(f"--feature {stage!r} is not a stage of {encoder.arch}; {has}")


class Several(nn.Module):
    """Several features in one pass of the network: (N, C, H, W) to a list of (N, D), each as `network` gives it.

    Raises:
        InputError: as `network` does.
    """

    def __init__(self, encoder: Encoder, features: Sequence[str]):
        super().__init__()
        self.network, self.head, self.features = encoder.network, encoder.head, tuple(features)
        for feature in self.features:
            network(encoder, feature)
        self.stages = [feature for feature in dict.fromkeys(self.features) if feature not in ("pooled", "head")]

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        outputs = self.network.features(images, ["pooled", *self.stages])
        if "head" in self.features:
            assert self.head is not None
            outputs["head"] = self.head(outputs["pooled"])
        return [outputs[feature] for feature in self.features]
