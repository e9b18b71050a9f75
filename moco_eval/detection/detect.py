"""`detect`: open the data, fine-tune a detector from an encoder, judge it, leave the record."""

import os
from pathlib import Path
from typing import Any

import torch

from moco_eval import files, results, runtime
from moco_eval.config import did_you_mean
from moco_eval.data.boxes import DetectionData
from moco_eval.data.coco import read_coco, read_coco_folder
from moco_eval.data.scenes import DIGITS, write_scenes
from moco_eval.data.voc import read_voc, read_voc_folder
from moco_eval.detection import engine
from moco_eval.detection.average_precision import Detections, Scores, evaluate
from moco_eval.detection.detector import check_architecture
from moco_eval.detection.inputs import trainable
from moco_eval.detection.pictures import draw_pictures
from moco_eval.detection.recipe import DetectConfig, Scenes, departures
from moco_eval.encoders.encoder import Encoder
from moco_eval.errors import InputError

DATASETS = ("voc", "coco", "voc-folder", "coco-folder", "digits")
ENGINE = "torchvision"


def detect(
    encoder: Encoder,
    dataset: str,
    data: Path | None,
    config: DetectConfig,
    output: Path,
    device: torch.device,
    train_split: str | None = None,
    test_split: str | None = None,
) -> dict[str, Any]:
    """Fine-tune Faster R-CNN from an encoder and judge it; run again in the same place to go on.

    Args:
        dataset: one of DATASETS.
        data: its folder; for 'digits' where its scenes are kept, by default output/scenes.
        output: run directory; see docs/detection.md for what is in it.
        train_split, test_split: for voc-folder and coco-folder.
    Returns:
        The result record; that of a finished run at once.
    Raises:
        InputError, RunFailed, Interrupted.
    """
    if runtime.world_size() > 1:
        raise InputError("detect on several processes is not built yet; run it without --nproc")
    check_architecture(encoder)
    split_options = (train_split, test_split)
    opened = None if dataset == "digits" else open_data(dataset, data, *split_options, clip=config.data.clip)
    resolved = {
        "command": "detect",
        "dataset": dataset,
        "data": str(data) if data else None,
        "fingerprint": opened.fingerprint if opened else None,
        "splits": list(split_options),
        "encoder": encoder.identity(),
        "config": config.model_dump(mode="json"),
    }
    results.open_run(output, resolved)
    if record := results.finished(output):
        return record
    opened = opened or open_digits(data or output / "scenes", config.scenes or Scenes(), *split_options)
    cost = results.Cost(str(device))
    found = engine.fine_tune_and_detect(ENGINE, encoder, opened, config, output, device, cost)
    return _judge(encoder, opened, config, output, cost, found)


def plan(
    encoder: Encoder,
    dataset: str,
    data: Path | None,
    config: DetectConfig,
    output: Path,
    train_split: str | None = None,
    test_split: str | None = None,
) -> str:
    """What `detect` would do, in a few lines; opens the data and writes nothing. Raises what `detect` does."""
    check_architecture(encoder)
    if dataset == "digits":
        scenes = config.scenes or Scenes()
        about = f"digits, {scenes.train} training and {scenes.test} test scenes drawn from seed {scenes.seed}"
        words = departures(config, dataset, encoder.arch)
    else:
        opened = open_data(dataset, data, train_split, test_split, clip=config.data.clip)
        about = (
            f"{dataset}, {len(opened.train)} training and {len(opened.test)} test images, {len(opened.classes)} classes"
        )
        words = _deviations(encoder, opened, config)
    return "\n".join(
        [
            f"{config.protocol} of {encoder.source}: {encoder.origin}, {encoder.arch}",
            f"engine: {ENGINE}; {config.schedule.iterations} iterations of {config.batch_size} images",
            f"data: {about}",
            *(f"differs from {config.protocol}: {one}" for one in words),
            f"output: {output}",
        ]
    )


