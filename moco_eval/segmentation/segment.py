"""`segment`: train on masks from an encoder, judge it by mIoU, leave the record."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moco_eval.config.segmentation import SegmentConfig
from moco_eval.data.masks.samples import SegmentationData
from moco_eval.encoders.photographs import pixels
from moco_eval.errors import InputError
from moco_eval.results import run_directory, trial_folders
from moco_eval.results.plots import loss_curves, per_class_bars
from moco_eval.results.record import Cost, ResultRecord
from moco_eval.results.result import lines
from moco_eval.runtime import collectives, files, rank
from moco_eval.runtime.batch_norm import share_statistics
from moco_eval.runtime.device import place
from moco_eval.runtime.stop import Stop
from moco_eval.segmentation import pictures, scores
from moco_eval.segmentation.evaluate import counts_of_heads
from moco_eval.segmentation.networks import build_segmenter, sweep_of
from moco_eval.segmentation.recipe import recipe_deviations
from moco_eval.segmentation.task import SegmentationTask
from moco_eval.segmentation.train import train
from moco_eval.untrusted import npz

COUNTS = "pixel_counts.npz"


def segment(task: SegmentationTask, output: Path, device: torch.device) -> dict[str, Any]:
    """Train a segmentation from an encoder and judge it; run again in the same place to go on. Collective.

    Args:
        output: run directory; see docs/segmentation.md for what is in it.
    Returns:
        The result record; that of a finished run at once.
    Raises:
        InputError, RunFailed, Interrupted.
    """
    task.check(rank.world_size())
    data = task.open()
    about = task.resolved(data)
    with run_directory.open_run(output, about):
        if not (output / "config.yaml").is_file():
            raise InputError(f"{output} is not there on every process; several machines need a folder that they share")
        settings = recipe_deviations(task.config, task.name, task.encoder.arch)
        if record := collectives.found_by_main(lambda: run_directory.finished_as(output, about, settings)):
            return record
        data = data or task.draw(output)
        places = zip(task.seeds, trial_folders.folders(output, task.seeds))
        trials = [_trial(task, data, seed, folder, device) for seed, folder in places]
        return collectives.found_by_main(lambda: _record(task, data, output, device, trials))


def plan(task: SegmentationTask, output: Path, processes: int = 1) -> str:
    """What `segment` would do, in a few lines; opens the data and writes nothing. Raises what `segment` does."""
    task.check(processes)
    data = task.open()
    encoder, config, schedule = task.encoder, task.config, task.config.schedule
    heads = len(sweep_of(config))
    falls = f"steps {list(schedule.steps)}" if schedule.kind == "step" else f"power {schedule.power:g}"
    return "\n".join(
        [
            f"{config.protocol} of {encoder.source}: {encoder.origin}, {encoder.arch}",
            f"model: {config.model}"
            + (f", {heads} heads, chosen on training images held out" if config.sweep else "")
            + f"; {processes} process{'es' * (processes > 1)} with {config.batch_size // processes} images each",
            f"schedule: {schedule.iterations} iterations of {config.batch_size} images, {config.optimizer.kind}, lr "
            f"{config.optimizer.lr:g}, {falls}, warm-up {schedule.warmup}",
            f"trials: {task.trials}, seeds from {config.seed}",
            f"data: {_data_line(task, data)}",
            *(f"differs from {config.protocol}: {deviation}" for deviation in task.deviations(data)),
            f"output: {output}",
        ]
    )


def _data_line(task: SegmentationTask, data: SegmentationData | None) -> str:
    """The data of a plan; those of 'digits' are not drawn yet."""
    if data:
        return f"{task.name}, {len(data.train)} training and {len(data.test)} test images, {len(data.classes)} classes"
    scenes = task.scenes
    assert scenes
    return f"{task.name}, {scenes.train} training and {scenes.test} test scenes drawn from seed {scenes.seed}"


# Trials and the record


def _trial(
    task: SegmentationTask, data: SegmentationData, seed: int, folder: Path, device: torch.device
) -> dict[str, Any]:
    """One training and its judgement, or what an earlier call left of it in trial.json. Collective."""
    if kept := collectives.found_by_main(lambda: trial_folders.finished(folder, COUNTS)):
        return kept
    cost, config = Cost(str(device)), task.of_seed(seed)
    model = build_segmenter(task.encoder, len(data.classes), config)
    model = place(share_statistics(model, "sync" if config.bn == "sync" else "local"), device)
    for body in model.outside:
        place(body, device)
    names = pictures.names(data.test)

    def keep(index: int, prediction: np.ndarray) -> None:
        pictures.save_prediction(prediction, len(data.classes), folder / "predictions" / f"{names[index]}.png")
        if index in drawn:
            path = folder / "pictures" / f"{drawn.index(index)}-{names[index]}.png"
            pictures.draw_picture(data, data.test[index], prediction, path)

    drawn = pictures.chosen(len(data.test))
    with Stop() as stop:
        train(model, data, config, folder, device, cost, stop)
        head = int(model.chosen)
        with cost.clock():
            counts = counts_of_heads(model, data, data.test, config, device, stop, [head], keep)[0]
    return collectives.found_by_main(lambda: _judge(data, config, folder, cost, counts, head))


def _judge(
    data: SegmentationData, config: SegmentConfig, folder: Path, cost: Cost, counts: np.ndarray, head: int
) -> dict[str, Any]:
    """Write the pixels of each image, and last of all what they are worth."""
    total = counts.sum(axis=0)
    with files.atomic(folder / COUNTS) as temporary:
        np.savez_compressed(temporary, counts=counts)
    lr, decay = sweep_of(config)[head]
    trial = {
        "seed": config.seed,
        "metrics": scores.metrics_of(total),
        "chosen": {"lr": lr, "weight_decay": decay} if config.sweep else None,
        "seconds": cost.seconds,
        "images": cost.images,
    }
    files.write_json(folder / "trial.json", trial)
    return trial


def _record(
    task: SegmentationTask,
    data: SegmentationData,
    output: Path,
    device: torch.device,
    trials: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The result record of all trials; IoU of each class is over the pixels of all of them."""
    folders = trial_folders.folders(output, task.seeds)
    counts = [npz.read(folder / COUNTS)["counts"] for folder in folders]
    per_class = scores.per_class(sum(trial.sum(axis=0) for trial in counts), data.classes)
    per_class_bars(per_class, "IoU", output / "per_class.svg")
    loss_curves([folder / "metrics.jsonl" for folder in folders], output / "losses.svg")
    rows = [
        {"seed": trial["seed"], "metrics": trial["metrics"]} | ({"chosen": trial["chosen"]} if trial["chosen"] else {})
        for trial in trials
    ]
    drawn = sorted((folders[0] / "pictures").glob("*.png"))
    result = ResultRecord(
        protocol=task.config.protocol,
        dataset=data.record(),
        encoder=task.encoder,
        trials=rows,
        over="head" if task.config.model == "linear" else "finetune",
        selection="last-iteration; the head by training images held out" if task.config.sweep else "last-iteration",
        cost=Cost(str(device), *(sum(trial[name] for trial in trials) for name in ("seconds", "images"))),
        interval=scores.intervals(counts),
        deviations=task.deviations(data),
        extra={
            "processes": rank.world_size(),
            "preprocessing": pixels(task.encoder),
            "per_class": per_class,
            "pictures": [path.relative_to(output).as_posix() for path in drawn],
        },
    )
    return result.write(output)


def format_table(record: dict[str, Any]) -> str:
    """The metrics of a record, then the IoU of each class, as plain text."""
    width = max(len(name) for name in record["per_class"])
    values = {name: each["IoU"] for name, each in record["per_class"].items()}
    rows = [f"{name:<{width}}  {'-' if value is None else f'{value:.2f}':>6}" for name, value in values.items()]
    return "\n".join([*lines(record), f"{'IoU':<{width}}", *rows])
