"""Image data sets by name: the built-in digits, CIFAR-10, STL-10, class folders, flat folders, tar shards."""

import hashlib
import io
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from moco_eval import pickles
from moco_eval.config import did_you_mean
from moco_eval.data.index import ImageFiles, list_images
from moco_eval.data.shards import Shards, open_shards
from moco_eval.encoders.encoder import Preprocessing
from moco_eval.errors import InputError

NAMES = ("digits", "imagefolder", "imagenet", "cifar10", "stl10", "flat", "webdataset")
OFFICIAL = {
    ("cifar10", "train"): 50_000,
    ("cifar10", "test"): 10_000,
    ("stl10", "pretrain"): 105_000,
    ("stl10", "train"): 5_000,
    ("stl10", "test"): 8_000,
    ("imagenet", "train"): 1_281_167,
    ("imagenet", "val"): 50_000,
}
DIGITS_TRAIN = 1297  # the first 1,297 digits train, the last 500 test: other writers, for the most part

CIFAR_STATISTICS: dict[str, Any] = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
SMALL: dict[str, Preprocessing] = {
    "cifar10": Preprocessing(size=32, resize=32, **CIFAR_STATISTICS),
    "stl10": Preprocessing(size=96, resize=96),
    "digits": Preprocessing(size=64, resize=64, mean=(0.305, 0.305, 0.305), std=(0.335, 0.335, 0.335)),
}


@dataclass(frozen=True)
class ImageSet:
    """A split of a data set: RGB images by index, and their labels where it has them.

    Attributes:
        name, split: what it is.
        classes: class names; empty for `flat` and `webdataset`.
        labels: class of each image, (N,) int64; None for `flat` and `webdataset`.
        fingerprint: sha256 over sorted relative paths and sizes, or over the pixels of a built-in set.
        pixels: (N, H, W, 3) uint8, of sets that fit in memory; otherwise
        files: the image files, or the tar files that hold them.
        damaged: what could not be listed, by name: shards that end early.
        rows: of a subset, which images of the whole set it holds, (N,) int64; None for the whole set.
        whole: of a subset, the whole set.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    labels: np.ndarray | None
    fingerprint: str
    pixels: np.ndarray | None = None
    files: ImageFiles | Shards | None = None
    labels_per_class: int | None = None
    damaged: tuple[str, ...] = ()
    rows: np.ndarray | None = None
    whole: "ImageSet | None" = None

    def __len__(self) -> int:
        held = self.files if self.pixels is None else self.pixels
        return 0 if held is None else len(held)

    @property
    def shards(self) -> np.ndarray | None:
        """Where each shard's images end, (S,) int64, for a set that comes in shards."""
        return self.files.ends if isinstance(self.files, Shards) else None

    def image(self, index: int) -> Image.Image:
        """Raises InputError naming the file where it cannot be read."""
        if self.pixels is not None:
            return Image.fromarray(self.pixels[index])
        return decode_bytes(self.read(index), self.name_of(index))

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
        return record | ({"labels_per_class": self.labels_per_class} if self.labels_per_class else {})

    def few_labels(self, per_class: int, seed: int) -> "ImageSet":
        """A random subset with `per_class` images of each class, drawn from `seed`.

        Raises:
            InputError: a class has fewer.
        """
        assert self.labels is not None
        counts = Counter(self.labels.tolist())
        rarest = min(range(len(self.classes)), key=lambda label: counts[label])
        if counts[rarest] < per_class:
            raise InputError(
                f"--labels {per_class}-per-class: class {self.classes[rarest]!r} has {counts[rarest]} images"
            )
        generator = np.random.default_rng(seed)
        chosen = [
            generator.permutation(np.flatnonzero(self.labels == label))[:per_class]
            for label in range(len(self.classes))
        ]
        return replace(self.take(np.sort(np.concatenate(chosen))), labels_per_class=per_class)

    def take(self, rows: np.ndarray) -> "ImageSet":
        """The subset of those images, in that order."""
        assert self.labels is not None
        whole = self if self.whole is None else self.whole
        here = {"labels": self.labels[rows], "whole": whole, "rows": rows if self.rows is None else self.rows[rows]}
        if self.pixels is not None:
            return replace(self, pixels=self.pixels[rows], **here)
        assert isinstance(self.files, ImageFiles)
        return replace(self, files=self.files.take(rows), **here)


