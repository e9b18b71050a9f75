"""Which detections of a test split are right, image by image: what an average precision is resampled from.

The boxes are matched to the objects once. Whatever images a resample draws, its AP needs only which image each
detection is in, which is better scored, and at which IoUs it is right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moco_eval import limits
from moco_eval.errors import InputError
from moco_eval.results.metrics import LEVELS, envelope
from moco_eval.runtime import files
from moco_eval.untrusted import npz

NAME = "matches.npz"
IOUS = 10  # .5, .55, ... .95: one bit each
PARTS = {"": range(IOUS), "50": [0], "75": [5]}  # of a metric's name: AP, AP50, AP75
KINDS = ("AP", "APbb", "APmk", "APkp")  # VOC's, and COCO's of boxes, masks and keypoints
RECALLS = {"AP": LEVELS}  # at which precision is averaged, VOC's
COCO_RECALLS = np.linspace(0.0, 1.0, 101)
COLUMNS = ("image", "label", "right", "ignored")


@dataclass(frozen=True)
class Matches:
    """The detections of one trial, matched to the objects by one kind of average precision.

    Attributes:
        kind: one of KINDS.
        images, classes: how many there are.
        image, label: of each detection, (D,); class by class, in each the highest score first.
        right, ignored: of each detection, (D,): bit t says whether it is right, or counts neither way, at the t-th IoU.
        object_image, object_label: of each object that is to be found, (G,).
    """

    kind: str
    images: int
    classes: int
    image: np.ndarray
    label: np.ndarray
    right: np.ndarray
    ignored: np.ndarray
    object_image: np.ndarray
    object_label: np.ndarray

    def average_precision(self, part: str, weights: np.ndarray) -> np.ndarray:
        """AP, AP50 or AP75 in percent where each image counts so many times, (images, R) -> (R,).

        Args:
            part: what follows AP in the name: one of PARTS.
        """
        edges = np.arange(self.classes + 1)
        first, objects = np.searchsorted(self.label, edges), np.bincount(self.object_label, minlength=self.classes)
        rows = [
            self._of_class(label, slice(first[label], first[label + 1]), PARTS[part], weights)
            for label in np.flatnonzero(objects).tolist()
        ]
        there = ~np.isnan(np.stack(rows))
        with np.errstate(invalid="ignore"):
            return 100 * np.where(there, rows, 0).sum(axis=0) / there.sum(axis=0)

    def _of_class(self, label: int, own: slice, ious: Sequence[int], weights: np.ndarray) -> np.ndarray:
        """One class's AP, mean over IoUs, (R,); not a number where no image with an object is drawn."""
        from scipy.sparse import csr_array  # not needed to compare classifications, which is done within a blink

        objects = np.bincount(self.object_image[self.object_label == label], minlength=self.images) @ weights
        image, right, ignored = self.image[own], self.right[own], self.ignored[own]
        peaks = np.flatnonzero(right & sum(1 << iou for iou in ious))  # precision is highest nowhere else
        if not len(peaks):
            return np.where(objects > 0, 0.0, np.nan)
        image, right, ignored = (values[: peaks[-1] + 1] for values in (image, right, ignored))
        segment = np.searchsorted(peaks, np.arange(len(image)))

        def entered(those: np.ndarray) -> np.ndarray:
            """How many of those detections score as high as each peak, (P, R)."""
            places = segment[those], image[those]
            counts = csr_array((np.ones(len(places[0]), np.int32), places), (len(peaks), self.images))
            return np.cumsum(counts @ weights, axis=0)

        every, total = entered(np.ones(len(image), bool)), np.zeros(weights.shape[1])
        for iou in ious:
            passed_over = ignored >> iou & 1 == 1
            counted = every - entered(passed_over) if passed_over.any() else every
            total += _mean_precision(entered(right >> iou & 1 == 1), counted, objects, self._recalls)
        return total / len(ious)

    @property
    def _recalls(self) -> np.ndarray:
        return RECALLS.get(self.kind, COCO_RECALLS)


