"""Spread over trials, and over the test images; the two are never mixed. See docs/statistics.md."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moco_eval.results.metrics import (
    TRUE,
    among_best,
    mean_where_any,
    overlap,
    rankings,
    weighted_mean_average_precision,
)

# what the trials of a record vary (its `over`), said of several
REPEATS = {"head": "heads", "labels": "label draws", "finetune": "fine-tunings", "pretrain": "pretrainings"}
RESAMPLES = 2000
POWER_FACTOR = 2.8016  # 97.5 % and 80 % quantiles of the standard normal distribution, added: 1.9600 + 0.8416
BLOCK = 2**22  # drawn images held at once


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); None for a single value."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None


def summarise(trials: Sequence[dict[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Mean of each metric over trials, and its standard deviation where there are several."""
    means, stds = {}, {}
    for name in trials[0]:
        means[name], std = mean_and_std([trial[name] for trial in trials])
        if std is not None:
            stds[name] = std
    return means, stds


# Intervals over test images


@dataclass(frozen=True)
class Answers:
    """What one run's trials said of the test images.

    Args:
        labels: class of each image, (N,); or for several labels an image (N, C): 1 there, 0 not there, -1 ignored;
            of masks the pixels of each class, (N, C).
        predictions: (trials, N) classes; the highest score where not given.
        scores: (trials, N, C).
        pixels: of masks, (trials, N, 3, C), with the rows of `metrics.overlap`.
    """

    labels: np.ndarray
    predictions: np.ndarray | None = None
    scores: np.ndarray | None = None
    pixels: np.ndarray | None = None

    def __post_init__(self) -> None:
        given = [answers for answers in (self.predictions, self.scores, self.pixels) if answers is not None]
        assert given and all(answers.shape[1] == len(self.labels) for answers in given)

    @classmethod
    def of_pixels(cls, pixels: np.ndarray) -> "Answers":
        """Of masks; the truth is the same in every trial."""
        return cls(pixels[0, :, TRUE], pixels=pixels)

    def right(self, top: int = 1) -> np.ndarray:
        """In what share of the trials each image was classified rightly, (N,)."""
        assert self.labels.ndim == 1, "several labels an image: take mAP"
        if top == 1:
            chosen = self.predictions if self.predictions is not None else self._scores().argmax(axis=2)
            return (chosen == self.labels).mean(axis=0)
        return np.mean([_among_best(trial, self.labels, top) for trial in self._scores()], axis=0)

    def _scores(self) -> np.ndarray:
        assert self.scores is not None, "this metric needs scores"
        return self.scores


def _among_best(scores: np.ndarray, labels: np.ndarray, top: int) -> np.ndarray:
    """Whether each image's class is among its `top` highest scores; ties fall as they do in the metric itself."""
    import torch

    return among_best(torch.from_numpy(scores), torch.from_numpy(labels), top).numpy()


