"""Networks of timm's and torchvision's that are no ResNets: the libraries' own networks give the same features."""

import json

import pytest
import timm
import torch
import torchvision
from checkpoints import error, used, written
from checkpoints_conv import CONV_FILES
from safetensors.torch import save_file
from torch import Tensor, nn

from moco_eval.encoders import libraries
from moco_eval.encoders.architectures import TimmNetwork
from moco_eval.encoders.infer_zoo import zoo_architectures
from moco_eval.encoders.layouts_conv import CONVOLUTIONAL
from moco_eval.encoders.load import _of_layout, load
from moco_eval.preprocessing import Preprocessing


@torch.no_grad()
def require_same(encoder, theirs: nn.Module, size: int) -> None:
    images = torch.randn(2, encoder.network.in_channels, size, size, generator=torch.Generator().manual_seed(1))
    expected = theirs.eval()(images).flatten(1)
    difference = (encoder.backbone(images) - expected).abs().max()
    assert difference <= 1e-5 * max(1.0, float(expected.abs().max()))


def torchvisions(name: str) -> dict[str, Tensor]:
    """The tensors of a network of torchvision's with used statistics."""
    torch.manual_seed(0)
    return used(torchvision.models.get_model(name, weights=None), 0).state_dict()


TORCHVISION = {
    "efficientnet_b0": ("timm:efficientnet_b0", 64),
    "convnext_tiny": ("timm:convnext_tiny", 64),
    "swin_t": ("timm:swin_tiny_patch4_window7_224", 224),
    "regnet_y_400mf": ("timm:regnety_004", 64),
    "regnet_x_400mf": ("timm:regnetx_004_tv", 64),
    "densenet121": ("timm:densenet121", 64),
    "efficientnet_v2_s": ("timm:efficientnetv2_s,bn_eps=0.001", 64),
    "efficientnet_b5": ("timm:efficientnet_b5,bn_eps=0.001", 64),
    "vit_b_16": ("vit_base_patch16_224", 224),
}
CHEAP = ("efficientnet_b0", "regnet_y_400mf", "densenet121")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in CHEAP else pytest.mark.slow) for name in TORCHVISION]
)
def test_torchvisions_networks(name, tmp_path):
    tensors = torchvisions(name)
    arch, size = TORCHVISION[name]
    encoder = load(written(tmp_path, tensors))
    assert encoder.arch == arch and "torchvision" in encoder.origin
    require_same(encoder, libraries._theirs(name, tensors), size)
    assert sum(int(part.partition("(")[2].partition(" ")[0] or 1) for part, _ in encoder.dropped) >= 2


@pytest.mark.parametrize(
    ("name", "size"), [("efficientnet_b0", 224), pytest.param("swin_t", 224, marks=pytest.mark.slow)]
)
def test_torchvisions_published_weights(name, size, monkeypatch):
    """As if downloaded: the same network, with the pixels that its weights' transforms say."""
    tensors = torchvisions(name)
    weights = torchvision.models.get_model_weights(name)
    monkeypatch.setattr(libraries, "unreachable", lambda _: None)
    monkeypatch.setattr(weights, "get_state_dict", lambda self, **_: dict(tensors))
    encoder = load(f"torchvision:{name}")
    require_same(encoder, libraries._theirs(name, tensors), 224)
    assert encoder.preprocessing.interpolation == "bicubic" and encoder.run_name == f"torchvision-{name}"


def test_torchvisions_networks_that_are_not_built(monkeypatch):
    monkeypatch.setattr(libraries, "unreachable", lambda _: None)
    weights = torchvision.models.get_model_weights("squeezenet1_0")
    state = torchvision.models.squeezenet1_0(weights=None).state_dict()
    monkeypatch.setattr(weights, "get_state_dict", lambda self, **_: dict(state))
    assert "torchvision:squeezenet1_0 is a network that is not built here; moco_eval.wrap" in error(
        "torchvision:squeezenet1_0"
    )


ZOO = ("convnextv2_atto", "tf_efficientnet_lite0", "regnety_002", "tinynet_e", "test_vit", "test_resnet", "levit_128s")


