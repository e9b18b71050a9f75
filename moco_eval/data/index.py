"""Image files in folders: listed once, kept in an index on disk, held without an object per file."""

import functools
import hashlib
import io
import os
import stat
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moco_eval import limits
from moco_eval.errors import InputError, RunFailed
from moco_eval.runtime import files
from moco_eval.runtime.console import warn
from moco_eval.untrusted import npz

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# What systems leave among a person's files, in small letters; and hidden folders, and files that begin with ._
LEFT_BY_SYSTEMS = frozenset(
    (
        *(b"__macosx", b".ds_store", b"icon\r", b"network trash folder", b"temporary items"),  # macOS
        *(b"thumbs.db", b"ehthumbs.db", b"desktop.ini", b"$recycle.bin", b"recycler", b"system volume information"),
        *(b"@eadir", b"@tmp", b"@synoresource", b"#recycle", b"#snapshot", b"@recycle", b"@__thumb"),  # NAS
        *(b"lost+found", b"__pycache__"),
    )
)
KEPT_FROM = 10_000  # files; fewer are listed in less time than an index is worth
SAMPLE = 200  # files whose sizes are looked at again before an index is believed
SETTLED = 2.0  # seconds: a folder that changed later than this before it was listed may change unseen
VERSION = 3


def _up_to(file: io.FileIO, count: int) -> bytes:
    """So many bytes, or fewer at the file's end; one read of an unbuffered file may give less than there is."""
    data = file.read(count) or b""
    while len(data) < count and (more := file.read(count - len(data))):
        data += more
    return data


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
            InputError: it is no regular file, cannot be read, is too large, or is of another size than when listed.
        """
        path, size = self[index], int(self.sizes[index])
        try:
            with limits.open_unbuffered(path, "image") as file:
                data = _up_to(file, size + 1)
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); mend or remove it") from None
        if len(data) != size:
            there = len(data) if len(data) < size else os.stat(path).st_size  # noqa: PTH116
            raise InputError(
                f"{path} has {there} bytes, but {size} when it was listed; touch its folder to have it listed again"
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
        passed_over: how many entries are no person's, and the first, in words; empty where there are none.
    """

    files: ImageFiles
    classes: tuple[str, ...]
    labels: np.ndarray
    fingerprint: str
    folders: dict[bytes, int]
    passed_over: str


def list_images(folder: Path, split: str | None, endings: tuple[str, ...] = EXTENSIONS) -> Listing:
    """The images below a folder, from the index of an earlier call where that still holds.

    Large sets have an index in `cache_folder()`. It holds while every folder has the time of change that it had
    (adding, removing and renaming a file change it) and a sample of files their sizes. A file that is rewritten
    in place is not seen here; `ImageFiles.read` refuses it where its size differs. Of several processes one lists,
    the others wait for its index.

    Args:
        folder: what paths are relative to.
        split: the folder of class folders in it, such as 'train'; None: all images, without classes.
        endings: of the names of images.
    Raises:
        InputError: no images, a class without images, a folder that is two classes, a file or folder that cannot be
            looked at.
    """
    others = "" if endings == EXTENSIONS else f"\0{' '.join(endings)}"
    key = f"{os.path.realpath(folder)}\0{split or ''}{others}"
    path = cache_folder() / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:16]}.npz"
    listing = _from_index(path, folder)
    if listing is None:
        with files.one_at_a_time(path):
            listing = _from_index(path, folder) or _listed(path, folder, split, endings)
    return listing


def _listed(path: Path, folder: Path, split: str | None, endings: tuple[str, ...]) -> Listing:
    began = time.time()
    listing = _list_flat(folder, endings) if split is None else _list_classes(folder, split, endings)
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
    warn(f"no index of the images is kept ({reason.partition(';')[0]}); set MOCO_EVAL_CACHE to another folder")


# Looking


def _list_flat(folder: Path, endings: tuple[str, ...]) -> Listing:
    images, folders, left = scan(folder, b"", endings)
    if not images:
        raise InputError(
            f"{folder} holds no images ({', '.join(endings)}){_besides(left)}{_of_bands(folder, b'', endings)}"
        )
    packed_images = _packed(folder, images)
    return Listing(packed_images, (), np.empty(0, np.int64), fingerprint(images), folders, in_words(left))


def _of_bands(folder: Path, start: bytes, endings: tuple[str, ...]) -> str:
    """How many .npy files lie there that a bands.yaml would make images; empty for none, or where they count."""
    arrays = [] if ".npy" in endings else scan(folder, start, (".npy",))[0]
    if not arrays:
        return ""
    name = "imagefolder" if start else "flat"
    return (
        f"; its {len(arrays)} .npy files are images where a bands.yaml describes them: moco-eval datasets check {name} "
        f"--data {folder} --write measures each channel's mean and std and writes it"
    )


def _list_classes(folder: Path, split: str, endings: tuple[str, ...]) -> Listing:
    root = folder / split
    folders = {os.fsencode(split): root.stat().st_mtime_ns}
    classes, hidden = _class_folders(root)
    left = [os.fsencode(f"{split}/{name}") for name in hidden]
    if not classes:
        raise InputError(
            f"{root} holds no class folders{_besides(left)}; for images without classes take --dataset flat"
        )
    images: list[tuple[bytes, int]] = []
    counts: list[int] = []
    for name in classes:
        more, below, more_left = scan(folder, os.fsencode(f"{split}/{name}"), endings)
        if not more:
            arrays = _of_bands(folder, os.fsencode(f"{split}/{name}"), endings)
            way = arrays or "; fill or remove it"
            raise InputError(f"class folder {root / name} holds no images{_besides(more_left)}{way}")
        images += more
        left += more_left
        counts.append(len(more))
        folders |= below
    labels = np.repeat(np.arange(len(classes)), counts)
    return Listing(_packed(folder, images), tuple(classes), labels, fingerprint(images), folders, in_words(left))


