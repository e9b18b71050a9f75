"""Whose checkpoint is this? Names a file's layout by content.

A layout is a row of LAYOUTS; reading, proof of load and export work from the row alone.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moco_eval.encoders.encoder import Preprocessing
from moco_eval.encoders.read import read
from moco_eval.errors import InputError

FORMAT = "moco-eval/1"
SAFETENSORS = "moco-eval/1 safetensors"
IMAGENET = Preprocessing()
QUEUE = (
    (r"queue$", "queue", "the negative keys of pretraining"),
    (r"queue_ptr$", "queue_ptr", "the queue's position"),
)
BANK = (r"bank$", "bank", "the memory bank's slots")


@dataclass(frozen=True)
class Layout:
    """How one code base names its tensors; a leading `module.` is taken off before anything is compared.

    Attributes:
        origin: the name users see.
        marks: regular expressions, each of which must be found in some tensor name.
        format: value of the file's own `format` entry, where it has one.
        query: what precedes the names of the evaluated backbone.
        key: what precedes those of the key encoder; None where there is none.
        head: what precedes the names of the head, after `query` or `key`.
        projection: the head is a projection and is loaded; otherwise it is a classifier and is dropped.
        dropped: (regular expression, what, why) of further tensors that an evaluation does not use.
        preprocessing: what the weights expect; None where the file itself says.
    """

    origin: str
    marks: tuple[str, ...] = ()
    format: str | None = None
    query: str = ""
    key: str | None = None
    head: str = "fc."
    projection: bool = False
    dropped: tuple[tuple[str, str, str], ...] = ()
    preprocessing: Preprocessing | None = IMAGENET

    def prefix(self, encoder: str) -> str:
        """Raises InputError where the layout has no such encoder."""
        if encoder == "query":
            return self.query
        if self.key is None:
            raise InputError(f"--encoder {encoder}: a {self.origin} checkpoint has one encoder only; leave it out")
        return self.key


# The first row that fits is taken: the specific ones stand first.
LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "moco-eval",
        format=FORMAT,
        query="encoder_q.",
        key="encoder_k.",
        projection=True,
        dropped=(*QUEUE, BANK),
        preprocessing=None,
    ),
    Layout("moco-eval safetensors", format=SAFETENSORS, head="head.", projection=True, preprocessing=None),
    Layout(
        "facebookresearch/moco v2",
        marks=(r"^encoder_[qk]\.fc\.0\.",),
        query="encoder_q.",
        key="encoder_k.",
        projection=True,
        dropped=QUEUE,
    ),
    Layout(
        "facebookresearch/moco v1",
        marks=(r"^encoder_[qk]\.fc\.(weight|bias)$",),
        query="encoder_q.",
        key="encoder_k.",
        projection=True,
        dropped=QUEUE,
    ),
    Layout(
        "facebookresearch/moco without its head",
        marks=(r"^encoder_[qk]\.",),
        query="encoder_q.",
        key="encoder_k.",
        projection=True,
        dropped=QUEUE,
    ),
    Layout("torchvision ResNet", marks=(r"^(conv1|bn1|fc)\.", r"^layer\d\.")),
)

# What a checkpoint may hold beside its tensors, and why an evaluation leaves it.
STATE = {
    "optimizer": "the optimiser's state, for resuming",
    "scaler": "the loss scaler's state, for resuming",
    "step": "the training step, for resuming",
    "sampler": "the data order, for resuming",
    "window": "measurements since the last log line, for resuming",
    "unreadable": "the images that could not be read so far, for resuming",
    "rng": "random generators, for resuming",
    "best_acc1": "the accuracy its own training saw",
}
READ = ("state_dict", "arch", "epoch", "format", "preprocessing", "pretraining", "config", "origin", "which")


@dataclass(frozen=True)
class Checkpoint:
    """A file's layout and contents.

    Attributes:
        path: the file.
        layout: its row of LAYOUTS.
        tensors: by name without a leading `module.`, in the file's order, not copied out of it yet.
        values: what stands beside the tensors.
        dropped: (what, why) of values that are no tensors of the encoder and are not read.
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
    values = read(path)
    tensors, beside = _tensors(path, values)
    tensors = _without_module(path, tensors)
    layout = _layout(path, tensors, beside.get("format"))
    dropped = [(name, STATE.get(name, "not used by an evaluation")) for name in beside if name not in READ]
    dropped += [(name, "not a tensor") for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
    tensors = {name: value.detach() for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    sparse = [name for name, value in tensors.items() if value.layout != torch.strided]
    if sparse:
        raise InputError(f"{path}: {sparse[0]} is stored as {tensors[sparse[0]].layout}; only dense tensors are read")
    return Checkpoint(path, layout, tensors, beside, dropped)


def _tensors(path: Path, values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The named tensors, under `state_dict` or at the top, and what stands beside them."""
    inner = values.get("state_dict")
    tensors = inner if isinstance(inner, dict) else {k: v for k, v in values.items() if isinstance(v, torch.Tensor)}
    if not any(isinstance(value, torch.Tensor) for value in tensors.values()):
        known = ", ".join(str(name) for name in list(values)[:6]) or "none, it is empty"
        raise InputError(f"{path} holds no tensors; its entries: {known}")
    beside = (
        {str(k): v for k, v in values.items() if not isinstance(v, torch.Tensor)} if tensors is not inner else values
    )
    return tensors, {str(k): v for k, v in beside.items() if k != "state_dict"}


def _without_module(path: Path, tensors: dict[str, Any]) -> dict[str, Any]:
    plain = {str(name).removeprefix("module."): value for name, value in tensors.items()}
    if len(plain) != len(tensors):
        raise InputError(f"{path} holds the same tensors twice, with and without a leading 'module.'")
    return plain


def _layout(path: Path, names: dict[str, Any], format_: Any) -> Layout:
    known = [row.format for row in LAYOUTS if row.format]
    if isinstance(format_, str) and format_.startswith("moco-eval/") and format_ not in known:
        raise InputError(f"{path} has the format {format_!r}, which this version does not know; update moco-eval")
    for row in LAYOUTS:
        if row.format == format_ if row.format else all(_found(mark, names) for mark in row.marks):
            return row
    first = ", ".join(list(names)[:3])
    origins = ", ".join(row.origin for row in LAYOUTS)
    raise InputError(f"{path} has no layout we know (its tensors: {first}, ...); we read: {origins}")


def _found(mark: str, names: dict[str, Any]) -> bool:
    return any(re.search(mark, name) for name in names)