@pytest.mark.parametrize("name", ZOO)
def test_timms_networks(name, tmp_path):
    """As a safetensors file, whose tensors stand in the order of the alphabet."""
    torch.manual_seed(0)
    net = used(timm.create_model(name), 0)
    save_file(net.state_dict(), tmp_path / "x.safetensors")
    net.reset_classifier(0)
    path, arch = str(tmp_path / "x.safetensors"), f"timm:{name}"
    given = {"arch": arch} if name == "tf_efficientnet_lite0" else {}
    encoder = load(path, **given)
    assert encoder.arch == arch
    require_same(encoder, net, net.pretrained_cfg["input_size"][-1])


def test_networks_that_no_tensor_tells_apart(tmp_path):
    path = written(tmp_path, timm.create_model("efficientnet_lite0").state_dict())
    message = error(path)
    assert (
        "timm:efficientnet_lite0 and timm:tf_efficientnet_lite0 have these tensors but compute differently" in message
    )
    assert message.endswith("choose one: --arch timm:efficientnet_lite0")
    assert load(path, arch="timm:tf_efficientnet_lite0").arch == "timm:tf_efficientnet_lite0"


def test_other_channels(tmp_path):
    net = used(timm.create_model("convnextv2_atto", in_chans=13, num_classes=0), 0)
    encoder = load(written(tmp_path, net.state_dict()))
    assert encoder.arch == "timm:convnextv2_atto,in_chans=13"
    require_same(encoder, net, 64)


def test_a_swin_of_other_windows(tmp_path):
    """SimMIM's: windows of 6 at 192 pixels."""
    given = {"window_size": 6, "img_size": 192, "num_classes": 0}
    net = used(timm.create_model("swin_tiny_patch4_window7_224", **given), 0)
    encoder = load(written(tmp_path, net.state_dict()))
    assert encoder.arch == "timm:swin_tiny_patch4_window7_224,window_size=6,img_size=192"
    assert encoder.preprocessing.size == 192
    require_same(encoder, net, 192)


def test_a_random_network_by_timms_name():
    assert load("random:convnextv2_atto").arch == load("random:timm:convnextv2_atto").arch == "timm:convnextv2_atto"
    assert "Did you mean" in error("random:timm:convnextv2_ato")


@pytest.mark.parametrize("name", ["convnextv2_atto", "regnety_002"])
def test_timms_published_weights(name, monkeypatch):
    net = used(timm.create_model(name, num_classes=0), 0).eval()
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: net)
    monkeypatch.setattr(libraries, "unreachable", lambda *_: None)
    libraries.architecture(f"timm:{name}")
    encoder = load(f"timm:{name}")
    assert encoder.arch == f"timm:{name}"
    require_same(encoder, net, 224)


@pytest.mark.parametrize(("size", "window"), [(224, 14), (192, 12), (224, 7)])
def test_windows_that_are_cut_to_the_last_map(size, window, tmp_path):
    """EsViT's of 14 at 224 pixels, SimMIM's of 12 at 192: the last stage's are as large as its map."""
    net = used(timm.create_model(SWIN, window_size=window, img_size=size, embed_dim=24, num_classes=0), 0)
    encoder = load(written(tmp_path, net.state_dict()), arch=_swin(size, window))
    assert zoo_architectures(_full_width(size, window), "^swin_tiny_") == [
        _swin(size, window).replace(",embed_dim=24", "")
    ]
    require_same(encoder, net, size)


SWIN = "swin_tiny_patch4_window7_224"


def _swin(size: int, window: int) -> str:
    further = f",window_size={window},img_size={size}" if window != 7 else ""
    return f"timm:{SWIN}{further},embed_dim=24"


def _full_width(size: int, window: int) -> dict[str, Tensor]:
    with torch.device("meta"):
        return timm.create_model(SWIN, window_size=window, img_size=size, num_classes=0).state_dict()


@pytest.mark.parametrize("name", ["efficientnet_lite0", "tf_efficientnet_lite0"])
def test_timms_config_settles_which_of_several_it_is(name, tmp_path):
    net = used(timm.create_model(name, num_classes=0), 0)
    path = written(tmp_path, net.state_dict())
    pixels = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 192, 192], "crop_pct": 1.0}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name, "pretrained_cfg": pixels}))
    encoder = load(path)
    assert (encoder.arch, encoder.preprocessing.size, encoder.warnings) == (f"timm:{name}", 192, [])
    require_same(encoder, net, 64)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": pixels}))
    assert "compute differently" in error(path)


