"""Loading with proof: every backbone tensor is matched in name, shape and type, or nothing is loaded."""

import hashlib
import re
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

from moco_eval import files
from moco_eval.encoders.build import ARCHITECTURES, architecture, build_backbone, build_resnet
from moco_eval.encoders.encoder import Encoder, Preprocessing
from moco_eval.encoders.recognise import Contents, State, describe_shapes, infer_architecture, read
from moco_eval.errors import InputError


def load(source: str, arch: str | None = None, encoder: str = "query", seed: int = 0) -> Encoder:
    """Load CHECKPOINT.

    Args:
        source: a path, or random:ARCH, torchvision:ARCH[:WEIGHTS], pixels.
        arch: overrides what the shapes say.
        encoder: 'query' or 'key' (the momentum encoder).
        seed: of `random:`.
    Raises:
        InputError: not a checkpoint, or not every backbone tensor is accounted for; the message says which.
    """
    kind, _, rest = source.partition(":")
    if kind == "random" and rest:
        return _random(source, rest, seed)
    if kind == "torchvision" and rest:
        return _torchvision(source, rest)
    if source == "pixels":
        return _pixels()
    if kind in ("timm", "zoo") and rest:
        raise InputError(f"{source}: {kind}: encoders are not built yet; give a file, random:, torchvision: or pixels")
    return _file(source, arch, encoder)


def _file(source: str, arch: str | None, which: str) -> Encoder:
    path = Path(source)
    contents = read(path)
    if which not in contents.encoders:
        has = "only the momentum encoder: take --encoder key" if which == "query" else "no momentum encoder"
        raise InputError(f"{path} ({contents.origin}) holds {has}")
    state = contents.encoders[which]
    name = arch or infer_architecture(state)
    if name is None:
        raise InputError(f"{path} is no architecture that is known here: {describe_shapes(state)}; {_known()}")
    backbone, loaded, warnings = _proven(path, state, name, given=arch is not None)
    head, dropped = _head(state, contents)
    preprocessing, extras = contents.extras.get("preprocessing"), contents.extras
    return Encoder(
        source=source,
        run_name=run_name(path) + ("-key" if which == "key" else ""),
        arch=name,
        backbone=backbone,
        feature_dim=architecture(name).feature_dim,
        head=head,
        origin=contents.origin,
        sha256=files.sha256_of(path),
        tensors_loaded=loaded,
        dropped=dropped + _dropped(contents, which),
        warnings=warnings,
        preprocessing=Preprocessing.from_dict(preprocessing) if preprocessing else Preprocessing(),
        pretraining=extras.get("pretraining") or _official(extras),
    )


def _official(extras: dict) -> dict | None:
    """What an official checkpoint says of its pretraining: how many epochs."""
    return {"epochs": extras["epoch"]} if isinstance(extras.get("epoch"), int) else None


def _proven(path: Path, state: State, arch: str, given: bool) -> tuple[nn.Module, int, list[str]]:
    """A backbone that holds exactly these tensors; how many; doubts."""
    backbone = build_backbone(arch)
    wanted, warnings = backbone.state_dict(), []
    found = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    counters = [name for name in wanted if name.endswith("num_batches_tracked") and name not in found]
    if counters:
        warnings.append(f"{len(counters)} num_batches_tracked counters are not in the file; nothing reads them")
        found |= {name: wanted[name] for name in counters}
    _require_all(path, found, wanted, arch, given)
    halves = sorted(
        {str(t.dtype) for n, t in found.items() if wanted[n].is_floating_point() and t.dtype != torch.float32}
    )
    if halves:
        warnings.append(f"stored as {', '.join(sorted(halves))}, loaded as float32")
    for name, tensor in found.items():
        if not tensor.isfinite().all():
            raise InputError(f"{path}: {name} holds values that are not finite; the training that made it diverged")
    backbone.load_state_dict({name: tensor.to(wanted[name].dtype) for name, tensor in found.items()}, strict=True)
    means = [tensor for name, tensor in found.items() if name.endswith("running_mean")]
    if means and not any(mean.any() for mean in means):
        warnings.append("every batch-norm running mean is zero, its initial value: was this network ever trained?")
    return backbone, len(found) - len(counters), warnings


def _require_all(path: Path, found: State, wanted: State, arch: str, given: bool) -> None:
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    shapes = [name for name in found if name in wanted and found[name].shape != wanted[name].shape]
    types = [n for n in found if n in wanted and found[n].is_floating_point() != wanted[n].is_floating_point()]
    start = f"{path}: {{}} of {len(wanted)} backbone tensors {{}} {arch} (first: {{}}).{_hint(found, arch, given)}"
    if shapes:
        sizes = f"{shapes[0]}, {_size(found[shapes[0]])}, expected {_size(wanted[shapes[0]])}"
        raise InputError(start.format(len(shapes), "have another shape in", sizes))
    if missing:
        raise InputError(start.format(len(missing), "are missing for", missing[0]))
    if extra:
        raise InputError(
            f"{path}: {len(extra)} tensors have no place in {arch} (first: {extra[0]}).{_hint(found, arch, given)}"
        )
    if types:
        kind = f"{types[0]} is {found[types[0]].dtype}"
        raise InputError(f"{path}: {len(types)} tensors are of another type ({kind}); quantised weights are not read")


