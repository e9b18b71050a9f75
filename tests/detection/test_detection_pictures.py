"""Drawn detections, bars of the classes and curves of the losses."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as pycocotools_mask

from moco_eval.data.boxes.samples import DetectionData, Sample
from moco_eval.detection.average_precision import Detections
from moco_eval.detection.pictures import GAP, SIDE, TINT, colour_of, decode, draw_pictures
from moco_eval.results.plots import POINTS, ROWS, bars_figure, loss_curves, loss_figure, moving_mean, per_class_bars

SQUARE = [[20, 40, 60, 40, 60, 80, 20, 80]]  # a polygon, x0 to x1 and y0 to y1 of the box below
BOX = (20.0, 40.0, 60.0, 80.0)


def square_mask():
    mask = np.zeros((100, 100), np.uint8)
    mask[40:80, 20:60] = 1
    return mask


def truth(path, size=(100, 100), name="a", **parts):
    Image.new("RGB", size).save(path)
    one = {
        "boxes": np.array([BOX]),
        "labels": np.array([0]),
        "difficult": np.array([False]),
        "crowd": np.array([False]),
    }
    return Sample(name, path, size, **(one | parts))


def data(*samples, classes=("cat", "dog")):
    return DetectionData("t", classes, [], list(samples), "train", "test", "")


def said(*scores, **parts):
    boxes = np.array([BOX] * len(scores)).reshape(-1, 4)
    return Detections(boxes, np.array(scores), np.zeros(len(scores), int), **parts)


def halves(path):
    """Both halves of a drawn picture, (H, W, 3) each."""
    pixels = np.asarray(Image.open(path)).astype(int)
    width = (pixels.shape[1] - GAP) // 2
    return pixels[:, :width], pixels[:, width + GAP :]


def outlined(half, colour):
    """Whether the middle of the box's left edge has the colour."""
    return (half[60 * SIDE // 100, 20 * SIDE // 100] == colour).all()


def test_left_is_the_truth_and_right_what_scores_enough(tmp_path):
    sample = truth(tmp_path / "a.png")
    for score, drawn in ((0.31, True), (0.29, False)):
        (path,) = draw_pictures(data(sample), [said(score)], tmp_path / "out")
        left, right = halves(path)
        assert left.shape == right.shape == (SIDE, SIDE, 3)
        assert outlined(left, colour_of(0, 2)) and outlined(right, colour_of(0, 2)) == drawn
        assert right.any() == drawn


@pytest.mark.parametrize("kind", ["polygons", "runs", "text", "none"])
def test_masks_are_translucent_and_keypoints_dots(tmp_path, kind):
    text = pycocotools_mask.encode(np.asfortranarray(square_mask()))
    runs = {"size": [100, 100], "counts": [20 * 100 + 40, *[40, 60] * 39, 40, 40 * 100 + 20]}
    mask = {"polygons": SQUARE, "runs": runs, "text": text, "none": None}[kind]
    points = np.array([[[50.0, 70.0, 2], [30.0, 70.0, 0]]])
    sample = truth(tmp_path / "a.png", masks=(mask,), keypoints=points)
    (path,) = draw_pictures(data(sample), [said(0.9, masks=[text])], tmp_path / "out")
    left, right = halves(path)
    tinted = np.array(colour_of(0, 2)) * TINT
    inside, dot, unlabelled = ((int(y * SIDE / 100), int(x * SIDE / 100)) for x, y in ((40, 60), (50, 70), (30, 70)))
    for half, shown in ((left, kind != "none"), (right, True)):
        assert np.abs(half[inside] - (tinted if shown else 0)).max() <= 2
        assert not half[-5, -5].any()
    assert (left[dot] == colour_of(0, 2)).all() and (left[unlabelled] == left[inside]).all()
    assert (right[dot] == right[inside]).all()  # no keypoints were found
    if mask is not None:
        assert (decode(mask, (100, 100)) == square_mask()).all()


def test_pictures_are_spread_over_the_split_and_named_in_order(tmp_path):
    samples = [truth(tmp_path / f"{i}.png", name=f"folder/{i}") for i in range(9)]
    paths = draw_pictures(data(*samples), [said()] * 9, tmp_path / "out", count=3)
    assert [path.name for path in paths] == ["0-0.png", "1-4.png", "2-8.png"]
    assert sorted((tmp_path / "out").iterdir()) == paths


def test_images_without_objects_are_drawn_only_where_there_are_no_others(tmp_path):
    none = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, int)}
    empty = [truth(tmp_path / f"{name}.png", name=name, **none) for name in "ab"]
    full = truth(tmp_path / "c.png", name="c")
    (path,) = draw_pictures(data(empty[0], full, empty[1]), [said()] * 3, tmp_path / "out")
    assert path.name == "0-c.png"
    assert len(draw_pictures(data(*empty), [said()] * 2, tmp_path / "none")) == 2


