"""VOC07 classification by linear SVMs on frozen features: one per class, its cost by cross-validation; and low-shot.

Source: Goyal et al. 2019, arXiv:1905.01235; facebookresearch/fair_self_supervision_benchmark@1e5d165, tools/svm and
extra_scripts/create_voc_low_shot_samples.py.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from moco_eval.classification.probe import LEAST, ROWS, Probe, start_processes
from moco_eval.classification.task import Code, Outcome, Passes, Task, clean_features
from moco_eval.config.classification import SvmConfig
from moco_eval.errors import InputError
from moco_eval.features.cache import Features
from moco_eval.results.metrics import accuracy, mean_average_precision
from moco_eval.runtime.console import warn
from moco_eval.runtime.rank import is_main

FOLDS = 3


# The protocol


def passes(_config: SvmConfig, train: int, test: int) -> Passes:
    """Every image once."""
    return Passes(extracted=train + test)


def run_trial(task: Task, config: SvmConfig, seed: int, _state: Path | None, device: torch.device) -> Outcome | None:
    """Extract what is missing, then `on_features` or `low_shot_on_features`; None on ranks but the first."""
    images = task.training_images(seed)
    train, test = (task.features(part, config, device) for part in (images, task.test))
    further = task.further_features(config, device)
    if not is_main():
        return None
    assert images.labels is not None and task.test.labels is not None
    classes = len(task.train.classes)
    labels, test_labels = (one_hot(part, classes) for part in (images.labels, task.test.labels))
    if config.low_shot:
        return low_shot_on_features(train, labels, test, test_labels, config, seed)
    return on_features(train, labels, test, test_labels, config, seed, further)


def check(task: Task, config: SvmConfig) -> None:
    """Raises InputError where a class has too few images."""
    labels = task.training_images(config.seed).labels
    assert labels is not None
    classes = task.train.classes
    targets = one_hot(labels, len(classes))
    if config.low_shot and task.further:
        raise InputError(
            "--also is for one trained state, and low-shot trains many; take --protocol voc07, or leave it"
        )
    if not config.low_shot:
        _require_both(np.where(targets == 1, 1, -1), classes)
    for shots in config.shots:
        draw(targets, shots, config.seed, classes)  # every sample takes as many


def repeated(task: Task, config: SvmConfig) -> Task:
    """Low-shot: a trial is a sample.

    Raises:
        InputError: --trials or --labels with low-shot.
    """
    if task.trials != 1 or task.labels_per_class:
        raise InputError(
            "low-shot draws its own labels: --set shots=[...] says how many, --set samples=N how often; leave out "
            "--labels and --trials"
        )
    return replace(task, trials=config.samples)


def on_features(
    train: Features,
    labels: np.ndarray,
    test: Features,
    test_labels: np.ndarray,
    config: SvmConfig,
    seed: int,
    further: Mapping[str, Features] = MappingProxyType({}),
) -> Outcome:
    """svm/voc07@1 on features that are there.

    Args:
        labels, test_labels: (N, classes) in 1, 0 and -1; see `one_hot`.
        further: features of further test images by their splits, which are scored too.
    """
    from joblib import cpu_count

    tested = test.tensor().numpy()
    if further:
        tested = np.concatenate([tested, *(part.tensor().numpy() for part in further.values())])
    data = (train.tensor().numpy(), labels, tested, config.costs)
    fitted = fit_classes(*data, seed=seed, max_iterations=config.max_iterations, processes=cpu_count())
    ends = np.cumsum([len(part) for part in (test, *further.values())])[:-1]
    scores, *others = np.split(np.stack([svm.scores for svm in fitted], axis=1), ends)
    each, mean = mean_average_precision(scores, test_labels)
    notes: dict[str, Any] = {"C": [svm.cost for svm in fitted], "AP": [_number(value) for value in each]}
    notes |= {"unconverged": sum(svm.unconverged for svm in fitted)}
    fits = len(fitted) * (len(config.costs) * FOLDS + 1)
    notes |= _convergence(notes["unconverged"], fits, config)
    if missing := sum(svm.folds_without for svm in fitted):
        notes["folds_without_the_class"] = missing
        warn(f"{missing} of {len(fitted) * FOLDS} folds have no image of their class: its C is chosen on the others")
    return Outcome(
        torch.from_numpy(scores),
        len(labels) + len(test_labels),
        notes,
        metrics=_metrics(scores, test_labels, mean),
        further={split: torch.from_numpy(part) for split, part in zip(further, others)},
    )


def _metrics(scores: np.ndarray, labels: np.ndarray, mean: float) -> dict[str, float]:
    """mAP, and top-1 where each image shows one class."""
    if (labels < 0).any() or (labels.sum(axis=1) != 1).any():
        return {"mAP": mean}
    return {"top1": accuracy(torch.from_numpy(scores), torch.from_numpy(labels.argmax(axis=1))), "mAP": mean}


def _number(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return None if np.isnan(value) else float(value)


def _convergence(unconverged: int, fits: int, config: SvmConfig) -> dict[str, Any]:
    """Fits that ended at their limit, in words; the original has them too, so it is no deviation."""
    if unconverged:
        warn(
            f"{unconverged} of {fits} SVMs ended at {config.max_iterations} iterations, before scikit-learn's tolerance"
        )
    return {"unconverged": unconverged, "fits": fits}


def low_shot_on_features(
    train: Features, labels: np.ndarray, test: Features, test_labels: np.ndarray, config: SvmConfig, seed: int
) -> Outcome:
    """One sample of svm/voc07-low-shot@1: for each number of shots one C for all classes, the best on the training
    images that were not drawn. Args: as `on_features`."""
    from joblib import cpu_count

    data = (train.tensor().numpy(), labels, test.tensor().numpy(), test_labels)
    settings: dict[str, Any] = {"seed": seed, "max_iterations": config.max_iterations, "processes": cpu_count()}
    fitted = [fit_low_shot(*data, shots, config.costs, **settings) for shots in config.shots]
    chosen = [int(np.nanmean(svms.rest, axis=1).argmax()) for svms in fitted]
    on_test = [np.nanmean(svms.test, axis=1) for svms in fitted]
    metrics = {f"mAP_{shots}": float(by_cost[best]) for shots, by_cost, best in zip(config.shots, on_test, chosen)}
    notes: dict[str, Any] = {
        "C": [config.costs[best] for best in chosen],
        "mAP_by_C": [by_cost.tolist() for by_cost in on_test],
    }
    fits = len(config.shots) * len(config.costs) * labels.shape[1]
    notes |= _convergence(sum(svms.unconverged for svms in fitted), fits, config)
    scores = torch.from_numpy(fitted[-1].scores[chosen[-1]])
    return Outcome(scores, len(labels) + len(test_labels), notes, metrics=metrics)


def best_on_test(config: SvmConfig, trials: list[dict[str, Any]]) -> dict[str, Any]:
    """What the original reports: for each number of shots the C whose mean over samples is highest on the test images.

    Returns:
        `best_on_test`: the mean and (population) standard deviation over samples, in percent, and that C.
    """
    table = np.array([trial["mAP_by_C"] for trial in trials])  # (samples, shots, costs)
    best = table.mean(axis=0).argmax(axis=1)
    each = {}
    for row, (number, column) in enumerate(zip(config.shots, best)):
        values = table[:, row, column]
        each[f"mAP_{number}"] = {"mean": float(values.mean()), "std": float(values.std()), "C": config.costs[column]}
    return {"best_on_test": each}


# One SVM per class


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


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    """(N, classes) int8 in 1 and 0 from one class per image; labels of several classes come back as they are."""
    return labels if labels.ndim == 2 else (labels[:, None] == np.arange(classes)).astype(np.int8)


def fit_classes(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    costs: Sequence[float],
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
        InputError: a class has fewer than two images, or fewer than two are without it, or fewer than three are both.
    """
    from joblib import Parallel, delayed

    targets = np.where(labels == 1, 1, -1)
    _require_both(targets)
    train, test = normalise(train), normalise(test)
    tasks = [(target, cost) for target in targets.T for cost in costs]
    run = Parallel(n_jobs=processes)
    validated = run(delayed(validate)(train, target, cost, seed, max_iterations) for target, cost in tasks)
    table = np.array([value for value, _ in validated]).reshape(len(targets.T), len(costs))
    missed = np.array([count for _, count in validated]).reshape(table.shape).sum(axis=1)
    chosen = [costs[best] for best in table.argmax(axis=1)]
    fitted = run(delayed(_fit)(train, target, cost, seed, max_iterations) for target, cost in zip(targets.T, chosen))
    return [
        ClassSvm(cost, row, model.decision_function(test), int(count) + late, _folds_without(target))
        for cost, row, (model, late), count, target in zip(chosen, table, fitted, missed, targets.T)
    ]


