"""Our detectors against a real detectron2: the same weights, images and samples give the same numbers."""

import copy

import numpy as np
import pytest
import torch
from checkpoints import used

from moco_eval.config import load as configs
from moco_eval.config.detection import DetectConfig
from moco_eval.detection import matching, proposals, regions
from moco_eval.detection.detector import build_detector
from moco_eval.detection.detector_names import detector_from_detectron2, detector_to_detectron2
from moco_eval.detection.fine_tune import optimizer_for
from moco_eval.detection.masks import decoded
from moco_eval.detection.recipe import learning_rate
from moco_eval.detection.torchvision_engine import on_disk
from moco_eval.encoders.architectures import architecture, build_backbone
from moco_eval.encoders.encoder import Encoder

pytestmark = pytest.mark.detectron2
pytest.importorskip("detectron2", reason="detectron2 is not installed; build it from its source")

CLASSES = 3
SMALL = (
    *("roi.batch_per_image=32", "rpn.post_nms_train=100", "rpn.post_nms_test=50", "batch_size=2"),
    "test.detections=30",
    *("optimizer.lr=0.0025", "schedule.warmup=4"),
)
POINTS = 5
MODELS = {
    "c4": ("r50_c4_24k",),
    "dc5": ("r50_dc5_24k",),
    "fpn": ("coco_r50_fpn_1x", "masks=false"),
    "masks_c4": ("coco_r50_c4_1x",),
    "masks_fpn": ("coco_r50_fpn_1x",),
    "keypoints": ("coco_keypoints_r50_fpn_2x",),
}


def encoder(arch):
    torch.manual_seed(0)
    net = used(build_backbone(arch), 0)
    loaded = len(net.state_dict())
    return Encoder("random", "random", arch, net, architecture(arch).feature_dim, None, "random", "0" * 64, loaded)


def lively(model):
    """Norms that scale and shift, their statistics those of real maps, and predictors that tell places and classes."""
    torch.manual_seed(1)
    used(model, 0)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
        model.train()(images(), targets())
        for norm in norms:
            norm.momentum = 0.1
        model.heads.class_logits.weight *= 10
        model.heads.box_deltas.weight *= 10
        model.rpn.logits.weight *= 5
        if model.heads.mask_head is not None:
            model.heads.mask_head.predictor.weight *= 100
    return model


def pair(name, *overrides, arch="resnet50_quarter"):
    from detectron2.modeling import build_model

    from moco_eval.detection.detectron2_config import config_of

    recipe_name, *more = MODELS[name]
    recipe = configs.load(recipe_name, "detect", DetectConfig, (*SMALL, *more, *overrides))
    ours = lively(build_detector(encoder(arch), CLASSES, recipe, POINTS))
    cfg = config_of(recipe, encoder(arch), CLASSES, POINTS)
    theirs = build_model(cfg)
    theirs.load_state_dict(detector_to_detectron2(ours.state_dict()), strict=True)
    return recipe, ours, cfg, theirs


@pytest.fixture(scope="module", params=[name for name in MODELS if name != "fpn"])  # with masks it is the same and more
def engines(request):
    return pair(request.param)


def images():
    torch.manual_seed(2)
    coarse = [torch.rand(3, 12, 16), torch.rand(3, 16, 11)]
    sizes = [(231, 317), (203, 140)]
    return [
        (255 * torch.nn.functional.interpolate(image[None], size, mode="bilinear")[0]).byte()
        for image, size in zip(coarse, sizes)
    ]


def targets():
    boxes = [
        torch.tensor([[10.5, 20, 120, 160], [100, 50, 300.25, 220], [5, 5, 45, 35]]),
        torch.tensor([[20.0, 30, 100, 190]]),
    ]
    labels = [torch.tensor([1, 3, 2]), torch.tensor([2])]
    return [
        {"boxes": box, "labels": label, "masks": [diamond(each) for each in box], "keypoints": keypoints_in(box)}
        for box, label in zip(boxes, labels)
    ]


def diamond(box):
    """One polygon: the middles of a box's sides."""
    left, top, right, bottom = box.double().tolist()
    x, y = (left + right) / 2, (top + bottom) / 2
    return [np.array([x, top, right, y, x, bottom, left, y])]


