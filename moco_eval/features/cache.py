"""Features, extracted once: a content-addressed folder of memory-mapped shards.

What a feature depends on (weights, network, feature, pixels, data, arithmetic) is its address, so that a cache is
neither stale nor mixed. A shard's name carries the sha256 of its bytes: it is there whole or not at all, and a changed
byte is found before it is used. The manifest names the shards that were written. What keeps others from writing a
manifest of their own is whose the folder is, and that is looked at.
"""

import contextlib
import hashlib
import json
import os
import pwd
import re
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache as once
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moco_eval.data.image_set import ImageSet
from moco_eval.encoders.encoder import Encoder
from moco_eval.errors import InputError, Interrupted, RunFailed
from moco_eval.features.extract import Crops, extract, pixels, require_finite_features
from moco_eval.features.stages import Several, network, placed
from moco_eval.preprocessing import Preprocessing
from moco_eval.runtime import files
from moco_eval.runtime.collectives import barrier, found_by_main, from_main
from moco_eval.runtime.console import progress, warn
from moco_eval.runtime.device import autocast, to_host
from moco_eval.runtime.rank import rank, world_size
from moco_eval.runtime.stop import Stop

VERSION = 1
MANIFEST = "manifest.json"  # the sha256 of each shard, under the key that the folder is of
SHARD_NAME = re.compile(r"\d{6,9}-[0-9a-f]{64}\.npy")
LATE = 60.0  # seconds after which NFS shows every node what another has written, by its default
LOOK = 0.5  # seconds between two looks for that
SHARD = 1024  # images; what an interruption loses at most, on each process


@dataclass(frozen=True)
class Source:
    """Everything that the features of a set of images depend on.

    Attributes:
        crops: training crops of one epoch; None for the clean crop.
        precision: of the arithmetic; bf16 features are kept in 16 bits.
        batch_size: images per step over all processes, workers: loader processes; neither is part of the address.
    """

    encoder: Encoder
    images: ImageSet
    preprocessing: Preprocessing
    feature: str = "pooled"
    crops: Crops | None = None
    precision: str = "fp32"
    batch_size: int = 256
    workers: int = 0

    def key(self) -> dict[str, Any]:
        """What the features depend on, in plain values."""
        crops = self.crops
        return {
            "version": VERSION,
            "encoder": self.encoder.identity(),
            "feature": self.feature,
            "preprocessing": self.preprocessing.to_dict(),
            "crops": crops and {**crops.augmentation.model_dump(mode="json"), "seed": crops.seed, "epoch": crops.epoch},
            "data": {
                "fingerprint": self.images.fingerprint,
                "split": self.images.split,
                "images": len(self.images),
                "sample": self.images.sample,
            },
            "rows": None if self.images.rows is None else _sha256(np.ascontiguousarray(self.images.rows).tobytes()),
            "precision": self.precision,
        }

    def folder(self, cache: Path) -> Path:
        """Where they are kept."""
        return cache / _sha256(json.dumps(self.key(), sort_keys=True).encode())[:24]

    def title(self) -> str:
        """For a progress bar."""
        crop = "clean crop" if self.crops is None else f"crops of epoch {self.crops.epoch}"
        return f"{self.images.split} features, {crop}"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Features:
    """(N, D) features in parts that follow each other, memory-mapped or in memory; 16-bit parts hold bf16.

    `passed`: how many of these images went through the network for it; the others were in the cache.
    """

    parts: list[np.ndarray]
    passed: int = 0
    ends: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.parts[0].shape[1]

    def __getitem__(self, rows: slice | np.ndarray) -> torch.Tensor:
        """Some rows in the order asked for, float32, on the CPU: a slice without step, or row numbers."""
        return self.stored(rows).float()

    def tensor(self) -> torch.Tensor:
        """All of them, float32, on the CPU."""
        return self[:]

    def stored(self, rows: slice | np.ndarray = slice(None)) -> torch.Tensor:
        """The same as it is kept: float32 or bfloat16."""
        taken = self._between(rows) if isinstance(rows, slice) else self._at(np.asarray(rows))
        return _decoded(taken)

    def _between(self, rows: slice) -> np.ndarray:
        start, stop, step = rows.indices(len(self))
        assert step == 1
        starts = self.ends - [len(part) for part in self.parts]
        pieces = [
            part[max(0, start - first) : stop - first]
            for part, first, end in zip(self.parts, starts, self.ends)
            if first < stop and end > start
        ]
        return np.concatenate(pieces) if len(pieces) != 1 else np.array(pieces[0])

    def _at(self, rows: np.ndarray) -> np.ndarray:
        assert not len(rows) or rows.min() >= 0
        taken = np.empty((len(rows), self.shape[1]), self.parts[0].dtype)
        owner = np.searchsorted(self.ends, rows, side="right")
        for number in np.unique(owner):
            mine = owner == number
            taken[mine] = self.parts[number][rows[mine] - (self.ends[number] - len(self.parts[number]))]
        return taken


