"""One split of an image data set, and its images decoded."""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from moco_eval import limits
from moco_eval.data import label_subsets, map_style
from moco_eval.data.bands import Bands, refuse_many_channels
from moco_eval.data.index import ImageFiles
from moco_eval.data.pixels import FORMATS, as_rgb, open_image, other_than_image, pixels_in_scans, plain_jpeg, reason_of
from moco_eval.data.shards import Shards
from moco_eval.data.tables import TableImages
from moco_eval.errors import InputError

SAMPLE = 512  # files whose bytes tell a set from another of the same names and sizes


@dataclass(frozen=True)
class ImageSet:
    """A split of a data set: images by index, RGB or of any bands, and their labels where it has them.

    Attributes:
        name, split: what it is.
        classes: class names; empty for `flat` and `webdataset`.
        labels: class of each image, (N,) int64; None for `flat` and `webdataset`. Where an image may show several
            classes, (N, C) int8: 1 shown, 0 not, -1 shown by difficult objects only, which counts neither way.
        fingerprint: of the whole split: sha256 over sorted relative paths and sizes (and the labels, where lists say
            them and not the folders), or over the pixels of a published set in memory, and the labels of one's own.
        pixels: (N, H, W, 3) uint8, of sets that fit in memory; otherwise
        files: the image files, the tar files or table that hold them, or the data set of a Python program.
        labels_per_class: of a subset drawn by `few_labels`.
        damaged: what could not be listed, by name: shards that end early.
        passed_over: hidden and system files and folders beside the images, in words; empty where there are none.
        metric: what its papers report: top1, mean_per_class or mAP.
        rows: which images of the whole split a subset holds, (N,) int64; None for the whole.
        subset: what the subset is, in words; None for the whole.
        whole: of a subset, the whole split.
        bands: what the channels are, where a bands.yaml says so; None for RGB images of 8 bits.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    labels: np.ndarray | None = field(repr=False)
    fingerprint: str
    pixels: np.ndarray | None = field(default=None, repr=False)
    files: ImageFiles | Shards | TableImages | map_style.MapStyle | None = field(default=None, repr=False)
    labels_per_class: int | None = None
    damaged: tuple[str, ...] = ()
    passed_over: str = ""
    metric: str = "top1"
    rows: np.ndarray | None = field(default=None, repr=False)
    subset: str | None = None
    whole: "ImageSet | None" = field(default=None, repr=False)
    bands: Bands | None = None

    def __len__(self) -> int:
        held = self.files if self.pixels is None else self.pixels
        return 0 if held is None else len(held)

    @property
    def shards(self) -> np.ndarray | None:
        """Where each shard's images end, (S,) int64, for a set that comes in shards."""
        return self.files.ends if isinstance(self.files, Shards) else None

    @cached_property
    def sample(self) -> str | None:
        """sha256 over the bytes of SAMPLE of its files, evenly spread (of all, where there are fewer).

        Two sets of the same names and sizes differ in it. None for a set in memory: its fingerprint is over all pixels.
        """
        if self.files is None:
            return None
        digest = hashlib.sha256()
        for index in np.linspace(0, len(self) - 1, min(SAMPLE, len(self))).astype(int).tolist():
            digest.update(hashlib.sha256(self.read(index)).digest())
        return digest.hexdigest()

    @property
    def channels(self) -> int:
        """How many channels a network sees of each image."""
        return self.bands.count if self.bands else 3

    @property
    def multi_label(self) -> bool:
        """Whether an image may show several classes."""
        return self.labels is not None and self.labels.ndim == 2

    def image(self, index: int) -> Image.Image:
        """8-bit RGB; of an image of bands a picture to look at. Raises InputError naming a file that cannot be read."""
        if self.bands:
            return Image.fromarray(self.bands.picture(self.values(index)).transpose(1, 2, 0))
        if isinstance(self.files, map_style.MapStyle):
            return self.files.image(index)
        return Image.fromarray(self.array(index))

    def array(self, index: int) -> np.ndarray:
        """8-bit RGB, (H, W, 3). Raises InputError naming the file where it cannot be read."""
        if self.pixels is not None:
            return self.pixels[index]
        if isinstance(self.files, map_style.MapStyle):
            return np.array(self.files.image(index))
        data = self.read(index)
        pixels = plain_jpeg(data)
        return np.array(decode_bytes(data, self.name_of(index))) if pixels is None else pixels

    def values(self, index: int) -> np.ndarray:
        """The bands of an image, (C, H, W) float32. Raises InputError naming the file where it cannot be read."""
        assert self.bands is not None
        return self.bands.read(self.read(index), self.name_of(index))

    def read(self, index: int) -> bytes:
        """The encoded image, of a set in files. Raises InputError naming the file where it cannot be read."""
        assert self.files is not None
        return self.files.read(index)

    def name_of(self, index: int) -> str:
        """What to call an image in a message: its path, its shard and its name there, or its number."""
        return f"image {index} of {self.name}" if self.files is None else self.files[index]

    def trouble_with(self, index: int) -> str:
        """Why an image cannot be read, with its name."""
        try:
            self.image(index)
        except InputError as error:
            return str(error)
        return f"{self.name_of(index)} could not be read at first"

    def record(self) -> dict[str, Any]:
        """The `dataset` part of a result record."""
        record = {
            "name": self.name,
            "split": self.split,
            "fingerprint": self.fingerprint,
            "images": len(self),
            "classes": len(self.classes),
        }
        if isinstance(self.files, Shards):
            record |= {"shards": len(self.files.shards), "other_members": self.files.others}
        if self.bands:
            record["bands"] = self.bands.record()
        return record | self.regime()

    def regime(self) -> dict[str, Any]:
        """Of a record: which part of the split's labels this is; empty for all of them."""
        few = {"labels_per_class": self.labels_per_class} if self.labels_per_class else {}
        return few | ({"subset": self.subset} if self.subset else {})

    def take(self, rows: np.ndarray, subset: str | None = None, labels_per_class: int | None = None) -> "ImageSet":
        """The images of these rows alone, in that order; the fingerprint stays the whole split's.

        Args:
            rows: (M,) places in this set; of a subset of a subset, `rows` of the result are those in the whole.
            subset: what it is, in words; by default what this set is.
        """
        rows = np.asarray(rows, dtype=np.int64)
        description = f"{subset} of {self.subset}" if subset and self.subset else subset or self.subset
        files = self.files
        assert self.pixels is not None or not isinstance(files, Shards)
        return replace(
            self,
            pixels=None if self.pixels is None else self.pixels[rows],
            files=None if files is None or isinstance(files, Shards) else files.take(rows),
            labels=None if self.labels is None else self.labels[rows],
            labels_per_class=labels_per_class or self.labels_per_class,
            rows=rows if self.rows is None else self.rows[rows],
            subset=description,
            whole=self.whole or self,
        )

    def limited(self, most: int | None) -> "ImageSet":
        """At most so many images, evenly spread over the set, which is in the order of its classes; None for all.

        Raises:
            InputError: a set in shards, of which no part can be taken.
        """
        if most is None or most >= len(self):
            return self
        if isinstance(self.files, Shards):
            raise InputError(f"--limit {most}: {self.name} comes in shards, of which all are taken; leave it out")
        order = (
            np.arange(len(self)) if self.labels is None or self.multi_label else np.argsort(self.labels, kind="stable")
        )
        rows = np.sort(order[np.linspace(0, len(self) - 1, most).astype(int)])
        return self.take(rows, f"{most} images, evenly spread")

    def few_labels(self, per_class: int, seed: int) -> "ImageSet":
        """A random subset with `per_class` images of each class, drawn from `seed`.

        Raises:
            InputError: a class has fewer, or images show several classes.
        """
        if self.multi_label:
            raise InputError(
                f"--labels {per_class}-per-class: the images of {self.name} show several classes at once; "
                "moco-eval svm --low-shot draws few of each"
            )
        assert self.labels is not None
        counts = np.bincount(self.labels, minlength=len(self.classes))
        rarest = int(counts.argmin())
        if counts[rarest] < per_class:
            raise InputError(
                f"--labels {per_class}-per-class: class {self.classes[rarest]!r} has {counts[rarest]} images"
            )
        description = f"{per_class} labels per class, seed {seed}"
        return self.take(label_subsets.draw(self.labels, per_class, seed), description, per_class)

    def listed(self, path: Path) -> "ImageSet":
        """The subset that a list file names: an image a line, by its name, or by CLASS/NAME.

        Raises:
            InputError: the set is not in files; the list cannot be read or is empty; a name is not in the split, fits
                several images, or stands twice.
        """
        if not isinstance(self.files, ImageFiles):
            raise InputError(f"--labels {path}: the images of {self.name} have no file names; take N-per-class instead")
        names, title = label_subsets.read_list(path)
        return self.take(label_subsets.find(names, self.files, path), title)

    @classmethod
    def from_arrays(
        cls,
        pixels: np.ndarray,
        labels: np.ndarray | Sequence[int],
        *,
        classes: Sequence[str] | None = None,
        name: str = "arrays",
        split: str = "test",
    ) -> "ImageSet":
        """Images in memory.

        Args:
            pixels: 8-bit images, (N, H, W, 3) or grey (N, H, W), uint8.
            labels: class of each, (N,), counted from 0.
            classes: their names; by default the numbers that occur, which then may leave no gap.
            name: what records and tables call the set; two sets of one name and split are told apart by content.
            split: which part of it this is.
        Raises:
            InputError: pixels or labels of another kind, shape or length, or labels that name no class.
        """
        rgb = map_style.rgb_arrays(pixels)
        numbers, names = map_style.numbered(labels, len(rgb), classes)
        return cls(name, split, names, numbers, map_style.fingerprint_of(rgb, numbers), pixels=rgb)

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        *,
        classes: Sequence[str] | None = None,
        name: str | None = None,
        split: str | None = None,
    ) -> "ImageSet":
        """The images of a map-style torch or torchvision data set of (PIL image or uint8 array, label).

        Small images of one size are read once and held in memory; others are asked for when they are needed. A data set
        of torchvision's that moco-eval knows by name (CIFAR10, ...) is that data set.

        Args:
            dataset: with a length and items by index; without a transform to tensors, which the preprocessing makes.
            classes: names; by default the data set's own `classes`, or the numbers that occur.
            name: what records and tables call the set; by default its class's name.
            split: which part of it this is.
        Raises:
            InputError: an item that is none such, or that cannot be had: its index is named.
        """
        own_name, own_split = map_style.known_as(dataset)
        items = map_style.MapStyle.open(dataset)
        named = classes if classes is not None else map_style.own_classes(dataset)
        numbers, names = map_style.numbered(items.labels(), len(items), named)
        pixels = items.in_memory()
        called = (name or own_name, split or own_split, names, numbers)
        if pixels is None:
            return cls(*called, items.fingerprint(numbers), files=items)
        if map_style.is_published(dataset):
            return cls(*called, hashlib.sha256(pixels.tobytes()).hexdigest(), pixels=pixels)
        return cls(*called, map_style.fingerprint_of(pixels, numbers), pixels=pixels)

    @classmethod
    def from_huggingface(
        cls,
        dataset: Any,
        *,
        image: str = "image",
        label: str = "label",
        name: str | None = None,
        split: str | None = None,
    ) -> "ImageSet":
        """The images of a `datasets.Dataset`; see `from_dataset`.

        Args:
            image: the name of the column of images.
            label: the name of the column of labels.
            name: what results call the set.
            split: which part of it this is.
        Raises:
            InputError: no such column, or as `from_dataset`.
        """
        columns = map_style.Columns.open(dataset, image, label)
        names = (name or columns.name, split or columns.split)
        return cls.from_dataset(columns, classes=columns.classes, name=names[0], split=names[1])


