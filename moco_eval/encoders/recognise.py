"""Whose checkpoint is this? Finds a file's tensors and names their layout by content, never by the file's name."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moco_eval.encoders.layouts import LAYOUTS, PREFIXED, Layout
from moco_eval.errors import InputError
from moco_eval.untrusted.pickle_read import NETWORK, StandIn
from moco_eval.untrusted.pickle_scan import shown
from moco_eval.untrusted.read import read

# Entries that hold the tensors, from the outside in, and entries whose tensors are told apart by their names.
CONTAINERS = ("state_dict", "model_state_dict", "model", "classy_state_dict", "base_model")
COMPANIONS = (("student", "teacher"), ("trunk", "heads"), ("model", "model_ema"))

# What a checkpoint may hold beside its tensors, and why an evaluation leaves it.
STATE = {
    "optimizer": "the optimiser's state, for resuming",
    "optimizer_states": "the optimisers' state, for resuming",
    "scheduler": "the learning-rate schedule, for resuming",
    "lr_schedulers": "the learning-rate schedules, for resuming",
    "param_schedulers": "the learning-rate schedules, for resuming",
    "scaler": "the loss scaler's state, for resuming",
    "fp16_scaler": "the loss scaler's state, for resuming",
    "amp": "the loss scaler's state, for resuming",
    "loops": "the trainer's counts, for resuming",
    "callbacks": "the trainer's callbacks, for resuming",
    "message_hub": "the log, for resuming",
    "meta": "settings and versions of the run that wrote it",
    "hyper_parameters": "settings of the run that wrote it",
    "args": "settings of the run that wrote it",
    "opt": "settings of the run that wrote it",
    "contrast": "the memory of keys",
    "dino_loss": "the centre of DINO's targets",
    "lightly_train": "whole modules, which are not read",
    "step": "the training step, for resuming",
    "global_step": "the training step, for resuming",
    "iteration": "the training step, for resuming",
    "sampler": "the data order, for resuming",
    "window": "measurements since the last log line, for resuming",
    "unreadable": "the images that could not be read so far, for resuming",
    "rng": "random generators, for resuming",
    "state_dict_ema": "the averaged network; to judge it, save it by itself",
    "model_ema": "the averaged network; to judge it, save it by itself",
    "source_sha256": "of the file that this copy was made of",
    "activations_sha256": "to compare by",
    "moco_eval": "the version that wrote it",
    "pytorch-lightning_version": "the version that wrote it",
    "best_acc": "the accuracy its own training saw",
    "best_acc1": "the accuracy its own training saw",
}
READ = ("arch", "epoch", "format", "preprocessing", "pretraining", "config", "origin", "which", "usual", "norm_eps")
LONGEST, DEEPEST = 300, 8  # characters of a tensor's name, and parts that all names may share
MOMENTUM = re.compile(r"momentum|teacher|target|(^|[._])(ema|key|k)[._]")


@dataclass(frozen=True)
class Checkpoint:
    """A file's layout and contents.

    Attributes:
        path: the file.
        layout: its row of LAYOUTS.
        tensors: by name, in the file's order, not copied out of it yet; without wrappers such as a leading `module.`.
        values: what stands beside the tensors.
        dropped: (name, reason) of values that are no tensors of the encoder and are not read.
    """

    path: Path
    layout: Layout
    tensors: dict[str, torch.Tensor]
    values: dict[str, Any]
    dropped: list[tuple[str, str]]


def recognise(path: Path) -> Checkpoint:
    """Read a checkpoint and say which layout it has.

    Raises:
        InputError: missing, unreadable, wants to run code, no checkpoint, or of no known layout.
    """
    named, beside = find_tensors(path, read(path))
    dropped = [(name, STATE.get(name, "not used by an evaluation")) for name in beside if name not in READ]
    dropped += [(name, "not a tensor") for name, value in named.items() if not isinstance(value, torch.Tensor)]
    tensors = {name: value.detach() for name, value in named.items() if isinstance(value, torch.Tensor)}
    layout, tensors = _layout(path, tensors, beside.get("format"))
    if layout.refused:
        raise InputError(f"{path} is {layout.origin}: {layout.refused}")
    return Checkpoint(path, layout, tensors, beside, dropped)


# Where are the tensors?


def find_tensors(path: Path, values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The named tensors of a checkpoint, and what stands beside them, at whatever depth.

    Raises:
        InputError: it holds none, or the same ones twice.
    """
    beside: dict[str, Any] = {}
    inner = values
    while True:
        parts = _companions(inner)
        name = next((name for name in CONTAINERS if isinstance(inner.get(name), dict)), None)
        if parts or name is None:
            break
        beside |= {str(key): value for key, value in inner.items() if key != name}
        inner = inner[name]
    if parts:
        beside |= {str(key): value for key, value in inner.items() if key not in parts}
        named = {f"{part}.": inner[part] for part in parts}
    else:
        loose = {key: value for key, value in inner.items() if not isinstance(value, torch.Tensor)}
        beside |= {str(key): value for key, value in loose.items()} if inner is values else {}
        named = {"": {key: value for key, value in inner.items() if inner is not values or key not in loose}}
    if not any(isinstance(value, torch.Tensor) for tensors in named.values() for value in tensors.values()):
        raise InputError(f"{path} holds no tensors{_instead(values)}")
    return _joined(path, named), beside


