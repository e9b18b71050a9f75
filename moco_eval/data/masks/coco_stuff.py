"""COCO-Stuff 164k: COCO's train2017/ and val2017/, and stuffthingmaps/ with the same two."""

from pathlib import Path

from moco_eval import limits
from moco_eval.data.boxes.samples import Findings
from moco_eval.data.masks.samples import (
    MaskSample,
    SegmentationData,
    class_table,
    files_by_stem,
    opened,
    require_folder,
)

LABELS = 182
UNUSED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)  # values that COCO's list of 91 things has and no image
VALUES = tuple(value for value in range(LABELS) if value not in UNUSED)  # 171: things, then stuff
LAYOUT = "give the folder that holds train2017/, val2017/ (or images/ with both) and stuffthingmaps/"


def read_coco_stuff(root: Path, findings: Findings | None = None) -> SegmentationData:
    """train2017 (118,287 images) to val2017 (5,000), 171 classes of things and stuff; 255 is ignored.

    Raises:
        InputError: what is missing, with its place.
    Source: nightrome/cocostuff, README and labels.txt: the maps hold COCO's category id less one.
    """
    splits = {split: _samples(root, split) for split in ("train2017", "val2017")}
    table = class_table(len(VALUES), (255,), ids=VALUES)
    return opened("coco-stuff", root, _names(root), splits, table, findings or Findings())


def _samples(root: Path, split: str) -> list[MaskSample]:
    above = root / "images" if (root / "images" / split).is_dir() else root
    images, masks = require_folder(above / split, LAYOUT), require_folder(root / "stuffthingmaps" / split, LAYOUT)
    return [MaskSample(stem, path, masks / f"{stem}.png") for stem, path in files_by_stem(images).items()]


def _names(root: Path) -> list[str]:
    """Of the data set's labels.txt ('1: person'), where it is there; COCO's category ids elsewhere."""
    names: dict[int, str] = {}
    for path in (root / "labels.txt", root / "stuffthingmaps" / "labels.txt"):
        if path.is_file():
            rows = limits.read_bytes(path, "list").decode("utf-8", "replace").splitlines()
            pairs = [row.partition(":") for row in rows]
            names = {int(number): name.strip() for number, _, name in pairs if number.strip().isdecimal()}
    return [names.get(value + 1, str(value + 1)) for value in VALUES]
