"""Our ViTDet against detectron2's own modules: the same weights, images and samples give the same numbers."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from moco_eval.config import load as configs
from moco_eval.config.detection import DetectConfig
from moco_eval.data.boxes.samples import make_sample
from moco_eval.detection.detector import build_detector
from moco_eval.detection.fine_tune import optimizer_for
from moco_eval.detection.inputs import View, _Training
from moco_eval.detection.masks import encoded
from moco_eval.detection.recipe import learning_rate
from moco_eval.encoders.load import load

pytestmark = pytest.mark.detectron2
pytest.importorskip("detectron2", reason="detectron2 is not installed; build it from its source")

from test_detectron2_parity import close, images, losses_of, same_samples, targets, theirs_of

ARCH = "timm:vit_tiny_patch16_224,depth=8,embed_dim=48,num_heads=3"  # global blocks 1, 3, 5, 7
SIDE = 320  # of the padded square: 20 tokens, a window and six
SMALL = (
    *("roi.batch_per_image=32", "rpn.post_nms_train=100", "rpn.post_nms_test=50", "batch_size=2", "drop_path=0"),
    *(f"input.max_size={SIDE}", f"input.min_size_test={SIDE}", "schedule.warmup=4"),
)
NAMES = (
    (r"^backbone\.body\.backbone\.", "backbone.net."),
    (r"^backbone\.levels\.(\d)\.", lambda match: f"backbone.simfp_{int(match[1]) + 2}."),
    (r"^(backbone\.simfp_\d\.\d)\.conv\.", r"\1."),
    (r"^rpn\.conv\.", "proposal_generator.rpn_head.conv."),
    (r"^rpn\.logits\.", "proposal_generator.rpn_head.objectness_logits."),
    (r"^rpn\.deltas\.", "proposal_generator.rpn_head.anchor_deltas."),
    (r"^heads\.box_head\.(conv\d)\.conv\.", r"roi_heads.box_head.\1."),
    (r"^heads\.box_head\.", "roi_heads.box_head."),
    (r"^heads\.mask_head\.norm(\d)\.", r"roi_heads.mask_head.mask_fcn\1.norm."),
    (r"^heads\.mask_head\.", "roi_heads.mask_head."),
    (r"^heads\.class_logits\.", "roi_heads.box_predictor.cls_score."),
    (r"^heads\.box_deltas\.", "roi_heads.box_predictor.bbox_pred."),
)


def renamed(name):
    for ours, theirs in NAMES:
        name = re.sub(ours, theirs, name)
    return name


def vitdet(classes):
    """detectron2's published Mask R-CNN on ViTDet, small."""
    from detectron2 import model_zoo
    from detectron2.config import instantiate

    model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
    net = model.backbone.net
    net.img_size, net.embed_dim, net.depth, net.num_heads, net.drop_path_rate = SIDE, 48, 8, 3, 0.0
    net.window_block_indexes = [0, 2, 4, 6]
    net.norm_layer = partial(nn.LayerNorm, eps=1e-6)
    model.backbone.square_pad = SIDE
    model.roi_heads.num_classes = classes
    model.roi_heads.batch_size_per_image = 32
    model.proposal_generator.post_nms_topk = (100, 50)
    return instantiate(model)


@pytest.fixture(scope="module")
def engines():
    recipe = configs.load("coco_vitdet_b", "detect", DetectConfig, SMALL)
    ours = build_detector(load(f"random:{ARCH}"), 3, recipe)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:
                weight.normal_(std=0.2)
            if name.endswith(("norm.weight", "norm.bias", "norm1.weight", "norm2.bias")):
                weight += 0.1 * torch.randn_like(weight)
        ours.heads.class_logits.weight *= 10
        ours.heads.box_deltas.weight *= 10
        ours.heads.mask_head.predictor.weight *= 100
        ours.rpn.logits.weight *= 5
    theirs = vitdet(3)
    state = {renamed(name): tensor for name, tensor in ours.state_dict().items()}
    held_still = {"backbone.net.cls_token", "backbone.net.norm.weight", "backbone.net.norm.bias"}
    missing, strange = theirs.load_state_dict(state, strict=False)
    assert not missing and set(strange) == held_still
    return recipe, ours, theirs


@torch.no_grad()
def test_maps_and_detections(engines):
    _, ours, theirs = engines
    ours.eval(), theirs.eval()
    batch, _ = ours.batch(images())
    prepared = theirs.preprocess_image(theirs_of(images())).tensor
    assert batch.shape == prepared.shape == (2, 3, SIDE, SIDE)
    close(ours.backbone.last_map(batch), theirs.backbone.net(prepared)["last_feat"])
    found = theirs.backbone(prepared)
    for level, name in zip(ours.backbone(batch), ("p2", "p3", "p4", "p5", "p6"), strict=True):
        close(level, found[name])
    for image, instances in zip(ours(images()), theirs.inference(theirs_of(images()), do_postprocess=False)):
        assert len(instances) >= 10 and torch.equal(image["labels"] - 1, instances.pred_classes)
        assert (image["boxes"] - instances.pred_boxes.tensor).abs().max() < 0.01
        close(image["masks"], instances.pred_masks[:, 0])


@torch.no_grad()
def test_a_map_of_another_size_than_the_positions(engines):
    _, ours, theirs = engines
    images = torch.randn(1, 3, 96, 416)
    close(ours.backbone.last_map(images), theirs.backbone.net(images)["last_feat"])


