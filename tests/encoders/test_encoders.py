"""Loading: every layout with every tensor in place, and each way in which one can be out of place."""

import importlib
import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import (
    ARCH,
    FILES,
    PREPROCESSING,
    VIT,
    body,
    error,
    linear,
    mlp,
    moco,
    network,
    ours,
    under,
    with_norms,
    written,
)
from commands import ROOT, error_line
from torch import nn

from moco_eval.encoders import infer, libraries
from moco_eval.encoders.architectures import ARCHITECTURES, architecture, build_backbone, build_resnet, names
from moco_eval.encoders.head import build_head
from moco_eval.encoders.infer import structure
from moco_eval.encoders.inspect import describe, format_description
from moco_eval.encoders.layouts import LAYOUTS
from moco_eval.encoders.load import load
from moco_eval.encoders.naming import run_name
from moco_eval.encoders.prove import prove
from moco_eval.encoders.recognise import MOMENTUM
from moco_eval.errors import InputError
from moco_eval.preprocessing import Preprocessing

# What is said beside


def moco_v1(**changes) -> dict:
    return {"epoch": 3, "state_dict": moco(linear) | under("module.", changes)}


def test_what_is_left_out_is_said(tmp_path):
    encoder = load(written(tmp_path, ours()))
    left = dict(encoder.dropped)
    assert {"queue", "queue_ptr", "optimizer", "step", "sampler", "unreadable", "rng"} <= left.keys()
    assert all(left.values()) and "key encoder (124 tensors)" in left
    assert encoder.preprocessing == Preprocessing.from_dict(PREPROCESSING)
    assert encoder.pretraining["protocol"] == "pretrain/moco-v2@1"
    assert load(written(tmp_path, moco_v1())).preprocessing == Preprocessing()


def test_a_memory_bank_has_slots_and_no_key_encoder(tmp_path):
    path = written(tmp_path, FILES["ours, memory bank"]().values)
    left = dict(load(path).dropped)
    assert left["bank"] == "the memory bank's slots" and not any("encoder" in what for what in left)
    assert error(path, encoder="key").endswith(
        "--encoder key: a memory bank has no key encoder, its keys are the bank's slots; take --encoder query"
    )
    official = written(tmp_path, moco_v1(bank=torch.zeros(3, 4)))
    assert "tensor bank belongs to no part of a checkpoint of facebookresearch/moco v1" in error(official)


def test_every_value_that_pretraining_writes_is_explained(tmp_path):
    reasons = dict(load(written(tmp_path, ours())).dropped)
    assert "not used by an evaluation" not in reasons.values()


def test_the_encoder_that_the_method_evaluates_is_the_default(tmp_path):
    """DINO's teacher, without a deviation; its student is one."""
    file = FILES["dino ViT"]()
    path = written(tmp_path, file.values)
    assert torch.equal(load(path).backbone.norm.bias, body(1, VIT)["norm.bias"])
    assert load(path).which == "key" and not load(path).deviations()
    assert load(path, encoder="query").deviations() == ["the query encoder instead of the key encoder"]


def test_heads_that_do_not_fit(tmp_path):
    values = FILES["moco v2"]().values
    values["state_dict"]["module.encoder_q.fc.0.weight"] = torch.zeros(128, 99)
    assert "layer 0 of the projection head takes 99 values and gets 128" in error(written(tmp_path, values))
    del values["state_dict"]["module.encoder_q.fc.0.weight"]
    assert "a layer that is neither linear nor a batch norm: bias 128" in error(written(tmp_path, values))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"weight": torch.zeros(3, 4), "bias": torch.zeros(2)}, "head's bias is 2 torch.float32, expected 3"),
        ({"0.weight": torch.zeros(3, 4), "2.weight": torch.zeros(5, 6)}, "layer 2 of the projection head takes 6"),
        ({"0.weight": torch.zeros(3, 4, 1, 1)}, "neither linear nor a batch norm: weight 3x4x1x1"),
        ({"fc0.weight": torch.zeros(3, 4)}, "neither linear nor a sequence of layers: fc0.weight"),
        ({"900000000.weight": torch.zeros(3, 4)}, "neither linear nor a sequence"),
        ({"0.running_mean": torch.zeros(4)}, "companions only: 0.running_var"),
        ({"weight": torch.zeros(3, 4).half()}, "head's weight is 3x4 torch.float16"),
        ({"weight": torch.full((3, 4), float("inf"))}, "the head's weight has 12 values that are not finite"),
    ],
)
def test_other_heads_are_refused(tensors, words):
    with pytest.raises(InputError) as caught:
        build_head("x.pth", tensors, 4)
    assert words in str(caught.value)


def test_old_files_without_batch_counts(tmp_path):
    state = {k: v for k, v in network(0).state_dict().items() if "num_batches_tracked" not in k}
    encoder = load(written(tmp_path, state))
    assert encoder.tensors_loaded == 100 and "num_batches_tracked is absent (20 counts" in encoder.warnings[0]


COUNTS = {
    "float": lambda count: count.float(),
    "half, run over": lambda count: (count + 10**6).half(),
    "int32": lambda count: count.int(),
    "shape (1,)": lambda count: count.reshape(1),
    "one left": lambda count: None,
}


