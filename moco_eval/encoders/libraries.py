"""Encoders that another library builds: random weights, torchvision's and timm's published ones, raw pixels."""

import difflib
import hashlib
import urllib.error
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights, list_models

from moco_eval.config.load import did_you_mean
from moco_eval.encoders.architectures import ARCHITECTURES, architecture, build_backbone, sized
from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.fingerprint import probe_image
from moco_eval.encoders.infer import infer
from moco_eval.encoders.naming import safe_name, sha256_of_tensors
from moco_eval.encoders.prove import doubts, prove
from moco_eval.encoders.settings_files import of_timm
from moco_eval.encoders.split import Parts
from moco_eval.errors import InputError
from moco_eval.preprocessing import Preprocessing
from moco_eval.runtime.device import borrowed_generator


def random_weights(arch: str, seed: int) -> Encoder:
    shape = architecture(arch)
    with borrowed_generator(seed):
        net = build_backbone(arch, fork=False)
    return Encoder(
        source=f"random:{arch}",
        run_name=f"random-{arch}",
        arch=arch,
        backbone=net.eval(),
        feature_dim=shape.feature_dim,
        head=None,
        origin=f"random initialisation, seed {seed}",
        sha256=sha256_of_tensors(net.state_dict()),
        tensors_loaded=len(net.state_dict()),
        preprocessing=sized(Preprocessing(), shape) if shape.size and shape.channels == 3 else None,
    )


def raw_pixels() -> Encoder:
    return Encoder(
        source="pixels",
        run_name="pixels",
        arch="pixels",
        backbone=nn.Flatten().eval(),
        feature_dim=0,  # the images' own size, known at first use
        head=None,
        origin="raw pixels",
        sha256=hashlib.sha256(b"pixels").hexdigest(),
        tensors_loaded=0,
    )


def from_torchvision(rest: str, seed: int) -> Encoder:
    """torchvision's published weights, through the same proof as a file."""
    arch, _, name = rest.partition(":")
    known = [name for name in list_models() if name in ARCHITECTURES]
    if arch not in known:
        raise InputError(f"torchvision:{arch} is no network we build.{did_you_mean(arch, known)}")
    published = get_model_weights(arch)
    if name and name != "DEFAULT" and name not in published.__members__:
        raise InputError(f"torchvision has no weights {name!r} of {arch}.{did_you_mean(name, published.__members__)}")
    weights = published[name or "DEFAULT"]
    source = f"torchvision:{rest}"
    tensors = _download(source, weights)
    cuts = weights.transforms()
    loaded = _published(source, {key: value for key, value in tensors.items() if not key.startswith("fc.")}, arch)
    return replace(
        loaded,
        run_name=safe_name(f"torchvision-{arch}-{weights.name}" if name else f"torchvision-{arch}"),
        origin=f"torchvision {weights}",
        dropped=[("fc (2 tensors)", "a classifier on the pooled feature, no part of the encoder")],
        preprocessing=Preprocessing(
            cuts.crop_size[0],
            cuts.resize_size[0],
            tuple(cuts.mean),
            tuple(cuts.std),
            interpolation=cuts.interpolation.value,
            antialias=bool(cuts.antialias),
        ),
    )


def _download(source: str, weights) -> dict[str, Tensor]:
    try:
        return weights.get_state_dict(progress=False, check_hash=True, map_location="cpu")
    except urllib.error.HTTPError as error:
        raise InputError(f"{source}: the server answers {error.code} for {weights.url}") from None
    except (OSError, RuntimeError) as error:
        raise InputError(_offline(source, weights.url, error)) from None


def _offline(source: str, url: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    return f"{source}: cannot download {url} ({reason}); without a network, give the path of a file"


def from_timm(rest: str, seed: int) -> Encoder:
    """timm's published weights, through the same proof as a file, and its own network's activations."""
    import timm

    source = f"timm:{rest}"
    if not timm.is_model(rest):
        near = difflib.get_close_matches(rest, timm.list_models(), 3) or timm.list_models(f"{rest}*")[:3]
        raise InputError(f"timm has no model {rest!r}{'; near it are ' + ', '.join(near) if near else ''}")
    if not timm.models.is_model_pretrained(rest):
        raise InputError(f"timm has no published weights of {rest}; for an untrained network: random:ARCH")
    try:
        theirs = timm.create_model(rest, pretrained=True, num_classes=0).eval()
    except Exception as error:  # whatever the hub's client raises without a network
        raise InputError(_offline(source, f"timm's weights of {rest}", error)) from None
    return _of_timm(source, theirs)


def _of_timm(source: str, theirs: nn.Module) -> Encoder:
    """timm's network as one of ours: same tensors, same activations."""
    tensors = theirs.state_dict()
    arch = infer(source, tensors)
    heads = getattr(theirs, "blocks", [None])[0]
    if heads is not None and heads.attn.num_heads == 12 and architecture(arch).feature_dim < 768:
        arch = arch.replace("_patch", "_12h_patch")
    settings: Any = theirs.pretrained_cfg
    loaded = _published(source, tensors, arch)
    image = probe_image(architecture(arch))
    with torch.no_grad():
        difference = (loaded.backbone(image) - theirs(image)).abs().max()
    if difference > 1e-4:
        raise InputError(f"{source}: its network is not the {arch} that its tensors look like: activations differ")
    return replace(
        loaded,
        run_name=safe_name(f"timm-{source.partition(':')[2]}"),
        origin=f"timm {settings['architecture']}.{settings['tag']}",
        preprocessing=Preprocessing.from_dict(of_timm(settings)),
    )


def _published(source: str, tensors: dict[str, Tensor], arch: str) -> Encoder:
    """An encoder of a library's own tensors."""
    parts = Parts.of(tensors)
    return Encoder(
        source=source,
        run_name=source,
        arch=arch,
        backbone=prove(source, parts.backbone, arch, parts.warnings),
        feature_dim=architecture(arch).feature_dim,
        head=None,
        origin=source,
        sha256=sha256_of_tensors(parts.backbone),
        tensors_loaded=len(parts.backbone),
        warnings=parts.warnings + doubts(parts.backbone),
    )
