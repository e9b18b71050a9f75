"""Copies in other formats: what the official converter would write, and every copy proven."""

import itertools
import json
import pickle
import pickletools
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from checkpoints import ARCH, FILES, VIT, body, linear, mlp, moco, network, ours, used, written
from checkpoints import detectron2 as theirs
from commands import ROOT
from torch import nn

from moco_eval.encoders.architectures import build_backbone, build_resnet
from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.export import convert as export
from moco_eval.encoders.export.convert import convert
from moco_eval.encoders.export.detectron2 import from_detectron2, settings_of, to_detectron2, yaml_of
from moco_eval.encoders.fingerprint import activations_sha256, probe_features
from moco_eval.encoders.load import MSRA, load
from moco_eval.errors import InputError, RunFailed
from moco_eval.preprocessing import Preprocessing
from moco_eval.runtime import files
from moco_eval.untrusted import pickle_read


def expected_for_detectron2(state_dict: dict) -> dict:
    """What the official converter writes: the query encoder's tensors, renamed by the walk in checkpoints.py."""
    model = {}
    for key, tensor in state_dict.items():
        if key.startswith("module.encoder_q."):
            model[theirs(key.removeprefix("module.encoder_q."))] = tensor.numpy()
    return {"model": model, "__author__": "MOCO", "matching_heuristics": True}


def checkpoint(state: dict, **beside) -> dict:
    return {"epoch": 3, "arch": "resnet18", "state_dict": state, **beside}


@pytest.mark.parametrize("arch", ["resnet18_quarter", "resnet50_quarter"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_detectron2_is_what_the_official_converter_writes(head, arch, tmp_path):
    state = {f"module.encoder_q.{k}": v for k, v in network(0, arch, head).state_dict().items()}
    state |= {"module.queue": torch.randn(16, 32), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}
    said = convert(written(tmp_path, checkpoint(state)), tmp_path / "out.pkl", "detectron2")
    found = pickle_read.read(tmp_path / "out.pkl")
    expected = expected_for_detectron2(state)
    assert list(found) == list(expected) and list(found["model"]) == list(expected["model"])
    assert (found["__author__"], found["matching_heuristics"]) == ("MOCO", True)
    for name, array in expected["model"].items():
        there = found["model"][name]
        assert (there.dtype, there.shape, there.tobytes()) == (array.dtype, array.shape, array.tobytes()), name
        assert there.flags.writeable
    assert f"{len(expected['model'])} tensors" in said


def test_the_names_that_the_specification_lists():
    known = {
        "conv1.weight": "stem.conv1.weight",
        "bn1.running_mean": "stem.conv1.norm.running_mean",
        "layer1.0.conv1.weight": "res2.0.conv1.weight",
        "layer1.0.bn3.running_var": "res2.0.conv3.norm.running_var",
        "layer1.0.downsample.0.weight": "res2.0.shortcut.weight",
        "layer2.0.downsample.1.bias": "res3.0.shortcut.norm.bias",
        "fc.2.bias": "stem.fc.2.bias",
        "layer4.2.bn1.num_batches_tracked": "res5.2.conv1.norm.num_batches_tracked",
    }
    assert {name: to_detectron2(name) for name in known} == known
    names = list(build_resnet("resnet50_quarter").state_dict())
    assert [from_detectron2(to_detectron2(name)) for name in names] == names


def test_our_checkpoint_is_converted_like_the_official_one(tmp_path):
    values = ours()
    convert(written(tmp_path, values), tmp_path / "out.pkl", "detectron2")
    found, expected = (
        pickle_read.read(tmp_path / "out.pkl")["model"],
        expected_for_detectron2(values["state_dict"])["model"],
    )
    assert list(found) == list(expected)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_our_checkpoint_under_the_official_linear_scripts_rules(tmp_path):
    state = torch.load(written(tmp_path, ours()), weights_only=True)["state_dict"]
    prefix = "module.encoder_q"
    kept = {
        k[len(prefix) + 1 :]: v for k, v in state.items() if k.startswith(prefix) and not k.startswith(prefix + ".fc")
    }
    result = build_resnet(ARCH).load_state_dict(kept, strict=False)
    assert set(result.missing_keys) == {"fc.weight", "fc.bias"} and not result.unexpected_keys


def test_numpy_1_and_numpy_2_both_find_what_the_pickle_names(tmp_path):
    convert(f"random:{ARCH}", tmp_path / "out.pkl", "detectron2")
    named = set()

    class Recorder(pickle.Unpickler):
        def find_class(self, module, name):
            named.add((module, name))
            return super().find_class(module, name)

    with (tmp_path / "out.pkl").open("rb") as file:
        Recorder(file).load()
    assert named == {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}
    opcodes = [opcode for opcode, _, _ in pickletools.genops((tmp_path / "out.pkl").read_bytes())]
    assert max(opcode.proto for opcode in opcodes) <= 4  # Python 3.4 on


def test_a_reader_with_latin1_as_detectron2_has_it(tmp_path):
    convert(f"random:{ARCH}", tmp_path / "out.pkl", "detectron2")
    with (tmp_path / "out.pkl").open("rb") as file:
        plain = pickle.load(file, encoding="latin1")["model"]
    assert not any(name.startswith("stem.fc") for name in plain)
    expected = load(f"random:{ARCH}").backbone.state_dict()
    assert list(plain) == [to_detectron2(name) for name in expected]
    assert all(torch.equal(torch.from_numpy(plain[to_detectron2(name)]), t) for name, t in expected.items())


ENDINGS = {"detectron2": ".pkl", "torchvision": ".pth", "timm": ".pth", "safetensors": ".safetensors"}


@pytest.mark.parametrize("to", ["detectron2", "torchvision", "safetensors"])
def test_the_same_bytes_every_time(to, tmp_path):
    path, ending = written(tmp_path, ours()), ENDINGS[to]
    for name in ("a", "other"):
        convert(path, tmp_path / f"{name}{ending}", to)
    assert (tmp_path / f"a{ending}").read_bytes() == (tmp_path / f"other{ending}").read_bytes()
    names = [f"{name}{ending}{more}" for name in ("a", "other") for more in ("", ".json")]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*names, "encoder.pth"])


