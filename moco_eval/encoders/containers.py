"""Where in a checkpoint are the tensors? The entries of known code bases first, then any that hold a backbone."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moco_eval.encoders.foreign import entries, kind_of
from moco_eval.errors import InputError
from moco_eval.untrusted.pickle_read import NETWORK, StandIn
from moco_eval.untrusted.pickle_scan import SAVE, shown

# Entries that hold the tensors, from the outside in, and entries whose tensors are told apart by their names.
CONTAINERS = ("state_dict", "model_state_dict", "model", "classy_state_dict", "base_model")
_IJEPA = ("encoder", "target_encoder")
COMPANIONS = (("student", "teacher"), ("trunk", "heads"), ("model", "model_ema"), _IJEPA)
_ALL = ("model", "encoder")  # the first of companions that are such only where all are there
DEEPEST = 6  # levels of entries that are looked through
LONGEST = 300  # characters of a tensor's name
NO_NETWORK = re.compile(r"optim|^opt$|sched|scaler|^rng")  # entries whose tensors are a trainer's own

# A backbone begins and goes on; heads and predictors have one of both at most.
_BLOCK = re.compile(r"(^|\.)blocks\.0\.")  # of a transformer
_STEM = re.compile(
    r"(^|\.)(conv1\.|0\.weight$|embedder\.embedder\.|patch_embed|conv_proj\.|_?conv_stem\.|stem\.|features\.)|conv1_w$"
)
_BODY = re.compile(
    r"(^|\.)(layer1\.|res2[._]|\d\.0\.conv1\.|stages\.0\.|_?blocks\.0\.|layers?\.0\.[a-z]\w*\.\w|encoder_layer_0\."
    r"|denseblock1\.|features\.1\.0\.|block1-0\.|s1\.b1\.)"
)
_WRAPPERS = r"_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_fpw_module|_forward_module|_module"


@dataclass(frozen=True)
class Contents:
    """The named tensors of a checkpoint, and what stands beside them.

    Attributes:
        named: by name, wrappers' additions taken off; a value that is no tensor stays in.
        beside: all else, by the name of its entry.
        place: the entry that was looked for and found, such as 'net' or 'app.model'; empty at a usual place.
        others: further entries that hold a backbone, by their place.
    """

    named: dict[str, Any]
    beside: dict[str, Any]
    place: str = ""
    others: tuple[str, ...] = ()


def find_tensors(path: Path, values: dict[str, Any], key: str | None = None) -> Contents:
    """The named tensors of a checkpoint, at whatever depth: of its only backbone, or of the one that `key` names.

    Args:
        key: an entry, such as 'ema' or 'app.model', or what the names of one of several networks begin with.
    Raises:
        InputError: it holds none, several and no key chooses, or the same ones twice.
    """
    named, beside = _usual(values)
    usual = any(_holds_backbone(tensors) for tensors in named.values())
    places: dict[str, dict] = {place: inner for place, inner in _dicts_of_tensors(values) if _holds_backbone(inner)}
    if key is None and (usual or not places):
        _require_tensors(path, values, named)
        return Contents(_joined(path, named), beside, others=tuple(places))
    chosen = [place for place in places if key is None or is_named(place, key)]
    chosen = [place for place in chosen if place == key] or chosen
    if not chosen and usual:
        return Contents(_joined(path, named), beside, others=tuple(places))  # the key is a prefix of names, perhaps
    if len(chosen) != 1:
        raise InputError(_several(path, list(places), key))
    place = chosen[0]
    others = tuple(other for other in places if other != place)
    return Contents(_joined(path, {"": places[place]}), _siblings(values, place), place, others)


def is_named(place: str, key: str) -> bool:
    """Whether this entry, or one that it is in, goes by this name."""
    return f".{place}.".endswith(f".{key}.") or place.startswith(f"{key}.")


def _several(path: Path, places: list[str], key: str | None) -> str:
    there = ", ".join(repr(shown(place, 40)) for place in places[:12])
    if key is None:
        return f"{path} holds several networks, in {there}; choose one: --key {shown(places[0], 40)}"
    return f"{path}: --key {key} names no single network in it; there {'is' if len(places) == 1 else 'are'} {there}"


# The usual places


def _usual(values: dict[str, Any]) -> tuple[dict[str, dict], dict[str, Any]]:
    """Dictionaries of tensors by what precedes their names, where known code bases have them; and what is beside."""
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
        return {f"{part}.": inner[part] for part in parts}, beside
    loose = {key: value for key, value in inner.items() if not isinstance(value, torch.Tensor)}
    beside |= {str(key): value for key, value in loose.items()} if inner is values else {}
    return {"": {key: value for key, value in inner.items() if inner is not values or key not in loose}}, beside


def _companions(values: Mapping[str, Any]) -> list[str]:
    """Entries that belong together, such as DINO's student and teacher."""
    for names in COMPANIONS:
        present = [name for name in names if isinstance(values.get(name), dict)]
        if names == _IJEPA and not all(any(_BLOCK.search(str(key)) for key in values[name]) for name in present):
            continue
        if len(present) == len(names) or (present and names[0] not in _ALL):
            return present
    return []


