"""What one segmentation is about: the encoder, the data, the recipe; its checks, and opening the data."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from moco_eval.config.data_name import called, layout_of
from moco_eval.config.load import did_you_mean
from moco_eval.config.segmentation import MaskScenes, SegmentConfig
from moco_eval.data.masks import scenes as digits
from moco_eval.data.masks.folder import read_class_names, read_mask_folder
from moco_eval.data.masks.official import OFFICIAL
from moco_eval.data.masks.samples import IGNORED, SegmentationData, count_pixels
from moco_eval.encoders.photographs import require_no_resizing, require_photographs
from moco_eval.errors import InputError
from moco_eval.results.fine_tuning_task import FineTuningTask, check_schedule, data_folder
from moco_eval.runtime import collectives, console
from moco_eval.segmentation.networks import check_encoder
from moco_eval.segmentation.recipe import DATASETS, recipe_deviations

NAMED = 5  # classes that a warning names


@dataclass(frozen=True)
class SegmentationTask(FineTuningTask):
    """What one segmentation is about.

    Attributes:
        dataset: one of DATASETS.
        data: with a folder of None, MOCO_EVAL_DATA.
        train_split, test_split, classes, ignored: for mask-folder; `classes` is a file of names.
    """

    config: SegmentConfig
    data: Path | SegmentationData | None = None
    classes: Path | None = None
    ignored: tuple[int, ...] = (IGNORED,)

    def check(self, processes: int) -> None:
        """Everything that can be refused before the data are opened.

        Raises:
            InputError: an unknown data set; an encoder that the model does not stand on; a batch that the processes
                cannot share; options of mask-folder with other data.
        """
        if self.dataset and self.layout not in DATASETS:
            raise InputError(
                f"--dataset {self.dataset!r} is no data set with masks.{did_you_mean(self.dataset, DATASETS)}"
            )
        require_photographs(self.encoder, "segment")
        require_no_resizing(self.encoder, "a segmentation")
        check_encoder(self.encoder, self.config)
        _check_schedule(self.config, processes)
        _check_options(self)

    def open(self) -> SegmentationData | None:
        """The data, every mask read once; None for 'digits', whose scenes are drawn below the run directory.

        Warns of classes without a pixel and of images without a labelled one. Collective.

        Raises:
            InputError: no folder, what the readers refuse, a mask that is refused, a split without a labelled pixel.
        """
        if self.scenes:
            return None
        splits = (self.train_split, self.test_split)
        data = self.opened or open_data(self.dataset, self.folder, splits, self.classes, self.ignored)
        _look(data, str(self.folder or self.name))
        return data

    def draw(self, output: Path) -> SegmentationData:
        assert self.scenes
        scenes = self.config.scenes or MaskScenes()
        folder = self.folder or output / "scenes"
        collectives.found_by_main(lambda: str(digits.write_mask_scenes(folder, **scenes.model_dump())))
        return read_mask_folder(folder, classes=digits.CLASSES, name="digits")

    def deviations(self, data: SegmentationData | None = None) -> list[str]:
        of_recipe = recipe_deviations(self.config, layout_of(self.name), self.encoder.arch)
        return of_recipe + self.limits + (list(data.deviations) if data else [])

    def resolved(self, data: SegmentationData | None) -> dict[str, Any]:
        """What config.yaml says of the run: everything that decides its numbers."""
        return {
            "command": "segment",
            "dataset": self.name,
            "data": str(self.folder) if self.folder else None,
            "fingerprint": data.fingerprint if data else None,
            "splits": [self.train_split, self.test_split],
            "classes": list(data.classes) if data else None,
            "ignored": list(self.ignored),
            "encoder": self.encoder.identity(),
            "trials": self.trials,
            "config": self.config.model_dump(mode="json"),
        } | ({"limit": self.limit} if self.limit else {})


# Checks


def _check_schedule(config: SegmentConfig, processes: int) -> None:
    """See `check_schedule`; warns of a BN that has one image."""
    check_schedule(config, processes, f"{processes} processes")
    share = config.batch_size // processes
    if share == 1 and config.bn == "local" and config.model != "linear":
        console.warn("each process has one image: its BN statistics are that image's; take --set bn=sync")


def _check_options(task: SegmentationTask) -> None:
    """Raises InputError where options of mask-folder are given with other data."""
    given = {
        "--train-split": task.train_split,
        "--test-split": task.test_split,
        "--classes": task.classes,
        "--ignore": task.ignored if task.ignored != (IGNORED,) else None,
    }
    if task.layout != "mask-folder" and (wrong := [name for name, value in given.items() if value]):
        raise InputError(f"{wrong[0]} is of --dataset mask-folder; {task.name} has its own: leave it out")


def _look(data: SegmentationData, where: str) -> None:
    """Read every mask. Warns of, or refuses, what a training or a score would make nothing of. Collective."""
    splits = {"training": (data.train_split, data.train), "test": (data.test_split, data.test)}
    for kind, (split, samples) in splits.items():
        present, empty = collectives.found_by_main(partial(_summary, data, samples))
        if not any(present):
            raise InputError(f"no mask of {split} in {where} has a labelled pixel: all are ignored; give other masks")
        if missing := [name for name, there in zip(data.classes, present) if not there]:
            some = ", ".join(missing[:NAMED]) + (", ..." if len(missing) > NAMED else "")
            why = "they are never learnt" if kind == "training" else "they count only where they are predicted"
            lack = f"{len(missing)} of {len(data.classes)} classes have no pixel in the {kind} masks ({some})"
            console.warn(f"{lack}: {why}")
        if empty:
            console.warn(f"{len(empty)} of {len(samples)} {kind} masks have no labelled pixel (the first: {empty[0]})")


def _summary(data: SegmentationData, samples: Sequence[Any]) -> tuple[list[bool], list[str]]:
    """Which classes have a pixel, and the masks where none has."""
    counts = count_pixels(data, samples)
    labelled = counts.sum(axis=1).tolist()
    empty = [str(sample.mask) for sample, pixels in zip(samples, labelled) if not pixels]
    return [pixels > 0 for pixels in counts.sum(axis=0).tolist()], empty


# Data


def open_data(
    dataset: str,
    data: Path | None,
    splits: tuple[str | None, str | None] = (None, None),
    classes: Path | None = None,
    ignored: Sequence[int] = (IGNORED,),
) -> SegmentationData:
    """The images and masks of a data set on disk; its masks are not read yet.

    Args:
        splits, classes, ignored: of mask-folder; `classes` is a file of names.
    Raises:
        InputError: no folder, or what the readers refuse.
    """
    layout = layout_of(dataset)
    folder = data_folder("segment", layout, data, ("MOCO_EVAL_DATA",))
    if layout in OFFICIAL:
        return OFFICIAL[layout](folder)
    opened = read_mask_folder(folder, *splits, read_class_names(classes) if classes else (), ignored)
    return replace(opened, name=called(dataset, folder))