def _called(column: int, classes: Sequence[str]) -> str:
    """A class by its name, where it is known."""
    return classes[column] if classes else str(column)


def _require_both(targets: np.ndarray, classes: Sequence[str] = ()) -> None:
    positives = (targets == 1).sum(axis=0)
    for column, count in enumerate(positives):
        without = len(targets) - count
        if min(count, without) < 2 or max(count, without) < FOLDS:
            raise InputError(
                f"class {_called(column, classes)} is in {count} of {len(targets)} training images; an SVM and its "
                "cross-validation need two or more with and without it. Has the split been cut too short?"
            )


def validate(train: np.ndarray, target: np.ndarray, cost: float, seed: int, limit: int) -> tuple[float, int]:
    """Mean average precision over the folds, as scikit-learn has it, and how many fits did not converge."""
    from sklearn.model_selection import cross_val_score

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        precisions = cross_val_score(
            classifier(cost, seed, limit), train, target, cv=FOLDS, scoring="average_precision", error_score="raise"
        )
    return float(precisions.mean()), _unconverged(caught)


def _fit(train: np.ndarray, target: np.ndarray, cost: float, seed: int, limit: int) -> tuple[Any, int]:
    """The SVM, and whether (1 or 0) it did not converge."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = classifier(cost, seed, limit).fit(train, target)
    return model, _unconverged(caught)


def _unconverged(caught: Sequence[warnings.WarningMessage]) -> int:
    from sklearn.exceptions import ConvergenceWarning

    return sum(issubclass(warning.category, ConvergenceWarning) for warning in caught)


def _folds_without(target: np.ndarray) -> int:
    """Folds of the cross-validation whose held-out part has no image of the class."""
    from sklearn.model_selection import StratifiedKFold

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # says what this counts
        return sum(not (target[held] == 1).any() for _, held in StratifiedKFold(FOLDS).split(target, target))


# Low-shot


@dataclass(frozen=True)
class LowShot:
    """Average precision in percent, (costs, classes), of SVMs on one draw of few images; NaN where no image counts.

    `test`: on the test images. `rest`: on the training images that were not drawn, which may choose the cost.
    `scores`: of the test images, (costs, images, classes).
    """

    test: np.ndarray
    rest: np.ndarray
    scores: np.ndarray
    unconverged: int


def draw(labels: np.ndarray, shots: int, seed: int, names: Sequence[str] = ()) -> np.ndarray:
    """A low-shot sample: for each class `shots` images of it and (classes - 1) times as many without it.

    Args:
        labels: (N, classes) in 1, 0 and -1; only 1 and 0 are drawn from.
        seed: of this sample; each number of shots is drawn on its own.
        names: of the classes, for messages.
    Returns:
        `labels` where drawn and -1 elsewhere.
    Raises:
        InputError: a class has too few.
    """
    generator = np.random.default_rng([seed, shots])
    drawn = np.full_like(labels, -1)
    classes = labels.shape[1]
    if classes < 2:
        raise InputError("there is only one class, so there is nothing to tell it from")
    for column in range(classes):
        for value, wanted in ((1, shots), (0, (classes - 1) * shots)):
            images = np.flatnonzero(labels[:, column] == value)
            if len(images) < wanted:
                kind = "images" if value else "images without it"
                raise InputError(
                    f"{shots} low-shot images per class: class {_called(column, names)} has {len(images)} {kind} and "
                    f"needs {wanted}; take fewer, for example --set shots=[1,2]"
                )
            drawn[generator.choice(images, wanted, replace=False), column] = value
    return drawn


def fit_low_shot(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    shots: int,
    costs: Sequence[float],
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
    if not (rest == 1).any():
        raise InputError(
            f"{shots} shots leave no training image of any class to choose C by; take fewer, --set shots=[1]"
        )
    if not (test_labels == 1).any():
        raise InputError("no test image shows any of the classes, so there is no average precision")
    train, test = normalise(train), normalise(test)
    columns = Parallel(n_jobs=processes)(
        delayed(low_shot_class)(train, drawn[:, c], rest[:, c], test, test_labels[:, c], costs, seed, max_iterations)
        for c in range(labels.shape[1])
    )
    on_test, on_rest, scores, late = zip(*columns)
    test_table, rest_table, all_scores = (np.stack(parts, axis=-1) for parts in (on_test, on_rest, scores))
    return LowShot(test_table, rest_table, all_scores, sum(late))


def low_shot_class(
    train: np.ndarray,
    drawn: np.ndarray,
    rest: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    costs: Sequence[float],
    seed: int,
    limit: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Average precision on the test images and on the rest, (costs,); test scores, (costs, images); fits cut short."""
    used = drawn >= 0
    features, target = train[used], np.where(drawn[used] == 1, 1, -1)
    on_test, on_rest, scores, late = [], [], [], 0
    for cost in costs:
        model, missed = _fit(features, target, cost, seed, limit)
        scores.append(model.decision_function(test))
        on_test.append(_average_precision(scores[-1], test_labels))
        on_rest.append(_average_precision(model.decision_function(train), rest))
        late += missed
    return np.array(on_test), np.array(on_rest), np.array(scores), late


