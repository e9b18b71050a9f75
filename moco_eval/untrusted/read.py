"""What a checkpoint file holds, read without executing anything in it.

The format goes by the contents, never by the name: torch's zip format and safetensors, whose tensors are mapped and
stay on disk until they are used; torch's format of before 1.6 and detectron2's pickle, which go into memory.
"""

import json
import math
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch

from moco_eval.errors import InputError
from moco_eval.runtime.console import warn
from moco_eval.untrusted import pickle_read
from moco_eval.untrusted.pickle_read import NETWORK, StandIn, plain, refusal, stand_in
from moco_eval.untrusted.pickle_scan import DAMAGED, Refused, scan, shown
from moco_eval.untrusted.torch_format import LEGACY, read_archive, read_legacy

SUFFIXES = (".pth", ".pth.tar", ".pt", ".th", ".safetensors", ".pkl")
LARGE = 1 << 30  # bytes that are worth a word


def read(path: Path) -> dict[str, Any]:
    """The dict a checkpoint file holds, in plain containers of tensors, strings, numbers, None and stand-ins.

    Arrays come as tensors. An object of another class than these comes as a `StandIn` that knows the class's name.
    For safetensors, the tensors and what our own `convert` wrote in the metadata, side by side.

    Raises:
        InputError: missing, a folder, empty, truncated, no checkpoint, made to harm, or in need of code.
    """
    try:
        start, before = _start(path)
        files = [path, *(shards_of(path) or ())]
        for shard in files[1:]:
            _shard(shard)
        dates = [_date(file) for file in files]
        size = sum(file.stat().st_size for file in files)
        values = _of_shards(path, files[1:]) if files[1:] else _values(path, start, before.st_size)
        if isinstance(values, StandIn) and NETWORK.match(values.of):
            raise Refused(refusal(values.of))
        if not isinstance(values, dict):
            kind = values.of if isinstance(values, StandIn) else type(values).__name__
            article = "an" if kind[0] in "aeiou" else "a"
            raise Refused(f"holds {article} {kind}, not a dict of named tensors: have a state_dict() saved")
        contents = plain(values, _Tensors(size).checked)
        if [_date(file) for file in files] != dates:
            raise Refused("changed while it was read: wait until it is written, then try again")
        return contents
    except Refused as error:
        raise InputError(f"{path} {error}") from None
    except MemoryError:
        raise InputError(f"{path} does not fit into this machine's memory: read it on a larger one") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or shown(error)}") from None


def _values(path: Path, start: bytes, size: int) -> Any:
    """What a file of any format holds."""
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 40:
        return _read_safetensors(path, start, size)
    if start.startswith(b"PK"):
        mapped = path.suffix != ".safetensors"  # torch would go by that suffix, not by the contents
        if not mapped:
            _require_memory(path, size, "is torch's under the suffix .safetensors", "give it the suffix .pth")
        return read_archive(path, size, mapped)
    if start.startswith(LEGACY):
        way_out = "torch.load and torch.save it once where there is memory"
        _require_memory(path, size, "is in torch's format of before 1.6", way_out)
        return read_legacy(path, size)
    _require_known(path, start)
    if start.startswith(b"\x80") or _is_pickle(path, size):
        _require_memory(path, 2 * size, "is a pickle", "have it saved by torch.save")
        return pickle_read.read(path, encoding="latin1")
    if _is_text(start):
        raise Refused("is a text file, not a checkpoint: give the checkpoint's own path")
    raise Refused(
        f"is not a checkpoint that can be read: neither PyTorch's nor safetensors nor detectron2's; {DAMAGED}"
    )


def _date(file: Path) -> tuple[int, int]:
    about = file.stat()
    return about.st_size, about.st_mtime_ns


# The path


