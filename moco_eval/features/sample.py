"""A few test images of an evaluation, as the encoder sees them: what the report's maps are drawn from."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moco_eval import limits
from moco_eval.errors import InputError
from moco_eval.runtime import files
from moco_eval.untrusted import npz

IMAGES = 1000  # at most
COMPONENTS = 50  # at most
NAME = "sample.npz"
ARRAYS = ("index", "label", "classes", "components", "variance")


@dataclass(frozen=True)
class Sample:
    """Some test images, evenly spread over the set.

    Attributes:
        index: which test images, (n,).
        label: class of each, (n,); or 1 shown, 0 not, -1 neither of each class, (n, classes).
        classes: class names.
        components: their first principal components, (n, at most 50) float32, by falling variance.
        variance: the share of the features' variance in each of them, 0 to 1.
    """

    index: np.ndarray
    label: np.ndarray
    classes: tuple[str, ...]
    components: np.ndarray
    variance: np.ndarray


def evenly(count: int, most: int) -> np.ndarray:
    """Indices of at most `most` of `count` things, evenly spread, rising."""
    taken = min(count, most)
    return np.arange(taken) * count // max(1, taken)


def principal_components(features: np.ndarray, most: int = COMPONENTS) -> tuple[np.ndarray, np.ndarray]:
    """The first principal components, (N, k) float32, and the share of the variance in each, (k,) float32.

    Each is turned so that its largest value is positive: else its sign would be a matter of chance.
    """
    centred = np.asarray(features, dtype=np.float64)
    centred = centred - centred.mean(axis=0)
    squared, vectors = np.linalg.eigh(centred @ centred.T)  # images are fewer than a thousand, dimensions may be many
    count = min(most, *centred.shape)
    squared, vectors = np.maximum(0, squared[::-1]), vectors[:, ::-1][:, :count]
    scores = vectors * np.sqrt(squared[:count])
    largest = scores[np.abs(scores).argmax(axis=0), np.arange(count)]
    share = squared[:count] / (squared.sum() or 1)
    return (scores * np.where(largest < 0, -1, 1)).astype(np.float32), share.astype(np.float32)


def write(path: Path, sample: Sample) -> None:
    """Write sample.npz."""
    label = sample.label.astype(np.int32 if sample.label.ndim == 1 else np.int8)
    with files.atomic(path) as temporary:
        np.savez_compressed(
            temporary,
            index=sample.index.astype(np.int64),
            label=label,
            classes=np.array(sample.classes, dtype=np.str_),
            components=sample.components.astype(np.float32),
            variance=sample.variance.astype(np.float32),
        )


def read(path: Path) -> Sample:
    """Read a sample.npz. Raises InputError where it is damaged."""
    try:
        held = _arrays(path)
        classes = tuple(map(str, held["classes"].reshape(-1)))
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file makes zipfile and numpy raise
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read ({reason}); run the evaluation again into another --output") from None
    sample = Sample(held["index"], held["label"], classes, held["components"], held["variance"])
    if trouble := _trouble(sample):
        raise InputError(f"{path} is damaged: {trouble}; run the evaluation again into another --output")
    return sample


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the file, none read before its size is known to be what its header says, and not too large."""
    with npz.Arrays(path) as arrays:
        total = sum(math.prod(header.shape) * header.dtype.itemsize for header in arrays.headers.values())
        limits.require(path, "sample", total)
        return {name: arrays[name] for name in ARRAYS}


def _trouble(sample: Sample) -> str | None:
    """What is wrong with a sample, in words."""
    index, label, components, variance = sample.index, sample.label, sample.components, sample.variance
    n, k, classes = index.size, variance.size, len(sample.classes)
    shapes = index.shape == (n,) and variance.shape == (k,) and components.shape == (n, k)
    if not n or not k or not shapes or label.shape not in ((n,), (n, classes)):
        return f"index {index.shape}, label {label.shape}, components {components.shape}, variance {variance.shape}"
    if label.dtype.kind != "i" or index.dtype.kind != "i" or {components.dtype, variance.dtype} != {np.dtype("f4")}:
        return (
            f"index of type {index.dtype}, label of type {label.dtype}, components of type {components.dtype}, "
            f"variance of type {variance.dtype}"
        )
    if not np.isfinite(components).all():
        return "a component is not finite"
    if not ((variance >= 0) & (variance < 1.001)).all():  # but for rounding
        return "a share of the variance is not between 0 and 1"
    if label.ndim == 1 and not ((label >= 0) & (label < classes)).all():
        return f"a label is not one of its {classes} classes"
    if label.ndim == 2 and not np.isin(label, (-1, 0, 1)).all():
        return "a label is not 1, 0 or -1"
    return None
