"""One battery over every layout: whole, and with one thing wrong at a time; the right verdict each time."""

from pathlib import Path

import checkpoints
import pytest
import torch
from checkpoints import VIT, File, as_arrays, body, error, written
from checkpoints_conv import CONV_FILES, PLACES, WIDTHS

from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.layouts import LAYOUTS
from moco_eval.encoders.layouts_vit import TRANSFORMERS_OF_METHODS
from moco_eval.encoders.load import load
from moco_eval.untrusted import pickle_read

FILES = checkpoints.FILES | CONV_FILES
DIM = checkpoints.DIM | WIDTHS
THREE = (
    "moco v2",
    "dino ViT",
    "detectron2 backbone",
    "EfficientNet-Lite",
)  # a ResNet, a transformer, other names, timm's
layouts = pytest.mark.parametrize("layout", FILES)
# What is wrong is found after the names have been translated: it looks the same in every layout.
three_layouts = pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if name in THREE else pytest.mark.slow) for name in FILES]
)


# Code bases that leave a small ViT's number of heads open
OPEN = ("timm ViT", "torchvision ViT", "Hugging Face ViT", "OpenMMLab ViT backbone")

# The battery: layouts x states. The query encoder is asked for, so that DINO's student stands for it too.


def loaded(file: File, folder: Path, **given) -> Encoder:
    return load(written(folder, file.values), **{"encoder": "query", **file.given, **given})


def refused(file: File, folder: Path) -> str:
    return error(written(folder, file.values), **{"encoder": "query", **file.given})


def places(file: File) -> tuple[str, str]:
    """A kernel and a shift of its network, by our names."""
    plain = ("layer3.0.conv1.weight", "layer2.1.bn1.bias")
    return PLACES.get(file.built) or (
        ("blocks.1.mlp.fc1.weight", "blocks.1.norm2.bias") if file.built == VIT else plain
    )


def a_kernel(file: File) -> str:
    """The name in the file of a weight in the middle of the network."""
    return file.name(places(file)[0])


def a_scale(file: File) -> str:
    return file.name(places(file)[1])


@layouts
def test_every_layout_loads_to_the_last_bit(layout, tmp_path):
    """And what its layout leaves open is said, and nothing else."""
    file = FILES[layout]()
    before = torch.random.get_rng_state()
    encoder = loaded(file, tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())
    assert encoder.origin == file.origin
    said = 2 * (layout == "detectron2 MSRA")
    said += 2 * (file.built == VIT and file.origin in OPEN)  # its heads and its pixels
    said += file.origin == "Hugging Face ResNet"  # strides and pixels, without its settings
    said += layout in ("EfficientNet-PyTorch", "ConvNeXt-V2 FCMAE", "ConvNeXt-V2 FCMAE dense")  # AdvProp; a norm added
    assert len(encoder.warnings) == said, encoder.warnings
    expected = body(0, file.built)
    assert encoder.feature_dim == DIM[file.built]
    assert encoder.arch == (file.arch or (file.built if layout != "detectron2 MSRA" else encoder.arch))
    arrived = encoder.backbone.state_dict()
    assert arrived.keys() == expected.keys()
    for name, tensor in expected.items():
        if "FCMAE" in layout and name.startswith("head.norm."):
            assert torch.equal(arrived[name], torch.full_like(tensor, float(name.endswith("weight"))))
        elif layout == "detectron2 MSRA" and ("running" in name or "batches" in name):
            assert torch.equal(arrived[name], torch.ones_like(tensor) if "var" in name else torch.zeros_like(tensor))
        else:
            assert torch.equal(arrived[name], tensor), name
    assert not encoder.backbone.training and encoder.usual == file.usual
    assert (encoder.head is None) == (file.head is None)
    if file.head is not None:
        features = torch.randn(2, DIM[file.built])
        assert torch.equal(encoder.head(features), file.head.eval()(features))


@three_layouts
def test_one_tensor_missing(layout, tmp_path):
    file = FILES[layout]()
    del file.tensors()[a_scale(file)]
    message = refused(file, tmp_path)
    count = len(body(0, file.built))
    assert f"of the {count} backbone tensors of {file.arch or file.built}, 1 are missing" in message
    assert places(file)[1] in message


@three_layouts
def test_one_tensor_of_another_shape(layout, tmp_path):
    file = FILES[layout]()
    kernel = file.tensors()[a_kernel(file)]
    file.tensors()[a_kernel(file)] = kernel[:-1].clone()
    message = refused(file, tmp_path)
    there, wanted = ("x".join(map(str, shape)) for shape in (kernel[:-1].shape, kernel.shape))
    assert f"1 have another shape (first: {a_name(file)}, {there}, expected {wanted})" in message


def a_name(file: File) -> str:
    return places(file)[0]


