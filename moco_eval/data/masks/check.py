"""`datasets check` for images with masks: all that is wrong with a folder, by the readers that `segment` uses."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moco_eval.data.boxes.samples import Findings, grouped, image_size
from moco_eval.data.catalogue import data_folder
from moco_eval.data.masks.folder import read_class_names, read_mask_folder
from moco_eval.data.masks.official import OFFICIAL
from moco_eval.data.masks.samples import (
    IGNORED,
    PUBLISHED,
    MaskSample,
    SegmentationData,
    counts_of_classes,
    read_values,
    require_one_size,
)
from moco_eval.errors import InputError

NAMES = (*OFFICIAL, "mask-folder")


def known() -> list[str]:
    """A line about each data set with masks."""
    splits = {name: " -> ".join(f"{count:,}" for count in counts) for name, counts in PUBLISHED.items()}
    splits["mask-folder"] = "train/, train_masks/, val/, val_masks/"
    return [f"{name:<12} {contents:<42} mIoU, for segment" for name, contents in splits.items()]


def check(
    name: str,
    data: Path | None,
    splits: tuple[str | None, str | None] = (None, None),
    classes: Path | None = None,
    ignored: Sequence[int] = (IGNORED,),
) -> tuple[list[str], str | None]:
    """Everything that is wrong with a data set, what is worth saying about it, and what it holds.

    Args:
        name: one of NAMES.
        data: its folder; None where MOCO_EVAL_DATA says it.
        splits, classes, ignored: of mask-folder; `classes` is a file of names.
    Returns:
        Lines to print; and what `segment` would refuse the data with, None where it takes them.
    Raises:
        InputError: no folder, or options of mask-folder with other data.
    """
    folder, findings = data_folder(name, data), Findings(go_on=True)
    if name in OFFICIAL and (any(splits) or classes or tuple(ignored) != (IGNORED,)):
        raise InputError(f"{name} has its own splits, classes and ignored values; for others take mask-folder")
    try:
        if name in OFFICIAL:
            found = OFFICIAL[name](folder, findings)
        else:
            names = read_class_names(classes) if classes else ()
            found = read_mask_folder(folder, *splits, names, ignored, findings=findings)
    except InputError as error:  # nothing can be read beyond this
        return [f"refused: {line}" for line in [*grouped(findings.refused), str(error)]], str(error)
    counts = [_look(found, split, samples, findings) for split, samples in _splits(found)]
    lines = [f"refused: {line}" for line in grouped(findings.refused)]
    lines += [f"note: {line}" for line in (*findings.notes(), *found.deviations)]
    return [line.replace(f"{folder}/", "") for line in lines] + _summary(found, counts), findings.refusal


def _splits(data: SegmentationData) -> list[tuple[str, list[MaskSample]]]:
    return [(data.train_split, data.train), (data.test_split, data.test)]


def _look(data: SegmentationData, split: str, samples: Sequence[MaskSample], findings: Findings) -> np.ndarray:
    """Pixels of each class of a split; what is wrong with its masks goes to `findings`."""
    findings.begin(split)
    total = np.zeros(len(data.classes), np.int64)
    for sample in samples:
        counts = _counts(data, sample, findings)
        if counts is not None and not counts.any():
            findings.note("masks without a labelled pixel", str(sample.mask))
        total += 0 if counts is None else counts
    if not total.any():
        findings.refuse("of all masks without a labelled pixel", split, f"no mask of {split} has a labelled pixel")
        return total
    for name, pixels in zip(data.classes, total):
        if not pixels:
            findings.note("classes without a pixel", name)
    return total


def _counts(data: SegmentationData, sample: MaskSample, findings: Findings) -> np.ndarray | None:
    """Pixels of each class of a mask; None where it is refused."""
    values = mask = size = None
    place = str(sample.mask)
    with findings.catching("images that cannot be read", str(sample.image)):
        size = image_size(sample.image)
    with findings.catching("masks that are not one channel of class numbers (RGB, JPEG or damaged)", place):
        values = read_values(sample.mask)
    if values is None:
        return None
    with findings.catching("masks with a value that is no class", place):
        mask = data.classes_of(sample, values)
    if size:
        with findings.catching("masks of another size than their image", place):
            require_one_size(sample, size, values)
    return None if mask is None else counts_of_classes(mask, len(data.classes))


def _summary(data: SegmentationData, counts: Sequence[np.ndarray]) -> list[str]:
    """What the splits hold, and the pixels of each class."""
    lines = [
        f"{data.name} {split}: {len(samples):,} images, {pixels.sum():,} labelled pixels"
        for (split, samples), pixels in zip(_splits(data), counts)
    ]
    lines.append(f"{len(data.classes)} classes; fingerprint {data.fingerprint}")
    width = max(len(name) for name in data.classes)
    return lines + [f"  {name:<{width}} {train:>14,} {test:>14,}" for name, train, test in zip(data.classes, *counts)]