def _decoded(array: np.ndarray) -> torch.Tensor:
    if array.itemsize == 4:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def _encoded(features: torch.Tensor, precision: str) -> np.ndarray:
    return features.bfloat16().view(torch.int16).numpy() if precision == "bf16" else features.numpy()


def features_of(source: Source, cache: Path | None, device: torch.device) -> Features:
    """Features of a set of images: from the cache, where what is missing is extracted, or in memory without one.

    Every process calls it; each writes its share of the shards, and all see all of them afterwards.

    Raises:
        InputError: an image cannot be read, the encoder lacks the feature, the cache cannot be written.
        RunFailed: a feature is not finite.
        Interrupted: stopped by a signal; the shards written so far are kept.
    """
    return several_features_of([source], cache, device)[0]


def several_features_of(sources: Sequence[Source], cache: Path | None, device: torch.device) -> list[Features]:
    """The same for several features of the same images: one pass of the network gives all that are missing."""
    first = sources[0]
    assert all(s.encoder is first.encoder and s.images is first.images and s.crops == first.crops for s in sources)
    if cache is None:
        return [_in_memory(source, device) for source in sources]
    wholes = [_whole(source, cache) for source in sources]
    entries = [_Entry(source, source.folder(cache)) for source, whole in zip(sources, wholes) if whole is None]
    passed = _fill(entries, _plan(entries), device) if entries else 0
    opened = iter([replace(entry.open(), passed=passed) for entry in entries])
    return [next(opened) if whole is None else whole for whole in wholes]


def missing(source: Source, cache: Path) -> int:
    """How many images are not in the cache yet, by the names of its shards: nothing is read, nothing is written."""
    whole = _whole_source(source)
    if whole is not None and not _Entry(whole, whole.folder(cache)).missing():
        return 0
    entry = _Entry(source, source.folder(cache))
    return sum(entry.bounds[number + 1] - entry.bounds[number] for number in entry.missing())


def rows_of(source: Source, cache: Path | None, rows: np.ndarray, device: torch.device) -> torch.Tensor:
    """Features of a few of those images, float32, on the CPU, without the other processes: out of the cache where all
    are there, else they pass through the network and are not kept.

    Raises:
        InputError: an image cannot be read.
        RunFailed: a feature is not finite.
    """
    if cache is not None:
        entry = _Entry(source, source.folder(cache))
        if entry.is_there() and not entry.missing():
            return open_folder(entry.folder)[rows]
    return _passed(source, rows, device)


@torch.no_grad()
def _passed(source: Source, rows: np.ndarray, device: torch.device) -> torch.Tensor:
    net = placed(network(source.encoder, source.feature), source.encoder, device)
    epoch = source.crops.epoch if source.crops else 0
    parts = np.array_split(rows, range(source.batch_size, len(rows), source.batch_size))
    batches = [[(epoch, int(row)) for row in part] for part in parts]
    features = []
    for images in pixels(source.images, source.preprocessing, source.crops, batches, device, source.workers):
        with autocast(device, source.precision):
            features.append(net(images).flatten(1).float().cpu())
    return require_finite_features(torch.cat(features), source.title())


def line(source: Source, features: Features, cache: Path) -> str:
    """Features in a line: split, crop, shape, dtype, folder, two spaces between them."""
    crop = "clean" if source.crops is None else f"crops-{source.crops.epoch}"
    dtype = "bfloat16" if source.precision == "bf16" else "float32"
    shape = " x ".join(map(str, features.shape))
    return "  ".join((source.images.split, crop, shape, dtype, str(source.folder(cache))))


def open_folder(folder: Path) -> Features:
    """The features in one folder of a cache, wherever it has been moved to; every shard is verified.

    Raises:
        InputError: it is no such folder, a shard is missing, or its bytes are not those that were written.
    """
    key = files.read_json(folder / "key.json")
    if not isinstance(key, dict) or key.get("version") != VERSION:
        raise InputError(f"{folder / 'key.json'} is not of a folder of features (version {VERSION})")
    _say_whose(folder)
    known = _named(folder, key) if (folder / MANIFEST).exists() else None
    shards, images = _shards(folder, known), (key.get("data") or {}).get("images")
    for path in shards.values():
        if not _is_sound(path):
            raise InputError(f"{path} is damaged: its bytes are not those that were written; extract it again")
    parts = [_mapped(path, key.get("precision")) for _, path in sorted(shards.items())]
    if (held := sum(map(len, parts))) != images or not parts:
        raise InputError(f"{folder} holds features of {held} of {images} images; run the extraction to its end")
    _require_one_width(folder, parts)
    return Features(parts)


