"""What a file that a stranger hands us may hold at most, and reading regular files no further than that.

No honest file comes near these limits. The environment variable MOCO_EVAL_LIMITS multiplies all of them: 4 for four
times as much. The table in docs/limits.md is checked against `LIMITS`.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from moco_eval.errors import InputError

SETTING = "MOCO_EVAL_LIMITS"


@dataclass(frozen=True)
class Limit:
    """At most `most` of `unit` in one `of`."""

    most: int
    unit: str
    of: str


LIMITS = {
    "record": Limit(64 << 20, "bytes", "result.json, environment.json or other JSON of a run"),
    "yaml": Limit(4 << 20, "bytes", "YAML file"),
    "list": Limit(256 << 20, "bytes", "text file that lists images or labels"),
}

KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def factor() -> float:
    """What MOCO_EVAL_LIMITS multiplies all limits by. Raises InputError where it is no number of at least 1."""
    text = os.environ.get(SETTING, "1")
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < float("inf"):
        raise InputError(f"{SETTING} is {text!r} and must be a number of at least 1, such as 4")
    return value


def most(name: str) -> int:
    """A limit by its name in `LIMITS`, as MOCO_EVAL_LIMITS has it."""
    return int(LIMITS[name].most * factor())


def require(path: Path | str, name: str, count: int) -> None:
    """Raises InputError where a file holds more than the limit of that name allows."""
    if count > LIMITS[name].most and count > most(name):
        limit = LIMITS[name]
        raise InputError(
            f"{path} has {count:,} {limit.unit}, and {most(name):,} are the most that one {limit.of} may have; if it "
            f"is from somebody you trust, raise the limit with {SETTING}=N, which multiplies it"
        )


def open_regular(path: Path | str) -> BinaryIO:
    """Open a regular file to read its bytes; nothing else is opened, so no pipe is waited for and no device touched.

    Raises:
        InputError: a folder, a pipe, a socket or a device, also behind a link.
        OSError: missing, or not readable.
    """
    _require_regular(path, os.stat(path))  # noqa: PTH116 (one call for each image)
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    try:
        _require_regular(path, os.fstat(file.fileno()))  # it may have been replaced meanwhile
    except InputError:
        file.close()
        raise
    return file


def _require_regular(path: Path | str, about: os.stat_result) -> None:
    if not stat.S_ISREG(about.st_mode):
        raise InputError(
            f"{path} is {kind_of(about)}, not a regular file; put a copy of what it should hold in its place"
        )


def kind_of(about: os.stat_result) -> str:
    """What something is that is no regular file: a folder, a named pipe, a socket or a device."""
    return next((kind for is_kind, kind in KINDS if is_kind(about.st_mode)), "no file")


def read_bytes(path: Path | str, name: str) -> bytes:
    """What a regular file holds, if it is no larger than the limit of that name.

    Raises:
        InputError: not a regular file, or too large.
        OSError: missing, or not readable.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        require(path, name, size)
        data = file.read(size + 1)  # a file of /proc says 0, one that grows holds more
        if len(data) > size:
            data += file.read(most(name) + 1 - len(data))
            require(path, name, len(data))
        return data
