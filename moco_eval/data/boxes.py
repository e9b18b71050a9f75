"""Images with boxes: what the VOC and COCO readers return, and the checks that both make."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from moco_eval.errors import InputError
from moco_eval.runtime import log

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"))
EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Sample:
    """An image and its boxes, in pixels of the image after its EXIF rotation.

    Attributes:
        image_id: the image's name (VOC) or its id in the json (COCO).
        size: width and height.
        boxes: (N, 4) float64: x0, y0, x1, y1; pixel i covers i to i + 1, so VOC's xmin and ymin are one less.
        labels: (N,) int64, indices into the data's classes.
        difficult: (N,) bool; trained on, neither counted nor held against a detector by VOC AP.
        crowd: (N,) bool; COCO's regions of many objects, not trained on.
        masks: of each object, as COCO writes it: a list of polygons (x0, y0, x1, y1, ... in pixels), or a dict with
            size and counts (run-length encoded); empty where the data have none.
        keypoints: (N, K, 3) float64: x, y and 0 (not labelled), 1 (hidden) or 2 (seen); None where the data have none.
    """

    image_id: str | int
    path: Path
    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    difficult: np.ndarray
    crowd: np.ndarray
    masks: tuple[Any, ...] = ()
    keypoints: np.ndarray | None = None


@dataclass(frozen=True)
class DetectionData:
    """A training and a test split of images with boxes.

    Attributes:
        classes: their names; a label is an index into them.
        fingerprint: of relative paths and sizes of all images and annotation files.
        coco: the test split's annotations as pycocotools takes them; None for data in VOC format.
        category_ids: COCO's id of each class; empty for data in VOC format.
        keypoints: names of the keypoints of the one class that has them; `keypoint_pairs`: (left, right) indices of
            those that a mirror exchanges.
    """

    name: str
    classes: tuple[str, ...]
    train: list[Sample]
    test: list[Sample]
    train_split: str
    test_split: str
    fingerprint: str
    coco: dict[str, Any] | None = None
    category_ids: tuple[int, ...] = ()
    keypoints: tuple[str, ...] = ()
    keypoint_pairs: tuple[tuple[int, int], ...] = ()

    def record(self) -> dict[str, Any]:
        """The `dataset` part of a result record."""
        return {
            "name": self.name,
            "split": self.test_split,
            "train_split": self.train_split,
            "fingerprint": self.fingerprint,
            "images": len(self.test),
            "train_images": len(self.train),
            "classes": len(self.classes),
        }


class Objects:
    """Checks the boxes of one split; `clip` cuts boxes to their image and passes over unknown classes."""

    def __init__(self, split: str, classes: Sequence[str], clip: bool):
        self.split = split
        self.clip = clip
        self._index = {name: i for i, name in enumerate(classes)}
        self._notes: dict[str, list[str]] = {}

    def label(self, name: str, where: str) -> int | None:
        """The class index; None where the class is unknown and `clip` lets that pass.

        Raises:
            InputError: an unknown class, with the file and the classes there are.
        """
        if name in self._index:
            return self._index[name]
        if not self.clip:
            raise InputError(
                f"{where}: class {name!r} is not among the {len(self._index)} classes trained on "
                f"({', '.join(sorted(self._index)[:25])}); --set data.clip=true passes over such objects"
            )
        self._note("objects of unknown classes passed over", f"{name} in {where}")
        return None

    def box(
        self, corners: tuple[float, ...], size: tuple[int, int], slack: float, where: str
    ) -> tuple[float, ...] | None:
        """Check one box.

        Args:
            corners: x0, y0, x1, y1 in the file's own convention.
            size: width and height of its image.
            slack: how far beyond the image a box may reach, in pixels.
            where: the file, for messages.
        Returns:
            The corners, or None for a box without area, which is dropped and noted.
        Raises:
            InputError: not finite, upside down, or outside its image and not clipped.
        """
        x0, y0, x1, y1 = corners
        if not np.isfinite(corners).all() or x1 < x0 or y1 < y0:
            raise InputError(f"{where}: box {_show(corners)} is not min before max; correct the file")
        if x1 == x0 or y1 == y0:
            self._note("boxes of zero area dropped", where)
            return None
        width, height = size
        if min(x0, y0) < -slack or x1 > width + slack or y1 > height + slack:
            if not self.clip:
                raise InputError(
                    f"{where}: box {_show(corners)} lies outside its {width}x{height} image; "
                    "correct the file, or --set data.clip=true cuts such boxes"
                )
            self._note("boxes cut to their image", where)
            x0, x1 = (min(max(x, 0.0), float(width)) for x in (x0, x1))
            y0, y1 = (min(max(y, 0.0), float(height)) for y in (y0, y1))
            if x1 <= x0 or y1 <= y0:
                self._note("boxes of zero area dropped", where)
                return None
        return x0, y0, x1, y1

    def _note(self, what: str, where: str) -> None:
        self._notes.setdefault(what, []).append(where)

    def report(self) -> None:
        """One line on stderr for each kind of thing that was changed, with the first files."""
        for what, places in self._notes.items():
            files = list(dict.fromkeys(places))
            more = ", ..." if len(files) > 5 else ""
            log(f"{self.split}: {len(places)} {what}: {', '.join(files[:5])}{more}")


def _show(corners: Iterable[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in corners) + ")"


def make_sample(
    image_id: str | int,
    path: Path,
    size: tuple[int, int],
    rows: Sequence[tuple[tuple[float, ...], int, bool, bool]],
) -> Sample:
    """A sample from rows of (corners, label, difficult, crowd)."""
    return Sample(
        image_id=image_id,
        path=path,
        size=size,
        boxes=np.array([row[0] for row in rows], dtype=np.float64).reshape(-1, 4),
        labels=np.array([row[1] for row in rows], dtype=np.int64),
        difficult=np.array([row[2] for row in rows], dtype=bool),
        crowd=np.array([row[3] for row in rows], dtype=bool),
    )


def image_size(path: Path) -> tuple[int, int]:
    """Width and height after EXIF rotation, from the file's header.

    Raises:
        InputError: missing, or not an image.
    """
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
            width, height = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read {path}: {_reason(error)}") from None
    return (height, width) if turned else (width, height)


def read_image(path: Path) -> Image.Image:
    """An image as 8-bit RGB, EXIF rotation applied; 16-bit grey is scaled to 8.

    Raises:
        InputError: missing, truncated or not an image.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read {path}: {_reason(error)}") from None
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    words = getattr(error, "strerror", None) or str(error)
    return "it is no image" if "cannot identify" in words else " ".join(words.split())


def images_by_stem(folder: Path) -> dict[str, list[Path]]:
    """The image files of a folder under their names without suffix."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            found.setdefault(path.stem, []).append(path)
    return found


def refuse_twice(names: Iterable[Any], what: str) -> None:
    """Raises InputError where a name stands twice."""
    for name, times in Counter(names).items():
        if times > 1:
            raise InputError(f"{what}: {name!r} stands there {times} times; keep one")


def fingerprint(root: Path, files: Iterable[Path]) -> str:
    """SHA-256 over the sorted relative paths and sizes of the files."""
    entries = sorted((os.path.relpath(path, root), path.stat().st_size) for path in set(files))
    return hashlib.sha256("".join(f"{name}\0{size}\n" for name, size in entries).encode()).hexdigest()
