"""What every classification protocol shares: the run directory, its trials, predictions, intervals and the record."""

import json
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moco_eval.config.base import Model
from moco_eval.data.catalogue import preprocessing_deviations, preprocessing_for, split_deviations
from moco_eval.data.image_set import ImageSet, require_single_label
from moco_eval.data.label_subsets import is_published
from moco_eval.encoders.encoder import Encoder
from moco_eval.errors import InputError
from moco_eval.features import health, sample
from moco_eval.features.cache import Features, Source, rows_of, several_features_of
from moco_eval.features.extract import Crops
from moco_eval.features.stages import network
from moco_eval.preprocessing import Preprocessing
from moco_eval.results.metrics import accuracy, mean_average_precision, mean_per_class
from moco_eval.results.record import Cost, Result, deviations
from moco_eval.results.run_directory import finished, open_run
from moco_eval.results.statistics import intervals
from moco_eval.runtime import files
from moco_eval.runtime.collectives import barrier, found_by_main, from_main
from moco_eval.runtime.console import log, warn
from moco_eval.runtime.rank import is_main

ARRAY = "array_"  # before the names of an outcome's arrays in a trial's file
HEALTH_IMAGES, ALIGNED_IMAGES = 2000, 256  # at most: test images that health is measured on; images cropped twice
HEALTH_NUMBERS = 2**25  # of their features at most: raw pixels may have 150,000 dimensions


@dataclass(frozen=True)
class Task:
    """What one classification evaluation is about.

    Attributes:
        feature: pooled, head or a stage.
        labels_per_class: train on so many, drawn anew in each trial; None for all.
        cache: the folder of extracted features; None keeps them in memory.
    """

    encoder: Encoder
    train: ImageSet
    test: ImageSet
    feature: str = "pooled"
    labels_per_class: int | None = None
    trials: int = 1
    cache: Path | None = None
    cached: Counter = field(default_factory=Counter, compare=False)  # images whose features were there, by split

    @property
    def preprocessing(self) -> Preprocessing:
        return preprocessing_for(self.train.name, self.encoder.preprocessing)

    def training_images(self, seed: int) -> ImageSet:
        """The training images of a trial."""
        return self.train.few_labels(self.labels_per_class, seed) if self.labels_per_class else self.train

    def features(self, images: ImageSet, config: Any, device: torch.device, crops: Crops | None = None) -> Features:
        """Features of a set of images, as `config` says (precision, batch_size, workers). Collective."""
        return self.several([self.source(images, config, crops)], device)[0]

    def several(self, sources: Sequence[Source], device: torch.device) -> list[Features]:
        """Several features of the same images in one pass. Collective."""
        found = several_features_of(sources, self.cache, device)
        self.cached[sources[0].images.split] += len(found[0]) - found[0].passed
        return found

    def source(self, images: ImageSet, config: Any, crops: Crops | None = None) -> Source:
        """What those features depend on."""
        return Source(
            self.encoder,
            images,
            self.preprocessing,
            self.feature,
            crops,
            config.precision,
            config.batch_size,
            config.workers,
        )


@dataclass
class Outcome:
    """What a trial came to.

    Attributes:
        scores: of each test image for each class, (images, classes), on the CPU.
        images: how many images it is about, epochs counted, for the cost.
        notes: what the trial chose or saw besides, plain values; kept beside its metrics. What stands there under
            `deviations`, a list of words, is also said of the whole record.
        seconds: of earlier sessions.
        metrics: in percent, where they are not what `metrics` makes of the scores.
        arrays: more about each test image, kept in predictions.npz (of the first trial).
    """

    scores: torch.Tensor
    images: int
    notes: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    metrics: dict[str, float] | None = None
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    """What an evaluation says of itself in its record.

    Attributes:
        command: the command, for config.yaml.
        config: as it is run; `canonical`: as the protocol has it.
        over: what trials vary where all labels are used: head or finetune.
        selection: last-epoch, or which split chose what.
        free: config keys that move no number here.
        feature: the protocol's own.
        subset: of labels that the protocol is about, in the words of `data.labels.PUBLISHED`; None for all of them.
        multi_label: whether it takes images of several classes.
    """

    command: str
    config: Any
    canonical: Model
    over: str
    selection: str
    free: tuple[str, ...] = ()
    feature: str = "pooled"
    subset: str | None = None
    multi_label: bool = False


Trial = Callable[[int, Path], Outcome | None]  # (seed, where its state may be kept); None where only rank 0 works


