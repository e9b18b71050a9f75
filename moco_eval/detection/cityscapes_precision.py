"""Average precision of Cityscapes instances, as cityscapesScripts computes it.

Unlike COCO's it wants an overlap above the threshold, leaves out objects of less than 100 pixels, forgives detections
that lie on unlabelled ground or on groups (a row of parked bicycles), and integrates precision over recall in steps.

Source: mcordts/cityscapesScripts 2.3.0, evaluation/evalInstanceLevelSemanticLabeling.py; read, not copied.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moco_eval.data.boxes.cityscapes import IDS, VOID, labels_of
from moco_eval.data.masks.samples import read_values
from moco_eval.detection.average_precision import Detections, Scores
from moco_eval.detection.masks import decoded

OVERLAPS = np.arange(0.5, 1.0, 0.05)  # as the script has them, to the last bit
SMALLEST = 100  # pixels of an object that counts


@dataclass(frozen=True)
class Found:
    """The detections of one class in one image, and the objects that can be found there.

    Attributes:
        scores: (D,).
        ignored: (D,) share of each that lies on unlabelled ground, groups and small objects.
        overlaps: (D,) IoU with the object, or group, that each overlaps most.
        owners: (D,) that object's place among those that count; -1 for a group or a small one.
        objects: how many count.
    """

    scores: np.ndarray
    ignored: np.ndarray
    overlaps: np.ndarray
    owners: np.ndarray
    objects: int


def cityscapes_ap(
    files: Sequence[Path], detections: Sequence[Detections], classes: Sequence[str]
) -> tuple[dict[str, float], dict[str, Scores]]:
    """APmk and APmk50, in percent: means over the classes that have objects, and of each class.

    Args:
        files: the *_gtFine_instanceIds.png of each image.
        detections: of each image, with masks.
        classes: the eight, in the order of the labels.
    Raises:
        InputError: a file that is not readable.
    """
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(_image, files, detections))
    table = np.array([list(_curve(column)) for column in zip(*images)])  # (classes, overlaps)
    per_class: dict[str, Scores] = {
        name: {"APmk": None, "APmk50": None}
        if np.isnan(row[0])
        else {"APmk": 100 * float(np.average(row)), "APmk50": 100 * float(row[0])}
        for name, row in zip(classes, table)
    }
    return {"APmk": 100 * float(np.nanmean(table)), "APmk50": 100 * float(np.nanmean(table[:, 0]))}, per_class


def _image(path: Path, detections: Detections) -> list[Found]:
    """What was found of each class in one image."""
    assert detections.masks is not None
    ids, places = np.unique(read_values(path), return_inverse=True)
    places = places.reshape(-1)
    sizes, labels = np.bincount(places), detections.labels
    covered = [_covered(mask, places, len(ids)) for mask in detections.masks]
    common = np.array(covered, dtype=np.int64).reshape(-1, len(ids))
    return [
        _of_class(label, ids, sizes, common[labels == place], detections.scores[labels == place])
        for place, label in enumerate(IDS)
    ]


def _covered(mask: dict[str, Any], places: np.ndarray, count: int) -> np.ndarray:
    """How many pixels of each id a mask covers, (count,)."""
    return np.bincount(places[decoded(mask).reshape(-1) != 0], minlength=count)


def _of_class(label: int, ids: np.ndarray, sizes: np.ndarray, common: np.ndarray, scores: np.ndarray) -> Found:
    """Of the detections that cover something.

    Args:
        label: of the class.
        ids, sizes: of what is in the image, and how many pixels each has, (I,).
        common: how many of these pixels each detection covers, (D, I).
    """
    solid = common.any(axis=1)
    common, scores = common[solid], scores[solid]
    area = common.sum(axis=1)
    own = labels_of(ids) == label
    group, small = own & (ids < 1000), own & (sizes < SMALLEST)
    counted = own & ~group & ~small
    # a small group counts twice, as it does in the script
    ignored = sum(common[:, chosen].sum(axis=1) for chosen in (np.isin(ids, VOID), group, small))
    objects = int(counted.sum())
    if not own.any():
        return Found(scores, ignored / area, np.zeros(len(area)), np.full(len(area), -1), objects)
    iou = common[:, own] / (sizes[own] + area[:, None] - common[:, own])
    best = iou.argmax(axis=1)
    owners = np.where(counted, np.cumsum(counted) - 1, -1)[own]
    return Found(scores, ignored / area, iou[np.arange(len(area)), best], owners[best], objects)


def _curve(images: Sequence[Found]) -> Iterator[float]:
    """AP of a class at each overlap; NaN where no image has an object of it."""
    objects = sum(image.objects for image in images)
    for overlap in OVERLAPS:
        if not objects:
            yield float("nan")
            continue
        right, scores = (np.concatenate(parts) for parts in zip(*(_marked(image, overlap) for image in images)))
        yield _steps(right, scores, objects) if len(scores) else 0.0


def _marked(image: Found, overlap: float) -> tuple[np.ndarray, np.ndarray]:
    """Which detections that count are right, and their scores.

    Of several on one object the one that scores highest is right and the others are wrong. On a group or a small
    object none counts; nor does one that overlaps nothing and lies on ignored ground by more than `overlap`.
    """
    hit = image.overlaps > overlap
    on_object = np.flatnonzero(hit & (image.owners >= 0))
    order = on_object[np.argsort(-image.scores[on_object], kind="stable")]
    _, first = np.unique(image.owners[order], return_index=True)
    right = np.zeros(len(hit), bool)
    right[order[first]] = True
    counts = (hit & (image.owners >= 0)) | (~hit & (image.ignored <= overlap))
    return right[counts], image.scores[counts]


def _steps(right: np.ndarray, scores: np.ndarray, objects: int) -> float:
    """Precision over recall, one point for each score and one at recall 0 with precision 1, integrated stepwise.

    Each point counts for half the way to the one before and half the way to the one behind.
    """
    order = np.argsort(scores)
    _, first = np.unique(scores[order], return_index=True)
    below = np.concatenate([[0], np.cumsum(right[order])])[first]  # right ones that score less
    true = right.sum() - below
    precision = np.append(true / (len(scores) - first), 1.0)
    recall = np.append(true / objects, 0.0)
    ends = np.concatenate([recall[:1], recall, [0.0]])
    return float(np.dot(precision, np.convolve(ends, [-0.5, 0, 0.5], "valid")))