def _mean_precision(right: np.ndarray, counted: np.ndarray, objects: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """The best precision from each recall on, averaged over recalls: (P, R) counts at the peaks -> (R,)."""
    best = np.vstack([envelope(right / np.maximum(counted, 1)), np.zeros((1, len(objects)))])
    columns, drawn = np.arange(len(objects)), np.maximum(objects, 1)
    wanted = np.ceil(recalls[:, None] * drawn)  # the fewest that reach a recall, (levels, R)
    wanted -= (wanted - 1) / drawn >= recalls[:, None]  # as the division itself rounds
    wanted += wanted / drawn < recalls[:, None]
    step = float(right.max() + objects.max() + 2)  # one resample after the other, as one rising row
    row = (right + columns * step).T.ravel()
    place = np.searchsorted(row, (wanted + columns * step).T.ravel()).reshape(len(columns), -1) - columns[
        :, None
    ] * len(right)
    value = best[np.minimum(place, len(right)), columns[:, None]].mean(axis=1)
    return np.where(objects > 0, value, np.nan)


@dataclass(frozen=True)
class Detected:
    """What a detection's trials found, matched: of each trial by kind of average precision."""

    trials: tuple[dict[str, Matches], ...]

    def __len__(self) -> int:
        """How many test images."""
        return next(iter(self.trials[0].values())).images

    def average_precision(self, metric: str, weights: np.ndarray) -> np.ndarray:
        """A metric's mean over trials in percent where each image counts so many times, (images, R) -> (R,)."""
        kind, part = split_name(metric) or ("", "")
        return np.mean([trial[kind].average_precision(part, weights) for trial in self.trials], axis=0)


def split_name(metric: str) -> tuple[str, str] | None:
    """The kind and the part of a metric's name: APbb and 50 of APbb50; None of a metric that is not resampled."""
    for kind in KINDS:
        if metric.startswith(kind) and metric[len(kind) :] in PARTS:
            return kind, metric[len(kind) :]
    return None


# Files


def write(path: Path, kinds: Sequence[Matches]) -> None:
    """Write the matches of one trial, of each kind of average precision."""
    arrays: dict[str, Any] = {}
    for one in kinds:
        arrays[f"{one.kind}_size"] = np.array([one.images, one.classes])
        for name in (*COLUMNS, "object_image", "object_label"):
            arrays[f"{one.kind}_{name}"] = getattr(one, name)
    with files.atomic(path) as temporary:
        np.savez_compressed(temporary, **arrays)


def read(path: Path) -> dict[str, Matches]:
    """The matches of one trial by kind. Raises InputError where the file is damaged."""
    try:
        arrays = npz.read(path)
        found = {name.removesuffix("_size") for name in arrays if name.endswith("_size")}
        return {kind: _checked(kind, arrays) for kind in KINDS if kind in found}
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file makes numpy raise
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read ({reason}); run the evaluation again into another --output") from None


def _checked(kind: str, arrays: dict[str, np.ndarray]) -> Matches:
    """Raises ValueError where what the arrays say cannot be."""
    images, classes = (int(count) for count in arrays[f"{kind}_size"])
    limits.require("a run's matches", "classes", classes)
    values = {name: arrays[f"{kind}_{name}"] for name in (*COLUMNS, "object_image", "object_label")}
    for name, most in (("image", images), ("label", classes), ("right", 1 << IOUS), ("ignored", 1 << IOUS)):
        for array in (values[name], values.get(f"object_{name}", values[name][:0])):
            if (
                array.ndim != 1
                or array.dtype.kind not in "iu"
                or (len(array) and not 0 <= array.min() <= array.max() < most)
            ):
                raise ValueError(f"{kind}_{name} is no row of whole numbers below {most:,}")
    same = {len(values[name]) for name in COLUMNS}, {len(values[name]) for name in ("object_image", "object_label")}
    if any(len(lengths) > 1 for lengths in same) or (np.diff(values["label"].astype(np.int64)) < 0).any():
        raise ValueError(f"the columns of {kind} do not belong together")
    return Matches(kind, images, classes, **{name: array.astype(np.int64) for name, array in values.items()})
