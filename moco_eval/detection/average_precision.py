"""Average precision: VOC's (11-point and area) at any IoU, and COCO's by pycocotools; for any engine."""

import contextlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moco_eval.data.boxes.samples import DetectionData, Sample
from moco_eval.results.matches import Matches
from moco_eval.results.metrics import area_under, eleven_point
from moco_eval.runtime.collectives import gather_values
from moco_eval.runtime.console import log

IOUS = tuple(percent / 100 for percent in range(50, 100, 5))  # divided, as an overlap of exactly 0.55 is compared
ONE_BASED = np.array((1.0, 1.0, 0.0, 0.0))  # added to our boxes makes VOC's
KINDS = {"bbox": "APbb", "segm": "APmk", "keypoints": "APkp"}  # pycocotools' word and ours
PER_IMAGE = 100  # COCO's maxDets of boxes and masks: the best of each class in an image that count


@dataclass(frozen=True)
class Detections:
    """What a detector found in one image.

    Attributes:
        boxes: (N, 4) float64 as in `Sample`: pixels of the image on disk, after its EXIF rotation.
        scores: (N,) float64, falling.
        labels: (N,) int64.
        masks: of each box, as pycocotools encodes it (size and counts, of the whole image); None without a mask head.
        keypoints: (N, K, 3) float64: x, y and score, in COCO's whole pixels, half a pixel less than boxes count; None
            without a keypoint head.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: list[dict[str, Any]] | None = None
    keypoints: np.ndarray | None = None


Scores = dict[str, float | None]


def gather(detections: Sequence[Detections], images: int) -> list[Detections]:
    """Those of all images, in their order, on every process; each process has those of every world-th. Collective."""
    shares = gather_values([vars(each) for each in detections])
    return [Detections(**shares[index % len(shares)][index // len(shares)]) for index in range(images)]


def evaluate(
    data: DetectionData, detections: Sequence[Detections], rounded: bool = False, per_image: int = PER_IMAGE
) -> tuple[dict[str, float], dict[str, Scores]]:
    """The metrics of a test split and those of each class, in percent.

    VOC format: AP, AP50, AP75 by the 11-point rule (as the published VOC numbers), and by the area under the
    curve as AP_area, AP50_area, AP75_area. COCO format, by pycocotools: APbb, APbb50, APbb75 and APbb_small,
    APbb_medium, APbb_large of boxes; the same of masks (APmk) and keypoints (APkp) where the detector says them.

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
    """The same, and which detection is right where: of each kind of average precision."""
    assert len(detections) == len(data.test)
    if data.coco is None:
        ranked = rank(data.test, detections, len(data.classes), rounded)
        metrics, per_class = _voc(ranked, data.classes)
        matches = [_voc_matches(ranked, len(data.test))]
    else:
        metrics, per_class, matches = _coco_kinds(data, data.coco, detections, per_image)
    if absent := without_objects(per_class):
        log(f"{data.test_split} has no object of {', '.join(absent)}: no AP, and left out of the mean")
    return metrics, per_class, matches


def without_objects(per_class: dict[str, Scores]) -> list[str]:
    """The classes that have no value, because the test split has no object of theirs."""
    return [name for name, scores in per_class.items() if all(value is None for value in scores.values())]


def _named(values: Sequence[float | None], name: str = "AP", suffix: str = "") -> Scores:
    """AP, AP50 and AP75 of a class from its values at the ten IoUs; all None where it has no objects."""
    return {f"{name}{suffix}": _mean(values), f"{name}50{suffix}": values[0], f"{name}75{suffix}": values[5]}


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those that there are; None where there is none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _means(per_class: dict[str, Scores]) -> dict[str, float]:
    """Over the classes that have a value; a metric that no class has is left out."""
    names = next(iter(per_class.values()))
    means = {name: _mean([scores[name] for scores in per_class.values()]) for name in names}
    return {name: value for name, value in means.items() if value is not None}


# VOC


