"""Encoders that another library builds: random weights, torchvision's and timm's published ones, raw pixels."""

import hashlib
import urllib.error
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import get_model_weights, list_models

from moco_eval.config.load import did_you_mean
from moco_eval.encoders import timm_index
from moco_eval.encoders.architectures import (
    ARCHITECTURES,
    VisionTransformer,
    architecture,
    build_backbone,
    sized,
)
from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.fingerprint import probe_image
from moco_eval.encoders.infer import expected, infer
from moco_eval.encoders.layout import Layout, rename
from moco_eval.encoders.layouts import LAYOUTS
from moco_eval.encoders.naming import safe_name, sha256_of_tensors
from moco_eval.encoders.prove import doubts, prove
from moco_eval.encoders.recognise import Checkpoint, fits
from moco_eval.encoders.settings_files import of_timm
from moco_eval.encoders.split import Parts, split
from moco_eval.errors import InputError
from moco_eval.preprocessing import Preprocessing
from moco_eval.runtime.connection import unreachable
from moco_eval.runtime.device import borrowed_generator
from moco_eval.runtime.libraries import silenced


def random_weights(arch: str, seed: int) -> Encoder:
    """A network of ours by its name, or of timm's, with or without `timm:` before it."""
    network = arch.partition(",")[0]
    if network not in ARCHITECTURES and not network.startswith(("timm:", "vit_")) and network in timm_index.names():
        arch = f"timm:{arch}"
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
    """torchvision's published weights, through the same proof as a file, and its own network's activations."""
    arch, _, name = rest.partition(":")
    source, weights = f"torchvision:{rest}", _weights(arch, name)
    tensors = _download(source, weights)
    checkpoint = Checkpoint(Path(source), _row(source, tensors), tensors, {}, [])
    parts = split(checkpoint, "query")
    built = arch if arch in ARCHITECTURES else infer(source, parts.backbone, checkpoint.layout.prefer)
    loaded = _the_same(source, parts.backbone, [rename(built, checkpoint.layout.variants)], _theirs(arch, tensors))
    cuts = weights.transforms()
    return replace(
        loaded,
        run_name=safe_name(f"torchvision-{arch}-{weights.name}" if name else f"torchvision-{arch}"),
        origin=f"torchvision {weights}",
        dropped=parts.dropped,
        preprocessing=Preprocessing(
            cuts.crop_size[0],
            cuts.resize_size[0],
            tuple(cuts.mean),
            tuple(cuts.std),
            interpolation=cuts.interpolation.value,
            antialias=bool(cuts.antialias),
        ),
    )


def _weights(arch: str, name: str) -> Any:
    """Published weights of a classifier of torchvision's.

    Raises:
        InputError: it has no such network, or no such weights of it.
    """
    known = list_models(module=torchvision.models)
    if arch not in known:
        raise InputError(f"torchvision has no network {arch!r}.{did_you_mean(arch, known)}")
    published = get_model_weights(arch)
    if name and name != "DEFAULT" and name not in published.__members__:
        raise InputError(f"torchvision has no weights {name!r} of {arch}.{did_you_mean(name, published.__members__)}")
    return published[name or "DEFAULT"]


def _row(source: str, tensors: dict[str, Tensor]) -> Layout:
    """The layout of torchvision's that these tensors have.

    Raises:
        InputError: a network that is not built here.
    """
    for row in LAYOUTS:
        if "torchvision" in row.origin and fits(row, tensors, None):
            return row
    raise InputError(f"{source} is a network that is not built here; moco_eval.wrap judges torchvision's own")


def _theirs(arch: str, tensors: dict[str, Tensor]) -> nn.Module:
    """torchvision's own network without its classifier."""
    with borrowed_generator():
        net = torchvision.models.get_model(arch, weights=None)
    net.load_state_dict(tensors)
    last = next(name for name in ("fc", "head", "heads", "classifier") if hasattr(net, name))
    layers = getattr(net, last) if arch.startswith("convnext") else []  # its norm comes before its classifier
    setattr(net, last, nn.Sequential(*(layer for layer in layers if not isinstance(layer, nn.Linear))))
    return net.eval()


def _download(source: str, weights) -> dict[str, Tensor]:
    cached = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    if not cached.exists() and (reason := unreachable(weights.url)):
        raise InputError(_offline(source, weights.url, reason))
    try:
        return weights.get_state_dict(progress=False, check_hash=True, map_location="cpu")
    except urllib.error.HTTPError as error:
        raise InputError(f"{source}: the server answers {error.code} for {weights.url}") from None
    except (OSError, RuntimeError) as error:
        raise InputError(_offline(source, weights.url, error)) from None


