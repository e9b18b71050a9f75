"""Cityscapes: leftImg8bit/<split>/<city>/*_leftImg8bit.png, gtFine/<split>/<city>/*_gtFine_labelIds.png."""

from pathlib import Path

import numpy as np

from moco_eval.data.boxes.samples import Findings
from moco_eval.data.masks.samples import IGNORED, MaskSample, SegmentationData, class_table, opened, require_folder

CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # of these classes, by trainId
LABELS = 34  # label ids, from 0; those that no class has are ignored, as is -1, a licence plate, in an 8-bit file
LAYOUT = "give the folder that holds Cityscapes' leftImg8bit/ and gtFine/"


def read_cityscapes(root: Path, findings: Findings | None = None) -> SegmentationData:
    """train_fine (2,975 images) to val (500).

    Raises:
        InputError: what is missing, with its place.
    Source: cityscapesScripts, helpers/labels.py.
    """
    splits = {split: _samples(root, split) for split in ("train", "val")}
    return opened("cityscapes", root, CLASSES, splits, label_table(), findings or Findings())


def label_table() -> np.ndarray:
    """Of label ids; see `SegmentationData.values`."""
    others = [label for label in (*range(LABELS), 255) if label not in IDS]
    table = class_table(len(CLASSES), others, ids=IDS)
    assert (table[:LABELS] >= 0).all() and table[0] == IGNORED
    return table


def _samples(root: Path, split: str) -> list[MaskSample]:
    images, masks = root / "leftImg8bit" / split, root / "gtFine" / split
    require_folder(images, LAYOUT)
    require_folder(masks, LAYOUT)
    samples = []
    for path in sorted(images.glob("*/*_leftImg8bit.png")):
        name = path.name.removesuffix("_leftImg8bit.png")
        samples.append(MaskSample(name, path, masks / path.parent.name / f"{name}_gtFine_labelIds.png"))
    return samples
