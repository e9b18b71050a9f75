"""Image files in folders: listed once, kept in an index on disk, held without an object per file."""

import functools
import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moco_eval.errors import InputError, RunFailed
from moco_eval.runtime import files
from moco_eval.runtime.console import warn

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
KEPT_FROM = 10_000  # files; fewer are listed in less time than an index is worth
SAMPLE = 200  # files whose sizes are looked at again before an index is believed
SETTLED = 2.0  # seconds: a folder that changed later than this before it was listed may change unseen
VERSION = 1


@dataclass(frozen=True)
class ImageFiles:
    """Files below a folder: a sequence of paths, which reads them.

    Three arrays and no object per file: forked loader processes share them, as no reference count is written.

    Attributes:
        root: the folder.
        names: their paths relative to it, one after the other, as the file system spells them; uint8.
        ends: where each name ends, (N,) int64.
        sizes: bytes of each file when it was listed, (N,) int64.
    """

    root: str
    names: np.ndarray
    ends: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self._name(index)))  # noqa: PTH118 (a million files: strings)

    def _name(self, index: int) -> bytes:
        start = self.ends[index - 1] if index else 0
        return self.names[start : self.ends[index]].tobytes()

    def relative(self) -> Iterator[bytes]:
        """All paths relative to the root, as the file system spells them."""
        names, start = self.names.tobytes(), 0
        for end in self.ends.tolist():
            yield names[start:end]
            start = end

    def read(self, index: int) -> bytes:
        """A file's bytes.

        Raises:
            InputError: it cannot be read, or has another size than when it was listed.
        """
        path, size = self[index], int(self.sizes[index])
        try:
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123
                data = file.read()
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); mend or remove it") from None
        if len(data) != size:
            raise InputError(
                f"{path} has {len(data)} bytes, but {size} when it was listed; touch its folder to have it listed anew"
            )
        return data

    def take(self, indices: np.ndarray) -> "ImageFiles":
        """Those files alone, in that order."""
        return packed(self.root, [self._name(index) for index in indices], self.sizes[indices])


def packed(root: str, names: list[bytes], sizes: list[int] | np.ndarray) -> ImageFiles:
    """ImageFiles of relative paths and sizes."""
    ends = np.cumsum(np.fromiter(map(len, names), np.int64, len(names)), dtype=np.int64)
    return ImageFiles(root, np.frombuffer(b"".join(names), np.uint8), ends, np.asarray(sizes, np.int64))


@dataclass(frozen=True)
class Listing:
    """What a folder holds.

    Attributes:
        files: the images, by class and path.
        classes: names of the class folders, sorted; empty without classes.
        labels: class of each image, (N,) int64; empty without classes.
        fingerprint: sha256 over sorted relative paths and sizes.
        folders: every folder that was looked into, relative, and its time of change in nanoseconds.
    """

    files: ImageFiles
    classes: tuple[str, ...]
    labels: np.ndarray
    fingerprint: str
    folders: dict[bytes, int]


def list_images(folder: Path, split: str | None) -> Listing:
    """The images below a folder, from the index of an earlier call where that still holds.

    Large sets have an index in `cache_folder()`. It holds while every folder has the time of change that it had
    (adding, removing and renaming a file change it) and a sample of files their sizes. A file that is rewritten
    in place is not seen here; `ImageFiles.read` refuses it where its size differs. Of several processes one lists,
    the others wait for its index.

    Args:
        folder: what paths are relative to.
        split: the folder of class folders in it, such as 'train'; None: all images, without classes.
    Raises:
        InputError: no images, a class without images, a file or folder that cannot be looked at.
    """
    key = f"{os.path.realpath(folder)}\0{split or ''}"
    path = cache_folder() / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:16]}.npz"
    listing = _from_index(path, folder)
    if listing is None:
        with files.one_at_a_time(path):
            listing = _from_index(path, folder) or _listed(path, folder, split)
    return listing


def _listed(path: Path, folder: Path, split: str | None) -> Listing:
    began = time.time()
    listing = _list_flat(folder) if split is None else _list_classes(folder, split)
    settled = abs(began - max(listing.folders.values()) / 1e9) > SETTLED
    if len(listing.files) >= KEPT_FROM and settled:
        try:
            _keep(path, listing)
        except (InputError, RunFailed) as error:
            say_not_kept(str(error))
    return listing


@functools.cache
def say_not_kept(reason: str) -> None:
    """Once, that the next start takes as long as this one."""
    warn(f"no index of the images is kept ({reason.partition(';')[0]}); MOCO_EVAL_CACHE may name another folder")


# Looking


def _list_flat(folder: Path) -> Listing:
    images, folders = scan(folder, b"", EXTENSIONS)
    if not images:
        raise InputError(f"{folder} holds no images ({', '.join(EXTENSIONS)})")
    return Listing(_packed(folder, images), (), np.empty(0, np.int64), fingerprint(images), folders)


