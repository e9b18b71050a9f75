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
    """95 % percentile bootstrap interval of an accuracy in percent, over test images.

    Args:
        correct: whether each test image was classified rightly, (N,) booleans.
    """
    counts = np.random.default_rng(seed).binomial(len(correct), correct.mean(), size=resamples)
    low, high = np.percentile(100 * counts / len(correct), [2.5, 97.5])
    return float(low), float(high)
