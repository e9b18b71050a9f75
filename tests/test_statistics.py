"""Spread over trials and over test images."""

import numpy as np
import pytest

from moco_eval.statistics import bootstrap_interval, mean_and_std, summarise


def test_mean_and_sample_deviation():
    assert mean_and_std([1.0, 2.0, 6.0]) == (3.0, pytest.approx(7**0.5))
    assert mean_and_std([4.0]) == (4.0, None)
    assert summarise([{"top1": 1.0}, {"top1": 3.0}]) == ({"top1": 2.0}, {"top1": pytest.approx(2**0.5)})


def test_interval_is_the_bootstrap_over_images_of_the_mean_over_trials():
    generator = np.random.default_rng(1)
    correct = generator.random((3, 400)) < np.linspace(0.2, 1, 400)
    naive = [100 * correct[:, generator.integers(0, 400, 400)].mean() for _ in range(4000)]
    assert bootstrap_interval(correct) == pytest.approx(np.percentile(naive, [2.5, 97.5]), abs=0.4)
    low, high = bootstrap_interval(correct)
    assert low < 100 * correct.mean() < high


def test_all_right_leaves_no_doubt_that_images_could_tell():
    assert bootstrap_interval(np.ones((2, 50), dtype=bool)) == (100, 100)
