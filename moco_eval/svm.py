"""VOC07 classification by linear SVMs on frozen features: one per class, its cost by cross-validation; and low-shot.

Source: Goyal et al. 2019, arXiv:1905.01235; facebookresearch/fair_self_supervision_benchmark@1e5d165, tools/svm and
extra_scripts/create_voc_low_shot_samples.py.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moco_eval.errors import InputError

# in the order in which the original tries them: of equals, its first is taken
COSTS = (*(10.0**power for power in range(-7, 3)), *(0.5**power for power in range(4, 20)))
SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)
FOLDS = 3


@dataclass(frozen=True)
class ClassSvm:
    """The SVM of one class.

    Attributes:
        cost: the C chosen, by the highest `validation`: mean average precision over the folds, (costs,).
        scores: of the test images, (images,).
        unconverged: how many fits, those of the folds included, ended at the limit of their iterations.
        folds_without: folds that had no image of the class to find: their average precision is 0 at any C.
    """

    cost: float
    validation: np.ndarray
    scores: np.ndarray
    unconverged: int
    folds_without: int


@dataclass(frozen=True)
class LowShot:
    """Average precision in percent, (costs, classes), of SVMs on one draw of few images; NaN where no image counts.

    `test`: on the test images. `rest`: on the training images that were not drawn, which may choose the cost.
    """

    test: np.ndarray
    rest: np.ndarray
    unconverged: int


def normalise(features: np.ndarray) -> np.ndarray:
    """Rows of unit length (but for 1e-5 in the divisor), (N, D) float64."""
    wide = np.asarray(features, dtype=np.float64)
    return wide / (np.linalg.norm(wide, axis=1, keepdims=True) + 1e-5)


def classifier(cost: float, seed: int, max_iterations: int) -> Any:
    """The original's settings: squared hinge, L2, dual, positives weighted twice; labels are 1 and -1."""
    from sklearn.svm import LinearSVC

    return LinearSVC(
        C=cost,
        class_weight={1: 2, -1: 1},
        intercept_scaling=1.0,
        penalty="l2",
        loss="squared_hinge",
        tol=1e-4,
        dual=True,
        max_iter=max_iterations,
        random_state=seed,
    )


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area in percent under precision made non-increasing in recall; NaN without a positive.

    Args:
        scores: (N,). Of equal ones, the image that comes last is ranked first, as the original's reversed sorting does.
        labels: 1 present, 0 absent, -1 not counted, (N,).
    """
    counted = labels >= 0
    order = np.argsort(scores[counted], kind="stable")[::-1]
    found = (labels[counted] == 1)[order]
    if not found.any():
        return float("nan")
    precision = np.cumsum(found) / np.arange(1, len(found) + 1)
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    return float(100 * best_from_here[found].mean())


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    """(N, classes) int8 in 1 and 0 from one class per image; labels of several classes come back as they are."""
    return labels if labels.ndim == 2 else (labels[:, None] == np.arange(classes)).astype(np.int8)


def fit_classes(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    costs: Sequence[float] = COSTS,
    *,
    seed: int = 0,
    max_iterations: int = 2000,
    processes: int = 1,
) -> list[ClassSvm]:
    """One SVM per class: each cost cross-validated, and the best fitted to all training images.

    Args:
        train, test: (N, D) features, not normalised yet.
        labels: (N, classes) of the training images: 1 present, 0 absent, -1 only difficult objects. As in the original
            those train as absent.
        processes: on this machine; they share the features by memory-map, and their number moves no number.
    Raises:
        InputError: a class has no image, or none without it, or fewer than three of both.
    """
    from joblib import Parallel, delayed

    targets = np.where(labels == 1, 1, -1)
    _require_both(targets)
    train, test = normalise(train), normalise(test)
    tasks = [(target, cost) for target in targets.T for cost in costs]
    run = Parallel(n_jobs=processes)
    validated = run(delayed(_validate)(train, target, cost, seed, max_iterations) for target, cost in tasks)
    table = np.array([value for value, _ in validated]).reshape(len(targets.T), len(costs))
    missed = np.array([count for _, count in validated]).reshape(table.shape).sum(axis=1)
    chosen = [costs[best] for best in table.argmax(axis=1)]
    fitted = run(delayed(_fit)(train, target, cost, seed, max_iterations) for target, cost in zip(targets.T, chosen))
    return [
        ClassSvm(cost, row, model.decision_function(test), int(count) + late, _folds_without(target))
        for cost, row, (model, late), count, target in zip(chosen, table, fitted, missed, targets.T)
    ]


def _require_both(targets: np.ndarray) -> None:
    positives = (targets == 1).sum(axis=0)
    for column, count in enumerate(positives):
        if not 0 < count < len(targets) or max(count, len(targets) - count) < FOLDS:
            raise InputError(
                f"class {column} is in {count} of {len(targets)} training images; an SVM needs images with and without "
                "it. Has the split been cut too short?"
            )


def _validate(train: np.ndarray, target: np.ndarray, cost: float, seed: int, limit: int) -> tuple[float, int]:
    """Mean average precision over the folds, as scikit-learn has it, and how many fits did not converge."""
    from sklearn.model_selection import cross_val_score

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = cross_val_score(
            classifier(cost, seed, limit), train, target, cv=FOLDS, scoring="average_precision", error_score="raise"
        )
    return float(found.mean()), _unconverged(caught)


def _fit(train: np.ndarray, target: np.ndarray, cost: float, seed: int, limit: int) -> tuple[Any, int]:
    """The SVM, and whether (1 or 0) it did not converge."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = classifier(cost, seed, limit).fit(train, target)
    return model, _unconverged(caught)