@pytest.mark.parametrize("kind", COUNTS)
def test_batch_counts_of_another_kind_are_taken_with_one_warning(kind, tmp_path):
    """No forward pass reads them: the features are the same to the bit, of backbone and head."""
    plain = moco(with_norms)
    odd = {name: COUNTS[kind](t) if name.endswith("tracked") else t for name, t in plain.items()}
    odd["module.encoder_q.bn1.num_batches_tracked"] = torch.tensor(0)
    odd = {name: tensor for name, tensor in odd.items() if tensor is not None}
    encoder, same = (load(written(tmp_path, {"state_dict": state})) for state in (odd, plain))
    images = torch.randn(2, 3, 64, 64)
    features = same.backbone(images)
    assert torch.equal(encoder.backbone(images), features)
    assert torch.equal(encoder.head(features), same.head(features))
    assert len([words for words in encoder.warnings if words.startswith("num_batches_tracked, which no")]) == 1
    assert not same.warnings and encoder.backbone.bn1.num_batches_tracked.dtype == torch.int64


def test_batch_counts_that_are_none(tmp_path):
    state = network(0).state_dict() | {"bn1.num_batches_tracked": torch.zeros(3, dtype=torch.int64)}
    assert "1 have another shape (first: bn1.num_batches_tracked, 3" in error(written(tmp_path, state))


@pytest.mark.parametrize(
    "counts",
    [
        {
            "total_ops": torch.zeros(1).double(),
            "layer1.total_ops": torch.zeros(1),
            "layer1.total_params": torch.zeros(1),
        },
        {"n_averaged": torch.tensor(9)},
        {"num_updates": torch.tensor(9), "initted": torch.tensor(True)},
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "encoder_q."])
def test_counts_of_profilers_and_averagers_are_left_out(counts, prefix, tmp_path):
    (said,) = load(written(tmp_path, under(prefix, body(0)) | counts)).warnings
    assert all(name.rpartition(".")[2] in said for name in counts) and "that no forward pass reads" in said
    assert "unexpected" in error(written(tmp_path, body(0) | {"layer1.total_ops": torch.zeros(2)}))


def test_half_weights_are_cast_and_untrained_ones_doubted(tmp_path):
    half = {name: t.half() if t.is_floating_point() else t for name, t in network(0).state_dict().items()}
    encoder = load(written(tmp_path, half))
    assert "100 tensors are stored as float16" in encoder.warnings[0]
    assert encoder.backbone.conv1.weight.dtype == torch.float32
    fresh = load(written(tmp_path, build_resnet(ARCH).state_dict())).warnings
    assert "every BN running statistic is at its initial value" in fresh[0] and "look untrained" in fresh[1]
    frozen = network(0).state_dict()
    frozen |= {name: torch.zeros_like(t) for name, t in frozen.items() if "running_mean" in name}
    frozen |= {name: torch.ones_like(t) for name, t in frozen.items() if "running_var" in name}
    (only,) = load(written(tmp_path, frozen)).warnings
    assert "never saw data in train mode" in only
    zero_init = build_resnet(ARCH)
    for name, parameter in zero_init.named_parameters():
        if name.endswith("bn2.weight"):
            nn.init.zeros_(parameter)
    assert "look untrained" in load(written(tmp_path, used_statistics(zero_init))).warnings[0]
    vit = build_backbone(VIT).state_dict()
    assert "look untrained" in load(written(tmp_path, vit)).warnings[0]


def used_statistics(net: nn.Module) -> dict:
    return {name: t + 0.5 if "running" in name else t for name, t in net.state_dict().items()}


def test_a_negative_variance_is_said(tmp_path):
    state = network(0).state_dict()
    state["bn1.running_var"][0] = -1
    assert load(written(tmp_path, state)).warnings == [
        "a BN running variance is negative: the features will not be finite"
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("layer1.0.conv1.lora_A.weight", "holds LoRA adapters; merge them"),
        ("fc._packed_params._packed_params", "holds quantised weights"),
        ("layer1.0.conv1.weight_mask", "holds pruning masks"),
    ],
)
def test_altered_networks_are_named(name, words, tmp_path):
    assert words in error(written(tmp_path, body(0) | {name: torch.zeros(1)}))


def test_lightlys_own_resnet_is_refused_with_its_reason(tmp_path):
    state = {"backbone.0.weight": torch.zeros(64, 3, 3, 3), "backbone.3.0.shortcut.0.weight": torch.zeros(1)}
    assert "is lightly's own CIFAR ResNet: it has no ReLU after its first batch norm" in error(written(tmp_path, state))


def test_two_networks_of_equal_rank_are_not_guessed_between(tmp_path):
    state = under("left.", body(0)) | under("right.", body(1)) | {"t": torch.zeros(1)}
    message = error(written(tmp_path, state))
    assert "holds several networks, under 'left.', 'right.'; choose one: --key left" in message


@pytest.mark.parametrize("prefix", ["teacher.", "ema.net.", "momentum_encoder.", "model.k.", "target_net.", "x_k."])
def test_prefixes_that_speak_of_a_momentum_encoder(prefix):
    assert MOMENTUM.search(prefix)
    assert not any(MOMENTUM.search(other) for other in ("encoder.", "backbone.", "my.net.", "q.", "kernel.", "schema."))