def _require_tensors(path: Path, values: dict[str, Any], named: dict[str, dict]) -> None:
    """Raises InputError, with what there is instead, where the usual places hold no tensors."""
    if any(isinstance(value, torch.Tensor) for tensors in named.values() for value in tensors.values()):
        return
    whole = next((key for key, value in values.items() if isinstance(value, StandIn) and NETWORK.match(value.of)), None)
    if whole is not None:
        raise InputError(f"{path} holds no tensors, but a whole network as {whole!r}, whose code we do not run: {SAVE}")
    places = dict(_dicts_of_tensors(values))
    if ("param_groups" in values or not places) and (kind := kind_of(entries(values))):
        raise InputError(f"{path} holds no encoder: it is {kind.sentence}; {kind.way_out}")
    if places:
        tensors = next(iter(places.values()))
        there = ", ".join(repr(shown(place, 40)) for place in list(places)[:6])
        together = {f"{place}.{name}": value for place, inner in places.items() for name, value in inner.items()}
        alone = {unwrapped(str(name)): value for name, value in tensors.items()}
        if kind := kind_of(together) or (kind_of(alone) if len(places) == 1 else None):
            raise InputError(f"{path} holds tensors in {there}: it is {kind.sentence}; {kind.way_out}")
        raise InputError(
            f"{path} holds tensors in {there}, and no backbone that we know among them (its tensors: "
            f"{shown(', '.join(str(name) for name in list(tensors)[:3]))}, ...); if it is a network of images, build "
            "it and give it to moco_eval.wrap, which judges any network"
        )
    if count := _count_in_lists(values):
        raise InputError(f"{path} holds {count} tensors in lists, without names: {SAVE}")
    listed = shown(", ".join(str(key) for key in list(values)[:6])) or "none, it is empty"
    raise InputError(f"{path} holds no tensors; its entries: {listed}")


def _count_in_lists(values: Any, depth: int = 0) -> int:
    """Tensors that have a place in a list and no name."""
    if depth > DEEPEST:
        return 0
    inner = values.values() if isinstance(values, dict) else values if isinstance(values, (list, tuple)) else ()
    unnamed = 0 if isinstance(values, dict) else sum(isinstance(value, torch.Tensor) for value in inner)
    return unnamed + sum(_count_in_lists(value, depth + 1) for value in inner)


# Any place


def _dicts_of_tensors(values: Any, place: str = "", depth: int = 0, seen: set[int] | None = None) -> Iterator:
    """(place, dictionary) of each that holds tensors, from the outside in; a trainer's own are passed over."""
    seen = set() if seen is None else seen
    if depth > DEEPEST or id(values) in seen:
        return
    seen.add(id(values))
    if isinstance(values, dict) and any(isinstance(value, torch.Tensor) for value in values.values()):
        yield place, values
    for name, inner in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(inner, (dict, list, tuple)) and not NO_NETWORK.search(str(name)):
            yield from _dicts_of_tensors(inner, f"{place}.{name}" if place else str(name), depth + 1, seen)


def _holds_backbone(tensors: Mapping[Any, Any]) -> bool:
    """Whether some name begins a network and some name is of its first stage."""
    names = [unwrapped(str(name)) for name in tensors if len(str(name)) <= LONGEST]
    return any(_STEM.search(name) for name in names) and any(_BODY.search(name) for name in names)


def _siblings(values: Any, place: str) -> dict[str, Any]:
    """What stands beside an entry and beside each that it is in."""
    beside: dict[str, Any] = {}
    left = place
    while left:
        items = values.items() if isinstance(values, dict) else enumerate(values)
        inside = {str(name): value for name, value in items}
        name = next(name for name in inside if left == name or left.startswith(f"{name}."))
        beside |= {other: value for other, value in inside.items() if other != name}
        values, left = inside[name], left[len(name) + 1 :]
    return beside


# Names


def _joined(path: Path, named: dict[str, dict]) -> dict[str, Any]:
    """All tensors under the names of their parts, the wrappers' additions taken off.

    Raises:
        InputError: a name that is none, or the same name twice.
    """
    for name in (str(name) for inner in named.values() for name in inner):
        if len(name) > LONGEST or not name.isprintable():
            raise InputError(f"{path} has a tensor named {shown(name)!r}, which no network has")
    plain = {part + unwrapped(str(name)): value for part, inner in named.items() for name, value in inner.items()}
    if len(plain) != sum(len(inner) for inner in named.values()):
        raise InputError(f"{path} holds the same tensors twice, with and without a leading 'module.'")
    return plain


def unwrapped(name: str) -> str:
    """Without what DataParallel, FSDP, checkpointed activations, torch.compile and Lightning put into names."""
    return re.sub(r"^(module\.)+", "", re.sub(rf"(?<![^.])({_WRAPPERS})\.", "", name))


def count_tensors(value: Any) -> int:
    """How many tensors an entry holds, at whatever depth."""
    return sum(len([1 for inner in tensors.values() if isinstance(inner, torch.Tensor)]) for _, tensors in _all(value))


def _all(value: Any) -> Iterable:
    return _dicts_of_tensors(value) if isinstance(value, (dict, list, tuple)) else ()
