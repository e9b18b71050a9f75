"""AP of Cityscapes instances: against literal loops, against cityscapesScripts, and rule by rule."""

import numpy as np
import pytest
from PIL import Image

from moco_eval.data.boxes.cityscapes import CLASSES, IDS
from moco_eval.detection.average_precision import Detections
from moco_eval.detection.cityscapes_precision import OVERLAPS, cityscapes_ap
from moco_eval.detection.masks import encoded

HEIGHT, WIDTH = 70, 90
VOID_IDS = (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30)
PERSON, CAR = 0, 2


def write(path, ids):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ids.astype(np.uint16)).save(path)
    return path


def painted(*things, ground=7):
    """An image of instance ids from (id, rows, columns)."""
    ids = np.full((HEIGHT, WIDTH), ground)
    for value, rows, columns in things:
        ids[slice(*rows), slice(*columns)] = value
    return ids


def found(*things):
    """Detections from (class, score, mask)."""
    order = sorted(things, key=lambda thing: -thing[1])
    masks = [encoded(mask) for _, _, mask in order]
    scores = np.array([score for _, score, _ in order], dtype=np.float64)
    return Detections(np.zeros((len(order), 4)), scores, np.array([c for c, _, _ in order], np.int64), masks)


def area(rows, columns):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[slice(*rows), slice(*columns)] = True
    return mask


def ap(folder, images, detections, name="car"):
    files = [write(folder / f"{number}.png", ids) for number, ids in enumerate(images)]
    return cityscapes_ap(files, detections, CLASSES)[1][name]["APmk50"]


# Against loops