@pytest.mark.parametrize("to", ["torchvision", "safetensors"])
@pytest.mark.parametrize("encoder", ["query", "key"])
def test_a_copy_gives_the_same_features(to, encoder, tmp_path):
    path = written(tmp_path, ours())
    convert(path, tmp_path / "copy.x", to, encoder=encoder)
    original, copy = load(path, encoder=encoder), load(str(tmp_path / "copy.x"))
    assert torch.equal(probe_features(original), probe_features(copy))
    assert (copy.arch, copy.tensors_loaded) == (ARCH, 120)
    if to == "safetensors":
        assert copy.origin == "moco-eval safetensors, from moco-eval"
        assert (copy.preprocessing, copy.pretraining) == (original.preprocessing, original.pretraining)
        pooled = torch.randn(2, 128)
        assert torch.equal(original.head(pooled), copy.head(pooled))
    else:
        state = torch.load(tmp_path / "copy.x", weights_only=True)
        result = build_resnet(ARCH).load_state_dict(state, strict=False)
        assert set(result.missing_keys) == {"fc.weight", "fc.bias"} and not result.unexpected_keys


def test_half_weights_stay_half_in_the_detectron2_file(tmp_path):
    state = {k: v.half() if v.is_floating_point() else v for k, v in moco(linear).items()}
    convert(written(tmp_path, checkpoint(state)), tmp_path / "out.pkl", "detectron2")
    assert pickle_read.read(tmp_path / "out.pkl")["model"]["stem.conv1.weight"].dtype == np.float16
    state = {k: v.bfloat16() if v.is_floating_point() else v for k, v in moco(linear).items()}
    with pytest.raises(InputError, match=r"no type for one of torch\.bfloat16"):
        convert(written(tmp_path, checkpoint(state)), tmp_path / "other.pkl", "detectron2")
    assert not (tmp_path / "other.pkl").exists()


