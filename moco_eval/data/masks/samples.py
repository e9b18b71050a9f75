"""Images with semantic masks: what the readers return, and how a mask is read and checked."""

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moco_eval import limits
from moco_eval.data.boxes.samples import Findings, fingerprint, image_size, images_by_stem, read_image, unreadable
from moco_eval.data.pixels import open_image
from moco_eval.errors import InputError

IGNORED = 255  # what we call a pixel without a class, whatever its file says
MOST_CLASSES = 255
ONE_CLASS = "a foreground of 255 is to be written as 1, as 255 is ignored unless --ignore says otherwise"
PUBLISHED = {
    "voc-aug": (10582, 1449),
    "voc2012": (1464, 1449),
    "cityscapes": (2975, 500),
    "ade20k": (20210, 2000),
    "coco-stuff": (118287, 5000),
}  # training and test images of the data sets as they were published
SINGLE_CHANNEL = ("1", "L", "P", "I", "I;16", "I;16B")


@dataclass(frozen=True)
class MaskSample:
    """An image and the file of its mask."""

    name: str
    image: Path
    mask: Path


@dataclass(frozen=True)
class SegmentationData:
    """A training and a test split of images with masks.

    Attributes:
        classes: their names; class i is value i of a mask that was read.
        values: the classes of the values of a mask's file, (65536,) int32: IGNORED, or -1 for a value that it must not
            have.
        fingerprint: of relative paths and sizes of all images and masks.
        deviations: in what the splits are not the published ones, in words.
    """

    name: str
    classes: tuple[str, ...]
    train: list[MaskSample]
    test: list[MaskSample]
    train_split: str
    test_split: str
    values: np.ndarray
    fingerprint: str
    deviations: tuple[str, ...] = ()

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

    def mask(self, sample: MaskSample) -> np.ndarray:
        """The classes of a sample's pixels, (H, W) uint8, IGNORED where there is none.

        Raises:
            InputError: see `read_values`; or a value that is no class.
        """
        return self.classes_of(sample, read_values(sample.mask))

    def classes_of(self, sample: MaskSample, values: np.ndarray) -> np.ndarray:
        """The same of the values of a sample's mask. Raises InputError where one is no class."""
        classes = self.values[values]
        if (classes < 0).any():
            raise InputError(_unknown_value(sample.mask, values, classes, self))
        return classes.astype(np.uint8)

    def pair(self, sample: MaskSample, same_size: bool = True) -> tuple[Image.Image, np.ndarray]:
        """An image, as 8-bit RGB, and its mask.

        Args:
            same_size: that the mask must have.
        Raises:
            InputError: one is not readable, or their sizes differ.
        """
        image, mask = read_image(sample.image), self.mask(sample)
        if same_size:
            require_one_size(sample, image.size, mask)
        return image, mask


def opened(
    name: str,
    root: Path,
    classes: Sequence[str],
    splits: dict[str, list[MaskSample]],
    values: np.ndarray,
    findings: Findings,
) -> SegmentationData:
    """The data of a reader, once every file is known to be there; other counts than PUBLISHED are a deviation.

    Args:
        splits: the training and the test split by their names.
        findings: going on, it takes the files that are not there, and their images are left out.
    Raises:
        InputError: an empty split, a missing file, or more classes than a mask of ours holds.
    """
    for split, samples in splits.items():
        if not samples:
            raise InputError(f"{root}: its split {split} has no image; see docs/segmentation.md for the layout")
    whole = {split: require_masks(samples, split, findings) for split, samples in splits.items()}
    (train_split, train), (test_split, test) = whole.items()
    if not 2 <= len(classes) <= MOST_CLASSES:
        raise InputError(f"{root} has {len(classes)} classes, and masks have 2 to {MOST_CLASSES}; {ONE_CLASS}")
    files = [path for sample in train + test for path in (sample.image, sample.mask)]
    counts = zip(("training", "test"), (train, test), PUBLISHED.get(name, ()))
    deviations = [
        f"{len(samples)} {kind} images instead of {count}" for kind, samples, count in counts if len(samples) != count
    ]
    return SegmentationData(
        name,
        tuple(classes),
        train,
        test,
        train_split,
        test_split,
        values,
        fingerprint(root, files),
        tuple(deviations),
    )


def class_table(classes: int, ignored: Sequence[int], first: int = 0, ids: Sequence[int] | None = None) -> np.ndarray:
    """The classes of the values of a mask's file, (65536,) int32; -1 where nothing is said of a value.

    Args:
        ignored: values of pixels without a class.
        first: the value of class 0; those of the others follow.
        ids: the value of each class, where they do not follow each other.
    """
    table = np.full(1 << 16, -1, np.int32)
    table[list(ids) if ids is not None else slice(first, first + classes)] = np.arange(classes)
    table[list(ignored)] = IGNORED
    return table


