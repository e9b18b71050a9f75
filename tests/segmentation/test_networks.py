"""The networks beside the same ones written plainly: dilations, strides, parameters, activations, windows."""

import numpy as np
import pytest
import torch
from segmentation_runs import encoder, recipe
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet50

from moco_eval.data.masks.samples import IGNORED
from moco_eval.encoders.load import load
from moco_eval.errors import InputError
from moco_eval.segmentation.evaluate import window_scores, windows
from moco_eval.segmentation.networks import Frozen, Resnet, build_segmenter, check_encoder

CLASSES = 5


def segmenter(name="digits_fcn16s", arch="resnet50_quarter", *overrides):
    return build_segmenter(encoder(arch), CLASSES, recipe(name, *overrides)).eval()


def images(side, seed=0, count=1):
    return torch.randint(
        0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


# FCN-16s


def plain_fcn16s(state, x):
    """MoCo's FCN-16s on a ResNet-50, layer by layer: every stride and dilation is written here."""

    def norm(x, name):
        mean, var, weight, bias = (
            state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias)

    body = "inside.body."
    x = F.relu(norm(F.conv2d(x, state[f"{body}conv1.weight"], stride=2, padding=3), f"{body}bn1"))
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    for layer, blocks, stride, dilation in (("1", 3, 1, 1), ("2", 4, 2, 1), ("3", 6, 2, 1), ("4", 3, 1, 2)):
        for number in range(blocks):
            at, step = f"{body}layer{layer}.{number}", stride if number == 0 else 1
            y = F.relu(norm(F.conv2d(x, state[f"{at}.conv1.weight"]), f"{at}.bn1"))
            convolution = F.conv2d(y, state[f"{at}.conv2.weight"], stride=step, padding=dilation, dilation=dilation)
            y = F.relu(norm(convolution, f"{at}.bn2"))
            y = norm(F.conv2d(y, state[f"{at}.conv3.weight"]), f"{at}.bn3")
            if number == 0:
                x = norm(F.conv2d(x, state[f"{at}.downsample.0.weight"], stride=step), f"{at}.downsample.1")
            x = F.relu(x + y)
    for number in (0, 1):
        at = f"heads.0.{number}"
        x = F.relu(norm(F.conv2d(x, state[f"{at}.conv.weight"], padding=6, dilation=6), f"{at}.norm"))
    return F.conv2d(x, state["heads.0.2.weight"], state["heads.0.2.bias"])


def test_fcn16s_equals_the_same_network_written_plainly():
    model, pixels = segmenter(), images(65)
    x = (pixels.float() - model.mean) / model.std
    scores = F.interpolate(plain_fcn16s(model.state_dict(), x), (65, 65), mode="bilinear", align_corners=True)
    with torch.no_grad():
        assert torch.allclose(model.scores(pixels, 0), scores, atol=1e-6) and scores.abs().max() > 1e-3


def test_fcn16s_of_resnet50_has_the_parameters_that_it_should():
    model = build_segmenter(encoder("resnet50"), 21, recipe("voc_fcn16s_30k"))
    backbone = sum(parameter.numel() for parameter in resnet50().parameters()) - (2048 * 1000 + 1000)
    head = 2048 * 256 * 9 + 256 * 256 * 9 + 2 * 2 * 256 + 256 * 21 + 21
    assert sum(parameter.numel() for parameter in model.parameters()) == backbone + head
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_every_3x3_of_layer4_is_dilated_and_nothing_there_has_a_stride():
    body = segmenter().inside.body
    for module in body.layer4.modules():
        if isinstance(module, nn.Conv2d):
            assert module.stride == (1, 1)
            assert module.dilation == ((2, 2) if module.kernel_size == (3, 3) else (1, 1))
    assert sum(module.dilation == (2, 2) for module in body.modules() if isinstance(module, nn.Conv2d)) == 3


def all_ones(body):
    """Convolutions of ones and pooling by means: every pixel that a place looks at has a gradient."""
    body.body.maxpool = nn.AvgPool2d(3, 2, 1)
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    return body.double().eval()


def reach(body, stage, side=673):
    """How many pixels of a row one place of a stage's map looks at, and how far apart two neighbours' are."""
    x = torch.ones(1, 3, 33, side, dtype=torch.float64, requires_grad=True)
    maps = body(x)[stage]
    middle = maps.shape[3] // 2
    seen = []
    for column in (middle, middle + 1):
        (gradient,) = torch.autograd.grad(maps[0, 0, 1, column], x, retain_graph=True)
        columns = torch.nonzero(gradient.abs().sum(dim=(0, 1, 2))).flatten()
        seen.append((int(columns[0]), int(columns[-1])))
    return seen[0][1] - seen[0][0] + 1, seen[1][0] - seen[0][0]


def test_the_receptive_field_of_fcn16s():
    """Places 16 pixels apart; each 3x3 convolution of layer4 sees 2 x 2 places more than the one before."""
    net = encoder("resnet50_quarter")
    dilated = all_ones(Resnet(net, (None, (2, 2))))
    (of_layer3, before), (of_layer4, after) = reach(dilated, 0), reach(dilated, 1)
    assert before == after == 16
    assert of_layer4 - of_layer3 == 3 * 2 * 2 * 16
    assert reach(all_ones(Resnet(net, (None, None))), 1)[1] == 32


# The FCN of stride 8


def test_fcn_d8_has_the_maps_of_torchvisions_dilated_resnet50():
    net = encoder("resnet50")
    body = Resnet(net, ((1, 2), (2, 4))).eval()
    theirs = resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(net.backbone.state_dict())
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer3, layer4 = body(x)
        y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        y = theirs.layer3(theirs.layer2(theirs.layer1(y)))
        assert torch.equal(layer3, y) and torch.equal(layer4, theirs.layer4(y)) and layer4.shape[2:] == (8, 8)


def test_the_loss_of_fcn_d8_counts_both_heads_and_ignored_pixels():
    model = segmenter("vocaug_fcn_20k", "resnet50_quarter", "views.crop=64")
    pixels, masks = images(64), torch.full((1, 64, 64), IGNORED, dtype=torch.uint8)
    masks[:, :32] = 2
    with torch.no_grad():
        losses = model(pixels, masks)
        full = F.cross_entropy(model.scores(pixels, 0)[:, :, :32], masks[:, :32].long())
        auxiliary = model.enlarged(model.auxiliary(model.maps(pixels)[0]), (64, 64))[:, :, :32]
        expected = 0.4 * F.cross_entropy(auxiliary, masks[:, :32].long()) / 2
    assert losses["loss_seg"].item() == pytest.approx(full.item() / 2, rel=1e-5)
    assert losses["loss_aux"].item() == pytest.approx(expected.item(), rel=1e-5)


# Linear heads


@pytest.mark.parametrize("arch", ["resnet18_quarter", "vit_narrow_patch16_32"])
def test_a_linear_head_stands_on_the_last_map_and_leaves_the_encoder_alone(arch):
    net = encoder(arch)
    before = {name: tensor.clone() for name, tensor in net.backbone.state_dict().items()}
    config = recipe("digits_linear", "views.crop=32", "test.window=32", "test.stride=32", "output_stride=null")
    model = build_segmenter(net, CLASSES, config).train()
    last = net.network.stages[-1]
    pixels, masks = images(32, count=2), torch.zeros(2, 32, 32, dtype=torch.uint8)
    x = (pixels.float() - model.mean) / model.std
    with torch.no_grad():
        assert torch.equal(model.maps(pixels)[-1], net.network.maps(x, [last.name])[0])
    sum(model(pixels, masks).values()).backward()
    assert len(model.heads) == 6 and all(parameter.grad is not None for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.heads[0].parameters()) == 2 * last.channels + CLASSES * (
        last.channels + 1
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.backbone.state_dict().items())
    assert not any("backbone" in name or "body" in name for name in model.state_dict())


@pytest.mark.parametrize(
    "arch, stride", [("resnet18_quarter", 8), ("resnet50_quarter", 16), ("resnet18_quarter_cifar", 8)]
)
def test_a_frozen_resnet_has_the_wanted_stride_and_the_same_weights(arch, stride):
    """On the places that both grids have, nothing changes."""
    whole = encoder(arch)
    coarse, fine = Frozen(whole, 64), Frozen(whole, 64, output_stride=stride)
    times = coarse.last.stride // fine.last.stride
    assert fine.last.stride == stride and times == (1 if "cifar" in arch else 32 // stride)
    pixels = torch.randn(1, 3, 129, 129)
    with torch.no_grad():
        (small,), (large,) = coarse(pixels), fine(pixels)
    assert large.shape[2:] == (128 // stride + 1,) * 2
    assert (large[:, :, ::times, ::times] - small).abs().max() < 1e-5 * small.abs().max()
    for name, tensor in coarse.network.state_dict().items():
        assert torch.equal(tensor, fine.network.state_dict()[name])


def test_a_vit_takes_windows_of_another_size_and_ones_that_patches_do_not_fill():
    net = encoder("vit_narrow_patch16_32")
    body = Frozen(net, 40)
    assert body(torch.randn(2, 3, 40, 40))[0].shape == (2, 48, 3, 3)
    assert net.network.size == 32  # the encoder's own is as it was


def test_an_encoder_that_a_model_does_not_stand_on_is_refused():
    with pytest.raises(InputError, match="needs a ResNet and 'vit_narrow_patch16_32' is none; take --recipe linear"):
        check_encoder(encoder("vit_narrow_patch16_32"), recipe("digits_fcn16s"))
    with pytest.raises(InputError, match="its CIFAR stem leaves layer3 at stride 4"):
        check_encoder(encoder("resnet18_quarter_cifar"), recipe("digits_fcn16s"))
    with pytest.raises(InputError, match=r"images of one size: .*take --set test.window=64 --set test.stride=42"):
        check_encoder(encoder("vit_narrow_patch16_32"), recipe("digits_linear", "views.crop=64"))
    with pytest.raises(InputError, match="does not say where its maps are"):
        check_encoder(load("pixels"), recipe("digits_linear"))


# Windows


@pytest.mark.parametrize(("size", "count"), [((10, 10), 1), ((10, 11), 2), ((17, 30), 8), ((11, 23), 6)])
def test_windows_cover_everything_and_stay_inside(size, count):
    seen = np.zeros(size, int)
    places = list(windows(size, 10, 7))
    for top, left in places:
        assert 0 <= top <= size[0] - 10 and 0 <= left <= size[1] - 10
        seen[top : top + 10, left : left + 10] += 1
    assert seen.min() >= 1 and len(places) == count


def test_window_scores_are_the_mean_of_the_windows_that_cover_a_pixel():
    config = recipe("digits_linear", "views.crop=32", "test.window=32", "test.stride=16")
    model = build_segmenter(encoder("resnet18_quarter"), CLASSES, config).eval()
    pixels = torch.randint(0, 256, (3, 20, 48), dtype=torch.uint8)  # lower than a window
    padded = model.mean.round().to(torch.uint8).expand(3, 32, 48).clone()
    padded[:, :20] = pixels
    with torch.no_grad():
        left, right = (model.scores(padded[None, :, :, at : at + 32], 0)[0] for at in (0, 16))
        scores = window_scores(model, pixels, config, 0)[0]
    assert scores.shape == (CLASSES, 20, 48)
    assert torch.allclose(scores[:, :, :16], left[:, :20, :16]) and torch.allclose(
        scores[:, :, 32:], right[:, :20, 16:]
    )
    assert torch.allclose(scores[:, :, 16:32], (left[:, :20, 16:] + right[:, :20, :16]) / 2, atol=1e-6)


def test_the_loss_of_fcn16s_is_a_mean_over_labelled_pixels():
    model, pixels = segmenter(), images(49, count=2)
    masks = torch.full((2, 49, 49), IGNORED, dtype=torch.uint8)
    masks[0, :20], masks[1, 3, 4] = 0, 3
    with torch.no_grad():
        expected = F.cross_entropy(model.scores(pixels, 0), masks.long(), ignore_index=IGNORED)
        assert model(pixels, masks)["loss_seg"].item() == pytest.approx(expected.item(), rel=1e-5)
        assert model(pixels, torch.full_like(masks, IGNORED))["loss_seg"].item() == 0  # and not 0 / 0