@pytest.mark.slow
def test_a_transformers_norm_on_the_pooled_feature(tmp_path):
    """Hiera's stands in its head."""
    net = used(timm.create_model("hiera_tiny_224"), 0)
    path = written(tmp_path, net.state_dict())
    net.reset_classifier(0)
    encoder = load(path, arch="timm:hiera_tiny_224")
    require_same(encoder, net, 224)
    assert encoder.dropped == [("head (2 tensors)", "a classifier on the pooled feature, no part of the encoder")]


def test_the_norm_that_fcmae_lacks_is_added_and_said(tmp_path):
    encoder = load(written(tmp_path, CONV_FILES["ConvNeXt-V2 FCMAE"]().values))
    assert sum("no norm on the pooled feature" in warning for warning in encoder.warnings) == 1
    assert encoder.backbone.head.norm.weight.eq(1).all() and encoder.backbone.head.norm.bias.eq(0).all()


def _pixels(origin: str, arch: str) -> Preprocessing:
    layout = next(row for row in CONVOLUTIONAL if row.origin == origin)
    return _of_layout(layout, TimmNetwork(arch))


def test_an_efficientnets_pixels_follow_its_size():
    """lukemelas' evaluate at the resolutions of the paper, resized to them without a margin."""
    sides = {"b0": 224, "b1": 240, "b2": 260, "b3": 300, "b4": 380, "b5": 456, "b6": 528, "b7": 600, "b8": 672}
    for name, side in (sides | {"l2": 800}).items():
        pixels = _pixels("EfficientNet-PyTorch", f"tf_efficientnet_{name}")
        assert (pixels.size, pixels.resize, pixels.interpolation) == (side, side, "bicubic"), name


OF_TORCHVISION = {f"efficientnet_b{i}": ("torchvision EfficientNet", f"efficientnet_b{i}") for i in range(8)}
OF_TORCHVISION |= {f"efficientnet_v2_{x}": ("torchvision EfficientNet", f"efficientnetv2_{x}") for x in "sml"}
OF_TORCHVISION |= {
    f"convnext_{x}": ("torchvision ConvNeXt", f"convnext_{x}") for x in ("tiny", "small", "base", "large")
}
OF_TORCHVISION |= {
    f"swin_{x[0]}": ("torchvision Swin", f"swin_{x}_patch4_window7_224") for x in ("tiny", "small", "base")
}
OF_TORCHVISION |= {"densenet121": ("torchvision DenseNet", "densenet121")}
OF_TORCHVISION |= {"regnet_y_400mf": ("torchvision RegNet", "regnety_004")}


@pytest.mark.parametrize("name", OF_TORCHVISION)
def test_torchvisions_pixels_are_those_of_its_first_weights(name):
    theirs = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].transforms()
    pixels = _pixels(*OF_TORCHVISION[name])
    assert ([pixels.size], [pixels.resize]) == (theirs.crop_size, theirs.resize_size)
    assert (list(pixels.mean), list(pixels.std)) == (list(theirs.mean), list(theirs.std))
    assert pixels.interpolation == theirs.interpolation.value


def test_pixels_of_chest_x_rays(tmp_path):
    """MoCo-CXR's own mean and deviation, at 320 pixels."""
    pixels = load(written(tmp_path, CONV_FILES["MoCo-CXR"]().values)).preprocessing
    assert pixels == Preprocessing(320, 320, (0.502,) * 3, (0.085585,) * 3)


def test_efficientnets_trained_with_advprop(tmp_path):
    """No tensor tells them; the warning names the pixels, which settle it."""
    path = written(tmp_path, CONV_FILES["EfficientNet-PyTorch"]().values)
    assert load(path).warnings[0].endswith("ImageNet's were taken: --pixels mean=0.5,std=0.5")
    settled = load(path, pixels={"mean": (0.5,) * 3, "std": (0.5,) * 3})
    assert settled.warnings == [] and settled.preprocessing.size == 224
