"""Masks and keypoints of regions by closed forms, and against a real detectron2."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch.nn import functional as F

from moco_eval.detection.keypoints import KeypointHead, heat_places, keypoint_loss, keypoints_of
from moco_eval.detection.masks import MaskHead, decoded, mask_loss, mask_targets, paste

SIDE = 28


def polygon(*numbers):
    return np.array(numbers, dtype=np.float64)


def random_boxes(random, count, extent=100):
    low = random.uniform(0, 0.6 * extent, (count, 2))
    return torch.from_numpy(np.hstack((low, low + random.uniform(0.01, 0.4 * extent, (count, 2))))).float()


def random_polygons(random, count):
    """One or two polygons of 3 to 8 points each, also beyond the image."""
    return [
        [random.uniform(-5, 105, 2 * random.integers(3, 9)) for _ in range(random.integers(1, 3))] for _ in range(count)
    ]


def smooth_masks(count):
    """Probabilities that are high about the middle, each on its own side of it."""
    torch.manual_seed(0)
    coarse = torch.rand(count, 1, 4, 4)
    coarse[:, :, 1:3, 1:3] = 0.9
    return F.interpolate(coarse, size=SIDE, mode="bilinear")[:, 0]


# Targets and losses


def test_target_of_a_square_that_fills_the_left_half_of_its_box():
    square = [polygon(10, 14, 20, 14, 20, 54, 10, 54)]
    bitmap = np.zeros((60, 60), np.uint8)
    bitmap[14:54, 10:20] = 1
    boxes = torch.tensor([[10.0, 14, 30, 54]] * 2)
    targets = mask_targets([square, bitmap], boxes, SIDE)
    wanted = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    wanted[:, : SIDE // 2] = True
    assert targets.dtype == torch.bool
    assert torch.equal(targets[1], wanted)
    assert torch.equal(targets[0], wanted)


@pytest.mark.parametrize("width, covered", [(2, 28), (0.25, 28), (0.05, 14)])
def test_a_box_below_a_tenth_of_a_pixel_counts_as_one(width, covered):
    square = [polygon(16, 14, 16 + width, 14, 16 + width, 54, 16, 54)]
    target = mask_targets([square], torch.tensor([[16.0, 14, 16 + width, 54]]), SIDE)[0]
    assert target[:, :covered].all() and not target[:, covered:].any()


def test_polygons_of_an_object_are_one_mask_and_what_lies_outside_the_box_is_cut():
    two = [polygon(0, 0, 10, 0, 10, 100, 0, 100), polygon(30, 0, 40, 0, 40, 100, 30, 100)]
    kept = [part.copy() for part in two]
    target = mask_targets([two], torch.tensor([[0.0, 40, 40, 60]]), 8)[0]
    assert target[:, [0, 1, 6, 7]].all() and not target[:, [3, 4]].any()
    assert all(np.array_equal(part, copy) for part, copy in zip(two, kept))


def test_mask_loss_is_of_the_own_class_alone():
    logits = torch.zeros(2, 3, 4, 4)
    logits[0, 1], logits[1, 2] = 100, -100
    targets = torch.stack((torch.ones(4, 4), torch.zeros(4, 4))).bool()
    assert mask_loss(logits, torch.tensor([1, 2]), targets) < 1e-40
    assert mask_loss(logits, torch.tensor([1, 2]), ~targets) == 100
    assert mask_loss(logits, torch.tensor([0, 0]), targets).item() == pytest.approx(np.log(2))


def test_keypoint_loss_counts_labelled_points_inside_their_boxes():
    boxes = torch.tensor([[0.0, 0, 8, 8]])
    points = torch.tensor([[[1.5, 2.5, 2], [8, 8, 1], [3, 3, 0], [9, 3, 2], [-1, 3, 2], [3, -1, 2]]])
    places, valid = heat_places(points, boxes, 4)
    assert places[0, :2].tolist() == [4, 15]
    assert valid.tolist() == [[True, True, False, False, False, False]]
    logits = torch.zeros(1, 6, 4, 4)
    assert keypoint_loss(logits, points, boxes).item() == pytest.approx(np.log(16))
    logits[0, 0, 1, 0] = 100
    assert keypoint_loss(logits, points, boxes).item() == pytest.approx(np.log(16) / 2)


def test_without_regions_losses_are_zero_and_every_weight_has_its_gradient():
    mask_head, keypoint_head = MaskHead(4, 2, 1, dim=3), KeypointHead(4, 2)
    features, boxes = torch.zeros(0, 4, 3, 3), torch.zeros(0, 4)
    loss = mask_loss(mask_head(features), torch.zeros(0).long(), mask_targets([], boxes, 6))
    loss = loss + keypoint_loss(keypoint_head(features), torch.zeros(0, 2, 3), boxes)
    loss.backward()
    assert loss == 0
    assert all(weight.grad is not None for head in (mask_head, keypoint_head) for weight in head.parameters())
    assert paste(torch.zeros(0, 6, 6), boxes, (9, 9)) == []
    assert keypoints_of(torch.zeros(0, 2, 12, 12), boxes).shape == (0, 2, 3)


# Heads


def test_heads_sizes_and_first_weights():
    torch.manual_seed(0)
    mask_head, keypoint_head = MaskHead(64, 5, 2), KeypointHead(64, 3)
    assert mask_head(torch.zeros(1, 64, 7, 7)).shape == (1, 5, 14, 14)
    assert keypoint_head(torch.zeros(1, 64, 7, 7)).shape == (1, 3, 28, 28)
    assert mask_head.predictor.weight.std().item() == pytest.approx(0.001, rel=0.1)
    assert mask_head.mask_fcn2.weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.05)
    assert mask_head.deconv.weight.std().item() == pytest.approx((2 / (4 * 256)) ** 0.5, rel=0.05)
    assert keypoint_head.conv_fcn1.weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.05)
    biases = [value for name, value in (*mask_head.named_parameters(), *keypoint_head.named_parameters())]
    assert all(not value.any() for value in biases if value.ndim == 1)


@pytest.mark.parametrize("head", [MaskHead(4, 2, 1, dim=3), KeypointHead(4, 2)])
def test_logits_are_in_single_precision_also_in_bf16(head):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(torch.randn(1, 4, 3, 3)).dtype == torch.float32


# Pasting and decoding


def test_a_pasted_disc_is_a_disc_and_equals_the_whole_image_result():
    middles = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    disc = (middles[:, None] ** 2 + middles**2).sqrt().sub(0.8).mul(-8).sigmoid()
    boxes = torch.tensor([[10.3, 20.2, 60.3, 70.2], [-5.0, -5, 12.5, 20], [70, 60, 90, 80]])
    codes = paste(disc.expand(3, -1, -1), boxes, (90, 80))
    assert all(code["size"] == [80, 90] and isinstance(code["counts"], str) for code in codes)
    y, x = np.mgrid[:80, :90] + 0.5
    wanted = (x - 35.3) ** 2 + (y - 45.2) ** 2 <= (0.8 * 25) ** 2
    assert (decoded(codes[0]) != wanted).mean() < 0.002
    for code, box in zip(codes, boxes):
        assert np.array_equal(decoded(code), whole_image(disc, box, 90, 80))


def whole_image(mask, box, width, height):
    """Every pixel of the image looked up in the mask."""
    x = ((torch.arange(width) + 0.5) - box[0]) / (box[2] - box[0]) * 2 - 1
    y = ((torch.arange(height) + 0.5) - box[1]) / (box[3] - box[1]) * 2 - 1
    grid = torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)), dim=2)
    return (F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0] >= 0.5).byte().numpy()


def test_a_full_mask_fills_its_box_and_nothing_else():
    """A pixel whose middle lies on the edge belongs to it: half of one, half of nothing."""
    boxes = torch.tensor([[3.0, 4, 7, 9], [3.5, 4, 6.5, 9], [3.6, 4, 6.4, 9]])
    codes = paste(torch.ones(3, SIDE, SIDE), boxes, (12, 10))
    for code, (first, last) in zip(codes, ((3, 7), (3, 7), (4, 6)), strict=True):
        wanted = np.zeros((10, 12), np.uint8)
        wanted[4:9, first:last] = 1
        assert np.array_equal(decoded(code), wanted)


def test_uncompressed_codes_are_decoded_too():
    assert decoded({"size": [2, 3], "counts": [1, 2, 3]}).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_a_peak_comes_back_where_it_was_put():
    boxes = torch.tensor([[10.0, 20, 66, 132], [0.5, 0.5, 0.9, 0.7], [0, 0, 55.5, 55.25]])
    y, x = torch.meshgrid(torch.arange(56.0), torch.arange(56.0), indexing="ij")
    hill = -((x - 20) ** 2 + (y - 10) ** 2) / 8
    found = keypoints_of(hill.expand(3, 1, -1, -1), boxes)
    # The box is as wide as the map and twice as high: the middle of cell 10 is an edge between pixels 20 and 21.
    assert found[0, 0, 0] == 10 + 20.5
    assert abs(found[0, 0, 1] - (20 + 10.5 * 2)) == 0.5
    assert found[0, 0, 2].item() == pytest.approx(1 / (8 * np.pi), rel=0.05)
    assert found[1, 0, :2].tolist() == [1, 1]  # a box below a pixel counts as one
    assert found[2, 0, :2].tolist() == pytest.approx([20.5 * 55.5 / 56, 10.5 * 55.25 / 56])  # 56 pixels, a bit smaller


# Against detectron2


@pytest.mark.detectron2
def test_targets_are_detectron2s_bit_for_bit():
    structures = pytest.importorskip("detectron2.structures")
    random = np.random.default_rng(0)
    boxes, polygons = random_boxes(random, 200), random_polygons(random, 200)
    ours = mask_targets(polygons, boxes, SIDE)
    assert torch.equal(ours, structures.PolygonMasks(polygons).crop_and_resize(boxes, SIDE))
    assert 0.1 < ours.float().mean() < 0.9
    bitmaps = random.random((30, 90, 100)) > 0.5
    wanted = structures.BitMasks(torch.from_numpy(bitmaps)).crop_and_resize(boxes[:30], SIDE)
    assert torch.equal(mask_targets(list(bitmaps.astype(np.uint8)), boxes[:30], SIDE), wanted)
    points = torch.from_numpy(random.uniform(0, 100, (200, 5, 3))).float()
    points[:, :, 2] = torch.from_numpy(random.integers(0, 3, (200, 5))).float()
    points[:, 0, 0], points[:, 1, 1] = boxes[:, 2], boxes[:, 3]
    places, valid = structures.Keypoints(points).to_heatmap(boxes, 56)
    ours, inside = heat_places(points, boxes, 56)
    assert torch.equal(ours, places) and torch.equal(inside.long(), valid) and inside.sum() > 20


@pytest.mark.detectron2
def test_pasted_masks_and_decoded_keypoints_are_detectron2s():
    pytest.importorskip("detectron2")
    from detectron2.layers import paste_masks_in_image
    from detectron2.structures.keypoints import heatmaps_to_keypoints

    boxes, masks = random_boxes(np.random.default_rng(1), 100, extent=110).clamp(max=100), smooth_masks(100)
    wanted = paste_masks_in_image(masks, boxes, (100, 100)).numpy()
    ours = coco_mask.decode(paste(masks, boxes, (100, 100))).transpose(2, 0, 1)
    assert (ours == wanted).mean() >= 0.999
    assert wanted.mean() > 0.01
    logits = 3 * torch.randn(20, 4, 56, 56)
    wanted = heatmaps_to_keypoints(logits, boxes[:20])[:, :, [0, 1, 3]]
    found = keypoints_of(logits, boxes[:20])
    assert torch.equal(found[..., :2], wanted[..., :2])
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


@pytest.mark.detectron2
@pytest.mark.parametrize("convs", [0, 4])
def test_mask_head_and_loss_are_detectron2s(convs):
    pytest.importorskip("detectron2")
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead, mask_rcnn_loss
    from detectron2.structures import Boxes, Instances, PolygonMasks

    torch.manual_seed(0)
    theirs = MaskRCNNConvUpsampleHead(ShapeSpec(channels=16), num_classes=3, conv_dims=[32] * (convs + 1))
    ours = MaskHead(16, 3, convs, dim=32)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    features = torch.randn(6, 16, 14, 14)
    logits = theirs.layers(features)
    torch.testing.assert_close(ours(features), logits, rtol=1e-5, atol=1e-7)
    random = np.random.default_rng(2)
    boxes, polygons, labels = random_boxes(random, 6), random_polygons(random, 6), torch.tensor([0, 1, 2, 2, 1, 0])
    regions = Instances((100, 100), proposal_boxes=Boxes(boxes), gt_classes=labels, gt_masks=PolygonMasks(polygons))
    wanted = storing(mask_rcnn_loss, 1000 * logits, [regions])
    loss = mask_loss(1000 * logits, labels, mask_targets(polygons, boxes, SIDE))
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.detectron2
def test_keypoint_head_and_loss_are_detectron2s():
    pytest.importorskip("detectron2")
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.roi_heads.keypoint_head import KRCNNConvDeconvUpsampleHead, keypoint_rcnn_loss
    from detectron2.structures import Boxes, Instances, Keypoints

    torch.manual_seed(0)
    theirs = KRCNNConvDeconvUpsampleHead(ShapeSpec(channels=16), num_keypoints=3, conv_dims=[512] * 8)
    ours = KeypointHead(16, 3)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    features = torch.randn(4, 16, 7, 7)
    logits = theirs.layers(features)
    torch.testing.assert_close(ours(features), logits, rtol=1e-5, atol=1e-6)
    boxes = random_boxes(np.random.default_rng(3), 4)
    points = torch.cat((boxes[:, None, :2] + torch.rand(4, 3, 2) * 15, torch.ones(4, 3, 1)), dim=2)
    points[0, 0, 2] = 0
    regions = Instances((100, 100), proposal_boxes=Boxes(boxes), gt_keypoints=Keypoints(points))
    wanted = storing(keypoint_rcnn_loss, logits, [regions], normalizer=None)
    assert keypoint_loss(logits, points, boxes).item() == pytest.approx(wanted.item(), rel=1e-6)


def storing(loss, *arguments, **options):
    """Their losses write to a storage of events."""
    from detectron2.utils.events import EventStorage

    with EventStorage():
        return loss(*arguments, **options)
