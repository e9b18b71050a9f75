"""Whose checkpoint is this? Finds a file's tensors and names their layout by content, never by the file's name."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moco_eval.encoders.containers import Contents, count_tensors, find_tensors, is_named
from moco_eval.encoders.foreign import kind_of
from moco_eval.encoders.layout import Layout
from moco_eval.encoders.layouts import LAYOUTS, PREFIXED
from moco_eval.encoders.own_parts import has_network, without_own_parts
from moco_eval.errors import InputError
from moco_eval.untrusted.pickle_scan import shown
from moco_eval.untrusted.read import read

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
    "state_dict_ema": "the averaged network; --key state_dict_ema takes it",
    "model_ema": "the averaged network; --key model_ema takes it",
    "source_sha256": "of the file that this copy was made of",
    "activations_sha256": "to compare by",
    "moco_eval": "the version that wrote it",
    "pytorch-lightning_version": "the version that wrote it",
    "best_acc": "the accuracy its own training saw",
    "best_acc1": "the accuracy its own training saw",
}
READ = ("arch", "epoch", "format", "preprocessing", "pretraining", "config", "origin", "which", "usual", "norm_eps")
DEEPEST = 8  # parts that all names may share
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
        default: 'query' or 'key': the encoder to take where nobody says.
        warnings: doubts, in words.
    """

    path: Path
    layout: Layout
    tensors: dict[str, torch.Tensor]
    values: dict[str, Any]
    dropped: list[tuple[str, str]]
    default: str = "query"
    warnings: list[str] = field(default_factory=list)


def recognise(path: Path, key: str | None = None) -> Checkpoint:
    """Read a checkpoint and say which layout it has.

    Args:
        key: of several networks in it, the one to take: its entry, or what its tensors' names begin with.
    Raises:
        InputError: missing, unreadable, wants to run code, no checkpoint, or of no known layout; it holds several
            networks and no key chooses.
    """
    contents = find_tensors(path, read(path), key)
    named = {name: value.detach() for name, value in contents.named.items() if isinstance(value, torch.Tensor)}
    counts = {name: tensor for name, tensor in named.items() if tensor.numel() == 1 and _COUNT.search(name)}
    read_by_layers = {name: tensor for name, tensor in named.items() if name not in counts}
    layout, tensors = _layout(path, read_by_layers, contents.beside.get("format"), None if contents.place else key)
    if layout.refused:
        raise InputError(f"{path} is {layout.origin}: {layout.refused}")
    layout = _in_place(layout, contents)
    known = {name: counts.pop(name) for name in list(counts) if _has_part(layout, name)}
    only_key = layout.query == NOTHING and (contents.place or key)
    dropped = [*_beside(contents), *((name, "not a tensor") for name in contents.named if name not in named)]
    if counts:
        part = f"{_kinds(counts)} ({len(counts)} tensors)" if len(counts) > 1 else _kinds(counts)
        dropped.append((part, "counts left by a profiler or an averager"))
    return Checkpoint(
        path,
        layout,
        tensors | known,
        contents.beside,
        dropped,
        "key" if only_key else layout.usual,
        [f"{_kinds(counts)}: counts that no forward pass reads ({len(counts)}) were left out"] if counts else [],
    )


_COUNT = re.compile(r"(^|\.)(total_ops|total_params|n_averaged|num_updates|initted)$")


def _kinds(counts: Iterable[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in counts}))


def _has_part(layout: Layout, name: str) -> bool:
    return any(re.match(mark, name) for mark, _, _ in layout.dropped)


def _in_place(layout: Layout, contents: Contents) -> Layout:
    """The row in an entry that was looked for; one whose name speaks of momentum holds a key encoder."""
    if not contents.place:
        return layout
    layout = replace(layout, origin=f"{layout.origin}, in {shown(contents.place, 40)!r}")
    if not MOMENTUM.search(f"{contents.place}.") or layout.key is not None:
        return layout
    alone = all(MOMENTUM.search(f"{other}.") for other in contents.others)
    layout = replace(layout, query=NOTHING, key=layout.query, head=None, key_head=layout.head)
    return replace(layout, usual="key") if alone else layout


_UNUSED = "not used by an evaluation"


def _beside(contents: Contents) -> list[tuple[str, str]]:
    """What stands beside the tensors and is not read, each with its reason."""
    dropped = []
    for name, value in contents.beside.items():
        count = count_tensors(value) + isinstance(value, torch.Tensor)
        if name in STATE or (name not in READ and not count):
            of_optimiser = isinstance(value, dict) and "param_groups" in value
            dropped.append((name, STATE["optimizer" if of_optimiser else name] if name in STATE else _UNUSED))
        elif any(is_named(other, name) for other in contents.others):
            dropped.append((f"{name} ({count} tensors)", f"another network; --key {name} takes it"))
        elif count:
            dropped.append((f"{name} ({count} tensors)" if count > 1 else name, "no backbone is in it"))
    return dropped


# Which layout?