def judge(
    task: Task,
    protocol: Protocol,
    output: Path,
    device: torch.device,
    trial: Trial,
    extra: dict[str, Any] | None = None,
    summary: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Run all trials into a run directory; finished trials are not repeated.

    Args:
        trial: makes the outcome of one seed; called by every process.
        extra: more for the record.
        summary: makes more for the record from all trials of it.
    Returns:
        The result record.
    Raises:
        InputError: the output holds another run, or an image cannot be read.
        RunFailed: a number that is not finite.
        Interrupted: stopped by a signal; run again to go on.
    """
    check(task, protocol.config.seed, protocol.multi_label)
    if open_run(output, resolved(task, protocol.command, protocol.config)) and (record := finished(output)):
        log(f"already done: {output}")
        return record
    cost = Cost(str(device))
    if not (output / "config.yaml").is_file():
        raise InputError(f"{output} is not there on every process; several machines need a folder that they share")
    first = protocol.config.seed
    outcomes = [_outcome(task, first + index, output / f"trial_{index}", trial, cost) for index in range(task.trials)]
    barrier()  # every process has read every trial
    if is_main():
        _write_predictions(output / "predictions.npz", outcomes, task.test)
    result = _result(task, protocol, outcomes, cost)
    result.extra |= (extra or {}) | (summary(result.trials) if summary else {})
    if protocol.over != "finetune":  # there the features are not the encoder's any more
        result.extra["health"] = found_by_main(lambda: look_at_features(task, protocol.config, output, device))
    record = result.write(output)
    if is_main():
        for path in output.glob("trial_*.npz"):  # predictions.npz and result.json hold what counts
            path.unlink()
    return record


def check(task: Task, seed: int, multi_label: bool = False) -> None:
    """Everything that can be refused before anything is written.

    Raises:
        InputError: no such feature, images of several classes where one is wanted, too few labels of a class.
    """
    network(task.encoder, task.feature)
    if not multi_label:
        require_single_label(task.test)
    task.training_images(seed)


def resolved(task: Task, command: str, config: Any) -> dict[str, Any]:
    """Everything that defines a run, for its config.yaml."""
    return {
        "command": command,
        "dataset": {"train": task.train.record(), "test": task.test.record()},
        "encoder": task.encoder.identity() | {"feature": task.feature},
        "labels_per_class": task.labels_per_class,
        "trials": task.trials,
        "config": config.model_dump(mode="json"),
    }


def _outcome(task: Task, seed: int, place: Path, trial: Trial, cost: Cost) -> tuple[int, Outcome]:
    """The outcome of a trial, made or as it was kept."""
    kept = place.with_suffix(".npz")
    if not from_main([_is_whole(kept)])[0]:
        began = time.perf_counter()
        task.cached.clear()
        outcome = trial(seed, place.with_suffix(".pth"))
        if outcome is not None and is_main():
            seconds = outcome.seconds + time.perf_counter() - began
            _keep(kept, outcome, seconds, task.cached.total())
            place.with_suffix(".pth").unlink(missing_ok=True)
        while not kept.is_file():  # another process works on it; no collective waits as long as it may take
            time.sleep(0.2)
    with np.load(kept, allow_pickle=False) as held:
        notes, own_metrics = json.loads(str(held["notes"]))
        found = Outcome(torch.from_numpy(held["scores"]), int(held["images"]), notes, metrics=own_metrics)
        found.arrays = {name.removeprefix(ARRAY): held[name] for name in held.files if name.startswith(ARRAY)}
        cost.seconds += float(held["seconds"])
        cost.images += found.images
        cost.cached_images += int(held["cached"])
    return seed, found


def _is_whole(kept: Path) -> bool:
    """Whether a trial was kept; on the first process, which removes a damaged one."""
    if not is_main() or not kept.is_file():
        return False
    try:
        with np.load(kept, allow_pickle=False) as held:
            json.loads(str(held["notes"]))
            return bool(held["scores"].size) and "cached" in held.files
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        warn(f"{kept} cannot be read ({error}); this trial is done again")
        kept.unlink()
        return False


def _keep(kept: Path, outcome: Outcome, seconds: float, cached: int) -> None:
    notes = json.dumps([outcome.notes, outcome.metrics], allow_nan=False)
    more: dict[str, Any] = {f"{ARRAY}{name}": array for name, array in outcome.arrays.items()}
    more |= {"scores": outcome.scores.numpy(), "images": outcome.images, "cached": cached}
    with files.atomic(kept) as path:
        np.savez(path, notes=notes, seconds=seconds, **more)


def _write_predictions(path: Path, outcomes: Sequence[tuple[int, Outcome]], test: ImageSet) -> None:
    assert test.labels is not None
    scores = [outcome.scores.numpy() for _, outcome in outcomes]
    kept = scores if test.multi_label else scores[:1]  # elsewhere the classes that were predicted say it all
    more: dict[str, Any] = {**outcomes[0][1].arrays}
    with files.atomic(path) as temporary:
        predictions = [one.argmax(1) for one in scores]
        np.savez(temporary, prediction=predictions, label=test.labels, scores=np.stack(kept), **more)


def look_at_features(task: Task, config: Any, output: Path, device: torch.device) -> dict[str, Any]:
    """Write sample.npz, and say how healthy the features of test images are; of the first process alone.

    The trials have left those features in the cache; without one, so few images pass once more.
    """
    dimensions = task.encoder.feature_dim or 3 * task.preprocessing.size**2  # of raw pixels
    rows = sample.evenly(len(task.test), min(HEALTH_IMAGES, HEALTH_NUMBERS // dimensions))
    features = rows_of(task.source(task.test, config), task.cache, rows, device).numpy()
    shown = sample.evenly(len(rows), sample.IMAGES)
    components = sample.principal_components(features[shown])
    assert task.test.labels is not None
    labels = task.test.labels[rows[shown]]
    found = sample.Sample(rows[shown], labels, task.test.classes, *components)
    sample.write(output / sample.NAME, found)
    healthy = health.describe(features, _two_crops(task, config, device))
    augmentation = getattr(config, "augmentation", None)
    healthy["crops"] = augmentation.model_dump(mode="json") if augmentation else None
    return healthy


def _two_crops(task: Task, config: Any, device: torch.device) -> tuple[np.ndarray, np.ndarray] | None:
    """Features of two training crops of some training images, where the protocol has such crops."""
    if (augmentation := getattr(config, "augmentation", None)) is None:
        return None
    images = task.training_images(config.seed)
    rows = sample.evenly(len(images), ALIGNED_IMAGES)
    first, second = (task.source(images, config, Crops(augmentation, config.seed, epoch)) for epoch in (0, 1))
    return (
        rows_of(first, task.cache, rows, device).numpy(),
        rows_of(second, task.cache, rows, device).numpy(),
    )


def _result(task: Task, protocol: Protocol, outcomes: Sequence[tuple[int, Outcome]], cost: Cost) -> Result:
    few = task.labels_per_class
    trials: list[dict[str, Any]] = [
        {"seed": seed, "metrics": outcome.metrics or metrics(outcome.scores, task.test)} | outcome.notes
        for seed, outcome in outcomes
    ]
    told = dict.fromkeys(words for trial in trials for words in trial.get("deviations", []))
    return Result(
        protocol=protocol.config.protocol,
        dataset=task.test.record() | ({"labels_per_class": few} if few else task.train.regime()),
        encoder=task.encoder,
        trials=trials,
        over="labels" if few else protocol.over,
        selection=protocol.selection,
        cost=cost,
        interval=_intervals(list(trials[0]["metrics"]), outcomes, task.test),
        extra={"preprocessing": task.preprocessing.to_dict()},
        deviations=deviations(protocol.config, protocol.canonical, protocol.free)
        + list(told)
        + split_deviations(task.train, task.test)
        + preprocessing_deviations(task.train.name, task.preprocessing)
        + _other_labels(task, protocol.subset)
        + ([f"{task.feature} feature instead of {protocol.feature}"] if task.feature != protocol.feature else []),
    )


def _intervals(
    names: list[str], outcomes: Sequence[tuple[int, Outcome]], test: ImageSet
) -> dict[str, tuple[float, float]]:
    """Of those metrics that are made of one score for each image and class."""
    assert test.labels is not None
    resampled = ("mAP",) if test.multi_label else ("top1", "top5", "mean_per_class")
    scores = np.stack([outcome.scores.numpy() for _, outcome in outcomes])
    return intervals([name for name in names if name in resampled], test.labels, scores=scores)


def _other_labels(task: Task, wanted: str | None) -> list[str]:
    """In words, where a protocol's labels are not the ones used; `deviations` names a list that nobody published."""
    subset, few = task.train.subset, task.labels_per_class
    if subset == wanted and not few:
        return []
    if few:
        used = f"{few} labels per class"
    elif is_published(subset):
        used = f"labels of {subset}"
    else:
        used = "labels of an unpublished list" if subset else "all labels"
    if wanted:
        return [f"{used} instead of {wanted}"]
    return [used] if few or is_published(subset) else []


def metrics(scores: torch.Tensor, test: ImageSet) -> dict[str, float]:
    """The metrics of a data set, in percent, the one that its papers report first."""
    labels = torch.as_tensor(test.labels)
    if test.multi_label:
        return {"mAP": mean_average_precision(scores, labels)[1]}
    tops = {"top1": 1} | ({"top5": 5} if len(test.classes) > 5 else {})
    found = {name: accuracy(scores, labels, top) for name, top in tops.items()}
    return {"mean_per_class": mean_per_class(scores, labels)} | found if test.metric == "mean_per_class" else found