def decode_bytes(data: bytes, name: str) -> Image.Image:
    """An encoded image as 8-bit RGB: grey, palette, CMYK as PIL converts them, 16 bits scaled to 8.

    EXIF rotation is ignored, as torchvision does in classification.

    Args:
        data: what its file holds.
        name: what to call it in a message.
    Raises:
        InputError: unreadable, truncated, or no image at all.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if image.mode.startswith("I;16") or image.mode == "I":
                sixteen = np.asarray(image).astype(np.int64)
                return Image.fromarray((sixteen.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise InputError(f"{name} is not an image that Pillow reads; remove or replace it") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{name} cannot be decoded ({error}); remove or replace it") from None


def open_images(name: str, data: Path | None, split: str) -> ImageSet:
    """Open a data set.

    Args:
        name: one of NAMES.
        data: its folder; None for built-in ones, or where MOCO_EVAL_DATA says it.
        split: 'train' or 'test' (an imagefolder's `val/`), or 'pretrain', which is 'train' but for STL-10, where it
            is the labelled and unlabelled images together, without labels.
    Raises:
        InputError: unknown name, missing or empty folder, a class without images, an incomplete copy.
    """
    if name not in NAMES:
        raise InputError(f"Invalid value for '--dataset': {name!r}.{did_you_mean(name, NAMES)}")
    if split == "pretrain" and name != "stl10":
        split = "train"
    if name == "digits":
        return _digits(split)
    folder = data_folder(name, data)
    if name == "cifar10":
        return _cifar10(folder, split)
    if name == "stl10":
        return _stl10(folder, split)
    if name == "flat":
        return _flat(folder, split)
    if name == "webdataset":
        return _webdataset(folder, split)
    images = _imagefolder(name, folder, split)
    if name == "imagenet" and len(images.classes) != 1000:
        raise InputError(
            f"{folder} has {len(images.classes)} class folders, ImageNet has 1000; for other data take "
            "--dataset imagefolder"
        )
    return images


def open_splits(name: str, data: Path | None) -> tuple[ImageSet, ImageSet]:
    """Training and test images, of the same classes. Raises InputError where those differ."""
    train, test = (open_images(name, data, split) for split in ("train", "test"))
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise InputError(f"{name}: {len(odd)} classes are in one split only (first: {odd[0]!r}); mend train/ or val/")
    return train, test


def departures(*images: ImageSet) -> list[str]:
    """In words, where a split of a known data set has not the number of images it was published with."""
    return [
        f"{one.name} {one.split} of {len(one)} images instead of {OFFICIAL[one.name, one.split]}"
        for one in images
        if len(one) != OFFICIAL.get((one.name, one.split), len(one)) and one.labels_per_class is None
    ]


def require_whole(images: ImageSet, limit: int) -> list[str]:
    """What could not be listed, as a warning in words; none where all is whole.

    Raises:
        InputError: it is more than `limit` (bad_images).
    """
    if not images.damaged:
        return []
    several = ", ..." if len(images.damaged) > 5 else ""
    words = f"{len(images.damaged)} damaged in {images.name}: {', '.join(images.damaged[:5])}{several}"
    if len(images.damaged) > limit:
        raise InputError(f"{words}; mend them, or allow for them by --set bad_images={len(images.damaged)}")
    return [f"{words}; the images before each damage are used"]


def data_folder(name: str, data: Path | None) -> Path:
    """`data`, or what MOCO_EVAL_DATA names; must be a folder."""
    if data is None and os.environ.get("MOCO_EVAL_DATA"):
        data = Path(os.environ["MOCO_EVAL_DATA"])
    if data is None:
        raise InputError(
            f"--dataset {name} needs --data FOLDER (or the environment variable MOCO_EVAL_DATA); for example "
            f"--dataset {name} --data /datasets/{name}, or try the built-in --dataset digits, which needs none"
        )
    if not data.exists():
        raise InputError(f"--data {data} does not exist")
    if not data.is_dir():
        raise InputError(f"--data {data} is a file; give the folder of the data set")
    return data


def _digits(split: str) -> ImageSet:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    part = slice(None, DIGITS_TRAIN) if split == "train" else slice(DIGITS_TRAIN, None)
    eight_pixels = np.round(bunch.images[part] * (255 / 16)).astype(np.uint8)
    large = [
        Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR).convert("RGB") for image in eight_pixels
    ]
    pixels = np.stack([np.asarray(image) for image in large])
    return ImageSet(
        name="digits",
        split=split,
        classes=tuple(str(digit) for digit in range(10)),
        labels=bunch.target[part].astype(np.int64),
        fingerprint=hashlib.sha256(eight_pixels.tobytes()).hexdigest(),
        pixels=pixels,
    )


CIFAR10_FILES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _cifar10(folder: Path, split: str) -> ImageSet:
    root = folder if (folder / "test_batch").is_file() else folder / "cifar-10-batches-py"
    parts = [_cifar_batch(root / file) for file in CIFAR10_FILES[split]]
    pixels = np.concatenate([part[0] for part in parts])
    return ImageSet(
        name="cifar10",
        split=split,
        classes=CIFAR10_CLASSES,
        labels=np.concatenate([part[1] for part in parts]),
        fingerprint=hashlib.sha256(pixels.tobytes()).hexdigest(),
        pixels=pixels,
    )


def _cifar_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not path.is_file():
        raise InputError(
            f"{path} is missing; --data must hold cifar-10-batches-py with its five train and one test batch"
        )
    batch = pickles.read(path, encoding="bytes")
    try:
        rows, labels = batch[b"data"], np.asarray(batch[b"labels"], dtype=np.int64)
        pixels = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    except (KeyError, ValueError, AttributeError, TypeError, IndexError) as error:
        raise InputError(f"{path} is not a CIFAR-10 batch: {error}; fetch the data set again") from None
    if len(labels) != len(pixels) or pixels.dtype != np.uint8:
        raise InputError(f"{path} is not a CIFAR-10 batch: {len(pixels)} images, {len(labels)} labels")
    return np.ascontiguousarray(pixels), labels


STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


def _stl10(folder: Path, split: str) -> ImageSet:
    """96 x 96 pixels, in the binary files of Coates et al. 2011: an image's columns one after the other, by channel."""
    root = folder if (folder / "test_X.bin").is_file() else folder / "stl10_binary"
    parts = ("train", "unlabeled") if split == "pretrain" else (split,)
    pixels = np.concatenate([_stl10_file(root / f"{part}_X.bin", 3 * 96 * 96) for part in parts])
    labels = None
    if split != "pretrain":
        labels = _stl10_file(root / f"{split}_y.bin", 1)[:, 0].astype(np.int64) - 1
        if len(labels) != len(pixels) or not set(labels.tolist()) <= set(range(10)):
            raise InputError(f"{root}: {len(pixels)} images of {split} and {len(labels)} labels do not belong together")
    return ImageSet(
        name="stl10",
        split=split,
        classes=STL10_CLASSES,
        labels=labels,
        fingerprint=hashlib.sha256(pixels.tobytes()).hexdigest(),
        pixels=np.ascontiguousarray(pixels.reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)),
    )


