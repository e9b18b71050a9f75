"""Encoders that another library builds: random weights, torchvision's and timm's published ones, raw pixels."""

import contextlib
import hashlib
import logging
import urllib.error
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights, list_models

from moco_eval.config.load import did_you_mean
from moco_eval.encoders import timm_index
from moco_eval.encoders.architectures import ARCHITECTURES, architecture, build_backbone, sized
from moco_eval.encoders.connection import unreachable
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
        preprocessing=Preprocessing(cuts.crop_size[0], cuts.resize_size[0], tuple(cuts.mean), tuple(cuts.std)),
    )


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
        with _hub_is_quiet():
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


@contextlib.contextmanager
def _hub_is_quiet() -> Iterator[None]:
    """Without the hub client's lines about its attempts: what stopped it is said once, by us."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


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
