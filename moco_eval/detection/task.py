"""What one detection evaluation is about: the encoder, the data, the recipe; its checks, and opening the data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from moco_eval.config.data_name import OWN, called, layout_of
from moco_eval.config.detection import DetectConfig, Scenes
from moco_eval.config.load import did_you_mean
from moco_eval.data.boxes.check import doubts, shared_images
from moco_eval.data.boxes.cityscapes import read_cityscapes_instances
from moco_eval.data.boxes.coco import read_coco, read_coco_folder
from moco_eval.data.boxes.lvis import CLASSES, read_lvis
from moco_eval.data.boxes.samples import DetectionData, Findings, Sample, require_counted
from moco_eval.data.boxes.scenes import DIGITS, write_scenes
from moco_eval.data.boxes.voc import read_voc, read_voc07, read_voc_folder
from moco_eval.detection import engine as engines
from moco_eval.detection.detector import check_architecture
from moco_eval.detection.inputs import resized
from moco_eval.detection.recipe import DATASETS, recipe_deviations
from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.photographs import pixels, require_no_resizing, require_photographs
from moco_eval.errors import InputError
from moco_eval.results.fine_tuning_task import FineTuningTask, check_schedule, data_folder
from moco_eval.runtime import collectives, console

OFFICIAL: dict[str, Callable[[Path], DetectionData]] = {
    "voc": read_voc,
    "voc07": read_voc07,
    **{f"lvis-{version}": partial(read_lvis, version=version) for version in CLASSES},
    "cityscapes": read_cityscapes_instances,
}
BOXES_ONLY = ("voc", "voc07", "voc-folder", "digits")


@dataclass(frozen=True)
class DetectionTask(FineTuningTask):
    """What one detection evaluation is about.

    Attributes:
        dataset: one of DATASETS.
        data: with a folder of None, MOCO_EVAL_DATA or DETECTRON2_DATASETS.
        train_split, test_split: for voc-folder and coco-folder.
        engine: auto, torchvision or detectron2.
    """

    config: DetectConfig
    data: Path | DetectionData | None = None
    engine: str = "auto"

    def check(self, processes: int) -> str:
        """Everything that can be refused before the data are opened; returns the engine, and says which `auto` is.

        Raises:
            InputError: an encoder that no detector takes, or that expects other colours than the recipe says; masks or
                keypoints where there are none; splits of data that have their own; a batch that the processes cannot
                share; see also `detection.engine.choose`.
        """
        if self.dataset and self.layout not in DATASETS:
            raise InputError(
                f"--dataset {self.dataset!r} is no detection data set.{did_you_mean(self.dataset, DATASETS)}"
            )
        require_photographs(self.encoder, "detect")
        check_architecture(self.encoder, self.config.model)
        require_no_resizing(self.encoder, "a detector")
        _check_colours(self.encoder, self.config)
        _check_heads(self.layout, self.config)
        parts = self.config.accumulate
        check_schedule(self.config, processes * parts, f"{processes} processes x {parts} parts")
        engine = engines.choose(self.engine, self.encoder, self.config)
        _check_splits(self)
        return engine

    def open(self) -> DetectionData | None:
        """The data, which are only read; None for 'digits', whose scenes are drawn below the run directory.

        Warns of test images that are trained on, or have more objects than can be found.

        Raises:
            InputError: no folder, no object that counts, no masks or keypoints that the recipe asks for, images that it
                makes nothing of, or what the readers refuse.
        """
        if self.scenes:
            return None
        if data := self.opened:
            _check_data(self.config, data, self.name)
        else:
            data = open_data(self.dataset, self.folder, self.splits, self.config)
        _warn_of_test_images(self.config, data)
        return data

    def draw(self, output: Path) -> DetectionData:
        assert self.scenes
        return open_digits(self.folder or output / "scenes", self.scenes)

    @property
    def splits(self) -> tuple[str | None, str | None]:
        """The training and the test split that were asked for."""
        return self.train_split, self.test_split

    def deviations(self, data: DetectionData | None = None) -> list[str]:
        of_recipe = recipe_deviations(self.config, layout_of(self.name), self.encoder.arch)
        return of_recipe + self.limits + (_shared(data) if data else [])

    def resolved(self, engine: str, data: DetectionData | None) -> dict[str, Any]:
        """What config.yaml says of the run: everything that decides its numbers."""
        return {
            "command": "detect",
            "dataset": self.name,
            "data": str(self.folder) if self.folder else None,
            "fingerprint": data.fingerprint if data else None,
            "splits": list(self.splits),
            "encoder": self.encoder.identity(),
            "engine": engine,
            "trials": self.trials,
            "config": self.config.model_dump(mode="json"),
        } | ({"limit": self.limit} if self.limit else {})


# Checks


def _check_colours(encoder: Encoder, config: DetectConfig) -> None:
    """Raises InputError where the recipe names other colours than the encoder expects."""
    expected = pixels(encoder)["channels"]
    if config.input.format.upper() not in ("AUTO", expected):
        stated = "expects" if encoder.preprocessing else "does not say what it expects and is given"
        raise InputError(
            f"input.format {config.input.format} in the recipe, and {encoder.source} {stated} {expected}; "
            "take --set input.format=auto, which follows the encoder"
        )


def _check_heads(dataset: str, config: DetectConfig) -> None:
    """Raises InputError where the recipe has a head for masks or keypoints, and the data set has boxes only."""
    if dataset in BOXES_ONLY and (config.masks or config.keypoints):
        head = "masks" if config.masks else "keypoints"
        raise InputError(
            f"--dataset {dataset} has boxes only and recipe {config.protocol} asks for {head}; take "
            f"--set {head}=false, or data in COCO format (--dataset coco-folder)"
        )
    if dataset == "cityscapes":
        _require_masks(config)


def _require_masks(config: DetectConfig) -> None:
    """Raises InputError where a recipe for Cityscapes' instances trains no masks."""
    if not config.masks:
        raise InputError(
            f"cityscapes is judged by its masks and recipe {config.protocol} trains none; take --set masks=true"
        )


