"""`segment`: train on masks from an encoder, judge it by mIoU, leave the record."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moco_eval.config.segmentation import SegmentConfig
from moco_eval.data.masks.samples import SegmentationData
from moco_eval.encoders.photographs import pixels
from moco_eval.results import fine_tuning_task
from moco_eval.results.compare import PIXEL_COUNTS
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
from moco_eval.segmentation.task import SegmentationTask
from moco_eval.segmentation.train import train
from moco_eval.untrusted import npz


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
    return fine_tuning_task.carry_out(
        task,
        data,
        output,
        task.resolved(data),
        PIXEL_COUNTS,
        lambda data, seed, folder: _trial(task, data, seed, folder, device),
        lambda data, trials: _record(task, data, output, device, trials),
    )


def plan(task: SegmentationTask, output: Path, processes: int = 1) -> str:
    """What `segment` would do, in a few lines; opens the data and writes nothing. Raises what `segment` does."""
    task.check(processes)
    data = task.at_hand
    config, schedule = task.config, task.config.schedule
    heads = f", {len(sweep_of(config))} heads, chosen on training images held out" if config.sweep else ""
    falls = f"steps {list(schedule.steps)}" if schedule.kind == "step" else f"power {schedule.power:g}"
    lines = [
        f"model: {config.model}{heads}; {processes} process{'es' * (processes > 1)} with "
        f"{config.batch_size // processes} images each",
        f"schedule: {schedule.iterations} iterations of {config.batch_size} images, {config.optimizer.kind}, lr "
        f"{config.optimizer.lr:g}, {falls}, warm-up {schedule.warmup}",
    ]
    return fine_tuning_task.plan(task, data, output, task.resolved(data), lines)


# Trials and the record


def _trial(
    task: SegmentationTask, data: SegmentationData, seed: int, folder: Path, device: torch.device
) -> dict[str, Any]:
    """One training and its judgement. Collective."""
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
    with files.atomic(folder / PIXEL_COUNTS) as temporary:
        np.savez_compressed(temporary, counts=counts)
    lr, decay = sweep_of(config)[head]
    chosen = {"chosen": {"lr": lr, "weight_decay": decay} if config.sweep else None}
    return fine_tuning_task.write_trial(folder, config.seed, scores.metrics_of(total), cost, chosen)


def _record(
    task: SegmentationTask,
    data: SegmentationData,
    output: Path,
    device: torch.device,
    trials: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The result record of all trials; IoU of each class is over the pixels of all of them."""
    folders = fine_tuning_task.folders(output, task.seeds)
    counts = [npz.read(folder / PIXEL_COUNTS)["counts"] for folder in folders]
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
        cost=fine_tuning_task.cost_of(trials, device),
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
