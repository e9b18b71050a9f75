"""Small timed pieces of a protocol's own work, on random features of the right shape."""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from moco_eval.runtime.device import wait_for

LEAST = 1.0  # seconds that a part of a forecast may take at least
ROWS = 8192  # random features at most


@dataclass(frozen=True)
class Probe:
    """How many images, features and classes a protocol works on, and how long its pieces may be timed."""

    train: int
    test: int
    dim: int
    classes: int
    device: torch.device
    seconds: float

    def rows(self, count: int) -> torch.Tensor:
        """Random features, (count or ROWS, dim)."""
        return torch.rand(min(count, ROWS), self.dim)

    def labels(self) -> torch.Tensor:
        """Random labels of as many as there are training images."""
        return torch.randint(self.classes, (min(self.train, ROWS),), device=self.device)

    def one_class(self, count: int) -> np.ndarray:
        """1 for every image of one class in turn, -1 for the others."""
        return np.where(np.arange(count) % max(2, min(self.classes, count // 8)) == 0, 1, -1)

    def scaled(self, piece: Callable[[int], None], whole: int, seconds: float, size: int = 1) -> float:
        """Seconds of a whole piece of work, from the largest part of it for which a third of the time is enough."""
        piece(size)  # warms up
        while True:
            began = time.perf_counter()
            piece(size)
            wait_for(self.device)
            took = time.perf_counter() - began
            if size >= whole or took > seconds / 6:
                return took * whole / size
            size = min(whole, max(size + 1, int(size * min(8.0, seconds / 3 / max(took, 1e-6)))))

    @contextlib.contextmanager
    def threads(self, number: int) -> Iterator[None]:
        """So many threads of torch's for a moment."""
        before = torch.get_num_threads()
        torch.set_num_threads(number)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def start_processes() -> tuple[float, float]:
    """Seconds until joblib's processes are there, and how many of them this machine really serves at once."""
    from joblib import Parallel, cpu_count, delayed

    jobs, run = cpu_count(), Parallel(n_jobs=cpu_count())
    features, target = np.random.default_rng(0).random((1000, 64)), np.where(np.arange(1000) % 10 == 0, 1, -1)
    work = delayed(_fit_a_little)(features, target)

    def seconds(copies: int) -> float:
        began = time.perf_counter()
        run([work] * copies)
        return time.perf_counter() - began

    started, alone, together = seconds(jobs), seconds(1), seconds(jobs)
    return max(0.0, started - together), min(float(jobs), max(1.0, jobs * alone / together))


def _fit_a_little(features: np.ndarray, target: np.ndarray) -> None:
    """What each process is given: three linear SVMs, as cross-validation fits them."""
    from sklearn.svm import LinearSVC

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged
        for fold in range(3):
            rows = np.arange(len(features)) % 3 != fold
            LinearSVC(C=1.0, tol=1e-4, dual=True, max_iter=200, random_state=0).fit(features[rows], target[rows])
