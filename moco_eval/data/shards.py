"""Images in tar files, as the webdataset library writes them: any image by its place, from an index of each file."""

import functools
import hashlib
import multiprocessing
import os
import posixpath
import signal
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moco_eval import limits
from moco_eval.data.index import (
    EXTENSIONS,
    cache_folder,
    fingerprint,
    in_words,
    is_left_by_a_system,
    say_not_kept,
    scan,
)
from moco_eval.errors import InputError, RunFailed
from moco_eval.runtime import files
from moco_eval.runtime.console import progress

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
BLOCK = 512
LONGEST_LENGTH = 20  # characters of a length in a pax record, with the space behind it
LONGEST_HEADERS = 8  # extended headers before a member; more are damage
LONGEST_CHAIN = 16  # links that lead to each other
OPEN = 32  # shards that a process keeps open
VERSION = 2
LONGEST_END = 21 * BLOCK  # zeros behind the last member: two blocks, filled up to a record of twenty
# The index of a shard: a row for each image, then one for each break. Of the first row, `start` is the number of other
# members, `size` that of images passed over, and `lead` that of breaks. A link's data lie elsewhere than behind it.
ROW = np.dtype([("start", "<i8"), ("size", "<i8"), ("lead", "<i8")])
ARCHIVES = (".tar", *COMPRESSED, ".zip")
# what is found under the name of a shard, by its first bytes
OTHERS = (
    (b"\x1f\x8b", "compressed by gzip: unpack it"),
    (b"BZh", "compressed by bzip2: unpack it"),
    (b"\xfd7zXZ", "compressed by xz: unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it"),
    (b"PK", "a zip archive: unpack it, and make a tar file"),
    (b"version https://git-lfs", "a Git LFS pointer: git lfs pull fetches it"),
    (b"<", "a web page: fetch it again"),
)


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
        passed_over: hidden and system members and files, in words; empty where there are none.
    """

    shards: tuple[Shard, ...]
    ends: np.ndarray
    others: int
    passed_over: str = ""

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
            InputError: its shard cannot be read, or has changed; it is too large.
        """
        shard, row = self._find(index)
        try:
            opened = _open(shard)
            start, size, lead = opened.rows[row].tolist()
            limits.require(shard.path, "image", size)
            data = os.pread(opened.handle, size, start + lead)
        except OSError as error:
            raise InputError(f"{shard.path} cannot be read ({error.strerror}); mend or remove it") from None
        if len(data) != size:
            raise InputError(f"{shard.path} has become shorter while it was read; restore it and start again")
        return data

    def _find(self, index: int) -> tuple[Shard, int]:
        """The shard of an image, and its row in that one's index."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        return self.shards[number], 1 + int(index) - (int(self.ends[number - 1]) if number else 0)


def open_shards(folder: Path) -> tuple[Shards, str, tuple[str, ...]]:
    """The images of the tar files below a folder.

    Each shard is indexed once, by several processes; the index is kept in `cache_folder()`, and made anew where that
    is not possible. A shard that ends early keeps what is whole before the break. Several archives one behind the
    other in a file are all read, links are followed.

    Returns:
        The images; sha256 over sorted paths and sizes of the shards; the breaks, by name.
    Raises:
        InputError: no shards, compressed ones, no images in them.
    """
    listed, left = _list(folder)
    summaries = _summaries(listed)
    counts, others = [summary.images for summary in summaries], sum(summary.others for summary in summaries)
    damaged = tuple(damage for summary in summaries for damage in summary.damage)
    if not sum(counts):
        first = f"; {damaged[0]} is damaged" if damaged else f", but {others} other members"
        raise InputError(f"the {len(listed)} tar files in {folder} hold no images ({', '.join(EXTENSIONS)}){first}")
    words = "; ".join(filter(None, (in_words(left), _passed_over(listed, summaries))))
    shards = Shards(tuple(listed), np.cumsum(counts, dtype=np.int64), others, words)
    return shards, fingerprint([(os.fsencode(shard.name), shard.size) for shard in listed]), damaged


def _passed_over(shards: list[Shard], summaries: list["Summary"]) -> str:
    """How many images are hidden or a system's, and the first; empty where there are none."""
    count = sum(summary.left for summary in summaries)
    if not count:
        return ""
    shard = next(shard for shard, summary in zip(shards, summaries) if summary.left)
    with limits.open_unbuffered(shard.path) as file:
        found = members(file.fileno(), shard.size)
        name = next(member.name for member in found if _is_image(member.name) and _is_left(member.name))
    return f"{count} hidden or system members passed over: {shard.name}/{name}{', ...' if count > 1 else ''}"