def test_only_a_head_is_said(tmp_path):
    message = error(written(tmp_path, under("projector.", mlp(8).state_dict())))
    assert (
        "it is a projection head or classifier alone, and no backbone; give the checkpoint that holds the backbone"
        in message
    )


def exclude_bias_and_norm(parameter):
    """VICReg's optimiser refers to a function of this name."""
    return parameter.ndim == 1


def test_whole_networks_and_functions_beside_the_weights_are_passed_over(tmp_path, monkeypatch):
    values = FILES["vicreg"]().values | {"lightly_train": {"models": nn.Sequential(nn.Linear(2, 2), nn.ReLU())}}
    monkeypatch.setattr(exclude_bias_and_norm, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "exclude_bias_and_norm", exclude_bias_and_norm, raising=False)
    values["optimizer"] = {"param_groups": [{"lars_adaptation_filter": exclude_bias_and_norm}]}
    encoder = load(written(tmp_path, values))
    assert (
        encoder.tensors_loaded == 120 and dict(encoder.dropped)["lightly_train"] == "whole modules, which are not read"
    )


def test_a_whole_network_in_place_of_the_weights_is_refused(tmp_path):
    message = error(written(tmp_path, {"model": nn.Sequential(nn.Linear(2, 2)), "epoch": 3}))
    assert "holds no tensors, but a whole network as 'model', whose code we do not run" in message


# What the weights expect


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("moco v2", Preprocessing()),
        ("swav", Preprocessing(std=(0.228, 0.224, 0.225))),
        ("moco-v3 ViT", Preprocessing(32, 36)),
        ("Hugging Face ViT", Preprocessing(32, 32, (0.5,) * 3, (0.5,) * 3, squash=True)),
        ("dino ViT", Preprocessing(32, 36, interpolation="bicubic")),
        ("timm ViT", Preprocessing(32, 36, interpolation="bicubic")),
        ("torchvision ViT", Preprocessing(32, 36)),
        ("moco CIFAR-10 notebook", Preprocessing(32, 32, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))),
    ],
)
def test_layouts_say_what_their_weights_expect(layout, expected, tmp_path):
    assert load(written(tmp_path, FILES[layout]().values)).preprocessing == expected


def test_msra_weights_are_bgr_of_0_to_255_with_the_stride_in_the_first_convolution(tmp_path):
    from checkpoints import caffe2

    tensors = {n: t for n, t in body(0, "resnet50").items() if n.endswith(("weight", "bias"))}
    encoder = load(written(tmp_path, under("", tensors, caffe2)))
    assert encoder.arch == "resnet50_msra"
    pixels = encoder.preprocessing
    assert (pixels.channels, pixels.range, pixels.std) == ("BGR", 255, (1.0, 1.0, 1.0))
    assert pixels.mean == (103.53, 116.28, 123.675)
    block = encoder.backbone.layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((2, 2), (1, 1))
    assert not any("initial value" in words for words in encoder.warnings)


def test_a_cifar_stem_without_a_recipe_leaves_the_pixels_to_the_data(tmp_path):
    state = body(0, "resnet18_quarter_cifar")
    assert load(written(tmp_path, state)).preprocessing is None


def test_solo_learns_cifar_stem_pads_by_two(tmp_path):
    """Its 3x3 convolution has padding 2, which no shape tells."""
    state = under("backbone.", body(0, "resnet18_cifar")) | under("classifier.", linear(512).state_dict())
    (said,) = load(written(tmp_path, {"state_dict": state})).warnings  # anybody's, so far
    assert said.endswith("1 was taken. solo-learn's is 2: --arch resnet18_cifar_pad2")
    state |= under("projector.", mlp(512).state_dict())
    encoder = load(written(tmp_path, {"state_dict": state}))
    assert encoder.arch == "resnet18_cifar_pad2" and encoder.backbone.conv1.padding == (2, 2)
    assert encoder.preprocessing.std == (0.2470, 0.2435, 0.2616)