@layouts
def test_one_tensor_too_many(layout, tmp_path):
    file = FILES[layout]()
    file.tensors()[a_kernel(file).replace("weight", "extra")] = torch.zeros(3)
    if a_kernel(file).endswith("_w"):
        file.tensors()["res4_0_branch2a_q"] = torch.zeros(3)
    assert "1 are unexpected" in refused(file, tmp_path)


@layouts
def test_a_tensor_that_belongs_to_no_part(layout, tmp_path):
    file = FILES[layout]()
    file.tensors()["surprise.weight"] = torch.zeros(3)
    if layout in ("unknown prefix", "LightningModule", "vicreg"):
        left = {what.partition(" (")[0]: why for what, why in loaded(file, tmp_path).dropped}
        assert left["other tensors"] == "they stand outside the backbone's prefix"
    else:
        message = refused(file, tmp_path)
        assert "surprise.weight" in message or "no layout we know" in message


@three_layouts
def test_one_tensor_of_another_dtype(layout, tmp_path):
    file = FILES[layout]()
    file.tensors()[a_scale(file)] = torch.zeros(len(file.tensors()[a_scale(file)]), dtype=torch.int32)
    assert "1 have another dtype (first: " in refused(file, tmp_path)


@three_layouts
def test_a_value_that_is_not_finite(layout, tmp_path):
    file = FILES[layout]()
    file.tensors()[a_scale(file)][3] = float("nan")
    assert "has 1 values that are not finite, of " in refused(file, tmp_path)


@layouts
def test_the_key_encoder(layout, tmp_path):
    file = FILES[layout]()
    path = written(tmp_path, file.values)
    if file.other is None:
        assert "encoder" in error(path, encoder="key")
        return
    key = load(path, encoder="key", **file.given)
    expected = body(1, file.built)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in key.backbone.state_dict().items())
    assert key.run_name == ("encoder-key" if file.usual == "query" else "encoder") and key.which == "key"
    assert any(what.startswith("query encoder (") for what, _ in key.dropped)
    assert bool(key.deviations()) == (file.usual == "query")


@layouts
def test_only_the_key_encoder(layout, tmp_path):
    file = FILES[layout]()
    if file.other is None:
        return
    tensors = file.tensors()
    for name in [name for name in tensors if name.startswith(file.prefix)]:
        del tensors[name]
    if layout == "OpenSelfSup":
        for name in [name for name in tensors if name.startswith(("encoder_q", "backbone"))]:
            del tensors[name]
    path = written(tmp_path, file.values)
    assert "only the key encoder is in this file: --encoder key" in error(path, encoder="query")
    expected = body(1, file.built)
    key = load(path, encoder="key", **file.given)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in key.backbone.state_dict().items())


@layouts
def test_heads_alone(layout, tmp_path):
    """A file without any backbone is refused, whatever stands on it."""
    file = FILES[layout]()
    for prefix in filter(None, (file.prefix, file.other)):
        for tensors in every_dict(file.values):
            for name in [name for name in tensors if str(name).startswith(prefix)]:
                del tensors[name]
    if file.prefix == "" or layout.startswith("OpenSelfSup") or "byol" in layout:
        return  # nothing or an alias is left
    message = error(written(tmp_path, file.values))
    assert any(words in message for words in ("no backbone", "holds no tensors", "no layout we know", "only a"))


def every_dict(values: dict) -> list[dict]:
    return [values, *(inner for value in values.values() if isinstance(value, dict) for inner in every_dict(value))]


@pytest.mark.parametrize(
    "layout", ["moco v2", "dino ViT", "vissl", "detectron2 backbone", "detectron2 MSRA", "timm ViT"]
)
def test_the_container_does_not_matter(layout, tmp_path):
    """Arrays in a .pkl, as detectron2 writes them."""
    file = FILES[layout]()
    expected = loaded(file, tmp_path)
    pickle_read.write(tmp_path / "encoder.pkl", as_arrays(file.values))
    again = load(str(tmp_path / "encoder.pkl"), encoder="query")
    assert (again.origin, again.arch) == (expected.origin, expected.arch)
    theirs = again.backbone.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in expected.backbone.state_dict().items())


def test_no_layout_is_left_out():
    """Our own safetensors are in test_export.py, the refused one in test_encoders.py, others in test_vit_layouts.py."""
    elsewhere = {
        "moco-eval safetensors",
        "lightly's own CIFAR ResNet",
        "kuangliu/pytorch-cifar",  # here in its 'net'
        *("moco-eval, MoCo v3 ViT", "moco-eval, MoCo v3 ResNet"),  # test_moco_v3.py
        *(row.origin for row in TRANSFORMERS_OF_METHODS),
    }
    assert {make().origin for make in FILES.values()} >= {row.origin for row in LAYOUTS} - elsewhere
