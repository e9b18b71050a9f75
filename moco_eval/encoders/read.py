"""What a checkpoint file holds, read without executing anything in it."""

import json
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch

from moco_eval.errors import InputError

SUFFIXES = (".pth", ".pth.tar", ".pt", ".th", ".safetensors")


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