@pytest.mark.parametrize("to", ["detectron2", "torchvision", "safetensors"])
def test_a_copy_that_is_not_equal_is_not_kept(to, tmp_path, monkeypatch):
    factors = itertools.count(1)  # each look at the picture differs from the one before
    output = tmp_path / f"out{ENDINGS[to]}"
    monkeypatch.setattr(export, "probe_features", lambda encoder: probe_features(encoder) * next(factors))
    with pytest.raises(RunFailed, match="activations differ"):
        convert(f"random:{ARCH}", output, to)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_unasked(tmp_path):
    path = written(tmp_path, ours())
    (tmp_path / "mine.pkl").write_text("mine")
    for output, words in (
        ("mine.pkl", "mine.pkl exists"),
        (".", "is a folder"),
        ("encoder.pth", "the checkpoint itself"),
    ):
        with pytest.raises(InputError, match=words):
            convert(path, tmp_path / output, "torchvision")
    with pytest.raises(InputError, match="the checkpoint itself"):
        convert(path, tmp_path / "encoder.pth", "torchvision", force=True)
    assert (tmp_path / "mine.pkl").read_text() == "mine"
    convert(path, tmp_path / "mine.pkl", "detectron2", force=True)
    assert pickle_read.read(tmp_path / "mine.pkl")["__author__"] == "MOCO"


@pytest.mark.parametrize(
    ("source", "to", "words"),
    [
        ("pixels", "torchvision", "has no weights"),
        (f"random:{ARCH}", "timm", "timm has no resnet18_quarter"),
        (f"random:{ARCH}", "keras", "--to 'keras' is not built yet"),
        (f"random:{ARCH}", "detectron2", "must end in .pkl"),
        (f"random:{VIT}", "torchvision", "has no place there"),
    ],
)
def test_what_cannot_be_converted(source, to, words, tmp_path):
    with pytest.raises(InputError, match=words):
        convert(source, tmp_path / "out", to)


def test_the_script_does_the_same(in_tmp, capfd, monkeypatch):
    def script(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["convert_to_detectron2.py", *arguments])
        monkeypatch.setattr(sys, "path", [*sys.path])
        runpy.run_path(str(ROOT / "tools" / "convert_to_detectron2.py"), run_name="__main__")

    path = written(in_tmp, ours())
    script(path, "script.pkl")
    convert(path, in_tmp / "command.pkl", "detectron2")
    assert (in_tmp / "script.pkl").read_bytes() == (in_tmp / "command.pkl").read_bytes()
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        script("missing.pth", "x.pkl")
    said = capfd.readouterr().err
    assert (ended.value.code, said.count("\n")) == (2, 1) and "missing.pth does not exist" in said


@pytest.mark.slow
def test_the_script_runs_outside_the_clone(tmp_path):
    command = [sys.executable, ROOT / "tools" / "convert_to_detectron2.py", written(tmp_path, ours()), "script.pkl"]
    subprocess.run(command, check=True, cwd=tmp_path)
    convert(str(tmp_path / "encoder.pth"), tmp_path / "command.pkl", "detectron2")
    assert (tmp_path / "script.pkl").read_bytes() == (tmp_path / "command.pkl").read_bytes()


def test_a_pickle_with_code_is_not_run_by_our_reader(tmp_path):
    (tmp_path / "evil.pkl").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    with pytest.raises(InputError, match=r"os\.system"):
        pickle_read.read(tmp_path / "evil.pkl")
    assert not (tmp_path / "canary").exists() and not Path("canary").exists()


# Beside the copy, and in its own library


@pytest.mark.parametrize("to", ENDINGS)
@pytest.mark.slow
def test_what_travels_with_the_weights_lies_beside_them(to, tmp_path):
    source = written(tmp_path, {"state_dict": moco(mlp)})
    output = tmp_path / f"copy{ENDINGS[to]}"
    arch = {"timm": "resnet18"}.get(to)
    if arch:
        source = written(tmp_path, body(0, arch))
    convert(source, output, to)
    about = json.loads(output.with_name(f"{output.name}.json").read_text())
    original = load(source)
    assert (about["format"], about["arch"], about["origin"]) == (to, original.arch, original.origin)
    assert about["source_sha256"] == original.sha256 and about["sha256"] == files.sha256_of(output)
    assert about["preprocessing"] == original.preprocessing.to_dict()
    again = load(str(output), arch=original.arch)
    assert activations_sha256(probe_features(again)) == about["activations_sha256"]
    assert again.preprocessing == original.preprocessing