@pytest.mark.parametrize("size", [(1, 1), (700, 3), (3, 700)])
def test_odd_images_and_names_are_drawn(tmp_path, size):
    box = np.array([[0.0, 0, size[0], size[1]]])
    sample = truth(tmp_path / "a.png", size, boxes=box, difficult=np.array([True]))
    names = ("кошка " * 20, "<b> $x$ \U0001f600")
    found = Detections(box - 5, np.array([0.9]), np.array([1]))
    (path,) = draw_pictures(data(sample, classes=names), [found], tmp_path / "out")
    assert Image.open(path).size[1] <= SIDE


@pytest.mark.parametrize("classes", [2, 12, 20])
def test_classes_differ_in_colour(classes):
    colours = np.array([colour_of(label, classes) for label in range(classes)])
    apart = np.abs(colours[:, None] - colours[None]).sum(axis=2) + 999 * np.eye(classes, dtype=int)
    assert apart.min() > 30


# Plots


def test_of_a_thousand_classes_the_best_and_the_worst_are_drawn():
    values = {f"class {i}": {"APbb": i / 15} for i in range(1203)}
    figure = bars_figure(values | {f"none {i}": {"APbb": None} for i in range(30)}, "APbb")
    names = [[label.get_text() for label in axes.get_yticklabels()] for axes in figure.axes]
    assert [len(column) for column in names] == [100, 100]
    assert (names[0][0], names[1][-1]) == ("class 1202", "class 0")
    assert figure.axes[0].get_xlabel() == f"APbb (%), mean {601 / 15:.1f}; 200 of 1,203 classes"


def test_bars_fall_and_classes_without_objects_come_last():
    per_class = {"low": {"AP50": 10.0}, "none": {"AP50": None}, "high": {"AP50": 70.0}, "zero": {"AP50": 0.0}}
    (axes,) = bars_figure(per_class, "AP50").axes
    assert [bar.get_width() for bar in axes.patches] == [70, 10, 0, 0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["high", "low", "zero", "none"]
    assert [text.get_text() for text in axes.texts] == ["70.0", "10.0", "0.0", "no object"]
    assert axes.get_xlabel() == "AP50 (%), mean 26.7"


@pytest.mark.parametrize("classes", [1, ROWS, ROWS + 1, 100])
def test_every_class_has_its_bar_and_room_for_its_name(classes):
    figure = bars_figure({f"class {i}": {"APbb": float(i)} for i in range(classes)}, "APbb")
    shown = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
    assert shown == [f"class {i}" for i in reversed(range(classes))]
    rows = max(len(axes.patches) for axes in figure.axes)
    assert figure.get_size_inches()[1] * 72 / max(rows, 3) > 12  # points for words of 8


def test_a_moving_mean_is_that_of_its_neighbours():
    values = np.random.default_rng(0).random(30)
    naive = [values[max(i - 3, 0) : i + 4].mean() for i in range(30)]
    np.testing.assert_allclose(moving_mean(values, 7), naive)
    np.testing.assert_allclose(moving_mean(values, 1), values)


def lines(count, total="loss"):
    return [
        {"iteration": 20 * i, "lr": 0.02 if 20 * i < 600 else 0.002, total: 1.5, "loss_cls": 1.0, "loss_mask": 0.5}
        for i in range(1, count + 1)
    ]


@pytest.mark.parametrize("total", ["loss", "total_loss"])
def test_each_loss_has_its_curve_and_each_drop_its_line(total):
    (axes,) = loss_figure([lines(50, total)]).axes
    labels = [line.get_label() for line in axes.get_lines() if not line.get_label().startswith("_")]
    assert labels == ["total", "class", "mask"]
    assert [text.get_text() for text in axes.texts] == ["lr 0.002"]
    assert any(list(line.get_xdata()) == [600, 600] for line in axes.get_lines())


def test_a_long_run_is_drawn_with_few_points_to_its_end():
    (axes,) = loss_figure([lines(5000)]).axes
    curve = next(line for line in axes.get_lines() if line.get_label() == "total")
    assert len(curve.get_xdata()) <= POINTS + 1 and curve.get_xdata()[-1] == 100_000


@pytest.mark.parametrize("suffix, begins", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_plots_are_written_as_their_suffix_says(tmp_path, suffix, begins):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines(3)) + '{"iter')  # as a killed run leaves it
    loss_curves([metrics, tmp_path / "nowhere.jsonl"], tmp_path / f"losses.{suffix}")
    per_class_bars({"$x$ <&> кошка": {"AP50": 5.0}, "$": {"AP50": None}}, "AP50", tmp_path / f"bars.{suffix}")
    for name in ("losses", "bars"):
        assert (tmp_path / f"{name}.{suffix}").read_bytes().startswith(begins)
    loss_curves([Path("nowhere.jsonl")], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
