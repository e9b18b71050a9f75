"""The detector's parts by closed forms and naive references; test_detectron2_parity.py holds them to detectron2."""

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import box_iou

from moco_eval.config import load as configs
from moco_eval.config.detection import DetectConfig
from moco_eval.detection import matching, proposals, regions
from moco_eval.detection.backbones import Pyramid
from moco_eval.detection.detector import build_detector
from moco_eval.detection.detector_names import detector_from_detectron2, detector_to_detectron2
from moco_eval.encoders.architectures import architecture, build_backbone
from moco_eval.encoders.encoder import Encoder
from moco_eval.errors import InputError
from moco_eval.preprocessing import Preprocessing

RECIPES = {
    "r50_c4": ("r50_c4_24k", "roi.pool_size=4"),
    "r50_dc5": ("r50_dc5_24k",),
    "r50_fpn": ("coco_r50_fpn_1x", "masks=false"),
}
FEW = ("roi.batch_per_image=8", "rpn.post_nms_train=20", "rpn.post_nms_test=10")


def encoder(arch="resnet50_quarter", **options):
    torch.manual_seed(0)
    net = build_backbone(arch, fork=False)
    width, count = architecture(arch).feature_dim, len(net.state_dict())
    return Encoder("random", "random", arch, net, width, None, "random", "0" * 64, count, **options)


def recipe(model="r50_c4", *overrides):
    name, *more = RECIPES[model]
    return configs.load(name, "detect", DetectConfig, (*FEW, *more, *overrides))


@pytest.fixture(scope="module")
def detectors():
    return {model: build_detector(encoder(), 3, recipe(model)) for model in RECIPES}


@pytest.fixture(params=RECIPES)
def detector(request, detectors):
    return detectors[request.param]


def images():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8) for size in ((70, 101), (64, 64))]


def targets():
    boxes = [[[5.0, 5, 60, 60], [30, 20, 100, 70]], [[10.0, 10, 50, 40]]]
    return [{"boxes": torch.tensor(b), "labels": torch.arange(len(b)) + 1} for b in boxes]


# Built of the encoder


@pytest.mark.parametrize("model", RECIPES)
@pytest.mark.parametrize("arch", ["resnet50_quarter", "resnet18_quarter"])
def test_every_tensor_of_the_encoder_is_in_the_detector(model, arch):
    ours = encoder(arch)
    model = build_detector(ours, 3, recipe(model))
    state, inside = ours.backbone.state_dict(), model.encoder_tensors()
    assert inside.keys() == state.keys()
    assert all(torch.equal(inside[name], tensor) for name, tensor in state.items())
    own = {tensor.data_ptr() for tensor in ours.backbone.state_dict().values()}
    assert not own & {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert all(weight.requires_grad for weight in model.parameters())


def test_what_is_new_is_drawn_by_the_seed_as_detectron2_draws_it(detectors):
    c4, fpn = detectors["r50_c4"], detectors["r50_fpn"]
    for name, std in (("class_logits", 0.01), ("box_deltas", 0.001)):
        layer = getattr(fpn.heads, name)
        assert layer.weight.std().item() == pytest.approx(std, rel=0.1) and not layer.bias.any()
    assert c4.rpn.conv.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert (c4.heads.box_head.norm.weight == 1).all() and not c4.heads.box_head.norm.bias.any()
    lateral = fpn.backbone.lateral[0].conv.weight  # uniform, variance 1 over 64 inputs
    assert lateral.abs().max() <= math.sqrt(3 / 64)
    assert lateral.var().item() == pytest.approx(1 / 64, rel=0.05)
    assert fpn.heads.box_head.fc2.weight.var().item() == pytest.approx(1 / 1024, rel=0.05)
    again = build_detector(encoder(), 3, recipe("r50_fpn")).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in fpn.state_dict().items())
    other = build_detector(encoder(), 3, recipe("r50_fpn", "seed=1")).state_dict()
    assert not torch.equal(other["rpn.conv.weight"], again["rpn.conv.weight"])


def test_layer4_of_dilated_c5_keeps_the_stride_and_dilates_every_3x3_convolution(detectors):
    body = detectors["r50_dc5"].backbone.body
    convs = {name: m for name, m in body.layer4.named_modules() if isinstance(m, nn.Conv2d)}
    assert {conv.stride for conv in convs.values()} == {(1, 1)}
    assert {name: conv.dilation[0] for name, conv in convs.items() if conv.kernel_size == (3, 3)} == {
        f"{block}.conv2": 2 for block in range(3)
    }
    assert body(torch.zeros(1, 3, 70, 101)).shape == (1, 512, 5, 7)


