"""Images in tar files, as the webdataset library writes them: any image by its place, from an index of each file."""

import functools
import hashlib
import multiprocessing
import os
import signal
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moco_eval.data.index import EXTENSIONS, cache_folder, fingerprint, say_not_kept, scan
from moco_eval.errors import InputError, RunFailed
from moco_eval.runtime import files
from moco_eval.runtime.console import progress

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
BLOCK = 512
LONGEST_NAME = 1 << 20  # bytes; a longer one is damage
OPEN = 32  # shards that a process keeps open
VERSION = 1
# The index of a shard: a row for each image and, where it ends early, one for the break. Of the first row, `start` is
# the number of other members and `lead` says whether there is a break.
ROW = np.dtype([("start", "<i8"), ("size", "<i8"), ("lead", "<u4")])


class Shard(NamedTuple):
    """A tar file as it was when it was listed: its folder, its path below that, its bytes, its time of change in ns."""

    folder: str
    name: str
    size: int
    mtime_ns: int

    @property
    def path(self) -> str:
        return f"{self.folder}/{self.name}"

    @property
    def kept_at(self) -> Path:
        """Where its index is kept; another one for a file that has changed."""
        key = f"{VERSION}\0{self.path}\0{self.size}\0{self.mtime_ns}"
        return cache_folder() / "shards" / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.npy"


@dataclass(frozen=True)
class Shards:
    """The images of tar files: a sequence of names, which reads them.

    Attributes:
        shards: the tar files, sorted.
        ends: where each one's images end, (S,) int64.
        others: how many members are no images (.cls, .json, .txt).
    """

    shards: tuple[Shard, ...]
    ends: np.ndarray
    others: int

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> str:
        shard, row = self._find(index)
        try:
            opened = _open(shard)
            return f"{shard.name}/{next(members(opened.handle, shard.size, int(opened.rows[row]['start']))).name}"
        except (OSError, InputError, StopIteration):
            return f"{shard.name}/(image {row})"

    def read(self, index: int) -> bytes:
        """An image's bytes.

        Raises:
            InputError: its shard cannot be read, or has changed.
        """
        shard, row = self._find(index)
        try:
            opened = _open(shard)
            start, size, lead = opened.rows[row].tolist()
            data = os.pread(opened.handle, size, start + lead)
        except OSError as error:
            raise InputError(f"{shard.path} cannot be read ({error.strerror}); mend or remove it") from None
        if len(data) != size:
            raise InputError(f"{shard.path} has become shorter while it was read; give it back and start again")
        return data

    def _find(self, index: int) -> tuple[Shard, int]:
        """The shard of an image, and its row in that one's index."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        return self.shards[number], 1 + int(index) - (int(self.ends[number - 1]) if number else 0)


def open_shards(folder: Path) -> tuple[Shards, str, tuple[str, ...]]:
    """The images of the tar files below a folder.

    Each shard is indexed once, by several processes; the index is kept in `cache_folder()`, and made anew where that
    is not possible. A shard that ends early keeps what is whole before the break.

    Returns:
        The images; sha256 over sorted paths and sizes of the shards; the breaks, by name.
    Raises:
        InputError: no shards, compressed ones, no images in them.
    """
    listed = _list(folder)
    summaries = _summaries(listed)
    counts, others = [summary.images for summary in summaries], sum(summary.others for summary in summaries)
    damaged = tuple(summary.damage for summary in summaries if summary.damage)
    if not sum(counts):
        first = f"; {damaged[0]} is damaged" if damaged else f", but {others} other members"
        raise InputError(f"the {len(listed)} tar files in {folder} hold no images ({', '.join(EXTENSIONS)}){first}")
    shards = Shards(tuple(listed), np.cumsum(counts, dtype=np.int64), others)
    return shards, fingerprint([(os.fsencode(shard.name), shard.size) for shard in listed]), damaged


def _list(folder: Path) -> list[Shard]:
    tars, _ = scan(folder, b"", (".tar", *COMPRESSED))
    compressed = [os.fsdecode(name) for name, _ in tars if not name.lower().endswith(b".tar")]
    if compressed:
        raise InputError(
            f"{folder} holds {len(compressed)} compressed shards (first: {compressed[0]}); images are read from their "
            "places, which needs plain .tar: unpack them (gunzip, unzstd, ...)"
        )
    if not tars:
        raise InputError(f"{folder} holds no .tar files; for image files take --dataset flat")
    changed = (os.stat(f"{folder}/{os.fsdecode(name)}").st_mtime_ns for name, _ in tars)  # noqa: PTH116
    root = os.path.realpath(folder)
    return [Shard(root, os.fsdecode(name), size, at) for (name, size), at in zip(tars, changed)]


# Indexing


class Summary(NamedTuple):
    """Of a shard's index: how many images, how many other members, what the break is called, whether it is kept."""

    images: int
    others: int
    damage: str
    kept: bool


def _summaries(shards: list[Shard]) -> list[Summary]:
    """Of every shard; those without an index are indexed, by one process at a time and its children."""
    known = {shard: _summary(shard) for shard in shards if shard.kept_at.exists()}
    if len(known) < len(shards):
        with files.one_at_a_time(cache_folder() / "shards.npy"):
            missing = [shard for shard in shards if shard not in known]
            with progress("index", len(missing), unit="shards") as advance:
                for shard, summary in zip(missing, _in_parallel(missing)):
                    known[shard] = summary
                    advance()
    if not all(summary.kept for summary in known.values()):
        say_not_kept(f"cannot write {cache_folder()}")
    return [known[shard] for shard in shards]