def keypoints_in(boxes):
    """Points along a diagonal, the last of which lies outside; the third is not labelled."""
    part = torch.linspace(0.1, 1.3, POINTS)[None, :, None]
    places = boxes[:, None, :2] + part * (boxes[:, 2:] - boxes[:, :2])[:, None]
    seen = torch.tensor([2.0, 1, 0, 2, 2])[None, :, None].expand(len(boxes), -1, -1)
    return torch.cat((places, seen), dim=2)


def theirs_of(pixels, wanted=None):
    from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks

    inputs = [{"image": image, "height": image.shape[1], "width": image.shape[2]} for image in pixels]
    for entry, target in zip(inputs, wanted or ()):
        entry["instances"] = Instances(
            entry["image"].shape[1:],
            gt_boxes=Boxes(target["boxes"]),
            gt_classes=target["labels"] - 1,
            gt_masks=PolygonMasks(target["masks"]),
            gt_keypoints=Keypoints(target["keypoints"]),
        )
    return inputs


def close(ours, theirs, tolerance=1e-4):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * max(1, theirs.abs().max().item())


# Names


def test_every_tensor_has_a_name_on_the_other_side(engines):
    _, ours, _, theirs = engines
    state = theirs.state_dict()
    back = detector_from_detectron2(state)
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.state_dict().items())
    assert detector_to_detectron2(back).keys() == state.keys()


# Forward


@torch.no_grad()
def test_features_proposals_and_regions(engines):
    from detectron2.structures import Boxes

    _, ours, _, theirs = engines
    ours.eval(), theirs.eval()
    batch, sizes = ours.batch(images())
    prepared = theirs.preprocess_image(theirs_of(images()))
    assert batch.shape == prepared.tensor.shape and sizes == prepared.image_sizes
    maps, found = ours.backbone(batch), theirs.backbone(prepared.tensor)
    names = theirs.proposal_generator.in_features
    for level, name in zip(maps, names, strict=True):
        close(level, found[name])
    logits, deltas = theirs.proposal_generator.rpn_head([found[name] for name in names])
    for level, logit, delta in zip(maps, logits, deltas, strict=True):
        our_logits, our_deltas = ours.rpn.predict(level)
        close(our_logits, logit.permute(0, 2, 3, 1).flatten(1))
        close(our_deltas.flatten(1), delta.permute(0, 2, 3, 1).flatten(1))
    proposed, _ = ours.rpn(maps, sizes)
    wanted, _ = theirs.proposal_generator(prepared, found)
    for boxes, instances in zip(proposed, wanted, strict=True):
        assert (boxes - instances.proposal_boxes.tensor).abs().max() < 0.01
    heads = theirs.roi_heads
    boxes = [Boxes(image) for image in proposed]
    x, our_scores, our_boxes = ours.heads.predict(maps, proposed)
    if ours.heads.shared:
        vectors = heads._shared_roi_transform([found[name] for name in heads.in_features], boxes)
        close(x, vectors)
        scores, moves = heads.box_predictor(vectors.mean(dim=[2, 3]))
    else:
        pooled = heads.box_pooler([found[name] for name in heads.in_features], boxes)
        close(regions.pool(maps, ours.heads.strides, proposed, 7), pooled)
        scores, moves = heads.box_predictor(heads.box_head(pooled))
    close(our_scores, scores)
    close(our_boxes.flatten(1), moves)


@torch.no_grad()
def test_detections(engines):
    _, ours, _, theirs = engines
    ours.eval(), theirs.eval()
    found = ours(images())
    for image, instances in zip(found, theirs.inference(theirs_of(images()), do_postprocess=False), strict=True):
        assert len(instances) >= 10
        assert torch.equal(image["labels"] - 1, instances.pred_classes)
        assert (image["scores"] - instances.scores).abs().max() < 1e-4
        assert (image["boxes"] - instances.pred_boxes.tensor).abs().max() < 0.01
        assert len(image["labels"].unique()) > 1
        if instances.has("pred_masks"):
            close(image["masks"], instances.pred_masks[:, 0])
        if instances.has("pred_keypoints"):
            close(image["keypoints"][:, :, :2], instances.pred_keypoints[:, :, :2], 1e-3)


