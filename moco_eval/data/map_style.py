"""Images that a Python program gives: arrays, and map-style data sets of (image, label)."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from moco_eval import limits
from moco_eval.data.pixels import FORMATS, as_rgb, reason_of, without_programs
from moco_eval.errors import InputError
from moco_eval.runtime.console import progress

HELD = 2**30  # bytes of images that are read once and held in memory
SAMPLE = 512  # images whose pixels tell a data set from another
# torchvision's classes, and what this suite calls the same data; STL10 and the others come in files of their own
TORCHVISION = {"CIFAR10": "cifar10", "CIFAR100": "cifar100"}


def rgb_arrays(pixels: Any) -> np.ndarray:
    """(N, H, W, 3) uint8 of as many images in colour or grey. Raises InputError for another kind or shape."""
    array = np.asarray(pixels)
    if array.dtype != np.uint8:
        raise InputError(f"pixels are {array.dtype}; give 8-bit images, uint8 of 0 to 255")
    if array.ndim == 3:
        array = np.repeat(array[..., None], 3, axis=3)
    if array.ndim != 4 or array.shape[3] != 3 or not array.size:
        shape = " x ".join(map(str, array.shape))
        raise InputError(f"pixels are {shape}; give (N, H, W, 3), or grey images as (N, H, W)")
    return np.ascontiguousarray(array)


def numbered(labels: Any, images: int, classes: Sequence[str] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as (N,) int64, and the names of the classes that they count.

    Raises:
        InputError: labels that are no integers, of another number than the images, negative or beyond the classes, or
            that leave a gap where nothing names the classes.
    """
    array = np.asarray(labels)
    if array.dtype.kind not in "iu":
        raise InputError(f"labels are {array.dtype}; give integers that count the classes from 0")
    if array.shape != (images,):
        raise InputError(f"labels are {' x '.join(map(str, array.shape))} for {images} images; give one for each")
    numbers = array.astype(np.int64)
    if numbers.min() < 0:
        raise InputError(f"labels[{int(numbers.argmin())}] is {numbers.min()}; classes count from 0")
    if classes is None:
        present = np.unique(numbers)
        if len(present) <= numbers.max():
            gap = int(np.flatnonzero(np.arange(len(present)) != present)[0])
            raise InputError(
                f"labels go from 0 to {numbers.max()} and leave out {gap}; count the classes without a gap, or name "
                "all of them by classes=[...]"
            )
        return numbers, tuple(map(str, present))
    if numbers.max() >= len(classes):
        raise InputError(f"labels[{int(numbers.argmax())}] is {numbers.max()}, and classes names {len(classes)}")
    return numbers, tuple(map(str, classes))


def _is_of_an_image(shape: tuple[int, ...]) -> bool:
    """Whether an array is (H, W), (H, W, 1) or (H, W, 3)."""
    return len(shape) in (2, 3) and shape[2:] in ((), (1,), (3,))


def is_published(dataset: Any) -> bool:
    """Whether it is one of TORCHVISION as published, its images and labels not transformed."""
    kind = type(dataset)
    transformed = getattr(dataset, "transform", None) or getattr(dataset, "target_transform", None)
    return kind.__module__.startswith("torchvision.datasets.") and kind.__name__ in TORCHVISION and not transformed


def fingerprint_of(pixels: np.ndarray, labels: np.ndarray) -> str:
    """sha256 over the shape, the labels and the pixels of images in memory."""
    digest = hashlib.sha256(str(pixels.shape).encode() + labels.tobytes())
    digest.update(pixels.tobytes())
    return digest.hexdigest()


def known_as(dataset: Any) -> tuple[str, str]:
    """The name and split under which a data set's results are kept."""
    kind = type(dataset).__name__
    is_train = getattr(dataset, "train", None)
    split = "train" if is_train is True else "test"
    return (TORCHVISION[kind] if is_published(dataset) else kind), split


def own_classes(dataset: Any) -> list[str] | None:
    """The names that a data set itself has for its classes."""
    names = getattr(dataset, "classes", None)
    return list(names) if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names) else None


def _known_labels(dataset: Any, length: int) -> Callable[[int], Any] | None:
    """The `targets` of torchvision's data sets; None where there are none, or the items have others.

    A Subset or a wrapper has none of its own; a `target_transform` makes other labels of them.
    """
    import torch  # whoever gives a data set of torch's has it

    known = getattr(dataset, "targets", None)
    if not isinstance(known, list | tuple | np.ndarray | torch.Tensor) or len(known) != length:
        return None
    return None if getattr(dataset, "target_transform", None) else known.__getitem__