@torch.no_grad()
def test_maps_have_their_strides_and_widths(detector):
    batch, sizes = detector.batch(images())
    assert sizes == [(70, 101), (64, 64)]
    assert batch.shape == ((2, 3, 96, 128) if isinstance(detector.backbone, Pyramid) else (2, 3, 70, 101))
    maps = detector.backbone(batch)
    for level, stride in zip(maps, detector.backbone.strides, strict=True):
        assert level.shape[:2] == (2, detector.backbone.channels)
        assert level.shape[2:] == tuple(math.ceil(side / stride) for side in batch.shape[2:])


@torch.no_grad()
def test_a_coarse_level_reaches_all_finer_ones(detectors):
    pyramid = detectors["r50_fpn"].backbone.eval()
    before = pyramid(torch.ones(1, 3, 64, 64))
    bias = pyramid.lateral[3].norm.bias
    bias += 1
    after = pyramid(torch.ones(1, 3, 64, 64))
    bias -= 1
    assert all(not torch.equal(old, new) for old, new in zip(before, after))
    assert torch.equal(after[4], after[3][:, :, ::2, ::2])


def test_pixels_are_normalised_in_the_encoders_order_and_padded_with_zeros():
    pixels = Preprocessing(mean=(10, 20, 30), std=(1, 2, 4), channels="BGR", range=255)
    batch, _ = build_detector(encoder(preprocessing=pixels), 3, recipe()).batch(images())
    red, green, blue = images()[1].float()
    torch.testing.assert_close(batch[1, :, :64, :64], torch.stack((blue - 10, (green - 20) / 2, (red - 30) / 4)))
    assert not batch[1, :, 64:].any() and not batch[1, :, :, 64:].any()


# Names


def test_names_go_to_detectron2_and_come_back(detector):
    state = detector.state_dict()
    theirs = detector_to_detectron2(state)
    assert len(theirs) == len(state)
    back = detector_from_detectron2(theirs)
    assert back.keys() == state.keys() and all(back[name] is tensor for name, tensor in state.items())


def test_a_tensor_of_another_detector_is_refused():
    with pytest.raises(InputError, match=r"head\.cls_score\.weight"):
        detector_from_detectron2({"head.cls_score.weight": torch.zeros(1)})


# Boxes against boxes


def boxes_at_random(count, seed):
    corners = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) * 100
    return torch.cat((corners, corners + 1 + corners.flip(0) / 2), dim=1)


def test_a_box_answers_for_the_object_it_overlaps_most():
    objects = torch.tensor([[0.0, 0, 10, 10], [100, 100, 110, 110]])
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 2.9], [100, 100, 200, 110], [0, 0, 10, 4]])
    matched, kind = matching.match(objects, boxes, 0.3, 0.5)
    assert matched.tolist() == [0, 0, 0, 1, 0]
    assert kind.tolist() == [1, 1, 0, 0, -1]  # IoU 1, 0.5, 0.29, 0.1, 0.4
    assert matching.match(objects, boxes, 0.3, 0.5, closest=True)[1].tolist() == [1, 1, 0, 1, -1]
    assert [values.tolist() for values in matching.match(objects[:0], boxes, 0.3, 0.5)] == [[0] * 5] * 2


def test_samples_are_of_both_kinds_and_fill_up_with_background():
    kind = torch.tensor([1] * 10 + [0] * 20 + [-1] * 5)
    foreground, background = matching.sample(kind, 16, 0.25)
    assert len(foreground) == 4 and (kind[foreground] == 1).all() and foreground.unique().numel() == 4
    assert len(background) == 12 and (kind[background] == 0).all() and background.unique().numel() == 12
    assert [len(places) for places in matching.sample(kind[8:], 16, 0.25)] == [2, 14]
    assert [len(places) for places in matching.sample(kind, 100, 0.5)] == [10, 20]


def test_boxes_are_coded_and_come_back():
    boxes, wanted = boxes_at_random(50, 0), boxes_at_random(50, 1)
    deltas = matching.encode(wanted, boxes, (10, 10, 5, 5))
    torch.testing.assert_close(matching.decode(deltas, boxes, (10, 10, 5, 5)), wanted, rtol=1e-4, atol=1e-3)
    (shifted,) = matching.encode(torch.tensor([[5.0, 0, 25, 10]]), torch.tensor([[0.0, 0, 10, 10]]))
    assert shifted.tolist() == pytest.approx([1, 0, math.log(2), 0])
    grown = matching.decode(torch.full((1, 4), 100.0), torch.tensor([[0.0, 0, 16, 16]]))
    assert (grown[0, 2:] - grown[0, :2]).tolist() == pytest.approx([1000, 1000], rel=1e-4)


