"""The checkpoints of a folder in which some trainer writes: which are new, whole, and where they stand in the training.

A trainer may be writing a file right now, may overwrite it in place, and may delete it soon. So a file counts only
after it has stayed as it is from one look to the next, and it is judged from a copy whose bytes were hashed.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moco_eval.errors import InputError
from moco_eval.runtime import files

ENDINGS = (".pth", ".pt", ".ckpt", ".safetensors", ".bin", ".pth.tar", ".pt.tar")
DEEPEST = 3  # folders below the watched one
BESIDE = 2**20  # bytes of a settings file that is copied along
POSITIONS = {
    "step": r"(?:global_?step|steps?|iterations?|iter|it)[=_\-]?(\d+)",
    "epoch": r"(?:epochs?|ep)[=_\-]?(\d+)",
    "number": r"(\d+)(?!.*\d)",
}

# entries in which trainers keep the same
STORED = {"step": ("global_step", "step", "iteration", "iter"), "epoch": ("epoch", "epochs")}


@dataclass(frozen=True)
class State:
    """What a look at a file tells: its size in bytes, and when it was written, in nanoseconds."""

    size: int
    written: int


@dataclass(frozen=True)
class Snapshot:
    """A copy of a checkpoint that nobody else writes to.

    Attributes:
        name: of the file, from the watched folder.
        sha256: of its bytes.
        path: the copy, in a folder of its own with the settings files that lay beside the checkpoint.
    """

    name: str
    sha256: str
    path: Path


def look(folder: Path, leave_out: Path) -> dict[Path, State]:
    """Every file that may be a checkpoint, the oldest first; files that vanish meanwhile are not there.

    Args:
        leave_out: a folder that is not looked into: our own.
    """
    states: dict[Path, State] = {}
    for path in _files(folder, leave_out.resolve(), 0):
        state = state_of(path)
        if state and state.size:
            states[path] = state
    return dict(sorted(states.items(), key=lambda item: (item[1].written, item[0])))


def state_of(path: Path) -> State | None:
    """None where there is no file any more."""
    try:
        about = path.stat()
    except OSError:
        return None
    return State(about.st_size, about.st_mtime_ns)


def _files(folder: Path, leave_out: Path, depth: int) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        path = Path(entry.path)
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            if depth < DEEPEST and path.resolve() != leave_out:
                yield from _files(path, leave_out, depth + 1)
        elif entry.name.endswith(ENDINGS) and entry.is_file():
            yield path


def snapshot(path: Path, folder: Path, into: Path) -> Snapshot | None:
    """Copy a checkpoint and what lies beside it; None where it vanished or was written to meanwhile.

    Args:
        folder: the watched one.
        into: where the copy's own folder is made.
    """
    before, place = state_of(path), into / "new"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        sha256 = _copied(path, place / path.name)
        for settings in [*path.parent.glob("*.json"), *path.parent.glob("*.yaml")]:
            if settings.is_file() and settings.stat().st_size <= BESIDE:
                shutil.copyfile(settings, place / settings.name)
    except OSError:
        before = None
    if before is None or state_of(path) != before:
        shutil.rmtree(place, ignore_errors=True)
        return None
    own = into / sha256[:8]
    shutil.rmtree(own, ignore_errors=True)
    place.rename(own)
    return Snapshot(path.relative_to(folder).as_posix(), sha256, own / path.name)


def _copied(path: Path, copy: Path) -> str:
    """The SHA-256 of the bytes that were copied."""
    digest = hashlib.sha256()
    with path.open("rb") as source, copy.open("wb") as target:
        while block := source.read(2**24):
            digest.update(block)
            target.write(block)
    return digest.hexdigest()


def position(name: str) -> tuple[str, int] | None:
    """Where a checkpoint stands in its training, as its name says: a step before an epoch before any number.

    'epoch=3-step=1200.ckpt' is ('step', 1200), 'checkpoint-500/model.safetensors' ('number', 500).
    """
    stem = re.sub(r"\.(pth|pt|ckpt|safetensors|bin|tar)\b", "", name.lower())
    for unit, pattern in POSITIONS.items():
        if found := re.findall(pattern, stem):
            return unit, int(found[-1][:15])
    return None


def stored_position(path: Path) -> dict[str, int]:
    """The step and the epoch that a checkpoint says it is of, beside its weights; what it does not say is not there."""
    from moco_eval.untrusted import read

    try:
        values = read.read(path)
    except InputError:
        return {}
    meta = values.get("meta")
    places = [values, meta if isinstance(meta, dict) else {}]
    found = {
        unit: next((place[key] for place in places for key in keys if _is_count(place.get(key))), None)
        for unit, keys in STORED.items()
    }
    return {unit: value for unit, value in found.items() if value is not None}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 10**15


def folder_name(snapshot: Snapshot) -> str:
    """The folder of a checkpoint's results: its name and the first of its hash."""
    stem = re.sub(r"[^A-Za-z0-9=._-]+", "-", snapshot.name).strip(".-")[-80:]
    return f"{stem}-{snapshot.sha256[:8]}"