def _check_splits(task: DetectionTask) -> None:
    """Raises InputError where splits are named of a data set whose splits are fixed."""
    if task.layout not in ("voc-folder", "coco-folder") and any(task.splits):
        if not task.dataset:
            raise InputError(f"train_split and test_split are of data in a folder; {task.name} is open already")
        other = "voc-folder" if task.dataset in BOXES_ONLY else "coco-folder"
        raise InputError(f"--dataset {task.dataset} has its own splits; for others take --dataset {other}")


def _check_data(config: DetectConfig, data: DetectionData, where: str) -> None:
    """What the readers cannot know. Raises InputError where nothing can be counted, or the recipe does not fit."""
    require_counted(data.test, data.test_split, where, Findings())
    if data.instance_files:
        _require_masks(config)
    _check_kinds(config, data, where)
    _check_shapes(config, data)


def _check_shapes(config: DetectConfig, data: DetectionData) -> None:
    """Raises InputError where a resized image would have a side of 0 pixels."""
    shorter, longest = min(*config.input.min_size_train, config.input.min_size_test), config.input.max_size
    samples = data.train + data.test
    lost = [sample for sample in samples if 0 in resized(sample.size, shorter, longest)]
    if lost:
        width, height = lost[0].size
        raise InputError(
            f"{len(lost)} of {len(samples)} images are too long and thin: {lost[0].path} of {width}x{height} pixels "
            f"has a side of 0 once the longer one is input.max_size {longest}; cut it, or take it out of its split"
        )


def _warn_of_test_images(config: DetectConfig, data: DetectionData) -> None:
    """Of those that are trained on, and those that have more objects than the recipe lets the detector find."""
    for line in _shared(data):
        console.warn(line)
    limit, counts = config.test.detections, [int((~sample.crowd).sum()) for sample in data.test]
    if crowded := sum(count > limit for count in counts):
        console.warn(
            f"{crowded} of {len(counts)} test images have more objects (up to {max(counts)}) than test.detections "
            f"{limit}: some cannot be found; --set test.detections={max(counts)} allows for all"
        )


def _shared(data: DetectionData) -> list[str]:
    """How many test images are trained on, in words; nothing where none is."""
    shared = len(shared_images(data))
    return [f"{shared} of {len(data.test)} test images are also trained on"] if shared else []


def _check_kinds(config: DetectConfig, data: DetectionData, where: str) -> None:
    """Raises InputError where a split has nothing of a kind that the recipe trains and judges, or too thin an image."""
    for split, samples in ((data.train_split, data.train), (data.test_split, data.test)):
        _check_split(config, samples, f"{split} in {where}")


def _check_split(config: DetectConfig, samples: Sequence[Sample], where: str) -> None:
    masks = (mask for sample in samples for mask, crowd in zip(sample.masks, sample.crowd) if not crowd)
    if config.masks and not any(mask is not None for mask in masks):
        raise InputError(
            f"recipe {config.protocol} asks for masks and no object of {where} has one; "
            "take --set masks=false, or data with segmentations"
        )
    points = (s.keypoints[~s.crowd] for s in samples if s.keypoints is not None)
    labelled = ((marks[..., 2] > 0).any() for marks in points)
    if config.keypoints and not any(labelled):
        raise InputError(
            f"recipe {config.protocol} asks for keypoints and no object of {where} has a labelled one; "
            "take --set keypoints=false, or data with keypoints"
        )


# Data


def open_data(
    dataset: str, data: Path | None, splits: tuple[str | None, str | None], config: DetectConfig
) -> DetectionData:
    """The images and boxes of a data set on disk, with the masks or keypoints that the recipe asks for.

    Args:
        splits: for training and for testing, of voc-folder and coco-folder; None for their usual ones.
    Raises:
        InputError: no folder, no masks, or what the readers refuse.
    """
    data = data_folder("detect", dataset, data, ("MOCO_EVAL_DATA", "DETECTRON2_DATASETS"))
    opened = _read(layout_of(dataset), data, splits, config)
    opened = replace(opened, name=called(dataset, data)) if layout_of(dataset) in OWN else opened
    _check_data(config, opened, str(data))
    for split, samples in ((opened.train_split, opened.train), (opened.test_split, opened.test)):
        for doubt in doubts(samples, split):
            console.warn(doubt)
    return opened


def _read(dataset: str, data: Path, splits: tuple[str | None, str | None], config: DetectConfig) -> DetectionData:
    clip = config.data.clip
    if dataset in OFFICIAL:
        return OFFICIAL[dataset](data)
    if dataset == "voc-folder":
        return read_voc_folder(data, *splits, clip)
    if dataset == "coco":
        return read_coco(data, keypoints=config.keypoints)
    return read_coco_folder(data, *splits, clip, keypoints=config.keypoints)


def open_digits(folder: Path, scenes: Scenes) -> DetectionData:
    """The built-in scenes, drawn if they are not there, read as any VOC folder. Collective."""
    collectives.found_by_main(lambda: str(write_scenes(folder, seed=scenes.seed, train=scenes.train, test=scenes.test)))
    return read_voc_folder(folder / "voc", None, None, name="digits", classes=DIGITS)