def _size(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _hint(found: State, arch: str, given: bool) -> str:
    """The nearest explanation."""
    likely = infer_architecture(found) if "conv1.weight" in found else None
    if likely and likely != arch:
        return f" This looks like {likely}: " + (f"try --arch {likely}." if given else "is the file damaged?")
    inner = found.get("layer1.0.conv1.weight")
    if inner is not None and "layer1.0.conv3.weight" in found and inner.shape[0] == 2 * found["conv1.weight"].shape[0]:
        return " This looks like wide_resnet50_2 or wide_resnet101_2, which are not read yet."
    return ""


def _known() -> str:
    return f"known: {', '.join(ARCHITECTURES)}"


def _head(state: State, contents: Contents) -> tuple[nn.Module | None, list[tuple[str, str]]]:
    """The projection head, or None and why `fc` is left out."""
    parts = {name.removeprefix("fc."): tensor for name, tensor in state.items() if name.startswith("fc.")}
    if not parts:
        return None, []
    if not contents.layout.head:
        return None, [
            (f"fc ({len(parts)} tensors)", "a classifier on top of the pooled feature, not part of the encoder")
        ]
    if parts.keys() == {"weight", "bias"}:
        head: nn.Module = _linear(parts["weight"])
    elif parts.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}:
        head = nn.Sequential(_linear(parts["0.weight"]), nn.ReLU(), _linear(parts["2.weight"]))
    else:
        return None, [(f"fc ({len(parts)} tensors)", f"a head of unknown form: {', '.join(parts)}")]
    head.load_state_dict({name: tensor.float() for name, tensor in parts.items()}, strict=True)
    return head, [(f"fc ({len(parts)} tensors)", "the projection head: read, and used only where --feature head asks")]


def _linear(weight: torch.Tensor) -> nn.Linear:
    return nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0])


def _dropped(contents: Contents, which: str) -> list[tuple[str, str]]:
    dropped = []
    for other in contents.encoders.keys() - {which}:
        kind = "momentum (key) encoder" if other == "key" else "query encoder"
        dropped.append((f"the {kind} ({len(contents.encoders[other])} tensors)", f"--encoder {other} would take it"))
    for name in contents.others:
        why = (reason for prefix, reason in contents.layout.others if name.startswith(prefix))
        dropped.append((name, next(why, "no part of an encoder")))
    return dropped


def _random(source: str, arch: str, seed: int) -> Encoder:
    architecture(arch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = build_resnet(arch)
    backbone.fc = nn.Identity()
    return _built(source, f"random-{arch}", arch, backbone, f"random initialisation, seed {seed}", None)


def _torchvision(source: str, rest: str) -> Encoder:
    arch, _, weights = rest.partition(":")
    if arch not in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"):
        raise InputError(f"{source}: {arch!r} is none of torchvision's ResNet-18 to 152")
    import torchvision

    chosen = weights or "DEFAULT"
    try:
        net = torchvision.models.get_model(arch, weights=chosen)
    except (KeyError, ValueError):
        raise InputError(f"{source}: torchvision has no weights {chosen!r} for {arch}; try IMAGENET1K_V1") from None
    except OSError as error:
        raise InputError(f"{source}: the weights cannot be downloaded ({error}); is there a network?") from None
    net.fc = nn.Identity()
    return _built(source, rest.replace(":", "-"), arch, net, f"torchvision supervised, {chosen}", Preprocessing())


def _built(
    source: str, name: str, arch: str, backbone: nn.Module, origin: str, preprocessing: Preprocessing | None
) -> Encoder:
    return Encoder(
        source=source,
        run_name=_safe(name),
        arch=arch,
        backbone=backbone,
        feature_dim=architecture(arch).feature_dim,
        head=None,
        origin=origin,
        sha256=weights_sha256(backbone.state_dict()),
        tensors_loaded=len(backbone.state_dict()),
        preprocessing=preprocessing,
    )


def _pixels() -> Encoder:
    return Encoder(
        source="pixels",
        run_name="pixels",
        arch="pixels",
        backbone=nn.Flatten(),
        feature_dim=0,
        head=None,
        origin="the image itself, flattened",
        sha256=hashlib.sha256(b"pixels").hexdigest(),
        tensors_loaded=0,
    )


def weights_sha256(state: State | OrderedDict) -> str:
    """Over names and bytes, in order."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def run_name(path: Path) -> str:
    """The file's stem; RUN-epoch_0012 for RUN/checkpoints/epoch_0012.pth."""
    stem = path.name.split(".")[0]
    if path.parent.name == "checkpoints" and path.parent.parent.name:
        stem = f"{path.parent.parent.name}-{stem}"
    return _safe(stem)


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "encoder"
