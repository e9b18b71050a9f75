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
from torchvision.models.resnet import Bottleneck

from moco_eval.config.load import did_you_mean
from moco_eval.encoders import zoo
from moco_eval.encoders.architectures import (
    ARCHITECTURES,
    Architecture,
    VisionTransformer,
    architecture,
    build_backbone,
    names,
)
from moco_eval.encoders.encoder import Encoder, Preprocessing
from moco_eval.encoders.fingerprint import probe_image
from moco_eval.encoders.head import build_head
from moco_eval.encoders.infer import infer
from moco_eval.encoders.layouts import PREFIXED, SAFETENSORS
from moco_eval.encoders.prove import doubts, prove
from moco_eval.encoders.recognise import Checkpoint, recognise
from moco_eval.encoders.settings_files import Settings, of_timm, settings_beside
from moco_eval.encoders.split import Parts, rename, split
from moco_eval.errors import InputError
from moco_eval.runtime import files
from moco_eval.untrusted.pickle_scan import shown
from moco_eval.untrusted.read import SUFFIXES

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


def _from_file(source: str, arch: str | None, encoder: str | None) -> Encoder:
    path = Path(source)
    found = recognise(path)
    layout, sha256 = found.layout, files.sha256_of(path)
    said = settings_beside(path, sha256, layout.origin) or Settings("")
    taken = encoder or layout.usual
    parts = split(found, taken)
    chosen = arch or _architecture(found, infer(source, parts.backbone), said)
    shape = architecture(chosen)
    backbone = prove(source, parts.backbone, chosen, parts.warnings)
    norm_eps = _norm_eps(found, said)
    set_norm_eps(backbone, norm_eps)
    loaded = Encoder(
        source=source,
        run_name=run_name(path),
        arch=chosen,
        backbone=backbone,
        feature_dim=shape.feature_dim,
        head=build_head(source, parts.head, shape.feature_dim),
        origin=_origin(found) + (f", settings of {said.name}" if said.name else ""),
        sha256=sha256,
        tensors_loaded=len(parts.backbone),
        path=path,
        taken=taken,
        which=said.which or _copied(found, "which", taken),
        usual=said.usual or _copied(found, "usual", layout.usual),
        dropped=parts.dropped,
        warnings=[*parts.warnings, *doubts(parts.backbone, layout.folded), *_open_questions(found, arch, chosen, said)],
        preprocessing=_preprocessing(found, shape, said),
        pretraining=said.pretraining or _pretraining(found),
        norm_eps=norm_eps,
        settings=said.name or None,
    )
    other = "" if loaded.which == loaded.usual else f"-{loaded.which}"
    return replace(loaded, run_name=loaded.run_name + other)


def _from_zoo(name: str, arch: str | None, encoder: str | None) -> Encoder:
    """A known public checkpoint: fetched where it is not there yet, and held against what its manifest expects."""
    entry = zoo.entry(name)
    loaded = _from_file(str(zoo.path_of(name)), arch, encoder)
    if not loaded.origin.startswith(entry.layout):
        loaded.warnings.append(f"the zoo expects {name} in the layout of {entry.layout}, not of {loaded.origin}")
    other = "" if loaded.which == loaded.usual else f"-{loaded.which}"
    return replace(loaded, source=f"zoo:{name}", run_name=_safe(name) + other)


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


def _architecture(found: Checkpoint, inferred: str, said: Settings) -> str:
    """The architecture as the settings or the layout's code base have it; as the shapes say where neither tells.

    Raises:
        InputError: the settings tell of heads or strides that no network built here has.
    """
    if said.arch or (found.layout.format == SAFETENSORS and found.values.get("arch")):
        return said.arch or str(found.values["arch"])
    name = rename(inferred, found.layout.variants)
    if name not in names() and not isinstance(architecture(inferred), VisionTransformer):
        name = inferred
    shape = architecture(name)
    if isinstance(shape, VisionTransformer) and said.heads not in (None, shape.heads):
        name = name.replace("_patch", "_12h_patch")
        if "_12h_12h_" in name or architecture(name).heads != said.heads:  # type: ignore[union-attr]
            raise InputError(f"{found.path}: {said.name} says {said.heads} heads, which no {inferred} built here has")
    if isinstance(shape, Architecture) and said.stride_in_1x1 and shape.block is Bottleneck and not shape.stride_in_1x1:
        name = f"{name}_msra"
    architecture(name)
    return name


