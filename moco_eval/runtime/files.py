"""Files that are never half there: written under a temporary name, flushed, renamed."""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from moco_eval import limits
from moco_eval.errors import InputError, RunFailed


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it takes the final name, on failure it goes.

    A file that is replaced leaves its mode to the new one; otherwise the umask says what that is. A link is replaced
    and not followed: in a run directory it may be a stranger's.

    Raises:
        InputError: the folder cannot be written, or a folder, a pipe, a socket or a device has this name.
        RunFailed: the disk is full or fails; the old file is unchanged.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = _mode_of(path)
        temporary = _new_file(path, 0o666 if mode is None else mode)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another --output") from None
    try:
        with disk_errors_named(path):
            yield temporary
            flush(temporary)
            if mode is not None:
                temporary.chmod(mode)
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _mode_of(path: Path) -> int | None:
    """The permissions of a regular file; None where there is none, or a link. Raises InputError for anything else."""
    try:
        about = path.lstat()
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(about.st_mode):
        return None
    _require_regular(path, about)
    return about.st_mode & 0o777


def _require_regular(path: Path, about: os.stat_result) -> None:
    if not stat.S_ISREG(about.st_mode):
        raise InputError(f"cannot write {path}: it is {limits.kind_of(about)}; choose another --output")


def _new_file(path: Path, mode: int) -> Path:
    """A new file beside another, by a name that nobody foresees. Raises OSError."""
    while True:
        temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}{path.suffix}")
        try:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode | 0o200))
            return temporary
        except FileExistsError:
            continue


def output_file(path: Path) -> Path:
    """Where a file is to be written that the user names: where a link of theirs leads, so that it stays a link.

    Raises:
        InputError: a folder, a pipe, a socket or a device, also behind a link; a link to nothing, or of another user.
    """
    try:
        about = path.lstat()
        if not stat.S_ISLNK(about.st_mode):
            _require_regular(path, about)
            return path
        if about.st_uid not in (os.geteuid(), 0):
            raise InputError(f"cannot write {path}: it is a link of another user; choose another --output")
        _require_regular(path, path.stat())
        return path.resolve(strict=True)
    except FileNotFoundError:
        if path.is_symlink():
            raise InputError(f"cannot write {path}: it is a link to nothing; choose another --output") from None
        return path
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {path}: {reason}; choose another --output") from None


@contextmanager
def disk_errors_named(path: Path) -> Iterator[None]:
    """A full or failing disk as RunFailed; torch tells of it in a RuntimeError of its own."""
    try:
        yield
    except OSError as error:
        raise RunFailed(f"cannot write {path}: {error.strerror or error}; the old file is unchanged") from None
    except RuntimeError as error:
        if "unexpected pos" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise RunFailed(f"cannot write {path}: is the disk full? The old file is unchanged") from None


