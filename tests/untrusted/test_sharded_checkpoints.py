"""Checkpoints in several files, and files that are no checkpoints: read, or named for what they are."""

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import ARCH, body, error, under, written
from safetensors.torch import save_file

from moco_eval.encoders.containers import find_tensors
from moco_eval.encoders.load import load
from moco_eval.untrusted.read import read

INDEX = "model.safetensors.index.json"


def sharded(folder: Path, save=save_file, name: str = "model-{}-of-00002.safetensors", index: str = INDEX) -> Path:
    """A backbone in two files, as Hugging Face writes large models."""
    items = list(body(0).items())
    halves = {name.format(f"0000{i + 1}"): dict(half) for i, half in enumerate((items[:60], items[60:]))}
    for file, tensors in halves.items():
        save(tensors, folder / file)
    places = {tensor: file for file, tensors in halves.items() for tensor in tensors}
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return folder / index


def test_sharded_safetensors_are_read(tmp_path):
    index = sharded(tmp_path)
    encoder = load(str(index))
    state, expected = encoder.backbone.state_dict(), body(0)
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)
    assert encoder.run_name == "model"


def test_sharded_files_of_torch_are_read(tmp_path):
    index = sharded(tmp_path, torch.save, "pytorch_model-{}-of-00002.bin", "pytorch_model.bin.index.json")
    assert load(str(index)).tensors_loaded == len(body(0))


def test_the_hash_is_of_the_shards(tmp_path):
    """The index is the same where the weights are not."""
    index = sharded(tmp_path)
    before, bytes_before = load(str(index)).sha256, index.read_bytes()
    shard = tmp_path / "model-00002-of-00002.safetensors"
    save_file({name: body(1)[name] for name in list(body(0))[60:]}, shard)
    assert load(str(index)).sha256 != before and index.read_bytes() == bytes_before


def broken(change) -> dict:
    places = {"a": "one.safetensors", "b": "two.safetensors"}
    return {"weight_map": change(places)}


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (
            broken(lambda places: places | {"c": "../x.safetensors"}),
            "lists ../x.safetensors, which is no file beside",
        ),
        (broken(lambda places: places | {"c": "/etc/passwd"}), "lists /etc/passwd, which is no file beside it"),
        (broken(lambda places: places | {"c": INDEX}), f"lists {INDEX}, which is no file beside it"),
        (broken(lambda places: places | {"c": 3}), "lists none, or too many"),
        (broken(lambda places: {}), "lists none, or too many"),
        (broken(lambda places: {f"{i}": f"{i}.safetensors" for i in range(1001)}), "lists none, or too many"),
        (broken(lambda places: places | {"c": "three.safetensors"}), "lists three.safetensors, which does not exist"),
        (broken(lambda places: places | {"c": "two.safetensors"}), "lists other tensors in two.safetensors than"),
        (
            broken(lambda places: {"a": "one.safetensors", "b": "lfs.safetensors"}),
            "lists lfs.safetensors, which is a Git LFS",
        ),
        ({"error": "rate limit"}, "is JSON, such as a server's error"),
    ],
)
def test_an_index_that_is_wrong(index, words, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(1)}, tmp_path / "two.safetensors")
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert words in error(str(tmp_path / INDEX))


def test_a_shard_or_its_folder_names_the_index(tmp_path):
    index = sharded(tmp_path)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    assert f"is one of 2 shards of a checkpoint: give their index, {index.name}" in error(str(shard))
    assert f"its shards are listed in {index.name}: give that" in error(str(tmp_path))
    whole = tmp_path / "model-00001-of-00001.safetensors"
    save_file(body(0), whole)
    assert load(str(whole)).arch == ARCH


def test_torchs_distributed_checkpoints_name_its_converter(tmp_path):
    """And what the converter makes of one is read."""
    import torch.distributed.checkpoint as distributed
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    distributed.save({"app": {"model": body(0)}}, checkpoint_id=tmp_path / "saved", no_dist=True)
    for path in (tmp_path / "saved", next((tmp_path / "saved").glob("*.distcp")), tmp_path / "saved" / ".metadata"):
        message = error(str(path))
        assert "torch.distributed.checkpoint.format_utils dcp_to_torch" in message and "dcp_to_torch_save" in message
        assert "again" not in message
    dcp_to_torch_save(tmp_path / "saved", tmp_path / "whole.pth")
    assert load(str(tmp_path / "whole.pth")).tensors_loaded == len(body(0))


