"""Mean intersection over union, pixel accuracy, and their spread over the test images, from counts of pixels.

Pixels without a class (IGNORED) count neither as prediction nor as truth. All is summed over the whole set before it is
divided.
"""

from collections.abc import Sequence

import numpy as np

from moco_eval.data.masks.samples import IGNORED
from moco_eval.results.statistics import RESAMPLES, draw_weights, percentiles

SHARED, SAID, TRUE = 0, 1, 2  # rows of an image's counts: pixels of both, of the prediction, of the truth


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


def intersection_over_union(counts: np.ndarray) -> np.ndarray:
    """Of each class, (..., C) of counts (..., 3, C), from 0 to 1; not a number where neither has it."""
    shared = counts[..., SHARED, :].astype(np.float64)
    union = counts[..., SAID, :] + counts[..., TRUE, :] - shared
    return np.divide(shared, union, out=np.full(shared.shape, np.nan), where=union > 0)


def metrics_of(counts: np.ndarray) -> dict[str, float]:
    """mIoU (over the classes that truth or prediction has) and pixel accuracy in percent, of counts (3, C)."""
    return {
        "mIoU": 100 * float(np.nanmean(intersection_over_union(counts))),
        "pixel_accuracy": 100 * float(counts[SHARED].sum() / counts[TRUE].sum()),
    }


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
    values: dict[str, list[np.ndarray]] = {"mIoU": [], "pixel_accuracy": []}
    for weights in draw_weights(len(trials[0]), resamples, seed):
        drawn = weights.astype(np.float64).T
        sums = [(drawn @ counts.reshape(len(counts), -1)).reshape(-1, *counts.shape[1:]) for counts in trials]
        values["mIoU"].append(np.mean([_means(intersection_over_union(part)) for part in sums], axis=0))
        shares = [_share(part[:, SHARED].sum(axis=1), part[:, TRUE].sum(axis=1)) for part in sums]
        values["pixel_accuracy"].append(np.mean(shares, axis=0))
    return {name: percentiles(100 * np.concatenate(parts)) for name, parts in values.items()}


def _means(values: np.ndarray) -> np.ndarray:
    """Along the last axis, of what is a number; not one where nothing is."""
    count = (~np.isnan(values)).sum(axis=-1)
    return _share(np.nansum(values, axis=-1), count)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)
