"""LVIS's average precision: against literal loops, and each of its rules by a case that changes without it."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from moco_eval.detection.average_precision import IOUS, coco_ap
from moco_eval.detection.lvis_precision import lvis_ap

SIDE = 120
RANGES = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}


def encoded(x, y, width, height):
    bitmap = np.zeros((SIDE, SIDE), np.uint8, order="F")
    bitmap[round(y) : round(y + height), round(x) : round(x + width)] = 1
    return coco_mask.encode(bitmap)


def thing(image, category, box, **more):
    area = float(box[2] * box[3])
    return {"image_id": image, "category_id": category, "bbox": list(box), "area": area, "iscrowd": 0, **more}


def file(images, objects, categories=((1, "f"),)):
    """`images`: (neg, not exhaustive) of each, whose ids count from 1."""
    keys = ("neg_category_ids", "not_exhaustive_category_ids")
    return {
        "images": [
            {"id": number, "width": SIDE, "height": SIDE, **dict(zip(keys, lists))}
            for number, lists in enumerate(images, start=1)
        ],
        "annotations": [item | {"id": number} for number, item in enumerate(objects, start=1)],
        "categories": [{"id": key, "name": f"class {key}", "frequency": letter} for key, letter in categories],
    }


def ap(truth, rows, kind="bbox", per_image=300, name="AP"):
    names = {item["id"]: item["name"] for item in truth["categories"]}
    rows = [dict(row) for row in rows]  # pycocotools writes into them
    return lvis_ap(truth, rows, names, kind, per_image)[0][name.replace("AP", {"bbox": "APbb", "segm": "APmk"}[kind])]


def said(image, category, box, score, kind="bbox"):
    row = {"image_id": image, "category_id": category, "score": score}
    return row | ({"bbox": list(box)} if kind == "bbox" else {"segmentation": encoded(*box)})


CUP, ELSEWHERE = (10, 10, 30, 30), (60, 60, 40, 40)


# Against loops


def overlap(first, second):
    """IoU of two (x, y, width, height), or of two bitmaps."""
    if isinstance(first, np.ndarray):
        return (first & second).sum() / (first | second).sum()
    ends = [min(a + c, b + d) - max(a, b) for a, b, c, d in zip(first[:2], second[:2], first[2:], second[2:])]
    common = max(ends[0], 0) * max(ends[1], 0)
    return common / (first[2] * first[3] + second[2] * second[3] - common)


def literal(truth, rows, category, kind, size, iou, per_image):
    """AP of one class at one threshold, or None; as the paper and its code say it, one step after the other."""
    shape = (lambda row: row["bbox"]) if kind == "bbox" else (lambda row: coco_mask.decode(row["segmentation"]) > 0)
    area = (lambda row: row["bbox"][2] * row["bbox"][3]) if kind == "bbox" else (lambda row: int(shape(row).sum()))
    low, high = RANGES[size]
    marks, positives = [], 0
    for image in truth["images"]:
        found = sorted((r for r in rows if r["image_id"] == image["id"]), key=lambda r: -r["score"])[:per_image]
        objects = [item for item in truth["annotations"] if item["image_id"] == image["id"]]
        searched = {item["category_id"] for item in objects} | set(image["neg_category_ids"])
        own = [item for item in objects if item["category_id"] == category]
        own.sort(key=lambda item: not low <= item["area"] <= high)
        in_range = [low <= item["area"] <= high for item in own]
        positives += sum(in_range)
        taken = set()
        for row in [r for r in found if r["category_id"] == category and category in searched]:
            best, owner = min(iou, 1 - 1e-10), None
            for place, item in enumerate(own):
                if place in taken or (owner is not None and in_range[owner] and not in_range[place]):
                    continue
                if (value := overlap(shape(row), shape(item))) >= best:
                    best, owner = value, place
            if owner is not None:
                taken.add(owner)
                if in_range[owner]:
                    marks.append((row["score"], True))
            elif low <= area(row) <= high and category not in image["not_exhaustive_category_ids"]:
                marks.append((row["score"], False))
    if positives == 0:
        return None
    right = np.array([mark for _, mark in sorted(marks, key=lambda pair: -pair[0])], bool)
    recall, precision = right.cumsum() / positives, right.cumsum() / np.arange(1, len(right) + 1)
    levels = np.linspace(0, 1, 101)
    return 100 * np.mean([max(precision[recall >= level], default=0.0) for level in levels])


def random_case(seed, kind):
    random = np.random.default_rng(seed)
    classes = [1, 2, 5, 9]

    def box():
        width, height = random.integers(8, 110, 2)
        return random.integers(0, SIDE - width), random.integers(0, SIDE - height), width, height

    images = [
        ([c for c in classes if random.random() < 0.3], [c for c in classes if random.random() < 0.3]) for _ in range(5)
    ]
    objects, rows = [], []
    for image in range(1, 6):
        for _ in range(random.integers(0, 4)):
            place, category = box(), int(random.choice(classes[:3]))
            objects.append(thing(image, category, place, segmentation=encoded(*place)))
            near = [int(max(side + shift, 0)) for side, shift in zip(place, random.integers(-4, 5, 4))]
            rows.append(said(image, category, near[:2] + [max(4, v) for v in near[2:]], random.random(), kind))
        rows += [said(image, int(random.choice(classes)), box(), random.random(), kind) for _ in range(3)]
    return file(images, objects, [(1, "r"), (2, "c"), (5, "f"), (9, "f")]), rows


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_against_literal_loops(kind):
    letters, compared = {"bbox": "APbb", "segm": "APmk"}[kind], 0
    for seed in range(4):
        truth, rows = random_case(seed, kind)
        names = {item["id"]: item["name"] for item in truth["categories"]}
        metrics, per_class = lvis_ap(truth, rows, names, kind, per_image=5)
        for category, name in names.items():
            for size in RANGES:
                values = [literal(truth, rows, category, kind, size, iou, 5) for iou in IOUS]
                ours = per_class[name][letters + ("" if size == "all" else f"_{size}")]
                assert ours == (None if values[0] is None else pytest.approx(np.mean(values), abs=1e-9))
                compared += values[0] is not None and 0 < np.mean(values) < 100
        known = [scores[letters] for scores in per_class.values() if scores[letters] is not None]
        assert metrics[letters] == pytest.approx(np.mean(known))
    assert compared > 20


# Rule by rule


def test_a_class_that_nobody_looked_for_counts_only_where_it_is_known_to_be_absent():
    rows = [said(1, 1, CUP, 0.5), said(2, 1, ELSEWHERE, 0.9)]
    assert ap(file([([], []), ([], [])], [thing(1, 1, CUP)]), rows) == pytest.approx(100)
    assert ap(file([([], []), ([1], [])], [thing(1, 1, CUP)]), rows) == pytest.approx(50)


def test_where_not_all_are_marked_one_that_matches_nothing_counts_neither_way():
    rows = [said(1, 1, ELSEWHERE, 0.9), said(1, 1, CUP, 0.5)]
    assert ap(file([([], [])], [thing(1, 1, CUP)]), rows) == pytest.approx(50)
    assert ap(file([([], [1])], [thing(1, 1, CUP)]), rows) == pytest.approx(100)
    assert ap(file([([], [1])], [thing(1, 1, CUP)]), rows[:1]) == 0, "the object itself is still missed"


def test_there_are_no_crowds():
    objects = [thing(1, 1, CUP), thing(1, 1, ELSEWHERE, iscrowd=1)]
    truth, rows = file([([], [])], objects), [said(1, 1, CUP, 0.9)]
    assert ap(truth, rows) == pytest.approx(100 * 51 / 101)
    assert coco_ap(truth, rows, {1: "class 1"})[0]["APbb"] == pytest.approx(100)


def test_the_limit_is_over_all_classes_of_an_image():
    truth = file([([], [])], [thing(1, 1, CUP), thing(1, 2, ELSEWHERE)], [(1, "f"), (2, "f")])
    rows = [said(1, 1, CUP, 0.2)] + [said(1, 2, ELSEWHERE, 0.9 - place / 10) for place in range(3)]
    assert ap(truth, rows, per_image=4) == pytest.approx(100)
    assert ap(truth, rows, per_image=3) == pytest.approx(50)


def test_the_size_of_a_mask_is_that_of_its_pixels():
    """A diagonal of small pieces in a large box: wrong, and small, so that it is not held against large ones."""
    large = (5, 5, 100, 100)
    bitmap = np.zeros((SIDE, SIDE), np.uint8, order="F")
    for place in range(0, 110, 10):
        bitmap[place : place + 5, place : place + 5] = 1
    wrong = {"image_id": 1, "category_id": 1, "score": 0.9, "segmentation": coco_mask.encode(bitmap)}
    truth = file([([], [])], [thing(1, 1, large, segmentation=encoded(*large))])
    rows = [wrong, said(1, 1, large, 0.5, "segm")]
    assert ap(truth, rows, "segm", name="AP_large") == pytest.approx(100)
    assert ap(truth, rows, "segm") == pytest.approx(50)
    boxed = [row | {"bbox": coco_mask.toBbox(row["segmentation"]).tolist()} for row in rows]
    assert ap(truth, boxed, "segm", name="AP_large") == pytest.approx(50), "with boxes pycocotools takes their size"


def test_rare_common_and_frequent_classes_have_means_of_their_own():
    classes = [(1, "r"), (2, "r"), (3, "c"), (4, "f")]
    truth = file([([], [])], [thing(1, key, CUP) for key, _ in classes[:3]], classes)
    metrics, per_class = lvis_ap(truth, [said(1, 1, CUP, 0.9)], {key: str(key) for key, _ in classes})
    assert (metrics["APbb_rare"], metrics["APbb_common"]) == (pytest.approx(50), 0)
    assert "APbb_frequent" not in metrics and per_class["4"]["APbb"] is None
    assert metrics["APbb"] == pytest.approx(100 / 3)


def test_no_detection_at_all_scores_0():
    assert ap(file([([], [])], [thing(1, 1, CUP)]), []) == 0
