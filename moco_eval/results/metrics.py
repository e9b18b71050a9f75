"""What is made of class scores: accuracy, its mean over classes, average precision. All in percent."""

import numpy as np
import torch

from moco_eval.errors import InputError


def accuracy(scores: torch.Tensor, labels: torch.Tensor, top: int = 1) -> float:
    """Top-k accuracy in percent; 100 where there are no more classes than k.

    Args:
        scores: (N, C); labels: (N,).
    """
    if top == 1:
        return 100 * (scores.argmax(dim=1) == labels).double().mean().item()
    best = scores.topk(min(top, scores.shape[1]), dim=1).indices
    return 100 * (best == labels[:, None]).any(dim=1).double().mean().item()


def mean_per_class(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 accuracy of each class that has images, averaged over these classes, in percent.

    Args:
        scores: (N, C); labels: (N,).
    """
    right = (scores.argmax(dim=1) == labels).double()
    images = torch.bincount(labels, minlength=scores.shape[1])
    each = torch.bincount(labels, weights=right, minlength=scores.shape[1])[images > 0] / images[images > 0]
    return 100 * each.mean().item()


def mean_average_precision(
    scores: torch.Tensor | np.ndarray, labels: torch.Tensor | np.ndarray, points: str = "area"
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
    scores, shown = scores[labels >= 0], labels[labels >= 0] > 0
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], np.cumsum(shown[order])
    last = np.append(scores[1:] != scores[:-1], True)  # of the images with one score
    return (right / np.arange(1, len(right) + 1))[last], (right / right[-1])[last]


LEVELS = np.arange(0.0, 1.1, 0.1)  # recalls of the 11-point rule; the fourth is a little more than 0.3


def eleven_point(recall: np.ndarray, precision: np.ndarray) -> float:
    """VOC2007's AP: the mean over recalls 0, 0.1, ..., 1 of the best precision from there on; (D,) each."""
    best = np.append(_envelope(precision), 0.0)
    return float(best[np.searchsorted(recall, LEVELS)].mean())


def area_under(recall: np.ndarray, precision: np.ndarray) -> float:
    """VOC2010's AP: the area under precision made monotonous from the right."""
    return float(np.sum(np.diff(recall, prepend=0.0) * _envelope(precision)))


def _envelope(precision: np.ndarray) -> np.ndarray:
    return np.maximum.accumulate(precision[::-1])[::-1]