@pytest.mark.parametrize("arch", ["resnet18", VIT, "vit_narrow_12h_patch16_32"])
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.slow
def test_timm_reads_what_is_written_for_it(arch, ending, tmp_path):
    import timm

    source = written(tmp_path, body(0, arch))
    said = convert(source, tmp_path / f"copy{ending}", "timm", arch=arch)
    assert f"in timm {timm.__version__}: pooled equal (largest difference 0 of the largest activation)" in said
    net = build_backbone(arch) if arch.startswith("vit") else timm.create_model(arch, num_classes=0)
    timm.models.load_checkpoint(net, str(tmp_path / f"copy{ending}"))
    encoder = load(source, arch)
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(net.eval()(image), encoder.backbone(image))


def test_torchvision_reads_what_is_written_for_it(tmp_path):
    said = convert("random:resnet18", tmp_path / "copy.pth", "torchvision")
    assert (
        f"in torchvision {torchvision.__version__.split('+')[0]}" in said
        and "pooled equal (largest difference 0 " in said
    )
    assert "torchvision has no resnet18_quarter" in convert(f"random:{ARCH}", tmp_path / "other.pth", "torchvision")


def test_hugging_faces_epsilon_survives_in_a_copy(tmp_path):
    source = written(tmp_path, FILES["Hugging Face ViT"]().values)
    convert(source, tmp_path / "copy.safetensors", "safetensors")
    convert(source, tmp_path / "timm.pth", "timm")
    assert load(str(tmp_path / "copy.safetensors")).norm_eps == 1e-12
    assert json.loads((tmp_path / "timm.pth.json").read_text())["norm_eps"] == 1e-12


@pytest.mark.parametrize(
    ("arch", "resnet"),
    [
        ("resnet50", {"DEPTH": 50, "RES2_OUT_CHANNELS": 256, "STEM_OUT_CHANNELS": 64, "STRIDE_IN_1X1": False}),
        ("resnet50_msra", {"DEPTH": 50, "STRIDE_IN_1X1": True}),
        ("resnet101", {"DEPTH": 101, "NUM_GROUPS": 1, "WIDTH_PER_GROUP": 64}),
        ("resnext50_32x8d", {"DEPTH": 50, "NUM_GROUPS": 32, "WIDTH_PER_GROUP": 8}),
        ("resnet50_w2", {"STEM_OUT_CHANNELS": 128, "RES2_OUT_CHANNELS": 512, "WIDTH_PER_GROUP": 128}),
        ("wide_resnet50_2", {"STEM_OUT_CHANNELS": 64, "RES2_OUT_CHANNELS": 256, "WIDTH_PER_GROUP": 128}),
        ("resnet34", {"DEPTH": 34, "RES2_OUT_CHANNELS": 64}),
    ],
)
def test_detectron2_is_told_which_network_it_is(arch, resnet, tmp_path):
    with torch.device("meta"):
        encoder = Encoder("x", "x", arch, build_backbone(arch), 0, None, "x", "0", 1)
    settings, why_none = settings_of(encoder, tmp_path / "x.pkl")
    assert resnet.items() <= settings["MODEL"]["RESNETS"].items() and not why_none
    heads = settings["MODEL"]["ROI_HEADS"]["NAME"]
    assert heads == ("StandardROIHeads" if arch == "resnet34" else "Res5ROIHeadsExtraNorm")
    assert ("extra_norm" in yaml_of(settings)) == (arch != "resnet34")
    assert yaml.safe_load(yaml_of(settings)) == settings


