"""Matched detections: their AP is the judge's own, and that of images drawn several times is of such images."""

import numpy as np
import pytest
from test_detection_average_precision import coco_case, random_case

from moco_eval.detection.average_precision import Detections, judged, rank, voc_ap
from moco_eval.detection.average_precision import _voc_matches as voc_matches
from moco_eval.errors import InputError
from moco_eval.results import matches
from moco_eval.results.matches import Detected
from moco_eval.results.statistics import detection_intervals, draw_weights, paired, resampled, value


def detected(*trials):
    return Detected(tuple({one.kind: one for one in kinds} for kinds in trials))


def voc_case(seed, images=12):
    truth, boxes = random_case(np.random.default_rng(seed), images, classes=3)
    return truth, boxes, voc_matches(rank(truth, boxes, 3), images)


@pytest.mark.parametrize("seed", range(3))
def test_each_image_once_is_the_metric_itself(seed):
    truth, boxes, one = voc_case(seed)
    metrics, _ = voc_ap(truth, boxes, "abc")
    for name in ("AP", "AP50", "AP75"):
        assert value(name, detected([one])) == pytest.approx(metrics[name], abs=1e-10)


@pytest.mark.parametrize("seed", range(2))
def test_cocos_kinds_too(seed):
    data, found = coco_case(seed)
    metrics, _, kinds = judged(data, found)
    assert [one.kind for one in kinds] == ["APbb", "APmk", "APkp"]
    for one in kinds:
        for part in ("", "50", "75"):
            assert value(one.kind + part, detected(kinds)) == pytest.approx(metrics[one.kind + part], abs=1e-9)


def spread(truth, boxes, times):
    """Each image as often as it is drawn."""
    order = np.repeat(np.arange(len(truth)), times)
    return [truth[i] for i in order], [boxes[i] for i in order]


@pytest.mark.parametrize("seed", range(3))
def test_a_weight_is_so_many_copies_of_an_image(seed):
    truth, boxes, one = voc_case(seed)
    (weights,) = draw_weights(len(truth), 6, seed)
    for column in weights.T:
        metrics, _ = voc_ap(*spread(truth, boxes, column), "abc")
        for part in ("", "50", "75"):
            ours = one.average_precision(part, column[:, None].astype(np.int64))
            assert ours[0] == pytest.approx(metrics["AP" + part], abs=1e-9)


def test_no_object_in_a_resample_is_no_number_and_no_detection_scores_0():
    truth, _, _ = voc_case(0)
    nothing = [Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))] * len(truth)
    one = voc_matches(rank(truth, nothing, 3), len(truth))
    weights = np.stack([np.ones(len(truth)), np.zeros(len(truth))], axis=1).astype(np.int64)
    with_images, without = one.average_precision("", weights)
    assert with_images == 0 and np.isnan(without)


def test_the_interval_is_that_of_images_drawn_anew():
    """Against AP computed anew for every sample of images."""
    truth, boxes, one = voc_case(1, images=20)
    (weights,) = draw_weights(20, 40, 0)
    naive = [voc_ap(*spread(truth, boxes, column), "abc")[0]["AP50"] for column in weights.T]
    np.testing.assert_allclose(resampled("AP50", detected([one]), resamples=40), naive, atol=1e-9)
    low, high = detection_intervals(["AP50", "AP_area"], detected([one]))["AP50"]
    assert low < value("AP50", detected([one])) < high
    assert list(detection_intervals(["AP50", "AP_area"], detected([one]))) == ["AP50"]


def test_a_difference_is_taken_on_the_same_images():
    truth, boxes, one = voc_case(2, images=30)
    worse = [Detections(d.boxes, d.scores, (d.labels + (np.arange(len(d.labels)) % 5 == 0)) % 3) for d in boxes]
    other = voc_matches(rank(truth, worse, 3), 30)
    both = detected([other]), detected([one])
    same = paired("AP", both[0], both[0], 200)
    assert same.interval == (0, 0) and same.p == 1
    apart = paired("AP", *both, 400)
    own = [np.std(resampled("AP", each, resamples=400), ddof=1) for each in both]
    assert 0 < apart.standard_error < np.hypot(*own)


def test_what_is_written_is_read(tmp_path):
    _, _, one = voc_case(0)
    matches.write(tmp_path / "matches.npz", [one])
    back = matches.read(tmp_path / "matches.npz")["AP"]
    for name in ("image", "label", "right", "ignored", "object_image", "object_label"):
        np.testing.assert_array_equal(getattr(back, name), getattr(one, name))


SPOILED = {
    "image beyond the last": lambda arrays: arrays | {"AP_image": arrays["AP_image"] + 100},
    "negative class": lambda arrays: arrays | {"AP_label": arrays["AP_label"] - 1},
    "bits of eleven IoUs": lambda arrays: arrays | {"AP_right": arrays["AP_right"] + 1024},
    "other lengths": lambda arrays: arrays | {"AP_right": arrays["AP_right"][:-1]},
    "classes mixed": lambda arrays: arrays | {"AP_label": arrays["AP_label"][::-1]},
    "no numbers": lambda arrays: arrays | {"AP_object_image": arrays["AP_object_image"] + 0.5},
    "a column missing": lambda arrays: {name: array for name, array in arrays.items() if name != "AP_ignored"},
    "immense": lambda arrays: arrays | {"AP_size": np.array([12, 10**9])},
}


@pytest.mark.parametrize("why", SPOILED)
def test_a_damaged_file_is_refused(why, tmp_path):
    path = tmp_path / "matches.npz"
    matches.write(path, [voc_case(0)[2]])
    with np.load(path) as kept:
        arrays = dict(kept)
    np.savez(path, **SPOILED[why](arrays))
    with pytest.raises(InputError):
        matches.read(path)