def _average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """In percent, of one class; NaN where no image counts as showing it."""
    if not (labels == 1).any():
        return float("nan")
    return mean_average_precision(scores[:, None], labels[:, None])[1]


# A forecast


def own_work(config: SvmConfig, probe: Probe) -> tuple[float, str]:
    """Every cost for one class, times the classes, in as many processes as there are cores; see `task.Code`."""
    started, jobs = start_processes()
    count = min(probe.train, ROWS)
    features = normalise(probe.rows(count).numpy())
    target = probe.one_class(count)

    def piece(rows: int) -> None:
        for cost in config.costs:
            validate(features[:rows], target[:rows], cost, 0, config.max_iterations)

    left, least = max(LEAST, probe.seconds - started), min(count, 8 * probe.classes)
    each = probe.scaled(piece, count, left, least) * probe.train / count
    basis = f"{len(config.costs)} costs for each of {probe.classes} classes"
    return started + each * probe.classes / jobs, basis


def low_shot_work(config: SvmConfig, probe: Probe) -> tuple[float, str]:
    """Every cost for one class at a middling number of shots, times the classes and numbers of shots."""
    started, jobs = start_processes()
    shots = min(config.shots, key=lambda number: abs(number - sum(config.shots) / len(config.shots)))
    count, test_count = min(probe.train, ROWS), min(probe.test, ROWS)
    train, test = (normalise(probe.rows(rows).numpy()) for rows in (count, test_count))
    labels, test_labels = probe.one_class(count), probe.one_class(test_count)
    drawn = np.where(np.arange(count) < shots * probe.classes, labels > 0, -1)

    def piece(number: int) -> None:
        some = config.costs[:number]
        low_shot_class(train, drawn, labels, test, test_labels, some, 0, config.max_iterations)

    each = probe.scaled(piece, len(config.costs), max(LEAST, probe.seconds - started)) * probe.train / count
    basis = f"{len(config.costs)} costs, {len(config.shots)} numbers of shots"
    return started + each * probe.classes * len(config.shots) / jobs, basis


def memory(_config: SvmConfig, probe: Probe) -> float:
    """The features as they are and in float64, and a copy while they are brought to unit length; see `task.Code`."""
    train, test = probe.train * probe.dim, probe.test * probe.dim
    return max(20 * train + 4 * test, 12 * train + 20 * test)


CODE = Code(run_trial, passes, check=check, sources=clean_features, own_work=own_work, memory=memory)
LOW_SHOT = Code(
    run_trial,
    passes,
    repeated,
    check,
    sources=clean_features,
    own_work=low_shot_work,
    memory=memory,
    summary=best_on_test,
)
