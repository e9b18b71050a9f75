"""Load anyone's encoder with proof: every backbone tensor matched in name, shape and dtype, or an error."""

import hashlib
import re
import urllib.error
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights, list_models

from moco_eval import files
from moco_eval.config import did_you_mean
from moco_eval.encoders.build import ARCHITECTURES, architecture, build_backbone, build_resnet
from moco_eval.encoders.encoder import Encoder, Preprocessing
from moco_eval.encoders.read import SUFFIXES
from moco_eval.encoders.recognise import SAFETENSORS, Checkpoint, recognise
from moco_eval.errors import InputError

OPTIONAL = "num_batches_tracked"  # counts that no forward pass reads; files of torch before 0.4.1 lack them
NOT_YET = ("timm", "zoo")


def load(source: str, arch: str | None = None, encoder: str = "query", seed: int = 0) -> Encoder:
    """Load and prove an encoder; its backbone comes back in eval mode.

    Args:
        source: a checkpoint's path, `random:ARCH`, `torchvision:ARCH[:WEIGHTS]` or `pixels`.
        arch: overrides the architecture read from the tensors' shapes.
        encoder: 'query' or 'key' (MoCo's momentum encoder).
        seed: of the weights of `random:`.
    Raises:
        InputError: unreadable, unknown, or one tensor too few, too many, of another shape or not finite.
    """
    if encoder not in ("query", "key"):
        raise InputError(f"--encoder is {encoder!r}; it must be query or key")
    if arch is not None:
        architecture(arch)
    kind, colon, rest = source.partition(":")
    if colon and kind in NOT_YET:
        raise InputError(f"{source}: the prefix {kind}: is not built yet; give a path, random:ARCH or torchvision:ARCH")
    if source != "pixels" and not (colon and kind in ("random", "torchvision")):
        return _from_file(source, arch, encoder)
    if encoder == "key":
        raise InputError(f"--encoder key: {source} has no key encoder; leave it out")
    loaded = _pixels() if source == "pixels" else _random(rest, seed) if kind == "random" else _torchvision(rest)
    if arch not in (None, loaded.arch):
        raise InputError(f"--arch {arch} contradicts {source}; leave it out")
    return loaded