def test_detectron2_is_told_what_pixels_to_give(tmp_path):
    convert(written(tmp_path, {"state_dict": moco(mlp)}), tmp_path / "x.pkl", "detectron2")
    assert not (tmp_path / "x.yaml").exists()  # detectron2 builds no ResNet-18 of a quarter's width
    encoder = Encoder("x", "x", "resnet50", nn.Identity(), 0, None, "x", "0", 1, preprocessing=Preprocessing())
    model, said = settings_of(encoder, tmp_path / "x.pkl")[0]["MODEL"], settings_of(encoder, tmp_path / "x.pkl")[0]
    assert (model["PIXEL_MEAN"], model["PIXEL_STD"]) == ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    assert said["INPUT"]["FORMAT"] == "RGB" and model["BACKBONE"]["FREEZE_AT"] == 0
    caffe = settings_of(replace(encoder, arch="resnet50_msra", preprocessing=MSRA), tmp_path / "x.pkl")[0]
    assert caffe["MODEL"]["PIXEL_MEAN"] == [103.53, 116.28, 123.675] and caffe["MODEL"]["PIXEL_STD"] == [1, 1, 1]
    assert caffe["INPUT"]["FORMAT"] == "BGR"


@pytest.mark.parametrize("arch", ["resnet18_quarter", "resnet50_cifar", "resnet200"])
def test_networks_that_detectron2_cannot_build_are_written_without_settings(arch, tmp_path):
    encoder = Encoder("x", "x", arch, nn.Identity(), 0, None, "x", "0", 1)
    settings, why = settings_of(encoder, tmp_path / "x.pkl")
    assert settings is None and f"makes no {arch}" in why


@pytest.mark.parametrize(
    ("layout", "to"),
    [
        ("swav", "torchvision"),
        ("moco-v3 ViT", "timm"),
        ("dino ResNet", "safetensors"),
        ("dino ResNet", "torchvision"),
        ("Hugging Face ViT", "timm"),
        ("moco CIFAR-10 notebook", "torchvision"),
    ],
)
@pytest.mark.parametrize("encoder", [None, "query"])
@pytest.mark.slow
def test_what_no_tensor_tells_comes_back_from_beside_the_copy(layout, to, encoder, tmp_path):
    source = written(tmp_path, FILES[layout]().values)
    output = tmp_path / f"copy{ENDINGS[to]}"
    convert(source, output, to, encoder=encoder)
    original, copy = load(source, encoder=encoder), load(str(output))
    for name in ("arch", "preprocessing", "norm_eps", "which", "usual"):
        assert getattr(copy, name) == getattr(original, name), name
    assert copy.deviations() == original.deviations() and not copy.warnings
    assert torch.equal(probe_features(copy), probe_features(original))


@pytest.mark.parametrize("to", ["torchvision", "detectron2", "safetensors"])
def test_a_copy_inherits_the_deviations_of_its_pretraining(to, tmp_path):
    values = ours()
    values["pretraining"]["deviations"] = ["a queue of 16 keys"]
    convert(written(tmp_path, values), tmp_path / f"copy{ENDINGS[to]}", to)
    assert load(str(tmp_path / f"copy{ENDINGS[to]}")).deviations() == ["encoder: a queue of 16 keys"]


def test_settings_of_another_file_are_not_taken(tmp_path):
    """OUT.json names the sha256 of its copy."""
    source = written(tmp_path, FILES["swav"]().values)
    convert(source, tmp_path / "copy.pth", "torchvision")
    torch.save(body(1), tmp_path / "copy.pth")
    assert load(str(tmp_path / "copy.pth")).preprocessing == Preprocessing()


@pytest.mark.parametrize("arch", ["resnet50_msra", "resnet18_cifar_pad2"])
@pytest.mark.slow
def test_convert_says_what_the_copy_cannot(arch, tmp_path):
    said = convert(f"random:{arch}", tmp_path / "copy.pth", "torchvision")
    assert f"the tensors do not show that it is {arch}: keep copy.pth.json with it" in said
    assert load(str(tmp_path / "copy.pth")).arch == arch


