"""mIoU against loops over pixels, its closed forms, and where they are installed other people's code."""

import tempfile
from pathlib import Path

import numpy as np
import pytest

from moco_eval.data.masks.samples import IGNORED
from moco_eval.segmentation.scores import (
    confusion,
    counts_of,
    intersection_over_union,
    intervals,
    metrics_of,
    per_class,
)

CLASSES = 5


def images(count=4, classes=CLASSES, seed=0):
    """Random predictions and masks of several sizes, the masks with ignored pixels and without class 3."""
    random = np.random.default_rng(seed)
    pairs = []
    for number in range(count):
        size = (7 + number, 9)
        mask = random.integers(0, classes, size).astype(np.uint8)
        mask[mask == 3] = 1
        mask[random.random(size) < 0.2] = IGNORED
        agrees = random.random(size) < 0.6
        noise = random.integers(0, classes, size)
        pairs.append((np.where(agrees & (mask != IGNORED), mask, noise).astype(np.uint8), mask))
    return pairs


def counts(pairs, classes=CLASSES):
    return np.stack([counts_of(confusion(prediction, mask, classes)) for prediction, mask in pairs])


def by_loops(pairs, classes=CLASSES):
    values = []
    for label in range(classes):
        shared = union = 0
        for prediction, mask in pairs:
            for said, true in zip(prediction.ravel(), mask.ravel()):
                if true != IGNORED:
                    shared += said == label == true
                    union += label in (said, true)
        values.append(shared / union if union else None)
    return values


def test_it_is_what_a_loop_over_pixels_gives():
    expected = by_loops(images())
    ours = per_class(counts(images()).sum(axis=0), [str(label) for label in range(CLASSES)])
    assert [each["IoU"] for each in ours.values()] == pytest.approx([100 * value for value in expected])
    assert metrics_of(counts(images()).sum(axis=0))["mIoU"] == pytest.approx(100 * np.mean(expected))


def test_closed_forms():
    mask = np.array([[0, 0, 1, IGNORED]], np.uint8)
    total = counts([(np.array([[0, 1, 1, 4]], np.uint8), mask)], 5)[0]
    assert (
        intersection_over_union(total)[:2].tolist() == [0.5, 0.5] and np.isnan(intersection_over_union(total)[2:]).all()
    )
    assert metrics_of(total) == pytest.approx({"mIoU": 50.0, "pixel_accuracy": 200 / 3})
    assert metrics_of(counts([(mask * (mask != IGNORED), mask)], 5)[0]) == {"mIoU": 100.0, "pixel_accuracy": 100.0}
    assert per_class(total, "abcde")["c"]["IoU"] is None


def test_it_is_of_the_whole_set_and_no_mean_over_images():
    pairs = images()
    of_each = np.mean([metrics_of(one)["mIoU"] for one in counts(pairs)])
    assert metrics_of(counts(pairs).sum(axis=0))["mIoU"] != pytest.approx(of_each, abs=0.01)


def test_the_interval_is_that_of_images_drawn_one_by_one():
    each = counts(images(12))
    random = np.random.default_rng(5)
    drawn = [metrics_of(each[random.integers(0, 12, 12)].sum(axis=0)) for _ in range(3000)]
    for name, bounds in intervals([each]).items():
        expected = np.percentile([values[name] for values in drawn], [2.5, 97.5])
        assert bounds == pytest.approx(expected, abs=0.6)
    alone = intervals([each[:1]])["mIoU"]
    assert alone == pytest.approx([metrics_of(each[0])["mIoU"]] * 2)


def test_of_several_trials_it_is_of_their_mean():
    each = counts(images(12))
    other = counts(images(12, seed=1))
    low, high = intervals([each, other])["pixel_accuracy"]
    mean = np.mean([metrics_of(one.sum(axis=0))["pixel_accuracy"] for one in (each, other)])
    assert low < mean < high and intervals([each, each]) == intervals([each])


@pytest.mark.peers
def test_it_equals_torchmetrics():
    torchmetrics = pytest.importorskip(
        "torchmetrics", reason="torchmetrics is not installed (pip install torchmetrics)"
    )
    import torch

    metric = torchmetrics.JaccardIndex("multiclass", num_classes=CLASSES, ignore_index=IGNORED, average="none")
    for prediction, mask in images():
        metric.update(torch.from_numpy(prediction).long(), torch.from_numpy(mask).long())
    ours = np.nan_to_num(intersection_over_union(counts(images()).sum(axis=0)))
    assert ours == pytest.approx(metric.compute().numpy(), rel=1e-6)


@pytest.mark.peers
def test_it_equals_cityscapesscripts():
    """On masks of every label id, as the official script reads them from files."""
    script = pytest.importorskip(
        "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling",
        reason="cityscapesscripts is not installed (pip install cityscapesscripts)",
    )
    from PIL import Image

    from moco_eval.data.masks.cityscapes import CLASSES as NAMES
    from moco_eval.data.masks.cityscapes import IDS, label_table

    random, folder = np.random.default_rng(0), Path(tempfile.mkdtemp())
    truth = random.integers(0, 34, (40, 60)).astype(np.uint8)
    said = np.where(random.random(truth.shape) < 0.5, truth, random.choice(IDS, truth.shape)).astype(np.uint8)
    said = np.where(np.isin(said, IDS), said, 7).astype(np.uint8)
    for name, values in (("a_gtFine_labelIds.png", truth), ("a_prediction.png", said)):
        Image.fromarray(values).save(folder / name)
    script.args.evalInstLevelScore = script.args.JSONOutput = False
    script.args.quiet = True
    files = [[str(folder / f"a_{kind}.png")] for kind in ("prediction", "gtFine_labelIds")]
    official = script.evaluateImgLists(*files, script.args)
    table = label_table()
    total = counts_of(confusion(table[said], table[truth].astype(np.uint8), len(NAMES)))
    ours = {name: each["IoU"] / 100 for name, each in per_class(total, NAMES).items()}
    assert ours == pytest.approx({name: official["classScores"][name] for name in NAMES})
    assert metrics_of(total)["mIoU"] == pytest.approx(100 * official["averageScoreClasses"])
