"""What a file that a stranger hands us may hold at most, and reading regular files no further than that.

No honest file comes near these limits. The environment variable MOCO_EVAL_LIMITS multiplies all of them: 4 for four
times as much. The table in docs/limits.md is checked against `LIMITS`.
"""

import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from moco_eval.errors import InputError

SETTING = "MOCO_EVAL_LIMITS"
WAY_OUT = f"if it is from somebody you trust, raise the limit with {SETTING}=N, which multiplies it"


@dataclass(frozen=True)
class Limit:
    """At most `most` of `unit` in one `of`."""

    most: int
    unit: str
    of: str


LIMITS = {
    "record": Limit(16 << 20, "bytes", "result.json, environment.json or other JSON of a run"),
    "yaml": Limit(1 << 20, "bytes", "YAML file"),
    "image": Limit(512 << 20, "bytes", "image file"),
    "pixels": Limit(178_956_970, "pixels", "image"),  # Pillow's own limit
    "values_of_bands": Limit(268_435_456, "values in all channels", "image of many channels"),
    "scans": Limit(1 << 33, "pixels in all its scans", "JPEG image"),
    "members": Limit(1 << 24, "members", "tar file"),
    "header": Limit(1 << 20, "bytes", "extended header in a tar file"),
    "records": Limit(1024, "records", "extended header in a tar file"),
    "xml": Limit(4 << 20, "bytes", "XML file"),
    "coco": Limit(8 << 30, "bytes", "annotation file in COCO format"),
    "outline": Limit(8 << 20, "pixels", "polygon's outline"),
    "stl10": Limit(8 << 30, "bytes", ".bin file of STL-10"),
    "sample": Limit(100_000_000, "bytes", "sample.npz (unpacked)"),
    "depth": Limit(100, "levels", "JSON or YAML file (aliases written out)"),
    "values": Limit(100_000, "values", "YAML file (aliases written out)"),
    "digits": Limit(40, "digits", "integer in JSON or YAML"),
    "metrics": Limit(256 << 20, "bytes", "metrics.jsonl"),
    "classes": Limit(50_000, "classes", "data set of a run"),
    "array": Limit(4 << 30, "bytes", "array of a run (unpacked)"),
    "packing": Limit(100, "times its packed bytes", "array of a run (if it has more than 64 MiB unpacked)"),
    "picture": Limit(32 << 20, "bytes", "picture of a run"),
    "picture_pixels": Limit(50_000_000, "pixels", "picture of a run"),
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


def allows(name: str, count: int) -> bool:
    """Whether so many are within the limit of that name; the environment is asked only where they may not be."""
    return count <= LIMITS[name].most or count <= most(name)


def require(path: Path | str, name: str, count: int) -> None:
    """Raises InputError where a file holds more than the limit of that name allows."""
    if not allows(name, count):
        limit = LIMITS[name]
        raise InputError(
            f"{path} has {count:,} {limit.unit}, and {most(name):,} are the most that one {limit.of} may have; "
            f"{WAY_OUT}"
        )


def open_regular(path: Path | str) -> BinaryIO:
    """Open a regular file to read its bytes; nothing else is opened, so no pipe is waited for and no device touched.

    Raises:
        InputError: a folder, a pipe, a socket or a device, also behind a link.
        OSError: missing, or not readable.
    """
    return io.BufferedReader(open_unbuffered(path))


def open_unbuffered(path: Path | str, name: str = "") -> io.FileIO:
    """As `open_regular`; with a name, the file may be no larger than the limit of that name.

    Raises:
        InputError: as `open_regular`, or too large.
        OSError: missing, or not readable.
    """
    require_regular(path, os.stat(path))  # noqa: PTH116 (one call for each image)
    file = io.FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    try:
        about = os.fstat(file.fileno())
        require_regular(path, about)  # it may have been replaced meanwhile
        if name:
            require(path, name, about.st_size)
    except InputError:
        file.close()
        raise
    return file


def require_regular(path: Path | str, about: os.stat_result) -> None:
    """Raises InputError where what `os.stat` says about a path is not that of a regular file."""
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
