"""Networks of timm's and torchvision's that are no ResNets: the libraries' own networks give the same features."""

import pytest
import timm
import torch
import torchvision
from checkpoints import error, used, written
from safetensors.torch import save_file
from torch import Tensor, nn

from moco_eval.encoders import libraries
from moco_eval.encoders.load import load


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
    "regnet_x_400mf": ("timm:regnetx_004", 64),
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
    assert "torchvision:squeezenet1_0 is no network that is built here; moco_eval.wrap" in error(
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
        "timm:efficientnet_lite0 and timm:tf_efficientnet_lite0 have these tensors and compute differently" in message
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
