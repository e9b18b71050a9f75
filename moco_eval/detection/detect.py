"""`detect`: fine-tune a detector from an encoder, judge it, leave the record."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moco_eval.config.detection import DetectConfig
from moco_eval.data.boxes.samples import DetectionData
from moco_eval.detection import engine as engines
from moco_eval.detection.average_precision import Detections, Scores
from moco_eval.detection.judge import judged
from moco_eval.detection.pictures import draw_pictures
from moco_eval.detection.recipe import is_on
from moco_eval.detection.task import DetectionTask
from moco_eval.encoders.photographs import pixels
from moco_eval.results import fine_tuning_task, matches
from moco_eval.results.compare import NOT_COVERED
from moco_eval.results.plots import loss_curves, per_class_bars
from moco_eval.results.record import Cost, ResultRecord, repeats
from moco_eval.results.statistics import detection_intervals, mean_and_std
from moco_eval.runtime import collectives, files, rank

PARITY = (
    "engine torchvision: features, losses and five SGD steps equal detectron2's "
    "(tests/detection/test_detectron2_parity.py)"
)
SHOWN = ("APbb", "APmk", "AP50")  # the bars of the classes are of the first of these that there is
MOST_ROWS = 100  # classes that are printed


def detect(task: DetectionTask, output: Path, device: torch.device) -> dict[str, Any]:
    """Fine-tune a detector from an encoder and judge it; run again in the same place to go on. Collective.

    Args:
        output: run directory; see docs/detection.md for what is in it.
    Returns:
        The result record; that of a finished run at once.
    Raises:
        InputError, RunFailed, Interrupted.
    """
    engine = task.check(rank.world_size())
    data = task.open()
    return fine_tuning_task.carry_out(
        task,
        data,
        output,
        task.resolved(engine, data),
        "detections.json",
        lambda data, seed, folder: _trial(task, data, engine, seed, folder, device),
        lambda data, trials: _record(task, data, engine, output, device, trials),
    )


def plan(task: DetectionTask, output: Path, processes: int = 1) -> str:
    """What `detect` would do, in a few lines; opens the data and writes nothing. Raises what `detect` does."""
    engine = task.check(processes)
    data = task.at_hand
    config, schedule = task.config, task.config.schedule
    part = config.batch_size // (processes * config.accumulate)
    lines = [
        f"engine: {engine}; {processes} process{'es' * (processes > 1)} with "
        + (f"{config.accumulate} times " if config.accumulate > 1 else "")
        + f"{part} images each",
        f"schedule: {schedule.iterations} iterations of {config.batch_size} images, lr {config.optimizer.lr:g}, "
        f"steps {list(schedule.steps)}, warm-up {schedule.warmup}; precise BN over {config.precise_bn}",
    ]
    return fine_tuning_task.plan(task, data, output, task.resolved(engine, data), lines)


# Trials and the record


def _trial(
    task: DetectionTask, data: DetectionData, engine: str, seed: int, folder: Path, device: torch.device
) -> dict[str, Any]:
    """One fine-tuning and its judgement. Collective."""
    cost, config = Cost(str(device)), task.of_seed(seed)
    detections = engines.fine_tune_and_detect(engine, task.encoder, data, config, folder, device, cost)
    return collectives.found_by_main(lambda: _judge(data, config, folder, cost, detections))


def _judge(
    data: DetectionData, config: DetectConfig, folder: Path, cost: Cost, detections: Sequence[Detections]
) -> dict[str, Any]:
    """Write the detections, and last of all what they are worth."""
    metrics, per_class, kinds = judged(data, detections, is_on(config.protocol, "voc"), config.test.detections)
    matches.write(folder / matches.NAME, kinds)
    files.write_json(folder / "detections.json", _detections(data, detections))
    pictures = draw_pictures(data, detections, folder / "pictures")
    more = {"per_class": per_class, "pictures": [path.relative_to(folder).as_posix() for path in pictures]}
    return fine_tuning_task.write_trial(folder, config.seed, metrics, cost, more)


def _record(
    task: DetectionTask,
    data: DetectionData,
    engine: str,
    output: Path,
    device: torch.device,
    trials: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The result record of all trials; detections.json and pictures are the first one's."""
    folders = fine_tuning_task.folders(output, task.seeds)
    if folders[0] != output:
        with files.atomic(output / "detections.json") as temporary:
            shutil.copyfile(folders[0] / "detections.json", temporary)
    per_class = _mean_per_class([trial["per_class"] for trial in trials])
    per_class_bars(per_class, next(name for name in SHOWN if name in trials[0]["metrics"]), output / "per_class.svg")
    loss_curves([folder / "metrics.jsonl" for folder in folders], output / "losses.svg")
    result = ResultRecord(
        protocol=task.config.protocol,
        dataset=data.record(),
        encoder=task.encoder,
        trials=[{"seed": trial["seed"], "metrics": trial["metrics"]} for trial in trials],
        over="finetune",
        selection="last-iteration",
        cost=fine_tuning_task.cost_of(trials, device),
        interval=_intervals(folders, list(trials[0]["metrics"])),
        equivalences=_equivalences(task.config, engine),
        deviations=task.deviations(data),
        extra={
            "engine": engine,
            "processes": rank.world_size(),
            "preprocessing": pixels(task.encoder),
            "per_class": per_class,
            "pictures": [(folders[0] / name).relative_to(output).as_posix() for name in trials[0]["pictures"]],
        },
    )
    return result.write(output)