@pytest.mark.parametrize(
    ("name", "contents", "expected"),
    [
        (
            "preprocessor_config.json",
            {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "size": {"height": 224, "width": 224}},
            Preprocessing(224, 224, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), squash=True),
        ),
        (
            "preprocessor_config.json",
            {"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "size": {"shortest_edge": 224}, "crop_pct": 0.875},
            Preprocessing(224, 256, (0, 0, 0), (1, 1, 1)),
        ),
        (
            "preprocessor_config.json",
            {"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "size": 256, "do_center_crop": True, "crop_size": 224},
            Preprocessing(224, 256, (0, 0, 0), (1, 1, 1), squash=True),
        ),
        (
            "config.json",
            {"pretrained_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1], "input_size": [3, 224, 224], "crop_pct": 0.95}},
            Preprocessing(224, 235, (0, 0, 0), (1, 1, 1), interpolation="bicubic"),
        ),
        ("config.json", {"model_type": "resnet"}, Preprocessing()),
    ],
)
def test_a_file_of_settings_beside_the_weights(name, contents, expected, tmp_path):
    (tmp_path / name).write_text(json.dumps(contents))
    encoder = load(written(tmp_path, body(0)))
    assert encoder.preprocessing == expected
    assert encoder.origin.endswith(f"settings of {name}") == (expected != Preprocessing())
    assert load(written(tmp_path, moco_v1())).preprocessing == Preprocessing()  # its own code base says


@pytest.mark.parametrize(
    "contents", ['{"image_mean": [0, 0], "image_std": [1, 1, 1]}', "{", '{"image_mean": 3}', '{"image_mean": "abc"}']
)
def test_damaged_settings_beside_the_weights(contents, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(contents)
    assert "preprocessor_config.json" in error(written(tmp_path, body(0)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mean": [0.1, 0.2]}, "makes no sense"),
        ({"std": [0.1, 0.0, 0.3]}, "makes no sense"),
        ({"size": 10**9}, "makes no sense"),
        ({"channels": "HSV"}, "makes no sense"),
        ({"range": 65535}, "pixels of 0..65535"),
        ({"mean": None}, "damaged"),
        ({"colour": 1}, "damaged"),
    ],
)
def test_preprocessing_that_makes_no_sense(change, words, tmp_path):
    values = ours() | {"preprocessing": PREPROCESSING | change}
    assert words in error(written(tmp_path, values))


def test_heads_of_a_vit_are_said_to_be_open_until_arch_settles_them(tmp_path):
    path = written(tmp_path, body(0, VIT))
    said, _ = load(path).warnings
    assert said.endswith("--arch vit_narrow_12h_patch16_32")
    settled = load(path, arch="vit_narrow_12h_patch16_32")
    assert len(settled.warnings) == 1 and settled.backbone.blocks[0].attn.num_heads == 12
    image = torch.randn(1, 3, 32, 32)
    assert not torch.allclose(settled.backbone(image), load(path).backbone(image))


def test_hugging_faces_epsilon_travels(tmp_path):
    encoder = load(written(tmp_path, FILES["Hugging Face ViT"]().values))
    assert encoder.norm_eps == 1e-12 and encoder.backbone.norm.eps == encoder.backbone.blocks[1].norm2.eps == 1e-12


# Settings beside the checkpoint


def settled(folder: Path, layout: str, settings: dict, name: str = "config.json") -> str:
    """A layout's file with a file of settings beside it."""
    (folder / name).write_text(json.dumps(settings) if name.endswith("json") else yaml.safe_dump(settings))
    return written(folder, FILES[layout]().values)


def test_hugging_faces_settings_tell_heads_and_epsilon(tmp_path):
    path = settled(
        tmp_path, "Hugging Face ViT", {"model_type": "vit", "num_attention_heads": 12, "layer_norm_eps": 1e-6}
    )
    encoder = load(path)
    assert (encoder.arch, encoder.norm_eps, len(encoder.warnings)) == ("vit_narrow_12h_patch16_32", 1e-6, 1)
    assert encoder.settings == "config.json" and encoder.identity()["norm_eps"] == 1e-6
    three = settled(tmp_path, "Hugging Face ViT", {"model_type": "vit", "num_attention_heads": 3})
    assert load(three).arch == VIT and len(load(three).warnings) == 1  # its pixels
    six = settled(tmp_path, "Hugging Face ViT", {"model_type": "vit", "num_attention_heads": 6})
    assert "config.json says 6 heads, which no vit_narrow_patch16_32 built here has" in error(six)


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("Hugging Face ResNet", {"model_type": "resnet", "downsample_in_first_stage": True}),
        ("Hugging Face ResNet", {"model_type": "resnet", "hidden_act": "gelu"}),
        ("Hugging Face ViT", {"model_type": "vit", "hidden_act": "relu"}),
        ("Hugging Face ViT", {"model_type": "vit", "qkv_bias": False}),
    ],
)
def test_hugging_faces_settings_of_other_networks_are_refused(layout, settings, tmp_path):
    key = next(name for name in settings if name != "model_type")
    assert f"config.json: says {key}: {settings[key]!r}, which no network built here has" in error(
        settled(tmp_path, layout, settings)
    )


def test_hugging_faces_stride_in_the_first_convolution(tmp_path):
    from checkpoints import hf_resnet

    (tmp_path / "config.json").write_text('{"model_type": "resnet", "downsample_in_bottleneck": true}')
    encoder = load(written(tmp_path, under("", body(0, "resnet50"), hf_resnet)))
    assert encoder.arch == "resnet50_msra" and encoder.preprocessing == Preprocessing()


def detector(arch: str = "resnet50") -> dict:
    from checkpoints import detectron2

    return {"model": under("backbone.bottom_up.", body(0, arch), detectron2), "iteration": 3}


@pytest.mark.slow
def test_detectors_do_not_say_their_strides_unless_their_settings_do(tmp_path):
    (said,) = load(written(tmp_path, detector())).warnings
    assert "RGB and the stride in the 3x3 were taken" in said and "--arch resnet50_msra" in said
    assert not load(written(tmp_path, detector()), arch="resnet50").warnings
    assert load(written(tmp_path, detector()), arch="resnet50_msra").preprocessing.channels == "BGR"
    settings = {
        "MODEL": {"PIXEL_MEAN": [1.5, 2, 3], "PIXEL_STD": [1, 1, 1], "RESNETS": {"STRIDE_IN_1X1": True}},
        "INPUT": {"FORMAT": "BGR"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    encoder = load(written(tmp_path, detector()))
    assert (encoder.arch, encoder.warnings) == ("resnet50_msra", [])
    assert encoder.preprocessing == Preprocessing(224, 256, (1.5, 2, 3), (1, 1, 1), "BGR", 255)
    (tmp_path / "config.yaml").write_text("MODEL: [")
    assert "config.yaml: is not readable YAML" in error(written(tmp_path, detector()))


def test_settings_of_another_image_size_than_a_vits(tmp_path):
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 224, "width": 224}}
    path = settled(tmp_path, "Hugging Face ViT", settings, "preprocessor_config.json")
    assert "says images of 224 pixels, but the network takes 32" in error(path)


def test_a_vit_of_no_known_width_under_an_arch_that_was_asked_for(tmp_path):
    narrow = {name: tensor[..., :40].clone() for name, tensor in body(0, VIT).items()}
    assert "have another shape" in error(written(tmp_path, narrow), arch=VIT)
    wide = body(0, VIT) | {"patch_embed.proj.weight": torch.zeros(50, 3, 16, 16)}
    assert "The file holds a vision transformer" in error(written(tmp_path, wide), arch="vit_tiny_patch16_32")


def test_an_architecture_that_the_file_names_and_is_not(tmp_path):
    state = {"arch": "resnetblur18", "state_dict": body(0)}
    (said,) = load(written(tmp_path, state)).warnings
    assert said == "the file says that it is a resnetblur18; its tensors look like resnet18_quarter"
    assert not load(written(tmp_path, state | {"arch": "resnet18"})).warnings


@pytest.mark.parametrize("eps", ["abc", 1e3, -1.0, True])
def test_an_epsilon_is_taken_from_our_own_copies_alone(eps, tmp_path):
    encoder = load(written(tmp_path, {"state_dict": body(0, VIT), "norm_eps": eps}))
    assert encoder.norm_eps is None and encoder.backbone.norm.eps == 1e-6
    ours = {f"{name}": tensor for name, tensor in body(0, VIT).items()}
    values = ours | {"format": "moco-eval/1 safetensors", "arch": VIT, "norm_eps": eps}
    assert "epsilon" in error(written(tmp_path, values))


# Names made to mislead or to stall


@pytest.mark.parametrize("shared", ["teacher.", "model_ema.", "momentum_encoder.", "target_net.net."])
def test_a_momentum_network_alone_is_no_query_encoder(shared, tmp_path):
    path = written(tmp_path, under(shared, body(1)))
    assert "only the key encoder is in this file: --encoder key" in error(path)
    key = load(path, encoder="key")
    assert key.which == "key" and torch.equal(key.backbone.conv1.weight, body(1)["conv1.weight"])


@pytest.mark.parametrize("name", ["a\nb.weight", "a" * 400, "\x1b[2Jx", "." * 100_000])
def test_names_that_no_tensor_has(name, tmp_path):
    message = error(written(tmp_path, {"conv1.weight": torch.zeros(1), name: torch.zeros(1)}))
    assert "has a tensor named" in message and len(message) < 400 and message.isprintable()


@pytest.mark.parametrize(
    "names",
    [
        [f"a{i}.conv1.weight" for i in range(20_000)],
        [".".join(["a"] * 50) + f".{i}" for i in range(10_000)],
        [f"layer{i}.0.conv1.weight" for i in range(20_000)],
    ],
)
@pytest.mark.slow
def test_many_names_take_no_time(names, tmp_path):
    one = torch.zeros(1)
    path = written(tmp_path, dict.fromkeys(names, one))
    began = time.process_time()
    assert len(error(path)) < 1000
    assert time.process_time() - began < 20  # it was minutes when each name was held against each other


def test_shapes_without_a_meaning_are_refused_and_not_divided_by(tmp_path):
    state = body(0, "resnet50_quarter") | {"layer1.0.conv2.weight": torch.zeros(4, 64, 3, 3)}
    assert "another shape" in error(written(tmp_path, state))
    with pytest.raises(InputError, match="neither linear nor a sequence"):
        build_head("x", {"²": torch.zeros(2)}, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state | {"layer1.0.se.fc1.weight": torch.zeros(1)}, "with attention to channels"),
        (
            lambda state: {name: t for name, t in state.items() if "running" not in name and "batches" not in name},
            "norm layers without running statistics",
        ),
        (
            lambda state: {n.replace("downsample.", "shortcut.part"): t for n, t in state.items()},
            "shortcuts by another name",
        ),
    ],
)
def test_relatives_of_a_resnet_are_named(change, words, tmp_path):
    assert words in error(written(tmp_path, change(body(0))))


