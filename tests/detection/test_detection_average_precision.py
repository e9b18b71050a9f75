"""Average precision against closed forms, a literal loop, and reference implementations' own numbers."""

import contextlib
import dataclasses
import io
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as pycocotools_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from moco_eval.data.boxes.coco import read_coco_folder
from moco_eval.data.boxes.samples import DetectionData, make_sample
from moco_eval.detection.average_precision import (
    IOUS,
    KINDS,
    ONE_BASED,
    Detections,
    _as_text,
    class_curves,
    coco_ap,
    coco_rows,
    rank,
    voc_ap,
)
from moco_eval.detection.judge import evaluate, without_objects
from moco_eval.detection.pictures import decode
from moco_eval.results.metrics import area_under, eleven_point


def sample(boxes, labels=None, difficult=None):
    labels = labels or [0] * len(boxes)
    difficult = difficult or [False] * len(boxes)
    return make_sample("a", None, (100, 100), [(b, c, d, False) for b, c, d in zip(boxes, labels, difficult)])


def found(boxes, scores, labels=None):
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return Detections(boxes, np.array(scores), np.array(labels or [0] * len(scores), dtype=np.int64))


def curve(truth, boxes, label=0, iou=0.5):
    """Recall and precision of a class at one threshold; None where it has no objects."""
    classes = 1 + max(int(one.labels.max(initial=0)) for one in (*truth, *boxes))
    curves = class_curves(rank(truth, boxes, classes)[label], [iou])
    return curves and (curves[0][0], curves[1][0])


BOX, FAR = (10, 10, 30, 30), (60, 60, 80, 80)


def test_perfect_detections_score_100():
    metrics, per_class = voc_ap([sample([BOX, FAR], [0, 1])], [found([BOX, FAR], [0.9, 0.8], [0, 1])], "ab")
    assert metrics == pytest.approx(dict.fromkeys(metrics, 100.0))
    assert per_class["b"]["AP50"] == pytest.approx(100)


def test_one_wrong_before_one_right_of_two_objects():
    truth, boxes = [sample([BOX, FAR])], [found([(40, 10, 50, 20), BOX], [0.9, 0.8])]
    recall, precision = curve(truth, boxes)
    assert recall.tolist() == [0, 0.5]
    assert precision.tolist() == [0, 0.5]
    assert eleven_point(recall, precision) == pytest.approx(6 * 0.5 / 11)  # recalls 0 to 0.5
    assert area_under(recall, precision) == pytest.approx(0.25)


def test_an_object_is_found_once():
    recall, precision = curve([sample([BOX])], [found([BOX, BOX], [0.9, 0.8])])
    assert recall.tolist() == [1, 1]
    assert precision.tolist() == [1, 0.5]


def test_difficult_objects_count_neither_way():
    truth = [sample([BOX, FAR], difficult=[True, False])]
    recall, precision = curve(truth, [found([BOX, FAR], [0.9, 0.8])])
    assert recall.tolist() == [0, 1]
    assert precision.tolist() == [0, 1]
    assert curve([sample([BOX], difficult=[True])], [found([BOX], [0.9])]) is None


def test_a_class_without_objects_is_reported_and_left_out_of_the_mean():
    metrics, per_class = voc_ap([sample([BOX])], [found([BOX, FAR], [0.9, 0.8], [0, 1])], ("here", "absent"))
    assert metrics["AP50"] == pytest.approx(100)
    assert per_class["absent"] == dict.fromkeys(per_class["absent"])