@dataclass(frozen=True)
class MapStyle:
    """A data set of (image, label) by index, or some `rows` of it.

    Attributes:
        label: the label of an item without its image, where the data set knows it; None asks for the item.
    """

    dataset: Any
    rows: np.ndarray
    label: Callable[[int], Any] | None = None

    @classmethod
    def open(cls, dataset: Any) -> "MapStyle":
        """Raises InputError for what has no length and items, or no items at all."""
        try:
            length = len(dataset)
            dataset.__getitem__  # noqa: B018
        except (TypeError, AttributeError, NotImplementedError):
            raise InputError(
                f"dataset is a {type(dataset).__name__}; give a map-style data set, with a length and items by index"
            ) from None
        if not length:
            raise InputError(f"dataset is an empty {type(dataset).__name__}")
        return cls(dataset, np.arange(length), _known_labels(dataset, length))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> str:
        """What to call an image in a message."""
        return f"dataset[{self.rows[index]}]"

    def item(self, index: int) -> tuple[Any, Any]:
        """(image, label) as the data set gives it. Raises InputError naming the index where it cannot."""
        try:
            with without_programs():
                item = self.dataset[int(self.rows[index])]
        except Exception as error:  # whatever somebody's data set raises
            reason = " ".join(str(error).split())  # in one line, as a loader process can hand it on
            raise InputError(f"{self[index]} raised {type(error).__name__}: {reason}") from None
        if not isinstance(item, tuple | list) or len(item) < 2:
            raise InputError(f"{self[index]} is a {type(item).__name__}; give (image, label)")
        return item[0], item[1]

    def image(self, index: int) -> Image.Image:
        """8-bit RGB. Raises InputError naming the index for what is no image."""
        image = self.item(index)[0]
        if isinstance(image, Image.Image):
            return self._as_rgb(image, self[index])
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and _is_of_an_image(image.shape):
            return Image.fromarray(image.squeeze(2) if image.shape[2:] == (1,) else image).convert("RGB")
        form = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise InputError(
            f"{self[index]} gives a {form}; give PIL images or uint8 arrays (H, W, 3), without a transform to tensors: "
            "the preprocessing makes them"
        )

    @staticmethod
    def _as_rgb(image: Image.Image, name: str) -> Image.Image:
        """8-bit RGB of an image that may not be decoded yet."""
        if image.format not in (None, "MPO", *FORMATS):
            raise InputError(
                f"{name} is an image of format {image.format}; give {', '.join(FORMATS)}, or convert it to RGB there"
            )
        limits.require(name, "pixels", image.width * image.height)
        try:
            return as_rgb(image, name)
        except InputError:
            raise
        except Exception as error:  # whatever a damaged file makes its decoder raise
            raise InputError(f"{name} cannot be decoded ({reason_of(error)}); remove or replace it") from None

    def read(self, index: int) -> bytes:
        """The pixels of an image as bytes, for a fingerprint."""
        return self.image(index).tobytes()

    def take(self, rows: np.ndarray) -> "MapStyle":
        """Some of the images, in that order."""
        return replace(self, rows=self.rows[rows])

    def labels(self) -> np.ndarray:
        """(N,), asked for without the images where the data set knows them.

        Raises:
            InputError: a label that is no integer, or an item that cannot be had; it names the index.
        """
        values = []
        with progress("labels", len(self)) as advance:
            for index in range(len(self)):
                label = self.label(int(self.rows[index])) if self.label else self.item(index)[1]
                value = np.asarray(label)
                if value.shape != () or value.dtype.kind not in "iu":
                    raise InputError(f"{self[index]} has the label {label!r}; give integers that count the classes")
                values.append(int(value))
                advance()
        return np.array(values, np.int64)

    def in_memory(self) -> np.ndarray | None:
        """(N, H, W, 3) uint8 where all images are of one size and small enough to be held; else None."""
        first = np.asarray(self.image(0))
        if first.nbytes * len(self) > HELD:
            return None
        pixels = np.empty((len(self), *first.shape), np.uint8)
        with progress("images", len(self)) as advance:
            for index in range(len(self)):
                image = np.asarray(self.image(index))
                if image.shape != first.shape:
                    return None
                pixels[index] = image
                advance()
        return pixels

    def fingerprint(self, labels: np.ndarray) -> str:
        """sha256 over the labels and the pixels of SAMPLE images, evenly spread."""
        digest = hashlib.sha256(labels.tobytes())
        for index in np.linspace(0, len(self) - 1, min(SAMPLE, len(self))).astype(int).tolist():
            digest.update(self.read(index))
        return digest.hexdigest()


@dataclass(frozen=True)
class Columns:
    """Two columns of a Hugging Face `datasets.Dataset` as a data set of (image, label)."""

    dataset: Any
    image: str
    label: str
    targets: list

    @classmethod
    def open(cls, dataset: Any, image: str, label: str) -> "Columns":
        """Raises InputError for what is no such data set, or lacks a column."""
        columns = getattr(dataset, "column_names", None)
        if not isinstance(columns, list):
            raise InputError(
                f"dataset is a {type(dataset).__name__}; give one split of a datasets.Dataset, not a stream"
            )
        for argument, name in (("image", image), ("label", label)):
            if name not in columns:
                raise InputError(f"{argument} {name!r} is not a column; there are {', '.join(columns)}")
        return cls(dataset, image, label, list(dataset[label]))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        row = self.dataset[index]
        return row[self.image], row[self.label]

    @property
    def classes(self) -> list[str] | None:
        """The names of a ClassLabel."""
        names = getattr(self.dataset.features[self.label], "names", None)
        return list(names) if names else None

    @property
    def name(self) -> str:
        """As the hub calls the data set, where it comes from there."""
        return str(getattr(getattr(self.dataset, "info", None), "dataset_name", None) or "datasets")

    @property
    def split(self) -> str:
        """The split that was loaded; a slice of one says so."""
        return str(getattr(self.dataset, "split", None) or "test")
