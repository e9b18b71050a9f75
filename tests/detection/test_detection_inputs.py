"""What a detector trains on and what its words become on disk: masks, keypoints and sizes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from moco_eval.config import load as configs
from moco_eval.config.detection import DetectConfig
from moco_eval.data.boxes.coco import read_coco_folder
from moco_eval.data.boxes.samples import make_sample
from moco_eval.detection import inputs
from moco_eval.detection.inputs import View
from moco_eval.detection.judge import evaluate
from moco_eval.detection.masks import decoded, encoded, mask_targets
from moco_eval.detection.torchvision_engine import on_disk
from moco_eval.errors import InputError

PAIRS = ((1, 2),)
WIDTH, HEIGHT = 83, 57
PLACES = ((10, 5, 40, 30), (20, 21, 83, 57), (0, 0, 9, 57))


def recipe(*overrides):
    few = ("batch_size=1", "masks=true", "workers=0", "input.min_size_train=[80]")
    return configs.load("coco_keypoints_r50_fpn_2x", "detect", DetectConfig, (*few, *overrides))


def bitmap(box):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    left, top, right, bottom = box
    mask[top:bottom, left:right] = 1
    mask[top:bottom:3, left:right:2] = 0
    return mask


def sample(path, masks=None):
    """Three objects with an image of noise: a triangle, two polygons, and one that reaches beyond the image."""
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    rows = [((10, 5, 40, 30), 0, False, False), ((20, 20.5, 83, 57), 1, False, False), ((0, 0, 9, 57), 2, False, False)]
    polygons = (
        [np.array([10.0, 5, 40, 5, 25, 30])],
        [np.array([20.0, 20.5, 83, 21, 50, 57]), np.array([60.0, 40, 70, 40, 70, 50, 60, 50])],
        [np.array([-1.0, 0, 9, 0, 9, 57])],
    )
    points = np.array(
        [
            [[12.5, 6.5, 2], [20.5, 7.5, 1], [30.5, 8.5, 2]],
            [[83, 57, 2], [84.5, 30.5, 2], [40.5, 30.5, 0]],
            [[0, 0, 1], [-0.5, 3.5, 2], [0, 0, 0]],
        ]
    )
    return make_sample(path.name, path, (WIDTH, HEIGHT), rows, polygons if masks is None else masks, points)


def drawn(one, *overrides):
    images, targets = next(inputs.training_batches([one], recipe(*overrides), 0, 1, pairs=PAIRS))
    return images[0], targets[0]


# Targets


def test_a_view_twice_as_large_and_flipped():
    view = View((10, 8), (20, 16), True)
    assert view.boxes(np.array([[1.0, 2, 4, 5], [8, -1, 12, 9]])).tolist() == [[12, 4, 18, 10], [0, 0, 4, 16]]
    assert view.mask([[1.0, 2, 4, 2, 4, 5]])[0].tolist() == [18, 4, 12, 4, 12, 10]
    given = np.array([[[1.0, 2, 2], [3, 4, 1], [9, 8.5, 2], [10, 8, 2], [5, 5, 0]]])
    points = view.keypoints(given, ((0, 1),))
    assert points.tolist() == [[[14, 8, 1], [18, 4, 2], [0, 0, 0], [0, 16, 2], [0, 0, 0]]]
    as_it_is = View((10, 8), (10, 8), False).keypoints(given, ((0, 1),))
    assert np.array_equal(as_it_is[0, [0, 1, 3]], given[0, [0, 1, 3]])


def test_flipped_twice_is_the_identity():
    random, view = np.random.default_rng(0), View((30, 20), (30, 20), True)
    low = random.uniform(0, 10, (5, 2))
    boxes, points = np.hstack((low, low + 5)), np.dstack((random.uniform(0, 20, (5, 4, 2)), np.full((5, 4, 1), 2)))
    polygon, code = [random.uniform(0, 20, 12)], encoded(random.random((20, 30)) > 0.5)
    image = Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    np.testing.assert_allclose(view.boxes(view.boxes(boxes)), boxes)
    np.testing.assert_allclose(view.keypoints(view.keypoints(points, PAIRS), PAIRS), points)
    np.testing.assert_allclose(view.mask(view.mask(polygon))[0], polygon[0])
    assert np.array_equal(view.mask(encoded(view.mask(code))), decoded(code))
    assert np.array_equal(view.pixels(image).flip(2).permute(1, 2, 0), np.asarray(image))


def test_a_bitmap_and_its_image_stay_together():
    """White where the mask is: after resizing by a whole number and flipping it still is."""
    mask = bitmap((10, 5, 40, 30))
    view = View((WIDTH, HEIGHT), (3 * WIDTH, 3 * HEIGHT), True)
    image = Image.fromarray(np.repeat(mask[..., None] * 255, 3, axis=2))
    moved = view.mask(encoded(mask))
    assert np.array_equal(moved, np.kron(mask, np.ones((3, 3), np.uint8))[:, ::-1])
    middles = view.pixels(image)[0, 1::3, 1::3] > 127
    assert np.array_equal(middles, moved[1::3, 1::3])
    one_in_four = np.kron(np.ones((3, 2), np.uint8), np.array([[1, 1], [1, 0]], np.uint8))
    assert not View((4, 6), (2, 3), False).mask(encoded(one_in_four)).any()  # the nearest, no mean


def test_targets_hold_what_the_recipe_asks_for(tmp_path):
    one = sample(tmp_path / "a.png")
    _, target = drawn(one)
    assert target["boxes"].dtype == target["keypoints"].dtype == torch.float32
    assert [len(target[name]) for name in ("boxes", "labels", "masks", "keypoints")] == [3] * 4
    assert all(part.dtype == np.float64 for mask in target["masks"] for part in mask)
    assert drawn(one, "masks=false", "keypoints=false")[1].keys() == {"boxes", "labels"}


def test_masks_and_boxes_that_resizing_leaves_empty_go(tmp_path):
    point = np.zeros((HEIGHT, WIDTH), np.uint8)
    point[0, 0] = 1
    one = sample(tmp_path / "a.png", (encoded(point), encoded(bitmap((20, 21, 83, 57))), encoded(point)))
    _, target = drawn(one, "input.min_size_train=[20]")
    assert target["labels"].tolist() == [2]
    assert target["keypoints"].shape == (1, 3, 3) and len(target["masks"]) == 1
    beyond = replace(sample(tmp_path / "b.png"), boxes=np.array([[83.0, 0, 90, 57], [0, 0, 9, 9], [0, -9, 9, 0]]))
    assert drawn(beyond)[1]["labels"].tolist() == [2]


def test_an_image_of_another_size_is_refused_when_it_is_read(tmp_path):
    one = sample(tmp_path / "a.png")
    Image.new("RGB", (HEIGHT, WIDTH)).save(one.path)
    for read in (lambda: drawn(one), lambda: next(inputs.images_to_detect([one], recipe()))):
        with pytest.raises(InputError, match=r"a\.png is 57x83 and its annotation says 83x57"):
            read()


def test_objects_without_masks_and_images_without_keypoints_are_not_trained_on(tmp_path, capsys):
    whole = sample(tmp_path / "a.png")
    partly = sample(tmp_path / "b.png", (None, whole.masks[1], whole.masks[2]))
    nothing = sample(tmp_path / "c.png", ())
    unlabelled = sample(tmp_path / "d.png")
    unlabelled.keypoints[..., 2] = 0
    whole.crowd[2] = True
    kept = inputs.trainable([whole, partly, nothing], masks=True)
    assert [one.labels.tolist() for one in kept] == [[0, 1], [1, 2]]
    assert [len(one.masks) for one in kept] == [2, 2] and kept[1].masks[0] is whole.masks[1]
    assert np.array_equal(kept[1].keypoints, partly.keypoints[1:])
    assert "4 training objects without a mask are left out" in capsys.readouterr().err
    assert [one.image_id for one in inputs.trainable([whole, unlabelled], keypoints=True)] == ["a.png"]
    assert len(inputs.trainable([whole, partly, nothing, unlabelled])) == 4
    with pytest.raises(InputError, match=r"object with a mask.*--set masks=false,"):
        inputs.trainable([nothing], masks=True)
    with pytest.raises(InputError, match=r"with a labelled keypoint.*--set keypoints=false,"):
        inputs.trainable([unlabelled], keypoints=True)


def same_batches(ours, theirs):
    for (images, targets), (other_images, other_targets) in zip(ours, theirs, strict=True):
        assert all(torch.equal(*pair) for pair in zip(images, other_images, strict=True))
        for one, other in zip(targets, other_targets, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in ("boxes", "labels", "keypoints"))
            assert all(np.array_equal(*parts) for pair in zip(one["masks"], other["masks"]) for parts in zip(*pair))


@pytest.mark.parametrize("workers", [0, 2])
def test_shares_of_the_processes_are_the_batch_of_one_and_resuming_goes_on_with_it(tmp_path, workers):
    several = [sample(tmp_path / f"{number}.png") for number in range(5)]
    r = recipe("batch_size=4", f"workers={workers}", "input.min_size_train=[40,57,80]", "input.flip=0.5")
    whole = list(inputs.training_batches(several, r, 0, 3, pairs=PAIRS))
    shares = [inputs.training_batches(several, r, 0, 3, rank, 2, PAIRS) for rank in range(2)]
    together = [(one[0] + other[0], one[1] + other[1]) for one, other in zip(*shares, strict=True)]
    same_batches(together, whole)
    same_batches(list(inputs.training_batches(several, r, 2, 3, pairs=PAIRS)), whole[2:])
    shapes = [[image.shape for image in images] for images, _ in whole]
    assert any(len(set(places)) > 1 for places in shapes) and any(len(set(times)) > 1 for times in zip(*shapes))


def test_batches_are_drawn_as_they_are_needed(tmp_path, monkeypatch):
    taken = []
    every = inputs.batches
    monkeypatch.setattr(inputs, "batches", lambda *given: (taken.append(1) or batch for batch in every(*given)))
    next(inputs.training_batches([sample(tmp_path / "a.png")], recipe(), 2, 1000, pairs=PAIRS))
    assert len(taken) == 3


# On disk


def test_masks_and_keypoints_come_to_the_image_on_disk():
    result = {
        "boxes": torch.tensor([[120.0, 5, 130, 9], [10, 20, 30, 40]]),
        "scores": torch.tensor([0.9, 0.7]),
        "labels": torch.tensor([2, 1]),
        "masks": torch.stack((torch.zeros(28, 28), torch.ones(28, 28))),
        "keypoints": torch.tensor([[[0.0, 0, 0]], [[11, 21, 0.25]]]),
    }
    found = on_disk(result, (100, 200), (50, 400))
    wanted = np.zeros((400, 50), np.uint8)
    wanted[40:80, 5:15] = 1
    assert len(found.masks) == 1 and np.array_equal(decoded(found.masks[0]), wanted)
    assert found.labels.tolist() == [0] and found.scores.tolist() == pytest.approx([0.7])
    assert found.keypoints.tolist() == [[[5.0, 41.5, 0.25]]]  # half a pixel less than on the scale of the boxes


@pytest.mark.data
def test_the_truth_is_all_right(shared_data):
    """Real people, found where they are in images of other sizes: AP 100 of boxes, masks and keypoints."""
    data = read_coco_folder(shared_data / "coco-mini", None, None, False, keypoints=True)
    found = [on_disk(truth_of(one), (64, 48), one.size) for one in data.test]
    metrics, _ = evaluate(data, found)
    assert metrics["APbb"] == pytest.approx(100)
    assert metrics["APkp"] == pytest.approx(100)
    assert metrics["APmk"] > 98  # small ones lose a few pixels of their edges


def truth_of(one):
    """What a detector would say that sees the image as 64 x 48 pixels and is right; surer of people with keypoints."""
    view = View(one.size, (64, 48), False)
    labelled = (one.keypoints[..., 2] > 0).any(axis=1)
    chosen = np.array([*np.flatnonzero(~one.crowd & labelled), *np.flatnonzero(~one.crowd & ~labelled)], int)
    boxes = torch.from_numpy(view.boxes(one.boxes[chosen]))
    masks = [view.mask(one.masks[number]) for number in chosen]
    return {
        "boxes": boxes,
        "scores": 0.5 + 0.5 * torch.from_numpy(labelled[chosen]),
        "labels": torch.from_numpy(one.labels[chosen] + 1),
        "masks": mask_targets(masks, boxes, 112).float(),
        "keypoints": torch.from_numpy(view.keypoints(one.keypoints[chosen], ())),
    }


# Against detectron2


@pytest.mark.detectron2
@pytest.mark.parametrize("flip", [0, 1])
@pytest.mark.parametrize("shorter", [40, 57, 133])
@pytest.mark.parametrize("masks", ["polygon", "bitmask"])
def test_images_and_targets_are_detectron2s(tmp_path, flip, shorter, masks):
    pytest.importorskip("detectron2")
    from detectron2.data import DatasetMapper
    from detectron2.data import transforms as T

    codes = tuple(encoded(bitmap(place)) for place in PLACES)
    one = sample(tmp_path / "a.png", None if masks == "polygon" else codes)
    mapper = DatasetMapper(
        is_train=True,
        augmentations=[T.ResizeShortestEdge([shorter], 1333, "choice"), T.RandomFlip(prob=float(flip))],
        image_format="RGB",
        use_instance_mask=True,
        use_keypoint=True,
        instance_mask_format=masks,
        keypoint_hflip_indices=np.array([0, 2, 1]),
    )
    wanted = mapper(in_their_form(one))
    pixels, target = drawn(one, f"input.min_size_train=[{shorter}]", f"input.flip={flip}")
    assert torch.equal(pixels, wanted["image"])
    same_targets(target, wanted["instances"])


@pytest.mark.data
@pytest.mark.detectron2
def test_real_people_are_detectron2s_too(shared_data):
    """From the json on: polygons that it drops, crowd regions and the half pixel of keypoints."""
    pytest.importorskip("detectron2")
    from detectron2.data import DatasetMapper
    from detectron2.data import transforms as T
    from detectron2.data.datasets import load_coco_json

    folder = shared_data / "coco-mini"
    data = read_coco_folder(folder, None, None, False, keypoints=True)
    people = str(folder / "annotations/person_keypoints_train2017.json")
    entries = load_coco_json(people, str(folder / "train2017"), "people")  # with a name, classes count from 0
    order = {entry["image_id"]: entry for entry in entries}
    swapped = np.arange(17)
    for left, right in data.keypoint_pairs:
        swapped[[left, right]] = right, left
    mapper = DatasetMapper(
        is_train=True,
        augmentations=[T.ResizeShortestEdge([80], 1333, "choice"), T.RandomFlip(prob=1.0)],
        image_format="RGB",
        use_instance_mask=True,
        use_keypoint=True,
        keypoint_hflip_indices=swapped,
    )
    usable = inputs.trainable(data.train, masks=True, keypoints=True)
    assert len(usable) > 5
    for one in usable:
        wanted = mapper(order[one.image_id])
        images, targets = next(inputs.training_batches([one], recipe("input.flip=1"), 0, 1, pairs=data.keypoint_pairs))
        assert torch.equal(images[0], wanted["image"])
        same_targets(targets[0], wanted["instances"], 1e-4)  # it reads a json's boxes in single precision


def same_targets(target, instances, tolerance=0.0):
    torch.testing.assert_close(target["boxes"], instances.gt_boxes.tensor, rtol=0, atol=tolerance)
    assert torch.equal(target["labels"] - 1, instances.gt_classes)
    assert torch.equal(target["keypoints"], instances.gt_keypoints.tensor)
    if hasattr(instances.gt_masks, "polygons"):
        for ours, theirs in zip(target["masks"], instances.gt_masks.polygons, strict=True):
            assert all(np.array_equal(*parts) for parts in zip(ours, theirs, strict=True))
    else:
        assert np.array_equal(np.stack(target["masks"]), instances.gt_masks.tensor.numpy())


def in_their_form(one):
    from detectron2.structures import BoxMode

    return {
        "file_name": str(one.path),
        "width": WIDTH,
        "height": HEIGHT,
        "annotations": [
            {
                "bbox": box.tolist(),
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": int(label),
                "segmentation": mask,
                "keypoints": points.reshape(-1).tolist(),
            }
            for box, label, mask, points in zip(one.boxes, one.labels, one.masks, one.keypoints)
        ],
    }