def _list(folder: Path) -> tuple[list[Shard], list[bytes]]:
    """The tar files, and what is passed over beside them."""
    tars, _, left = scan(folder, b"", (".tar", *COMPRESSED))
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
    return [Shard(root, os.fsdecode(name), size, at) for (name, size), at in zip(tars, changed)], left


# Indexing


class Summary(NamedTuple):
    """Of a shard's index: how many images, other members, images passed over; the breaks; whether it is kept."""

    images: int
    others: int
    left: int
    damage: tuple[str, ...]
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
        others, left, breaks = rows[0].tolist()
        damage = tuple(_name_of_break(shard, int(row["start"])) for row in rows[len(rows) - breaks :])
    except OSError as error:
        return Summary(0, 0, 0, (f"{shard.name} ({error.strerror})",), kept=True)
    return Summary(len(rows) - 1 - breaks, others, left, damage, kept=isinstance(rows, np.memmap))


def _name_of_break(shard: Shard, start: int) -> str:
    with limits.open_unbuffered(shard.path) as file:
        member = next(members(file.fileno(), shard.size, start))
        head = os.pread(file.fileno(), BLOCK, start)
    name = f"{shard.name}/{member.name}" if member.name else shard.name
    if member.link:
        return f"{name} (a link to {member.link}, which is not in it)"
    if member.name:
        return f"{name} (an archive in a shard: unpack the shard)" if member.whole else name
    if head and not head.strip(b"\0"):
        return f"{name} (zeros from byte {start})"
    kind = next((words for mark, words in OTHERS if head.startswith(mark)), None) if start == 0 else None
    return f"{name} ({kind or f'from byte {start}'})"


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
    """The rows of a shard's images, read from its headers; see ROW.

    Raises:
        OSError: it cannot be read.
        InputError: it is no regular file, or has too many members.
    """
    with limits.open_unbuffered(shard.path) as file:
        images, breaks, others, left = _sorted(members(file.fileno(), shard.size), shard.path)
        targets = _targets(file.fileno(), shard.size) if any(image.link for image in images) else {}
    followed = [(image, _followed(image, targets)) for image in images]
    breaks += [image for image, target in followed if target is None]
    rows = [(others, left, len(breaks))]
    rows += [(image.start, target.size, target.data - image.start) for image, target in followed if target]
    rows += [(broken.start, 0, 0) for broken in breaks]
    return np.array(rows, dtype=ROW)


def _sorted(found: Iterator["Member"], path: str) -> tuple[list["Member"], list["Member"], int, int]:
    """The images of a tar file and links to them; its breaks; how many other members, and images passed over."""
    images, breaks, others, left = list[Member](), list[Member](), 0, 0
    most = limits.most("members")
    for count, member in enumerate(found, 1):
        if count > most:
            limits.require(path, "members", count)
        if not member.whole:
            breaks.append(member)
        elif _is_image(member.name) and (member.regular or member.link):
            if _is_left(member.name):
                left += 1
            else:
                images.append(member)
        elif member.regular and member.name.lower().endswith(ARCHIVES):
            breaks.append(member)
        else:
            others += member.regular
    return images, breaks, others, left


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _is_left(name: str) -> bool:
    """Whether a member is a system's by its name, or a folder that it lies in hidden or a system's."""
    folder, _, base = name.rpartition("/")
    return base.startswith("._") or _is_left_folder(folder)


@functools.lru_cache(1024)
def _is_left_folder(folder: str) -> bool:
    parts = [part for part in folder.split("/") if part not in ("", ".", "..")]
    return any(is_left_by_a_system(os.fsencode(part), folder=True) for part in parts)


def _targets(handle: int, end: int) -> dict[str, "Member"]:
    """All that a link may lead to: the files and links of a tar file by name; of several of a name the last."""
    found = members(handle, end)
    return {
        posixpath.normpath(member.name): member for member in found if member.whole and (member.regular or member.link)
    }


