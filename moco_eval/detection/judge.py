"""Which average precision a test split is judged by: VOC's, COCO's, LVIS's or Cityscapes'."""

from collections.abc import Sequence
from typing import Any

from moco_eval.data.boxes.samples import DetectionData
from moco_eval.detection.average_precision import (
    KINDS,
    PER_IMAGE,
    Detections,
    Scores,
    coco_judge,
    coco_matches,
    coco_rows,
    of_coco,
    of_voc,
    rank,
    voc_matches,
)
from moco_eval.detection.cityscapes_precision import cityscapes_ap
from moco_eval.detection.lvis_precision import lvis_ap
from moco_eval.results.matches import Matches
from moco_eval.runtime.console import log

MOST = 25  # names in one line


def evaluate(
    data: DetectionData, detections: Sequence[Detections], rounded: bool = False, per_image: int = PER_IMAGE
) -> tuple[dict[str, float], dict[str, Scores]]:
    """The metrics of a test split and those of each class, in percent.

    VOC format: AP, AP50, AP75 by the 11-point rule (as the published VOC numbers), and by the area under the
    curve as AP_area, AP50_area, AP75_area. COCO format, by pycocotools: APbb, APbb50, APbb75 and APbb_small,
    APbb_medium, APbb_large of boxes; the same of masks (APmk) and keypoints (APkp) where the detector says them.
    LVIS: COCO's by its own rules, and APbb_rare, APbb_common, APbb_frequent. Cityscapes: APmk and APmk50.

    Args:
        detections: one entry per image of data.test, in its order.
        rounded: VOC only: round as detectron2's evaluator does before it counts; see `_as_text`.
        per_image: COCO only: how many boxes and masks of a class in an image count, `test.detections` of the recipe;
            of keypoints always COCO's 20.
    Returns:
        Metrics over the classes that have objects, and per class; None for a class without objects.
    """
    return judged(data, detections, rounded, per_image)[:2]


def judged(
    data: DetectionData, detections: Sequence[Detections], rounded: bool = False, per_image: int = PER_IMAGE
) -> tuple[dict[str, float], dict[str, Scores], list[Matches]]:
    """The same, and which detection is right where, of each kind of average precision; not of LVIS and Cityscapes."""
    assert len(detections) == len(data.test)
    matches: list[Matches] = []
    if data.coco is not None:
        metrics, per_class, matches = _coco_kinds(data, data.coco, detections, per_image)
    elif data.instance_files:
        metrics, per_class = cityscapes_ap(data.instance_files, detections, data.classes)
    else:
        ranked = rank(data.test, detections, len(data.classes), rounded)
        metrics, per_class = of_voc(ranked, data.classes)
        matches = [voc_matches(ranked, len(data.test))]
    if absent := without_objects(per_class):
        names = ", ".join(absent[:MOST]) + (f" and {len(absent) - MOST} more" if absent[MOST:] else "")
        log(f"{data.test_split} has no object of {names}: no AP, and left out of the mean")
    return metrics, per_class, matches


def without_objects(per_class: dict[str, Scores]) -> list[str]:
    """The classes that have no value, because the test split has no object of theirs."""
    return [name for name, scores in per_class.items() if all(value is None for value in scores.values())]


def _coco_kinds(
    data: DetectionData, truth: dict[str, Any], detections: Sequence[Detections], per_image: int
) -> tuple[dict[str, float], dict[str, Scores], list[Matches]]:
    """COCO's or LVIS's AP of boxes, and of masks and keypoints where the detector has a head for them."""
    said = {
        "bbox": True,
        "segm": any(image.masks is not None for image in detections),
        "keypoints": any(image.keypoints is not None for image in detections),
    }
    names = dict(zip(data.category_ids, data.classes))
    metrics: dict[str, float] = {}
    per_class: dict[str, Scores] = {name: {} for name in data.classes}
    matches = []
    for kind in [kind for kind in KINDS if said[kind]]:
        rows = coco_rows(data, detections, kind)
        if data.federated:
            means, scores = lvis_ap(truth, rows, names, kind, per_image)
        else:
            judge = coco_judge(truth, rows, kind, per_image)
            means, scores = of_coco(judge, names, kind)
            matches.append(coco_matches(judge, kind, [sample.image_id for sample in data.test]))
        metrics |= means
        for name in data.classes:
            per_class[name] |= scores[name]
    return metrics, per_class, matches
