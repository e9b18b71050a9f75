"""Images with boxes: what the VOC and COCO readers return, and the checks that both make."""

import contextlib
import functools
import hashlib
import io
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from moco_eval import limits
from moco_eval.data.pixels import FORMATS, as_rgb, open_image, other_than_image, pixels_in_scans, reason_of
from moco_eval.errors import InputError
from moco_eval.runtime.console import log

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"))
EXIF_ORIENTATION = 0x0112
HEAD = 8192  # bytes; what comes before the pixels of a JPEG file is rarely longer


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
        masks: of each object, as COCO writes it: a list of polygons (arrays of x0, y0, x1, y1, ... in pixels), a dict
            with size and counts (run-length encoded), or None for an object without; empty where no object has one.
        keypoints: (N, K, 3) float64: x, y and 0 (not labelled), 1 (hidden) or 2 (seen), on the scale of the boxes: the
            middle of pixel i is i + 0.5, half a pixel more than COCO writes; None where the data have none.
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
        federated: whether an image is judged on the classes only that it was searched for, as LVIS says: those of its
            objects and of its neg_category_ids in `coco`.
        instance_files: of each test image, where it is judged as Cityscapes' are, the PNG of its instances.
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
    federated: bool = False
    instance_files: tuple[Path, ...] = ()

    def limited(self, most: int) -> "DetectionData":
        """The same with at most so many images of each split, evenly spread."""
        train, test = spread(self.train, most), spread(self.test, most)
        return replace(self, train=train, test=test, coco=self.coco and _of_images(self.coco, test))

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


