"""Load anyone's encoder with proof: every backbone tensor matched in name, shape and dtype, or an error."""

import difflib
import hashlib
import re
import urllib.error
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights, list_models

from moco_eval import files, zoo
from moco_eval.config import did_you_mean
from moco_eval.encoders import beside
from moco_eval.encoders.build import (
    ARCHITECTURES,
    Architecture,
    VisionTransformer,
    architecture,
    build_backbone,
)
from moco_eval.encoders.encoder import Encoder, Preprocessing
from moco_eval.encoders.head import build_head
from moco_eval.encoders.infer import infer
from moco_eval.encoders.layouts import SAFETENSORS
from moco_eval.encoders.parts import Parts, rename, split
from moco_eval.encoders.probe import probe_image
from moco_eval.encoders.prove import doubts, prove
from moco_eval.encoders.read import SUFFIXES
from moco_eval.encoders.recognise import Checkpoint, recognise
from moco_eval.errors import InputError

# what Caffe's ResNets take, and detectron2's configurations for them say
MSRA = Preprocessing(mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0), channels="BGR", range=255)


def load(source: str, arch: str | None = None, encoder: str | None = None, seed: int = 0) -> Encoder:
    """Load and prove an encoder; its backbone comes back in eval mode.

    Args:
        source: a checkpoint's path, `random:ARCH`, `torchvision:ARCH[:WEIGHTS]`, `timm:NAME`, `zoo:NAME` or `pixels`.
        arch: overrides the architecture read from the tensors' shapes.
        encoder: 'query' or 'key' (the momentum encoder); by default the one that the method itself evaluates.
        seed: of the weights of `random:`.
    Raises:
        InputError: unreadable, unknown, or one tensor too few, too many, of another shape or not finite.
    """
    if encoder not in (None, "query", "key"):
        raise InputError(f"--encoder is {encoder!r}; it must be query or key")
    if arch is not None:
        architecture(arch)
    kind, colon, rest = source.partition(":")
    if colon and kind == "zoo":
        return _from_zoo(rest, arch, encoder)
    if source != "pixels" and not (colon and kind in ("random", "torchvision", "timm")):
        return _from_file(source, arch, encoder)
    if encoder == "key":
        raise InputError(f"--encoder key: {source} has no key encoder; leave it out")
    if source == "pixels":
        loaded = _pixels()
    else:
        loaded = {"random": _random, "torchvision": _torchvision, "timm": _timm}[kind](rest, seed)
    if arch not in (None, loaded.arch):
        raise InputError(f"--arch {arch} contradicts {source}; leave it out")
    return loaded


def _random(arch: str, seed: int) -> Encoder:
    found = architecture(arch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build_backbone(arch, fork=False)
    return Encoder(
        source=f"random:{arch}",
        run_name=f"random-{arch}",
        arch=arch,
        backbone=net.eval(),
        feature_dim=found.feature_dim,
        head=None,
        origin=f"random initialisation, seed {seed}",
        sha256=sha256_of_tensors(net.state_dict()),
        tensors_loaded=len(net.state_dict()),
        preprocessing=_sized(Preprocessing(), found) if isinstance(found, VisionTransformer) else None,
    )


def _pixels() -> Encoder:
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


def _torchvision(rest: str, seed: int) -> Encoder:
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
        run_name=_safe(f"torchvision-{arch}-{weights.name}" if name else f"torchvision-{arch}"),
        origin=f"torchvision {weights}",
        dropped=[("fc (2 tensors)", "a classifier on the pooled feature, no part of the encoder")],
        preprocessing=Preprocessing(cuts.crop_size[0], cuts.resize_size[0], tuple(cuts.mean), tuple(cuts.std)),
    )


def _download(source: str, weights) -> dict[str, Tensor]:
    try:
        return weights.get_state_dict(progress=False, check_hash=True, map_location="cpu")
    except urllib.error.HTTPError as error:
        raise InputError(f"{source}: the server answers {error.code} for {weights.url}") from None
    except (OSError, RuntimeError) as error:
        raise InputError(_offline(source, weights.url, error)) from None


def _offline(source: str, url: str, error: Exception) -> str:
    words = " ".join(str(error).split())[:200]
    return f"{source}: cannot download {url} ({words}); without a network, give the path of a file"


def _timm(rest: str, seed: int) -> Encoder:
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
        run_name=_safe(f"timm-{source.partition(':')[2]}"),
        origin=f"timm {settings['architecture']}.{settings['tag']}",
        preprocessing=Preprocessing.from_dict(beside.of_timm(settings)),
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


