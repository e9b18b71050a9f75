"""Small data sets held in memory: the built-in digits, CIFAR-10 and CIFAR-100, STL-10."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moco_eval import limits
from moco_eval.data.image_set import ImageSet
from moco_eval.errors import InputError
from moco_eval.untrusted import pickle_read

DIGITS_TRAIN = 1297  # the first 1,297 digits train, the last 500 test: other writers, for the most part


def digits(split: str) -> ImageSet:
    """scikit-learn's handwritten digits, 8 x 8 pixels enlarged to 32 x 32."""
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


def cifar10(folder: Path, split: str) -> ImageSet:
    """The python version: five train batches and one test batch."""
    root = folder if (folder / "test_batch").is_file() else folder / "cifar-10-batches-py"
    layout = "cifar-10-batches-py with its five train and one test batch"
    parts = [_cifar_batch(root / file, "labels", layout) for file in CIFAR10_FILES[split]]
    return _cifar("cifar10", split, CIFAR10_CLASSES, parts)


def cifar100(folder: Path, split: str) -> ImageSet:
    """The python version, its 100 fine classes: the files train, test and meta."""
    root = folder if (folder / "meta").is_file() else folder / "cifar-100-python"
    layout = "cifar-100-python with its files train, test and meta"
    names = _batch(root / "meta", layout).get(b"fine_label_names")
    if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
        raise InputError(f"{root / 'meta'} names no classes (fine_label_names); fetch the data set again")
    classes = tuple(name.decode("utf-8", "replace") for name in names)
    return _cifar("cifar100", split, classes, [_cifar_batch(root / split, "fine_labels", layout)])


def _cifar(name: str, split: str, classes: tuple[str, ...], parts: list[tuple[np.ndarray, np.ndarray]]) -> ImageSet:
    pixels, labels = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
        raise InputError(f"{name}: {split} has a label outside its {len(classes)} classes; fetch the data set again")
    return ImageSet(name, split, classes, labels, hashlib.sha256(pixels.tobytes()).hexdigest(), pixels=pixels)


def _cifar_batch(path: Path, key: str, layout: str) -> tuple[np.ndarray, np.ndarray]:
    """(N, 32, 32, 3) uint8 pixels and (N,) labels of one file."""
    batch = _batch(path, layout)
    try:
        rows, labels = batch[b"data"], np.asarray(batch[key.encode()], dtype=np.int64)
        pixels = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    except (KeyError, ValueError, AttributeError, TypeError, IndexError) as error:
        raise InputError(f"{path} is not a CIFAR batch: {error}; fetch the data set again") from None
    if labels.shape != (len(pixels),) or pixels.dtype != np.uint8:
        raise InputError(f"{path} is not a CIFAR batch: {len(pixels)} images, labels of shape {labels.shape}")
    return np.ascontiguousarray(pixels), labels


def _batch(path: Path, layout: str) -> dict[bytes, Any]:
    if not path.is_file():
        raise InputError(f"{path} is missing; --data must hold {layout}")
    batch = pickle_read.read(path, encoding="bytes")
    if not isinstance(batch, dict):
        raise InputError(f"{path} is not a CIFAR batch but a {type(batch).__name__}; fetch the data set again")
    return batch


STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


def stl10(folder: Path, split: str) -> ImageSet:
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
    try:
        with limits.open_unbuffered(path, "stl10") as file:
            values = np.fromfile(file, dtype=np.uint8)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; --data must hold stl10_binary with its .bin files") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); mend or replace it") from None
    if not len(values) or len(values) % row:
        raise InputError(f"{path} has {len(values)} bytes, no whole number of {row}; fetch the data set again")
    return values.reshape(-1, row)