def _layout(
    path: Path, tensors: dict[str, torch.Tensor], format_: Any, key: str | None = None
) -> tuple[Layout, dict[str, torch.Tensor]]:
    """The row that fits, and the tensors without a prefix that they all share (`model.` of a LightningModule)."""
    known = [row.format for row in LAYOUTS if row.format]
    if isinstance(format_, str) and format_.startswith("moco-eval/") and format_ not in known:
        raise InputError(f"{path} has the format {format_!r}, which this version does not know; update moco-eval")
    _refuse_altered(path, tensors)
    if key is not None:
        return without_own_parts(_prefixed(path, tensors, key), tensors), tensors
    shared, bare = "", tensors
    for _ in range(DEEPEST):
        if row := next((row for row in LAYOUTS if fits(row, bare, format_)), None):
            if not row.format and not row.refused and not has_network(row, bare) and backbones(bare):
                break  # below a further prefix, such as `backbone.module.`
            return _below(without_own_parts(row, bare), shared), bare
        first = {name.partition(".")[0] for name in bare}
        if len(first) != 1 or any("." not in name for name in bare):
            break
        shared += f"{next(iter(first))}."
        bare = {name.partition(".")[2]: tensor for name, tensor in bare.items()}
    return without_own_parts(_prefixed(path, tensors), tensors), tensors


def fits(row: Layout, names: Iterable[str], format_: Any) -> bool:
    """Whether these tensors are named as a row says."""
    if row.format and row.format != format_:
        return False
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


def _prefixed(path: Path, names: Mapping[str, Tensor], key: str | None = None) -> Layout:
    """A backbone under a prefix that no row names; of two, the one whose prefix says so is the momentum encoder's.

    Args:
        key: the prefix to take, of several.
    Raises:
        InputError: no backbone under torchvision's or timm's names, or several.
    """
    prefixes = backbones(names)
    if key is not None:
        prefixes = _named_by(path, prefixes, key)
    keys = [prefix for prefix in prefixes if MOMENTUM.search(prefix)]
    queries = [prefix for prefix in prefixes if prefix not in keys]
    if len(queries) > 1 or len(keys) > 1:
        several = ", ".join(repr(prefix) for prefix in prefixes[:12])
        first = (queries if len(queries) > 1 else keys)[0].rstrip(".")
        raise InputError(f"{path} holds several networks, under {several}; choose one: --key {first}")
    if not prefixes:
        raise InputError(f"{path} has no layout we know{_looks(names)}; docs/encoders.md lists layouts")
    query, momentum = (re.escape(some[0]) if some else None for some in (queries, keys))
    either = "|".join(filter(None, (query, momentum)))
    return replace(
        PREFIXED,
        origin=f"{PREFIXED.origin} {(queries or keys)[0]!r}",
        query=NOTHING if query is None else query,
        key=momentum,
        dropped=(
            (rf"({either})(fc|head|classifier)\.", "fc", "a classifier or head on the pooled feature"),
            (rf"(?!{either})", OTHERS, "they stand outside the backbone's prefix"),
        ),
    )


def _named_by(path: Path, prefixes: list[str], key: str) -> list[str]:
    """The one prefix that a key names."""
    exact = [prefix for prefix in prefixes if prefix.rstrip(".") == key]
    chosen = exact or [prefix for prefix in prefixes if is_named(prefix.rstrip("."), key)]
    if len(chosen) == 1:
        return chosen
    there = ", ".join(repr(prefix) for prefix in prefixes[:12])
    way_out = f"there, networks are under {there}" if prefixes else "it holds a single one: leave it out"
    raise InputError(f"{path}: --key {key} names no single network in it; {way_out}")


# torchvision's names, those of its children in a sequence, timm's
_BEGINNINGS = (
    (r"conv1\.weight", r"layer1"),
    (r"0\.weight", r"7\.0\.conv1"),
    (r"patch_embed\.proj\.weight", r"blocks\.0"),
)
OTHERS = "other tensors"
NOTHING = r"(?!)"  # matches no name


def backbones(names: Iterable[str]) -> list[str]:
    """The prefixes below which a ResNet or ViT begins."""
    prefixes: dict[str, None] = {}
    for stem, body in _BEGINNINGS:
        bodies = {match[1] for name in names if (match := re.match(rf"(.+?\.){body}\.", name))}
        starts = [match[1] for name in names if (match := re.fullmatch(rf"(.+\.){stem}", name))]
        prefixes |= dict.fromkeys(prefix for prefix in starts if prefix in bodies)
    return list(prefixes)


def _looks(tensors: Mapping[str, Tensor]) -> str:
    """What a file of no known layout holds, in words, and the way out."""
    if kind := kind_of(tensors):
        return f": it is {kind.sentence}; {kind.way_out}"
    if tensors and not any(tensor.is_floating_point() for tensor in tensors.values()):
        return f": its tensors hold whole numbers, no weights ({', '.join(list(tensors)[:3])}); give the encoder's file"
    listed = ", ".join(list(tensors)[:3]) + (", ..." if len(tensors) > 3 else "")
    return (
        f" (its {len(tensors)} tensors: {listed}); if it is a network of images, build it and give it to moco_eval.wrap"
    )


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
        r"(^|\.)(conv\d|downsample|qkv|proj|fc[12])(\.\d)?\.(weight_(u|bar)|parametrizations\.weight\.0\._[uv])$",
        "holds spectral norms; take them off (torch.nn.utils.remove_spectral_norm, or "
        "parametrize.remove_parametrizations) and save the network again",
    ),
    (
        r"(^|\.)(conv\d|downsample|qkv|proj|fc[12])(\.\d)?\.(weight_g|parametrizations\.)",
        "holds weights in other parameters, such as a weight norm's; take them off (torch.nn.utils.remove_weight_norm, "
        "or parametrize.remove_parametrizations) and save the network again",
    ),
    (
        r"(^|\.)_?flat_param(_\d+)?$",
        "holds FSDP's flattened parameters; have a full state dict saved (StateDictType.FULL_STATE_DICT)",
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
