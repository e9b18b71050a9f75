"""Spread: over trials, and over the test images."""

from collections.abc import Sequence

import numpy as np


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


def bootstrap_interval(correct: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval, over test images, of an accuracy in percent averaged over trials.

    Images that were right in equally many trials are alike, so resampling images is drawing how many of each kind
    there are: exact, and cheap at any size.

    Args:
        correct: whether each test image was classified rightly in each trial, (trials, images) booleans.
    """
    trials, images = correct.shape
    kinds = np.bincount(correct.sum(axis=0), minlength=trials + 1) / images  # share of images right in 0..T trials
    drawn = np.random.default_rng(seed).multinomial(images, kinds, size=resamples)
    accuracy = 100 * drawn @ (np.arange(trials + 1) / trials) / images
    low, high = np.percentile(accuracy, [2.5, 97.5])
    return float(low), float(high)
