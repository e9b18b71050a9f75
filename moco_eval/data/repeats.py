"""Test images that are trained on too, found by their content."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moco_eval import limits
from moco_eval.data.image_set import ImageSet
from moco_eval.data.index import ImageFiles
from moco_eval.data.map_style import MapStyle
from moco_eval.data.tables import TableImages
from moco_eval.errors import InputError
from moco_eval.runtime.console import warn

READS = 2000  # pieces of files at most
PIECE = 4096  # bytes, from a file's end: its start is often the same in all
COLUMNS = 64  # bytes of an image in memory that are compared first
_known: dict[tuple, "Repeats | None"] = {}


@dataclass(frozen=True)
class Repeats:
    """Which test images are trained on too.

    Attributes:
        rows: theirs, among those that were looked at.
        looked: how many test images were looked at; of a large set a sample.
        images: how many there are.
        first: the name of the first.
    """

    rows: tuple[int, ...]
    looked: int
    images: int
    first: str

    def sentence(self) -> str:
        """How many, and the first."""
        sample = f" of a sample of {self.looked}" if self.looked < self.images else f" of {self.images}"
        return f"{len(self.rows)}{sample} test images are also trained on (the same content; first: {self.first})"


def repeats(train: ImageSet, test: ImageSet) -> Repeats | None:
    """The test images that are trained on too; None where the sets cannot be compared without decoding all of them."""
    key = _key(train, test)
    if key not in _known:
        _known[key] = _compared(train, test)
    return _known[key]


def tell_repeats(train: ImageSet, test: ImageSet) -> None:
    """Warn, once for each pair of sets in a process."""
    compared_before = _key(train, test) in _known
    copies = repeats(train, test)
    if copies and copies.rows and not compared_before:
        warn(f"{test.name}: {copies.sentence()}")


def _key(train: ImageSet, test: ImageSet) -> tuple:
    """What tells a pair of sets from others."""
    return tuple(
        (images.name, images.split, images.fingerprint, images.subset, len(images)) for images in (train, test)
    )


def _compared(train: ImageSet, test: ImageSet) -> Repeats | None:
    rows: list[int]
    looked = len(test)
    if train.pixels is not None and test.pixels is not None:
        rows = _in_memory(train.pixels, test.pixels)
    elif isinstance(train.files, ImageFiles) and isinstance(test.files, ImageFiles):
        rows, looked = repeated_files(
            train.files.sizes, train.files.__getitem__, test.files.sizes, test.files.__getitem__
        )
    elif isinstance(train.files, TableImages) and isinstance(test.files, TableImages):
        rows, looked = repeated_files(train.files.sizes, train.files.reader, test.files.sizes, test.files.reader)
    elif isinstance(train.files, MapStyle) and isinstance(test.files, MapStyle):
        if train.files.dataset is not test.files.dataset:
            return None
        rows = np.flatnonzero(np.isin(test.files.rows, train.files.rows)).tolist()
    else:
        return None
    return Repeats(tuple(rows), looked, len(test), test.name_of(rows[0]) if rows else "")


def _in_memory(train: np.ndarray, test: np.ndarray) -> list[int]:
    """Rows of (N, H, W, 3) test images that are among the training images: a few bytes first, then all."""
    if train.shape[1:] != test.shape[1:]:
        return []
    flat = [images.reshape(len(images), -1) for images in (train, test)]
    columns = np.linspace(0, flat[0].shape[1] - 1, min(COLUMNS, flat[0].shape[1])).astype(int)
    places: dict[bytes, list[int]] = {}
    for row, few in enumerate(np.ascontiguousarray(flat[0][:, columns])):
        places.setdefault(few.tobytes(), []).append(row)
    return [
        row
        for row, few in enumerate(np.ascontiguousarray(flat[1][:, columns]))
        if any((flat[0][other] == flat[1][row]).all() for other in places.get(few.tobytes(), ()))
    ]


def repeated_files(
    train_sizes: np.ndarray, train: Callable[[int], Any], test_sizes: np.ndarray, test: Callable[[int], Any]
) -> tuple[list[int], int]:
    """Rows of the test files that are copies of training files, and how many test files were looked at.

    Files of another size are no copies. Of the sizes that both have, so many are looked at, in an order drawn once for
    all, as READS pieces of files are enough for; a match is compared as a whole.

    Args:
        train_sizes, test_sizes: bytes of each file, (N,).
        train, test: the path of each file, or what reads it, by row.
    """
    by_size = [np.argsort(sizes, kind="stable") for sizes in (train_sizes, test_sizes)]
    ordered = [sizes[order] for sizes, order in zip((train_sizes, test_sizes), by_size)]
    shared = np.intersect1d(ordered[0], ordered[1])
    looked, left, rows = int((~np.isin(test_sizes, shared)).sum()), READS, list[int]()
    for size in np.random.default_rng(0).permutation(shared):
        mine, theirs = (
            order[np.searchsorted(sizes, size, "left") : np.searchsorted(sizes, size, "right")].tolist()
            for order, sizes in zip(reversed(by_size), reversed(ordered))
        )
        if len(mine) + len(theirs) > left:
            continue
        left -= len(mine) + len(theirs)
        looked += len(mine)
        pieces: dict[bytes, list[Any]] = {}
        for row in theirs:
            pieces.setdefault(_piece(train(row), int(size)), []).append(train(row))
        for row in mine:
            others = pieces.get(_piece(test(row), int(size)), [])
            if any(_content(test(row)) == _content(other) for other in others):
                rows.append(row)
    return sorted(rows), looked


def _piece(path: Any, size: int) -> bytes:
    """The end of a file; of one that is none or cannot be read, nothing that another file has."""
    try:
        if callable(path):
            return path()[-PIECE:]
        with limits.open_unbuffered(path) as file:
            file.seek(max(0, size - PIECE))
            return file.read(PIECE)
    except (OSError, InputError):
        return str(path).encode(errors="surrogateescape")


def _content(path: Any) -> bytes | None:
    try:
        if callable(path):
            return path()
        with limits.open_unbuffered(path, "image") as file:
            return file.read()
    except (OSError, InputError):
        return None
