"""Cityscapes instances: leftImg8bit/<split>/<city>/*_leftImg8bit.png and gtFine's *_gtFine_instanceIds.png.

Source: mcordts/cityscapesScripts, helpers/labels.py and evaluation/instances2dict.py; read, not copied.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moco_eval.data.boxes.samples import (
    DetectionData,
    Findings,
    Sample,
    fingerprint,
    image_sizes,
    make_sample,
    require_counted,
    require_objects,
)
from moco_eval.data.masks.cityscapes import LAYOUT
from moco_eval.data.masks.samples import read_values, require_folder
from moco_eval.errors import InputError

CLASSES = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
IDS = (24, 25, 26, 27, 28, 31, 32, 33)  # label ids of these classes
VOID = (*range(7), 9, 10, 14, 15, 16, 18, 29, 30)  # label ids of ground without a label that counts
OFFICIAL = {"train": 2975, "val": 500}
LARGEST = 33_999  # the last instance of the last label


def read_cityscapes_instances(root: Path, findings: Findings | None = None) -> DetectionData:
    """train_fine (2,975 images) to val (500), their counts checked; groups, such as a row of bicycles, are crowds.

    A mask is the pixels of its instance in the file, run-length encoded, and a box goes around them.

    Args:
        root: holds leftImg8bit/ and gtFine/, or is the folder that holds such a cityscapes/.
        findings: where `datasets check` collects all that is wrong.
    Raises:
        InputError: what is missing, damaged or contradictory, with its file.
    """
    findings = findings or Findings()
    if not (root / "gtFine").is_dir() and (root / "cityscapes" / "gtFine").is_dir():
        root = root / "cityscapes"
    train, test = (_samples(root, split, findings) for split in OFFICIAL)
    if findings.refusal is None:
        require_objects(train, "train", root, findings)
        require_counted(test, "val", root, findings)
    findings.tell()
    samples = train + test
    files = [_instances(root, sample.path) for sample in samples]
    return DetectionData(
        name="cityscapes",
        classes=CLASSES,
        train=train,
        test=test,
        train_split="train",
        test_split="val",
        fingerprint=fingerprint(root, [sample.path for sample in samples] + files),
        instance_files=tuple(files[len(train) :]),
    )


def labels_of(ids: np.ndarray) -> np.ndarray:
    """The label ids of instance ids: 26 for the group 26, and for 26000, 26001, ..."""
    return np.where(ids < 1000, ids, ids // 1000)


def _instances(root: Path, image: Path) -> Path:
    name = image.name.removesuffix("_leftImg8bit.png")
    return root / "gtFine" / image.parent.parent.name / image.parent.name / f"{name}_gtFine_instanceIds.png"


def _samples(root: Path, split: str, findings: Findings) -> list[Sample]:
    findings.begin(split)
    for folder in ("leftImg8bit", "gtFine"):
        require_folder(root / folder / split, LAYOUT)
    paths = sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
    _check_files(root, split, paths)
    samples = []
    for path, size, found in zip(paths, image_sizes(paths, findings), _read_all(root, paths)):
        if isinstance(found, InputError):
            findings.refuse("files of instances that cannot be read", str(_instances(root, path)), str(found))
        elif size is not None:
            samples.append(_sample(root, path, size, found, findings))
    return samples


def _check_files(root: Path, split: str, paths: list[Path]) -> None:
    """Raises InputError for another number of images than the official one, and for an image without its instances."""
    if len(paths) != OFFICIAL[split]:
        raise InputError(f"{root} {split} has {len(paths)} images and the official split {OFFICIAL[split]}; {LAYOUT}")
    lost = [file for path in paths if not (file := _instances(root, path)).is_file()]
    if lost:
        raise InputError(
            f"{len(lost)} of {len(paths)} images have no instances: {lost[0]} does not exist; put it there"
        )


Objects = tuple[tuple[int, int], list[tuple[int, np.ndarray, np.ndarray]]]  # size; id, starts and ends of runs


def _read_all(root: Path, paths: list[Path]) -> Iterator[Objects | InputError]:
    """The objects of each image in order, from a few threads: decoders let the others work."""
    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(paths), 256):
            yield from pool.map(lambda path: _objects(_instances(root, path)), paths[start : start + 256])


def _objects(path: Path) -> Objects | InputError:
    """The instances and groups of our classes in a file, as runs of its pixels, column after column."""
    try:
        ids = read_values(path)
    except InputError as error:
        return error
    if ids.max(initial=0) > LARGEST:
        return InputError(f"{path} has the value {ids.max()}, and instances have 0 to {LARGEST}; correct it")
    pixels = ids.T.ravel()
    starts = np.concatenate([[0], np.flatnonzero(pixels[1:] != pixels[:-1]) + 1])
    ends, values = np.append(starts[1:], pixels.size), pixels[starts]
    known = np.unique(values[np.isin(labels_of(values), IDS)])
    runs = [(int(value), starts[values == value], ends[values == value]) for value in known]
    return (ids.shape[1], ids.shape[0]), runs


def _sample(root: Path, path: Path, size: tuple[int, int], found: Objects, findings: Findings) -> Sample:
    said, runs = found
    if said != size:
        message = (
            f"{_instances(root, path)} is {said[0]}x{said[1]} and its image {path} is {size[0]}x{size[1]}; put the "
            "right file in its place"
        )
        findings.refuse("files of instances of another size than their image", str(path), message)
        runs = []
    rows = [
        (_box(starts, ends, size[1]), IDS.index(labels_of(np.array(key))), False, key < 1000)
        for key, starts, ends in runs
    ]
    masks = [_mask(starts, ends, size) for _, starts, ends in runs]
    return make_sample(path.name.removesuffix("_leftImg8bit.png"), path, size, rows, masks)


def _box(starts: np.ndarray, ends: np.ndarray, height: int) -> tuple[float, ...]:
    """The box around runs of pixels, column after column; a run may go on in the next column."""
    left, right = starts.min() // height, (ends.max() - 1) // height + 1
    if (starts // height != (ends - 1) // height).any():
        return float(left), 0.0, float(right), float(height)
    return float(left), float((starts % height).min()), float(right), float(((ends - 1) % height).max() + 1)


def _mask(starts: np.ndarray, ends: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """Runs of pixels as COCO's run-length code, with text for counts."""
    from pycocotools import mask as coco_mask

    width, height = size
    edges = np.concatenate([[0], np.column_stack([starts, ends]).ravel(), [width * height]])
    code = coco_mask.frPyObjects({"size": [height, width], "counts": np.diff(edges).tolist()}, height, width)
    return {"size": [height, width], "counts": code["counts"].decode("ascii")}