def _open_questions(found: Checkpoint, given: str | None, arch: str, said: Settings) -> list[str]:
    """What only the user can know, in words; silent where --arch settles it."""
    shape, layout = architecture(arch), found.layout
    if given or said.arch:
        return []
    words = []
    if isinstance(shape, VisionTransformer):
        usual = "_12h" not in arch and shape.dim <= 384
        if usual and said.heads is None and not layout.settled:
            words.append(_HEADS.format(heads=shape.heads, other=arch.replace("_patch", "_12h_patch")))
    elif layout.origin == "detectron2" and said.stride_in_1x1 is None and "__author__" not in found.values:
        words += [_STRIDE.format(other=f"{arch}_msra")] if shape.block is Bottleneck else []
    elif arch.endswith("_cifar") and layout.origin.startswith(PREFIXED.origin):
        words.append(_PADDING.format(other=f"{arch}_pad2"))
    stated = found.values.get("arch")
    if isinstance(stated, str) and layout.format is None and not arch.startswith(stated.lower()):
        words.append(f"the file says that it is a {shown(stated)}; its tensors look like {arch}")
    return words


_HEADS = (
    "the shapes of a ViT do not tell its attention heads; {heads} were taken, as DeiT, DINO and timm have. MoCo v3's "
    "have 12: --arch {other}"
)
_STRIDE = (
    "a detectron2 model does not say its pixels and strides; RGB and the stride in the 3x3 were taken. For one trained "
    "with detectron2's defaults (BGR, stride in the 1x1): --arch {other}, or its config.yaml beside it"
)
_PADDING = "the shapes do not tell the padding of a CIFAR stem; 1 was taken. solo-learn's is 2: --arch {other}"


def _norm_eps(found: Checkpoint, said: Settings) -> float | None:
    """Of the layer norms, where it is not timm's."""
    copied = found.values.get("norm_eps") if found.layout.format == SAFETENSORS else None
    eps = said.norm_eps or copied or found.layout.norm_eps
    if eps is not None and not (isinstance(eps, float) and 0 < eps < 1):
        raise InputError(f"{found.path}: the layer norms' epsilon is {eps!r}; it must lie between 0 and 1")
    return eps


def set_norm_eps(net: nn.Module, eps: float | None) -> None:
    """Where a code base has layer norms with another epsilon than timm's."""
    for module in net.modules():
        if eps is not None and isinstance(module, nn.LayerNorm):
            module.eps = eps


# What travels with the backbone


def _preprocessing(found: Checkpoint, arch: Architecture | VisionTransformer, said: Settings) -> Preprocessing | None:
    """What the weights expect: as the file itself says, or settings beside it, or its layout.

    Raises:
        InputError: settings with another image size than a ViT has.
    """
    layout = found.layout
    if layout.preprocessing is None:
        return _said(found)
    if said.preprocessing:
        if isinstance(arch, VisionTransformer) and said.preprocessing.size != arch.size:
            there = f"{said.preprocessing.size} pixels, but the network takes {arch.size}"
            raise InputError(f"{found.path}: {said.name} says images of {there}; correct it, or move it away")
        return said.preprocessing
    if said.arch:
        return None  # our own settings say so
    if isinstance(arch, VisionTransformer):
        return _sized(layout.preprocessing, arch)
    if arch.stride_in_1x1 and layout.origin.startswith("detectron2"):
        return MSRA
    return layout.cifar if arch.cifar_stem else layout.preprocessing


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


def _copied(found: Checkpoint, name: str, usual: str) -> str:
    """For a copy that our `convert` wrote, what it was made of."""
    return str(found.values.get(name, usual)) if found.layout.format == SAFETENSORS else usual


def _pretraining(found: Checkpoint) -> dict[str, Any] | None:
    """What the file says of its pretraining; others' pretraining checkpoints say how many epochs they have had."""
    values: Any = found.values.get("pretraining")
    if values is not None and not isinstance(values, dict):
        raise InputError(f"{found.path}: its pretraining entry is a {type(values).__name__}, not a dict")
    epochs = found.values.get("epoch")
    if values is None and found.layout.head and isinstance(epochs, int):
        return {"epochs": epochs}
    return values