def literal_curve(truth, boxes, label, iou, rounded=False):
    """The rule in words, one detection at a time, on 1-based inclusive pixels; rounded by Python's own formatting."""
    said = [(i, *row) for i, d in enumerate(boxes) for row in zip(d.boxes, d.scores, d.labels)]
    rows = [(score, i, box + np.array([1, 1, 0, 0])) for i, box, score, c in said if c == label]
    if rounded:
        rows = [(float(f"{s:.3f}"), i, [float(f"{x:.1f}") for x in b]) for s, i, b in rows]
    rows = [rows[place] for place in np.argsort(-np.array([row[0] for row in rows]))]
    taken, right, wrong, curve = set(), 0, 0, []
    positives = sum(int(((t.labels == label) & ~t.difficult).sum()) for t in truth)
    for _, image, (x0, y0, x1, y1) in rows:
        best, owner = -1.0, None
        for j, (gx0, gy0, gx1, gy1) in enumerate(truth[image].boxes):
            if truth[image].labels[j] != label:
                continue
            gx0, gy0 = gx0 + 1, gy0 + 1
            width = max(min(x1, gx1) - max(x0, gx0) + 1, 0)
            height = max(min(y1, gy1) - max(y0, gy0) + 1, 0)
            both = (x1 - x0 + 1) * (y1 - y0 + 1) + (gx1 - gx0 + 1) * (gy1 - gy0 + 1)
            overlap = width * height / (both - width * height)
            if overlap > best:
                best, owner = overlap, j
        if best > iou and truth[image].difficult[owner]:
            pass
        elif best > iou and (image, owner) not in taken:
            taken.add((image, owner))
            right += 1
        else:
            wrong += 1
        curve.append((right / positives, right / max(right + wrong, 1)))
    return np.array(curve).reshape(-1, 2).T


def random_case(random, images, classes, whole=False, scores=None):
    """Objects of every class, some difficult, and detections near them, in images of 100 pixels.

    Args:
        whole: whole coordinates, which make overlaps of exactly 0.5, 0.6, ...
        scores: drawn from this many values; by default all differ.
    """
    truth, boxes = [], []
    count = random.integers(1, 6, images)
    count[0] = max(count[0], classes)
    ranks = random.permutation(3 * int(count.sum())) / (3.0 * count.sum())
    for i, n in enumerate(count):
        corners = random.integers(0, 60, (n, 2))
        objects = np.concatenate((corners, corners + random.integers(4, 40, corners.shape)), axis=1).astype(float)
        labels = random.integers(0, classes, n)
        difficult = random.random(n) < 0.2
        if i == 0:
            labels[:classes], difficult[:classes] = range(classes), False
        truth.append(sample(objects.tolist(), labels.tolist(), difficult.tolist()))
        near = np.repeat(objects, 3, axis=0) + random.normal(0, 3, (3 * n, 4))
        near = near.round() if whole else near.astype(np.float32).astype(float)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        said, ranks = ranks[: 3 * n], ranks[3 * n :]
        if scores:
            said = (random.integers(1, scores, 3 * n) / scores).astype(np.float32).astype(float)
        said = -np.sort(-said)
        guesses = np.where(random.random(3 * n) < 0.8, np.repeat(labels, 3), random.integers(0, classes, 3 * n))
        boxes.append(Detections(near, said, guesses))
    return truth, boxes


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_against_a_literal_loop(seed, whole):
    truth, boxes = random_case(np.random.default_rng(seed), images=8, classes=3, whole=whole)
    for label, ranked in enumerate(rank(truth, boxes, 3)):
        ours = np.array(class_curves(ranked))
        theirs = np.stack([literal_curve(truth, boxes, label, iou) for iou in IOUS], axis=1)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_rounded_with_many_equal_scores_against_a_literal_loop(seed):
    truth, boxes = random_case(np.random.default_rng(seed), images=60, classes=2, scores=20)
    for label, ranked in enumerate(rank(truth, boxes, 2, rounded=True)):
        ours = np.array(class_curves(ranked, IOUS[:3]))
        theirs = np.stack([literal_curve(truth, boxes, label, iou, rounded=True) for iou in IOUS[:3]], axis=1)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def test_equal_scores_keep_the_order_of_images_where_nothing_is_rounded():
    scores = np.random.default_rng(0).integers(1, 4, 200) / 4
    truth = [sample([BOX]) for _ in scores]
    boxes = [found([BOX if i % 2 else FAR], [score]) for i, score in enumerate(scores)]
    right = np.array([i % 2 for _, i in sorted((-score, i) for i, score in enumerate(scores))])
    assert curve(truth, boxes)[0].tolist() == (np.cumsum(right) / 200).tolist()


def test_rounding_is_that_of_pythons_formatting():
    halves = np.arange(-40, 4056) / 16  # x.25 and x.75 lie exactly between two tenths
    twentieths = np.arange(1, 8192, 2) / 20  # and these nearly, before or after 1 is added in float32
    boxes = np.concatenate((halves, twentieths)).astype(np.float32).reshape(-1, 4)
    scores = np.concatenate((np.arange(1024) / 1024, np.arange(1, 2048, 2) / 2000))  # the same for thousandths
    ours, said = _as_text(boxes.astype(float), scores)
    theirs = [[float(f"{x + one:.1f}") for x, one in zip(box, map(np.float32, (1, 1, 0, 0)))] for box in boxes]
    assert ours.tolist() == theirs
    assert said.tolist() == [float(f"{score:.3f}") for score in scores.astype(np.float32).tolist()]