def _list_classes(folder: Path, split: str) -> Listing:
    root = folder / split
    folders = {os.fsencode(split): root.stat().st_mtime_ns}
    with os.scandir(root) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir())
    if not classes:
        raise InputError(f"{root} holds no class folders; for images without classes take --dataset flat")
    images: list[tuple[bytes, int]] = []
    counts: list[int] = []
    for name in classes:
        more, below = scan(folder, os.fsencode(f"{split}/{name}"), EXTENSIONS)
        if not more:
            raise InputError(f"class folder {root / name} holds no images; fill or remove it")
        images += more
        counts.append(len(more))
        folders |= below
    labels = np.repeat(np.arange(len(classes)), counts)
    return Listing(_packed(folder, images), tuple(classes), labels, fingerprint(images), folders)


def scan(folder: Path, start: bytes, endings: tuple[str, ...]) -> tuple[list[tuple[bytes, int]], dict[bytes, int]]:
    """Files below `folder/start` whose names end so, in small letters or capitals; links are followed.

    Returns:
        (path relative to `folder`, bytes) of each, sorted; each folder's relative path and time of change in ns.
    Raises:
        InputError: a folder or a file cannot be looked at.
    """
    wanted = tuple(ending.encode() for ending in endings)
    listed: list[tuple[bytes, int]] = []
    folders: dict[bytes, int] = {}
    waiting: list[tuple[bytes, tuple]] = [(start, ())]
    root = os.fsencode(folder)
    while waiting:
        relative, above = waiting.pop()
        path = os.path.join(root, relative)  # noqa: PTH118
        try:
            status = os.stat(path)  # noqa: PTH116 (before it is listed: what changes later, changes its time)
            this = (status.st_dev, status.st_ino)
            if this in above:  # a link to a folder that it lies in
                continue
            folders[relative] = status.st_mtime_ns
            prefix = relative + b"/" if relative else b""
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.is_dir():
                        waiting.append((prefix + entry.name, (*above, this)))
                    elif entry.name.lower().endswith(wanted):
                        listed.append((prefix + entry.name, entry.stat().st_size))
        except OSError as error:
            raise InputError(f"cannot read {os.fsdecode(error.filename or path)}: {error.strerror}") from None
    return sorted(listed), folders


def _packed(folder: Path, images: list[tuple[bytes, int]]) -> ImageFiles:
    return packed(str(folder), [name for name, _ in images], np.fromiter((size for _, size in images), np.int64))


def fingerprint(sizes: list[tuple[bytes, int]]) -> str:
    """sha256 over sorted relative paths and sizes."""
    digest = hashlib.sha256()
    for pair in sorted(sizes):
        digest.update(b"%b\0%d\n" % pair)
    return digest.hexdigest()


# Keeping


def cache_folder() -> Path:
    """Where indices are kept."""
    return files.cache_folder("index")


def _keep(path: Path, listing: Listing) -> None:
    with files.atomic(path) as temporary:
        np.savez(
            temporary,
            version=VERSION,
            names=listing.files.names,
            ends=listing.files.ends,
            sizes=listing.files.sizes,
            labels=listing.labels,
            classes=np.asarray(listing.classes, dtype=np.str_),
            fingerprint=listing.fingerprint,
            folders=np.frombuffer(b"\0".join(listing.folders), np.uint8),
            changed=np.asarray(list(listing.folders.values()), np.int64),
        )


def _from_index(path: Path, folder: Path) -> Listing | None:
    """What the index says, where there is one that can be read and still holds."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            if kept["version"] != VERSION:
                return None
            listing = Listing(
                ImageFiles(str(folder), kept["names"], kept["ends"], kept["sizes"]),
                tuple(kept["classes"].tolist()),
                kept["labels"],
                str(kept["fingerprint"]),
                dict(zip(kept["folders"].tobytes().split(b"\0"), kept["changed"].tolist())),
            )
    except Exception:  # not there, or damaged in whatever way: the folder is listed again
        return None
    return listing if _holds(listing, folder) else None


def _holds(kept: Listing, folder: Path) -> bool:
    """Whether each folder has its time of change, and a sample of files their sizes."""
    root = os.fsencode(folder)
    images = np.random.default_rng(0).choice(len(kept.files), min(SAMPLE, len(kept.files)), replace=False)
    try:
        return all(
            os.stat(os.path.join(root, relative)).st_mtime_ns == changed  # noqa: PTH116, PTH118
            for relative, changed in kept.folders.items()
        ) and all(os.stat(kept.files[image]).st_size == kept.files.sizes[image] for image in images)  # noqa: PTH116
    except OSError:
        return False