def test_nothing_beside_a_copy_tells_of_an_earlier_one(tmp_path, monkeypatch):
    convert("random:resnet18", tmp_path / "x.pkl", "detectron2")
    assert (tmp_path / "x.yaml").exists()
    convert(f"random:{ARCH}", tmp_path / "x.pkl", "detectron2", force=True)
    assert not (tmp_path / "x.yaml").exists()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export.files, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert("random:resnet18", tmp_path / "x.pkl", "detectron2", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.pkl"]


def test_a_name_that_is_none(tmp_path):
    with pytest.raises(InputError, match="is not a valid name for a file"):
        convert(f"random:{ARCH}", tmp_path / ("x" * 300 + ".pth"), "torchvision")


@pytest.mark.parametrize("to", ["detectron2", "torchvision", "safetensors"])
def test_weights_kept_channels_last_are_copied_and_give_the_same_features(to, tmp_path):
    """As our own pretraining and solo-learn keep them: another order in memory rounds convolutions differently."""
    last = {n: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for n, t in body(0).items()}
    source = written(tmp_path, last)
    stored = torch.load(source, weights_only=True)["layer1.0.conv1.weight"]
    assert not stored.is_contiguous()
    convert(source, tmp_path / f"copy{ENDINGS[to]}", to)
    original, plain = load(source), load(written(tmp_path, body(0), "plain.pth"))
    assert all(tensor.is_contiguous() for tensor in original.backbone.state_dict().values())
    assert torch.equal(probe_features(original), probe_features(plain))
    assert torch.equal(probe_features(load(str(tmp_path / f"copy{ENDINGS[to]}"))), probe_features(plain))


# Networks beyond ResNets and plain ViTs

TINY_VIT = "timm:vit_base_patch16_224,img_size=32,embed_dim=48,depth=2,num_heads=3"
BEYOND = ("timm:test_convnext", "timm:test_efficientnet", f"{TINY_VIT},act_layer=quick_gelu")
BEYOND += (f"{TINY_VIT},reg_tokens=2", "resnet18_quarter,channels=13", "vit_narrow_patch16_32,channels=4")


@pytest.mark.parametrize("arch", BEYOND)
@pytest.mark.parametrize(("to", "ending"), [("timm", "pth"), ("timm", "safetensors"), ("safetensors", "safetensors")])
def test_copies_of_any_network_are_read_back_as_what_they_are(arch, to, ending, tmp_path):
    """With a projection head beside a norm of the network's own that is called head.norm."""
    torch.manual_seed(0)
    net = used(build_backbone(arch), 0)
    torch.save(net.state_dict(), tmp_path / "x.pth")
    copy = tmp_path / f"copy.{ending}"
    if to == "timm" and arch.startswith("resnet18_quarter"):
        with pytest.raises(InputError, match="timm has no resnet18_quarter"):
            convert(str(tmp_path / "x.pth"), copy, to, arch)
        return
    convert(str(tmp_path / "x.pth"), copy, to, arch)
    source, read = load(str(tmp_path / "x.pth"), arch), load(str(copy))
    assert read.arch == arch and read.preprocessing == source.preprocessing
    assert torch.equal(probe_features(read), probe_features(source))


@pytest.mark.parametrize("arch", [*BEYOND[:4], "vit_narrow_patch16_32,channels=4"])
@pytest.mark.parametrize(("to", "ending"), [("torchvision", "pth"), ("detectron2", "pkl")])
def test_libraries_without_such_a_network_are_no_target(arch, to, ending, tmp_path):
    torch.save(used(build_backbone(arch), 0).state_dict(), tmp_path / "x.pth")
    with pytest.raises(InputError, match=f"--to {to}: {re.escape(arch)} has no place there"):
        convert(str(tmp_path / "x.pth"), tmp_path / f"copy.{ending}", to, arch)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


def test_detectron2_is_not_set_up_for_images_of_other_channels(tmp_path):
    torch.save(used(build_backbone("resnet18_quarter,channels=13"), 0).state_dict(), tmp_path / "x.pth")
    lines = convert(str(tmp_path / "x.pth"), tmp_path / "copy.pkl", "detectron2")
    assert "its stem takes photographs of 3 channels" in lines and not (tmp_path / "copy.yaml").exists()
