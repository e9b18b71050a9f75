"""Mean intersection over union, pixel accuracy, and their spread over the test images, from counts of pixels.

Pixels without a class (IGNORED) count neither as prediction nor as truth. All is summed over the whole set before it is
divided.
"""

from collections.abc import Sequence

import numpy as np

from moco_eval.data.masks.samples import IGNORED
from moco_eval.results.metrics import intersection_over_union, overlap
from moco_eval.results.statistics import RESAMPLES, Answers, percentiles, resampled

METRICS = ("mIoU", "pixel_accuracy")


def confusion(prediction: np.ndarray, mask: np.ndarray, classes: int) -> np.ndarray:
    """Pixels by true class (rows) and predicted class, (C, C) int64.

    Args:
        prediction: (H, W), classes from 0.
        mask: (H, W), IGNORED where there is none.
    """
    labelled = mask != IGNORED
    pairs = mask[labelled].astype(np.int64) * classes + prediction[labelled]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def counts_of(matrix: np.ndarray) -> np.ndarray:
    """Of a confusion matrix, (3, C): pixels that prediction and truth share, of the prediction, of the truth."""
    return np.stack([np.diag(matrix), matrix.sum(axis=0), matrix.sum(axis=1)])


def metrics_of(counts: np.ndarray) -> dict[str, float]:
    """mIoU (over the classes that truth or prediction has) and pixel accuracy in percent, of counts (3, C)."""
    return {name: 100 * float(overlap(name, counts)) for name in METRICS}


def per_class(counts: np.ndarray, classes: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """IoU of each class in percent; None where neither truth nor prediction has it."""
    values = 100 * intersection_over_union(counts)
    return {name: {"IoU": None if np.isnan(value) else float(value)} for name, value in zip(classes, values)}


def intervals(
    trials: Sequence[np.ndarray], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % percentile bootstrap interval over test images of each metric, averaged over trials, in percent.

    Args:
        trials: of each, counts of the images, (N, 3, C).
    """
    answers = Answers.of_pixels(np.stack(trials))
    return {name: percentiles(resampled(name, answers, resamples=resamples, seed=seed)) for name in METRICS}