@dataclass(frozen=True)
class Found:
    """A checkpoint by the name under which it was found first, its state then, and its step and epoch as it says."""

    name: str
    state: State
    stored: dict[str, int]


class Memory:
    """What is known of earlier looks, kept in a file: a restart copies and judges nothing twice.

    Attributes:
        known: by name, the state of a file and the hash of what it held then.
        found: by hash, every checkpoint that was judged, refused, or became a job: also those overwritten since.
        refused: by hash, why a checkpoint was not judged.
        waiting: hashes of those whose judgement is a SLURM job that has not ended.
    """

    def __init__(self, path: Path, arguments: str):
        """
        Args:
            arguments: of the judgement.
        Raises:
            InputError: the file is of a watch with others.
        """
        self.path, self.arguments = path, arguments
        stored: dict[str, Any] = files.read_json(path) if path.is_file() else {"arguments": arguments, "known": {}}
        if (before := stored.get("arguments")) != arguments:
            raise InputError(
                f"{path.parent} holds a watch with {before}, and now it is {arguments}; choose another --output"
            )
        self.known: dict[str, tuple[State, str]] = {}
        self.found: dict[str, Found] = {}
        try:
            for name, (size, written, sha256) in stored["known"].items():
                self.known[name] = State(size, written), _hash(sha256)
                self.found.setdefault(sha256, Found(name, State(size, written), {}))
            for sha256, (name, size, written, places) in stored.get("found", {}).items():
                self.found[_hash(sha256)] = Found(str(name), State(size, written), dict(places))
            self.refused: dict[str, str] = dict(stored.get("refused", {}))
            self.waiting = {*stored.get("waiting", ())} & self.found.keys()
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError(f"{path} is damaged; remove it: the watch then looks at every file again") from None

    def has(self, name: str, state: State) -> bool:
        """Whether a file was looked into as it is now."""
        return name in self.known and self.known[name][0] == state

    def remember(self, name: str, state: State, sha256: str) -> None:
        self.known[name] = state, sha256
        self.write()

    def find(self, sha256: str, found: Found) -> None:
        """Remember a checkpoint that is judged, refused, or submitted."""
        self.found[sha256] = found
        self.remember(found.name, found.state, sha256)

    def refuse(self, sha256: str, reason: str) -> None:
        self.refused[sha256] = reason
        self.write()

    def forget(self, sha256: str) -> None:
        """As if it had never been seen: it is looked at again."""
        self.found.pop(sha256, None)
        self.waiting.discard(sha256)
        self.known = {name: (state, own) for name, (state, own) in self.known.items() if own != sha256}
        self.write()

    def write(self) -> None:
        known = {name: [state.size, state.written, sha256] for name, (state, sha256) in self.known.items()}
        found = {key: [one.name, one.state.size, one.state.written, one.stored] for key, one in self.found.items()}
        about = {"refused": self.refused, "waiting": sorted(self.waiting)}
        files.write_json(self.path, {"arguments": self.arguments, "known": known, "found": found, **about})


def _hash(text: str) -> str:
    """A SHA-256, by which folders are called. Raises ValueError for anything else."""
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise ValueError(text)
    return text