def _instead(values: Mapping[str, Any]) -> str:
    """What stands where the tensors should, in words."""
    whole = next((key for key, value in values.items() if isinstance(value, StandIn) and NETWORK.match(value.of)), None)
    if whole is not None:
        return f", but a whole network as {whole!r}, whose code we do not run: have its state_dict() saved instead"
    return f"; its entries: {shown(', '.join(str(key) for key in list(values)[:6])) or 'none, it is empty'}"


def _companions(values: Mapping[str, Any]) -> list[str]:
    """Entries that belong together, such as DINO's student and teacher."""
    for names in COMPANIONS:
        present = [name for name in names if isinstance(values.get(name), dict)]
        if len(present) == len(names) or (present and names[0] != "model"):
            return present
    return []


def _joined(path: Path, named: dict[str, dict]) -> dict[str, Any]:
    """All tensors under the names of their parts, the wrappers' additions taken off.

    Raises:
        InputError: a name that is none, or the same name twice.
    """
    for name in (str(name) for inner in named.values() for name in inner):
        if len(name) > LONGEST or not name.isprintable():
            raise InputError(f"{path} has a tensor by the name of {shown(name)!r}, as no network has")
    plain = {part + _unwrapped(str(name)): value for part, inner in named.items() for name, value in inner.items()}
    if len(plain) != sum(len(inner) for inner in named.values()):
        raise InputError(f"{path} holds the same tensors twice, with and without a leading 'module.'")
    return plain


def _unwrapped(name: str) -> str:
    """Without what DataParallel and torch.compile put before and into names."""
    return re.sub(r"^((module|_orig_mod)\.)+", "", name.replace("._orig_mod.", "."))


# Which layout?


def _layout(path: Path, tensors: dict[str, torch.Tensor], format_: Any) -> tuple[Layout, dict[str, torch.Tensor]]:
    """The row that fits, and the tensors without a prefix that they all share (`model.` of a LightningModule)."""
    known = [row.format for row in LAYOUTS if row.format]
    if isinstance(format_, str) and format_.startswith("moco-eval/") and format_ not in known:
        raise InputError(f"{path} has the format {format_!r}, which this version does not know; update moco-eval")
    _refuse_altered(path, tensors)
    shared, bare = "", tensors
    for _ in range(DEEPEST):
        if row := next((row for row in LAYOUTS if _fits(row, bare, format_)), None):
            return _below(row, shared), bare
        first = {name.partition(".")[0] for name in bare}
        if len(first) != 1 or any("." not in name for name in bare):
            break
        shared += f"{next(iter(first))}."
        bare = {name.partition(".")[2]: tensor for name, tensor in bare.items()}
    return _prefixed(path, tensors), tensors


