"""Accuracy, its mean over classes and average precision of class scores, in percent; overlap of masks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moco_eval.errors import InputError

if TYPE_CHECKING:
    import torch


def accuracy(scores: "torch.Tensor", labels: "torch.Tensor", top: int = 1) -> float:
    """Top-k accuracy in percent; a class whose score is minus infinity is no guess.

    Args:
        scores: (N, C); labels: (N,).
    """
    if top == 1:
        return 100 * (scores.argmax(dim=1) == labels).double().mean().item()
    return 100 * among_best(scores, labels, top).double().mean().item()


def among_best(scores: "torch.Tensor", labels: "torch.Tensor", top: int) -> "torch.Tensor":
    """Whether each image's class is among its `top` highest scores above minus infinity, (N,)."""
    best = scores.topk(min(top, scores.shape[1]), dim=1)
    return ((best.indices == labels[:, None]) & (best.values > -float("inf"))).any(dim=1)


def mean_per_class(scores: "torch.Tensor", labels: "torch.Tensor") -> float:
    """Top-1 accuracy of each class that has images, averaged over these classes, in percent.

    Args:
        scores: (N, C); labels: (N,).
    """
    right = (scores.argmax(dim=1) == labels).double()
    images = labels.bincount(minlength=scores.shape[1])
    each = labels.bincount(weights=right, minlength=scores.shape[1])[images > 0] / images[images > 0]
    return 100 * each.mean().item()


# Average precision


def mean_average_precision(
    scores: "torch.Tensor | np.ndarray", labels: "torch.Tensor | np.ndarray", points: str = "area"
) -> tuple[np.ndarray, float]:
    """AP of each class over the images, and its mean over the classes, in percent.

    Args:
        scores: (N, C), higher where the class is rather shown.
        labels: (N, C): 1 shown, 0 not, -1 ignored.
        points: 'area': the area under precision made monotonous from the right over recall, one point for each
            score; '11': VOC2007's own, the mean of that precision at recalls 0, 0.1, ..., 1.
    Returns:
        (C,) of which a class without a positive image is NaN, and the mean over the others.
    Raises:
        InputError: no class has a positive image.
    Source: facebookresearch/fair_self_supervision_benchmark@1e5d165, tools/svm/svm_helper.py; Everingham et al. 2010.
        Images of equal score count together here; the official script leaves their order to an unstable sort.
    """
    summary = {"area": area_under, "11": eleven_point}[points]
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    assert scores.shape == labels.shape and scores.ndim == 2
    each = np.full(scores.shape[1], np.nan)
    for label in range(scores.shape[1]):
        if (labels[:, label] > 0).any():
            each[label] = 100 * summary(*precision_recall(scores[:, label], labels[:, label])[::-1])
    if np.isnan(each).all():
        raise InputError("no image of the test split shows any of the classes, so there is no average precision")
    return each, float(np.nanmean(each))