def test_of_two_equal_objects_the_first_is_meant():
    truth = [sample([BOX, BOX], difficult=[True, False])]
    assert curve(truth, [found([BOX], [0.9])])[0].tolist() == [0]  # ignored, like the object


def test_a_recall_of_three_tenths_does_not_reach_the_fourth_level():
    """detectron2's fourth level is 0.30000000000000004."""
    assert eleven_point(np.array([0.1, 0.2, 0.3]), np.ones(3)) == pytest.approx(3 / 11)


@pytest.mark.parametrize("percent", range(50, 100, 5))
def test_an_overlap_of_exactly_the_threshold_is_none(percent):
    truth, boxes = [sample([(0, 0, 100, 1)])], [found([(0, 0, percent, 1), (0, 0, percent + 1, 1)], [0.9, 0.8])]
    assert curve(truth, boxes, iou=percent / 100)[0].tolist() == [0, 1]
    recall, _ = class_curves(*rank(truth, boxes, 1))
    assert recall[(percent - 50) // 5].tolist() == [0, 1]


def test_no_detection_at_all_scores_0():
    metrics, _ = voc_ap([sample([BOX])], [found([], [])], ["a"])
    assert metrics == dict.fromkeys(metrics, 0.0) and len(metrics) == 6


# COCO


CATEGORIES = [{"id": 3, "name": "a"}, {"id": 5, "name": "b"}]
NAMES = {3: "a", 5: "b"}


def test_coco_ap_of_perfect_no_and_absent():
    truth = {
        "images": [{"id": 1, "width": 100, "height": 100}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 3, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0}
        ],
        "categories": CATEGORIES,
    }
    before = json.dumps(truth)
    rows = [{"image_id": 1, "category_id": 3, "bbox": [10, 10, 20, 20], "score": 0.9}]
    metrics, per_class = coco_ap(truth, rows, NAMES)
    # no object is medium or large, so there is no such AP
    assert metrics == pytest.approx(dict.fromkeys(("APbb", "APbb50", "APbb75", "APbb_small"), 100))
    assert set(per_class["b"].values()) == {None} and set(per_class["b"]) == set(per_class["a"])
    assert coco_ap(truth, [], NAMES)[0] == dict.fromkeys(metrics, 0)
    assert json.dumps(truth) == before


def coco_case(seed, keypoints=17):
    """Random objects with masks, crowds and keypoints, and detections that move them, as data and rows."""
    random = np.random.default_rng(seed)
    images = [{"id": 10 + i, "width": 400, "height": 300} for i in range(6)]
    annotations, found = [], []
    for image in images:
        boxes, labels, masks, points = [], [], [], []
        for _ in range(random.integers(1, 7)):
            x, y, w, h = *random.uniform(0, 200, 2), *random.choice([20, 60, 120], 2) * random.uniform(0.6, 1.4, 2)
            label, crowd = int(random.integers(0, 2)), bool(random.random() < 0.1)
            marks = np.concatenate(
                (random.uniform(0, 1, (keypoints, 2)) * (w, h) + (x, y), np.full((keypoints, 1), 2)), 1
            )
            marks[random.random(keypoints) < 0.3] = 0
            seen = int((marks[:, 2] > 0).sum()) if label == 0 else 0
            mask = encode(box_mask(x, y, w, h)) if crowd else [[x, y, x + w, y, x + w, y + h, x, y + h]]
            item = {"id": len(annotations) + 1, "image_id": image["id"], "category_id": (3, 5)[label], "area": w * h}
            item |= {"bbox": [x, y, w, h], "iscrowd": int(crowd), "segmentation": mask}
            if label == 0:  # as in COCO, one class alone has keypoints
                item |= {"keypoints": marks.ravel().tolist(), "num_keypoints": 0 if crowd else seen}
            annotations.append(item)
            for _ in range(2):
                moved = np.array([x, y, w, h]) + random.normal(0, 4, 4)
                boxes.append([moved[0], moved[1], moved[0] + moved[2], moved[1] + moved[3]])
                labels.append(label)
                masks.append(encode(box_mask(*moved)))
                points.append(marks + random.normal(0, 3, marks.shape) * (1, 1, 0))
        scores = -np.sort(-random.random(len(boxes)))
        found.append(Detections(np.array(boxes), scores, np.array(labels), masks, np.array(points)))
    truth = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    return coco_data(truth, [3, 5]), found