def _fits(row: Layout, names: Iterable[str], format_: Any) -> bool:
    if row.format:
        return row.format == format_
    return all(_has(mark, names) for mark in row.marks) and not any(_has(mark, names) for mark in row.unless)


def _below(row: Layout, shared: str) -> Layout:
    """The row under a prefix that all names share; one that speaks of momentum makes it a key encoder."""
    if not shared:
        return row
    row = replace(row, origin=f"{row.origin}, under {shared!r}")
    if not MOMENTUM.search(shared) or row.key is not None:
        return row
    return replace(row, query=NOTHING, key=row.query, head=None, key_head=row.head)


def _has(mark: str, names: Iterable[str]) -> bool:
    return any(re.search(mark, name) for name in names)


def _prefixed(path: Path, names: Iterable[str]) -> Layout:
    """A backbone under a prefix that no row names; of two, the one whose prefix says so is the momentum encoder's.

    Raises:
        InputError: no backbone under torchvision's or timm's names, or several.
    """
    backbones = _backbones(names)
    keys = [prefix for prefix in backbones if MOMENTUM.search(prefix)]
    queries = [prefix for prefix in backbones if prefix not in keys]
    if len(queries) > 1 or len(keys) > 1:
        several = ", ".join(repr(prefix) for prefix in backbones)
        raise InputError(f"{path} holds several networks, under {several}; save the one to be judged by itself")
    if not backbones:
        raise InputError(
            f"{path} has no layout we know{_looks(list(names))}; save the whole network; docs/encoders.md lists layouts"
        )
    query, key = (re.escape(prefixes[0]) if prefixes else None for prefixes in (queries, keys))
    either = "|".join(filter(None, (query, key)))
    return replace(
        PREFIXED,
        origin=f"{PREFIXED.origin} {(queries or keys)[0]!r}",
        query=NOTHING if query is None else query,
        key=key,
        dropped=(
            (rf"({either})(fc|head|classifier)\.", "fc", "a classifier or head on the pooled feature"),
            (rf"(?!{either})", "other tensors", "they stand outside the backbone's prefix"),
        ),
    )


NOTHING = r"(?!)"  # matches no name


def _backbones(names: Iterable[str]) -> list[str]:
    """The prefixes below which a ResNet or ViT begins."""
    prefixes: dict[str, None] = {}
    for stem, body in ((r"conv1\.weight", r"layer1"), (r"patch_embed\.proj\.weight", r"blocks\.0")):
        bodies = {match[1] for name in names if (match := re.match(rf"(.+?\.){body}\.", name))}
        starts = [match[1] for name in names if (match := re.fullmatch(rf"(.+\.){stem}", name))]
        prefixes |= dict.fromkeys(prefix for prefix in starts if prefix in bodies)
    return list(prefixes)


def _looks(names: list[str]) -> str:
    """What a file of no known layout seems to hold, in words."""
    heads = r"^(projector|projection_head|head|fc|neck|linear|classifier|predictor|prototypes)\."
    if all(re.match(heads, name) for name in names):
        return ": only a projection head or classifier is in it, and no backbone"
    return f" (its tensors: {', '.join(names[:3])}, ...)"


_ALTERED = (
    (
        r"\blora_(A|B|down|up|embedding)",
        "holds LoRA adapters; merge them into the network and save its own state_dict",
    ),
    (
        r"_packed_params|\.(qweight|qzeros|weight_packed|weight_scale|SCB|absmax|quant_state\b.*|zero_point)$",
        "holds quantised weights in a packed form; save the network before it was quantised",
    ),
    (
        r"\.weight_(orig|mask)$",
        "holds pruning masks; make them permanent (torch.nn.utils.prune.remove) and save the network again",
    ),
)


def _refuse_altered(path: Path, names: Iterable[str]) -> None:
    for mark, reason in _ALTERED:
        first = next((name for name in names if re.search(mark, name)), None)
        if first:
            raise InputError(f"{path} {reason} (first: {first})")