def test_gradients_and_five_steps(engines):
    """With its optimizer: AdamW, each layer of the ViT at its own rate, norms and positions not decayed.

    Its epsilon is raised on both sides, or the sign of a gradient that is rounding alone would make a whole step. The
    first gradients are the same; later ones have grown from the rounding of the steps before.
    """
    from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
    from detectron2.solver.build import get_default_optimizer_params
    from detectron2.utils.events import EventStorage

    recipe, ours, theirs = engines
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    ours.train(), theirs.train()
    same_samples(ours, theirs, targets())
    our_adam = optimizer_for(ours, recipe)
    groups = get_default_optimizer_params(
        theirs,
        base_lr=recipe.optimizer.lr,
        weight_decay=recipe.optimizer.weight_decay,
        weight_decay_norm=0.0,
        lr_factor_func=partial(get_vit_lr_decay_rate, num_layers=8, lr_decay_rate=0.7),
        overrides={"pos_embed": {"weight_decay": 0.0}},
    )
    their_adam = torch.optim.AdamW(groups, recipe.optimizer.lr, betas=(0.9, 0.999), weight_decay=0.1)
    base = [group["lr"] for group in their_adam.param_groups]
    for optimizer in (our_adam, their_adam):
        for group in optimizer.param_groups:
            assert (group["eps"], group["betas"]) == (1e-8, (0.9, 0.999))
            group["eps"] = 1e-3
    same_rates_and_decays(ours, our_adam, theirs, their_adam, recipe)
    with EventStorage():
        for iteration in range(5):
            losses = losses_of(ours, theirs)
            for name, value in losses[1].items():
                assert losses[0][name].item() == pytest.approx(value.item(), rel=1e-3), (iteration, name)
            rate = learning_rate(recipe, iteration)
            for group in our_adam.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            for group, full in zip(their_adam.param_groups, base):
                group["lr"] = full * rate / recipe.optimizer.lr
            for optimizer, values in zip((our_adam, their_adam), losses):
                optimizer.zero_grad()
                sum(values.values()).backward()
            allowed = 5e-3 if iteration == 0 else 0.05
            wanted = {name: weight.grad for name, weight in theirs.named_parameters()}
            for name, weight in ours.named_parameters():
                if weight.requires_grad:
                    theirs_grad = wanted[renamed(name)]
                    assert (weight.grad - theirs_grad).norm() <= allowed * theirs_grad.norm() + 1e-7, (iteration, name)
            our_adam.step(), their_adam.step()
    trained = theirs.state_dict()
    for name, weight in ours.named_parameters():
        moved = (weight - before[name]).norm().item()
        assert (moved > 0) == weight.requires_grad, name
        if weight.requires_grad:
            assert (weight - trained[renamed(name)]).norm() <= 0.02 * moved, name


def same_rates_and_decays(ours, our_adam, theirs, their_adam, recipe):
    names = {id(weight): renamed(name) for name, weight in ours.named_parameters()}
    others = {id(weight): name for name, weight in theirs.named_parameters()}
    lr = recipe.optimizer.lr
    mine = {
        names[id(weight)]: (lr * group.get("lr_scale", 1.0), group["weight_decay"])
        for group in our_adam.param_groups
        for weight in group["params"]
    }
    found = {
        others[id(weight)]: (group["lr"], group["weight_decay"])
        for group in their_adam.param_groups
        for weight in group["params"]
    }
    assert mine.keys() == found.keys()
    for name, (rate, decay) in found.items():
        assert mine[name] == (pytest.approx(rate), decay), name


@pytest.mark.parametrize("scale", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("flipped", [False, True])
def test_large_scale_jitter_is_detectron2s(tmp_path, scale, flipped):
    """The same draws give the same pixels and boxes, and the same bitmaps of masks."""
    import detectron2.data.transforms as T
    from detectron2.structures import BitMasks
    from PIL import Image

    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (90, 130, 3), dtype=np.uint8)
    bitmap = np.zeros((90, 130), np.uint8)
    bitmap[10:80, 20:100] = 1
    square, share = 64, 0.4
    flips = [T.HFlipTransform(130)] if flipped else []
    picture = T.TransformList(flips).apply_image(pixels)
    resize = T.ResizeScale(scale, scale, square, square)._get_resize(picture, scale)
    height, width = resize.apply_image(picture).shape[:2]
    corner = round(max(width - square, 0) * share), round(max(height - square, 0) * share)
    cut = T.CropTransform(*corner, square, square, width, height)
    whole = T.TransformList([*flips, resize, cut])
    view = View((130, 90), (width, height), flipped, corner, (min(width, square), min(height, square)))
    theirs = whole.apply_image(pixels)
    ours = view.pixels(Image.fromarray(pixels)).permute(1, 2, 0).numpy()
    assert ours.shape == theirs.shape and np.abs(ours.astype(int) - theirs).max() <= 1
    moved = whole.apply_segmentation(bitmap)
    assert np.array_equal(view.mask(encoded(bitmap)), moved)
    wanted = BitMasks(torch.from_numpy(moved)[None]).get_bounding_boxes().tensor[0].tolist()
    assert view.extent(moved).tolist() == wanted
    Image.fromarray(pixels).save(tmp_path / "a.png")
    sample = make_sample(1, tmp_path / "a.png", (130, 90), [((10, 10, 120, 85), 0, False, False)])
    recipe = configs.load("coco_vitdet_b", "detect", DetectConfig, ("masks=false",))
    boxes = _Training([sample], recipe, ()).target(sample, view)["boxes"].numpy()
    np.testing.assert_allclose(boxes, whole.apply_box(np.array([[10.0, 10, 120, 85]])).clip(0, square), atol=1e-3)