# Architectures


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_each_architecture_is_read_off_its_shapes(arch):
    with torch.device("meta"):
        tensors = build_backbone(arch).state_dict()
    expected = arch.replace("_pad2", "").replace("_msra", "")  # which no shape tells from these
    assert infer.infer("x", tensors) == expected and infer.nearest(tensors) == (expected, 1.0)
    for name in ("bn1.weight", "layer1.0.conv1.weight", "layer4.1.bn2.bias"):
        assert infer.infer("x", {key: tensor for key, tensor in tensors.items() if key != name}) == expected


@pytest.mark.parametrize(
    "arch",
    [
        pytest.param(name, marks=pytest.mark.slow if "large" in name or "huge" in name else ())
        for name in names()
        if "_patch16_" in name
    ],
)
def test_each_vit_is_read_off_its_shapes(arch):
    with torch.device("meta"):
        tensors = build_backbone(arch).state_dict()
    expected = arch.replace("_12h", "")
    assert infer.infer("x", tensors) == expected and infer.nearest(tensors)[1] == 1.0
    for name in ("cls_token", "blocks.1.norm1.weight", "norm.bias"):
        assert infer.infer("x", {key: tensor for key, tensor in tensors.items() if key != name}) == expected


@pytest.mark.parametrize(
    ("arch", "millions"),
    [
        ("vit_small_patch16_224", 21.7),
        ("vit_base_patch16_224", 85.8),
        pytest.param("vit_large_patch16_224", 303.3, marks=pytest.mark.slow),
    ],
)
def test_vits_have_the_papers_parameter_counts(arch, millions):
    """DeiT's and ViT's 22 M, 86 M and 307 M, less the classifier."""
    with torch.device("meta"):
        assert round(parameters(build_backbone(arch)) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocks.0.ls1.gamma": torch.zeros(48)}, "3 are missing (first: blocks.0.ls2.gamma, 48)"),
        ({"reg_token": torch.zeros(1, 4, 48)}, "with register tokens"),
        (
            {"pos_embed": torch.zeros(1, 6, 48)},
            "transformer of 2 blocks of 48 dimensions, patches of 16 pixels",
        ),
        ({"pos_embed": torch.zeros(1, 5, 40)}, "have another shape (first: pos_embed, 1x5x40, expected 1x5x48)"),
        ({"blocks.2.norm1.weight": torch.zeros(48)}, "depth=3,num_heads=3, 11 are missing (first: blocks.2.norm1.bias"),
    ],
)
def test_other_vits_are_described(change, words, tmp_path):
    assert words in error(written(tmp_path, body(0, VIT) | change))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit_small_patch16_225", "225 pixels (at most 1024) must divide into patches of 16"),
        ("vit_smal_patch16_224", "Did you mean 'vit_small_patch16_224'"),
        ("vit_base_patch0_224", "must divide"),
        ("vit_base_patch16_9984", "at most 1024"),
    ],
)
def test_names_of_vits_that_are_wrong(name, words):
    with pytest.raises(InputError) as caught:
        architecture(name)
    assert words in str(caught.value)


def parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize(
    ("arch", "published"), [("resnet50", 24), ("resnext50_32x8d", 46), ("resnet50_w2", 94), ("resnet50_w4", 375)]
)
def test_the_papers_feature_extractors_have_its_parameter_counts(arch, published):
    """MoCo v1, Table 1: millions, without the classifier."""
    with torch.device("meta"):
        assert round(parameters(build_backbone(arch)) / 1e6) == published


@pytest.mark.parametrize(
    "arch",
    ["resnet18", "resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2"],
)
def test_architectures_of_torchvisions_names_are_torchvisions(arch):
    import torchvision

    with torch.device("meta"):
        ours, theirs = build_resnet(arch), torchvision.models.get_model(arch)
    assert [(name, t.shape) for name, t in ours.state_dict().items()] == [
        (name, t.shape) for name, t in theirs.state_dict().items()
    ]


def test_rx50_is_twice_as_wide_as_torchvisions_resnext50():
    import torchvision

    with torch.device("meta"):
        rx50, narrow = build_resnet("resnext50_32x8d"), torchvision.models.resnext50_32x4d()
    assert parameters(rx50) == 48_021_800  # 46.0 M and the 1000-class fc
    assert infer.infer("x4d.pth", narrow.state_dict()) == "resnext50_32x4d"
    assert structure(rx50.state_dict()).count("256-512-1024-2048 channels wide in 32 groups") == 1


def test_a_resnext_loads_with_proof_and_a_wrong_arch_is_named():
    state = {k: v for k, v in network(0, "resnext50_32x8d").state_dict().items() if not k.startswith("fc.")}
    net = prove("rx50.pth", state, infer.infer("rx50.pth", state), [])
    assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 2048)
    with pytest.raises(InputError, match="This looks like resnext50_32x8d: try --arch resnext50_32x8d"):
        prove("rx50.pth", state, "resnet50", [])


def test_a_wrong_arch_names_the_right_one(tmp_path):
    path = written(tmp_path, network(0).state_dict())
    message = error(path, arch="resnet18_quarter_cifar")
    assert "1 have another shape (first: conv1.weight, 16x3x7x7, expected 16x3x3x3)" in message
    assert "This looks like resnet18_quarter: try --arch resnet18_quarter." in message
    cifar = written(tmp_path, network(0, "resnet18_quarter_cifar").state_dict())
    assert "looks like resnet18_quarter_cifar (CIFAR stem)" in error(cifar, arch=ARCH)
    assert "unknown architecture 'resnet19'. Did you mean" in error(path, arch="resnet19")


