"""Copies in other formats: what the official converter would write, and every copy proven."""

import pickle
import pickletools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, environment
from test_encoders import ARCH, checkpoint, moco_state, network, ours, written

from moco_eval import pickles
from moco_eval.encoders import export
from moco_eval.encoders.build import build_resnet
from moco_eval.encoders.export import convert, detectron2_name, torchvision_name
from moco_eval.encoders.inspect import probe_features
from moco_eval.encoders.load import load
from moco_eval.errors import InputError, RunFailed


def expected_for_detectron2(state_dict: dict) -> dict:
    """The official converter's rules, stated again from the specification as a plain walk over the parts of a name."""
    model = {}
    for key, tensor in state_dict.items():
        if not key.startswith("module.encoder_q."):
            continue
        parts = key.split(".")[2:]
        if not any("layer" in part for part in parts):
            parts = ["stem", *parts]
        renamed = []
        position = 0
        while position < len(parts):
            part, after = parts[position], parts[position + 1 : position + 2]
            if part in ("layer1", "layer2", "layer3", "layer4"):
                renamed.append(f"res{int(part[-1]) + 1}")
            elif part in ("bn1", "bn2", "bn3"):
                renamed += [f"conv{part[-1]}", "norm"]
            elif part == "downsample":
                renamed += ["shortcut"] if after == ["0"] else ["shortcut", "norm"]
                position += 1
            else:
                renamed.append(part)
            position += 1
        model[".".join(renamed)] = tensor.numpy()
    return {"model": model, "__author__": "MOCO", "matching_heuristics": True}


@pytest.mark.parametrize("arch", ["resnet18_quarter", "resnet50_quarter"])
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_detectron2_is_what_the_official_converter_writes(head, arch, tmp_path):
    state = {f"module.encoder_q.{k}": v for k, v in network(0, arch, head).state_dict().items()}
    state |= {"module.queue": torch.randn(16, 32), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}
    said = convert(written(tmp_path, checkpoint(state)), tmp_path / "out.pkl", "detectron2")
    found = pickles.read(tmp_path / "out.pkl")
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
    assert {name: detectron2_name(name) for name in known} == known
    names = list(build_resnet("resnet50_quarter").state_dict())
    assert [torchvision_name(detectron2_name(name)) for name in names] == names


def test_our_checkpoint_is_converted_like_the_official_one(tmp_path):
    values = ours()
    convert(written(tmp_path, values), tmp_path / "out.pkl", "detectron2")
    found, expected = (
        pickles.read(tmp_path / "out.pkl")["model"],
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
    assert list(plain) == [detectron2_name(name) for name in expected]
    assert all(torch.equal(torch.from_numpy(plain[detectron2_name(name)]), t) for name, t in expected.items())


@pytest.mark.parametrize("to", ["detectron2", "torchvision", "safetensors"])
def test_the_same_bytes_every_time(to, tmp_path):
    path = written(tmp_path, ours())
    for name in ("a.out", "other.out"):
        convert(path, tmp_path / name, to)
    assert (tmp_path / "a.out").read_bytes() == (tmp_path / "other.out").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.out", "encoder.pth", "other.out"]


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
    state = {k: v.half() if v.is_floating_point() else v for k, v in moco_state("linear").items()}
    convert(written(tmp_path, checkpoint(state)), tmp_path / "out.pkl", "detectron2")
    assert pickles.read(tmp_path / "out.pkl")["model"]["stem.conv1.weight"].dtype == np.float16
    state = {k: v.bfloat16() if v.is_floating_point() else v for k, v in moco_state("linear").items()}
    with pytest.raises(InputError, match=r"no type for one of torch\.bfloat16"):
        convert(written(tmp_path, checkpoint(state)), tmp_path / "other.pkl", "detectron2")
    assert not (tmp_path / "other.pkl").exists()


@pytest.mark.parametrize("to", ["detectron2", "torchvision", "safetensors"])
def test_a_copy_that_is_not_equal_is_not_kept(to, tmp_path, monkeypatch):
    once = iter([1.0, 1.1])
    monkeypatch.setattr(export, "probe_features", lambda encoder: probe_features(encoder) * next(once))
    with pytest.raises(RunFailed, match="activations differ"):
        convert(f"random:{ARCH}", tmp_path / "out.x", to)
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
            convert(path, tmp_path / output, "detectron2")
    with pytest.raises(InputError, match="the checkpoint itself"):
        convert(path, tmp_path / "encoder.pth", "detectron2", force=True)
    assert (tmp_path / "mine.pkl").read_text() == "mine"
    convert(path, tmp_path / "mine.pkl", "detectron2", force=True)
    assert pickles.read(tmp_path / "mine.pkl")["__author__"] == "MOCO"


@pytest.mark.parametrize(
    ("source", "to", "words"),
    [("pixels", "torchvision", "has no weights"), (f"random:{ARCH}", "timm", "is not built yet")],
)
def test_what_cannot_be_converted(source, to, words, tmp_path):
    with pytest.raises(InputError, match=words):
        convert(source, tmp_path / "out", to)


def test_the_script_does_the_same(tmp_path):
    def script(*arguments: str | Path) -> subprocess.CompletedProcess:
        command = [sys.executable, ROOT / "tools" / "convert_to_detectron2.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path)

    path = written(tmp_path, ours())
    done = script(path, "script.pkl")
    assert done.returncode == 0, done.stderr
    convert(path, tmp_path / "command.pkl", "detectron2")
    assert (tmp_path / "script.pkl").read_bytes() == (tmp_path / "command.pkl").read_bytes()
    failed = script("missing.pth", "x.pkl")
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1) and "missing.pth does not exist" in failed.stderr


def test_a_pickle_with_code_is_not_run_by_our_reader(tmp_path):
    (tmp_path / "evil.pkl").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    with pytest.raises(InputError, match=r"os\.system"):
        pickles.read(tmp_path / "evil.pkl")
    assert not (tmp_path / "canary").exists() and not Path("canary").exists()