def test_an_unpacked_checkpoint(tmp_path):
    """Its folder and its data.pkl say how to pack it again, which is then read."""
    with zipfile.ZipFile(written(tmp_path, body(0))) as archive:
        archive.extractall(tmp_path / "unpacked")
        names = archive.namelist()
    for path in (tmp_path / "unpacked", tmp_path / "unpacked" / "encoder"):
        assert "is a folder that a checkpoint was unpacked into: pack it again (zip -0 -r" in error(str(path))
    pickled = tmp_path / "unpacked" / "encoder" / "data.pkl"
    assert "is the data.pkl of a checkpoint that was unpacked" in error(str(pickled))
    with zipfile.ZipFile(tmp_path / "again.pth", "w") as archive:
        for name in names:
            archive.write(tmp_path / "unpacked" / name, name)
    assert load(str(tmp_path / "again.pth")).tensors_loaded == len(body(0))


class OfDevice:
    """A tensor as torch saves one of a TPU: rebuilt by a function that no CPU has."""

    def __init__(self, function: str, values: tuple):
        self.function, self.values = function, values

    def __reduce__(self):
        def rebuild(*_):
            pass

        rebuild.__module__, rebuild.__qualname__, rebuild.__name__ = "torch._utils", self.function, self.function
        return rebuild, self.values


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("_rebuild_xla_tensor", "holds tensors of another device, such as a TPU's"),
        ("_rebuild_device_tensor_from_numpy", "holds tensors of another device, such as a TPU's"),
        ("_rebuild_device_tensor_from_cpu_tensor", "holds tensors of another device, such as a TPU's"),
        ("_rebuild_wrapper_subclass", "holds distributed tensors, as FSDP2 and tensor parallelism keep them"),
    ],
)
def test_tensors_that_lie_elsewhere(function, words, tmp_path, monkeypatch):
    made = OfDevice(function, (np.zeros(3, np.float32), torch.float32, "xla:0", False))
    monkeypatch.setattr(torch._utils, function, made.__reduce__()[0], raising=False)
    monkeypatch.setattr(OfDevice, "__reduce__", lambda self: (getattr(torch._utils, function), self.values))
    message = error(written(tmp_path, {"conv1.weight": made}))
    assert words in message and message.endswith("nothing was executed") and "written by torch.save" not in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xef\xbb\xbf<!DOCTYPE html><html></html>", "is a web page"),
        (b"<!-- saved from url --><html></html>", "is a web page"),
        (b"<head><title>Virus scan warning</title></head>", "is a web page"),
        ("version https://git-lfs.github.com/spec/v1\n".encode("utf-16"), "is a Git LFS pointer"),
        (b"outs:\n- md5: a304afb96060aad90176268345e10355\n  path: x.pth\n", "is a DVC pointer"),
        (b"/annex/objects/SHA256E-s100--abc.pth\n", "is a git-annex pointer"),
        (b"../.git/annex/objects/Xx/SHA256E-s100--abc.pth\n", "is a git-annex pointer"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(600), "is a picture"),
        (b"GGUF\x03\0\0\0" + bytes(600), "is GGUF"),
    ],
)
def test_pointers_pages_and_pictures(content, words, tmp_path):
    (tmp_path / "x.pth").write_bytes(content)
    assert words in error(str(tmp_path / "x.pth"))


def test_pickles_that_want_code_are_refused_before_anything_else_is_said(tmp_path):
    (tmp_path / "data.pkl").write_bytes(pickle.dumps({"run": print}))
    assert "wants to run code named builtins.print" in error(str(tmp_path / "data.pkl"))


def test_tensors_are_found_without_unfolding_what_is_shared(tmp_path):
    """A dictionary that is named a thousand times is looked through once."""
    inner = {"net": under("module.", body(0))}
    for _ in range(4):
        inner = {str(i): inner for i in range(6)}
    path = Path(written(tmp_path, inner))
    assert find_tensors(path, read(path)).place == "0.0.0.0.net"