def _followed(member: "Member", targets: dict[str, "Member"]) -> "Member | None":
    """The file that a link leads to, by way of other links; None where it is not there."""
    at: Member | None = member
    for _ in range(LONGEST_CHAIN):
        if at is None or not at.link:
            return at
        at = targets.get(posixpath.normpath(at.link))
    return None


# Reading


class _Open:
    """A shard's descriptor and index. Read by `pread`, so forked processes do not disturb each other."""

    def __init__(self, shard: Shard):
        self.file = limits.open_unbuffered(shard.path)
        self.handle = self.file.fileno()
        status = os.fstat(self.handle)
        if (status.st_size, status.st_mtime_ns) != (shard.size, shard.mtime_ns):
            raise InputError(f"{shard.path} has changed since it was indexed; start again")
        self.rows = _rows(shard)


_open = functools.lru_cache(OPEN)(_Open)


class Member(NamedTuple):
    """A member of a tar file: its name, where its headers start, where its data is, how long that is.

    regular: a file, not a folder or a link. whole: all of it is there; the last one may not be. link: of a link, the
    name of the member that it leads to.
    """

    name: str
    start: int
    data: int
    size: int
    regular: bool = True
    whole: bool = True
    link: str = ""


def members(handle: int, end: int, at: int = 0) -> Iterator[Member]:
    """The members of a tar file from a header on; one that is not whole is the last, nameless where its header is.

    Archives one behind the other (`cat a.tar b.tar`) are read as GNU tar reads them with --ignore-zeros. More zeros
    than any writer leaves, and what is no header behind them, are a break.

    Python's tarfile takes four times as long over what webdataset writes. Formats: ustar, pax, GNU (POSIX.1-2017, pax).

    Args:
        handle: descriptor of the file.
        end: its length in bytes.
        at: where a member's first header starts.
    """
    start = at
    records: dict[str, str] = {}
    headers = 0
    while True:
        header = os.pread(handle, BLOCK, at)
        if header.count(0) == BLOCK:
            behind = _behind_zeros(handle, at, end)
            if behind is None:
                return
            if behind == at:
                yield Member("", start, at, 0, whole=False)
                return
            start, records, at = behind, {}, behind
            continue
        try:
            name, size, kind = _header(header)
            if kind in b"xXgLK":
                headers += kind not in b"g"
                allowed = size >= 0 and limits.allows("header", size) and headers <= LONGEST_HEADERS
                if not allowed or at + BLOCK + size > end:
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
        # sparse ones are not stored as they are, and M is the rest of one in another file
        whole = at + BLOCK + size <= end and kind not in b"SM" and "sparse" not in records
        link = _link(kind, name, records.get("linkpath", _text(header[157:257]))) if kind in b"12" else ""
        yield Member(name, start, at + BLOCK, size if whole else 0, kind not in b"123456", whole, link)
        if not whole:
            return
        at += BLOCK + _padded(size)
        start, records, headers = at, {}, 0


def _behind_zeros(handle: int, at: int, end: int) -> int | None:
    """Where another archive starts behind a block of zeros; None at the end of the file, `at` where it is a break."""
    data = os.pread(handle, LONGEST_END + 2 * BLOCK, at)
    zeros = (len(data) - len(data.lstrip(b"\0"))) // BLOCK * BLOCK
    if zeros > LONGEST_END:
        return at
    if end - (at + zeros) < BLOCK:  # nothing but zeros, or less than a header
        return None
    try:
        _header(data[zeros : zeros + BLOCK])
    except ValueError:
        return at
    return at + zeros if zeros > BLOCK else at


def _link(kind: bytes, name: str, target: str) -> str:
    """The member that a link leads to: a hard link says it, a symbolic one from its own folder on."""
    return target if kind == b"1" else posixpath.join(posixpath.dirname(name), target)


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
    if kind in b"LK":
        return {"path" if kind == b"L" else "linkpath": _text(data)}
    records: dict[str, str] = {}
    at, end, count = 0, len(data.rstrip(b"\0")) if kind in b"xX" else 0, 0
    while at < end:
        length = int(data[at : at + LONGEST_LENGTH].partition(b" ")[0])
        count += 1
        if not 0 < length <= len(data) - at or not limits.allows("records", count):
            raise ValueError
        key, _, value = data[at : at + length - 1].partition(b" ")[2].partition(b"=")
        records["sparse" if key.startswith(b"GNU.sparse.") else os.fsdecode(key)] = os.fsdecode(value)
        at += length
    return records