def test_a_resnet_that_is_not_built_is_described():
    from torchvision.models.resnet import Bottleneck, ResNet

    with torch.device("meta"):
        wide = ResNet(Bottleneck, [3, 4, 6, 3], width_per_group=256).state_dict()
    with pytest.raises(InputError, match="4 stages of 3-4-6-3 bottleneck blocks, 256-512-1024-2048 channels wide"):
        infer.infer("wide.pth", wide)


def test_a_full_resnet50_v2(tmp_path):
    torch.manual_seed(0)
    state = {f"module.encoder_q.{k}": v for k, v in network(0, "resnet50", "mlp", 128).state_dict().items()}
    encoder = load(written(tmp_path, {"epoch": 200, "arch": "resnet50", "state_dict": state}))
    assert (encoder.arch, encoder.tensors_loaded, encoder.feature_dim) == ("resnet50", 318, 2048)
    assert encoder.pretraining == {"epochs": 200}


# Names and other sources


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("moco_v2_r50.pth", "moco_v2_r50"),
        ("checkpoint_0199.pth.tar", "checkpoint_0199"),
        ("moco_v2_800ep.v1.2.pth", "moco_v2_800ep.v1.2"),
        ("runs/cifar/checkpoints/epoch_0012.pth", "cifar-epoch_0012"),
        ("my runs/a b/checkpoints/last.pth", "a_b-last"),
        ("../weird ü:*?.pt", "weird"),
        ("noext", "noext"),
    ],
)
def test_run_names(path, name):
    assert run_name(Path(path)) == name


def test_random_encoders_come_from_their_seed():
    first, same, other = load(f"random:{ARCH}"), load(f"random:{ARCH}"), load(f"random:{ARCH}", seed=1)
    assert first.sha256 == same.sha256 != other.sha256
    assert first.run_name == f"random-{ARCH}" and first.head is None and first.preprocessing is None
    torch.manual_seed(0)
    assert torch.equal(build_resnet(ARCH).conv1.weight, first.backbone.conv1.weight)


def test_pixels():
    encoder = load("pixels")
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(encoder.backbone(images), images.reshape(2, -1))
    assert (encoder.feature_dim, encoder.tensors_loaded, encoder.run_name) == (0, 0, "pixels")


def test_torchvision_weights(monkeypatch):
    from torchvision.models import ResNet18_Weights

    torch.manual_seed(0)
    state = build_resnet("resnet18").state_dict()
    monkeypatch.setattr(libraries, "unreachable", lambda _: None)
    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", lambda self, **_: dict(state))
    encoder = load("torchvision:resnet18:IMAGENET1K_V1")
    assert encoder.preprocessing == Preprocessing() and encoder.tensors_loaded == 120
    assert (
        encoder.run_name == "torchvision-resnet18-IMAGENET1K_V1"
        and encoder.sha256 == load("torchvision:resnet18").sha256
    )

    def offline(self, **_):
        raise OSError("Name or service not known")

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", offline)
    assert "without a network" in error("torchvision:resnet18")


@pytest.mark.parametrize(
    ("source", "given", "words"),
    [
        ("timm:vit_small_patch16", {}, "has no network 'vit_small_patch16'. Did you mean vit_small_patch"),
        ("timm:resnet18_no", {}, "has no network 'resnet18_no'. Did you mean "),
        ("zoo:moco_v2_80ep", {}, "Did you mean 'moco_v2_800ep'"),
        ("random:resnet51", {}, "Did you mean 'resnet50'"),
        ("random:", {}, "unknown architecture ''"),
        ("torchvision:resnet51", {}, "Did you mean 'resnet50'"),
        (
            "torchvision:resnext50_32x8d",
            {},
            "torchvision has no network 'resnext50_32x8d'. Did you mean 'resnext50_32x4d'",
        ),
        ("torchvision:resnext101_32x8d:IMAGENET1K_V9", {}, "Did you mean 'IMAGENET1K_V"),
        ("torchvision:resnet50:IMAGENET1K_V9", {}, "Did you mean 'IMAGENET1K_V"),
        (f"random:{ARCH}", {"encoder": "key"}, "has no key encoder"),
        ("pixels", {"arch": "resnet50"}, "contradicts pixels"),
        ("pixels", {"encoder": "keys"}, "must be query or key"),
    ],
)
def test_sources_that_are_wrong(source, given, words):
    assert words in error(source, **given)


# inspect


def test_inspect_describes(tmp_path):
    path = written(tmp_path, ours())
    facts = describe(path)
    assert facts["activations"]["sha256"] == describe(path)["activations"]["sha256"]
    assert facts["activations"]["sha256"] != describe(path, encoder="key")["activations"]["sha256"]
    assert facts["parameters"] == sum(p.numel() for p in build_backbone(ARCH).parameters())
    assert (facts["feature_dim"], facts["head"], facts["tensors_loaded"]) == (128, "128-128-16", 120)
    text = format_description(facts)
    for words in (
        "moco-eval",
        ARCH,
        "all 120 backbone tensors",
        "queue_ptr",
        "pretrain/moco-v2@1, on digits, 3 epochs",
    ):
        assert words in text
    assert "raw pixels" in format_description(describe("pixels"))