# Proposals


def test_anchors_are_unrounded_and_sizes_come_first():
    cells = proposals.cell_anchors((32, 64), (0.5, 1.0, 2.0))
    half = 32 * 2**0.5 / 2
    np.testing.assert_allclose(cells[0], [-half, -half / 2, half, half / 2], rtol=1e-6)
    assert cells[4].tolist() == [-32, -32, 32, 32]
    grid = proposals.anchors_on(cells, 16, 3, 4).reshape(3, 4, 6, 4)
    np.testing.assert_allclose(grid[2, 3, 4] - cells[4], [48, 32, 48, 32])


def test_a_pyramid_has_one_size_of_anchor_on_each_level(detectors):
    rpn = detectors["r50_fpn"].rpn
    sides = [cells[1, 2].item() - cells[1, 0].item() for cells in rpn.cells]
    assert sides == [32, 64, 128, 256, 512]
    assert rpn.logits.out_channels == 3 and detectors["r50_c4"].rpn.logits.out_channels == 15


def test_predictions_lie_in_the_order_of_their_anchors(detectors):
    rpn = detectors["r50_c4"].rpn
    x = torch.randn(1, 256, 3, 4)
    logits, deltas = rpn.predict(x)
    hidden = rpn.conv(x).relu()
    place = (2 * 4 + 1) * 15 + 7  # row 2, column 1, anchor 7
    torch.testing.assert_close(logits[0, place], rpn.logits(hidden)[0, 7, 2, 1])
    torch.testing.assert_close(deltas[0, place], rpn.deltas(hidden)[0, 28:32, 2, 1])


def test_proposal_losses_are_over_what_was_asked_for():
    network = build_detector(encoder("resnet18_quarter"), 3, recipe("r50_c4", "rpn.batch_per_image=8")).rpn
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60], [50, 0, 60, 10], [0, 0, 10, 5]])
    target = {"boxes": torch.tensor([[0.0, 0, 10, 10]])}  # IoU 1, 0.9, 0, 0, and 0.5, which is neither
    losses = network.losses(anchors, torch.zeros(2, 5), torch.full((2, 5, 4), 3.0), [target, target])
    assert losses["loss_rpn_cls"].item() == pytest.approx(2 * 4 * math.log(2) / 16)
    wanted = matching.encode(target["boxes"].expand(2, -1), anchors[:2])
    assert losses["loss_rpn_loc"].item() == pytest.approx(2 * (3 - wanted).abs().sum().item() / 16)


def naive_proposals(rpn, anchors, logits, deltas, size):
    """One image, written as it is defined: top by logit per level, cut, drop the empty, NMS per level, top by logit."""
    height, width = size
    left = []
    for level, (grid, logit, delta) in enumerate(zip(anchors, logits, deltas)):
        order = sorted(range(len(logit)), key=lambda place: -logit[place].item())[: rpn.rpn.pre_nms_test]
        boxes = matching.decode(delta, grid)
        kept = []
        for place in order:
            x0, y0, x1, y1 = boxes[place].tolist()
            box = (min(max(x0, 0), width), min(max(y0, 0), height), min(max(x1, 0), width), min(max(y1, 0), height))
            if box[2] <= box[0] or box[3] <= box[1]:
                continue
            box = torch.tensor([box])
            if all(box_iou(box, other).item() <= rpn.rpn.nms for other in kept):
                kept.append(box)
                left.append((-logit[place].item(), level, box))
    left.sort(key=lambda entry: entry[0])
    return torch.cat([box for *_, box in left[: rpn.rpn.post_nms_test]])


@pytest.mark.parametrize("model", ["r50_c4", "r50_fpn"])
def test_proposals_are_the_naive_ones(detectors, model):
    rpn = copy.deepcopy(detectors[model].rpn).eval()
    rpn.rpn = rpn.rpn.model_copy(update={"pre_nms_test": 60, "post_nms_test": 40})
    generator = torch.Generator().manual_seed(0)
    anchors = [
        proposals.anchors_on(cells, stride, math.ceil(48 / stride), math.ceil(64 / stride))
        for cells, stride in zip(rpn.cells, rpn.strides)
    ]
    logits = [torch.randn(2, len(grid), generator=generator) for grid in anchors]
    deltas = [torch.randn(2, len(grid), 4, generator=generator) for grid in anchors]
    sizes = [(48, 64), (40, 30)]
    for number, found in enumerate(rpn._propose(anchors, logits, deltas, sizes)):
        wanted = naive_proposals(rpn, anchors, [x[number] for x in logits], [x[number] for x in deltas], sizes[number])
        torch.testing.assert_close(found, wanted)
        assert len(found) > 5