def intervals(
    metrics: Sequence[str],
    labels: np.ndarray,
    *,
    predictions: np.ndarray | None = None,
    scores: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """95 % percentile bootstrap interval over test images of each metric, averaged over trials, in percent.

    Args:
        metrics: of top1, top5, mean_per_class (from (N,) labels) and mAP (from (N, C) labels).
        labels, predictions, scores: see `Answers`.
    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    answers = Answers(labels, predictions, scores)
    return {name: percentiles(resampled(name, answers, resamples=resamples, seed=seed)) for name in metrics}


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resampled values; resamples that leave the metric undefined are left out."""
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def resampled(
    metric: str, answers: Answers, less: Answers | None = None, *, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """A metric's mean over trials in percent on resampled test images, (resamples,).

    Args:
        less: another run's answers about the same images: the difference `answers` - `less` on the same resamples.
    """
    if metric == "mAP":
        return _resampled_map(answers, less, resamples, seed)
    if answers.pixels is not None:
        return _resampled_overlap(metric, answers.pixels, less.pixels if less else None, resamples, seed)
    assert metric in ("top1", "top5", "mean_per_class"), metric
    top = 5 if metric == "top5" else 1
    right = answers.right(top) - (less.right(top) if less else 0)
    return 100 * resampled_means(right, groups(metric, answers.labels), resamples, seed)


def groups(metric: str, labels: np.ndarray) -> np.ndarray:
    """The group of each image whose means are averaged: its class for the mean per class, else one for all."""
    return labels if metric == "mean_per_class" else np.zeros(len(labels), dtype=int)


def mean_of_means(values: np.ndarray, group: np.ndarray) -> float:
    """Mean over groups of each group's mean."""
    _, group = np.unique(group, return_inverse=True)
    return float((np.bincount(group, values) / np.bincount(group)).mean())


def resampled_means(values: np.ndarray, group: np.ndarray, resamples: int, seed: int = 0) -> np.ndarray:
    """Mean over groups of each group's mean, on images drawn with replacement, (resamples,).

    Images of one group with equal values are alike, so resampling images is drawing how many there are of each such
    kind, from a multinomial distribution: exact, and cheap at any size. A group of which nothing was drawn is left
    out of that resample's mean.

    Args:
        values: one for each image, (N,). group: of each image, (N,).
    """
    kinds, count = np.unique(np.stack([group, values]).astype(np.float64), axis=1, return_counts=True)
    starts = np.flatnonzero(np.diff(kinds[0], prepend=np.nan))  # the first kind of each group
    generator, images, means = np.random.default_rng(seed), len(values), []
    for size in _blocks(resamples, len(count)):
        drawn = generator.multinomial(images, count / images, size=size)
        total = np.add.reduceat(drawn * kinds[1], starts, axis=1)
        means.append(mean_where_any(total, np.add.reduceat(drawn, starts, axis=1), axis=1))
    return np.concatenate(means)


def _blocks(resamples: int, width: int) -> Iterator[int]:
    """How many resamples to do at once, so that memory is bounded."""
    size = max(1, BLOCK // width)
    for start in range(0, resamples, size):
        yield min(size, resamples - start)


# Resampled average precision


def draw_weights(images: int, resamples: int, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each image is drawn in each resample, (images, some resamples), block after block."""
    generator = np.random.default_rng(seed)
    for size in _blocks(resamples, images):
        drawn = generator.integers(0, images, (size, images))
        drawn += np.arange(size)[:, None] * images
        counts = np.bincount(drawn.ravel(), minlength=size * images)
        kind = np.uint16 if counts.max() < 2**16 else np.int32
        yield np.ascontiguousarray(counts.astype(kind).reshape(size, images).T)


def _resampled_map(answers: Answers, less: Answers | None, resamples: int, seed: int) -> np.ndarray:
    ours, theirs = ([rankings(trial, run.labels) for trial in run._scores()] if run else [] for run in (answers, less))
    parts = []
    for weights in draw_weights(len(answers.labels), resamples, seed):
        value = np.mean([weighted_mean_average_precision(ranked, weights) for ranked in ours], axis=0)
        if theirs:
            value = value - np.mean([weighted_mean_average_precision(ranked, weights) for ranked in theirs], axis=0)
        parts.append(value)
    return np.concatenate(parts)


def _resampled_overlap(
    metric: str, pixels: np.ndarray, less: np.ndarray | None, resamples: int, seed: int
) -> np.ndarray:
    """Sums over the drawn images, then the metric of them."""
    parts = []
    for weights in draw_weights(pixels.shape[1], resamples, seed):
        drawn = weights.astype(np.float64).T
        means = [_mean_overlap(metric, drawn, one) for one in (pixels, less) if one is not None]
        parts.append(means[0] if less is None else means[0] - means[1])
    return 100 * np.concatenate(parts)


def _mean_overlap(metric: str, drawn: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    sums = [(drawn @ counts.reshape(len(counts), -1)).reshape(-1, *counts.shape[1:]) for counts in pixels]
    return np.mean([overlap(metric, part) for part in sums], axis=0)


def value(metric: str, answers: Answers) -> float:
    """The metric itself, mean over trials, in percent: the same definition as is resampled."""
    if metric == "mAP":
        every, trials = np.ones((len(answers.labels), 1), dtype=np.int64), answers._scores()
        return float(
            np.mean([weighted_mean_average_precision(rankings(trial, answers.labels), every)[0] for trial in trials])
        )
    if answers.pixels is not None:
        return 100 * float(np.mean(overlap(metric, answers.pixels.sum(axis=1))))
    return 100 * mean_of_means(answers.right(5 if metric == "top5" else 1), groups(metric, answers.labels))


# Two runs on the same test images


@dataclass(frozen=True)
class Difference:
    """A paired difference over test images: `standard_error` and 95 % `interval` in percent, two-sided `p`."""

    interval: tuple[float, float]
    p: float
    standard_error: float

    @property
    def detectable(self) -> float:
        """The difference that a test of this standard error finds at 5 % in 80 % of such samples.

        Source: Card et al. 2020, arXiv:2010.06595, on why a test's power belongs beside its p.
        """
        return POWER_FACTOR * self.standard_error


def paired(metric: str, a: Answers, b: Answers, resamples: int, seed: int = 0) -> Difference:
    """Paired bootstrap of the difference b - a of a metric (each run's mean over its trials).

    The p value inverts the percentile interval: twice the share of resamples at or beyond no difference on the side
    where there are fewer, each end counted once more, so that it is never 0; for equal runs it is 1.
    """
    values = resampled(metric, b, a, resamples=resamples, seed=seed)
    values = values[~np.isnan(values)]
    beyond = min((values <= 1e-9).sum(), (values >= -1e-9).sum())  # thirds and fifths do not cancel to the bit
    p = min(1.0, 2 * (1 + beyond) / (1 + len(values)))
    return Difference(percentiles(values), float(p), float(values.std(ddof=1)))


def mcnemar(a: np.ndarray, b: np.ndarray) -> tuple[int, int, float]:
    """McNemar's exact test of two classifiers on the same images.

    Args:
        a, b: whether each classified each image rightly, (N,) booleans.
    Returns:
        On how many images only a was right, on how many only b, and the two-sided p value.
    Source: McNemar 1947, Psychometrika 12(2); exact by the binomial distribution.
    """
    from scipy.stats import binomtest

    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return only_a, only_b, float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