@dataclass(frozen=True)
class Ranked:
    """The detections of one class in all images, highest score first, beside the object each overlaps most.

    Attributes:
        overlaps: (D,) IoU with that object; minus infinity where the image has no object of the class.
        owners: (D,) that object's place in `difficult`.
        difficult: (G,) bool, of each object of the class.
        images: (D,) the image of each detection; object_images: (G,) of each object.
    """

    overlaps: np.ndarray
    owners: np.ndarray
    difficult: np.ndarray
    images: np.ndarray
    object_images: np.ndarray


def voc_ap(
    samples: Sequence[Sample], detections: Sequence[Detections], classes: Sequence[str], rounded: bool = False
) -> tuple[dict[str, float], dict[str, Scores]]:
    """VOC AP at IoU .5:.95, .5 and .75; see `evaluate`.

    Source: Everingham et al. 2010 and the devkit; AP over ten IoUs as in detectron2's VOC evaluator.
    """
    return _voc(rank(samples, detections, len(classes), rounded), classes)


def _voc(by_class: Sequence[Ranked], classes: Sequence[str]) -> tuple[dict[str, float], dict[str, Scores]]:
    per_class: dict[str, Scores] = {}
    for name, ranked in zip(classes, by_class):
        curves = class_curves(ranked)
        per_class[name] = {}
        for suffix, area in (("", eleven_point), ("_area", area_under)):
            values = [100 * area(*curve) for curve in zip(*curves)] if curves else [None] * len(IOUS)
            per_class[name] |= _named(values, suffix=suffix)
    return _means(per_class), per_class


def class_curves(ranked: Ranked, ious: Sequence[float] = IOUS) -> tuple[np.ndarray, np.ndarray] | None:
    """Recall and precision of a class after each of its detections, highest score first.

    A detection belongs to the object it overlaps most. It is right if their IoU is above the threshold and no better
    scored detection took that object; it counts neither way if the object is difficult; else it is wrong.

    Args:
        ious: T thresholds.
    Returns:
        Two arrays, (T, D), or None where the class has no object that is not difficult.
    """
    positives = int((~ranked.difficult).sum())
    if positives == 0:
        return None
    right, counted = _matched(ranked, ious)
    true = np.cumsum(right, axis=1)
    wrong = np.cumsum(counted & ~right, axis=1)
    return true / positives, true / np.maximum(true + wrong, np.finfo(np.float64).eps)