def test_the_inspect_command_fails_in_one_line(tmp_path, capfd, monkeypatch):
    path = Path(written(tmp_path, ours()))
    path.write_bytes(path.read_bytes()[:-5000])
    assert "is truncated" in error_line(capfd, monkeypatch, "inspect", path)


@pytest.mark.data
def test_every_checkpoint_of_the_shared_data(shared_data, tmp_path):
    path = shared_data / "checkpoints" / "resnet20-12fca82f.th"
    message = error(str(path))
    assert "3 stages of 3-3-3 basic blocks" in message and "shortcuts without parameters" in message
    assert "is a text file" in error(str(shutil.copy(shared_data / "checkpoints" / "LICENSE", tmp_path / "x.pth")))


def test_layouts_are_told_apart_in_one_place():
    assert len({row.origin for row in LAYOUTS}) == len(LAYOUTS)


def test_the_page_on_encoders_lists_every_layout_and_its_source():
    page = (ROOT / "docs" / "encoders.md").read_text(encoding="utf-8")
    for row in LAYOUTS:
        assert f"| {row.origin} |" in page and row.source in page, row.origin


@pytest.mark.parametrize("arch", ["resnet18_cifar", "resnet50_cifar", "resnet18_cifar_pad2", "resnet18_quarter_cifar"])
def test_a_cifar_stem_starts_as_the_demos_does(arch):
    """The notebook puts a plain nn.Conv2d in the stem's place, which torch draws uniformly in +-1/sqrt(27)."""
    torch.manual_seed(0)
    weight = build_resnet(arch).conv1.weight
    assert weight.abs().max() <= 27**-0.5
    assert weight.std().item() == pytest.approx((3 * 27) ** -0.5, rel=0.05)


# Networks that are not built here, in words


def without(tensors: dict, ending: str) -> dict:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(ending)}


@pytest.mark.parametrize("channels", [1, 2, 4, 12, 13])
@pytest.mark.parametrize("arch", [ARCH, VIT])
def test_networks_for_other_channels_are_loaded_and_their_pixels_left_open(channels, arch, tmp_path):
    name, shape = (
        ("conv1.weight", (16, channels, 7, 7)) if arch == ARCH else ("patch_embed.proj.weight", (48, channels, 16, 16))
    )
    encoder = load(written(tmp_path, body(0, arch) | {name: torch.ones(shape)}))
    assert encoder.arch == f"{arch},channels={channels}" and encoder.preprocessing is None
    assert encoder.network.in_channels == channels
    assert any(f"images of {channels} channel{'s' * (channels > 1)} " in warning for warning in encoder.warnings)
    assert encoder.backbone(torch.ones(1, channels, 32, 32)).shape == (1, encoder.feature_dim)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (lambda: stretched(mlps(96)), "MLPs 2 times as wide as the tokens instead of 4"),
        (lambda: without(stretched({}), "attn.qkv.bias"), "no biases on queries, keys and values"),
        (lambda: stretched(body(0, VIT) | {"norm_pre.weight": torch.ones(48)}), "a norm before the blocks"),
        (lambda: body(0, VIT) | {"patch_embed.proj.weight": torch.ones(48, 3, 16, 32)}, "patches of 16x32 pixels"),
    ],
)
def test_other_parts_of_a_vit_are_named(tensors, words, tmp_path):
    message = error(written(tmp_path, tensors()))
    assert words in message and "altered" not in message


def stretched(tensors: dict) -> dict:
    """With positions of images that are not square, which no network built here takes."""
    return body(0, VIT) | tensors | {"pos_embed": torch.zeros(1, 7, 48)}


def mlps(width: int) -> dict:
    shapes = {"fc1.weight": (width, 48), "fc1.bias": (width,), "fc2.weight": (48, width)}
    return {f"blocks.{i}.mlp.{name}": torch.ones(shape) for i in range(2) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda net: nn.utils.spectral_norm(net.layer1[0].conv1), "holds spectral norms"),
        (
            lambda net: nn.utils.parametrizations.spectral_norm(net.layer1[0].conv1),
            "holds spectral norms",
        ),
        (
            lambda net: nn.utils.parametrizations.weight_norm(net.layer1[0].conv1),
            "such as a weight norm's",
        ),
        (lambda net: nn.utils.prune.identity(net.layer1[0].conv1, "weight"), "holds pruning masks"),
    ],
)
def test_weights_in_other_parameters_are_named(change, words, tmp_path):
    importlib.import_module("torch.nn.utils.prune")
    net = network(0)
    change(net)
    assert words in error(written(tmp_path, net.state_dict()))


def test_flattened_parameters_are_named(tmp_path):
    assert "holds FSDP's flattened parameters" in error(
        written(tmp_path, {"_fsdp_wrapped_module._flat_param": torch.ones(9)})
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_weights_of_another_kind_of_number(dtype, tmp_path):
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in body(0).items()}
    message = error(written(tmp_path, state))
    assert message.endswith(f"have them saved in float32, not in {str(dtype).removeprefix('torch.')}.")


def test_one_tensor_too_many_is_not_called_damage(tmp_path):
    message = error(written(tmp_path, body(0) | {"surprise.weight": torch.zeros(3)}))
    assert "altered" not in message and "save a head of your own in another file" in message