def _unconverged(caught: Sequence[warnings.WarningMessage]) -> int:
    from sklearn.exceptions import ConvergenceWarning

    return sum(issubclass(one.category, ConvergenceWarning) for one in caught)


def _folds_without(target: np.ndarray) -> int:
    """Folds of the cross-validation whose held-out part has no image of the class."""
    from sklearn.model_selection import StratifiedKFold

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # says what this counts
        return sum(not (target[held] == 1).any() for _, held in StratifiedKFold(FOLDS).split(target, target))


def draw(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """A low-shot sample: for each class `shots` images of it and (classes - 1) times as many without it.

    Args:
        labels: (N, classes) in 1, 0 and -1; only 1 and 0 are drawn from.
        seed: of this sample; each number of shots is drawn on its own.
    Returns:
        `labels` where drawn and -1 elsewhere.
    Raises:
        InputError: a class has too few.
    """
    generator = np.random.default_rng([seed, shots])
    drawn = np.full_like(labels, -1)
    classes = labels.shape[1]
    for column in range(classes):
        for value, wanted in ((1, shots), (0, (classes - 1) * shots)):
            images = np.flatnonzero(labels[:, column] == value)
            if len(images) < wanted:
                kind = "images" if value else "images without it"
                raise InputError(
                    f"{shots} low-shot images per class: class {column} has {len(images)} {kind} and needs {wanted}; "
                    "take fewer, for example --set shots=[1,2]"
                )
            drawn[generator.choice(images, wanted, replace=False), column] = value
    return drawn


def fit_low_shot(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    shots: int,
    costs: Sequence[float] = COSTS,
    *,
    seed: int = 0,
    max_iterations: int = 2000,
    processes: int = 1,
) -> LowShot:
    """SVMs at every cost on one draw; the caller chooses among them.

    Args: as `fit_classes`; `shots` and `seed` as `draw`.
    """
    from joblib import Parallel, delayed

    drawn = draw(labels, shots, seed)
    rest = np.where(drawn == -1, labels, -1)
    train, test = normalise(train), normalise(test)
    columns = Parallel(n_jobs=processes)(
        delayed(_low_shot_class)(train, drawn[:, c], rest[:, c], test, test_labels[:, c], costs, seed, max_iterations)
        for c in range(labels.shape[1])
    )
    on_test, on_rest, late = zip(*columns)
    return LowShot(np.stack(on_test, axis=1), np.stack(on_rest, axis=1), sum(late))


def _low_shot_class(
    train: np.ndarray,
    drawn: np.ndarray,
    rest: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    costs: Sequence[float],
    seed: int,
    limit: int,
) -> tuple[np.ndarray, np.ndarray, int]:
    used = drawn >= 0
    features, target = train[used], np.where(drawn[used] == 1, 1, -1)
    on_test, on_rest, late = [], [], 0
    for cost in costs:
        model, missed = _fit(features, target, cost, seed, limit)
        on_test.append(average_precision(model.decision_function(test), test_labels))
        on_rest.append(average_precision(model.decision_function(train), rest))
        late += missed
    return np.array(on_test), np.array(on_rest), late