def _matched(ranked: Ranked, ious: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Which detections of a class are right, and which count at all; (T, D) each."""
    hit = ranked.overlaps > np.array(ious)[:, None]
    counted = ~(hit & ranked.difficult[ranked.owners])
    return _first_of_each_object(hit & counted, ranked.owners, len(ranked.difficult)), counted


def _voc_matches(by_class: Sequence[Ranked], images: int) -> Matches:
    """Of every class whose objects count."""
    rows: list[tuple[np.ndarray, ...]] = []
    objects: list[np.ndarray] = []
    for ranked in by_class:
        objects.append(ranked.object_images[~ranked.difficult])
        if len(ranked.difficult):
            right, counted = _matched(ranked, IOUS)
            rows.append((ranked.images, right, ~counted))
        else:
            rows.append((ranked.images, *np.zeros((2, len(IOUS), len(ranked.images)), bool)))
    return _matches("AP", images, rows, objects)


def _matches(kind: str, images: int, rows: Sequence[tuple[np.ndarray, ...]], objects: Sequence[np.ndarray]) -> Matches:
    """From each class's (image (D,), right (T, D), ignored (T, D)) and the images of its objects."""
    bits, each_class = 1 << np.arange(len(IOUS))[:, None], np.arange(len(rows), dtype=np.int32)
    right, ignored = (np.concatenate([(row[part] * bits).sum(axis=0) for row in rows]) for part in (1, 2))
    return Matches(
        kind=kind,
        images=images,
        classes=len(rows),
        image=np.concatenate([row[0] for row in rows]).astype(np.int32),
        label=np.repeat(each_class, [len(row[0]) for row in rows]),
        right=right.astype(np.uint16),
        ignored=ignored.astype(np.uint16),
        object_image=np.concatenate(list(objects)).astype(np.int32),
        object_label=np.repeat(each_class, [len(each) for each in objects]),
    )


def _first_of_each_object(hit: np.ndarray, owners: np.ndarray, objects: int) -> np.ndarray:
    """Of the hits (T, D) on each object the first in each row."""
    none = hit.shape[1]
    first = np.full((len(hit), objects), none)
    row, place = (index[::-1] for index in np.nonzero(hit))
    first[row, owners[place]] = place  # of several places the last one written stays: the first detection
    row, taken = np.nonzero(first < none)
    right = np.zeros_like(hit)
    right[row, first[row, taken]] = True
    return right


def rank(
    samples: Sequence[Sample], detections: Sequence[Detections], classes: int, rounded: bool = False
) -> list[Ranked]:
    """The detections of a split, class by class, best first.

    Of equal scores the earlier image comes first. `rounded` sorts as detectron2 does, by numpy's quicksort, which
    leaves equal scores in an order of its own: they are many among rounded scores.
    """
    images, labels, boxes, scores = _flat([(image.labels, image.boxes, image.scores) for image in detections])
    boxes, scores = _as_text(boxes, scores) if rounded else (boxes + ONE_BASED, scores)
    where, kinds, truth, difficult = _flat([(sample.labels, sample.boxes, sample.difficult) for sample in samples])
    difficult = difficult.astype(bool)
    # an image's objects of one class stand together, and so do a class's detections, each in the order of images
    keys, place = labels * len(samples) + images, kinds * len(samples) + where
    by_class, by_place = np.argsort(keys, kind="stable"), np.argsort(place, kind="stable")
    keys, boxes, scores, images = keys[by_class], boxes[by_class], scores[by_class], images[by_class]
    where = where[by_place]
    place, truth, difficult = place[by_place], truth[by_place] + ONE_BASED, difficult[by_place]
    overlaps, owners = _best_overlaps(keys, boxes, place, truth)
    edges = np.arange(classes + 1) * len(samples)
    starts, objects = np.searchsorted(keys, edges), np.searchsorted(place, edges)
    ranked = []
    for label in range(classes):
        own, first = slice(starts[label], starts[label + 1]), objects[label]
        theirs = slice(first, objects[label + 1])
        order = np.argsort(-scores[own], kind="quicksort" if rounded else "stable")
        flags = difficult[theirs]
        # a detection without an object may point behind the last one
        owner = np.minimum(owners[own][order] - first, len(flags) - 1)
        ranked.append(Ranked(overlaps[own][order], owner, flags, images[own][order], where[theirs]))
    return ranked


def _flat(parts: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Labels, boxes and a number of each box of all images in one, and before them the image of each."""
    images = np.repeat(np.arange(len(parts)), [len(part[0]) for part in parts])
    labels = np.concatenate([np.zeros(0, np.int64), *(part[0] for part in parts)])
    boxes = np.concatenate([np.zeros((0, 4)), *(np.asarray(part[1], np.float64).reshape(-1, 4) for part in parts)])
    return images, labels, boxes, np.concatenate([np.zeros(0), *(part[2] for part in parts)])


def _as_text(boxes: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What detectron2's evaluator leaves of both: VOC's 1-based boxes to 0.1 pixel, scores to three decimals.

    It adds 1 to xmin and ymin in float32, writes with .1f and .3f, and reads that again. The decimals of a float32
    times 10 or 1000 are exact in float64, so rint, which rounds halves to even, rounds as the formatting does.
    """
    boxes = boxes.astype(np.float32) + ONE_BASED.astype(np.float32)
    scores = scores.astype(np.float32).astype(np.float64)
    return np.rint(boxes.astype(np.float64) * 10) / 10, np.rint(scores * 1000) / 1000


def _best_overlaps(
    keys: np.ndarray, boxes: np.ndarray, place: np.ndarray, truth: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Each detection's best IoU among the objects with its key, and the first object that has it.

    Args:
        keys: (D,) image and class of each detection; place: (G,) those of each object, ascending.
        boxes, truth: (D, 4) and (G, 4), 1-based, as VOC writes them.
    """
    first = np.searchsorted(place, keys)
    count = np.searchsorted(place, keys, side="right") - first
    best, owners = np.full(len(keys), -np.inf), first.copy()
    for step in range(count.max(initial=0)):  # the next object of each detection's group, where it has one
        open_ = np.flatnonzero(count > step)
        overlaps = inclusive_iou(boxes[open_], truth[first[open_] + step])
        better = overlaps > best[open_]
        best[open_[better]] = overlaps[better]
        owners[open_[better]] = first[open_[better]] + step
    return best, owners


def inclusive_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of each of (N, 4) boxes with its partner, (N,); xmax and ymax belong to a VOC box, so sides are 1 longer."""
    low, high = np.maximum(boxes[:, :2], others[:, :2]), np.minimum(boxes[:, 2:], others[:, 2:])
    common = np.maximum(high - low + 1, 0).prod(axis=1)
    first, second = ((each[:, 2:] - each[:, :2] + 1).prod(axis=1) for each in (boxes, others))
    return common / (first + second - common)


# COCO


def _coco_kinds(
    data: DetectionData, truth: dict[str, Any], detections: Sequence[Detections], per_image: int
) -> tuple[dict[str, float], dict[str, Scores], list[Matches]]:
    """COCO's AP of boxes, and of masks and keypoints where the detector has a head for them."""
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
        judge = _judge(truth, coco_rows(data, detections, kind), kind, per_image)
        means, scores = _coco(judge, names, kind)
        matches.append(_coco_matches(judge, kind, [sample.image_id for sample in data.test]))
        metrics |= means
        for name in data.classes:
            per_class[name] |= scores[name]
    return metrics, per_class, matches


def coco_rows(data: DetectionData, detections: Sequence[Detections], kind: str = "bbox") -> list[dict[str, Any]]:
    """Detections as pycocotools and the COCO server take them; boxes as x, y, width, height.

    Rows of masks have no box, so that their size is the mask's; those of keypoints have one, as detectron2's.
    """
    rows = []
    for sample, image in zip(data.test, detections):
        for place, (x0, y0, x1, y1) in enumerate(image.boxes.tolist()):
            row: dict[str, Any] = {"image_id": sample.image_id, "category_id": data.category_ids[image.labels[place]]}
            row["score"] = float(image.scores[place])
            if kind == "segm":
                assert image.masks is not None
                row["segmentation"] = image.masks[place]
            else:
                row["bbox"] = [x0, y0, x1 - x0, y1 - y0]
            if kind == "keypoints":
                assert image.keypoints is not None
                row["keypoints"] = image.keypoints[place].ravel().tolist()
            rows.append(row)
    return rows


def coco_ap(
    truth: dict[str, Any],
    rows: list[dict[str, Any]],
    names: dict[int, str],
    kind: str = "bbox",
    per_image: int = PER_IMAGE,
) -> tuple[dict[str, float], dict[str, Scores]]:
    """COCO's AP, AP50, AP75 and AP by size, in percent, with the letters of `KINDS`.

    Args:
        truth: images, annotations and categories, as in a COCO file.
        rows: detections as of `coco_rows`.
        names: class name of each category id.
        kind: bbox, segm or keypoints; keypoints are judged on the classes that have some.
        per_image: as in `evaluate`.
    """
    return _coco(_judge(truth, rows, kind, per_image), names, kind)


def _coco(judge: Any, names: dict[int, str], kind: str) -> tuple[dict[str, float], dict[str, Scores]]:
    # precision: IoU, recall, class, size, detections per image; -1 where there is no object
    precision = judge.eval["precision"][..., -1].mean(axis=1)
    places = {names[category]: place for place, category in enumerate(judge.params.catIds)}
    per_class: dict[str, Scores] = {}
    for name in names.values():
        per_class[name] = {}
        for place, size in enumerate(judge.params.areaRngLbl):
            precisions = precision[:, places[name], place].tolist() if name in places else [-1.0] * len(IOUS)
            values = [100 * value if value > -1 else None for value in precisions]
            if size == "all":
                per_class[name] |= _named(values, KINDS[kind])
            else:
                per_class[name][f"{KINDS[kind]}_{size}"] = _mean(values)
    return _means(per_class), per_class


def _coco_matches(judge: Any, kind: str, image_ids: Sequence[Any]) -> Matches:
    """What pycocotools matched at any size, in its order of detections; images in the order of `image_ids`."""
    place = {image: number for number, image in enumerate(image_ids)}
    per_size, limit = len(judge.params.imgIds), judge.params.maxDets[-1]
    rows, objects = [], []
    for category in range(len(judge.params.catIds)):
        start = category * len(judge.params.areaRng) * per_size  # "all" is the first size
        said = [each for each in judge.evalImgs[start : start + per_size] if each is not None]
        scores = np.concatenate([np.zeros(0), *(each["dtScores"][:limit] for each in said)])
        order = np.argsort(-scores, kind="mergesort")
        found, passed_over = (
            np.concatenate([np.zeros((len(IOUS), 0)), *(each[name][:, :limit] for each in said)], axis=1)[:, order] != 0
            for name in ("dtMatches", "dtIgnore")
        )
        images = [np.full(len(each["dtScores"][:limit]), place[each["image_id"]]) for each in said]
        rows.append((np.concatenate([np.zeros(0), *images])[order], found & ~passed_over, passed_over))
        counting = [int((np.asarray(each["gtIgnore"]) == 0).sum()) for each in said]
        objects.append(np.repeat([place[each["image_id"]] for each in said], counting))
    return _matches(KINDS[kind], len(image_ids), rows, objects)


def _judge(truth: dict[str, Any], rows: list[dict[str, Any]], kind: str, per_image: int) -> Any:
    """pycocotools' COCOeval after it has accumulated."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        reference, said = COCO(), COCO()
        # pycocotools writes into the annotations, so it gets copies
        reference.dataset = {"info": {}, "licenses": [], **truth, "annotations": _annotations(truth, kind)}
        reference.createIndex()
        said.dataset = {"images": truth["images"], "annotations": [], "categories": truth["categories"]}
        said.createIndex()
        judge = COCOeval(reference, reference.loadRes(rows) if rows else said, kind)
        if kind == "keypoints":
            _judge_keypoints(judge, reference.dataset["annotations"])
        else:
            judge.params.maxDets = [per_image]
        judge.evaluate()
        judge.accumulate()
    return judge


def _annotations(truth: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """Copies of the annotations with what this kind of AP needs."""
    if kind == "keypoints":
        return [{"keypoints": [], "num_keypoints": 0} | item for item in truth["annotations"]]
    bare = [item for item in truth["annotations"] if not item.get("segmentation")] if kind == "segm" else []
    if bare:
        log(f"{len(bare)} of {len(truth['annotations'])} test objects have no mask: in APmk they count neither way")
    without = {item["id"] for item in bare}
    return [item | (_region(item) if item["id"] in without else {}) for item in truth["annotations"]]


def _region(item: dict[str, Any]) -> dict[str, Any]:
    """What makes of an object without a mask a crowd region of its box: masks in there are not held against anyone."""
    x, y, width, height = item["bbox"]
    return {"iscrowd": 1, "segmentation": [[x, y, x + width, y, x + width, y + height, x, y + height]]}


def _judge_keypoints(judge: Any, annotations: list[dict[str, Any]]) -> None:
    """Set pycocotools to the classes that have keypoints, and to their number of them.

    COCO measured how well people place each of its 17 keypoints; any other set is judged by the mean of those.
    """
    marked = [item for item in annotations if item["num_keypoints"]]
    limit, most = judge.params.maxDets[-1], Counter((item["image_id"], item["category_id"]) for item in marked)
    if crowded := sum(count > limit for count in most.values()):
        log(
            f"keypoints: {crowded} test images have more than {limit} objects of a class (up to {max(most.values())}); "
            f"by COCO's rule APkp counts the best {limit} detections"
        )
    judge.params.catIds = sorted({item["category_id"] for item in marked})
    count = max((len(item["keypoints"]) // 3 for item in marked), default=0)
    sigmas = judge.params.kpt_oks_sigmas
    if count not in (0, len(sigmas)):
        log(f"keypoints: {count} of a class, not COCO's {len(sigmas)}; each is judged by the mean of COCO's tolerances")
        judge.params.kpt_oks_sigmas = np.full(count, sigmas.mean())
    for item in annotations:
        item["keypoints"] = item["keypoints"] or [0] * (3 * count)
