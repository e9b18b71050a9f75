"""A copy's activations in the library it was written for, where that library is installed."""

import importlib.util
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moco_eval.config.load import did_you_mean
from moco_eval.encoders.architectures import (
    Architecture,
    TimmNetwork,
    VisionTransformer,
    architecture,
    build_transformer,
)
from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.export.detectron2 import to_detectron2
from moco_eval.encoders.fingerprint import probe_image
from moco_eval.encoders.load import set_norm_eps
from moco_eval.errors import InputError, RunFailed

TOLERANCE = 1e-5  # of the largest activation


def require_place(encoder: Encoder, to: str) -> None:
    """Raises InputError where a library has no such network."""
    arch = architecture(encoder.arch)
    if not isinstance(arch, Architecture) and to in ("torchvision", "detectron2"):
        raise InputError(f"--to {to}: {encoder.arch} has no place there under these names; take timm or safetensors")
    if to == "timm" and isinstance(arch, Architecture):
        import timm

        if not timm.is_model(encoder.arch.partition(",")[0]):
            known = did_you_mean(encoder.arch, timm.list_models("*res*"))
            raise InputError(f"timm has no {encoder.arch}.{known} Take --to torchvision or safetensors")


def prove_in(to: str, encoder: Encoder, path: Path, settings: dict[str, Any] | None) -> str:
    """Load a written file in its own library and compare activations; what was shown, in words.

    Args:
        settings: detectron2's, None where it cannot build the network.
    Raises:
        RunFailed: the library's network gives other activations than the source.
    """
    if to == "torchvision":
        return _in_torchvision(encoder, path)
    if to == "timm":
        return _in_timm(encoder, path)
    if to == "detectron2":
        return _in_detectron2(encoder, path, settings)
    return "safetensors is read by this program itself"


@torch.no_grad()
def _in_torchvision(encoder: Encoder, path: Path) -> str:
    import torchvision

    if encoder.arch not in torchvision.models.list_models():
        return f"torchvision has no {encoder.arch} of its own; it was read back into its ResNet class"
    net = torchvision.models.get_model(encoder.arch, weights=None)
    left = net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=False)
    if set(left.missing_keys) != {"fc.weight", "fc.bias"} or left.unexpected_keys:
        raise RunFailed(f"{path}: torchvision's {encoder.arch} leaves out {left}")
    net.fc = nn.Identity()
    image = probe_image()
    return _compared("torchvision", {"pooled": encoder.backbone(image)}, {"pooled": net.eval()(image)}, path)


@torch.no_grad()
def _in_timm(encoder: Encoder, path: Path) -> str:
    import timm

    arch = architecture(encoder.arch)
    if isinstance(arch, TimmNetwork):
        net = arch.build()
    elif isinstance(arch, VisionTransformer) and not timm.is_model(encoder.arch):
        net = build_transformer(encoder.arch)
    else:
        net = timm.create_model(encoder.arch.partition(",")[0], num_classes=0, in_chans=arch.channels)
    timm.models.load_checkpoint(net, str(path))
    set_norm_eps(net, encoder.norm_eps)
    image = probe_image(arch)
    return _compared("timm", {"pooled": encoder.backbone(image)}, {"pooled": net.eval()(image)}, path)


@torch.no_grad()
def _in_detectron2(encoder: Encoder, path: Path, settings: dict[str, Any] | None) -> str:
    """In the backbone that detectron2's own builder makes: every tensor taken, every stage equal."""
    if settings is None or importlib.util.find_spec("detectron2") is None:
        return "not compared in detectron2: " + ("it is not installed" if settings else "it builds no such network")
    net = _detectron2_backbone(settings, path)
    taken = net.state_dict()
    ours = {to_detectron2(name): tensor for name, tensor in encoder.backbone.state_dict().items()}
    missed = [name for name in taken if name not in ours or not torch.equal(taken[name], ours[name])]
    if missed:
        raise RunFailed(
            f"{path}: detectron2 left {len(missed)} of {len(taken)} tensors as they were, first {missed[0]}"
        )
    image = probe_image()
    shown = _compared("detectron2", stages(encoder.backbone, image), net(image), path)
    return f"{shown}; all {len(taken)} tensors of its build_resnet_backbone taken"


def _detectron2_backbone(settings: dict[str, Any], path: Path) -> nn.Module:
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone.resnet import build_resnet_backbone

    config = get_cfg()
    resnet = {**settings["MODEL"]["RESNETS"], "NORM": "BN", "OUT_FEATURES": ["res2", "res3", "res4", "res5"]}
    for name, value in resnet.items():
        setattr(config.MODEL.RESNETS, name, value)
    config.MODEL.BACKBONE.FREEZE_AT = 0
    net = build_resnet_backbone(config, ShapeSpec(channels=3))
    DetectionCheckpointer(net).load(str(path))
    return net.eval()


def stages(net: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """A ResNet's activations under detectron2's names of its stages."""
    x = net.maxpool(net.relu(net.bn1(net.conv1(image))))
    activations = {}
    for stage in range(1, 5):
        x = getattr(net, f"layer{stage}")(x)
        activations[f"res{stage + 1}"] = x
    return activations


def _compared(library: str, ours: dict[str, Tensor], theirs: dict[str, Tensor], path: Path) -> str:
    largest = 0.0
    for name, expected in ours.items():
        scale = max(1.0, float(expected.abs().max()))
        difference = float((expected - theirs[name]).abs().max()) / scale
        if not difference <= TOLERANCE:
            raise RunFailed(f"{path}: {library}'s activations at {name} differ by {difference:.3g} of the largest")
        largest = max(largest, difference)
    where = ", ".join(ours)
    return (
        f"in {library} {version(library)}: {where} equal (largest difference {largest:.1g} of the largest activation)"
    )