def spread(samples: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, evenly spread, in their order."""
    count = min(most, len(samples))
    return [samples[index] for index in np.linspace(0, len(samples) - 1, count).astype(int).tolist()]


def _of_images(coco: dict[str, Any], samples: Sequence[Any]) -> dict[str, Any]:
    """COCO's annotations of those images alone."""
    kept = {sample.image_id for sample in samples}
    images = [image for image in coco["images"] if image["id"] in kept]
    return coco | {"images": images, "annotations": [one for one in coco["annotations"] if one["image_id"] in kept]}


class Findings:
    """What is wrong with a data set, and what is only worth saying.

    `detect` refuses the data at the first thing that is wrong; `datasets check` goes on and lists all.

    Attributes:
        refusal: what `detect` says about the data; None where it takes them.
        refused: places by (split, kind).
    """

    def __init__(self, go_on: bool = False):
        self.go_on = go_on
        self.refusal: str | None = None
        self.refused: dict[tuple[str, str], list[str]] = {}
        self._notes: dict[tuple[str, str], list[str]] = {}
        self._split = ""

    def begin(self, split: str) -> None:
        """What follows belongs to this split."""
        self._split = split

    def refuse(self, kind: str, place: str, message: str) -> None:
        """Raises InputError with the message, or keeps it when going on."""
        message = one_line(message)
        if not self.go_on:
            raise InputError(message)
        self.refusal = self.refusal or message
        self.refused.setdefault((self._split, kind), []).append(one_line(place))

    @contextlib.contextmanager
    def catching(self, kind: str, place: str) -> Iterator[None]:
        """An InputError from inside is refused under `kind`."""
        try:
            yield
        except InputError as error:
            self.refuse(kind, place, str(error))

    def refuse_twice(self, names: Iterable[Any], kind: str, place: str) -> None:
        """Refuse names that stand there more than once."""
        for name, times in Counter(names).items():
            if times > 1:
                message = f"{place}, {kind}: {name!r} is listed {times} times; keep one"
                self.refuse(f"{kind} that are listed twice", f"{name} in {place}", message)

    def note(self, kind: str, place: str) -> None:
        """Keep what does not stop `detect`."""
        self._notes.setdefault((self._split, kind), []).append(one_line(place))

    def notes(self) -> list[str]:
        """A line for each kind of note, with the first places."""
        return grouped(self._notes)

    def tell(self) -> None:
        """The notes on stderr; `datasets check` prints them itself."""
        for line in [] if self.go_on else self.notes():
            log(line)


def one_line(text: str) -> str:
    """Text from a file, in one line and in characters that can be printed."""
    return " ".join(text.splitlines()).encode("utf-8", "backslashreplace").decode()


def grouped(places_by_kind: dict[tuple[str, str], list[str]]) -> list[str]:
    """A line for each kind: how many, and the first five places."""
    lines = []
    for (split, kind), places in places_by_kind.items():
        different = list(dict.fromkeys(places))
        more = ", ..." if len(different) > 5 else ""
        lines.append(f"{split}: {len(places)} {kind}: {', '.join(different[:5])}{more}")
    return lines


class Objects:
    """Checks the boxes of one split; `clip` cuts boxes to their image and passes over unknown classes."""

    def __init__(self, classes: Sequence[str], clip: bool, findings: Findings):
        self.clip = clip
        self.findings = findings
        self._index = {name: i for i, name in enumerate(classes)}

    def label(self, name: str, where: str) -> int | None:
        """The class index; None where the class is unknown: refused, or passed over with `clip`."""
        if name in self._index:
            return self._index[name]
        if self.clip:
            self.findings.note("objects of unknown classes skipped", f"{name} in {where}")
        else:
            self.findings.refuse(
                "objects of classes that are not trained on",
                f"{name} in {where}",
                f"{where}: class {name!r} is not among the {len(self._index)} classes trained on "
                f"({', '.join(sorted(self._index)[:25])}); --set data.clip=true skips such objects",
            )
        return None

    def box(
        self, corners: tuple[float, ...], size: tuple[int, int], slack: float, where: str
    ) -> tuple[float, ...] | None:
        """Check one box: refused are one not finite, upside down, or outside its image and not clipped.

        Args:
            corners: x0, y0, x1, y1 in the file's own convention.
            size: width and height of its image.
            slack: how far beyond the image a box may reach, in pixels.
            where: the file, for messages.
        Returns:
            The corners, or None for a box that is refused or has no area, which is dropped and noted.
        """
        x0, y0, x1, y1 = corners
        if not math.isfinite(x0 + y0 + x1 + y1):
            self._refuse("boxes that are not finite", corners, where, "is not finite; correct the file")
            return None
        if x1 < x0 or y1 < y0:
            self._refuse("inverted boxes", corners, where, "is not min before max; correct the file")
            return None
        width, height = size
        if x0 < -slack or y0 < -slack or x1 > width + slack or y1 > height + slack:
            if not self.clip:
                out = f"lies outside its {width}x{height} image; "
                way = "correct the file, or --set data.clip=true clips such boxes"
                self._refuse("boxes outside their image", corners, where, out + way)
                return None
            self.findings.note("boxes cut to their image", where)
            x0, x1 = (min(max(x, 0.0), float(width)) for x in (x0, x1))
            y0, y1 = (min(max(y, 0.0), float(height)) for y in (y0, y1))
        if x1 <= x0 or y1 <= y0:
            self.findings.note("boxes of zero area dropped", where)
            return None
        return x0, y0, x1, y1

    def _refuse(self, kind: str, corners: tuple[float, ...], where: str, message: str) -> None:
        self.findings.refuse(kind, where, f"{where}: box {_show(corners)} {message}")


def _show(corners: Iterable[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in corners) + ")"


def require_objects(train: Sequence[Sample], split: str, where: Path, findings: Findings) -> None:
    """Refuse training images none of which has an object; crowd regions are not trained on."""
    if all(sample.crowd.all() for sample in train):
        findings.begin(split)
        message = f"{where}: none of the {len(train)} training images of {split} has an object to train on; add some"
        findings.refuse("training splits without objects", split, message)


def require_counted(test: Sequence[Sample], split: str, where: Path | str, findings: Findings) -> None:
    """Refuse test images none of which has an object that counts, which is neither difficult nor a crowd region."""
    if all((sample.difficult | sample.crowd).all() for sample in test):
        findings.begin(split)
        difficult, crowd = (sum(int(getattr(s, mark).sum()) for s in test) for mark in ("difficult", "crowd"))
        message = (
            f"{where}: none of the {len(test)} test images of {split} has an object that counts ({difficult} are "
            f"difficult, {crowd} crowd regions), so that there is nothing to measure; add some, or take another split"
        )
        findings.refuse("test splits without objects that count", split, message)


def refuse_fractions(samples: Sequence[Sample], split: str, where: Path | str, findings: Findings) -> None:
    """Refuse boxes that are fractions of their image: all of a split within its first pixel."""
    if all(sample.boxes.max(initial=0) <= 1 for sample in samples) and any(len(sample.boxes) for sample in samples):
        findings.begin(split)
        message = (
            f"{where}: all boxes of {split} lie between 0 and 1, as fractions of their image do; "
            "export them in pixels, or correct the file"
        )
        findings.refuse("splits with boxes that are fractions", split, message)


def note_similar(classes: Sequence[str], findings: Findings) -> None:
    """Note classes whose names differ by spaces or case only: they are trained and judged as different ones."""
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault("".join(name.split()).casefold(), []).append(name)
    for names in alike.values():
        if len(names) > 1:
            place = " and ".join(map(repr, names))
            findings.note("sets of classes whose names differ by spaces or case only", place)


def make_sample(
    image_id: str | int,
    path: Path,
    size: tuple[int, int],
    rows: Sequence[tuple[tuple[float, ...], int, bool, bool]],
    masks: Sequence[Any] = (),
    keypoints: np.ndarray | None = None,
) -> Sample:
    """A sample from rows of (corners, label, difficult, crowd); masks and keypoints as in `Sample`."""
    return Sample(
        image_id=image_id,
        path=path,
        size=size,
        boxes=np.array([row[0] for row in rows], dtype=np.float64).reshape(-1, 4),
        labels=np.array([row[1] for row in rows], dtype=np.int64),
        difficult=np.array([row[2] for row in rows], dtype=bool),
        crowd=np.array([row[3] for row in rows], dtype=bool),
        masks=tuple(masks),
        keypoints=keypoints,
    )


def image_size(path: Path, decode: bool = False) -> tuple[int, int]:
    """Width and height after EXIF rotation, from the file's header; `decode` reads the pixels too, to see if they can.

    Raises:
        InputError: missing, or not an image.
    """
    try:
        with limits.open_unbuffered(path, "image") as file:
            if not decode and (size := _size_in_head(file.read(HEAD), str(path))):
                return size
            file.seek(0)
            with open_image(io.BufferedReader(file), str(path)) as image:
                size = _turned(image)
                if decode:
                    _require_few_scans(path, image)
                    image.draft("RGB", (1, 1))  # an eighth of a JPEG's pixels, from all its bytes
                    image.load()
                if image.mode in ("F", "I"):
                    as_rgb(image, str(path))
                return size
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file makes its decoder raise
        raise unreadable(path, error) from None


def _require_few_scans(path: Path, image: Image.Image) -> None:
    data = limits.read_bytes(path, "image")
    limits.require(path, "scans", pixels_in_scans(data, image.width * image.height))


def _size_in_head(head: bytes, name: str) -> tuple[int, int] | None:
    """The size of a JPEG image by the first bytes of its file; None where they are not enough, or of another format."""
    if head.startswith(b"\xff\xd8\xff"):
        with contextlib.suppress(Exception):  # the whole file says more
            return _turned(open_image(io.BytesIO(head), name, ("JPEG",)))
    return None


def _turned(image: Image.Image) -> tuple[int, int]:
    """Width and height after EXIF rotation; of a TIFF by its own tags, as Pillow may have turned it already."""
    width, height = (image.tag_v2[256], image.tag_v2[257]) if isinstance(image, TiffImageFile) else image.size
    turned = image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def image_sizes(paths: Sequence[Path], findings: Findings) -> Iterator[tuple[int, int] | None]:
    """The sizes of many images; None for one that is refused. `datasets check` decodes them too, on several threads.

    Headers alone take 35 us each, three times that on threads, which wait for each other.
    """
    for path, size in zip(paths, _decoded(paths) if findings.go_on else map(_size_or_error, paths)):
        if isinstance(size, InputError):
            findings.refuse("images that cannot be read", str(path), str(size))
            yield None
        else:
            yield size


def _decoded(paths: Sequence[Path]) -> Iterator[tuple[int, int] | InputError]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(paths), 1024):
            yield from pool.map(functools.partial(_size_or_error, decode=True), paths[start : start + 1024])


def _size_or_error(path: Path, decode: bool = False) -> tuple[int, int] | InputError:
    try:
        return image_size(path, decode)
    except InputError as error:
        return error


def read_image(path: Path) -> Image.Image:
    """An image as 8-bit RGB, EXIF rotation applied; see `pixels.as_rgb`.

    Raises:
        InputError: missing, truncated, not an image, or of a kind of pixels without a known scale.
    """
    try:
        data = limits.read_bytes(path, "image")
        with open_image(io.BytesIO(data), str(path)) as opened:
            limits.require(path, "scans", pixels_in_scans(data, opened.width * opened.height))
            image, form = ImageOps.exif_transpose(opened), opened.format
        del opened  # of the largest images there is room for two
        return as_rgb(image, str(path), form)
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file makes its decoder raise
        raise unreadable(path, error) from None


def unreadable(path: Path | str, error: Exception) -> InputError:
    """What to say of an image file whose decoder raised `error`."""
    reason = reason_of(error)
    if isinstance(error, UnidentifiedImageError):
        with limits.open_regular(path) as file:
            reason = "it is " + (other_than_image(file.read(200)) or f"no image ({', '.join(FORMATS)})")
    return InputError(f"cannot read {path}: {reason}; replace it, or take it out of its split")


def images_by_stem(folder: Path) -> dict[str, list[Path]]:
    """The image files of a folder under their names without suffix; none where there is no folder."""
    images: dict[str, list[Path]] = {}
    for name in sorted(os.listdir(folder)) if folder.is_dir() else []:  # noqa: PTH208 (twice as fast)
        stem, suffix = os.path.splitext(name)  # noqa: PTH122
        if suffix.lower() in IMAGE_SUFFIXES:
            images.setdefault(stem, []).append(folder / name)
    return images


def inside(name: str) -> bool:
    """Whether a name from a file can be that of a file below its folder, and does not lead out of it."""
    parts = re.split(r"[/\\]", name)
    absolute = name.startswith(("/", "\\")) or PureWindowsPath(name).drive != ""
    short = len(name) < 1024 and all(len(os.fsencode(one_line(part))) < 256 for part in parts)
    return short and not absolute and ".." not in parts and "\0" not in name


def fingerprint(root: Path, files: Iterable[Path]) -> str:
    """SHA-256 over the sorted relative paths and sizes of the files."""
    entries = sorted((_relative(path, f"{root}{os.sep}", root), path.stat().st_size) for path in set(files))
    return hashlib.sha256("".join(f"{name}\0{size}\n" for name, size in entries).encode()).hexdigest()


def _relative(path: Path, prefix: str, root: Path) -> str:
    name = str(path)
    return name[len(prefix) :] if name.startswith(prefix) else os.path.relpath(path, root)
