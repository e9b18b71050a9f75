"""Multinomial logistic regression on frozen features: a path over C on a held-out part, one refit, one test.

The objective is scikit-learn's, divided by C and the number of images: the mean cross entropy of N images in nats plus
|W|^2 / (2 C N); the intercepts are free. Two solvers reach the same optimum: scikit-learn's, and torch's L-BFGS on any
device, a block of images at a time, in coordinates in which the features are uncorrelated: there it needs a tenth of
the iterations.

Source: Kornblith et al. 2019, arXiv:1805.08974, appendix; linusericsson/ssl-transfer@416913f, linear.py.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal
from typing import Protocol as Interface

import numpy as np
import torch

from moco_eval.classification.probe import LEAST, ROWS, Probe, start_processes
from moco_eval.classification.task import Code, Outcome, Passes, Task, clean_features
from moco_eval.config.classification import LogisticConfig
from moco_eval.data.label_subsets import held_out
from moco_eval.errors import InputError, RunFailed
from moco_eval.results.metrics import accuracy, mean_per_class
from moco_eval.runtime.console import warn
from moco_eval.runtime.device import with_float64
from moco_eval.runtime.rank import is_main

Measure = Callable[[torch.Tensor, torch.Tensor], float]  # (scores, labels) to percent
CPU = torch.device("cpu")
BLOCK = 65536  # images whose logits are held at a time
LARGEST = 2**30  # bytes of a covariance; where one would be larger and images are fewer, they span the coordinates
RESIDENT = 4 * 2**30  # bytes of features that are kept in a CPU's memory in float64; more are read block by block
# of L-BFGS in uncorrelated coordinates, as seen on the digits: iterations for each C of a path and for the last fit,
PATH_ITERATIONS, LAST_ITERATIONS = 25, 150
LONGEST_PART = 0.43  # and what the costliest of a path's five parts has of them
SIZES = (1e-6, 1e6)  # standard deviations of features between which a C regularises; encoders give 0.001 to 100
SUBPATH = 9  # values of C that start from one another; fixed, so that the number of processes moves no number


# The protocol


def check(task: Task, config: LogisticConfig) -> None:
    """Raises InputError where no class has an image to spare for the choice of C."""
    labels = task.training_images(config.seed).labels
    assert labels is not None
    if config.path.count > 1:
        _require_some(held_out(labels, config.held_out, config.seed)[1])


def passes(_config: LogisticConfig, train: int, test: int) -> Passes:
    """Every image once."""
    return Passes(extracted=train + test)


def run_trial(
    task: Task, config: LogisticConfig, seed: int, _state: Path | None, device: torch.device
) -> Outcome | None:
    """Extract what is missing, then `on_features`; None on ranks but the first."""
    images = task.training_images(seed)
    train, test = (task.features(part, config, device) for part in (images, task.test))
    further = task.further_features(config, device)
    if not is_main():
        return None
    assert images.labels is not None
    measure = mean_per_class if images.metric == "mean_per_class" else accuracy
    return on_features(train, images.labels, test, config, seed, device, measure, further)


def on_features(
    train: "Rows",
    labels: np.ndarray,
    test: "Rows",
    config: LogisticConfig,
    seed: int,
    device: torch.device,
    measure: Measure = accuracy,
    further: Mapping[str, "Rows"] = MappingProxyType({}),
) -> Outcome:
    """The protocol on features that are there: choose C on held-out images, refit on all, score the test images.

    Args:
        train, test: (N, D); labels: (N,), each class at least once.
        measure: of the held-out images, by which C is chosen.
        further: features of further test images by their splits, which are scored too.
    Raises:
        InputError: no class has an image to spare for the choice of C, or the features are of such a size that no C of
            the path means anything.
    """
    _require_size(train)
    asked, device = device, with_float64(device)
    settings = SolverSettings(config.tolerance, config.max_iterations)
    path = costs(config.path.low, config.path.high, config.path.count)
    points = _points(train, labels, path, config.solver, config.held_out, seed, device, settings, measure)
    best = choose(points)
    everything = resident(train, device if config.solver == "torch" else CPU)
    fit = fit_by(config.solver, everything, labels, best.C, device, settings)
    notes: dict[str, Any] = {
        "chosen": {"C": best.C},
        "solver": config.solver,
        "path": [asdict(point) for point in points],
    }
    notes["loss"] = loss(everything, labels, fit, device)
    if asked != device:
        notes["fitted_on"] = f"{device}, as {asked.type} has no float64"
    if troubles := _troubles(points, best, fit, settings):
        notes["deviations"] = troubles
    also = {split: scores(features, fit, device) for split, features in further.items()}
    return Outcome(scores(test, fit, device), len(labels) + test.shape[0], notes, further=also)


def _points(
    train: "Rows",
    labels: np.ndarray,
    path: np.ndarray,
    solver: Literal["sklearn", "torch"],
    share: float,
    seed: int,
    device: torch.device,
    settings: "SolverSettings",
    measure: Measure,
) -> list["PathPoint"]:
    """The path over C on a part of the training images; a single C needs none."""
    from joblib import cpu_count

    if len(path) == 1:
        return [PathPoint(float(path[0]), None, 0, True)]
    kept, held = held_out(labels, share, seed)
    _require_some(held)
    place = device if solver == "torch" else CPU
    fit, choice = ((resident(Taken(train, rows), place), labels[rows]) for rows in (kept, held))
    return follow(fit, choice, path, solver, device, settings, cpu_count(), measure)


def _require_some(held: np.ndarray) -> None:
    if not len(held):
        raise InputError(
            "every class has only one training image, so none can be held out to choose C; take more labels, or "
            "one C alone: --set path.count=1 --set path.low=1.0"
        )


def _require_size(features: "Rows") -> None:
    """Raises InputError where the features' standard deviation is far from what a C is chosen for."""
    rows = np.asarray(features[np.arange(0, features.shape[0], max(1, features.shape[0] // 256))], dtype=np.float64)
    deviation = float(np.sqrt(rows.var(axis=0).mean()))
    if deviation and not SIZES[0] <= deviation <= SIZES[1]:
        raise InputError(
            f"the features have a standard deviation of {deviation:.1e}: at that size every C regularises alike; "
            "take another --feature, or divide the network's output by that number (moco_eval.wrap)"
        )


def _troubles(points: Sequence["PathPoint"], best: "PathPoint", fit: "Fit", settings: "SolverSettings") -> list[str]:
    """In words, and as warnings: fits that were stopped early; a C at the end of its path only warns."""
    late = sum(not point.converged for point in points)
    ends = f"stopped after {settings.max_iterations} iterations, before the tolerance {settings.tolerance:g}"
    troubles = [f"{late} of {len(points)} fits of the path over C {ends}"] if late else []
    troubles += [] if fit.converged else [f"the fit at the chosen C {fit.C:.3g} {ends}"]
    for trouble in troubles:
        warn(f"{trouble}; --set max_iterations={10 * settings.max_iterations} allows more")
    if best.C in (points[0].C, points[-1].C) and len(points) > 1:
        warn(f"the chosen C {best.C:.3g} is at the end of its path; widen --set path.low=... or path.high=...")
    return troubles


# Features


class Rows(Interface):
    """(N, D) features by slice: an array, a tensor, or a memory-mapped cache."""

    @property
    def shape(self) -> Any: ...

    def __getitem__(self, rows: Any) -> Any: ...


@dataclass(frozen=True)
class Taken:
    """Some rows of features that are too many to copy."""

    features: Rows
    index: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, D)."""
        return len(self.index), self.features.shape[1]

    def __getitem__(self, rows: slice) -> Any:
        return self.features[self.index[rows]]


def resident(features: Rows, device: torch.device) -> Rows:
    """The features in the memory and arithmetic of a device where they fit; else as they are."""
    numbers = features.shape[0] * features.shape[1]
    if device.type == "cpu":
        return np.asarray(features[:], dtype=np.float64) if 8 * numbers <= RESIDENT else features
    free, _ = torch.cuda.mem_get_info(device)
    if 4 * numbers > free / 2:
        return features
    held = torch.empty(*features.shape, device=device)
    for part, rows in _blocks(features, device, BLOCK):
        held[part] = rows
    return held


# One fit


@dataclass(frozen=True)
class Fit:
    """One classifier: `weight` (classes, D) and `bias` (classes,), float64, and how the solver ended.

    `converged`: the gradient is within the tolerance, or the objective no longer falls in the arithmetic used.
    """

    weight: np.ndarray
    bias: np.ndarray
    C: float
    iterations: int
    converged: bool


@dataclass(frozen=True)
class PathPoint:
    """A place on the path over C: the metric of its held-out images in percent (None where there is no choice), and how
    its fit ended."""

    C: float
    held_out: float | None
    iterations: int
    converged: bool


@dataclass(frozen=True)
class SolverSettings:
    """Where a solver stops: at a gradient whose largest entry is within `tolerance`, or after so many iterations.

    scikit-learn takes the gradient by weights, torch's by the uncorrelated coordinates.
    """

    tolerance: float = 1e-5
    max_iterations: int = 1000


def costs(low: float, high: float, count: int) -> np.ndarray:
    """`count` values of C, evenly spaced in their logarithm, from strong to weak regularisation."""
    return np.geomspace(low, high, count)


def scores(features: Rows, fit: Fit, device: torch.device = CPU) -> torch.Tensor:
    """Logits on the CPU, (N, classes) float32."""
    weight, bias = (torch.as_tensor(array, dtype=torch.float32, device=device) for array in (fit.weight, fit.bias))
    return torch.cat([torch.addmm(bias, rows.float(), weight.T).cpu() for _, rows in _blocks(features, device, BLOCK)])


def loss(features: Rows, labels: np.ndarray, fit: Fit, device: torch.device = CPU, block: int = BLOCK) -> float:
    """The objective of a classifier: mean cross entropy in nats plus |W|^2 / (2 C N)."""
    weight, bias, y = (torch.as_tensor(array, device=device) for array in (fit.weight, fit.bias, labels))
    return loss_and_gradient(features, y, weight, bias, fit.C, block)[0].item()


def loss_and_gradient(
    features: Rows,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    C: float,
    block: int = BLOCK,
    mean: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The objective and its gradient, accumulated in float64 over blocks of images.

    Args:
        features: (N, D); a block at a time goes to the weights' device.
        labels: (N,) int64, there.
        weight: (classes, D) and bias: (classes,), float64. Products are in float64 on a CPU, in float32 on a GPU.
        mean: subtracted from each image's features, (D,); `bias` then belongs to the centred features.
    Returns:
        The objective, and its gradient by weight and by bias, float64.
    """
    arithmetic = _arithmetic(weight.device)
    W, b = weight.to(arithmetic), bias.to(arithmetic)
    value, by_weight, by_bias = weight.square().sum() / (2 * C), weight / C, torch.zeros_like(bias)
    for part, rows in _blocks(features, weight.device, block):
        X, y = rows.to(arithmetic), labels[part, None]
        X = X if mean is None else X - mean.to(arithmetic)
        log_p = torch.addmm(b, X, W.T).log_softmax(dim=1)
        value = value - log_p.gather(1, y).sum(dtype=torch.float64)
        error = log_p.exp_().scatter_add_(1, y, X.new_full(y.shape, -1.0))  # probabilities minus one-hot labels
        by_weight = by_weight + error.T @ X
        by_bias = by_bias + error.sum(dim=0, dtype=torch.float64)
    N = features.shape[0]
    return value / N, by_weight / N, by_bias / N


def _arithmetic(device: torch.device) -> torch.dtype:
    return torch.float64 if device.type == "cpu" else torch.float32


def _blocks(features: Rows, device: torch.device, block: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Consecutive rows on a device, and where they stand."""
    for start in range(0, features.shape[0], block):
        part = slice(start, min(start + block, features.shape[0]))
        yield part, torch.as_tensor(features[part]).to(device, non_blocking=True)


def fit_sklearn(
    features: np.ndarray,
    labels: np.ndarray,
    C: float,
    start: Fit | None = None,
    settings: SolverSettings = SolverSettings(),
) -> Fit:
    """Minimise the objective by scikit-learn's LogisticRegression (L-BFGS).

    Args:
        features: (N, D) float64; in float32 scikit-learn stops early.
        labels: (N,), every class of 0 ... classes - 1 at least once.
        C: the inverse of the regularisation of the summed cross entropy.
        start: the solution at another C.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    two = labels.max() == 1  # then it fits one vector w, for the softmax's -w/2 and w/2: half the penalty
    model = LogisticRegression(
        C=2 * C if two else C, tol=settings.tolerance, max_iter=settings.max_iterations, warm_start=start is not None
    )
    centre = features.mean(axis=0)  # the same objective; away from the origin the intercept would hardly move
    if start is not None:
        places = (start.weight, start.bias + start.weight @ centre)
        model.coef_, model.intercept_ = (part[1:] - part[:1] if two else part.copy() for part in places)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(features - centre, labels)
    weight, bias = model.coef_, model.intercept_ - model.coef_ @ centre
    if two:
        weight, bias = (np.concatenate([-part / 2, part / 2]) for part in (weight, bias))
    stopped = any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    return Fit(weight, bias, C, int(model.n_iter_.max()), converged=not stopped)


@dataclass(frozen=True)
class Uncorrelated:
    """Coordinates in which features are centred and uncorrelated: (x - mean) @ vectors has variances `values`.

    Attributes:
        vectors: (D, D); or (D, R) where the R directions are those that the images span, which hold every optimum.
        rows: then the images in these coordinates, (N, R).
    """

    mean: torch.Tensor
    vectors: torch.Tensor
    values: torch.Tensor
    rows: torch.Tensor | None = None

    def scale(self, C: float, images: int, classes: int) -> torch.Tensor:
        """Of each coordinate, (D,), so that the objective's curvature is about one at even probabilities."""
        return (self.values * (1 - 1 / classes) / classes + 1 / (C * images)).rsqrt()

    def coordinates(self, features: Rows, block: int) -> torch.Tensor:
        """(N, R) of features among those that the coordinates were made of."""
        assert self.rows is not None
        if features.shape[0] == len(self.rows):
            return self.rows
        blocks = _blocks(features, self.mean.device, block)
        return torch.cat([(rows.double() - self.mean) @ self.vectors for _, rows in blocks])


def uncorrelated(features: Rows, device: torch.device = CPU, block: int = BLOCK) -> Uncorrelated:
    """The eigenvectors of the covariance, float64, in two passes over blocks of rows.

    Raises:
        RunFailed: neither the dimensions nor the images are few enough for this machine's memory.
    """
    (N, D), arithmetic = features.shape, _arithmetic(device)
    wide = D > N and 8 * D**2 > LARGEST
    _require_memory(8 * (N**2 + 2 * N * D if wide else 3 * D**2), N, D, device)
    mean = sum(rows.sum(dim=0, dtype=torch.float64) for _, rows in _blocks(features, device, block)) / N
    if wide:
        return _spanned(features, mean, max(1, LARGEST // (8 * D)))
    covariance = torch.zeros(D, D, dtype=torch.float64, device=device)
    for _, rows in _blocks(features, device, block):
        centred = rows.to(arithmetic) - mean.to(arithmetic)
        covariance += centred.T @ centred
    values, vectors = torch.linalg.eigh(covariance / N)
    return Uncorrelated(mean, vectors, values.clamp(min=0))


def _spanned(features: Rows, mean: torch.Tensor, block: int) -> Uncorrelated:
    """The same by the products of images with each other, (N, N), where they are fewer than dimensions."""
    N, device = features.shape[0], mean.device
    products = torch.zeros(N, N, dtype=torch.float64, device=device)
    for one, rows in _blocks(features, device, block):
        for other, columns in _blocks(features, device, block):
            if other.start <= one.start:
                products[one, other] = (rows.double() - mean) @ (columns.double() - mean).T
    squares, directions = torch.linalg.eigh(products)  # reads the lower half
    kept = squares > N * torch.finfo(torch.float64).eps * squares[-1]  # the rest is rounding
    lengths, directions = squares[kept].sqrt(), directions[:, kept]
    vectors = sum((rows.double() - mean).T @ directions[part] for part, rows in _blocks(features, device, block))
    return Uncorrelated(mean, vectors / lengths, squares[kept] / N, directions * lengths)


def _require_memory(needed: int, N: int, D: int, device: torch.device) -> None:
    """Raises RunFailed where a fit takes more memory than there is."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[1]
    if needed > there:
        raise RunFailed(
            f"logistic regression on {D:,} dimensions of {N:,} images takes {needed / 1e9:,.0f} GB and "
            f"{'the GPU' if device.type == 'cuda' else 'this machine'} has {there / 1e9:,.0f} GB; take a --feature of "
            "fewer dimensions, or --set solver=sklearn"
        )


def fit_torch(
    features: Rows,
    labels: np.ndarray,
    C: float,
    device: torch.device,
    start: Fit | None = None,
    settings: SolverSettings = SolverSettings(),
    axes: Uncorrelated | None = None,
    block: int = BLOCK,
) -> Fit:
    """Minimise the same objective by torch's L-BFGS (strong Wolfe) on a device, `block` images at a time.

    Args: as `fit_sklearn`, but features of any precision, which may be larger than the memory.
        axes: of these features, where the caller has them already.
    """
    classes, y = int(labels.max()) + 1, torch.as_tensor(labels, device=device)
    axes = axes or uncorrelated(features, device, block)
    scale = axes.scale(C, features.shape[0], classes)
    spanned = axes.rows is not None
    basis = scale.diag() if spanned else axes.vectors * scale
    rows, mean = (axes.coordinates(features, block), None) if spanned else (features, axes.mean)
    place = torch.zeros(classes, len(scale), dtype=torch.float64, device=device)  # the weight is place @ basis.T
    bias = place.new_zeros(classes)  # of the centred features
    if start is not None:
        weight = torch.as_tensor(start.weight, device=device)
        place = weight @ axes.vectors / scale
        bias = torch.as_tensor(start.bias, device=device) + weight @ axes.mean

    def closure() -> torch.Tensor:
        value, by_weight, bias.grad = loss_and_gradient(rows, y, place @ basis.T, bias, C, block, mean)
        place.grad = by_weight @ basis
        return value

    iterations, converged = _minimise([place, bias], closure, settings)
    weight = place @ basis.T @ axes.vectors.T if spanned else place @ basis.T
    return Fit(weight.cpu().numpy(), (bias - weight @ axes.mean).cpu().numpy(), C, iterations, converged)


def _minimise(
    places: list[torch.Tensor], closure: Callable[[], torch.Tensor], settings: SolverSettings
) -> tuple[int, bool]:
    """L-BFGS in place; how many iterations it took, and whether it ended before it was stopped."""
    evaluations = 2 * settings.max_iterations
    exact = places[0].device.type == "cpu"  # elsewhere products are in float32, and a loss is known to 1e-9
    optimizer = torch.optim.LBFGS(
        places,
        max_iter=settings.max_iterations,
        max_eval=evaluations,
        tolerance_grad=settings.tolerance,
        tolerance_change=64 * torch.finfo(torch.float64).eps if exact else 1e-9,
        history_size=10,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(closure)
    state = optimizer.state[places[0]]
    steepest = max(place.grad.abs().max().item() for place in places if place.grad is not None)
    stopped = state["n_iter"] >= settings.max_iterations or state["func_evals"] >= evaluations
    return int(state["n_iter"]), not stopped or steepest <= settings.tolerance


def fit_by(
    solver: Literal["sklearn", "torch"],
    features: Rows,
    labels: np.ndarray,
    C: float,
    device: torch.device,
    settings: SolverSettings = SolverSettings(),
    start: Fit | None = None,
    axes: Uncorrelated | None = None,
) -> Fit:
    """The optimum by either solver."""
    if solver == "torch":
        return fit_torch(features, labels, C, device, start, settings, axes)
    return fit_sklearn(np.asarray(features[:], dtype=np.float64), labels, C, start, settings)


# The path over C


def follow(
    train: tuple[Rows, np.ndarray],
    held: tuple[Rows, np.ndarray],
    path: np.ndarray,
    solver: Literal["sklearn", "torch"],
    device: torch.device = CPU,
    settings: SolverSettings = SolverSettings(),
    processes: int = 1,
    measure: Measure = accuracy,
) -> list[PathPoint]:
    """Fit at each C and measure on the held-out images.

    Contiguous parts of the path, each from strong to weak regularisation and each fit from the one before, run in
    `processes` processes on a CPU, which share the features by memory-map; the parts are the same for any number.

    Args:
        train, held: features and labels that fit, and that measure.
    """
    from joblib import Parallel, delayed

    axes = uncorrelated(train[0], device) if solver == "torch" else None
    run = partial(_subpath, train, held, solver=solver, device=device, settings=settings, axes=axes, measure=measure)
    parts = [path[i : i + SUBPATH] for i in range(0, len(path), SUBPATH)]
    shared = device.type == "cpu" and not (axes and axes.rows is not None)  # else too much would be copied
    jobs = min(processes, len(parts)) if shared else 1
    return [point for points in Parallel(n_jobs=jobs)(delayed(run)(part) for part in parts) for point in points]


def _subpath(
    train: tuple[Rows, np.ndarray],
    held: tuple[Rows, np.ndarray],
    path: np.ndarray,
    *,
    solver: Literal["sklearn", "torch"],
    device: torch.device,
    settings: SolverSettings,
    axes: Uncorrelated | None,
    measure: Measure,
) -> list[PathPoint]:
    """Each fit starts from the one before."""
    points, fit = [], None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # a memory-map, which we only read
        for C in path:
            fit = fit_by(solver, *train, float(C), device, settings, fit, axes)
            value = measure(scores(held[0], fit, device), torch.as_tensor(held[1]))
            points.append(PathPoint(fit.C, value, fit.iterations, fit.converged))
    return points


def choose(points: Sequence[PathPoint]) -> PathPoint:
    """The best on held-out images; of equals the most regularised."""
    return max(points, key=lambda point: (point.held_out or 0.0, -point.C))


# A forecast


def own_work(config: LogisticConfig, probe: Probe) -> tuple[float, str]:
    """The iterations of L-BFGS, the path in several processes on a CPU, and starting these; see `task.Code`."""
    probe = replace(probe, device=with_float64(probe.device))
    started, jobs = start_processes() if probe.device.type == "cpu" else (0.0, 1.0)
    part = replace(probe, seconds=max(LEAST, probe.seconds - started) / 2)
    threads = torch.get_num_threads()
    alone = iteration_seconds(part, threads)
    each = iteration_seconds(part, max(1, int(threads / jobs))) if threads > 1 and jobs > 1 else alone
    on_path = config.path.count * PATH_ITERATIONS * (1 - config.held_out) * each / min(jobs, 1 / LONGEST_PART)
    basis = f"{config.path.count} values of C of {PATH_ITERATIONS} iterations, one fit of {LAST_ITERATIONS}"
    return started + on_path + LAST_ITERATIONS * alone, basis


def iteration_seconds(probe: Probe, threads: int) -> float:
    """About how long one iteration of L-BFGS takes on all training images."""
    count = min(probe.train, ROWS)
    features = resident(probe.rows(count), probe.device)
    labels = probe.labels().cpu().numpy()
    labels[-probe.classes :] = np.arange(probe.classes)
    axes = uncorrelated(features, probe.device)
    few = SolverSettings(max_iterations=5)

    def piece(rows: int) -> None:
        some = np.arange(count - rows, count)  # with every class
        fit_torch(features[count - rows :], labels[some], 1.0, probe.device, None, few, axes)

    with probe.threads(threads):
        return probe.scaled(piece, count, probe.seconds, min(count, 4 * probe.classes)) * probe.train / count / 5


def memory(_config: LogisticConfig, probe: Probe) -> float:
    """The features in the solver's arithmetic, beside their copy on a CPU, where they are held; see `task.Code`."""
    numbers = probe.train * probe.dim
    if probe.device.type == "cpu":
        return 12 * numbers if 8 * numbers <= RESIDENT else 0
    return 4 * numbers if 4 * numbers <= torch.cuda.mem_get_info(probe.device)[0] / 2 else 0


CODE = Code(run_trial, passes, check=check, sources=clean_features, own_work=own_work, memory=memory)
