"""Average precision against closed forms, a literal loop, and reference implementations' own numbers."""

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from moco_eval.data.boxes import make_sample
from moco_eval.detection.average_precision import (
    IOUS,
    Detections,
    area_under,
    class_curve,
    coco_ap,
    eleven_point,
    voc_ap,
)


def sample(boxes, labels=None, difficult=None):
    labels = labels or [0] * len(boxes)
    difficult = difficult or [False] * len(boxes)
    return make_sample("a", None, (100, 100), [(b, c, d, False) for b, c, d in zip(boxes, labels, difficult)])


def found(boxes, scores, labels=None):
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return Detections(boxes, np.array(scores), np.array(labels or [0] * len(scores), dtype=np.int64))


BOX, FAR = (10, 10, 30, 30), (60, 60, 80, 80)


def test_perfect_detections_score_100():
    metrics, per_class = voc_ap([sample([BOX, FAR], [0, 1])], [found([BOX, FAR], [0.9, 0.8], [0, 1])], "ab")
    assert metrics == pytest.approx(dict.fromkeys(metrics, 100.0))
    assert per_class["b"]["AP50"] == pytest.approx(100)


def test_one_wrong_before_one_right_of_two_objects():
    truth, boxes = [sample([BOX, FAR])], [found([(40, 10, 50, 20), BOX], [0.9, 0.8])]
    recall, precision = class_curve(truth, boxes, 0, 0.5)
    assert recall.tolist() == [0, 0.5]
    assert precision.tolist() == [0, 0.5]
    assert eleven_point(recall, precision) == pytest.approx(6 * 0.5 / 11)  # recalls 0 to 0.5
    assert area_under(recall, precision) == pytest.approx(0.25)


def test_an_object_is_found_once():
    recall, precision = class_curve([sample([BOX])], [found([BOX, BOX], [0.9, 0.8])], 0, 0.5)
    assert recall.tolist() == [1, 1]
    assert precision.tolist() == [1, 0.5]


def test_difficult_objects_count_neither_way():
    truth = [sample([BOX, FAR], difficult=[True, False])]
    recall, precision = class_curve(truth, [found([BOX, FAR], [0.9, 0.8])], 0, 0.5)
    assert recall.tolist() == [0, 1]
    assert precision.tolist() == [0, 1]
    assert class_curve([sample([BOX], difficult=[True])], [found([BOX], [0.9])], 0, 0.5) is None


def test_a_class_without_objects_is_reported_and_left_out_of_the_mean():
    metrics, per_class = voc_ap([sample([BOX])], [found([BOX, FAR], [0.9, 0.8], [0, 1])], ("here", "absent"))
    assert metrics["AP50"] == pytest.approx(100)
    assert per_class["absent"] == dict.fromkeys(per_class["absent"])


def literal_curve(truth, boxes, label, iou):
    """The rule in words, one detection at a time, on 1-based inclusive pixels."""
    rows = sorted(
        ((s, i, b) for i, d in enumerate(boxes) for b, s, c in zip(d.boxes, d.scores, d.labels) if c == label),
        key=lambda row: -row[0],
    )
    taken, right, wrong, curve = set(), 0, 0, []
    positives = sum(int(((t.labels == label) & ~t.difficult).sum()) for t in truth)
    for _, image, box in rows:
        best, owner = -1.0, None
        x0, y0, x1, y1 = box[0] + 1, box[1] + 1, box[2], box[3]
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


@pytest.mark.parametrize("seed", range(5))
def test_against_a_literal_loop(seed):
    random = np.random.default_rng(seed)
    truth, boxes = [], []
    for _ in range(8):
        corners = random.uniform(0, 60, (random.integers(1, 6), 2))
        objects = np.concatenate((corners, corners + random.uniform(5, 40, corners.shape)), axis=1)
        truth.append(
            sample(
                objects.tolist(),
                random.integers(0, 2, len(objects)).tolist(),
                (random.random(len(objects)) < 0.2).tolist(),
            )
        )
        near = np.repeat(objects, 3, axis=0) + random.normal(0, 3, (3 * len(objects), 4))
        boxes.append(found(near, random.random(len(near)), random.integers(0, 2, len(near)).tolist()))
    for label in (0, 1):
        for iou in IOUS:
            ours = np.array(class_curve(truth, boxes, label, iou))
            np.testing.assert_allclose(ours, literal_curve(truth, boxes, label, iou), atol=1e-12)


def test_coco_ap_of_perfect_no_and_absent():
    truth = {
        "images": [{"id": 1, "width": 100, "height": 100}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 3, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0}
        ],
        "categories": [{"id": 3, "name": "a"}, {"id": 5, "name": "b"}],
    }
    rows = [{"image_id": 1, "category_id": 3, "bbox": [10, 10, 20, 20], "score": 0.9}]
    metrics, per_class = coco_ap(truth, rows, {3: "a", 5: "b"})
    assert metrics == pytest.approx({"AP": 100, "AP50": 100, "AP75": 100})
    assert per_class["b"]["AP"] is None
    assert coco_ap(truth, [], {3: "a", 5: "b"})[0] == {"AP": 0, "AP50": 0, "AP75": 0}


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
    curve = class_curve(truth, boxes, 0, iou)
    assert eleven_point(*curve) == pytest.approx(points, abs=1e-9)
    assert area_under(*curve) == pytest.approx(area, abs=1e-9)


def rows(path):
    return [line.split() for line in path.read_text().splitlines() if line.strip()]


def corners(words):
    """x, y, width, height; that reference adds 1 to the sides of x to x + width."""
    x, y, width, height = map(float, words)
    return (x - 1, y - 1, x + width, y + height)


@pytest.mark.data
def test_coco_ap_is_that_of_pycocotools(shared_data):
    folder = shared_data / "det-eval-reference/coco"
    truth = json.loads((folder / "gts.json").read_text())
    rows = json.loads((folder / "results.json").read_text())
    expected = json.loads((folder / "expected_pycocotools.json").read_text())
    metrics, _ = coco_ap(truth, rows, {c["id"]: c["name"] for c in truth["categories"]})
    for name in ("AP", "AP50", "AP75"):
        assert metrics[name] == pytest.approx(100 * expected[name], abs=1e-6)
