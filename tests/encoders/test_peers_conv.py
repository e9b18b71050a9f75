"""Convolutional and hierarchical networks against the libraries: random weights, saved as each library saves them.

The pooled feature and the stages agree within 1e-5 of the largest value.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torchvision
from checkpoints import error, used
from torch import Tensor, nn

from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.load import load

pytestmark = pytest.mark.peers


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def require_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, float(theirs.abs().max()))


def random(net: nn.Module) -> nn.Module:
    """LayerScale and the scales of global response drawn too, which are otherwise next to nothing."""
    torch.manual_seed(0)
    for name, parameter in used(net, 0).named_parameters():
        if name.endswith(("layer_scale_parameter", "layer_scale", "gamma")) or ".grn." in name:
            nn.init.normal_(parameter, std=0.5)
    return net.eval()


@torch.no_grad()
def require_same(encoder: Encoder, pooled: Tensor, stages: Sequence[Tensor], size: int) -> None:
    """The pooled feature, and the maps of the last stages in their order."""
    outputs = encoder.network.outputs(images(size), [stage.name for stage in encoder.network.stages[-len(stages) :]])
    require_close(encoder.backbone(images(size)), pooled)
    require_close(outputs.pooled, pooled)
    for ours, theirs in zip(outputs.maps.values(), stages, strict=True):
        require_close(ours, theirs)


# transformers


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[peers]')")


def both_ways(net: nn.Module, folder: Path) -> list[Path]:
    """As save_pretrained writes it, and as torch.save of what is in memory does."""
    net.save_pretrained(folder / "hub")
    (folder / "hub" / "config.json").rename(folder / "config.aside")
    torch.save(net.state_dict(), folder / "memory.bin")
    return [folder / "hub" / "model.safetensors", folder / "memory.bin"]


ATTO = {"depths": [2, 2, 6, 2], "hidden_sizes": [40, 80, 160, 320]}
TINY = {"depths": [3, 3, 9, 3], "hidden_sizes": [96, 192, 384, 768]}
CONVNEXTS = {
    "ConvNext": (ATTO, "timm:convnext_atto", "Hugging Face ConvNeXt"),
    "ConvNextV2": (ATTO, "timm:convnextv2_atto", "Hugging Face ConvNeXt"),
    "DINOv3ConvNext": (TINY, "timm:convnext_tiny", "Hugging Face DINOv3 ConvNeXt"),
}


@pytest.mark.parametrize("kind", CONVNEXTS)
@torch.no_grad()
def test_hugging_faces_convnexts(transformers, kind, tmp_path):
    shape, arch, origin = CONVNEXTS[kind]
    net = random(getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**shape)))
    outputs = net(images(64), output_hidden_states=True)
    for path in both_ways(net, tmp_path):
        encoder = load(str(path))
        assert (encoder.arch, encoder.origin) == (arch, origin)
        require_same(encoder, outputs.pooler_output, outputs.hidden_states[-4:], 64)
        assert encoder.preprocessing.interpolation == "bicubic"


@pytest.mark.parametrize("kind", ["ConvNext", "ConvNextV2"])
@torch.no_grad()
def test_hugging_faces_convnext_with_a_classifier(transformers, kind, tmp_path):
    config = getattr(transformers, f"{kind}Config")(**ATTO, num_labels=5)
    net = random(getattr(transformers, f"{kind}ForImageClassification")(config))
    inner = next(net.children())
    for path in both_ways(net, tmp_path):
        encoder = load(str(path))
        require_close(encoder.backbone(images(64)), inner(images(64)).pooler_output)
        assert (
            "classifier (2 tensors)",
            "a classifier on the pooled feature, no part of the encoder",
        ) in encoder.dropped


@pytest.mark.parametrize(("size", "window"), [(224, 7), (192, 6)])
@torch.no_grad()
def test_hugging_faces_swin(transformers, size, window, tmp_path):
    net = random(transformers.SwinModel(transformers.SwinConfig(image_size=size, window_size=window)))
    outputs = net(images(size), output_hidden_states=True)
    for path in both_ways(net, tmp_path):
        encoder = load(str(path))
        assert encoder.origin == "Hugging Face Swin" and encoder.preprocessing.size == size
        require_close(encoder.backbone(images(size)), outputs.pooler_output)
        last = net.layernorm(encoder.network.maps(images(size), ["layers.3"])[0].flatten(2).transpose(1, 2))
        require_close(last, outputs.last_hidden_state)


@torch.no_grad()
def test_hugging_faces_masked_swin(transformers, tmp_path):
    config = transformers.SwinConfig(image_size=192, window_size=6, encoder_stride=32)
    net = random(transformers.SwinForMaskedImageModeling(config))
    for path in both_ways(net, tmp_path):
        encoder = load(str(path))
        require_close(encoder.backbone(images(192)), net.swin(images(192)).last_hidden_state.mean(dim=1))
        assert any(part.startswith("decoder, mask_token") for part, _ in encoder.dropped)


@pytest.mark.parametrize("kind", ["RegNet", "EfficientNet"])
def test_hugging_faces_networks_that_have_no_row(transformers, kind, tmp_path):
    """Refused in one line that names the file."""
    small = {"depths": [1, 1, 1, 1]} if kind == "RegNet" else {"num_block_repeats": [1] * 7}
    net = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**small))
    for path in both_ways(net, tmp_path):
        message = error(str(path))
        assert path.name in message and "incomplete" not in message


# torchvision


def _of_densenet(net: nn.Module, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    last = nn.functional.relu(net.features(x))
    return last.mean(dim=(2, 3)), [last]


def _of_regnet(net: nn.Module, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    maps = [net.stem(x)]
    for block in net.trunk_output:
        maps.append(block(maps[-1]))
    return net.avgpool(maps[-1]).flatten(1), maps[1:]


def _of_efficientnet(net: nn.Module, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    return net.avgpool(net.features(x)).flatten(1), []


def _of_swin(net: nn.Module, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    maps = [net.features[0](x)]
    for part in net.features[1:]:
        maps.append(part(maps[-1]))
    pooled = net.flatten(net.avgpool(net.permute(net.norm(maps[-1]))))
    return pooled, [maps[i].permute(0, 3, 1, 2) for i in (1, 3, 5, 7)]


def _of_convnext(net: nn.Module, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    maps = [x]
    for part in net.features:
        maps.append(part(maps[-1]))
    return net.classifier[1](net.classifier[0](net.avgpool(maps[-1]))), [maps[i] for i in (2, 4, 6, 8)]


def _of_vit(net: nn.Module, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    net.heads = nn.Identity()
    return net(x), []


TORCHVISION = {
    "densenet121": (_of_densenet, 64),
    "regnet_y_400mf": (_of_regnet, 64),
    "regnet_x_800mf": (_of_regnet, 64),
    "efficientnet_b0": (_of_efficientnet, 64),
    "efficientnet_b5": (_of_efficientnet, 64),
    "efficientnet_v2_s": (_of_efficientnet, 64),
    "swin_t": (_of_swin, 224),
    "convnext_tiny": (_of_convnext, 64),
    "vit_b_16": (_of_vit, 224),
}


@pytest.mark.parametrize("name", TORCHVISION)
@torch.no_grad()
def test_torchvisions_networks(name, tmp_path):
    features, size = TORCHVISION[name]
    net = random(torchvision.models.get_model(name, weights=None))
    torch.save(net.state_dict(), tmp_path / "x.pth")
    encoder = load(str(tmp_path / "x.pth"))
    assert encoder.origin.startswith("torchvision")
    pooled, stages = features(net, images(size))
    require_same(encoder, pooled, stages, size) if stages else require_close(encoder.backbone(images(size)), pooled)
