"""Average precision: VOC's (11-point and area) at any IoU, and COCO's by pycocotools; for any engine."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moco_eval.data.boxes import DetectionData, Sample

IOUS = tuple(0.5 + 0.05 * i for i in range(10))


@dataclass(frozen=True)
class Detections:
    """What a detector found in one image.

    Attributes:
        boxes: (N, 4) float64 as in `Sample`: pixels of the image on disk, after its EXIF rotation.
        scores: (N,) float64, falling.
        labels: (N,) int64.
        masks: of each box, as pycocotools encodes it (size and counts, of the whole image); None without a mask head.
        keypoints: (N, K, 3) float64: x, y and score; None without a keypoint head.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: list[dict[str, Any]] | None = None
    keypoints: np.ndarray | None = None


Scores = dict[str, float | None]


def evaluate(data: DetectionData, found: Sequence[Detections]) -> tuple[dict[str, float], dict[str, Scores]]:
    """The metrics of a test split and those of each class, in percent.

    VOC format: AP, AP50, AP75 by the 11-point rule (as the published VOC numbers), and by the area under the
    curve as AP_area, AP50_area, AP75_area. COCO format: AP, AP50, AP75 by pycocotools.

    Args:
        found: one entry per image of data.test, in its order.
    Returns:
        Metrics over the classes that have objects, and per class; None for a class without objects.
    """
    assert len(found) == len(data.test)
    if data.coco is not None:
        return coco_ap(data.coco, coco_rows(data, found), dict(zip(data.category_ids, data.classes)))
    return voc_ap(data.test, found, data.classes)


# VOC


def voc_ap(
    samples: Sequence[Sample], found: Sequence[Detections], classes: Sequence[str]
) -> tuple[dict[str, float], dict[str, Scores]]:
    """VOC AP at IoU .5:.95, .5 and .75; see `evaluate`.

    Source: Everingham et al. 2010 and the devkit; AP over ten IoUs as in detectron2's VOC evaluator.
    """
    per_class: dict[str, Scores] = {}
    for label, name in enumerate(classes):
        curves = [class_curve(samples, found, label, iou) for iou in IOUS]
        per_class[name] = {}
        for suffix, area in (("", eleven_point), ("_area", area_under)):
            values = [None if curve is None else 100 * area(*curve) for curve in curves]
            per_class[name] |= _named(values, suffix)
    return _means(per_class), per_class


def _named(values: Sequence[float | None], suffix: str = "") -> Scores:
    """AP, AP50 and AP75 of a class from its values at the ten IoUs; all None where it has no objects."""
    known = [value for value in values if value is not None]
    mean = float(np.mean(known)) if known else None
    return {f"AP{suffix}": mean, f"AP50{suffix}": values[0], f"AP75{suffix}": values[5]}


def _means(per_class: dict[str, Scores]) -> dict[str, float]:
    """Over the classes that have objects; 0 where none has."""
    names = next(iter(per_class.values()))
    known = {name: [v for s in per_class.values() if (v := s[name]) is not None] for name in names}
    return {name: float(np.mean(values)) if values else 0.0 for name, values in known.items()}