def coco_data(truth, categories):
    samples = [make_sample(image["id"], Path(), (1, 1), []) for image in truth["images"]]
    names = {item["id"]: item["name"] for item in truth["categories"]}
    classes = tuple(names[category] for category in categories)
    return DetectionData("t", classes, [], samples, "train", "test", "", coco=truth, category_ids=tuple(categories))


def box_mask(x, y, w, h):
    mask = np.zeros((300, 400), np.uint8)
    mask[max(round(y), 0) : max(round(y + h), 0), max(round(x), 0) : max(round(x + w), 0)] = 1
    return mask


def encode(mask):
    return pycocotools_mask.encode(np.asfortranarray(mask))


def own_summary(data, found, kind, categories=None, per_image=None):
    """What pycocotools itself prints, from files as it reads them."""
    truth, rows = COCO(), json.loads(json.dumps(coco_rows(data, found, kind), default=lambda b: b.decode()))
    with contextlib.redirect_stdout(io.StringIO()):
        truth.dataset = json.loads(json.dumps({"info": {}, **data.coco}, default=lambda b: b.decode()))
        if categories:  # as COCO's file of people, which has no other class
            truth.dataset["annotations"] = [a for a in truth.dataset["annotations"] if a["category_id"] in categories]
            truth.dataset["categories"] = [c for c in truth.dataset["categories"] if c["id"] in categories]
            rows = [row for row in rows if row["category_id"] in categories]
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(rows), kind)
        if per_image:
            judge.params.maxDets = [1, 10, per_image]
        judge.evaluate()
        judge.accumulate()
        if per_image:  # its summary asks for 100
            return {"": 100 * (of_all := judge.eval["precision"][..., 0, -1])[of_all > -1].mean()}
        judge.summarize()
    sizes = ["_medium", "_large"] if kind == "keypoints" else ["_small", "_medium", "_large"]
    return dict(zip(["", "50", "75", *sizes], (100 * judge.stats).tolist()))


def assert_as_pycocotools(data, found, category):
    metrics, _ = evaluate(data, found)
    for kind, name in KINDS.items():
        own = own_summary(data, found, kind, [category] if kind == "keypoints" else None)
        assert 0 < own[""] < 100
        for part, value in own.items():
            assert metrics.pop(name + part, -100.0) == pytest.approx(value, abs=1e-9), name + part
    assert not metrics


@pytest.mark.parametrize("seed", range(4))
def test_coco_ap_is_pycocotools_own_summary(seed):
    data, found = coco_case(seed)
    assert_as_pycocotools(data, found, category=3)
    assert all("bbox" not in row for row in coco_rows(data, found, "segm"))  # the size of a mask is its own


