"""The network that gives a feature: pooled, the head's, or a stage's."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from moco_eval.encoders.architectures import architecture
from moco_eval.encoders.encoder import Encoder
from moco_eval.errors import InputError
from moco_eval.runtime.device import place


def network(encoder: Encoder, feature: str) -> nn.Module:
    """What gives a feature: (N, 3, H, W) to (N, D).

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
        self.backbone, self.stage = encoder.backbone, stage

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.stage.startswith("blocks."):
            block = int(self.stage.partition(".")[2])
            return self.backbone.get_intermediate_layers(images, n=[block], return_prefix_tokens=True, norm=True)[0][1][
                :, 0
            ]
        x = images
        for name, module in self.backbone.named_children():
            x = module(x)
            if name == self.stage:
                break
        return x.mean(dim=(2, 3))


def _require_stage(encoder: Encoder, stage: str) -> None:
    stages = architecture(encoder.arch).stages if encoder.tensors_loaded and not encoder.wrapped else ()
    if stage not in stages:
        has = f"it has pooled, head and {', '.join(stages)}" if stages else "it has pooled alone"
        raise InputError(f"--feature {stage!r} is no stage of {encoder.arch}; {has}")


class Several(nn.Module):
    """Several features in one pass of the network: (N, 3, H, W) to a list of (N, D), each as `network` gives it.

    Raises:
        InputError: as `network` does.
    """

    def __init__(self, encoder: Encoder, features: Sequence[str]):
        super().__init__()
        self.backbone, self.head, self.features = encoder.backbone, encoder.head, tuple(features)
        for feature in self.features:
            network(encoder, feature)
        self.stages = {feature for feature in self.features if feature not in ("pooled", "head")}

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        outputs: dict[str, torch.Tensor] = {}
        hooks = [
            self.backbone.get_submodule(stage).register_forward_hook(self._note(outputs, stage))
            for stage in self.stages
        ]
        try:
            outputs["pooled"] = self.backbone(images).flatten(1)
        finally:
            for hook in hooks:
                hook.remove()
        if "head" in self.features:
            assert self.head is not None
            outputs["head"] = self.head(outputs["pooled"])
        return [outputs[feature] for feature in self.features]

    def _note(self, outputs: dict[str, torch.Tensor], stage: str) -> Callable:
        def hook(_module: nn.Module, _inputs: tuple, output: torch.Tensor) -> None:
            is_block = stage.startswith("blocks.")
            outputs[stage] = self.backbone.norm(output)[:, 0] if is_block else output.mean(dim=(2, 3))

        return hook