def _intervals(folders: Sequence[Path], metrics: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Over test images; none where a trial of an earlier version left no matches."""
    if not all((folder / matches.NAME).is_file() for folder in folders):
        return {}
    trials = tuple(matches.read(folder / matches.NAME) for folder in folders)
    return detection_intervals(metrics, matches.Detected(trials))


def _equivalences(config: DetectConfig, engine: str) -> list[str]:
    """The engines' parity, of published protocols as its tests ran them."""
    published = is_on(config.protocol, "voc", "coco")
    as_tested = config.precision == "fp32" and config.accumulate == 1
    return [PARITY] if engine == "torchvision" and published and as_tested else []


def _mean_per_class(trials: Sequence[dict[str, Scores]]) -> dict[str, Scores]:
    """The mean over trials of each class's numbers; None where a class has no objects."""
    means: dict[str, Scores] = {}
    for name, scores in trials[0].items():
        values = {metric: [trial[name][metric] for trial in trials] for metric in scores}
        means[name] = {metric: _mean(column) for metric, column in values.items()}
    return means


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return mean_and_std(there)[0] if there else None


def _detections(data: DetectionData, detections: Sequence[Detections]) -> dict[str, Any]:
    """detections.json: per image the boxes (x0, y0, x1, y1 in pixels, from 0), scores and labels.

    And where there are, masks (COCO's run-length encoding) and keypoints (x, y and score).
    """
    return {
        "classes": list(data.classes),
        "images": [
            {
                "image": sample.image_id,
                "boxes": image.boxes.tolist(),
                "scores": image.scores.tolist(),
                "labels": image.labels.tolist(),
            }
            | ({} if image.masks is None else {"masks": [_as_text(mask) for mask in image.masks]})
            | ({} if image.keypoints is None else {"keypoints": image.keypoints.tolist()})
            for sample, image in zip(data.test, detections)
        ],
    }


def _as_text(mask: dict[str, Any]) -> dict[str, Any]:
    """A run-length encoding as JSON takes it."""
    counts = mask["counts"]
    return {"size": list(mask["size"]), "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}


def format_table(record: dict[str, Any]) -> str:
    """The average precisions of a record as plain text: of all classes, and of each where they are not too many."""
    names = list(record["metrics"])
    rows: list[tuple[str, Scores]] = [("all classes", dict(record["metrics"]))]
    if record["std"]:
        rows.append((f"std of {repeats(record)}", dict(record["std"])))
    for end, name in ((0, "95 % from"), (1, "95 % to")) if record["interval"] else ():
        rows.append((name, {metric: bounds[end] for metric, bounds in record["interval"].items()}))
    classes = record["per_class"]
    rows += classes.items() if len(classes) <= MOST_ROWS else []
    width = max(len(label) for label, _ in rows)
    columns = [max(11, len(name) + 2) for name in names]
    lines = [" " * width + "".join(f"{name:>{wide}}" for name, wide in zip(names, columns))]
    for label, scores in rows:
        cells = ("-" if (value := scores.get(name)) is None else f"{value:.2f}" for name in names)
        lines.append(f"{label:<{width}}" + "".join(f"{cell:>{wide}}" for cell, wide in zip(cells, columns)))
    if record["interval"]:
        lines.append(f"95 %: over test images. {NOT_COVERED}")
    return "\n".join(lines)