@torch.no_grad()
def test_detections_on_disk(engines):
    """Scaled to an image of another size, with the masks pasted into it."""
    recipe, ours, _, theirs = engines
    ours.eval(), theirs.eval()
    width, height = 250, 300
    given = [entry | {"width": width, "height": height} for entry in theirs_of(images())]
    for image, seen, wanted in zip(ours(images()), images(), theirs(given), strict=True):
        found, instances = on_disk(image, (seen.shape[2], seen.shape[1]), (width, height)), wanted["instances"]
        close(torch.from_numpy(found.boxes), instances.pred_boxes.tensor)
        if recipe.masks:
            masks = np.stack([decoded(code) for code in found.masks]).astype(bool)
            assert (masks == instances.pred_masks.numpy()).mean() >= 0.999
            assert (masks & instances.pred_masks.numpy()).sum() >= 0.999 * masks.sum() > 1000
        if recipe.keypoints:
            close(torch.from_numpy(found.keypoints[..., :2]) + 0.5, instances.pred_keypoints[..., :2], 1e-3)


# Training


def same_samples(ours, theirs, wanted):
    """Let ours train on the anchors and regions that detectron2 drew in the step before."""
    anchors, drawn = [], []
    subsample = theirs.proposal_generator._subsample_labels
    select = theirs.roi_heads.label_and_sample_proposals

    def keep_anchors(label):
        label = subsample(label)
        anchors.append((torch.where(label == 1)[0], torch.where(label == 0)[0]))
        return label

    def keep_regions(*arguments):
        found = select(*arguments)
        for instances, target in zip(found, wanted):
            same = (instances.gt_boxes.tensor[:, None] == target["boxes"]).all(dim=2)
            drawn.append(
                regions.Regions(
                    instances.proposal_boxes.tensor, instances.gt_classes, same.to(torch.uint8).argmax(dim=1)
                )
            )
        return found

    theirs.proposal_generator._subsample_labels = keep_anchors
    theirs.roi_heads.label_and_sample_proposals = keep_regions
    ours.rpn.sample = lambda kind: anchors.pop(0)
    ours.heads.sample = lambda boxes, target: drawn.pop(0)


def losses_of(ours, theirs):
    found = theirs(theirs_of(images(), targets()))  # first, for ours takes the samples it drew
    return ours(images(), targets()), found


def test_losses(engines):
    from detectron2.utils.events import EventStorage

    ours, theirs = copy.deepcopy(engines[1]).train(), copy.deepcopy(engines[3]).train()
    same_samples(ours, theirs, targets())
    with EventStorage(), torch.no_grad():
        mine, found = losses_of(ours, theirs)
    assert mine.keys() == found.keys()
    for name in found:
        assert found[name] > 1e-3
        assert mine[name].item() == pytest.approx(found[name].item(), rel=1e-4), name


def test_gradients_and_five_steps(engines):
    """Such a step multiplies an error of rounding a thousandfold: what agrees after five of them is the same sum."""
    from detectron2.solver import build_lr_scheduler, build_optimizer
    from detectron2.utils.events import EventStorage

    recipe, ours, cfg, theirs = engines[0], copy.deepcopy(engines[1]), engines[2], copy.deepcopy(engines[3])
    ours.train(), theirs.train()
    same_samples(ours, theirs, targets())
    our_sgd, their_sgd = optimizer_for(ours, recipe), build_optimizer(cfg, theirs)
    schedule = build_lr_scheduler(cfg, their_sgd)
    with EventStorage():
        for iteration in range(6):
            torch.manual_seed(iteration)
            losses = losses_of(ours, theirs)
            for name, value in losses[1].items():
                assert losses[0][name].item() == pytest.approx(value.item(), rel=1e-3), (iteration, name)
            for group in our_sgd.param_groups:
                group["lr"] = learning_rate(recipe, iteration)
            assert their_sgd.param_groups[0]["lr"] == pytest.approx(learning_rate(recipe, iteration))
            for optimizer, values in zip((our_sgd, their_sgd), losses):
                optimizer.zero_grad()
                sum(values.values()).backward()
            same_gradients(ours, theirs)
            our_sgd.step(), their_sgd.step(), schedule.step()
    before, trained = engines[1].state_dict(), detector_from_detectron2(theirs.state_dict())
    for name, tensor in ours.state_dict().items():
        moved = (tensor - before[name]).abs().max().item()
        assert moved > 0, name
        assert (tensor - trained[name]).abs().max() <= 1e-3 * moved, name


def same_gradients(ours, theirs):
    wanted = detector_from_detectron2({name: weight.grad for name, weight in theirs.named_parameters()})
    for name, weight in ours.named_parameters():
        assert (weight.grad - wanted[name]).norm() <= 1e-3 * wanted[name].norm(), name