def _in_parallel(shards: list[Shard]) -> Iterator[Summary]:
    """`_summary` of each, in order."""
    count = min(8, os.cpu_count() or 1, len(shards) // 4)
    if count < 2:
        yield from map(_summary, shards)
        return
    ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends them through their parent
    with multiprocessing.get_context("fork").Pool(count, signal.signal, ignore) as pool:
        yield from pool.imap(_summary, shards)


def _summary(shard: Shard) -> Summary:
    try:
        rows = _rows(shard)
        damage = _name_of_break(shard, int(rows[-1]["start"])) if rows[0]["lead"] else ""
    except OSError as error:
        return Summary(0, 0, f"{shard.name} ({error.strerror})", kept=True)
    return Summary(len(rows) - 1 - bool(damage), int(rows[0]["start"]), damage, kept=isinstance(rows, np.memmap))


def _name_of_break(shard: Shard, start: int) -> str:
    with open(shard.path, "rb", buffering=0) as file:  # noqa: PTH123
        name = next(members(file.fileno(), shard.size, start)).name
    return f"{shard.name}/{name}" if name else f"{shard.name} (from byte {start})"


def _rows(shard: Shard) -> np.ndarray:
    """The index of a shard, mapped from the disk; made where it is missing or damaged, and kept if that is possible."""
    path = shard.kept_at
    with suppress(OSError, ValueError, EOFError):
        kept = np.load(path, mmap_mode="r")
        if kept.dtype == ROW:
            return kept
    rows = index_of(shard)
    try:
        with files.atomic(path) as temporary:
            np.save(temporary, rows)
        return np.load(path, mmap_mode="r")
    except (InputError, RunFailed):
        return rows


def index_of(shard: Shard) -> np.ndarray:
    """The rows of a shard's images, read from its headers; see ROW. Raises OSError where it cannot be read."""
    rows, others = [(0, 0, 0)], 0
    broken = False
    with open(shard.path, "rb", buffering=0) as file:  # noqa: PTH123
        for member in members(file.fileno(), shard.size):
            broken = not member.whole
            if broken or (member.regular and member.name.lower().endswith(EXTENSIONS)):
                rows.append((member.start, member.size, member.data - member.start))
            else:
                others += member.regular
    rows[0] = (others, 0, broken)
    return np.array(rows, dtype=ROW)


# Reading


class _Open:
    """A shard's descriptor and index. Read by `pread`, so forked processes do not disturb each other."""

    def __init__(self, shard: Shard):
        self.handle = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(self.handle)
        if (status.st_size, status.st_mtime_ns) != (shard.size, shard.mtime_ns):
            raise InputError(f"{shard.path} has changed since it was indexed; start again")
        self.rows = _rows(shard)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            os.close(self.handle)


_open = functools.lru_cache(OPEN)(_Open)


class Member(NamedTuple):
    """A member of a tar file: its name, where its headers start, where its data is, how long that is.

    regular: a file, not a folder or a link. whole: all of it is there; the last one may not be.
    """

    name: str
    start: int
    data: int
    size: int
    regular: bool = True
    whole: bool = True


def members(handle: int, end: int, at: int = 0) -> Iterator[Member]:
    """The members of a tar file from a header on; one that is not whole is the last, nameless where its header is.

    Python's tarfile takes four times as long over what webdataset writes. Formats: ustar, pax, GNU (POSIX.1-2017, pax).

    Args:
        handle: descriptor of the file.
        end: its length in bytes.
        at: where a member's first header starts.
    """
    start = at
    records: dict[str, str] = {}
    while True:
        header = os.pread(handle, BLOCK, at)
        if header.count(0) == BLOCK:
            return
        try:
            name, size, kind = _header(header)
            if kind in b"xXgLK":
                if not 0 <= size <= LONGEST_NAME or at + BLOCK + size > end:
                    raise ValueError
                records |= _extension(kind, os.pread(handle, size, at + BLOCK))
                at += BLOCK + _padded(size)
                continue
            name, size = records.get("path", name), int(records.get("size", size))
            if size < 0:
                raise ValueError
        except ValueError:
            yield Member("", start, at, 0, whole=False)
            return
        size = 0 if kind in b"123456" else size
        whole = at + BLOCK + size <= end and kind != b"S"  # sparse ones are not stored as they are
        yield Member(name, start, at + BLOCK, size if whole else 0, kind not in b"123456", whole)
        if not whole:
            return
        at += BLOCK + _padded(size)
        start, records = at, {}


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _header(header: bytes) -> tuple[str, int, bytes]:
    """Name, size and kind of a header. Raises ValueError where it is damaged or cut off."""
    total = (zlib.adler32(header) & 0xFFFF) - 1  # of all bytes, modulo 65521; faster than sum()
    if len(header) < BLOCK or (total - sum(header[148:156]) + 8 * 32 - _number(header[148:156])) % 65521:
        raise ValueError
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:
        name = f"{_text(header[345:500])}/{name}"
    return name, _number(header[124:136]), header[156:157]


def _text(field: bytes) -> str:
    return os.fsdecode(field.partition(b"\0")[0])


def _number(field: bytes) -> int:
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _extension(kind: bytes, data: bytes) -> dict[str, str]:
    """What the next member is really called and how long it is, from a GNU long name or pax records."""
    if kind == b"L":
        return {"path": _text(data)}
    records: dict[str, str] = {}
    while kind in b"xX" and data.strip(b"\0"):
        length = int(data.partition(b" ")[0])
        if not 0 < length <= len(data):
            raise ValueError
        key, _, value = data[: length - 1].partition(b" ")[2].partition(b"=")
        records[os.fsdecode(key)] = os.fsdecode(value)
        data = data[length:]
    return records