def _unknown_value(path: Path, values: np.ndarray, classes: np.ndarray, data: SegmentationData) -> str:
    value = int(values[classes < 0][0])
    known = np.flatnonzero((data.values >= 0) & (data.values != IGNORED))
    span = f"{known[0]} to {known[-1]}" if len(known) == known[-1] - known[0] + 1 else f"{len(known)} values"
    ignored = ", ".join(str(value) for value in np.flatnonzero(data.values == IGNORED)[:4]) or "none"
    way_out = (
        "correct it, or give --classes with more names or --ignore" if data.name == "mask-folder" else "correct it"
    )
    return (
        f"{path} has the value {value} at {int((values == value).sum())} pixels, and the {len(data.classes)} classes "
        f"are {span}, ignored is {ignored}; {way_out}"
    )


def read_values(path: Path) -> np.ndarray:
    """The values of a mask's file as they stand there, (H, W) int32: a palette is not applied.

    Raises:
        InputError: missing, not an image, or of several channels.
    """
    try:
        with open_image(io.BytesIO(limits.read_bytes(path, "image")), str(path)) as opened:
            if opened.format == "JPEG":
                raise InputError(f"{path} is a JPEG, whose compression invents values; save masks as PNG")
            if opened.mode not in SINGLE_CHANNEL:
                raise InputError(
                    f"{path} is a mask of {len(opened.getbands())} channels ({opened.mode}) and must have one: class "
                    "numbers, grey or with a palette; converting a palette to RGB loses them"
                )
            values = np.asarray(opened).astype(np.int32)
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file makes its decoder raise
        raise unreadable(path, error) from None
    if values.min(initial=0) < 0 or values.max(initial=0) >= 1 << 16:
        raise InputError(f"{path} has the value {int(values.max())}, and masks have 0 to 65535; correct it")
    return values


def require_one_size(sample: MaskSample, size: tuple[int, int], mask: np.ndarray) -> None:
    """Raises InputError where a mask is not as wide and high as its image, whose EXIF rotation is applied."""
    if size != (mask.shape[1], mask.shape[0]):
        raise InputError(
            f"{sample.mask} is {mask.shape[1]}x{mask.shape[0]} and its image {sample.image} is {size[0]}x{size[1]} "
            "(EXIF rotation applied); put the right mask in its place"
        )


def count_pixels(data: SegmentationData, samples: Sequence[MaskSample]) -> np.ndarray:
    """Pixels of each class in each mask, (images, classes) int64; every file is read, and every size compared.

    Raises:
        InputError: see `SegmentationData.pair`.
    """
    rows = np.zeros((len(samples), len(data.classes)), np.int64)
    for row, counts in zip(rows, _each(lambda sample: _counts(data, sample), samples)):
        row[:] = counts
    return rows


def _counts(data: SegmentationData, sample: MaskSample) -> np.ndarray:
    mask = data.mask(sample)
    require_one_size(sample, image_size(sample.image), mask)
    return counts_of_classes(mask, len(data.classes))


def counts_of_classes(mask: np.ndarray, classes: int) -> np.ndarray:
    """Pixels of each class, (C,) int64."""
    return np.bincount(mask.ravel(), minlength=IGNORED + 1)[:classes]


def _each(function: Any, samples: Sequence[MaskSample]) -> Iterator[Any]:
    """Of each sample in order, from a few threads: decoders let the others work."""
    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(samples), 256):  # after a refusal no more than these are still read
            yield from pool.map(function, samples[start : start + 256])


def values_of(samples: Sequence[MaskSample], go_on: bool = False) -> np.ndarray:
    """Every value that these masks' files have, ascending; `go_on`: without those that cannot be read."""
    present = np.zeros(1 << 16, bool)
    for values in _each(lambda sample: _values_of(sample, go_on), samples):
        present[values] = True
    return np.flatnonzero(present)


def _values_of(sample: MaskSample, go_on: bool) -> np.ndarray:
    try:
        return np.unique(read_values(sample.mask))
    except InputError:
        if go_on:
            return np.zeros(0, np.int32)
        raise


def files_by_stem(folder: Path) -> dict[str, Path]:
    """The images of a folder by their names without suffix.

    Raises:
        InputError: two files share a stem.
    """
    files = images_by_stem(folder)
    for paths in files.values():
        if len(paths) > 1:
            raise InputError(f"{folder} has {paths[0].name} and {paths[1].name}, which share a mask; rename one")
    return {stem: paths[0] for stem, paths in files.items()}


def require_folder(folder: Path, what: str) -> Path:
    """The folder. Raises InputError where it is not there."""
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist; {what}")
    return folder


def require_masks(samples: Sequence[MaskSample], split: str, findings: Findings) -> list[MaskSample]:
    """The samples whose image and mask are there. Raises InputError where one is not, unless `findings` goes on."""
    findings.begin(split)
    whole = list(samples)
    for kind, missing in (("image", "file"), ("mask", "mask")):
        lost = [sample for sample in whole if not getattr(sample, kind).is_file()]
        for sample in lost:
            findings.refuse(
                f"images without a {missing}",
                str(getattr(sample, kind)),
                f"{len(lost)} of {len(samples)} images have no {missing}: {getattr(sample, kind)} does not exist; "
                f"put it there, or take {sample.name!r} out of its split",
            )
        whole = [sample for sample in whole if getattr(sample, kind).is_file()]
    return whole