def _random(arch: str, seed: int) -> Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build_resnet(arch)
    net.fc = nn.Identity()
    return Encoder(
        source=f"random:{arch}",
        run_name=f"random-{arch}",
        arch=arch,
        backbone=net.eval(),
        feature_dim=architecture(arch).feature_dim,
        head=None,
        origin=f"random initialisation, seed {seed}",
        sha256=sha256_of_tensors(net.state_dict()),
        tensors_loaded=len(net.state_dict()),
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


def _torchvision(rest: str) -> Encoder:
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
    parts = Parts.of({key: value for key, value in tensors.items() if not key.startswith("fc.")}, {})
    cuts = weights.transforms()
    return Encoder(
        source=source,
        run_name=_safe(f"torchvision-{arch}-{weights.name}" if name else f"torchvision-{arch}"),
        arch=arch,
        backbone=prove(source, parts.backbone, arch, parts.warnings),
        feature_dim=architecture(arch).feature_dim,
        head=None,
        origin=f"torchvision {weights}",
        sha256=sha256_of_tensors(parts.backbone),
        tensors_loaded=len(parts.backbone),
        dropped=[_classifier([tensors["fc.weight"], tensors["fc.bias"]])],
        warnings=parts.warnings,
        preprocessing=Preprocessing(cuts.crop_size[0], cuts.resize_size[0], tuple(cuts.mean), tuple(cuts.std)),
    )


def _download(source: str, weights) -> dict[str, Tensor]:
    try:
        return weights.get_state_dict(progress=False, check_hash=True, map_location="cpu")
    except urllib.error.HTTPError as error:
        raise InputError(f"{source}: the server answers {error.code} for {weights.url}") from None
    except (OSError, RuntimeError) as error:
        words = " ".join(str(error).split())
        raise InputError(
            f"{source}: cannot download {weights.url} ({words}); without a network, give the path of a file"
        ) from None


def _from_file(source: str, arch: str | None, encoder: str) -> Encoder:
    found = recognise(Path(source))
    parts = split(found, encoder)
    arch = arch or infer(source, parts.backbone)
    backbone = prove(source, parts.backbone, arch, parts.warnings)
    return Encoder(
        source=source,
        run_name=run_name(Path(source)) + ("-key" if encoder == "key" else ""),
        arch=arch,
        backbone=backbone,
        feature_dim=architecture(arch).feature_dim,
        head=_head(source, parts.head, architecture(arch).feature_dim),
        origin=_origin(found),
        sha256=files.sha256_of(source),
        tensors_loaded=len(parts.backbone),
        which=_which(found, encoder),
        dropped=parts.dropped,
        warnings=parts.warnings,
        preprocessing=_preprocessing(found),
        pretraining=_pretraining(found),
    )


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


# A checkpoint's tensors, in groups


@dataclass
class Parts:
    """A state dict cut up: the backbone and head under torchvision's names in fp32, and what was left.

    `raw` holds backbone and head exactly as they are in the file, in its order, for exact copies.
    """

    backbone: dict[str, Tensor]
    head: dict[str, Tensor]
    raw: dict[str, Tensor]
    dropped: list[tuple[str, str]]
    warnings: list[str]

    @classmethod
    def of(cls, backbone: dict[str, Tensor], head: dict[str, Tensor]) -> "Parts":
        warnings: list[str] = []
        return cls(_fp32(backbone, warnings), _fp32(head, warnings), backbone | head, [], warnings)


def split(found: Checkpoint, encoder: str) -> Parts:
    """Cut a checkpoint into backbone, head and the rest, each with its reason.

    Raises:
        InputError: the file lacks that encoder, or holds a tensor whose purpose is unknown.
    """
    layout = found.layout
    prefix = layout.prefix(encoder)
    ours = {name.removeprefix(prefix): tensor for name, tensor in found.tensors.items() if name.startswith(prefix)}
    if not ours:
        raise InputError(f"{found.path}: {_absent(found, encoder)}")
    rest = [name for name in found.tensors if not name.startswith(prefix)]
    head = {name: tensor for name, tensor in ours.items() if name.startswith(layout.head)}
    backbone = {name: tensor for name, tensor in ours.items() if name not in head}
    projection = {name.removeprefix(layout.head): tensor for name, tensor in head.items()} if layout.projection else {}
    parts = Parts.of(backbone, projection)
    parts.raw = {name: tensor for name, tensor in ours.items() if layout.projection or name not in head}
    if head and not layout.projection:
        parts.dropped.append(_classifier(list(head.values())))
    parts.dropped += [*_rest(found, rest, encoder), *found.dropped]
    return parts


def _absent(found: Checkpoint, encoder: str) -> str:
    """Why a file lacks an encoder, and the way out."""
    if encoder == "key" and "bank" in found.tensors:
        return "--encoder key: a memory bank has no key encoder, its keys are the bank's slots; take --encoder query"
    other = "key" if encoder == "query" else "query"
    return f"only the {other} encoder is in this file: --encoder {other}"


def _classifier(tensors: list[Tensor]) -> tuple[str, str]:
    return f"fc ({len(tensors)} tensors)", "a classifier on the pooled feature, no part of the encoder"


def _rest(found: Checkpoint, names: list[str], encoder: str) -> Iterable[tuple[str, str]]:
    layout = found.layout
    other = layout.key if encoder == "query" else layout.query
    others = [name for name in names if other and name.startswith(other)]
    if others and encoder == "query":
        yield (
            f"key encoder ({len(others)} tensors)",
            "the query encoder is evaluated; --encoder key takes this one",
        )
    elif others:
        yield f"query encoder ({len(others)} tensors)", "--encoder key was asked for"
    for name in names:
        if name in others:
            continue
        reason = next(((what, why) for mark, what, why in layout.dropped if re.match(mark, name)), None)
        if reason is None:
            raise InputError(f"{found.path}: tensor {name} belongs to no part of a {layout.origin} checkpoint")
        yield reason


def _fp32(tensors: dict[str, Tensor], warnings: list[str]) -> dict[str, Tensor]:
    """Quantised, half and double weights as fp32, which is what evaluations compute in; says so."""
    odd = [
        name for name, t in tensors.items() if t.is_quantized or (t.is_floating_point() and t.dtype != torch.float32)
    ]
    if odd:
        kinds = ", ".join(sorted({str(tensors[name].dtype).removeprefix("torch.") for name in odd}))
        warnings.append(f"{len(odd)} tensors are stored as {kinds} and were cast to float32 (first: {odd[0]})")
    cast = {name: tensors[name].dequantize() if tensors[name].is_quantized else tensors[name] for name in odd}
    return {name: cast[name].float() if name in cast else tensor for name, tensor in tensors.items()}


# Which architecture?


@cache
def _expected(arch: str) -> dict[str, Tensor]:
    """Names, shapes and dtypes of an architecture's backbone, without its memory."""
    with torch.device("meta"):
        return dict(build_backbone(arch).state_dict())


def _shapes(tensors: Mapping[str, Tensor]) -> set[tuple[str, torch.Size]]:
    return {(name, tensor.shape) for name, tensor in tensors.items() if not name.endswith(OPTIONAL)}


def nearest(tensors: Mapping[str, Tensor]) -> tuple[str, float]:
    """The architecture that shares most names and shapes with these tensors, and the share (1 is all)."""
    ours = _shapes(tensors)

    def share(arch: str) -> float:
        theirs = _shapes(_expected(arch))
        return len(ours & theirs) / len(ours | theirs)

    best = max(ARCHITECTURES, key=share)
    return best, share(best)


def infer(source: str, tensors: Mapping[str, Tensor]) -> str:
    """The architecture of these backbone tensors.

    Raises:
        InputError: they are of none that we build; the message says what they are.
    """
    best, share = nearest(tensors)
    if share < 0.9 and structure(tensors) != structure(_expected(best)):
        raise InputError(
            f"{source}: not an architecture we build: it is {structure(tensors)}; the nearest is {best}, "
            f"{structure(_expected(best))}"
        )
    return best


def structure(tensors: Mapping[str, Tensor]) -> str:
    """A ResNet's tensors in words: blocks per stage, widths, stem and shortcuts."""
    blocks: dict[str, set[str]] = {}
    for name in tensors:
        if found := re.match(r"layer(\d+)\.(\d+)\.", name):
            blocks.setdefault(found[1], set()).add(found[2])
    if not blocks or "conv1.weight" not in tensors or tensors["conv1.weight"].ndim != 4:
        first = ", ".join(list(tensors)[:3])
        return f"no ResNet under torchvision's names (its tensors: {first}, ...)"
    kind = "bottleneck" if any(name.endswith("conv3.weight") for name in tensors) else "basic"
    depth = "-".join(str(len(blocks[stage])) for stage in sorted(blocks, key=int))
    stem = tensors["conv1.weight"].shape
    widths = [
        tensors[name].shape[0] for name in (f"layer{stage}.0.conv1.weight" for stage in blocks) if name in tensors
    ]
    groups = _groups(tensors)
    shortcuts = "" if any(".downsample." in name for name in tensors) else ", shortcuts without parameters"
    return (
        f"a ResNet of {len(blocks)} stages of {depth} {kind} blocks, {'-'.join(map(str, widths))} channels wide"
        f"{f' in {groups} groups' if groups > 1 else ''}, "
        f"stem of {stem[0]} channels and {'x'.join(map(str, stem[2:]))} pixels{shortcuts}"
    )


def _groups(tensors: Mapping[str, Tensor]) -> int:
    """Groups of the 3x3 convolutions in the bottlenecks: a ResNeXt's."""
    before, grouped = (tensors.get(f"layer1.0.conv{i}.weight") for i in (1, 2))
    if before is None or grouped is None or grouped.ndim != 4 or not grouped.shape[1]:
        return 1
    return before.shape[0] // grouped.shape[1]


# Proof of load


def prove(source: str, tensors: dict[str, Tensor], arch: str, warnings: list[str]) -> nn.Module:
    """Build `arch`, load the tensors, and show that each arrived bit for bit.

    Args:
        source: for messages.
        tensors: the backbone's, under torchvision's names, parameters and BN buffers alike.
        arch: a key of ARCHITECTURES.
        warnings: doubts are appended here.
    Raises:
        InputError: a tensor is missing, unexpected, of another shape or dtype, or not finite.
    """
    expected = _expected(arch)
    counters = [name for name in expected if name.endswith(OPTIONAL)]
    if not any(name in tensors for name in counters):
        warnings.append(f"num_batches_tracked is absent ({len(counters)} counts, as in old files) and was set to 0")
        tensors = tensors | {name: torch.zeros((), dtype=torch.int64) for name in counters}
    _require_match(source, tensors, expected, arch)
    _require_finite(source, tensors)
    _doubt_statistics(tensors, warnings)
    with torch.device("meta"):
        net = build_backbone(arch)
    net.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    loaded = net.state_dict()
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in loaded)
    return net.eval()