def _start(path: Path) -> tuple[bytes, os.stat_result]:
    """The first bytes of a file that is a checkpoint of its own, and its size and date."""
    start, about = _opened(path)
    if path.suffix == ".distcp" or path.name == ".metadata":
        raise Refused(f"is a part of a folder. {_distributed(path.parent)}")
    if (shard := SHARD.search(path.name)) and int(shard[1]) > 1:
        raise Refused(f"is one of {int(shard[1])} shards of a checkpoint: give their index, {_index(path)}")
    return start, about


def _opened(path: Path) -> tuple[bytes, os.stat_result]:
    """The first bytes of a file, and its size and date."""
    try:
        about = path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        if path.is_symlink():
            raise Refused(f"is a link to {path.readlink()}, which does not exist: mend the link") from None
        raise Refused(f"does not exist{_newest(path.parent, '; the newest there is ')}") from None
    if stat.S_ISDIR(about.st_mode):
        raise Refused(_folder(path))
    if not stat.S_ISREG(about.st_mode):
        raise Refused("is not a regular file: copy what it gives to one")
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise Refused(f"is empty (0 bytes): {DAMAGED}")
    return start, about


SHARD = re.compile(r"-\d{5}-of-(\d{5})\.")


def _index(shard: Path) -> str:
    """The name of the index that a shard belongs to: the one beside it, or what Hugging Face would call it."""
    usual = f"{SHARD.sub('.', shard.name)}.index.json"
    beside = sorted(file.name for file in shard.parent.glob("*.index.json"))
    return usual if usual in beside or not beside else beside[0]


def _distributed(folder: Path) -> str:
    return (
        f"{folder} was written by torch.distributed.checkpoint: make one file of it with torch's own converter, "
        f"`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} OUT.pth` (dcp_to_torch_save)"
    )


def _folder(path: Path) -> str:
    inside = path / "checkpoints"
    if inside.is_dir():
        return f"is a run directory{_newest(inside, '; give its newest checkpoint: ', full=True)}"
    if (path / ".metadata").is_file() and any(path.glob("*.distcp")):
        return f"is a folder. {_distributed(path)}"
    if (path / "zero_to_fp32.py").is_file():
        return "is a folder of DeepSpeed's: make one file of it with its own zero_to_fp32.py, and give that"
    if index := next(iter(sorted(path.glob("*.index.json"))), None):
        return f"is a folder, not a checkpoint; its shards are listed in {index.name}: give that"
    if any((inner / "data.pkl").is_file() for inner in _folders(path)):
        return "is a folder that a checkpoint was unpacked into: pack it again (zip -0 -r model.pth FOLDER)"
    return f"is a folder, not a checkpoint{_newest(path, '; the newest there is ')}"


def _folders(path: Path) -> list[Path]:
    """It and the folders in it."""
    try:
        return [path, *(inner for inner in path.iterdir() if inner.is_dir())]
    except OSError:
        return [path]


def _newest(folder: Path, prefix: str, full: bool = False) -> str:
    """`prefix` and the newest checkpoint of a folder, or nothing."""
    try:
        files = [file for file in folder.iterdir() if file.name.endswith(SUFFIXES) and file.is_file()]
        newest = max(files, key=lambda file: (file.stat().st_mtime, file.name), default=None)
    except (OSError, ValueError):
        return ""
    return f"{prefix}{newest if full else newest.name}" if newest else ""


# Memory


def _require_memory(path: Path, need: int, why: str, way_out: str) -> None:
    """Say what memory a large file needs before it is taken; Refused where there is not so much."""
    if need < LARGE:
        return
    message, free = f"{why}, which cannot be mapped: to read it takes {need / 1e9:.1f} GB of memory", _free_memory()
    if free is not None and need > free:
        raise Refused(f"{message}, and {free / 1e9:.1f} GB are free; {way_out}")
    warn(f"{path} {message}; to avoid that, {way_out}")


def _free_memory() -> int | None:
    """Bytes; None where the system does not tell."""
    try:
        match = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


