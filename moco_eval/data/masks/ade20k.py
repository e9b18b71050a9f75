"""ADE20K of the 2016 scene parsing challenge: images/ and annotations/ with training/ and validation/ in each."""

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

COUNT = 150
LAYOUT = "give ADEChallengeData2016, with images/ and annotations/"


def read_ade20k(root: Path, findings: Findings | None = None) -> SegmentationData:
    """training (20,210 images) to validation (2,000); value 0, other objects, is ignored, 1 to 150 are the classes.

    Raises:
        InputError: what is missing, with its place.
    """
    root = root / "ADEChallengeData2016" if (root / "ADEChallengeData2016").is_dir() else root
    splits = {split: _samples(root, split) for split in ("training", "validation")}
    return opened("ade20k", root, _names(root), splits, class_table(COUNT, (0,), first=1), findings or Findings())


def _samples(root: Path, split: str) -> list[MaskSample]:
    images, masks = (require_folder(root / kind / split, LAYOUT) for kind in ("images", "annotations"))
    return [MaskSample(stem, path, masks / f"{stem}.png") for stem, path in files_by_stem(images).items()]


def _names(root: Path) -> list[str]:
    """Of objectInfo150.txt, the last column, of which the first word is taken; numbers where it is not there."""
    path = root / "objectInfo150.txt"
    if path.is_file():
        rows = limits.read_bytes(path, "list").decode("utf-8", "replace").splitlines()[1:]
        names = [row.split("\t")[-1].partition(",")[0].strip() for row in rows if row.strip()]
        if len(names) == COUNT:
            return [name if names.count(name) == 1 else f"{name} {place}" for place, name in enumerate(names, 1)]
    return [str(number) for number in range(1, COUNT + 1)]