# Regions


def test_regions_are_cut_from_the_level_of_their_size():
    sides = torch.tensor([1.0, 111, 113, 223, 225, 447, 449, 2000])
    boxes = torch.cat((torch.zeros(8, 2), sides[:, None].expand(-1, 2)), dim=1)
    assert regions.level_of(boxes, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert regions.level_of(torch.tensor([[0.0, 0, 112, 448]]), 4).tolist() == [2]  # by the square root of the area


def test_pooling_reads_the_middle_of_each_bin():
    """On a map whose value is its column, a bin's mean is its centre: pixels over stride, less half a pixel."""
    strides = (4, 8, 16, 32)
    maps = [1000 * level + torch.arange(1024.0 // s).expand(1, 1, 1024 // s, -1) for level, s in enumerate(strides)]
    boxes = torch.tensor([[100.0, 100, 164, 164], [200, 200, 350, 350], [100, 100, 400, 400], [100, 100, 700, 700]])
    pooled = regions.pool(maps, strides, [boxes], 7)
    for level, (box, stride) in enumerate(zip(boxes, strides)):
        bins = box[0] + (box[2] - box[0]) * (torch.arange(7) + 0.5) / 7
        torch.testing.assert_close(pooled[level, 0], (1000 * level + bins / stride - 0.5).expand(7, 7))
    torch.testing.assert_close(regions.pool(maps[:1], (4,), [boxes[:0], boxes[:1]][::-1], 7)[0], pooled[0])


def test_regions_of_an_image_hold_its_objects_and_count_classes_from_0(detectors):
    heads = detectors["r50_c4"].heads
    (target, _) = targets()
    far = torch.tensor([[0.0, 60, 4, 64]]).repeat(50, 1)
    drawn = heads.sample(far, target)
    assert len(drawn.boxes) == 8
    assert sorted(drawn.labels.tolist()) == [0, 1] + [3] * 6  # 3 classes: the background is 3
    assert torch.equal(drawn.boxes[:2], target["boxes"][drawn.matched[:2]])
    assert torch.equal(drawn.labels[:2], target["labels"][drawn.matched[:2]] - 1)
    assert (drawn.boxes[2:] == far[0]).all()


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_losses_of_regions_in_closed_form(beta):
    model = build_detector(encoder(), 3, recipe("r50_fpn", f"roi.box_beta={beta}"))
    for layer in (model.heads.class_logits, model.heads.box_deltas):
        nn.init.zeros_(layer.weight)
    box, moved = torch.tensor([[10.0, 10, 30, 30]]), torch.tensor([[10.0, 10, 30, 31]])
    drawn = regions.Regions(torch.cat((moved, box)), torch.tensor([1, 3]), torch.tensor([0, 0]))
    model.heads.sample = lambda proposals, target: drawn
    losses = model.train()(images()[:1], [{"boxes": box, "labels": torch.tensor([2])}])
    assert losses["loss_cls"].item() == pytest.approx(math.log(4))
    off = matching.encode(box, moved, (10, 10, 5, 5)).abs()
    each = torch.where(off < beta, 0.5 * off**2 / (beta or 1), off - 0.5 * beta)
    assert losses["loss_box_reg"].item() == pytest.approx(each.sum().item() / 2, rel=1e-5)


def test_every_weight_learns_and_the_same_seed_learns_the_same(detector):
    gradients = []
    for _ in range(2):
        detector.train().zero_grad()
        torch.manual_seed(0)
        losses = detector(images(), targets())
        assert losses.keys() == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
        sum(losses.values()).backward()
        gradients.append({name: weight.grad.clone() for name, weight in detector.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(gradient.any() for gradient in gradients[0].values())


def test_an_image_without_objects_trains_on_background_alone(detectors):
    model = detectors["r50_dc5"].train()
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    losses = model(images()[:1], [empty])
    assert losses["loss_box_reg"] == losses["loss_rpn_loc"] == 0
    assert losses["loss_cls"] > 0 and losses["loss_rpn_cls"] > 0


def test_bf16_leaves_boxes_and_losses_in_fp32(detector):
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector.train()(images(), targets())
        with torch.no_grad():
            found = detector.eval()(images())[0]
    assert {value.dtype for value in (*losses.values(), found["boxes"], found["scores"])} == {torch.float32}


# Detections


def test_detections_in_closed_form(detectors):
    heads = copy.deepcopy(detectors["r50_c4"].heads)
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [90, 90, 200, 200], [150, 0, 160, 10]])
    scores = torch.tensor(
        [[0.8, 0.1, 0, 0.1], [0.7, 0.2, 0, 0.1], [0.05, 0.06, 0, 0.89], [0, 0, 0.9, 0.1], [0, 0, 0.95, 0.05]]
    )
    found = heads._detect(boxes, scores, torch.zeros(5, 3, 4), (100, 100))
    # by score; the second box falls to the first in class 1 and the first to the second in class 2; 0.05 is not above
    # 0.05; the last lies outside and is empty
    assert found["labels"].tolist() == [3, 1, 2, 2]
    assert found["scores"].tolist() == pytest.approx([0.9, 0.8, 0.2, 0.06])
    assert found["boxes"].tolist() == [[90, 90, 100, 100], [0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]]
    heads.test = heads.test.model_copy(update={"detections": 2})
    assert len(heads._detect(boxes, scores, torch.zeros(5, 3, 4), (100, 100))["boxes"]) == 1  # the empty one counted


@torch.no_grad()
def test_detections_do_not_hang_on_the_rest_of_the_batch(detectors):
    model = detectors["r50_c4"].eval()
    alone = [model([image])[0] for image in images()[:1]]
    together = model([images()[0], images()[0][:, :64, :64]])
    for name in ("boxes", "scores", "labels"):
        torch.testing.assert_close(alone[0][name], together[0][name], rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_detections_lie_in_their_image_best_first(detector):
    for image, found in zip(images(), detector.eval()(images())):
        boxes, scores, labels = found["boxes"], found["scores"], found["labels"]
        assert len(boxes) > 0 and all(a >= b for a, b in pairwise(scores.tolist()))
        assert boxes.min() >= 0 and (boxes[:, 2] <= image.shape[2]).all() and (boxes[:, 3] <= image.shape[1]).all()
        assert set(labels.tolist()) <= {1, 2, 3}


# Masks and keypoints


def test_a_region_needs_a_labelled_keypoint_inside():
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(4, 1)
    points = torch.tensor(
        [[[5.0, 5, 2], [99, 99, 2]], [[5, 5, 0], [99, 99, 2]], [[10, 10, 1], [0, 0, 0]], [[10.1, 5, 2], [5, -1, 2]]]
    )
    assert regions.visible_inside(points, boxes).tolist() == [True, False, True, False]


EXTRA = {
    "r50_c4": (("coco_r50_c4_1x", "roi.pool_size=4"), "masks", (2 * 2, 2 * 2)),
    "r50_fpn": (("coco_r50_fpn_1x",), "masks", (28, 28)),
    "keypoints": (("coco_keypoints_r50_fpn_2x",), "keypoints", (5, 3)),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "keypoints" else []) for name in EXTRA]
)
def test_masks_and_keypoints_are_trained_and_found(name):
    (config_name, *more), kind, shape = EXTRA[name]
    model = build_detector(encoder(), 3, configs.load(config_name, "detect", DetectConfig, (*FEW, *more)), 5)
    wanted = targets()
    for target in wanted:
        left, top, right, bottom = target["boxes"].double().numpy().T
        target["masks"] = [[corners] for corners in np.stack((left, top, right, top, left, bottom), axis=1)]
        target["keypoints"] = torch.cat((target["boxes"][:, None, :2] + 1, torch.full((len(left), 1, 1), 2.0)), dim=2)
        target["keypoints"] = target["keypoints"].repeat(1, 5, 1)
    losses = model.train()(images(), wanted)
    assert losses[f"loss_{kind[:-1]}"] > 0
    sum(losses.values()).backward()
    assert all(weight.grad is not None for weight in model.parameters())
    with torch.no_grad():
        found = model.eval()(images())
        model.heads.test = model.heads.test.model_copy(update={"score": 0.99})
        nothing = model(images())
    assert all(image[kind].shape == (len(image["boxes"]), *shape) and len(image["boxes"]) > 0 for image in found)
    assert all(image[kind].shape == (0, *shape) for image in nothing)