def literal(images, detections, place, overlap):
    """AP of a class at one overlap as the script says it, one step after the other; None without objects."""
    label, points, objects = IDS[place], [], 0
    for ids, image in zip(images, detections):
        own = [v for v in np.unique(ids).tolist() if (v if v < 1000 else v // 1000) == label]
        counted = [v for v in own if v >= 1000 and (ids == v).sum() >= 100]
        objects += len(counted)
        claims = {}
        for code, score, kind in zip(image.masks, image.scores, image.labels):
            mask = mask_of(code)
            if kind != place or not mask.any():
                continue
            iou = {v: (mask & (ids == v)).sum() / (mask | (ids == v)).sum() for v in own}
            hits = [v for v in own if iou[v] > overlap]
            if hits:
                if hits[0] in counted:
                    claims.setdefault(hits[0], []).append(score)
                continue
            forgiven = np.isin(ids[mask], VOID_IDS).sum()
            for value in own:
                common = (mask & (ids == value)).sum()
                forgiven += common * (int(value < 1000) + int((ids == value).sum() < 100))
            if forgiven / mask.sum() <= overlap:
                points.append((score, False))
        for scores in claims.values():
            best, *others = sorted(scores, reverse=True)
            points += [(best, True), *((score, False) for score in others)]
    if not objects:
        return None
    curve = []
    for level in sorted({score for score, _ in points}):
        right = [hit for score, hit in points if score >= level]
        curve.append((sum(right) / len(right), sum(right) / objects))
    curve.append((1.0, 0.0))
    recalls = [curve[0][1], *(recall for _, recall in curve), 0.0]
    return sum(p * (recalls[i] - recalls[i + 2]) / 2 for i, (p, _) in enumerate(curve))


def mask_of(code):
    from pycocotools import mask as coco_mask

    return coco_mask.decode(code) > 0


def random_case(seed, images=4):
    random = np.random.default_rng(seed)
    pool = [24, 26, 33, 29, 0, 4, 24000, 24001, 26000, 26001, 26002, 33000, 29001, 32000]

    def place():
        height, width = random.integers(4, 40, 2)
        top, left = random.integers(0, HEIGHT - height), random.integers(0, WIDTH - width)
        return (top, top + height), (left, left + width)

    maps, detections = [], []
    for _ in range(images):
        ids = painted(*((value, *place()) for value in random.permutation(pool)[:9]))
        things = []
        for value in np.unique(ids[ids > 23]).tolist():
            label = value if value < 1000 else value // 1000
            if label in IDS:
                for _ in range(random.integers(0, 3)):
                    mask = np.roll(ids == value, random.integers(-3, 4, 2), (0, 1)) & (random.random() < 0.95)
                    things.append((IDS.index(label), round(random.random(), 1), mask))
        things += [(int(random.choice([0, 2, 7])), round(random.random(), 1), area(*place())) for _ in range(6)]
        ids[-5:] = 7
        things += [(kind, 0.0, area((HEIGHT - 5, HEIGHT), (0, 9))) for kind in range(len(CLASSES))]  # wrong in any case
        maps.append(ids)
        detections.append(found(*things))
    return maps, detections


def test_against_literal_loops(tmp_path):
    compared = 0
    for seed in range(6):
        maps, detections = random_case(seed)
        files = [write(tmp_path / f"{seed}-{number}.png", ids) for number, ids in enumerate(maps)]
        metrics, per_class = cityscapes_ap(files, detections, CLASSES)
        table = [[literal(maps, detections, place, overlap) for overlap in OVERLAPS] for place in range(len(CLASSES))]
        for name, row in zip(CLASSES, table):
            expected = None if row[0] is None else pytest.approx(100 * np.mean(row))
            assert per_class[name]["APmk"] == expected
            assert per_class[name]["APmk50"] == (None if row[0] is None else pytest.approx(100 * row[0]))
            compared += row[0] is not None and 0 < row[0] < 1
        assert metrics["APmk"] == pytest.approx(100 * np.mean([row for row in table if row[0] is not None]))
        assert metrics["APmk50"] == pytest.approx(100 * np.mean([row[0] for row in table if row[0] is not None]))
    assert compared > 10


def test_it_equals_cityscapesscripts(tmp_path, monkeypatch):
    script = pytest.importorskip(
        "cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling",
        reason="cityscapesscripts is not installed (pip install cityscapesscripts)",
    )
    monkeypatch.setattr(np, "in1d", np.isin, raising=False)  # which numpy 2.4 has no more
    monkeypatch.setattr(script, "writeDict2JSON", lambda *_: None)  # which cannot write numpy's numbers
    for seed in range(6):
        maps, detections = random_case(seed + 100)
        folder = tmp_path / str(seed)
        names = [f"aachen_{number:06}_000019" for number in range(len(maps))]
        files = [write(folder / f"{name}_gtFine_instanceIds.png", ids) for name, ids in zip(names, maps)]
        lists = [write_prediction(folder, name, image) for name, image in zip(names, detections)]
        for name, value in {
            "gtInstancesFile": str(folder / "gt.json"),
            "predictionPath": str(folder),
            "JSONOutput": False,
            "quiet": True,
        }.items():
            monkeypatch.setattr(script.args, name, value)
        theirs = script.evaluateImgLists(lists, [str(file) for file in files], script.args)["averages"]
        metrics, per_class = cityscapes_ap(files, detections, CLASSES)
        assert metrics["APmk"] == 100 * theirs["allAp"] and metrics["APmk50"] == 100 * theirs["allAp50%"]
        for name in CLASSES:
            said = theirs["classes"][name]["ap"]
            assert per_class[name]["APmk"] == (None if np.isnan(said) else 100 * said)


def write_prediction(folder, name, image):
    lines = []
    for number, (code, score, place) in enumerate(zip(image.masks, image.scores, image.labels)):
        file = folder / f"{name}_{number}.png"
        Image.fromarray(mask_of(code).astype(np.uint8) * 255).save(file)
        lines.append(f"{file.name} {IDS[place]} {score!r}".replace("np.float64(", "").replace(")", ""))
    path = folder / f"{name}.txt"
    path.write_text("\n".join(lines) + ("\n" if lines else ""))
    return str(path)


# Rule by rule

OBJECT = (26001, (10, 30), (10, 30))
ON_IT = (CAR, 0.5, area((10, 30), (10, 30)))


def test_a_perfect_detection_scores_100_and_a_class_without_objects_has_no_value(tmp_path):
    assert ap(tmp_path, [painted(OBJECT)], [found(ON_IT)]) == pytest.approx(100)
    assert ap(tmp_path, [painted(OBJECT)], [found(ON_IT)], "person") is None
    assert ap(tmp_path, [painted(OBJECT)], [found()]) == 0


def test_a_wrong_one_that_scores_more_costs_three_quarters(tmp_path):
    """Precision 1/2 at recall 1 and 0 at recall 0, then 1 at recall 0: (1/2 x 1 + 0 x 1 + 1 x 0) / 2."""
    wrong = (CAR, 0.9, area((40, 60), (40, 60)))
    assert ap(tmp_path, [painted(OBJECT)], [found(ON_IT, wrong)]) == pytest.approx(25)


def test_an_overlap_of_exactly_the_threshold_is_none(tmp_path):
    half = (CAR, 0.5, area((10, 30), (10, 20)))
    assert ap(tmp_path, [painted(OBJECT)], [found(half)]) == 0
    more = (CAR, 0.5, area((10, 30), (10, 21)))
    assert ap(tmp_path, [painted(OBJECT)], [found(more)]) == pytest.approx(100)


@pytest.mark.parametrize(
    "ground,value",
    [(26, "a group of its class"), (0, "unlabelled"), (29, "a group of caravans"), (10, "rail track")],
)
def test_what_lies_on_ignored_ground_counts_neither_way(tmp_path, ground, value):
    beside = (CAR, 0.9, area((40, 60), (40, 60)))
    image = painted(OBJECT, (ground, (35, 65), (35, 85)))
    assert ap(tmp_path, [image], [found(ON_IT, beside)]) == pytest.approx(100), value


@pytest.mark.parametrize("ground", [7, 24, 24001, 29001], ids=["road", "people", "a person", "one caravan"])
def test_what_lies_on_other_ground_is_wrong(tmp_path, ground):
    beside = (CAR, 0.9, area((40, 60), (40, 60)))
    image = painted(OBJECT, (ground, (35, 65), (35, 85)))
    assert ap(tmp_path, [image], [found(ON_IT, beside)]) == pytest.approx(25)


def test_objects_of_less_than_100_pixels_count_neither_way(tmp_path):
    small, large = (26002, (50, 59), (50, 61)), (26002, (50, 60), (50, 60))  # 99 and 100 pixels
    assert ap(tmp_path, [painted(OBJECT, small)], [found(ON_IT)]) == pytest.approx(100)
    assert ap(tmp_path, [painted(OBJECT, large)], [found(ON_IT)]) == pytest.approx(50)
    on_small = (CAR, 0.9, area((50, 59), (50, 61)))
    assert ap(tmp_path, [painted(OBJECT, small)], [found(ON_IT, on_small)]) == pytest.approx(100)


def test_an_object_is_found_once_by_the_one_that_scores_more(tmp_path):
    """A at 0.9, A again at 0.8, B at 0.7: precision 2/3, 1/2, 1 and 1 at recall 1, 1/2, 1/2 and 0."""
    image = painted(OBJECT, (26002, (50, 65), (50, 70)))
    once = [(CAR, 0.9, area((10, 30), (10, 30))), (CAR, 0.7, area((50, 65), (50, 70)))]
    again = (CAR, 0.8, area((10, 30), (10, 29)))
    assert ap(tmp_path, [image], [found(*once)]) == pytest.approx(100)
    assert ap(tmp_path, [image], [found(*once, again)]) == pytest.approx(100 * (2 / 3 + 1 / 2 + 1 + 1) / 4)
