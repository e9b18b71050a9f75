"""Detectors of networks that are no ResNet of ours: four strides into a pyramid, plain ViTs into the simple one."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

from moco_eval.config import load as configs
from moco_eval.config.detection import DetectConfig
from moco_eval.data.boxes.samples import make_sample
from moco_eval.detection import fine_tune, plain_transformer
from moco_eval.detection.detect import detect
from moco_eval.detection.detector import build_detector, check_architecture
from moco_eval.detection.engine import choose
from moco_eval.detection.inputs import View, _Training, _view
from moco_eval.detection.task import DetectionTask
from moco_eval.encoders.load import load
from moco_eval.errors import InputError, Interrupted
from moco_eval.runtime import batch_norm
from moco_eval.runtime.stop import Stop

CPU = torch.device("cpu")
VIT = "timm:vit_tiny_patch16_224,depth=8,embed_dim=48,num_heads=3"
ARCHS = ("timm:convnext_atto", "timm:swin_tiny_patch4_window7_224,embed_dim=24", "timm:efficientnet_lite0")
ARCHS += ("timm:regnetx_002", "timm:resnet18d", VIT)
FEW = ("roi.batch_per_image=8", "rpn.post_nms_train=20", "rpn.post_nms_test=10", "roi.pool_size=2", "masks=false")


def recipe(arch, *overrides):
    if arch == VIT or arch.startswith("vit_"):
        sides = ("input.max_size=256", "input.min_size_test=256")
        return configs.load("coco_vitdet_b", "detect", DetectConfig, (*FEW, *sides, *overrides))
    return configs.load("coco_r50_fpn_1x", "detect", DetectConfig, (*FEW, *overrides))


@pytest.fixture(scope="module", params=ARCHS)
def built(request):
    encoder = load(f"random:{request.param}")
    return encoder, recipe(request.param), build_detector(encoder, 3, recipe(request.param))


def images():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8) for size in ((70, 101), (64, 64))]


def targets():
    boxes = [[[5.0, 5, 60, 60], [30, 20, 100, 70]], [[10.0, 10, 50, 40]]]
    return [{"boxes": torch.tensor(b), "labels": torch.arange(len(b)) + 1} for b in boxes]


# Any network


def test_every_tensor_of_the_encoder_is_in_the_detector(built):
    encoder, _, model = built
    state, inside = encoder.backbone.state_dict(), model.encoder_tensors()
    assert inside.keys() == state.keys()
    assert all(torch.equal(inside[name], tensor) for name, tensor in state.items())
    own = {tensor.data_ptr() for tensor in state.values()}
    assert not own & {tensor.data_ptr() for tensor in model.state_dict().values()}


@torch.no_grad()
def test_maps_have_their_strides_and_widths(built):
    _, _, model = built
    batch, _ = model.eval().batch(images())
    assert batch.shape[2:] == ((256, 256) if model.backbone.square else (96, 128))
    for level, stride in zip(model.backbone(batch), (4, 8, 16, 32, 64), strict=True):
        assert level.shape[:2] == (2, 256)
        assert level.shape[2:] == tuple(-(-side // stride) for side in batch.shape[2:])


def test_every_weight_learns_but_those_behind_the_last_map(built):
    encoder, config, built_model = built
    model = copy.deepcopy(built_model).train()
    optimizer = fine_tune.optimizer_for(model, config)
    trained = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    assert trained == {id(weight) for weight in model.parameters() if weight.requires_grad}
    sum(model(images(), targets()).values()).backward()
    assert all((weight.grad is not None) == weight.requires_grad for weight in model.parameters())
    still = {name.rpartition("backbone.")[2] for name, weight in model.named_parameters() if not weight.requires_grad}
    behind = {
        "timm:convnext_atto": {"head.norm.weight", "head.norm.bias"},
        "timm:efficientnet_lite0": {"conv_head.weight", "bn2.weight", "bn2.bias"},
        VIT: {"cls_token", "norm.weight", "norm.bias"},
        ARCHS[1]: {"norm.weight", "norm.bias"},
    }
    assert still == behind.get(encoder.arch, set())


def test_the_pyramids_maps_are_the_networks_own():
    """The last stage of each stride, of the network that stands alone."""
    encoder = load("random:timm:regnetx_002")
    model = build_detector(encoder, 3, recipe("timm:regnetx_002")).eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        ours = model.backbone.body.maps(image, model.backbone.stages)
        theirs = encoder.backbone.forward_intermediates(image, intermediates_only=True)[1:]
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@torch.no_grad()
def test_a_swin_for_any_size_is_the_same_on_its_own_size():
    encoder = load(f"random:{ARCHS[1]}")
    body = build_detector(encoder, 3, recipe(ARCHS[1])).eval().backbone.body
    image = torch.randn(1, 3, 224, 224)
    theirs = encoder.backbone.eval().forward_intermediates(image, intermediates_only=True)
    for one, other in zip(body.maps(image, [stage.name for stage in body.stages]), theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_norm_that_is_replaced_keeps_its_activation(monkeypatch):
    from timm.layers import BatchNormAct2d

    monkeypatch.setattr(batch_norm, "world_size", lambda: 2)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4)).eval()
    image = torch.randn(2, 3, 5, 5)
    before, names = net(image), list(net.state_dict())
    for bn in ("naive_sync", "sync"):
        other = batch_norm.share_statistics(copy.deepcopy(net), bn).eval()
        assert torch.equal(other(image), before) and (before >= 0).all() and list(other.state_dict()) == names
    syncbn = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net))
    assert (syncbn(image) < 0).any()  # what PyTorch's conversion alone does
    assert torch.equal(batch_norm._activations_of_syncbn(syncbn)(image), before)


@pytest.mark.parametrize(
    ("arch", "model", "message"),
    [
        (VIT, "r50_c4", r"needs a ResNet, .* is none of ours; take --recipe coco_vitdet_b or voc_own_vitdet_b_24k"),
        (VIT, "r50_fpn", "needs maps of strides 4, 8, 16 and 32, .* has 16; take --recipe coco_vitdet_b"),
        ("vit_narrow_patch8_224", "vitdet", "has patches of 8 pixels, and the strides 4 to 32 need 16"),
        ("timm:convnext_atto", "r50_dc5", "needs a ResNet.*take --recipe coco_r50_fpn_1x"),
        ("timm:convnext_atto", "vitdet", "is no plain ViT; take --recipe coco_r50_fpn_1x"),
        ("resnet18", "vitdet", "needs a plain ViT, and resnet18 is a ResNet; take --recipe r50_c4_24k"),
        ("resnet18_cifar", "r50_fpn", "CIFAR stem"),
        ("timm:beit_base_patch16_224,depth=1", "vitdet", "is no plain ViT; take a ResNet"),
        ("timm:maxvit_tiny_tf_224", "r50_fpn", "images of any size, and .* takes 224 pixels only; take a ResNet"),
    ],
)
def test_what_a_model_takes(arch, model, message):
    encoder = load(f"random:{arch}")
    with pytest.raises(InputError, match=message):
        check_architecture(encoder, model)


def test_a_wrapped_vit_is_refused():
    encoder = load(f"random:{VIT}")
    encoder.wrapped = True
    with pytest.raises(InputError, match="somebody's own module"):
        check_architecture(encoder, "vitdet")


def test_detectron2_refuses_what_is_no_resnet(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr("importlib.import_module", lambda name: None)
    with pytest.raises(InputError, match=r"--engine detectron2: it builds ResNets here, and timm:vit.* is none"):
        choose("detectron2", load(f"random:{VIT}"), recipe(VIT))
    assert choose("auto", load(f"random:{VIT}"), recipe(VIT)) == "torchvision"


# The plain ViT


@torch.no_grad()
def test_without_windows_it_is_timms_own_last_map():
    """Relative positions start at zero, and a ViT without class token whose every block is global has no windows."""
    arch = "timm:vit_tiny_patch16_224,depth=2,embed_dim=48,num_heads=3,class_token=False,global_pool=avg"
    encoder, image = load(f"random:{arch}"), torch.randn(2, 3, 224, 224)
    backbone = plain_transformer.SimplePyramid(encoder, recipe(VIT)).eval()
    assert backbone.whole == {0, 1}
    theirs = encoder.backbone.eval().forward_intermediates(image, indices=1, intermediates_only=True)[0]
    torch.testing.assert_close(backbone.last_map(image), theirs, atol=1e-5, rtol=1e-5)


def test_the_last_block_of_each_quarter_sees_the_whole():
    assert [plain_transformer._whole(depth) for depth in (12, 24, 8)] == [{2, 5, 8, 11}, {5, 11, 17, 23}, {1, 3, 5, 7}]


@torch.no_grad()
def test_windows_are_those_of_a_loop():
    torch.manual_seed(0)
    attention = build_detector(load(f"random:{VIT}"), 3, recipe(VIT)).backbone.body.backbone.blocks[0].attn
    for name in plain_transformer.POSITIONS:
        getattr(attention, name).normal_()
    x = torch.randn(2, 17, 30, 48)
    padded = torch.zeros(2, 28, 42, 48)
    padded[:, :17, :30] = x
    wanted = torch.empty_like(padded)
    for image in range(2):
        for top in (0, 14):
            for left in (0, 14, 28):
                window = padded[image, top : top + 14, left : left + 14]
                wanted[image, top : top + 14, left : left + 14] = naive_attention(attention, window)
    torch.testing.assert_close(plain_transformer._attend(attention, x, 14), wanted[:, :17, :30], atol=1e-5, rtol=1e-4)


def naive_attention(attention, window):
    """Head by head and token by token, (H, W, C)."""
    H, W, C = window.shape
    q, k, v = attention.qkv(window.reshape(H * W, C)).reshape(H * W, 3, 3, 16).unbind(1)
    out = torch.zeros(H * W, 3, 16)
    places = [(i, j) for i in range(H) for j in range(W)]
    rows = torch.tensor([[a[0] - b[0] + H - 1 for b in places] for a in places])
    columns = torch.tensor([[a[1] - b[1] + W - 1 for b in places] for a in places])
    for head in range(3):
        query = q[:, head]
        logits = query @ k[:, head].T / 4
        logits += torch.einsum("ic,ijc->ij", query, attention.rel_pos_h[rows])
        logits += torch.einsum("ic,ijc->ij", query, attention.rel_pos_w[columns])
        out[:, head] = logits.softmax(dim=1) @ v[:, head]
    return attention.proj(out.reshape(H, W, C))


def test_each_layer_has_its_rate_and_what_is_not_decayed():
    model = build_detector(load(f"random:{VIT}"), 3, recipe(VIT, "drop_path=0.3"))
    names = {id(weight): name for name, weight in model.named_parameters()}
    groups = fine_tune.optimizer_for(model, recipe(VIT)).param_groups
    scales = {names[id(w)]: (g.get("lr_scale", 1.0), g["weight_decay"]) for g in groups for w in g["params"]}
    vit = "backbone.body.backbone."
    assert scales[f"{vit}pos_embed"] == (pytest.approx(0.7**9), 0)
    assert scales[f"{vit}patch_embed.proj.bias"] == (pytest.approx(0.7**9), 0.1)
    assert scales[f"{vit}blocks.0.attn.rel_pos_h"] == (pytest.approx(0.7**8), 0.1)
    assert scales[f"{vit}blocks.7.norm1.weight"] == (pytest.approx(0.7), 0)
    assert scales["backbone.levels.0.0.weight"] == scales["heads.class_logits.weight"] == (1, 0.1)
    blocks = model.backbone.body.backbone.blocks
    assert [getattr(block.drop_path1, "p", 0) for block in blocks] == pytest.approx([0.3 * i / 7 for i in range(8)])
    assert isinstance(fine_tune.optimizer_for(model, recipe(VIT)), torch.optim.AdamW)


def test_a_detector_without_batch_norm_says_so(capsys):
    model = build_detector(load(f"random:{VIT}"), 3, recipe(VIT))
    fine_tune.precise_bn(model, iter(()), recipe(VIT, "precise_bn=5"), CPU, Stop())
    assert "has no batch norm" in capsys.readouterr().err


def test_a_norm_behind_the_last_map_keeps_its_statistics():
    arch = "timm:efficientnet_lite0"
    model = build_detector(load(f"random:{arch}"), 3, recipe(arch)).train()
    batch = ([image.clone() for image in images()], targets())
    config = recipe(arch, "precise_bn=1", "batch_size=2")
    fine_tune.precise_bn(model, iter([batch]), config, CPU, Stop())
    body = model.backbone.body.backbone
    assert (body.bn2.running_var == 1).all() and not (body.bn1.running_var == 1).any()
    assert all(buffer.isfinite().all() for buffer in model.buffers())


def test_settings_of_a_vit_need_a_vit():
    with pytest.raises(InputError, match=r"drop_path and optimizer.layer_decay need model vitdet"):
        recipe("timm:convnext_atto", "drop_path=0.1")
    with pytest.raises(InputError, match="smallest and the largest scale"):
        recipe(VIT, "input.jitter=[2, 1]")


# Large-scale jitter


def test_a_jittered_image_lies_in_its_square():
    wanted = recipe(VIT).input
    random = np.random.default_rng(0)
    views = [_view((200, 100), wanted, random) for _ in range(300)]
    scales = np.array([view.after[0] / wanted.max_size for view in views])
    assert 0.1 <= scales.min() < 0.2 and 1.9 < scales.max() <= 2
    for view in views:
        assert view.cut == tuple(min(side, wanted.max_size) for side in view.after)
        assert all(0 <= c <= a - s for c, a, s in zip(view.corner, view.after, view.cut))
        assert abs(view.after[0] - 2 * view.after[1]) <= 1
    assert len({view.corner for view in views if view.after[0] > wanted.max_size}) > 50
    assert {view.flipped for view in views} == {False, True}


@pytest.mark.parametrize("flipped", [False, True])
def test_a_cut_mask_has_the_box_of_what_is_left(flipped):
    """Against the polygon drawn on a canvas and cut there."""
    polygon = np.array([20.0, 10, 120, 30, 100, 85, 60, 50, 10, 80])
    view = View((130, 90), (260, 180), flipped, (70, 30), (64, 64))
    canvas = Image.new("L", (130 * 8, 90 * 8))
    ImageDraw.Draw(canvas).polygon([tuple(8 * p) for p in polygon.reshape(-1, 2)], fill=1)
    drawn = np.array(canvas)[:, ::-1] if flipped else np.array(canvas)
    left = drawn[30 * 4 : 94 * 4, 70 * 4 : 134 * 4]  # eight places a pixel on disk, four a resized one
    rows, columns = np.flatnonzero(left.any(axis=1)) / 4, np.flatnonzero(left.any(axis=0)) / 4
    found = view.extent(view.mask([polygon]))
    np.testing.assert_allclose(found, [columns[0], rows[0], columns[-1] + 0.25, rows[-1] + 0.25], atol=0.5)
    outside = View((130, 90), (260, 180), False, (200, 0), (4, 4))
    assert not outside.extent(outside.mask([polygon])).any()


def test_objects_that_are_cut_away_are_not_trained_on(tmp_path):
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    objects = [((5, 5, 30, 40), 0, False, False), ((60, 60, 90, 90), 1, False, False)]
    sample = make_sample(1, tmp_path / "a.png", (100, 100), objects)
    view = View((100, 100), (200, 200), False, (100, 90), (64, 64))
    target = _Training([sample], recipe(VIT), ()).target(sample, view)
    assert target["labels"].tolist() == [2] and target["boxes"].tolist() == [[20, 30, 64, 64]]


def test_boxes_of_cut_masks_are_those_of_what_is_left(tmp_path):
    """A triangle whose box is [10, 90] x [10, 90]; the right half of the image shows it up to row 50 only."""
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    triangle = [np.array([10.0, 10, 90, 10, 10, 90])]
    sample = make_sample(1, tmp_path / "a.png", (100, 100), [((10, 10, 90, 90), 0, False, False)])
    sample = replace(sample, masks=(triangle,))
    view = View((100, 100), (100, 100), False, (50, 0), (50, 100))
    masks = configs.load("coco_vitdet_b", "detect", DetectConfig)
    for config, box in ((masks, [0, 10, 40, 50]), (recipe(VIT), [0, 10, 40, 90])):
        target = _Training([sample], config, ()).target(sample, view)
        assert target["boxes"].tolist() == [pytest.approx(box)]


# Whole


@pytest.mark.slow
def test_a_vit_is_fine_tuned_judged_and_resumed_bit_for_bit(tmp_path, monkeypatch):
    small = ("input.max_size=96", "input.min_size_test=96", "batch_size=2", "workers=0", "checkpoints.every=1")
    short = ("schedule.iterations=2", "schedule.steps=[]", "schedule.warmup=1", "log_every=1")
    config = recipe(VIT, *small, *short, "scenes.train=4", "scenes.test=2")
    task = DetectionTask(load(f"random:{VIT}"), config, "digits", engine="torchvision")
    whole = detect(task, tmp_path / "whole", CPU)
    assert {"AP", "AP50"} <= set(whole["metrics"]) or "APbb" in whole["metrics"]
    step, calls = fine_tune.Trainer.step, []

    def interrupted(self, batch, iteration):
        calls.append(iteration)
        if len(calls) == 2:
            raise Interrupted("stopped")
        return step(self, batch, iteration)

    monkeypatch.setattr(fine_tune.Trainer, "step", interrupted)
    with pytest.raises(Interrupted):
        detect(task, tmp_path / "parts", CPU)
    detect(task, tmp_path / "parts", CPU)
    states = [
        torch.load(tmp_path / name / "checkpoints" / "last.pth", weights_only=True) for name in ("whole", "parts")
    ]
    assert all(torch.equal(states[0]["model"][name], tensor) for name, tensor in states[1]["model"].items())
    assert states[0]["optimizer"]["param_groups"] == states[1]["optimizer"]["param_groups"]
