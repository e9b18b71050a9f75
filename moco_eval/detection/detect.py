"""`detect`: open the data, fine-tune a detector from an encoder, judge it, leave the record."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moco_eval.config.detection import DetectConfig, Scenes
from moco_eval.config.load import did_you_mean
from moco_eval.data.boxes.coco import read_coco, read_coco_folder
from moco_eval.data.boxes.samples import DetectionData, Sample
from moco_eval.data.boxes.scenes import DIGITS, write_scenes
from moco_eval.data.boxes.voc import read_voc, read_voc07, read_voc_folder
from moco_eval.detection import engine as engines
from moco_eval.detection.average_precision import Detections, Scores, evaluate
from moco_eval.detection.detector import check_architecture
from moco_eval.detection.pictures import draw_pictures
from moco_eval.detection.plots import loss_curves, per_class_bars
from moco_eval.detection.recipe import recipe_deviations
from moco_eval.encoders.encoder import Encoder
from moco_eval.errors import InputError
from moco_eval.preprocessing import Preprocessing
from moco_eval.results import run_directory
from moco_eval.results.record import Cost, ResultRecord, repeats
from moco_eval.results.statistics import mean_and_std
from moco_eval.runtime import collectives, console, files, rank

DATASETS = ("voc", "voc07", "coco", "voc-folder", "coco-folder", "digits")
OFFICIAL = {"voc": read_voc, "voc07": read_voc07}
BOXES_ONLY = ("voc", "voc07", "voc-folder", "digits")
PARITY = (
    "engine torchvision: features, losses and five SGD steps equal detectron2's "
    "(tests/detection/test_detectron2_parity.py)"
)


def detect(
    encoder: Encoder,
    dataset: str,
    data: Path | None,
    config: DetectConfig,
    output: Path,
    device: torch.device,
    train_split: str | None = None,
    test_split: str | None = None,
    engine: str = "auto",
    trials: int = 1,
) -> dict[str, Any]:
    """Fine-tune a detector from an encoder and judge it; run again in the same place to go on. Collective.

    Args:
        dataset: one of DATASETS.
        data: its folder; for 'digits' where its scenes are kept, by default output/scenes.
        output: run directory; see docs/detection.md for what is in it.
        train_split, test_split: for voc-folder and coco-folder.
        engine: auto, torchvision or detectron2.
        trials: fine-tunings of the one encoder, with seeds from config.seed on.
    Returns:
        The result record; that of a finished run at once.
    Raises:
        InputError, RunFailed, Interrupted.
    """
    engine = check(encoder, dataset, config, engine, rank.world_size())
    _check_splits(dataset, train_split, test_split)
    split_options = (train_split, test_split)
    opened = None if dataset == "digits" else open_data(dataset, data, *split_options, config)
    resolved = {
        "command": "detect",
        "dataset": dataset,
        "data": str(data) if data else None,
        "fingerprint": opened.fingerprint if opened else None,
        "splits": list(split_options),
        "encoder": encoder.identity(),
        "engine": engine,
        "trials": trials,
        "config": config.model_dump(mode="json"),
    }
    run_directory.open_run(output, resolved)
    if not (output / "config.yaml").is_file():
        raise InputError(f"{output} is not there on every process; several machines need a folder that they share")
    if record := run_directory.finished(output):
        return record
    opened = opened or open_digits(data or output / "scenes", config.scenes or Scenes(), *split_options)
    seeds = range(config.seed, config.seed + trials)
    folders = [output if trials == 1 else output / f"trial_{seed}" for seed in seeds]
    done = [
        _trial(encoder, opened, config.model_copy(update={"seed": seed}), folder, device, engine)
        for seed, folder in zip(seeds, folders)
    ]
    return collectives.found_by_main(lambda: _record(encoder, opened, config, output, device, engine, folders, done))


def plan(
    encoder: Encoder,
    dataset: str,
    data: Path | None,
    config: DetectConfig,
    output: Path,
    train_split: str | None = None,
    test_split: str | None = None,
    engine: str = "auto",
    trials: int = 1,
    processes: int = 1,
) -> str:
    """What `detect` would do, in a few lines; opens the data and writes nothing. Raises what `detect` does."""
    engine = check(encoder, dataset, config, engine, processes)
    _check_splits(dataset, train_split, test_split)
    schedule, part = config.schedule, config.batch_size // (processes * config.accumulate)
    if dataset == "digits":
        scenes = config.scenes or Scenes()
        about = f"digits, {scenes.train} training and {scenes.test} test scenes drawn from seed {scenes.seed}"
        words = recipe_deviations(config, dataset, encoder.arch)
    else:
        opened = open_data(dataset, data, train_split, test_split, config)
        about = (
            f"{dataset}, {len(opened.train)} training and {len(opened.test)} test images, {len(opened.classes)} classes"
        )
        words = _deviations(encoder, opened, config)
    return "\n".join(
        [
            f"{config.protocol} of {encoder.source}: {encoder.origin}, {encoder.arch}",
            f"engine: {engine}; {processes} process{'es' * (processes > 1)} with "
            + (f"{config.accumulate} times " if config.accumulate > 1 else "")
            + f"{part} images each",
            f"schedule: {schedule.iterations} iterations of {config.batch_size} images, lr {config.optimizer.lr:g}, "
            f"steps {list(schedule.steps)}, warm-up {schedule.warmup}; precise BN over {config.precise_bn}",
            f"trials: {trials}, seeds from {config.seed}",
            f"data: {about}",
            *(f"differs from {config.protocol}: {one}" for one in words),
            f"output: {output}",
        ]
    )


def check(encoder: Encoder, dataset: str, config: DetectConfig, engine: str, processes: int) -> str:
    """Everything that can be refused before the data are opened; returns the engine.

    Raises:
        InputError: an encoder that no detector takes, or that expects other colours than the recipe says; masks or
            keypoints where there are none; a batch that the processes cannot share; see also `engine.choose`.
    """
    if dataset not in DATASETS:
        raise InputError(f"--dataset {dataset!r} is no detection data set.{did_you_mean(dataset, DATASETS)}")
    check_architecture(encoder)
    _check_colours(encoder, config)
    if dataset in BOXES_ONLY and (config.masks or config.keypoints):
        what = "masks" if config.masks else "keypoints"
        raise InputError(
            f"--dataset {dataset} has boxes only and recipe {config.protocol} asks for {what}; take "
            f"--set {what}=false, or data in COCO format (--dataset coco-folder)"
        )
    schedule, unit = config.schedule, processes * config.accumulate
    if schedule.steps and schedule.steps[0] >= schedule.iterations:
        console.warn(
            f"schedule.steps {list(schedule.steps)} lie behind {schedule.iterations} iterations: the rate never falls"
        )
    if config.batch_size % unit:
        near = [size for size in (config.batch_size // unit * unit, -(-config.batch_size // unit) * unit) if size]
        raise InputError(
            f"batch_size {config.batch_size} does not divide into {processes} processes x {config.accumulate} parts; "
            f"take --batch-size {' or '.join(map(str, near))}, or another --nproc"
        )
    return engines.choose(engine, encoder, config)


def _check_colours(encoder: Encoder, config: DetectConfig) -> None:
    """Raises InputError where the recipe names other colours than the encoder expects."""
    expected = _pixels(encoder)["channels"]
    if config.input.format.upper() not in ("AUTO", expected):
        stated = "expects" if encoder.preprocessing else "does not say what it expects and is given"
        raise InputError(
            f"input.format {config.input.format} in the recipe, and {encoder.source} {stated} {expected}; "
            "take --set input.format=auto, which follows the encoder"
        )


def _pixels(encoder: Encoder) -> dict[str, Any]:
    """What the encoder is given: colours, mean and standard deviation; and whether its checkpoint says so."""
    given = (encoder.preprocessing or Preprocessing()).to_dict()
    return {name: given[name] for name in ("channels", "mean", "std", "range")} | {
        "from": "encoder" if encoder.preprocessing else "default: the encoder does not say"
    }


def open_data(
    dataset: str, data: Path | None, train_split: str | None, test_split: str | None, config: DetectConfig
) -> DetectionData:
    """The images and boxes of a data set on disk, with the masks or keypoints that the recipe asks for.

    Raises:
        InputError: no folder, no masks, or what the readers refuse.
    """
    for variable in ("MOCO_EVAL_DATA", "DETECTRON2_DATASETS"):
        data = data or (Path(os.environ[variable]) if os.environ.get(variable) else None)
    if data is None:
        raise InputError(
            f"--dataset {dataset} needs --data (or MOCO_EVAL_DATA, or DETECTRON2_DATASETS); for example: "
            f"moco-eval detect CHECKPOINT --dataset {dataset} --data path/to/data"
        )
    if not data.is_dir():
        raise InputError(f"--data {data} {'is a file' if data.exists() else 'does not exist'}; give the data's folder")
    opened = _read(dataset, data, train_split, test_split, config)
    for split, samples in ((opened.train_split, opened.train), (opened.test_split, opened.test)):
        _check_kinds(config, samples, f"{split} in {data}")
    return opened


def _check_splits(dataset: str, train_split: str | None, test_split: str | None) -> None:
    """Raises InputError where splits are named of a data set whose splits are fixed."""
    if dataset in ("voc", "voc07", "coco", "digits") and (train_split or test_split):
        other = "coco-folder" if dataset == "coco" else "voc-folder"
        raise InputError(f"--dataset {dataset} has its own splits; for others take --dataset {other}")


def _check_kinds(config: DetectConfig, samples: Sequence[Sample], where: str) -> None:
    """Raises InputError where a split has nothing of a kind that the recipe trains and judges."""
    if config.masks and not any(mask is not None for sample in samples for mask in sample.masks):
        raise InputError(
            f"recipe {config.protocol} asks for masks and no object of {where} has one; "
            "take --set masks=false, or data with segmentations"
        )
    labelled = (sample.keypoints is not None and (sample.keypoints[..., 2] > 0).any() for sample in samples)
    if config.keypoints and not any(labelled):
        raise InputError(
            f"recipe {config.protocol} asks for keypoints and no object of {where} has a labelled one; "
            "take --set keypoints=false, or data with keypoints"
        )


def _read(
    dataset: str, data: Path, train_split: str | None, test_split: str | None, config: DetectConfig
) -> DetectionData:
    clip = config.data.clip
    if dataset in OFFICIAL:
        return OFFICIAL[dataset](data)
    if dataset == "voc-folder":
        return read_voc_folder(data, train_split, test_split, clip)
    if dataset == "coco":
        return read_coco(data, keypoints=config.keypoints)
    return read_coco_folder(data, train_split, test_split, clip, keypoints=config.keypoints)


def open_digits(folder: Path, scenes: Scenes, train_split: str | None, test_split: str | None) -> DetectionData:
    """The built-in scenes, drawn if they are not there, read as any VOC folder."""
    collectives.found_by_main(lambda: str(write_scenes(folder, seed=scenes.seed, train=scenes.train, test=scenes.test)))
    return read_voc_folder(folder / "voc", train_split, test_split, name="digits", classes=DIGITS)


# Trials and the record


def _trial(
    encoder: Encoder, data: DetectionData, config: DetectConfig, folder: Path, device: torch.device, engine: str
) -> dict[str, Any]:
    """One fine-tuning and its judgement, or what an earlier call left of it in trial.json. Collective."""
    if kept := collectives.found_by_main(lambda: _kept(folder)):
        return kept
    cost = Cost(str(device))
    found = engines.fine_tune_and_detect(engine, encoder, data, config, folder, device, cost)
    return collectives.found_by_main(lambda: _judge(data, config, folder, cost, found))


def _kept(folder: Path) -> dict[str, Any] | None:
    """A trial that is finished."""
    whole = all((folder / name).is_file() for name in ("trial.json", "detections.json"))
    return files.read_json(folder / "trial.json") if whole else None


def _judge(
    data: DetectionData, config: DetectConfig, folder: Path, cost: Cost, found: Sequence[Detections]
) -> dict[str, Any]:
    """Write what was found, and last of all what it is worth."""
    metrics, per_class = evaluate(data, found, rounded=config.protocol.startswith("detect/voc"))
    files.write_json(folder / "detections.json", _detections(data, found))
    pictures = draw_pictures(data, found, folder / "pictures")
    trial = {
        "seed": config.seed,
        "metrics": metrics,
        "per_class": per_class,
        "pictures": [path.relative_to(folder).as_posix() for path in pictures],
        "seconds": cost.seconds,
        "images": cost.images,
    }
    files.write_json(folder / "trial.json", trial)
    return trial


def _record(
    encoder: Encoder,
    data: DetectionData,
    config: DetectConfig,
    output: Path,
    device: torch.device,
    engine: str,
    folders: Sequence[Path],
    trials: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The result record of all trials; detections.json and pictures are the first one's."""
    first = folders[0]
    if first != output:
        with files.atomic(output / "detections.json") as temporary:
            shutil.copyfile(first / "detections.json", temporary)
    per_class = _mean_per_class([trial["per_class"] for trial in trials])
    per_class_bars(per_class, "APbb" if data.coco else "AP50", output / "per_class.svg")
    loss_curves([folder / "metrics.jsonl" for folder in folders], output / "losses.svg")
    published = config.protocol.startswith(("detect/voc", "detect/coco"))
    as_tested = config.precision == "fp32" and config.accumulate == 1  # what the tests of parity ran
    result = ResultRecord(
        protocol=config.protocol,
        dataset=data.record(),
        encoder=encoder,
        trials=[{"seed": trial["seed"], "metrics": trial["metrics"]} for trial in trials],
        over="finetune",
        selection="last-iteration",
        cost=Cost(str(device), *(sum(trial[name] for trial in trials) for name in ("seconds", "images"))),
        equivalences=[PARITY] if engine == "torchvision" and published and as_tested else [],
        deviations=_deviations(encoder, data, config),
        extra={
            "engine": engine,
            "processes": rank.world_size(),
            "preprocessing": _pixels(encoder),
            "per_class": per_class,
            "pictures": [(first / name).relative_to(output).as_posix() for name in trials[0]["pictures"]],
        },
    )
    return result.write(output)


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