def crowded(objects, keypoints=2):
    """One image of so many objects of one class in a grid, and as many detections that fit them perfectly."""
    places = [(12 * (i % 20), 12 * (i // 20), 10, 10) for i in range(objects)]
    marks = [[x + 2, y + 2, 2, x + 7, y + 7, 2] for x, y, _, _ in places]
    annotations = [
        {"id": i + 1, "image_id": 1, "category_id": 3, "bbox": list(box), "area": 100, "iscrowd": 0}
        | {"segmentation": encode(box_mask(*box)), "keypoints": points, "num_keypoints": keypoints}
        for i, (box, points) in enumerate(zip(places, marks))
    ]
    truth = {"images": [{"id": 1, "width": 400, "height": 300}], "annotations": annotations, "categories": CATEGORIES}
    boxes = np.array([(x, y, x + w, y + h) for x, y, w, h in places], dtype=np.float64)
    masks, points = [encode(box_mask(*box)) for box in places], np.array(marks, dtype=np.float64).reshape(-1, 2, 3)
    scores, labels = np.linspace(0.9, 0.1, objects), np.zeros(objects, np.int64)
    return coco_data(truth, [3, 5]), [Detections(boxes, scores, labels, masks, points)]


@pytest.mark.parametrize("per_image", [100, 200])
def test_as_many_detections_count_as_the_recipe_says(per_image):
    """COCO's 100 where nothing is said; beyond it pycocotools with other maxDets is the reference."""
    data, (image,) = crowded(120)
    found = [dataclasses.replace(image, keypoints=None)]
    metrics, _ = evaluate(data, found, per_image=per_image)
    for kind in ("bbox", "segm"):
        own = own_summary(data, found, kind, per_image=per_image)[""]
        assert metrics[KINDS[kind]] == pytest.approx(own, abs=1e-9)
    assert metrics["APbb"] == pytest.approx({100: 100 * 84 / 101, 200: 100}[per_image])
    if per_image == 100:
        assert evaluate(data, found)[0] == metrics


def test_keypoints_count_20_of_an_image_by_cocos_rule_which_is_said(capfd):
    data, found = crowded(30)
    metrics, _ = evaluate(data, found, per_image=200)
    assert metrics["APbb"] == pytest.approx(100)
    assert metrics["APkp"] == pytest.approx(100 * 67 / 101)  # a recall of 20 / 30: 67 of the 101 levels
    assert "1 test images have more than 20 objects of a class (up to 30)" in capfd.readouterr().err


def test_a_detector_without_masks_is_judged_by_boxes():
    data, found = coco_case(0)
    plain = [Detections(one.boxes, one.scores, one.labels) for one in found]
    metrics, per_class = evaluate(data, plain)
    assert {name[:4] for name in (*metrics, *per_class["a"], *per_class["b"])} == {"APbb"}


def test_other_keypoints_than_cocos_are_judged_by_its_mean_tolerance(capfd):
    data, found = coco_case(0, keypoints=4)
    few, per_class = evaluate(data, found)
    assert 0 < few["APkp"] < 100
    assert per_class["b"]["APkp"] is None
    assert "keypoints: 4 of a class, not COCO's 17" in capfd.readouterr().err


def test_an_object_without_a_mask_counts_neither_way(capfd):
    """It is as if neither the object nor what was found there were in the data."""
    data, found = coco_case(0)
    item, one = data.coco["annotations"][0], found[0]
    labels = one.labels.copy()
    labels[0] = data.category_ids.index(item["category_id"])
    masks = [encode(box_mask(*item["bbox"])), *one.masks[1:]]  # the best of its image lies on it
    moved = Detections(one.boxes, one.scores, labels, masks, one.keypoints)
    rest = Detections(one.boxes[1:], one.scores[1:], labels[1:], masks[1:], one.keypoints[1:])
    item["iscrowd"], item["segmentation"] = 0, []
    with_it = evaluate(data, [moved, *found[1:]])[0]
    assert "1 of" in capfd.readouterr().err
    without = evaluate(data, [rest, *found[1:]])[0]
    assert with_it["APmk"] == without["APmk"] and with_it["APbb"] != without["APbb"]


def test_classes_without_objects_are_named(capfd):
    data = DetectionData("t", ("here", "absent"), [], [sample([BOX])], "train", "test", "")
    _, per_class = evaluate(data, [found([BOX], [0.9])])
    assert without_objects(per_class) == ["absent"]
    assert "test has no object of absent: no AP, and left out of the mean" in capfd.readouterr().err


# Real detections


@pytest.fixture
def voc_reference(shared_data):
    """The reference detections on the 100 VOC images, with their truth read independently of our reader."""
    names = (shared_data / "det-eval-reference/voc/voc.names").read_text().split()
    truth, boxes = {}, {}
    for path in sorted((shared_data / "VOCdevkit/VOC2012/Annotations").glob("*.xml")):
        rows = []
        for item in ElementTree.parse(path).getroot().iter("object"):
            x0, y0, x1, y1 = (float(item.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax"))
            difficult = item.findtext("difficult") == "1"
            rows.append(((x0 - 1, y0 - 1, x1, y1), names.index(item.findtext("name")), difficult, False))
        truth[path.stem] = make_sample(path.stem, path, (1, 1), rows)
        said = shared_data / f"det-eval-reference/voc/dets/{path.stem}.txt"
        table = np.loadtxt(said, ndmin=2) if said.exists() and said.stat().st_size else np.zeros((0, 6))
        boxes[path.stem] = Detections(table[:, 2:] - [1, 1, 0, 0], table[:, 1], table[:, 0].astype(int))
    return names, truth, boxes


@pytest.mark.data
@pytest.mark.parametrize("part", ["all100", "test40"])
def test_voc_ap_of_real_detections_is_that_of_detectron2(shared_data, voc_reference, part):
    names, truth, boxes = voc_reference
    split = (shared_data / "VOCdevkit/VOC2012/ImageSets/Main/test.txt").read_text().split()
    chosen = sorted(truth) if part == "all100" else split
    metrics, per_class = voc_ap([truth[i] for i in chosen], [boxes[i] for i in chosen], names)
    expected = json.loads((shared_data / "det-eval-reference/voc/expected_detectron2_voc_eval.json").read_text())
    for rule, suffix in (("11point", ""), ("area", "_area")):
        for name in ("AP", "AP50", "AP75"):
            assert metrics[name + suffix] == pytest.approx(expected[part][rule][name], abs=1e-6)
        for name, value in expected[part][rule]["per_class_AP50"].items():
            assert per_class[name]["AP50" + suffix] == pytest.approx(value, abs=1e-6)


@pytest.mark.data
@pytest.mark.parametrize("iou, points, area", [(0.3, 0.2683982683, 0.2456866804), (0.5, 0.0303030303, 0.0222222222)])
def test_published_toy_case(shared_data, iou, points, area):
    folder = shared_data / "det-eval-reference/voc_case1"
    truth, boxes = [], []
    for path in sorted((folder / "gts").glob("*.txt")):
        truth.append(sample([corners(line[1:]) for line in rows(path)]))
        said = rows(folder / "dets" / path.name)
        boxes.append(found([corners(line[2:]) for line in said], [float(line[1]) for line in said]))
    points_and_area = curve(truth, boxes, iou=iou)
    assert eleven_point(*points_and_area) == pytest.approx(points, abs=1e-9)
    assert area_under(*points_and_area) == pytest.approx(area, abs=1e-9)


def rows(path):
    return [line.split() for line in path.read_text().splitlines() if line.strip()]


def corners(fields):
    """x, y, width, height; that reference adds 1 to the sides of x to x + width."""
    x, y, width, height = map(float, fields)
    return (x - 1, y - 1, x + width, y + height)


@pytest.mark.data
def test_coco_ap_is_that_of_pycocotools(shared_data):
    folder = shared_data / "det-eval-reference/coco"
    truth = json.loads((folder / "gts.json").read_text())
    rows = json.loads((folder / "results.json").read_text())
    expected = json.loads((folder / "expected_pycocotools.json").read_text())
    metrics, _ = coco_ap(truth, rows, {c["id"]: c["name"] for c in truth["categories"]})
    names = {"AP": "", "AP50": "50", "AP75": "75", "APs": "_small", "APm": "_medium", "APl": "_large"}
    for theirs, ours in names.items():
        assert metrics[f"APbb{ours}"] == pytest.approx(100 * expected[theirs], abs=1e-9)
    assert metrics["APbb"] == pytest.approx(50.36473, abs=1e-5)


@pytest.fixture
def coco_mini(shared_data):
    """Real masks and people, and as detections the same ones moved a little, with crowds and some left out."""
    folder = shared_data / "coco-mini/annotations"
    truth = json.loads((folder / "instances_val2017.json").read_text())
    people = {a["id"]: a for a in json.loads((folder / "person_keypoints_val2017.json").read_text())["annotations"]}
    truth["annotations"] = [people.get(item["id"], item) for item in truth["annotations"]]
    data = coco_data(truth, [item["id"] for item in truth["categories"]])
    reference = COCO()
    with contextlib.redirect_stdout(io.StringIO()):
        reference.dataset = json.loads(json.dumps(truth))
        reference.createIndex()
    random, found = np.random.default_rng(0), []
    for image in truth["images"]:
        items = [a for a in truth["annotations"] if a["image_id"] == image["id"] and random.random() < 0.9]
        boxes = np.array([a["bbox"] for a in items]).reshape(-1, 4) + random.normal(0, 3, (len(items), 4))
        boxes[:, 2:] = boxes[:, :2] + np.maximum(boxes[:, 2:], 1)
        masks = [encode(np.roll(reference.annToMask(a), random.integers(-3, 4, 2), (0, 1))) for a in items]
        points = [np.reshape(a.get("keypoints", [0] * 51), (17, 3)) + random.normal(0, 4, (17, 3)) for a in items]
        labels = np.array([data.category_ids.index(a["category_id"]) for a in items], dtype=np.int64)
        scores = -np.sort(-random.random(len(items)))
        found.append(Detections(boxes, scores, labels, masks, np.array(points).reshape(-1, 17, 3)))
    return data, found


@pytest.mark.data
def test_masks_and_keypoints_of_real_people_are_pycocotools_own(coco_mini):
    assert_as_pycocotools(*coco_mini, category=1)


@pytest.mark.data
def test_the_truth_of_real_data_as_detections_scores_100(shared_data):
    """What the COCO reader hands over fits what is judged, masks and keypoints too."""
    data = read_coco_folder(shared_data / "coco-mini", None, None, keypoints=True)
    found = []
    for one in data.test:
        kept = np.flatnonzero(~one.crowd)
        masks = [encode(decode(one.masks[i], one.size)) for i in kept]
        points = one.keypoints[kept] - (0.5, 0.5, 0)
        middles = (one.boxes[kept, :2] + one.boxes[kept, 2:]) / 2  # of people without keypoints, who are ignored
        points[..., :2] = np.where((points[..., 2] > 0).any(1)[:, None, None], points[..., :2], middles[:, None])
        found.append(Detections(one.boxes[kept], np.ones(len(kept)), one.labels[kept], masks, points))
    metrics, _ = evaluate(data, found)
    assert {name[:4] for name in metrics} == set(KINDS.values())
    assert metrics == pytest.approx(dict.fromkeys(metrics, 100.0), abs=0.1)


# detectron2 itself


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("detectron2", reason="detectron2 is not installed; build it from its source")
    from detectron2.evaluation import pascal_voc_evaluation

    return pascal_voc_evaluation


def write_detections(folder, names, boxes, classes):
    """One file for each class, as voc_eval reads them, every digit of every number."""
    lines = {label: [] for label in range(len(classes))}
    for name, one in zip(names, boxes):
        for box, score, label in zip(one.boxes + ONE_BASED, one.scores, one.labels):
            lines[int(label)].append(" ".join([name, repr(float(score)), *(repr(float(x)) for x in box)]))
    for label, rows in lines.items():
        (folder / f"{classes[label]}.txt").write_text("\n".join(rows))


def as_parsed(truth, classes):
    """What detectron2's XML parser makes of an image."""
    return [
        {"name": classes[c], "difficult": int(d), "bbox": [int(b[0]) + 1, int(b[1]) + 1, int(b[2]), int(b[3])]}
        for b, c, d in zip(truth.boxes, truth.labels, truth.difficult)
    ]


def assert_as_voc_eval(theirs, monkeypatch, folder, truth, boxes, classes):
    names = [str(i) for i in range(len(truth))]
    parsed = {name: as_parsed(one, classes) for name, one in zip(names, truth)}
    monkeypatch.setattr(theirs, "parse_rec", lambda path: parsed[path])
    (folder / "names").write_text("\n".join(names))
    write_detections(folder, names, boxes, classes)
    for name, ranked in zip(classes, rank(truth, boxes, len(classes))):
        ours = class_curves(ranked)
        if ours is None:
            continue
        for percent, recall, precision in zip(range(50, 100, 5), *ours):
            where = (str(folder / "{}.txt"), "{}", str(folder / "names"), name, percent / 100.0)
            *curve, points = theirs.voc_eval(*where, use_07_metric=True)
            np.testing.assert_allclose((recall, precision), curve, rtol=0, atol=1e-12)
            assert eleven_point(recall, precision) == pytest.approx(points, abs=1e-11)
            assert area_under(recall, precision) == pytest.approx(theirs.voc_ap(*curve), abs=1e-11)


@pytest.mark.detectron2
@pytest.mark.parametrize("cases", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_voc_ap_is_detectron2s_on_random_cases(theirs, monkeypatch, tmp_path, cases):
    for seed in range(cases):
        random = np.random.default_rng(seed)
        classes = "abc"[: random.integers(1, 4)]
        truth, boxes = random_case(random, int(random.integers(1, 6)), len(classes), whole=bool(seed % 2))
        assert_as_voc_eval(theirs, monkeypatch, tmp_path, truth, boxes, classes)


@pytest.mark.detectron2
@pytest.mark.data
def test_voc_ap_is_detectron2s_on_real_detections(theirs, monkeypatch, tmp_path, voc_reference):
    names, truth, boxes = voc_reference
    chosen = sorted(truth)
    assert_as_voc_eval(theirs, monkeypatch, tmp_path, [truth[i] for i in chosen], [boxes[i] for i in chosen], names)


def write_voc(folder, truth, classes):
    """The annotations and the list of a test split as detectron2's evaluator needs them."""
    (folder / "Annotations").mkdir(parents=True)
    (folder / "ImageSets/Main").mkdir(parents=True)
    for i, one in enumerate(truth):
        items = "".join(
            f"<object><name>{item['name']}</name><pose>x</pose><truncated>0</truncated>"
            f"<difficult>{item['difficult']}</difficult><bndbox>"
            + "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), item["bbox"]))
            + "</bndbox></object>"
            for item in as_parsed(one, classes)
        )
        (folder / "Annotations" / f"{i}.xml").write_text(f"<annotation>{items}</annotation>")
    (folder / "ImageSets/Main/test.txt").write_text("".join(f"{i}\n" for i in range(len(truth))))


def their_evaluator(theirs, folder, names, boxes, classes, year, split="test"):
    """AP, AP50 and AP75 of detectron2's evaluator class, fed as its inference loop feeds it."""
    from detectron2.data import MetadataCatalog
    from detectron2.structures import Boxes, Instances

    about = {"dirname": str(folder), "split": split, "year": year, "thing_classes": list(classes)}
    MetadataCatalog.get(f"{folder}-{year}").set(**about)
    judge = theirs.PascalVOCDetectionEvaluator(f"{folder}-{year}")
    judge.reset()
    for name, one in zip(names, boxes):
        said = Instances((100, 100))
        said.pred_boxes = Boxes(torch.tensor(one.boxes, dtype=torch.float32))
        said.scores = torch.tensor(one.scores, dtype=torch.float32)
        said.pred_classes = torch.tensor(one.labels)
        judge.process([{"image_id": name}], [{"instances": said}])
    return judge.evaluate()["bbox"]


@pytest.mark.detectron2
@pytest.mark.parametrize("year, suffix", [(2007, ""), (2012, "_area")])
@pytest.mark.parametrize("scores", [None, 2000, 30])
def test_rounded_it_is_detectron2s_evaluator_with_its_ties(theirs, tmp_path, year, suffix, scores):
    truth, boxes = random_case(np.random.default_rng(7), images=120, classes=4, scores=scores)
    write_voc(tmp_path / "voc", truth, "abcd")
    expected = their_evaluator(theirs, tmp_path / "voc", map(str, range(120)), boxes, "abcd", year)
    metrics, _ = voc_ap(truth, boxes, "abcd", rounded=True)
    for name in ("AP", "AP50", "AP75"):
        assert metrics[name + suffix] == pytest.approx(float(expected[name]), abs=1e-9)
    if scores == 30:  # here the order among equal scores matters, or this test shows nothing
        assert abs(voc_ap(truth, boxes, "abcd")[0]["AP" + suffix] - expected["AP"]) > 1e-3


@pytest.mark.detectron2
@pytest.mark.data
@pytest.mark.parametrize("year, suffix", [(2007, ""), (2012, "_area")])
def test_rounded_it_is_detectron2s_evaluator_on_real_detections(theirs, shared_data, voc_reference, year, suffix):
    names, truth, boxes = voc_reference
    root = shared_data / "VOCdevkit/VOC2012"
    chosen = (root / "ImageSets/Main/trainval.txt").read_text().split()
    _, per_class = voc_ap([truth[i] for i in chosen], [boxes[i] for i in chosen], names)
    present = [name for name in names if name not in without_objects(per_class)]  # theirs gives the others 0
    said = []
    for one in (boxes[i] for i in chosen):
        kept = np.isin([names[label] for label in one.labels], present)
        labels = np.array([present.index(names[label]) for label in one.labels[kept]], dtype=np.int64)
        said.append(Detections(one.boxes[kept], one.scores[kept], labels))
    expected = their_evaluator(theirs, root, chosen, said, present, year, "trainval")
    metrics, _ = voc_ap([truth[i] for i in chosen], [boxes[i] for i in chosen], names, rounded=True)
    assert len(present) > 10
    for name in ("AP", "AP50", "AP75"):
        assert metrics[name + suffix] == pytest.approx(float(expected[name]), abs=1e-9)