def _from_file(source: str, arch: str | None, encoder: str | None) -> Encoder:
    found = recognise(Path(source))
    layout = found.layout
    which = encoder or layout.usual
    parts = split(found, which)
    chosen = arch or _with_variants(infer(source, parts.backbone), found)
    shape = architecture(chosen)
    backbone = prove(source, parts.backbone, chosen, parts.warnings)
    norm_eps = found.values.get("norm_eps", layout.norm_eps)
    set_norm_eps(backbone, norm_eps)
    pixels, said = _preprocessing(found, shape)
    return Encoder(
        source=source,
        run_name=run_name(Path(source)) + ("-key" if encoder == "key" else ""),
        arch=chosen,
        backbone=backbone,
        feature_dim=shape.feature_dim,
        head=build_head(source, parts.head, shape.feature_dim),
        origin=_origin(found) + said,
        sha256=files.sha256_of(source),
        tensors_loaded=len(parts.backbone),
        path=found.path,
        taken=which,
        which=_which(found, which),
        usual=layout.usual,
        dropped=parts.dropped,
        warnings=[*parts.warnings, *doubts(parts.backbone, layout.folded), *_open_questions(found, arch, chosen)],
        preprocessing=pixels,
        pretraining=_pretraining(found),
        norm_eps=norm_eps,
    )


def _from_zoo(name: str, arch: str | None, encoder: str | None) -> Encoder:
    """A known public checkpoint: fetched where it is not there yet, and held against what its manifest expects."""
    entry = zoo.entry(name)
    loaded = _from_file(str(zoo.path_of(name)), arch, encoder)
    if not loaded.origin.startswith(entry.layout):
        loaded.warnings.append(f"the zoo expects {name} in the layout of {entry.layout}, not of {loaded.origin}")
    return replace(loaded, source=f"zoo:{name}", run_name=_safe(name) + ("-key" if encoder == "key" else ""))


def run_name(path: Path) -> str:
    """A checkpoint's short name: its stem; RUN-epoch_0012 for RUN/checkpoints/epoch_0012.pth."""
    path = path.absolute()
    stem = next(
        (path.name.removesuffix(suffix) for suffix in (".pth.tar", *SUFFIXES) if path.name.endswith(suffix)),
        "",
    )
    stem = stem or path.stem
    if path.parent.name == "checkpoints" and path.parent.parent.name:
        stem = f"{path.parent.parent.name}-{stem}"
    return _safe(stem)


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._")[:100] or "checkpoint"


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Of names, shapes and bytes, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# What the shapes do not tell


def _with_variants(arch: str, found: Checkpoint) -> str:
    """The architecture as the layout's code base has it; as the shapes say where there is no such form of it."""
    said = found.values.get("arch")
    if found.layout.format == SAFETENSORS and isinstance(said, str):
        return said
    variant = rename(arch, found.layout.variants)
    try:
        architecture(variant)
    except InputError:
        return arch
    return variant


def _open_questions(found: Checkpoint, given: str | None, arch: str) -> list[str]:
    """What only the user can know, in words; silent where --arch settles it."""
    shape = architecture(arch)
    if given or not found.layout.doubt or not isinstance(shape, VisionTransformer) or shape.dim > 384:
        return []
    return [found.layout.doubt.format(heads=shape.heads, other=arch.replace("_patch", "_12h_patch"))]


def set_norm_eps(net: nn.Module, eps: float | None) -> None:
    """Where a code base has layer norms with another epsilon than timm's."""
    for module in net.modules():
        if eps is not None and isinstance(module, nn.LayerNorm):
            module.eps = eps


# What travels with the backbone


def _preprocessing(found: Checkpoint, arch: Architecture | VisionTransformer) -> tuple[Preprocessing | None, str]:
    """What the weights expect, and where that was read if not in the file or its layout."""
    layout = found.layout
    if layout.preprocessing is None:
        return _said(found), ""
    if layout.beside and (there := beside.preprocessing_beside(found.path)):
        return there[0], f", preprocessing as {there[1]} says"
    if isinstance(arch, VisionTransformer):
        return _sized(layout.preprocessing, arch), ""
    if arch.stride_in_1x1:
        return MSRA, ""
    return (layout.cifar if arch.cifar_stem else layout.preprocessing), ""


def _sized(pixels: Preprocessing, arch: VisionTransformer) -> Preprocessing:
    """The same for the only image size that a ViT takes."""
    return replace(pixels, size=arch.size, resize=arch.size * pixels.resize // pixels.size)


def _said(found: Checkpoint) -> Preprocessing | None:
    values = found.values.get("preprocessing")
    if values is None:
        return None
    try:
        return Preprocessing.from_dict(values)
    except InputError as error:
        raise InputError(f"{found.path}: {error}") from None


def _origin(found: Checkpoint) -> str:
    """The layout; for a copy that our `convert` wrote, also what it was made of."""
    made_of = found.values.get("origin") if found.layout.format == SAFETENSORS else None
    return f"{found.layout.origin}, from {made_of}" if made_of else found.layout.origin


def _which(found: Checkpoint, asked: str) -> str:
    """The encoder asked for; for a copy that our `convert` wrote, the one it was made of."""
    return str(found.values.get("which", asked)) if found.layout.format == SAFETENSORS else asked


def _pretraining(found: Checkpoint) -> dict[str, Any] | None:
    """What the file says of its pretraining; others' pretraining checkpoints say how many epochs they have had."""
    values: Any = found.values.get("pretraining")
    if values is not None and not isinstance(values, dict):
        raise InputError(f"{found.path}: its pretraining entry is a {type(values).__name__}, not a dict")
    epochs = found.values.get("epoch")
    if values is None and found.layout.head and isinstance(epochs, int):
        return {"epochs": epochs}
    return values