def precision_recall(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall of one class above each of its scores, highest first; both (distinct scores,).

    Args:
        scores: (N,); labels: (N,), 1 shown, 0 not, -1 ignored; at least one is 1.
    """
    order, levels, positive = _ranked(scores, labels)
    last = np.append(np.diff(levels) > 0, True)  # of the images with one score
    right = np.cumsum(positive)
    return (right / np.arange(1, len(order) + 1))[last], (right / right[-1])[last]


def _ranked(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One class's images that are not ignored, highest score first; each (images,).

    Images of equal score enter together, so the order of a file decides nothing.

    Returns:
        Their indices, the level of each (0 for the highest score, 1 for the next) and whether it shows the class.
    """
    used = np.flatnonzero(labels >= 0)
    order = used[np.argsort(-scores[used], kind="stable")]
    ranked = scores[order]
    levels = np.cumsum(np.append(False, ranked[1:] != ranked[:-1])[: len(ranked)])
    return order, levels, labels[order] > 0


LEVELS = np.arange(0.0, 1.1, 0.1)  # recalls of the 11-point rule; the fourth is a little more than 0.3


def eleven_point(recall: np.ndarray, precision: np.ndarray) -> float:
    """VOC2007's AP: the mean over recalls 0, 0.1, ..., 1 of the best precision from there on; (D,) each."""
    best = np.append(_envelope(precision), 0.0)
    return float(best[np.searchsorted(recall, LEVELS)].mean())


def area_under(recall: np.ndarray, precision: np.ndarray) -> float:
    """VOC2010's AP: the area under precision made monotonous from the right."""
    return float(np.sum(np.diff(recall, prepend=0.0) * _envelope(precision)))


def _envelope(precision: np.ndarray) -> np.ndarray:
    """The highest precision at the same or a higher recall, along the first axis."""
    return np.maximum.accumulate(precision[::-1], axis=0)[::-1]


class Ranking:
    """One class's test images by falling score, for the area of `area_under` under any weights of the images.

    Only the levels at which a positive enters are kept: precision peaks nowhere else.

    Args:
        scores: of the class, (N,). labels: 1 there, 0 not there, -1 ignored, (N,).
    """

    def __init__(self, scores: np.ndarray, labels: np.ndarray):
        order, levels, positive = _ranked(scores, labels)
        peaks = np.unique(levels[positive])
        part = np.searchsorted(peaks, levels)  # up to and with which of these each image enters
        inside = part < len(peaks)
        self.order, part, positive = order[inside], part[inside], positive[inside]
        self.starts = np.searchsorted(part, np.arange(len(peaks)))
        self.positive = self.order[positive]
        self.positive_starts = np.searchsorted(part[positive], np.arange(len(peaks)))

    def average_precision(self, weights: np.ndarray) -> np.ndarray:
        """AP (0 to 1) under each column of weights, (N, resamples) -> (resamples,); not a number without positives."""
        if not len(self.positive):
            return np.full(weights.shape[1], np.nan)
        entered = np.add.reduceat(weights[self.order], self.starts, axis=0, dtype=np.int64).cumsum(axis=0)
        new = np.add.reduceat(weights[self.positive], self.positive_starts, axis=0, dtype=np.int64)
        right = new.cumsum(axis=0)
        precision = np.divide(right, entered, out=np.zeros(right.shape), where=entered > 0)
        with np.errstate(invalid="ignore"):
            return (_envelope(precision) * new).sum(axis=0) / right[-1]


def rankings(scores: np.ndarray, labels: np.ndarray) -> list[Ranking]:
    """One of each class, from (N, C) scores and labels."""
    return [Ranking(scores[:, index], labels[:, index]) for index in range(labels.shape[1])]


def weighted_mean_average_precision(ranked: Sequence[Ranking], weights: np.ndarray) -> np.ndarray:
    """`mean_average_precision` in percent under each column of weights, (N, resamples) -> (resamples,).

    Not a number where no class has a positive. With weights of 1 it is that mean but for its last bits: it adds the
    area up in positives, not in recall, as whole numbers.
    """
    each = np.stack([ranking.average_precision(weights) for ranking in ranked])
    return 100 * mean_where_any(np.where(np.isnan(each), 0, each), ~np.isnan(each), axis=0)


def mean_where_any(total: np.ndarray, count: np.ndarray, axis: int) -> np.ndarray:
    """Mean along an axis of total / count where count is not 0; not a number where it is 0 everywhere."""
    ratio = np.divide(total, count, out=np.zeros(total.shape), where=count > 0)
    with np.errstate(invalid="ignore"):
        return ratio.sum(axis=axis) / (count > 0).sum(axis=axis)


# Overlap of masks

SHARED, SAID, TRUE = 0, 1, 2  # rows of an image's counts: pixels of both, of the prediction, of the truth


def intersection_over_union(counts: np.ndarray) -> np.ndarray:
    """Of each class, (..., C) of counts (..., 3, C), from 0 to 1; not a number where neither has it."""
    shared = counts[..., SHARED, :].astype(np.float64)
    union = counts[..., SAID, :] + counts[..., TRUE, :] - shared
    return np.divide(shared, union, out=np.full(shared.shape, np.nan), where=union > 0)


def overlap(metric: str, counts: np.ndarray) -> np.ndarray:
    """mIoU (over the classes that truth or prediction has) or pixel_accuracy, (...) of counts (..., 3, C), from 0 to 1.

    Not a number where there is no pixel.
    """
    if metric == "mIoU":
        each = intersection_over_union(counts)
        return _share(np.nansum(each, axis=-1), (~np.isnan(each)).sum(axis=-1))
    assert metric == "pixel_accuracy", metric
    return _share(counts[..., SHARED, :].sum(axis=-1), counts[..., TRUE, :].sum(axis=-1))


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)