def _stl10_file(path: Path, row: int) -> np.ndarray:
    """(N, row) bytes of one file."""
    if not path.is_file():
        raise InputError(f"{path} is missing; --data must hold stl10_binary with its .bin files")
    found = np.fromfile(path, dtype=np.uint8)
    if not len(found) or len(found) % row:
        raise InputError(f"{path} has {len(found)} bytes, no whole number of {row}; fetch the data set again")
    return found.reshape(-1, row)


def _imagefolder(name: str, folder: Path, split: str) -> ImageSet:
    directory = {"train": "train", "test": "val"}[split]
    root = folder / directory
    if not root.is_dir():
        raise InputError(
            f"{folder} has no {directory}/ folder; an imagefolder holds train/CLASS/*.jpg and val/CLASS/*.jpg"
        )
    found = list_images(folder, directory)
    return ImageSet(name, directory, found.classes, found.labels, found.fingerprint, files=found.files)


def _flat(folder: Path, split: str) -> ImageSet:
    _require_train("flat", split)
    found = list_images(folder, None)
    return ImageSet("flat", "train", (), None, found.fingerprint, files=found.files)


def _webdataset(folder: Path, split: str) -> ImageSet:
    _require_train("webdataset", split)
    shards, fingerprint, damaged = open_shards(folder)
    return ImageSet("webdataset", "train", (), None, fingerprint, files=shards, damaged=damaged)


def _require_train(name: str, split: str) -> None:
    if split != "train":
        raise InputError(f"--dataset {name} has no labels: it is for pretraining only; take imagefolder to evaluate")


def preprocessing_for(dataset: str, encoder_says: Preprocessing | None) -> Preprocessing:
    """The encoder's own contract; where it has none (`random:`, `pixels`), the data set's."""
    return encoder_says or SMALL.get(dataset, Preprocessing())


def preprocessing_departures(dataset: str, used: Preprocessing) -> list[str]:
    """In words, where images are cut to another size than the data set's protocols do (224 of 256; 32 for CIFAR)."""
    usual = SMALL.get(dataset, Preprocessing())
    if (used.size, used.resize) == (usual.size, usual.resize):
        return []
    return [f"images of {used.size} pixels (resized to {used.resize}) instead of {usual.size} ({usual.resize})"]