class _Tensors:
    """Turns what is no plain value into a tensor or a stand-in, and keeps count of what the tensors claim."""

    def __init__(self, size: int):
        self.most = max(8 * size, LARGE)
        self.claimed = 0

    def checked(self, value: Any) -> Any:
        if isinstance(value, bytearray):
            return bytes(value)
        tensor = _tensor(value)
        if tensor is None:
            kind = value if isinstance(value, type) else type(value)
            return object.__new__(stand_in(f"{kind.__module__}.{kind.__qualname__}"))
        self.claimed += math.prod(tensor.shape) * tensor.element_size()
        if self.claimed > self.most:
            raise Refused(f"claims tensors of {self.claimed / 1e9:.1f} GB, many times what it holds: {DAMAGED}")
        return tensor


def _tensor(value: Any) -> torch.Tensor | None:
    """A plain tensor that shares the value's memory where it can; None where it is neither tensor nor array."""
    if isinstance(value, torch.Tensor):
        return torch.Tensor.detach(value)
    if not isinstance(value, np.ndarray):
        return None
    try:
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), copy=False))
    except TypeError:  # numpy's long doubles
        return None


# safetensors


LARGEST_HEADER = 1 << 24


def _read_safetensors(path: Path, start: bytes, size: int) -> dict[str, Any]:
    length = int.from_bytes(start[:8], "little")
    if length > size - 8:
        raise Refused(
            f"is a truncated safetensors file: {length:,} bytes of header announced, {size - 8:,} there; {DAMAGED}"
        )
    if length > LARGEST_HEADER:
        raise Refused(f"is a safetensors file with a header of {length:,} bytes, as no checkpoint has: {DAMAGED}")
    try:
        with path.open("rb") as whole:
            json.loads(whole.read(8 + length)[8:], object_pairs_hook=_unique)
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("moco-eval", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (MemoryError, Refused):
        raise
    except Exception as error:  # of safetensors, json and torch, for a damaged file
        if "allocate memory" in str(error):
            raise MemoryError from None
        raise Refused(f"is a damaged safetensors file ({shown(error)}): {DAMAGED}") from None
    return {**about, **tensors} if isinstance(about, dict) else tensors


# Shards


MOST_SHARDS = 1000


def shards_of(path: Path) -> list[Path] | None:
    """The files that an index such as model.safetensors.index.json lists, beside it; None where it is no index.

    Raises:
        Refused: an index of files elsewhere, or of none.
    """
    places = _weight_map(path)
    if places is None:
        return None
    names = sorted({name for name in places.values() if isinstance(name, str)})
    if not names or len(names) > MOST_SHARDS or not all(isinstance(name, str) for name in places.values()):
        raise Refused(f"is an index of shards that lists none, or too many: {DAMAGED}")
    if odd := next((name for name in names if Path(name).name != name or name == path.name), None):
        raise Refused(f"is an index of shards that lists {shown(odd)}, which is no file beside it: {DAMAGED}")
    return [path.with_name(name) for name in names]


def _weight_map(path: Path) -> dict[str, Any] | None:
    if path.stat().st_size > LARGEST_HEADER:
        return None
    with path.open("rb") as file:
        if not file.read(64).lstrip().startswith(b"{"):
            return None
        file.seek(0)
        try:
            values = json.loads(file.read())
        except (ValueError, RecursionError):
            return None
    places = values.get("weight_map") if isinstance(values, dict) else None
    return places if isinstance(places, dict) else None


def _of_shards(path: Path, shards: list[Path]) -> dict[str, Any]:
    """The tensors of all shards, each where the index says."""
    listed = _weight_map(path) or {}
    together: dict[str, Any] = {}
    for shard in shards:
        values = _shard(shard, _values)
        names = {name for name, place in listed.items() if place == shard.name}
        if not isinstance(values, dict) or values.keys() != names:
            raise Refused(f"lists other tensors in {shard.name} than are in it: {DAMAGED}")
        together |= values
    return together


def _shard(shard: Path, read_it: Callable[[Path, bytes, int], Any] = lambda *_: None) -> Any:
    """What a shard holds, if it is a file at all."""
    try:
        start, about = _opened(shard)
        return read_it(shard, start, about.st_size)
    except Refused as error:
        raise Refused(f"lists {shard.name}, which {_of_shard(shard, error)}") from None


def _of_shard(shard: Path, error: Refused) -> str:
    """Why a shard cannot be read; no other file of the folder stands for one that is not there."""
    absent = str(error).startswith("does not exist")
    return "does not exist: bring it into the same folder" if absent else str(error)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("the same name twice")
    return values


# What else it may be


_GIVE = "not a checkpoint: give the file of weights beside it"
LOOKS = (
    (rb"version https://git-lfs", "is a Git LFS pointer, not the file itself: run 'git lfs pull' where it came from"),
    (rb"outs:\s+- ", "is a DVC pointer, not the file itself: run 'dvc pull' where it came from"),
    (
        rb"[./git]*/annex/objects/",
        "is a git-annex pointer, not the file itself: run 'git annex get' there",
    ),
    (
        rb"\s*<(html|head|body|!doctype|!--|\?xml)",
        "is a web page, not a checkpoint: the download went wrong, fetch it again",
    ),
    (rb'\s*\{.{0,200}"(added_tokens|truncation|normalizer|pre_tokenizer)"', f"is a tokenizer of texts, {_GIVE}"),
    (rb'\s*\{.*"(architectures|model_type|_class_name|image_processor_type)"', f"is a file of settings, {_GIVE}"),
    (rb"\s*[{\[][\s -~]*$", "is JSON, such as a server's error, not a checkpoint: fetch it again"),
    (rb".{257}ustar", "is a tar archive, not a checkpoint: unpack it and give the file inside"),
    (rb"\x1f\x8b|BZh\d|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!", "is compressed: unpack it and give the file inside"),
    (rb"\x89HDF\r\n", "is an HDF5 file such as Keras writes, not a PyTorch checkpoint: have its weights converted"),
    (rb"\x93NUMPY", "is a numpy array (.npy), not a checkpoint: write a dict of named tensors with torch.save"),
    (
        rb"\x08[\x01-\x20][\x12\x1a\x22\x3a]",
        "is an ONNX or TensorFlow graph, not a PyTorch checkpoint: give the network's state_dict() instead",
    ),
    (rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP", "is a picture, not a checkpoint: give the checkpoint's own path"),
    (rb".{4}TFL3", "is a TensorFlow Lite model, not a PyTorch checkpoint: have its weights converted to PyTorch"),
    (rb"GGUF", "is GGUF, as language models are kept in, not a PyTorch checkpoint: give an encoder of images"),
    (
        rb"model_checkpoint_path:",
        "is TensorFlow's list of checkpoints, not a PyTorch checkpoint: have its weights converted to PyTorch",
    ),
    (rb"([\x81-\x8f]|\xde..|\xdf....)[\xa1-\xbf\xd9]", "is msgpack such as Flax writes: have its weights converted"),
)
TENSORFLOW_INDEX = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"  # at its end


def _require_known(path: Path, start: bytes) -> None:
    """Raises Refused for a file that is plainly something else, and says what."""
    start = start.removeprefix(b"\xef\xbb\xbf")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16, as Windows writes what it is piped
        start = start[2:].replace(b"\0", b"")
    for pattern, message in LOOKS:
        if re.match(pattern, start, re.DOTALL | re.IGNORECASE):
            raise Refused(message)
    with path.open("rb") as file:
        file.seek(-min(8, path.stat().st_size), os.SEEK_END)
        if file.read() == TENSORFLOW_INDEX:
            raise Refused("is the index of a TensorFlow checkpoint: have its weights converted to PyTorch")


def _is_pickle(path: Path, size: int) -> bool:
    """Whether a file without pickle's mark is one all the same, as of protocols 0 and 1."""
    try:
        with path.open("rb") as file:
            return scan(file, size).end > 1
    except Refused:
        return False


def _is_text(start: bytes) -> bool:
    return start.isascii() and all(byte in b"\t\n\r\f" or 32 <= byte < 127 for byte in start)