def _require_match(source: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], arch: str) -> None:
    shared = [name for name in expected if name in tensors]
    wrong: dict[str, list[str]] = {
        "have another shape": [name for name in shared if tensors[name].shape != expected[name].shape],
        "are missing": [name for name in expected if name not in tensors],
        "are unexpected": [name for name in tensors if name not in expected],
        "have another dtype": [name for name in shared if tensors[name].dtype != expected[name].dtype],
    }
    wrong = {what: names for what, names in wrong.items() if names}
    if not wrong:
        return
    counts = ", ".join(f"{len(names)} {what}" for what, names in wrong.items())
    what, names = next(iter(wrong.items()))
    raise InputError(
        f"{source}: of the {len(expected)} backbone tensors of {arch}, {counts} "
        f"(first: {names[0]}{_detail(what, names[0], tensors, expected)}). {_explanation(tensors, arch)}"
    )


def _detail(what: str, name: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    if what == "have another shape":
        return f", {_size(tensors[name])}, expected {_size(expected[name])}"
    if what == "have another dtype":
        return f", {tensors[name].dtype}, expected {expected[name].dtype}"
    return f", {_size(expected[name] if what == 'are missing' else tensors[name])}"


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"


def _explanation(tensors: Mapping[str, Tensor], arch: str) -> str:
    """The nearest explanation of a mismatch, and the way out."""
    best, share = nearest(tensors)
    if best != arch and share > 0.9:
        stem = " (CIFAR stem)" if ARCHITECTURES[best].cifar_stem and not ARCHITECTURES[arch].cifar_stem else ""
        return f"This looks like {best}{stem}: try --arch {best}."
    if structure(tensors) != structure(_expected(arch)):
        return f"The file holds {structure(tensors)}."
    return f"The rest is a {arch}: the file is incomplete or was altered; write it again from where it was trained."


def _require_finite(source: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise InputError(
                f"{source}: {name} has {count} values that are not finite, of {tensor.numel()}; the training that "
                "wrote it diverged: take an earlier checkpoint"
            )


def _doubt_statistics(tensors: Mapping[str, Tensor], warnings: list[str]) -> None:
    means = [tensor for name, tensor in tensors.items() if name.endswith("running_mean")]
    variances = [tensor for name, tensor in tensors.items() if name.endswith("running_var")]
    if all((mean == 0).all() for mean in means) and all((variance == 1).all() for variance in variances):
        warnings.append("every BN running statistic is at its initial value: this encoder never saw data in train mode")
    elif any((variance < 0).any() for variance in variances):
        warnings.append("a BN running variance is negative: the features will not be finite")


# What travels with the backbone


def _head(source: str, tensors: dict[str, Tensor], feature_dim: int) -> nn.Module | None:
    """The projection head: linear (MoCo v1) or two layers with a ReLU (v2); None where the file has none."""
    if not tensors:
        return None
    if tensors.keys() == {"weight", "bias"}:
        head: nn.Module = nn.Linear(feature_dim, len(tensors["bias"]), device="meta")
    elif tensors.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}:
        hidden, dim = len(tensors["0.bias"]), len(tensors["2.bias"])
        layers = nn.Linear(feature_dim, hidden, device="meta"), nn.ReLU(), nn.Linear(hidden, dim, device="meta")
        head = nn.Sequential(*layers)
    else:
        raise InputError(f"{source}: the projection head is neither linear nor an MLP: it holds {', '.join(tensors)}")
    for name, wanted in head.state_dict().items():
        if tensors[name].shape != wanted.shape or tensors[name].dtype != wanted.dtype:
            there = f"{_size(tensors[name])} {tensors[name].dtype}"
            raise InputError(f"{source}: the projection head's {name} is {there}, expected {_size(wanted)} float32")
    _require_finite(source, {f"the head's {name}": tensor for name, tensor in tensors.items()})
    head.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    return head.eval()


def _preprocessing(found: Checkpoint) -> Preprocessing | None:
    if found.layout.preprocessing is not None:
        return found.layout.preprocessing
    values = found.values.get("preprocessing")
    if values is None:
        return None
    try:
        return Preprocessing.from_dict(values)
    except (TypeError, KeyError) as error:
        raise InputError(f"{found.path}: its preprocessing entry is damaged: {error}") from None


def _origin(found: Checkpoint) -> str:
    """The layout; for a copy that our `convert` wrote, also what it was made of."""
    made_of = found.values.get("origin") if found.layout.format == SAFETENSORS else None
    return f"{found.layout.origin}, from {made_of}" if made_of else found.layout.origin


def _which(found: Checkpoint, asked: str) -> str:
    """The encoder asked for; for a copy that our `convert` wrote, the one it was made of."""
    return str(found.values.get("which", asked)) if found.layout.format == SAFETENSORS else asked


def _pretraining(found: Checkpoint) -> dict[str, Any] | None:
    """What the file says of its pretraining; an official one says how many epochs it has had."""
    values: Any = found.values.get("pretraining")
    if values is not None and not isinstance(values, dict):
        raise InputError(f"{found.path}: its pretraining entry is a {type(values).__name__}, not a dict")
    epochs = found.values.get("epoch")
    if values is None and found.layout.projection and isinstance(epochs, int):
        return {"epochs": epochs}
    return values