def class_curve(
    samples: Sequence[Sample], found: Sequence[Detections], label: int, iou: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """Recall and precision of a class after each of its detections, highest score first.

    A detection belongs to the object it overlaps most. It is right if their IoU is above `iou` and no better
    scored detection took that object; it counts neither way if the object is difficult; else it is wrong. The
    IoU of VOC's inclusive pixels (1 added to width and height) is the plain one here: boxes carry xmin - 1.

    Returns:
        Two arrays of length detections, or None where the class has no object that is not difficult.
    """
    overlaps, owners, scores, difficult = _best_overlaps(samples, found, label)
    positives = int((~difficult).sum())
    if positives == 0:
        return None
    order = np.argsort(-scores, kind="stable")
    overlaps, owners = overlaps[order], owners[order]
    hit = overlaps > iou
    ignored = hit.copy()
    ignored[hit] = difficult[owners[hit]]
    right = np.zeros(len(order), dtype=bool)
    candidates = np.flatnonzero(hit & ~ignored)
    _, first = np.unique(owners[candidates], return_index=True)
    right[candidates[first]] = True
    true = np.cumsum(right)
    wrong = np.cumsum(~right & ~ignored)
    return true / positives, true / np.maximum(true + wrong, np.finfo(np.float64).eps)


def _best_overlaps(
    samples: Sequence[Sample], found: Sequence[Detections], label: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Each detection's best IoU, that object's number (-1: none) and score; which objects are difficult."""
    overlaps, owners, scores, difficult = (
        [np.zeros(0)],
        [np.zeros(0, np.int64)],
        [np.zeros(0)],
        [np.zeros(0, bool)],
    )
    offset = 0
    for sample, detections in zip(samples, found):
        of_class, ours = sample.labels == label, detections.labels == label
        truth = sample.boxes[of_class]
        boxes = np.asarray(detections.boxes, dtype=np.float64).reshape(-1, 4)[ours]
        if len(boxes) and len(truth):
            table = box_iou(boxes, truth)
            overlaps.append(table.max(axis=1))
            owners.append(table.argmax(axis=1) + offset)
        else:
            overlaps.append(np.full(len(boxes), -np.inf))
            owners.append(np.full(len(boxes), -1))
        scores.append(np.asarray(detections.scores, dtype=np.float64)[ours])
        difficult.append(sample.difficult[of_class])
        offset += len(truth)
    return np.concatenate(overlaps), np.concatenate(owners), np.concatenate(scores), np.concatenate(difficult)


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of (N, 4) and (M, 4) corner boxes, (N, M)."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (first, second)]
    return common / np.maximum(areas[0][:, None] + areas[1][None, :] - common, np.finfo(np.float64).tiny)


def eleven_point(recall: np.ndarray, precision: np.ndarray) -> float:
    """VOC2007's AP: the mean over recalls 0, 0.1, ..., 1 of the best precision from there on."""
    return float(np.mean([precision[recall >= level].max(initial=0.0) for level in np.arange(0.0, 1.1, 0.1)]))


def area_under(recall: np.ndarray, precision: np.ndarray) -> float:
    """VOC2010's AP: the area under precision made monotonous from the right."""
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))


# COCO


def coco_rows(data: DetectionData, found: Sequence[Detections]) -> list[dict[str, Any]]:
    """Detections as pycocotools and the COCO server take them: x, y, width, height and category ids."""
    rows = []
    for sample, detections in zip(data.test, found):
        for (x0, y0, x1, y1), score, label in zip(
            detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist()
        ):
            box = [x0, y0, x1 - x0, y1 - y0]
            category = data.category_ids[label]
            rows.append({"image_id": sample.image_id, "category_id": category, "bbox": box, "score": score})
    return rows


def coco_ap(
    truth: dict[str, Any], rows: list[dict[str, Any]], names: dict[int, str]
) -> tuple[dict[str, float], dict[str, Scores]]:
    """COCO's AP, AP50 and AP75 of boxes, in percent.

    Args:
        truth: images, annotations and categories, as in a COCO file.
        rows: detections as of `coco_rows`.
        names: class name of each category id.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not rows:
        with_objects = {item["category_id"] for item in truth["annotations"] if not item["iscrowd"]}
        empty = {name: _named([0.0 if key in with_objects else None] * 10) for key, name in names.items()}
        return _means(empty), empty
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = {"info": {}, "licenses": [], **truth}
        reference.createIndex()
        judge = COCOeval(reference, reference.loadRes(rows), "bbox")
        judge.evaluate()
        judge.accumulate()
    # precision: IoU, recall, category, area range, detections per image; -1 where there is no object
    precision = judge.eval["precision"][:, :, :, 0, -1]
    per_class = {}
    for place, category in enumerate(judge.params.catIds):
        values = [100 * float(row.mean()) if row[0] > -1 else None for row in precision[:, :, place]]
        per_class[names[category]] = _named(values)
    return _means(per_class), per_class
