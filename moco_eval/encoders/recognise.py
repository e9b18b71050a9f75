"""Whose checkpoint is this? Read without executing anything, recognised by its contents, not by its name."""

import json
import pickle
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moco_eval.encoders.build import ARCHITECTURES, BasicBlock, Bottleneck
from moco_eval.errors import InputError

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """Where a framework keeps the backbone.

    `query`, `key`: prefixes of the two encoders' keys; a layout without a momentum encoder has no `key`.
    `head`: whether `fc` is a projection head (otherwise a classifier).
    `others`: prefix of keys that are no encoder's, and why they are left out.
    """

    name: str
    query: str
    key: str | None
    head: bool
    others: tuple[tuple[str, str], ...]
    source: str


_QUEUE = "the queue of negative keys serves pretraining only"
LAYOUTS = (
    Layout(
        "facebookresearch/moco",
        "module.encoder_q.",
        "module.encoder_k.",
        True,
        (("module.queue", _QUEUE),),
        "facebookresearch/moco@132aea9, main_moco.py save_checkpoint",
    ),
    Layout(
        "facebookresearch/moco, saved without DDP",
        "encoder_q.",
        "encoder_k.",
        True,
        (("queue", _QUEUE),),
        "the same, model not wrapped",
    ),
    Layout("torchvision, saved from DDP", "module.", None, False, (), "torch.nn.parallel.DistributedDataParallel"),
    Layout("torchvision", "", None, False, (), "torchvision.models.resnet"),
)


@dataclass
class Contents:
    """A checkpoint file taken apart.

    Attributes:
        layout: the row of LAYOUTS.
        origin: its name in full, such as 'facebookresearch/moco v2'.
        encoders: keys of 'query' and, where there, 'key' without their prefix, `fc` included, in file order.
        others: names of the keys that are no encoder's.
        extras: what else the file says (epoch, config, preprocessing, ...), without tensors.
    """

    layout: Layout
    origin: str
    encoders: dict[str, State]
    others: list[str]
    extras: dict[str, Any] = field(default_factory=dict)


def read(path: Path) -> Contents:
    """Raises InputError, one line, for everything that is not a checkpoint of a known layout."""
    _require_file(path)
    if path.suffix == ".safetensors":
        state, extras = _read_safetensors(path)
    else:
        state, extras = _split(_read_torch(path), path)
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    if not tensors:
        raise InputError(f"{path} holds no tensors")
    for layout in LAYOUTS:
        if any(f"{prefix}conv1.weight" in tensors for prefix in (layout.query, layout.key) if prefix is not None):
            return _take_apart(layout, tensors, extras)
    some = ", ".join(list(tensors)[:3])
    raise InputError(f"{path} has no layout that is known here: no '...conv1.weight' of an encoder among {some}, ...")


def _take_apart(layout: Layout, tensors: State, extras: dict[str, Any]) -> Contents:
    encoders: dict[str, State] = {}
    for name, prefix in (("query", layout.query), ("key", layout.key)):
        part = {} if prefix is None else {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if part:
            encoders[name] = part
    prefixes = tuple(prefix for prefix in (layout.query, layout.key) if prefix is not None)
    others = [name for name in tensors if not name.startswith(prefixes)]
    head = next(iter(encoders.values()))
    version = (" v2" if "fc.0.weight" in head else " v1" if "fc.weight" in head else "") if layout.head else ""
    ours = extras.get("format")
    origin = f"moco-eval ({ours}), {layout.name}{version}" if ours else layout.name + version
    return Contents(layout, str(extras.get("origin", origin)), encoders, others, extras)


def _require_file(path: Path) -> None:
    if path.is_dir():
        newest = _newest(path / "checkpoints") or _newest(path)
        raise InputError(f"{path} is a folder; " + (f"its newest checkpoint is {newest}" if newest else "give a file"))
    if not path.is_file():
        newest = _newest(path.parent)
        raise InputError(f"{path} does not exist" + (f"; the newest there is {newest.name}" if newest else ""))
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise InputError(f"{path} is empty")
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a Git LFS pointer, not the file itself; run git lfs pull")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise InputError(f"{path} is a web page saved under that name; download the checkpoint itself")
    if start.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path):
        raise InputError(f"{path} is truncated: a zip archive without its end; copy or download it again")


def _newest(folder: Path) -> Path | None:
    found = [path for path in folder.glob("*.pt*") if path.is_file()] if folder.is_dir() else []
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|Unsupported class|type) ([\w.]+\.\w+)", str(error))
        if found:
            raise InputError(
                f"{path} needs code to be loaded ({found.group(1)}); none was run. If you trust its maker, save its "
                "state_dict alone: torch.save(model.state_dict(), ...)"
            ) from None
        raise InputError(f"{path} is not a checkpoint that torch reads ({_first_line(error)})") from None
    except Exception as error:  # whatever a damaged file makes torch raise
        raise InputError(f"{path} is damaged or no checkpoint ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _read_safetensors(path: Path) -> tuple[State, dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        extras = json.loads(metadata["moco-eval"]) if "moco-eval" in metadata else {}
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is damaged or no safetensors file ({_first_line(error)})") from None
    return state, extras


def _split(loaded: Any, path: Path) -> tuple[dict, dict[str, Any]]:
    """A state dict, and what lies beside it."""
    if isinstance(loaded, torch.Tensor) or not isinstance(loaded, dict):
        raise InputError(f"{path} holds a {type(loaded).__name__}, not a dictionary of tensors")
    if not loaded:
        raise InputError(f"{path} holds an empty dictionary")
    inner = loaded.get("state_dict")
    if not isinstance(inner, dict):
        return loaded, {}
    return inner, {name: value for name, value in loaded.items() if name not in ("state_dict", "optimizer", "window")}


def infer_architecture(state: State) -> str | None:
    """The ResNet whose shapes these are, from stem, block type, depth and width; None where there is none."""
    layers = tuple(_blocks(state, stage) for stage in range(1, 5))
    block = Bottleneck if "layer1.0.conv3.weight" in state else BasicBlock
    stem = state["conv1.weight"].shape
    for name, arch in ARCHITECTURES.items():
        kernel = 3 if arch.cifar_stem else 7
        if (arch.block, arch.layers, int(64 * arch.width), kernel) == (block, layers, stem[0], stem[-1]):
            return name
    return None


def describe_shapes(state: State) -> str:
    """What the shapes say, in words, for a network that is no architecture of ours."""
    counts = [count for stage in range(1, 9) if (count := _blocks(state, stage))]
    stem = "x".join(str(size) for size in state["conv1.weight"].shape)
    block = "bottleneck" if "layer1.0.conv3.weight" in state else "basic"
    return f"{len(counts)} stages of {', '.join(map(str, counts)) or 'no'} {block} blocks behind a stem of {stem}"


def _blocks(state: Iterable[str], stage: int) -> int:
    found = (re.match(rf"layer{stage}\.(\d+)\.", name) for name in state)
    return max((int(match.group(1)) + 1 for match in found if match), default=0)