def _class_folders(root: Path) -> tuple[list[str], list[str]]:
    """The names of the class folders, and what is passed over, both sorted.

    Raises:
        InputError: a folder stands there twice (a link), or a name in two Unicode forms.
    """
    classes: dict[tuple[int, int], str] = {}
    forms: dict[str, str] = {}
    left = []
    with os.scandir(root) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            is_folder = entry.is_dir()
            if is_left_by_a_system(os.fsencode(entry.name), is_folder):
                left.append(entry.name)
            elif is_folder:
                status = entry.stat()
                other = classes.setdefault((status.st_dev, status.st_ino), entry.name)
                if other != entry.name:
                    raise InputError(
                        f"class folders {other!r} and {entry.name!r} of {root} are one folder (a link): its images "
                        "cannot be of two classes; remove one"
                    )
                other = forms.setdefault(unicodedata.normalize("NFC", entry.name), entry.name)
                if other != entry.name:
                    raise InputError(
                        f"class folders {other!a} and {entry.name!a} of {root} are one name in two Unicode "
                        "forms; put their images into one"
                    )
    return list(classes.values()), left


def is_left_by_a_system(name: bytes, folder: bool) -> bool:
    """Whether an entry is no person's, by its name: hidden folders, recycle bins, thumbnails, twins of macOS."""
    return name.startswith(b"." if folder else b"._") or name.lower() in LEFT_BY_SYSTEMS


def in_words(left: list[bytes]) -> str:
    """How many entries were passed over, and the first three; empty for none."""
    names = [" ".join(name.decode("utf-8", "backslashreplace").splitlines()) for name in sorted(left)[:3]]
    more = ", ..." if len(left) > 3 else ""
    return f"{len(left)} hidden or system entries passed over: {', '.join(names)}{more}" if left else ""


def _besides(left: list[bytes]) -> str:
    return f" ({in_words(left)})" if left else ""


def scan(
    folder: Path, start: bytes, endings: tuple[str, ...]
) -> tuple[list[tuple[bytes, int]], dict[bytes, int], list[bytes]]:
    """Files below `folder/start` whose names end so, in small letters or capitals; links are followed.

    A folder that several ways lead to is listed once: where it really lies, else at the first link by name.

    Returns:
        (path relative to `folder`, bytes) of each, sorted; each folder's relative path and time of change in ns; the
        relative paths of what is passed over, see `is_left_by_a_system`.
    Raises:
        InputError: a folder or a file cannot be looked at, or is a pipe, a socket or a device.
    """
    wanted = tuple(ending.encode() for ending in endings)
    listed: list[tuple[bytes, int]] = []
    folders: dict[bytes, int] = {}
    left: list[bytes] = []
    visited: set[tuple[int, int]] = set()
    waiting, links = [start], list[bytes]()
    root = os.fsencode(folder)
    while waiting or links:
        if not waiting:  # all that lies here is visited before what is linked
            waiting, links = sorted(links, reverse=True), []
        relative = waiting.pop()
        path = os.path.join(root, relative)  # noqa: PTH118
        try:
            status = os.stat(path)  # noqa: PTH116 (before it is listed: what changes later, changes its time)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            folders[relative] = status.st_mtime_ns
            _list(path, relative + b"/" if relative else b"", wanted, listed, waiting, links, left)
        except OSError as error:
            raise InputError(f"cannot read {os.fsdecode(error.filename or path)}: {error.strerror}") from None
    return sorted(listed), folders, left


def _list(
    path: bytes,
    prefix: bytes,
    wanted: tuple[bytes, ...],
    listed: list[tuple[bytes, int]],
    folders: list[bytes],
    links: list[bytes],
    left: list[bytes],
) -> None:
    """One folder's files that end as `wanted`, its folders, its links to folders, and what is passed over: appended.

    Raises:
        InputError: a file is a pipe, a socket or a device.
        OSError: it cannot be looked at.
    """
    with os.scandir(path) as entries:
        for entry in entries:
            is_folder = entry.is_dir()
            if is_left_by_a_system(entry.name, is_folder):
                left.append(prefix + entry.name)
            elif is_folder:
                (links if entry.is_symlink() else folders).append(prefix + entry.name)
            elif entry.name.lower().endswith(wanted):
                about = entry.stat()
                if not stat.S_ISREG(about.st_mode):
                    limits.require_regular(os.fsdecode(entry.path), about)
                listed.append((prefix + entry.name, about.st_size))


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
            passed_over=listing.passed_over,
        )


def _from_index(path: Path, folder: Path) -> Listing | None:
    """What the index says, where there is one that can be read and still holds."""
    try:
        with npz.Arrays(path) as kept:
            if kept["version"] != VERSION:
                return None
            listing = Listing(
                ImageFiles(str(folder), kept["names"], kept["ends"], kept["sizes"]),
                tuple(kept["classes"].tolist()),
                kept["labels"],
                str(kept["fingerprint"]),
                dict(zip(kept["folders"].tobytes().split(b"\0"), kept["changed"].tolist())),
                str(kept["passed_over"]),
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