def open_data(
    dataset: str, data: Path | None, train_split: str | None, test_split: str | None, clip: bool = False
) -> DetectionData:
    """The images and boxes of a data set on disk.

    Raises:
        InputError: an unknown name, no folder, or what the readers refuse.
    """
    if dataset not in DATASETS:
        raise InputError(f"--dataset {dataset!r} is no detection data set.{did_you_mean(dataset, DATASETS)}")
    for variable in ("MOCO_EVAL_DATA", "DETECTRON2_DATASETS"):
        data = data or (Path(os.environ[variable]) if os.environ.get(variable) else None)
    if data is None:
        raise InputError(
            f"--dataset {dataset} needs --data (or MOCO_EVAL_DATA, or DETECTRON2_DATASETS); for example: "
            f"moco-eval detect CHECKPOINT --dataset {dataset} --data path/to/data"
        )
    if not data.is_dir():
        raise InputError(f"--data {data} {'is a file' if data.exists() else 'does not exist'}; give the data's folder")
    if dataset in ("voc", "coco") and (train_split or test_split):
        raise InputError(f"--dataset {dataset} has its own splits; for others take --dataset {dataset}-folder")
    if dataset == "voc":
        return read_voc(data)
    if dataset == "coco":
        return read_coco(data)
    read = read_voc_folder if dataset == "voc-folder" else read_coco_folder
    opened = read(data, train_split, test_split, clip)
    if not trainable(opened.train):
        raise InputError(f"none of the {len(opened.train)} images of {opened.train_split} has a box to train on")
    return opened


def open_digits(folder: Path, scenes: Scenes, train_split: str | None, test_split: str | None) -> DetectionData:
    """The built-in scenes, drawn if they are not there, read as any VOC folder."""
    write_scenes(folder, seed=scenes.seed, train=scenes.train, test=scenes.test)
    return read_voc_folder(folder / "voc", train_split, test_split, name="digits", classes=DIGITS)


def _judge(
    encoder: Encoder,
    data: DetectionData,
    config: DetectConfig,
    output: Path,
    cost: results.Cost,
    found: list[Detections],
) -> dict[str, Any]:
    metrics, per_class = evaluate(data, found)
    files.write_json(output / "detections.json", _detections(data, found))
    pictures = draw_pictures(data, found, output / "pictures")
    result = results.Result(
        protocol=config.protocol,
        dataset=data.record(),
        encoder=encoder,
        trials=[{"seed": config.seed, "metrics": metrics}],
        over="finetune",
        selection="last-iteration",
        cost=cost,
        deviations=_deviations(encoder, data, config),
        extra={
            "engine": ENGINE,
            "per_class": per_class,
            "pictures": [path.relative_to(output).as_posix() for path in pictures],
        },
    )
    return result.write(output)


def _deviations(encoder: Encoder, data: DetectionData, config: DetectConfig) -> list[str]:
    words = departures(config, data.name, encoder.arch)
    if config.protocol.startswith("detect/voc-"):
        words.append(f"engine {ENGINE}, whose AP has not been shown equal to detectron2's")
    shared = {sample.path for sample in data.train} & {sample.path for sample in data.test}
    if shared:
        words.append(f"{len(shared)} of {len(data.test)} test images are also trained on")
        runtime.warn(words[-1])
    return words


def _detections(data: DetectionData, found: list[Detections]) -> dict[str, Any]:
    """detections.json: per image the boxes (x0, y0, x1, y1 in pixels, from 0), scores and labels."""
    return {
        "classes": list(data.classes),
        "images": [
            {
                "image": sample.image_id,
                "boxes": detections.boxes.tolist(),
                "scores": detections.scores.tolist(),
                "labels": detections.labels.tolist(),
            }
            for sample, detections in zip(data.test, found)
        ],
    }


def format_table(record: dict[str, Any]) -> str:
    """The average precisions of a record as plain text, all classes first."""
    names = list(record["metrics"])
    rows: list[tuple[str, Scores]] = [("all classes", dict(record["metrics"])), *record["per_class"].items()]
    width = max(len(label) for label, _ in rows)
    lines = [" " * width + "".join(f"{name:>11}" for name in names)]
    for label, scores in rows:
        cells = ("-" if scores[name] is None else f"{scores[name]:.2f}" for name in names)
        lines.append(f"{label:<{width}}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)
