"""Settings beside a checkpoint: of this network they count, of another they are left aside; what is assumed is said."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import ARCH, FILES, VIT, body, detectron2, error, hf_resnet, linear, mlp, under, written

from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.load import load
from moco_eval.preprocessing import Preprocessing

BERT = {"model_type": "bert", "num_attention_heads": 12, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
CLIP = {"model_type": "clip", "num_attention_heads": 12, "layer_norm_eps": 1e-5}
PIXELS = {"input_size": [3, 384, 384], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}
OTHER_TIMM = {"architecture": "vit_base_patch16_384", "pretrained_cfg": PIXELS}
HALVES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 224}}


def beside(folder: Path, state: dict, **files: dict) -> str:
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return written(folder, state)


def hf_vit() -> dict:
    return FILES["Hugging Face ViT"]().values


def computes_the_same(encoder: Encoder, other: Encoder) -> bool:
    images = torch.randn(1, 3, 32, 32)
    return torch.equal(encoder.backbone(images), other.backbone(images))


@pytest.mark.parametrize(
    "config",
    [
        BERT,
        CLIP,
        OTHER_TIMM,
        {"model_type": "resnet", "depths": [3, 4, 6, 3]},
        {"model_type": "vit", "hidden_size": 768},
    ],
)
@pytest.mark.parametrize("arch", [ARCH, VIT])
def test_settings_of_another_network_are_left_aside(config, arch, tmp_path):
    """Same heads, epsilon and pixels as without the file, and one more warning, which names it."""
    (tmp_path / "alone").mkdir()
    alone = load(written(tmp_path / "alone", body(0, arch)))
    encoder = load(beside(tmp_path, body(0, arch), config=config))
    assert (encoder.arch, encoder.norm_eps, encoder.preprocessing) == (alone.arch, None, alone.preprocessing)
    assert computes_the_same(encoder, alone) and encoder.settings is None
    assert len(encoder.warnings) == len(alone.warnings) + 1
    assert encoder.warnings[0].startswith("config.json beside it is of a") and "it was ignored" in encoder.warnings[0]


@pytest.mark.parametrize(
    ("arch", "layout", "wrong"),
    [
        (ARCH, hf_resnet, {"layer_type": "bottleneck"}),
        (ARCH, hf_resnet, {"hidden_sizes": [64, 128, 256, 512]}),
        (ARCH, hf_resnet, {"embedding_size": 64}),
        (VIT, None, {"num_hidden_layers": 12}),
        (VIT, None, {"patch_size": 32}),
        (VIT, None, {"image_size": 224}),
        (VIT, None, {"intermediate_size": 96}),
    ],
)
def test_depths_and_widths_are_held_against_the_tensors(arch, layout, wrong, tmp_path):
    kind = "vit" if arch == VIT else "resnet"
    state = hf_vit() if arch == VIT else under("", body(0, arch), layout)
    config = {"model_type": kind, "num_attention_heads": 12} | wrong
    encoder = load(beside(tmp_path, state, config=config, preprocessor_config=HALVES))
    assert encoder.arch == arch and encoder.settings is None
    assert next(iter(wrong)) in encoder.warnings[0] and encoder.warnings[1].startswith(
        "preprocessor_config.json beside"
    )


def test_settings_of_this_network_count(tmp_path):
    config = {
        "model_type": "vit_msn",
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "patch_size": 16,
        "image_size": [32, 32],
    }
    config |= {"intermediate_size": 192, "num_attention_heads": 12, "layer_norm_eps": 1e-6}
    pixels = {
        "image_mean": [0.4] * 3,
        "image_std": [0.2] * 3,
        "size": 32,
        "image_processor_type": "ViTImageProcessorFast",
    }
    encoder = load(beside(tmp_path, hf_vit(), config=config, preprocessor_config=pixels))
    assert (encoder.arch, encoder.norm_eps, encoder.warnings) == ("vit_narrow_12h_patch16_32", 1e-6, [])
    assert encoder.preprocessing == Preprocessing(32, 32, (0.4,) * 3, (0.2,) * 3, squash=True)


def test_pixels_of_another_kind_of_model_are_left_aside(tmp_path):
    encoder = load(
        beside(tmp_path, body(0), preprocessor_config=HALVES | {"image_processor_type": "CLIPImageProcessor"})
    )
    assert encoder.preprocessing == Preprocessing()
    assert encoder.warnings == [
        f"preprocessor_config.json beside it is a CLIPImageProcessor's, and this a {ARCH}: it was ignored"
    ]


def test_timms_settings(tmp_path):
    """A crop_pct of null is timm's default; resnetblur18 has resnet18's tensors and computes something else."""
    usual = {"input_size": [3, 224, 224], "mean": [0.1] * 3, "std": [0.2] * 3, "crop_pct": None}
    state = body(0, "resnet18")
    encoder = load(beside(tmp_path, state, config={"architecture": "resnet18.a1_in1k", "pretrained_cfg": usual}))
    expected = Preprocessing(224, 256, (0.1,) * 3, (0.2,) * 3, interpolation="bicubic")
    assert encoder.preprocessing == expected and not encoder.warnings
    blurred = load(beside(tmp_path, state, config={"architecture": "resnetblur18", "pretrained_cfg": usual}))
    assert blurred.warnings == ["config.json says that it is a resnetblur18; its tensors look like resnet18"]
    dilated = {"architecture": "resnet18", "pretrained_cfg": usual, "model_args": {"output_stride": 8}}
    assert "config.json: says output_stride: 8, which no network built here has" in error(
        beside(tmp_path, state, config=dilated)
    )


def test_timms_architecture_tells_the_heads(tmp_path):
    pixels = {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3}
    state = body(0, "vit_tiny_patch16_224")
    encoder = load(beside(tmp_path, state, config={"architecture": "vit_tiny_patch16_224", "pretrained_cfg": pixels}))
    assert encoder.arch == "vit_tiny_patch16_224" and not encoder.warnings
    assert "heads" in load(beside(tmp_path, state, config={"pretrained_cfg": pixels})).warnings[0]


@pytest.mark.parametrize(
    "config",
    [{"model_type": "vit", "image_size": [16, 64]}, {"pretrained_cfg": PIXELS | {"input_size": [3, 16, 64]}}],
)
def test_oblong_images_are_refused(config, tmp_path):
    """A 1x4 grid of patches has as many positions as a 2x2 one."""
    state = body(0, VIT) if "pretrained_cfg" in config else hf_vit()
    message = error(beside(tmp_path, state, config=config))
    assert "square" in message and message.endswith("build yours and give it to moco_eval.wrap")
    assert "move it away" not in message


def test_that_a_vits_images_are_square_is_assumed_in_words(tmp_path):
    assert "nor that its images are square" in load(written(tmp_path, body(0, VIT))).warnings[0]


def test_refused_settings_are_not_to_be_moved_away(tmp_path):
    """Without the file another network would be loaded."""
    config = {"model_type": "resnet", "downsample_in_first_stage": True}
    message = error(beside(tmp_path, under("", body(0), hf_resnet), config=config))
    assert "which no network built here has; without the file another network would be judged" in message


@pytest.mark.parametrize("layout", ["Hugging Face ResNet", "Hugging Face ViT"])
def test_hugging_faces_weights_without_settings(layout, tmp_path):
    said, *more = load(written(tmp_path, FILES[layout]().values)).warnings
    assert (
        len(more) == (layout == "Hugging Face ViT")
        and "were taken" in said
        and said.endswith("put its config.json and preprocessor_config.json beside it")
    )


def test_names_of_another_code_base_say_what_was_taken_of_it(tmp_path):
    full = under("backbone.", body(0, "resnet18_cifar")) | under("classifier.", linear(512).state_dict())
    full |= under("projector.", mlp(512).state_dict()) | under("predictor.", mlp(16).state_dict())
    (said,) = load(written(tmp_path, {"state_dict": full})).warnings
    assert "padding (2)" in said and said.endswith("--arch resnet18_cifar")
    assert not load(written(tmp_path, {"state_dict": full, "pytorch-lightning_version": "2.1"})).warnings


@pytest.mark.parametrize(
    ("extra", "values"),
    [
        ({"aux_classifier.0.weight": torch.zeros(2)}, {}),
        ({"decode_head.conv_seg.weight": torch.zeros(2)}, {}),
        ({"classifier.0.weight": torch.zeros(2, 2, 3, 3)}, {}),
        ({}, {"hyper_parameters": {"backbone": {"replace_stride_with_dilation": [False, True, True]}}}),
        ({}, {"config": {"model": {"dilations": (1, 1, 2, 4)}}}),
        ({}, {"args": {"output_stride": 8}}),
    ],
)
def test_what_looks_dilated_is_said(extra, values, tmp_path):
    (said,) = load(written(tmp_path, {"state_dict": under("backbone.", body(0)) | extra, **values})).warnings
    assert "dilated stages" in said and said.endswith("give it to moco_eval.wrap")
    even = {"config": {"dilations": (1, 1, 1, 1), "output_stride": 32, "replace_stride_with_dilation": [False] * 3}}
    assert not load(written(tmp_path, {"state_dict": under("backbone.", body(0)), **even})).warnings


@pytest.mark.parametrize("settings", [{"MODEL": {"RESNETS": {"DEPTH": 101}}}, {"wandb_version": 1}])
def test_another_detectors_settings(settings, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    state = under("backbone.bottom_up.", body(0, "resnet50"), detectron2)
    encoder = load(written(tmp_path, {"model": state, "iteration": 3}))
    assert encoder.settings is None and "RGB and the stride in the 3x3 were taken" in encoder.warnings[-1]
    assert ("config.yaml beside it is of a ResNet-101" in encoder.warnings[0]) == ("MODEL" in settings)