def _in_memory(source: Source, device: torch.device) -> Features:
    net = placed(network(source.encoder, source.feature), source.encoder, device)
    settings: dict[str, Any] = {"batch_size": source.batch_size, "workers": source.workers}
    settings |= {"precision": source.precision, "title": source.title(), "crops": source.crops}
    features = extract(net, source.images, source.preprocessing, device, **settings)
    return Features([_encoded(features, source.precision)], passed=len(features))


def _whole(source: Source, cache: Path) -> Features | None:
    """The clean features of a subset out of those of the whole set, where these are there."""
    rows, whole = source.images.rows, _whole_source(source)
    if rows is None or whole is None:
        return None
    entry = _Entry(whole, whole.folder(cache))
    if not from_main([entry.is_there()])[0] or _plan([entry]):
        return None
    kept = entry.open()
    return Features([np.concatenate([_encoded(kept.stored(part), source.precision) for part in _split(rows)])])


def _whole_source(source: Source) -> Source | None:
    """The clean features of the whole set, of a subset."""
    if source.images.rows is None or source.crops is not None or source.images.whole is None:
        return None
    return replace(source, images=source.images.whole)


def _split(rows: np.ndarray) -> list[np.ndarray]:
    return np.array_split(rows, max(1, len(rows) // SHARD))


def _plan(entries: list["_Entry"]) -> list[int]:
    """Numbers of the shards to extract, the same on every process: the first one looks, and removes damaged ones.

    Raises:
        InputError: a folder cannot be written, or is not what its name says.
    """

    def look() -> list[int]:
        for entry in entries:
            entry.prepare()
        return sorted(set().union(*(entry.missing() for entry in entries)))

    return found_by_main(look)


class _Entry:
    """The folder of one source: key.json, and a shard file for each SHARD images."""

    def __init__(self, source: Source, folder: Path):
        self.source, self.folder = source, folder
        self.bounds = [*range(0, len(source.images), SHARD), len(source.images)]
        self.key: dict[str, Any] = json.loads(json.dumps(source.key()))
        self.written: dict[int, str] = {}  # by this process: sha256 by the number of the shard

    def is_there(self) -> bool:
        return (self.folder / "key.json").is_file()

    def prepare(self) -> None:
        """The folder with its key and its manifest, and no shard that is damaged."""
        path, key = self.folder / "key.json", self.key
        if not self.is_there():
            self._make()
            files.write_json(path, key)
        try:
            kept = files.read_json(path)
        except InputError as error:
            raise InputError(f"{error}; remove that folder of features") from None
        if kept != key:
            raise InputError(f"{path} does not agree with this folder's name; remove the folder")
        _say_whose(self.folder)
        self._require_manifest()
        named, shards = self.shards(), _shards(self.folder)
        for number in sorted(shards.keys() - named.keys()):
            warn(f"{shards[number]} is not named in {MANIFEST} and is not read; shard {number} is extracted again")
        for number, shard in _damaged(named):
            warn(f"{shard} is damaged: its bytes are not those that were written; shard {number} is extracted again")
            _remove(shard)

    def _require_manifest(self) -> None:
        """There is a manifest: in a folder of an earlier version, which has none, one of the shards that are there."""
        path = self.folder / MANIFEST
        with files.one_at_a_time(path):
            if path.exists():
                return
            shards = {str(number): [_sha_of(shard)] for number, shard in _shards(self.folder).items()}
            if shards:
                warn(f"{self.folder} is of an earlier version, without {MANIFEST}: its {len(shards)} shards are reused")
            with contextlib.suppress(InputError):  # a cache that was put away where nobody writes
                files.write_json(path, {"key": _of(self.key), "shards": shards})

    def _make(self) -> None:
        try:
            _make_private(self.folder)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise InputError(
                f"cannot write features to {self.folder.parent}: {error.strerror}; give another folder by --cache"
            ) from None

    def shards(self) -> dict[int, Path]:
        """The shard files that are there, by number: those that the manifest names, where there is one."""
        if not (self.folder / MANIFEST).exists():
            return _shards(self.folder)
        return _shards(self.folder, _named(self.folder, self.key))

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there."""
        there = self.shards()
        return [number for number in range(len(self.bounds) - 1) if number not in there]

    def write(self, number: int, features: torch.Tensor) -> None:
        """Keep one shard, under a name that carries its sha256; another command may be writing the same one."""
        require_finite_features(features, self.source.title())
        unnamed = self.folder / f".{number:06}.{uuid.uuid4().hex}.npy"
        with files.atomic(unnamed) as temporary:
            np.save(temporary, _encoded(features, self.source.precision))
        digest = files.sha256_of(unnamed)
        self.written[number] = digest
        self._name_own()  # before it is there: what is there is named
        unnamed.rename(self.folder / f"{number:06}-{digest}.npy")

    def _name_own(self) -> None:
        """The manifest with all that this process has written: where locks do not work, others may have undone that."""
        with files.one_at_a_time(self.folder / MANIFEST):
            known = _named(self.folder, self.key)
            if all(digest in known.get(number, ()) for number, digest in self.written.items()):
                return
            for number, digest in self.written.items():
                known[number] = [*known.get(number, ()), digest]
            shards = {str(shard): sorted(set(digests)) for shard, digests in sorted(known.items())}
            files.write_json(self.folder / MANIFEST, {"key": _of(self.key), "shards": shards})

    def open(self) -> Features:
        """All shards, memory-mapped."""
        there = self._all_shards()
        parts = [_mapped(there[number], self.source.precision) for number in range(len(self.bounds) - 1)]
        if [len(part) for part in parts] != [end - start for start, end in pairwise(self.bounds)]:
            raise RunFailed(f"{self.folder} holds shards of other lengths; remove it and run again")
        _require_one_width(self.folder, parts)
        return Features(parts)

    def _all_shards(self) -> dict[int, Path]:
        """The shard files by number; those that other processes have written may come to be seen late."""
        deadline = time.monotonic() + (LATE if world_size() > 1 else 0.0)
        while len(there := self.shards()) < len(self.bounds) - 1:
            if time.monotonic() >= deadline:
                waited = f", for {LATE:.0f} s" if world_size() > 1 else ""
                raise RunFailed(
                    f"{self.folder} has lost shards while it was in use{waited} ({self._names_of_missing()}); run again"
                )
            time.sleep(LOOK)
            self._name_own()
        return there

    def _names_of_missing(self) -> str:
        missing = self.missing()
        return f"{len(missing)} of {len(self.bounds) - 1}, first number {missing[0]}" if missing else "there again"


# What is in a folder, and whose it is


def _of(key: dict[str, Any]) -> str:
    """What stands for a key in the manifest."""
    return _sha256(json.dumps(key, sort_keys=True).encode())


def _named(folder: Path, key: dict[str, Any]) -> dict[int, list[str]]:
    """The sha256 of each shard that was written under this key, by its number; several where several commands wrote it.

    Raises:
        InputError: the manifest is damaged, or of other features.
    """
    path = folder / MANIFEST
    manifest = files.read_json(path)
    try:
        shards = {int(number): list(map(_digest, digests)) for number, digests in manifest["shards"].items()}
        if manifest["key"] == _of(key):
            return shards
    except (KeyError, TypeError, AttributeError, ValueError):
        pass
    raise InputError(f"{path} is damaged, or of other features than key.json beside it; remove that folder of features")


def _digest(text: Any) -> str:
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise ValueError(text)
    return text


def _shards(folder: Path, known: dict[int, list[str]] | None = None) -> dict[int, Path]:
    """The shard files by number; with `known`, only those of that sha256.

    Raises:
        InputError: a file among them that is no shard of ours.
    """
    shards = {}
    for path in sorted(folder.glob("[!.]*.npy")):
        if not SHARD_NAME.fullmatch(path.name) or not path.is_file():
            raise InputError(f"{path} is not a shard of features, and is not read; move it away")
        if known is None or _is_named(path, known):
            shards[_number_of(path)] = path
    return shards


def _number_of(path: Path) -> int:
    return int(path.name.partition("-")[0])


def _sha_of(path: Path) -> str:
    return path.stem.partition("-")[2]


def _is_named(path: Path, known: dict[int, list[str]]) -> bool:
    return _sha_of(path) in known.get(_number_of(path), ())


def _mapped(path: Path, precision: Any) -> np.ndarray:
    """A shard as it is kept, (N, D). Raises InputError where it is no such array."""
    try:
        part = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(part, np.ndarray):
            raise ValueError("an archive")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} is not an array of features: {error}; remove it, and it is extracted again") from None
    wanted = np.dtype(np.int16 if precision == "bf16" else np.float32)
    if part.ndim != 2 or part.dtype != wanted or not part.shape[1]:
        raise InputError(
            f"{path} is not an array of features: of type {part.dtype} and shape {part.shape}, not {wanted} and "
            "(images, dimensions); remove it, and it is extracted again"
        )
    return part


def _require_one_width(folder: Path, parts: Sequence[np.ndarray]) -> None:
    widths = sorted({part.shape[1] for part in parts})
    if len(widths) > 1:
        raise InputError(f"{folder} holds features of {widths[0]} and of {widths[1]} dimensions; remove that folder")


def _damaged(shards: dict[int, Path]) -> list[tuple[int, Path]]:
    """The shards whose bytes are not those of their name."""
    with ThreadPoolExecutor(8) as threads:
        sound = threads.map(lambda item: _is_sound(item[1]), shards.items())
        return [item for item, fine in zip(shards.items(), sound) if not fine]


def _remove(shard: Path) -> None:
    try:
        shard.unlink()
    except OSError as error:
        raise InputError(f"cannot remove {shard}: {error.strerror}; give another folder by --cache") from None


def _make_private(folder: Path) -> None:
    """Make a folder of features: open to others only as far as the cache is in which its owner made it."""
    cache = folder.parent
    cache.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        cache.mkdir(mode=0o700)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=stat.S_IMODE(cache.stat().st_mode))


@once
def _say_whose(folder: Path) -> None:
    """Say, once, whether somebody else may have written the features in a folder."""
    manifest, is_closed = folder / MANIFEST, not folder.stat().st_mode & 0o077
    for path in (folder, folder / "key.json", *([manifest] if manifest.exists() else []), *_shards(folder).values()):
        about = path.stat()
        if about.st_uid not in (0, os.geteuid()):
            whose = f"belongs to {_user(about.st_uid)}"
        elif about.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not is_closed:
            whose = "may be written by others"
        else:
            continue
        warn(f"{path} {whose}, who may put any features there; give a --cache of your own if in doubt")
        return


def _user(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"


def _is_sound(path: Path) -> bool:
    status = path.stat()
    return _has_its_bytes(path, status.st_size, status.st_mtime_ns)


@once
def _has_its_bytes(path: Path, _size: int, _changed: int) -> bool:
    """Read once by each process, as long as the file stays as it is."""
    return _sha_of(path) == files.sha256_of(path)


@torch.no_grad()
def _fill(entries: list[_Entry], wanted: list[int], device: torch.device) -> int:
    """Extract those shards; each process takes its share. Returns how many images they have."""
    source, bounds = entries[0].source, entries[0].bounds
    if not wanted:
        return 0
    mine = wanted[rank() :: world_size()]
    several = Several(source.encoder, [entry.source.feature for entry in entries])
    net = placed(several, source.encoder, device)
    per_process = max(1, source.batch_size // world_size())
    batches = list(_batches(bounds, mine, per_process, source.crops))
    with Stop() as stop, progress(source.title(), len(batches) if mine else 0, per_process) as advance:
        shards = iter(mine)
        rows: list[list[Callable[[], torch.Tensor]]] = []  # on their way from a GPU while it makes the next
        views = pixels(source.images, source.preprocessing, source.crops, batches, device, source.workers)
        for batch, images in zip(batches, views) if batches else ():
            with autocast(device, source.precision):
                rows.append([to_host(feature.flatten(1).float()) for feature in net(images)])
            advance()
            if batch[-1][1] + 1 in bounds:
                _keep(entries, next(shards), rows)
                rows = []
            if stop.signal is not None:
                raise Interrupted(_saved(source, entries[0]))
    barrier()
    return sum(bounds[number + 1] - bounds[number] for number in wanted)


def _saved(source: Source, entry: _Entry) -> str:
    kept = f"{len(entry.shards())} of {len(entry.bounds) - 1} shards of {source.title()} are kept"
    return f"{kept}: run the same command to go on"


def _keep(entries: list[_Entry], number: int, rows: list[list[Callable[[], torch.Tensor]]]) -> None:
    for entry, feature in zip(entries, zip(*rows)):
        if number not in entry.shards():
            entry.write(number, torch.cat([arrived() for arrived in feature]))


def _batches(
    bounds: list[int], shards: Sequence[int], batch: int, crops: Crops | None
) -> Iterator[list[tuple[int, int]]]:
    """(epoch, index) of the images of those shards in batches that end with their shard."""
    epoch = 0 if crops is None else crops.epoch
    for shard in shards:
        for first in range(bounds[shard], bounds[shard + 1], batch):
            yield [(epoch, index) for index in range(first, min(first + batch, bounds[shard + 1]))]
