"""An evaluation from its task to its record: checked, run, decided, and recorded where a folder is given."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moco_eval.classification import further, recording, trials
from moco_eval.classification.protocols import Protocol, by_name
from moco_eval.classification.task import Outcome, Task
from moco_eval.config import load as configs
from moco_eval.config.deviations import differences
from moco_eval.data.catalogue import OFFICIAL, band_deviations, preprocessing_deviations, split_deviations
from moco_eval.data.glance import tell_doubts
from moco_eval.data.image_set import ImageSet, require_judgeable, require_single_label
from moco_eval.data.label_subsets import is_published
from moco_eval.data.repeats import repeats, tell_repeats
from moco_eval.errors import InputError
from moco_eval.features.stages import network
from moco_eval.results.metrics import accuracy, mean_average_precision, mean_per_class
from moco_eval.results.record import Cost, ResultRecord
from moco_eval.results.run_directory import finished_as, open_run
from moco_eval.results.statistics import intervals
from moco_eval.runtime.collectives import barrier, found_by_main
from moco_eval.runtime.console import log
from moco_eval.runtime.rank import is_main


@dataclass(frozen=True)
class Judgement:
    """What an evaluation came to.

    Attributes:
        record: the result record.
        resolved: everything that defines the run.
        arrays: what predictions.npz holds: the answers to every test image.
    """

    record: dict[str, Any]
    resolved: dict[str, Any]
    arrays: dict[str, np.ndarray]


def judge(task: Task, config: Any, output: Path, device: torch.device) -> dict[str, Any]:
    """Run an evaluation into a run directory; finished trials are not repeated. Collective.

    Args:
        task: what is judged, and on what.
        config: of one of `protocols.PROTOCOLS`, which it names.
    Returns:
        The result record.
    Raises:
        InputError: the output holds another run, or another command works there, an image cannot be read, or the
            protocol cannot be run on these images or with this encoder.
        RunFailed: a number that is not finite.
        Interrupted: stopped by a signal; run again to go on.
    """
    protocol, task = by_name(config.protocol), prepared(task, config)
    check(task, config)
    about = resolved(task, config)
    with open_run(output, about) as is_there:
        settings = differences(config, canonical(protocol, task), protocol.free)
        if is_there and (record := found_by_main(lambda: finished_as(output, about, settings))):
            log(f"already done: {output}")
            return record
        return _judge(task, config, output, device)


def _judge(task: Task, config: Any, output: Path, device: torch.device) -> dict[str, Any]:
    """Run, or go on, in a run directory that is ours."""
    protocol, cost = by_name(config.protocol), Cost(str(device))
    code = protocol.code()
    if not (output / "config.yaml").is_file():
        raise InputError(f"{output} is not there on every process; several machines need a folder that they share")
    outcomes = trials.kept(task, config, code.run_trial, cost, device, output)
    if is_main():
        recording.write_predictions(output, predictions(outcomes, task.test))
        if code.draw:
            code.draw(task, config.seed, outcomes[0], output)
    result = decided(task, config, outcomes, cost)
    if protocol.frozen:  # elsewhere the features are not the encoder's any more
        result.extra["health"] = recording.look_at_features(task, config, output, device)
    record = result.write(output)
    if is_main():
        trials.forget(output)
    barrier()  # every process finds the whole run directory
    return record


def judge_in_memory(task: Task, config: Any, device: torch.device) -> Judgement:
    """The same without a folder: nothing is written, and nothing is kept for another session. Collective.

    Raises:
        InputError, RunFailed: as `judge` does.
    """
    task = prepared(task, config)
    check(task, config)
    cost = Cost(str(device))
    outcomes = trials.in_memory(task, config, by_name(config.protocol).code().run_trial, cost, device)
    record = decided(task, config, outcomes, cost).record()
    return Judgement(record, resolved(task, config), predictions(outcomes, task.test))


def prepared(task: Task, config: Any) -> Task:
    """The task as the protocol wants it: with the feature that the config names, as many trials as it makes of it."""
    return by_name(config.protocol).code().prepare(task, config)


def check(task: Task, config: Any) -> None:
    """Everything that can be refused before anything is written.

    Raises:
        InputError: no such feature, images of several classes where one is wanted, too few labels of a class, and what
            the protocol itself asks for.
    """
    protocol = by_name(config.protocol)
    network(task.encoder, task.feature)
    if not protocol.multi_label:
        require_single_label(task.test)
    check_images(task)
    task.training_images(config.seed)
    protocol.code().check(task, config)
    for part in (part for test in task.further for part in test.parts):
        tell_doubts(part)
        tell_repeats(task.train, part)


def check_images(task: Task) -> None:
    """What every protocol asks of the images.

    Warns of test images that are trained on too, and of pixels that look wrong.

    Raises:
        InputError: see `require_judgeable`; images of other channels than the encoder takes; one of a few images that
            are looked at cannot be read.
    """
    require_judgeable(task.train, task.test)
    assert task.preprocessing  # raises where the channels differ
    for images in (task.train, task.test):
        tell_doubts(images)
    tell_repeats(task.train, task.test)


def resolved(task: Task, config: Any) -> dict[str, Any]:
    """Everything that defines a run, for its config.yaml."""
    return {
        "command": by_name(config.protocol).name.kind,
        "dataset": {"train": task.train.record(), "test": task.test.record()},
        "encoder": task.encoder.identity() | {"feature": task.feature},
        "labels_per_class": task.labels_per_class,
        "trials": task.trials,
        "config": config.model_dump(mode="json"),
    } | ({"also": {test.name: test.record() for test in task.further}} if task.further else {})


def canonical(protocol: Protocol, task: Task) -> Any:
    """The config that a protocol has for an encoder on some data, as it is shipped."""
    return configs.load(protocol.code().shipped(protocol.name.name, task), protocol.name.kind, protocol.model)


def predictions(outcomes: Sequence[Outcome], test: ImageSet) -> dict[str, np.ndarray]:
    """The answers to every test image: `prediction` (T, N), `label` (N,) or (N, C), `scores`, and more of trial 0.

    The scores of every trial, (T, N, C), where an image may show several classes; else of the first, (1, N, C): the
    classes that were predicted say the rest.
    """
    assert test.labels is not None
    scores = [outcome.scores.numpy() for outcome in outcomes]
    answers = np.array([trial.argmax(1) for trial in scores])
    kept = np.stack(scores if test.multi_label else scores[:1])
    return {"prediction": answers, "label": test.labels, "scores": kept, **outcomes[0].arrays}


def decided(task: Task, config: Any, outcomes: Sequence[Outcome], cost: Cost) -> ResultRecord:
    """What the trials say: metrics, intervals over the test images, and every deviation from the protocol."""
    protocol, few = by_name(config.protocol), task.labels_per_class
    code = protocol.code()
    rows: list[dict[str, Any]] = [
        {"seed": seed, "metrics": outcome.metrics or metrics(outcome.scores, task.test)} | outcome.notes
        for seed, outcome in zip(task.seeds(config), outcomes)
    ]
    return ResultRecord(
        protocol=config.protocol,
        dataset=task.test.record() | ({"labels_per_class": few} if few else task.train.regime()),
        encoder=task.encoder,
        trials=rows,
        over="labels" if few else protocol.over,
        selection=protocol.selection,
        cost=cost,
        interval=_intervals(list(rows[0]["metrics"]), outcomes, task.test),
        extra={"preprocessing": task.preprocessing.to_dict()}
        | (code.summary(config, rows) if code.summary else {})
        | _also(task, outcomes),
        deviations=_deviations(task, config, protocol, rows),
    )


def _deviations(task: Task, config: Any, protocol: Protocol, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Every difference from the protocol that may move the number, in words."""
    shipped = canonical(protocol, task)
    usual = getattr(shipped, "feature", "pooled")
    of_trials = dict.fromkeys(deviation for row in rows for deviation in row.get("deviations", []))
    return [
        *differences(config, shipped, protocol.free),
        *of_trials,
        *split_deviations(task.train, task.test),
        *_repeats(task),
        *preprocessing_deviations(task.train.name, task.preprocessing, protocol.size),
        *band_deviations(task.train, task.encoder.preprocessing),
        *_label_deviations(task, protocol.subset),
        *([f"{task.feature} feature instead of {usual}"] if task.feature != usual else []),
    ]


