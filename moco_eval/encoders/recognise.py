"""Whose checkpoint is this? Reads a file without executing anything in it and names its layout by content.

A layout is a row of LAYOUTS; reading, proof of load and export work from the row alone.
"""

import json
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from moco_eval.encoders.encoder import Preprocessing
from moco_eval.errors import InputError

FORMAT = "moco-eval/1"
SAFETENSORS = "moco-eval/1 safetensors"
IMAGENET = Preprocessing()
QUEUE = (
    (r"queue$", "queue", "the negative keys of pretraining"),
    (r"queue_ptr$", "queue_ptr", "the queue's position"),
)
BANK = (r"bank$", "bank", "the memory bank's slots")
SUFFIXES = (".pth", ".pth.tar", ".pt", ".th", ".safetensors")


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


# Reading, with nothing executed


def read(path: Path) -> dict[str, Any]:
    """The dict a checkpoint file holds; tensors stay on disk until used where the file allows it.

    For safetensors, the tensors and what our own `convert` wrote in the metadata, side by side.
    Raises:
        InputError: missing, a folder, empty, truncated, no checkpoint, or it needs code that we do not run.
    """
    start = _start(path)
    if _is_safetensors(start):
        return _read_safetensors(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = _load_torch(path, start.startswith(b"PK") and zipfile.is_zipfile(path))
    except MemoryError:
        raise InputError(f"{path} does not fit into memory") from None
    except Exception as error:  # torch.load raises a dozen kinds for a file that is not one of its own
        raise InputError(f"{path} {_why(path, start, str(error))}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}, not a dict of named tensors")
    return dict(values)


def _load_torch(path: Path, zipped: bool) -> Any:
    if zipped and path.suffix != ".safetensors":  # torch would go by that suffix, not by the contents
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    with path.open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def _start(path: Path) -> bytes:
    if path.is_dir():
        raise InputError(_folder(path))
    if not path.exists():
        raise InputError(f"{path} does not exist{_newest_words(path.parent, '; the newest there is ')}")
    if not path.is_file():
        raise InputError(f"{path} is not a regular file")
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if not start:
        raise InputError(f"{path} is empty (0 bytes)")
    return start


def _folder(path: Path) -> str:
    inside = path / "checkpoints"
    if inside.is_dir():
        return f"{path} is a run directory{_newest_words(inside, '; give its newest checkpoint: ', full=True)}"
    return f"{path} is a folder, not a checkpoint{_newest_words(path, '; the newest there is ')}"


def _newest_words(folder: Path, words: str, full: bool = False) -> str:
    """`words` and the newest checkpoint of a folder, or nothing."""
    try:
        files = [file for file in folder.iterdir() if file.name.endswith(SUFFIXES) and file.is_file()]
        newest = max(files, key=lambda file: (file.stat().st_mtime, file.name), default=None)
    except OSError:
        return ""
    return f"{words}{newest if full else newest.name}" if newest else ""


def _is_safetensors(start: bytes) -> bool:
    return len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 100_000_000


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("moco-eval", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is a damaged safetensors file: {_one_line(str(error))}") from None
    return {**about, **tensors} if isinstance(about, dict) else tensors


# Objects that people store beside weights; all other code a pickle names is called what it is.
HARMLESS = (
    "argparse.",
    "pathlib.",
    "numpy.",
    "collections.",
    "omegaconf.",
    "torch.nn.",
    "easydict.",
    "yacs.",
)


def _why(path: Path, start: bytes, error: str) -> str:
    """Why a file could not be read, after the words '<path> ...'."""
    refused = _refused_code(path, start, error)
    if refused and refused.startswith(HARMLESS):
        return (
            f"holds an object of the class {refused} beside its tensors; it was not executed and the file was not "
            "loaded: save its state_dict alone where it was written"
        )
    if refused:
        return f"wants to run code named {refused}; it was not loaded and nothing was executed"
    for fits, words in _LOOKS:
        if fits(path, start):
            return words
    return f"is no checkpoint that can be read safely: {_one_line(error)}"


def _refused_code(path: Path, start: bytes, error: str) -> str | None:
    """The first global that the safe unpickler refused, from its message or from the pickle's own opcodes."""
    if found := re.search(r"GLOBAL ([\w.]+)", error):
        return found[1]
    if "Weights only load failed" not in error or not start.startswith(b"\x80"):
        return None
    names = list(_named_code(path))
    return next((name for name in names if not name.startswith(HARMLESS)), names[0] if names else None)


def _named_code(path: Path) -> Iterator[str]:
    """The globals that a pickle names, read off its opcodes as far as they go; nothing is unpickled."""
    strings: list[str] = [""]
    memo: list[str] = []
    try:
        with path.open("rb") as file:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "GLOBAL":
                    yield str(argument).replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL":
                    yield ".".join(strings[-2:])
                elif opcode.name == "MEMOIZE":
                    memo.append(strings[-1])
                elif opcode.name in ("BINGET", "LONG_BINGET") and int(argument or 0) < len(memo):
                    strings.append(memo[int(argument or 0)])
                elif isinstance(argument, str):
                    strings.append(argument)
    except (ValueError, OSError):
        return


def _is_text(start: bytes) -> bool:
    return all(byte in b"\t\n\r\f" or 32 <= byte < 127 or byte >= 128 for byte in start) and start.isascii()


_LOOKS: tuple[tuple[Callable[[Path, bytes], bool], str], ...] = (
    (
        lambda path, start: start.startswith(b"version https://git-lfs"),
        "is a Git LFS pointer, not the file itself: run 'git lfs pull' where it came from",
    ),
    (
        lambda path, start: start.lstrip()[:9].lower().startswith((b"<html", b"<!doctype", b"<?xml")),
        "is a web page (HTML), not a checkpoint: the download went wrong, fetch it again",
    ),
    (lambda path, start: _is_text(start), "is a text file, not a checkpoint"),
    (
        lambda path, start: start.startswith(b"PK") and not zipfile.is_zipfile(path),
        "is truncated: the end of the file is missing; copy or download it again",
    ),
    (
        lambda path, start: start.startswith(b"PK"),
        "is a damaged checkpoint or a zip archive of something else",
    ),
    (
        lambda path, start: start.startswith(b"\x80"),
        "is truncated or damaged, or a pickle that is no torch checkpoint",
    ),
)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:160]