def write_text(path: Path | str, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    """What a JSON file of a run holds.

    Raises:
        InputError: missing, not a regular file, not JSON, or larger, deeper or with longer integers than the limits
            allow.
    """
    try:
        value = json.loads(limits.read_bytes(path, "record").decode("utf-8"), parse_int=_integer)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except RecursionError:
        raise InputError(f"{path} is not readable JSON: it has more than {limits.most('depth')} levels") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from None
    limits.require(path, "depth", _depth(value))
    return value


def _integer(digits: str) -> int:
    if len(digits) > limits.most("digits"):
        raise ValueError(f"an integer of {len(digits):,} digits")
    return int(digits)


def _depth(value: Any) -> int:
    """Levels of lists and mappings within each other."""
    levels, inner = 0, [value]
    while inner := [item for item in inner if isinstance(item, dict | list)]:
        levels += 1
        inner = [child for item in inner for child in (item.values() if isinstance(item, dict) else item)]
    return levels


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add one object to a JSON-lines file. Raises RunFailed where the disk refuses, or something else is there."""
    with disk_errors_named(path), open(path, "a", encoding="utf-8", opener=open_own) as file:
        file.write(json.dumps(line) + "\n")


def open_own(path: str, flags: int) -> int:
    """Open a regular file of ours to write to, or make it. Raises OSError for a link, a pipe or a device."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return descriptor


def flush(path: Path) -> None:
    """What was written to a file, to the disk."""
    with disk_errors_named(path), path.open("rb") as file:
        os.fsync(file.fileno())


def cut_lines(path: Path, key: str, last: int) -> None:
    """Leave only the lines of a metrics.jsonl that a resumed run still stands by; the file stays if one is damaged.

    Args:
        key: what counts the lines: step, or iteration.
        last: the last that stays.
    Raises:
        InputError: a line is damaged.
    """
    from moco_eval.runtime.console import warn

    lines, unfinished = _lines(path, key)
    if unfinished:
        warn(f"{path}: its last line was cut off in writing, and is left out: {len(unfinished)} bytes")
    write_text(path, "".join(f"{text}\n" for text, line in lines if line[key] <= last))


def read_lines(path: Path, key: str) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl, each with a number under `key`; none where there is no file.

    An unfinished last line, without its newline, is left out.

    Raises:
        InputError: a line is damaged, or the file is too large.
    """
    return [line for _, line in _lines(path, key)[0]]


def _lines(path: Path, key: str) -> tuple[list[tuple[str, dict[str, Any]]], bytes]:
    """Each line as it stands and as an object, and what there is of an unfinished last one."""
    *whole, last = split_lines(path) or [b""]
    lines = [_line(path, number, data, key) for number, data in enumerate(whole, 1)]
    try:
        return [*lines, _line(path, len(lines) + 1, last, key)], b""  # it lacks its newline alone
    except InputError:
        return lines, last


def split_lines(path: Path) -> list[bytes]:
    """The lines of a metrics.jsonl; last what stands after the last newline, mostly nothing. Empty without a file.

    Raises:
        InputError: not a regular file, too large, or not readable.
    """
    try:
        return limits.read_bytes(path, "metrics").split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def _line(path: Path, number: int, data: bytes, key: str) -> tuple[str, dict[str, Any]]:
    try:
        text = data.decode("utf-8")
        line = json.loads(text)
        if type(line[key]) in (int, float) and math.isfinite(line[key]):
            return text, line
        trouble = f"its {key} is no number"
    except OverflowError:
        trouble = f"its {key} is endless"
    except (ValueError, RecursionError):
        trouble = "it is not JSON"
    except (KeyError, TypeError, IndexError):
        trouble = f"it has no {key}"
    raise InputError(
        f"{path} line {number} is damaged: {trouble}. The file was not changed: mend or remove that line, or move the "
        "file away to go on without its earlier lines"
    )


def sha256_of(path: Path | str) -> str:
    """Hexadecimal digest of a file's bytes."""
    return digest_of(path, "sha256")


def digest_of(path: Path | str, algorithm: str) -> str:
    """The same by any of hashlib's algorithms."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with limits.open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def second_name(written: Path, path: Path) -> None:
    """A second name for a file, or a copy where the file system has no such thing."""
    path.unlink()
    try:
        os.link(written, path)
    except OSError:
        shutil.copyfile(written, path)


def folders_with(root: Path, name: str) -> list[Path]:
    """Every folder at or below `root` that holds a file of that name, sorted.

    Links to folders are followed, and each folder is there once: under its own path where that is below `root`.
    """
    places, seen, tops = list[Path](), set[tuple[int, int]](), [root]
    for top in tops:
        for folder, below, names in os.walk(top):
            here, about = Path(folder), Path(folder).stat()
            if (about.st_dev, about.st_ino) in seen:
                below.clear()  # also where a link leads back to what it lies in
                continue
            seen.add((about.st_dev, about.st_ino))
            tops += [here / link for link in sorted(below) if (here / link).is_symlink()]
            places += [here] if name in names else []
    return sorted(places)


def cache_folder(part: str) -> Path:
    """A folder of what can be had again: `part` in MOCO_EVAL_CACHE, or in moco-eval's folder of the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 (never fails)
    return Path(os.environ.get("MOCO_EVAL_CACHE") or f"{cache}/moco-eval") / part


def lock_file(path: Path) -> IO[Any]:
    """An open file to lock, made where it is missing; no link is followed, no pipe waited for. Raises OSError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "w")


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Of several processes that would write `path`, one is inside, the others wait; not where locks do not work."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_file(path.with_suffix(".lock"))
    except OSError:
        yield
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