def require_single_label(images: ImageSet) -> None:
    """Raises InputError where an image may show several classes, for protocols that take one."""
    if images.multi_label:
        raise InputError(
            f"{images.name} has images of several classes at once, and this protocol needs one class per image; "
            "evaluate it with moco-eval svm"
        )


def require_judgeable(train: ImageSet, test: ImageSet) -> None:
    """What every evaluation asks of the labels, before anything runs.

    Raises:
        InputError: no images; one class only; a class without a training image; no test image that counts. Where images
            show several classes, the protocol itself says what it needs of each.
    """
    for images in (train, test):
        if not len(images) or images.labels is None:
            what = "labels" if len(images) else "images"
            raise InputError(f"{images.name} {images.split} has no {what}, so there is nothing to evaluate")
    assert train.labels is not None
    if test.multi_label:
        assert test.labels is not None
        if not (test.labels == 1).any():
            raise InputError(
                f"no image of {test.name} {test.split} counts as showing a class (difficult objects do not), so there "
                "is no average precision; test on other images"
            )
        return
    if len(train.classes) < 2:
        raise InputError(
            f"{train.name} has only one class, {train.classes[0]!r}: every answer would be right; give images of two "
            "classes or more"
        )
    missing = np.flatnonzero(np.bincount(train.labels, minlength=len(train.classes)) == 0)
    if len(missing):
        listed = f" ({train.subset})" if train.subset else ""
        raise InputError(
            f"class {train.classes[missing[0]]!r} has no training image{listed} ({len(missing)} such classes of "
            f"{len(train.classes)}); an evaluation needs one of each"
        )


def decode_bytes(data: bytes, name: str) -> Image.Image:
    """An encoded image as 8-bit RGB; see `pixels.as_rgb`.

    EXIF rotation is ignored, as torchvision does in classification.

    Args:
        data: what its file holds.
        name: what to call it in a message.
    Raises:
        InputError: unreadable, truncated, of a kind of pixels without a known scale, or no image at all.
    """
    try:
        with open_image(io.BytesIO(data), name) as image:
            limits.require(name, "scans", pixels_in_scans(data, image.width * image.height))
            image.load()
            return as_rgb(image, name)
    except InputError:
        raise
    except UnidentifiedImageError:
        refuse_many_channels(data, name)
        what = other_than_image(data[:200]) or f"not an image that Pillow reads as {', '.join(FORMATS)}"
        raise InputError(f"{name} is {what}; remove or replace it") from None
    except Exception as error:  # whatever a damaged file makes its decoder raise
        raise InputError(f"{name} cannot be decoded ({reason_of(error)}); remove or replace it") from None