def _offline(source: str, url: str, error: Exception | str) -> str:
    reason = " ".join(str(error).split())[:200]
    return f"{source}: cannot download {url} ({reason}); without a network, give the path of a file"


def from_timm(rest: str, seed: int) -> Encoder:
    """timm's published weights, through the same proof as a file, and its own network's activations."""
    import timm

    source = f"timm:{rest}"
    if not timm.is_model(rest):
        raise InputError(f"timm {timm.__version__} has no network {rest!r}.{timm_index.near(rest.partition('.')[0])}")
    if not timm.models.is_model_pretrained(rest):
        raise InputError(f"timm has no published weights of {rest}; {_others_of(rest)}")
    given = _reach(source, timm.get_pretrained_cfg(rest))
    try:
        with silenced("huggingface_hub"):
            theirs = timm.create_model(rest, pretrained=True, num_classes=0, **given).eval()
    except Exception as error:  # whatever the hub's client raises without a network
        raise InputError(_offline(source, f"timm's weights of {rest}", error)) from None
    return _of_timm(source, theirs)


def _others_of(name: str) -> str:
    """The way out where timm has a network and not these weights of it."""
    import timm

    network = name.partition(".")[0]
    tags = timm.list_pretrained(f"{network}.*")
    return f"it has {', '.join(tags)}" if tags else f"for an untrained network: random:timm:{network}"


def _reach(source: str, published: Any) -> dict[str, Any]:
    """What timm must be told to find its weights: nothing where the hub answers, else the copy of an earlier download.

    Asked before the hub's client is, which tries for a minute.

    Raises:
        InputError: no network and no copy.
    """
    import huggingface_hub

    hub, revision = (published.hf_hub_id or "").partition("@")[::2]
    url = huggingface_hub.constants.ENDPOINT if hub else published.url
    is_offline = hub and huggingface_hub.constants.HF_HUB_OFFLINE
    reason = "HF_HUB_OFFLINE is set" if is_offline else unreachable(url)
    if reason is None:
        return {}
    names = [published.hf_hub_filename] if published.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    copies = [huggingface_hub.try_to_load_from_cache(hub, name, revision=revision or None) for name in names if hub]
    copy = next((path for path in copies if isinstance(path, str) and Path(path).exists()), None)
    if copy is None:
        raise InputError(_offline(source, f"{hub or url} from {url}" if hub else url, reason))
    return {"pretrained_cfg_overlay": {"file": copy}}


def _of_timm(source: str, theirs: nn.Module) -> Encoder:
    """timm's network as one of ours: same tensors, same activations."""
    tensors, settings = theirs.state_dict(), _settings(theirs)
    names = [*_plain_names(source, tensors), f"timm:{settings['architecture']}"]
    loaded = _the_same(source, tensors, names, theirs)
    return replace(
        loaded,
        run_name=safe_name(f"timm-{source.partition(':')[2]}"),
        origin=f"timm {settings['architecture']}.{settings['tag']}",
        preprocessing=Preprocessing.from_dict(of_timm(settings)),
    )


def _settings(theirs: nn.Module) -> dict[str, Any]:
    return theirs.pretrained_cfg


def _plain_names(source: str, tensors: dict[str, Tensor]) -> list[str]:
    """What ResNets and plain ViTs with these tensors are called here, the ones with MoCo v3's heads included."""
    try:
        arch = infer(source, tensors)
    except InputError:
        return []
    if arch.startswith("timm:") or expected(arch).keys() != tensors.keys():
        return []
    shape = architecture(arch)
    narrow = isinstance(shape, VisionTransformer) and shape.dim < 768
    return [arch, arch.replace("_patch", "_12h_patch")] if narrow else [arch]


def _the_same(source: str, tensors: dict[str, Tensor], names: list[str], theirs: nn.Module) -> Encoder:
    """An encoder of the first of these architectures that gives the features of the library's own network.

    Raises:
        InputError: none of them does.
    """
    for arch in names:
        loaded = _published(source, tensors, arch)
        if _difference(loaded.backbone, theirs, arch) <= TOLERANCE:
            return loaded
    raise InputError(
        f"{source}: its network is not the {names[-1]} that its tensors look like: activations differ; "
        "moco_eval.wrap judges the library's own"
    )


TOLERANCE = 1e-4  # of the largest feature


@torch.no_grad()
def _difference(ours: nn.Module, theirs: nn.Module, arch: str) -> float:
    """The largest difference of the features of one picture, against the largest feature."""
    image = probe_image(architecture(arch))
    features = theirs(image).flatten(1)
    return float((ours(image).flatten(1) - features).abs().max() / features.abs().max().clamp(min=1.0))


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