def test_without_interference_the_same_seed_draws_the_same(engines):
    """The random numbers are drawn in the same order, so even the samples agree."""
    from detectron2.utils.events import EventStorage

    _, ours, _, theirs = engines
    ours.train(), theirs.train()
    state = copy.deepcopy(ours.state_dict())
    with EventStorage(), torch.no_grad():
        torch.manual_seed(3)
        found = theirs(theirs_of(images(), targets()))
        torch.manual_seed(3)
        mine = ours(images(), targets())
    ours.load_state_dict(state)
    theirs.load_state_dict(detector_to_detectron2(state))
    assert {name: value.item() for name, value in mine.items()} == pytest.approx(
        {name: value.item() for name, value in found.items()}, rel=1e-4
    )


@pytest.mark.parametrize("name, arch", [("c4", "resnet50"), ("dc5", "resnet50_msra"), ("fpn", "resnet18")])
def test_other_networks_too(name, arch):
    """At full width, with the stride in the 1x1, and with two convolutions a block."""
    from detectron2.utils.events import EventStorage

    _, ours, _, theirs = pair(name, "roi.batch_per_image=8", arch=arch)
    same_samples(ours, theirs, targets())
    with EventStorage():
        mine, found = losses_of(ours.train(), theirs.train())
        for losses in (mine, found):
            sum(losses.values()).backward()
    for loss in found:
        assert mine[loss].item() == pytest.approx(found[loss].item(), rel=1e-4)
    same_gradients(ours, theirs)


# The parts


def boxes_at_random(count, seed):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 200
    return torch.cat((corners, corners + 2 + torch.rand(count, 2, generator=generator) * 150), dim=1)


def test_anchors_are_detectron2s_bit_for_bit():
    from detectron2.modeling.anchor_generator import DefaultAnchorGenerator

    sizes, ratios = (32, 64, 100.5), (0.5, 1.0, 2.0)
    generator = DefaultAnchorGenerator(sizes=[sizes], aspect_ratios=[ratios], strides=[16], offset=0.0)
    (wanted,) = generator([torch.zeros(1, 1, 5, 7)])
    assert torch.equal(proposals.anchors_on(proposals.cell_anchors(sizes, ratios), 16, 5, 7), wanted.tensor)


@pytest.mark.parametrize("closest", [False, True])
def test_matching_is_detectron2s(closest):
    from detectron2.modeling.matcher import Matcher
    from detectron2.structures import Boxes, pairwise_iou

    for seed in range(5):
        objects, boxes = boxes_at_random(6, seed), boxes_at_random(400, 100 + seed)
        matched, kind = matching.match(objects, boxes, 0.3, 0.7, closest)
        matcher = Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=closest)
        their_matched, their_kind = matcher(pairwise_iou(Boxes(objects), Boxes(boxes)))
        assert torch.equal(matched, their_matched) and torch.equal(kind, their_kind.long())


def test_coding_and_sampling_are_detectron2s():
    from detectron2.modeling.box_regression import Box2BoxTransform
    from detectron2.modeling.sampling import subsample_labels

    boxes, wanted = boxes_at_random(300, 0), boxes_at_random(300, 1)
    theirs = Box2BoxTransform(weights=regions.BOX_WEIGHTS)
    deltas = matching.encode(wanted, boxes, regions.BOX_WEIGHTS)
    assert torch.equal(deltas, theirs.get_deltas(boxes, wanted))
    wild = 10 * torch.randn(300, 4)
    assert torch.equal(matching.decode(wild, boxes, regions.BOX_WEIGHTS), theirs.apply_deltas(wild, boxes))
    kind = torch.randint(-1, 2, (200,))
    for count in (10, 64, 1000):
        torch.manual_seed(4)
        ours = matching.sample(kind, count, 0.25)
        torch.manual_seed(4)
        assert all(map(torch.equal, ours, subsample_labels(kind, count, 0.25, 0)))


def test_levels_are_detectron2s():
    from detectron2.modeling.poolers import assign_boxes_to_levels
    from detectron2.structures import Boxes

    sides = torch.tensor([0.0, 1, 55.9, 112, 111.99, 224, 223.99, 448, 447.9, 5000])
    boxes = torch.cat((torch.zeros(10, 2), sides[:, None].expand(-1, 2)), dim=1)
    assert torch.equal(regions.level_of(boxes, 4), assign_boxes_to_levels([Boxes(boxes)], 2, 5, 224, 4))
