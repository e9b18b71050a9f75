"""The index of timm's zoo against the timm that is installed, and what its digests see and do not see."""

import re
import runpy
from importlib.resources import files
from pathlib import Path

import pytest
import timm
import torch

from moco_eval.encoders import timm_index

TOOL = Path(__file__).parents[2] / "tools" / "index_timm.py"
SAMPLE = ("convnextv2_atto", "swin_tiny_patch4_window7_224", "tf_efficientnet_lite0", "regnety_004", "densenet121")
SAMPLE += ("levit_128s", "resnet50d", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "tinynet_e")


def shapes(name: str, **given) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        net = timm.create_model(name, pretrained=False, **given)
    return {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}


def test_the_index_is_of_the_installed_timm():
    """A sample, rebuilt as the tool does it; after an upgrade of timm, run tools/index_timm.py again."""
    written = re.match(r"# timm (\S+), (\d+) networks", (files("moco_eval.encoders") / "timm_index.txt").read_text())
    rows = {row.name: row for row in timm_index.rows()}
    assert int(written[2]) == len(rows) > 1300
    for line in runpy.run_path(str(TOOL))["index"](SAMPLE):
        loose, exact, modules, _, name = line.split()
        assert (rows[name].loose, rows[name].exact, rows[name].modules) == (loose, exact, modules), name


@pytest.mark.slow
def test_the_whole_index():
    if timm.__version__ != "1.0.31":
        pytest.skip(f"timm is {timm.__version__}, and the index of 1.0.31")
    written = (files("moco_eval.encoders") / "timm_index.txt").read_text().splitlines()[1:]
    assert runpy.run_path(str(TOOL))["index"](timm.list_models()) == written


@pytest.mark.parametrize("name", SAMPLE)
def test_a_network_is_found_with_its_classifier(name):
    found = timm_index.candidates(shapes(name))
    assert name in found or timm_index.candidates(shapes(name), re.escape(name)) == [name]


def test_networks_that_compute_otherwise_stand_apart():
    """TensorFlow's padding and epsilon, and blurred pooling, which no tensor tells."""
    lite = shapes("efficientnet_lite0")
    assert timm_index.candidates(lite) == ["efficientnet_lite0", "tf_efficientnet_lite0"]
    assert timm_index.candidates(lite, "^tf_") == ["tf_efficientnet_lite0"]
    assert timm_index.candidates(shapes("resnet18")) == ["resnet18", "resnetblur18"]


def test_networks_that_compute_the_same_are_one():
    """XCiT's positions are computed: its networks for 224 and 384 pixels are one."""
    assert len(timm_index.candidates(shapes("xcit_nano_12_p16_384"))) == 1


def test_the_image_size_does_not_matter_where_there_is_no_other():
    small = shapes("swin_tiny_patch4_window7_224", img_size=128, window_size=4)
    assert timm_index.candidates(small, "window7") == ["swin_tiny_patch4_window7_224"]
    larger = shapes("vit_base_patch16_224", img_size=384)
    assert "vit_base_patch16_384" in timm_index.candidates(larger)
    assert not any(name.endswith("_224") for name in timm_index.candidates(larger))


@pytest.mark.parametrize("change", ["missing", "further", "misshapen"])
def test_other_tensors_are_no_networks(change):
    tensors = shapes("convnextv2_atto")
    if change == "missing":
        del tensors["stages.1.blocks.0.conv_dw.weight"]
    else:
        tensors["stages.1.blocks.0.conv_dw.weight" if change == "misshapen" else "stages.1.blocks.0.conv_dw.extra"] = (
            7,
            7,
        )
    assert timm_index.candidates(tensors) == []
    assert "convnextv2_atto" in timm_index.nearest(tensors)


def test_a_mistyped_name():
    assert "Did you mean convnext_tiny" in timm_index.near("convnex_tiny")
    assert timm_index.near("zzzz") == " timm.list_models() lists all that there are."
