"""LVIS's average precision: COCO's, of each image on the classes only that it was searched for.

A cup that is found where nobody looked for cups is neither right nor wrong: it is left out.

Source: Gupta et al. 2019, arXiv:1908.03195, Section 3; lvis-dataset/lvis-api@04e89fd, eval.py and results.py; read, not
copied.
"""

from collections import defaultdict
from typing import Any

import numpy as np

from moco_eval.detection.average_precision import IOUS, KINDS, Scores, by_size, coco_judge, means

GROUPS = {"r": "rare", "c": "common", "f": "frequent"}  # by the training images that show a class
SIZES = ("all", "small", "medium", "large")
Row = dict[str, Any]


def lvis_ap(
    truth: dict[str, Any], rows: list[Row], names: dict[int, str], kind: str = "bbox", per_image: int = 300
) -> tuple[dict[str, float], dict[str, Scores]]:
    """COCO's metrics by LVIS's rules, in percent, and AP of rare, common and frequent classes.

    Of an image the best `per_image` detections of all classes together count. Dropped are those of a class that is
    neither among its objects nor in its neg_category_ids. One that matches nothing counts neither way where its class
    is in the image's not_exhaustive_category_ids. There are no crowds.

    Args:
        truth: images, annotations and categories of an LVIS file.
        rows, names, kind: as in `coco_ap`.
    Returns:
        Means over the classes that have objects, and the numbers of each class.
    """
    objects, found = _by_class(truth["annotations"]), _by_class(_searched(truth, _best(rows, per_image)))
    images = {image["id"]: image for image in truth["images"]}
    per_class: dict[str, Scores] = {}
    for category, name in names.items():
        precision = np.full((len(IOUS), len(SIZES)), -1.0)
        if own := objects[category]:
            precision = _precision(category, own, found[category], images, kind, per_image)
        per_class[name] = by_size(precision, SIZES, kind)
    return means(per_class) | _by_frequency(truth["categories"], names, per_class, kind), per_class


def _best(rows: list[Row], per_image: int) -> list[Row]:
    """The detections of each image that score highest; of equal ones the first."""
    places = defaultdict(list)
    for place, row in enumerate(rows):
        places[row["image_id"]].append(place)
    kept: list[int] = []
    for own in places.values():
        kept += sorted(own, key=lambda place: -rows[place]["score"])[:per_image]
    return [rows[place] for place in sorted(kept)]


def _searched(truth: dict[str, Any], rows: list[Row]) -> list[Row]:
    """The detections of classes that their image was searched for."""
    classes = {image["id"]: set(image["neg_category_ids"]) for image in truth["images"]}
    for item in truth["annotations"]:
        classes[item["image_id"]].add(item["category_id"])
    return [row for row in rows if row["category_id"] in classes[row["image_id"]]]


def _by_class(items: list[Row]) -> defaultdict[int, list[Row]]:
    classes: defaultdict[int, list[Row]] = defaultdict(list)
    for item in items:
        classes[item["category_id"]].append(item)
    return classes


def _precision(
    category: int, objects: list[Row], rows: list[Row], images: dict[Any, Row], kind: str, per_image: int
) -> np.ndarray:
    """Of one class at each IoU and size, (10, sizes), -1 where it has no object.

    pycocotools sees the images of this class alone: of 20 million pairs of image and class few have anything.
    """
    shown = {item["image_id"]: images[item["image_id"]] for item in objects + rows}
    truth = {
        "images": list(shown.values()),
        "annotations": [item | {"iscrowd": 0} for item in objects],
        "categories": [{"id": category}],
    }
    lenient = {key for key, image in shown.items() if category in image["not_exhaustive_category_ids"]}
    judge = coco_judge(truth, rows, kind, per_image, lenient)
    assert tuple(judge.params.areaRngLbl) == SIZES
    return judge.eval["precision"][:, :, 0, :, -1].mean(axis=1)


def _by_frequency(
    categories: list[Row], names: dict[int, str], per_class: dict[str, Scores], kind: str
) -> dict[str, float]:
    """AP over the rare, common and frequent classes; a group without a class that has objects is left out."""
    scores = {}
    for letter, group in GROUPS.items():
        own = [per_class[names[item["id"]]][KINDS[kind]] for item in categories if item["frequency"] == letter]
        known = [value for value in own if value is not None]
        if known:
            scores[f"{KINDS[kind]}_{group}"] = float(np.mean(known))
    return scores