def _deviations(encoder: Encoder, data: DetectionData, config: DetectConfig) -> list[str]:
    words = recipe_deviations(config, data.name, encoder.arch)
    shared = {sample.path for sample in data.train} & {sample.path for sample in data.test}
    if shared:
        words.append(f"{len(shared)} of {len(data.test)} test images are also trained on")
        console.warn(words[-1])
    return words


def _detections(data: DetectionData, found: Sequence[Detections]) -> dict[str, Any]:
    """detections.json: per image the boxes (x0, y0, x1, y1 in pixels, from 0), scores and labels.

    And where there are, masks (COCO's run-length encoding) and keypoints (x, y and score).
    """
    return {
        "classes": list(data.classes),
        "images": [
            {
                "image": sample.image_id,
                "boxes": detections.boxes.tolist(),
                "scores": detections.scores.tolist(),
                "labels": detections.labels.tolist(),
            }
            | ({} if detections.masks is None else {"masks": [_as_text(mask) for mask in detections.masks]})
            | ({} if detections.keypoints is None else {"keypoints": detections.keypoints.tolist()})
            for sample, detections in zip(data.test, found)
        ],
    }


def _as_text(mask: dict[str, Any]) -> dict[str, Any]:
    """A run-length encoding as JSON takes it."""
    counts = mask["counts"]
    return {"size": list(mask["size"]), "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}


def format_table(record: dict[str, Any]) -> str:
    """The average precisions of a record as plain text, all classes first."""
    names = list(record["metrics"])
    rows: list[tuple[str, Scores]] = [("all classes", dict(record["metrics"]))]
    if record["std"]:
        rows.append((f"std of {repeats(record)}", dict(record["std"])))
    rows += record["per_class"].items()
    width = max(len(label) for label, _ in rows)
    columns = [max(11, len(name) + 2) for name in names]
    lines = [" " * width + "".join(f"{name:>{wide}}" for name, wide in zip(names, columns))]
    for label, scores in rows:
        cells = ("-" if (value := scores.get(name)) is None else f"{value:.2f}" for name in names)
        lines.append(f"{label:<{width}}" + "".join(f"{cell:>{wide}}" for cell, wide in zip(cells, columns)))
    return "\n".join(lines)