def _also(task: Task, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Of a record: what the same trials say of further test sets, where there are some."""
    return {"also": further.judged(task.further, [outcome.further for outcome in outcomes])} if task.further else {}


def _repeats(task: Task) -> list[str]:
    """Test images that are trained on too, in words; those of published splits are everybody's."""
    copies = None if (task.test.name, task.test.split) in OFFICIAL else repeats(task.train, task.test)
    return [copies.sentence()] if copies and copies.rows else []


def _intervals(names: list[str], outcomes: Sequence[Outcome], test: ImageSet) -> dict[str, tuple[float, float]]:
    """Of those metrics that are made of one score for each image and class."""
    assert test.labels is not None
    resampled = ("mAP",) if test.multi_label else ("top1", "top5", "mean_per_class")
    scores = np.stack([outcome.scores.numpy() for outcome in outcomes])
    return intervals([name for name in names if name in resampled], test.labels, scores=scores)


def _label_deviations(task: Task, wanted: str | None) -> list[str]:
    """Where a protocol's labels are not the ones used; `split_deviations` names a list that nobody published."""
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
    values = {name: accuracy(scores, labels, top) for name, top in tops.items()}
    return {"mean_per_class": mean_per_class(scores, labels)} | values if test.metric == "mean_per_class" else values
