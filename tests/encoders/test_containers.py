"""Where the tensors lie in a file: any entry that holds a backbone, one of several by --key."""

import json

import pytest
import torch
from checkpoints import ARCH, VIT, body, error, mlp, moco, under, written
from commands import error_line, in_process

from moco_eval.encoders.containers import unwrapped
from moco_eval.encoders.export.convert import convert
from moco_eval.encoders.load import load
from moco_eval.encoders.recognise import MOMENTUM


def same(encoder, seed: int, arch: str = ARCH) -> bool:
    expected = body(seed, arch)
    arrived = encoder.backbone.state_dict()
    return arrived.keys() == expected.keys() and all(torch.equal(arrived[name], expected[name]) for name in expected)


ENTRIES = (
    *("net", "network", "backbone", "encoder", "module", "weights", "params", "model_state", "ema", "encoder_q", "q"),
    *("teacher_state", "online_network_state_dict", "target_encoder", "swa_state_dict", "my nets"),
)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("arch", [ARCH, VIT])
def test_any_entry_that_holds_a_backbone(entry, arch, tmp_path):
    values = {
        entry: under("module.", body(0, arch)),
        "epoch": 3,
        "loss": torch.tensor(0.3),
        "head": mlp(8).state_dict(),
    }
    values["optimizer"] = {"exp_avg": body(1, arch)}
    encoder = load(written(tmp_path, values))
    assert same(encoder, 0, arch) and encoder.origin.endswith(f", in {entry!r}")
    left = dict(encoder.dropped)
    assert left["head (4 tensors)"] == left["loss"] == "no backbone is in it" and "optimizer" in left
    assert encoder.which == encoder.usual == ("key" if MOMENTUM.search(f"{entry}.") else "query")
    assert not encoder.deviations()


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"app": {"model": body(0), "optim": {}}, "step": 3}, "app.model"),
        ({"state_dict": {"backbone": body(0), "head": mlp(8).state_dict()}}, "state_dict.backbone"),
        ({"model": {"net": body(0), "scale": torch.tensor(2.0)}}, "model.net"),
        ({"model": {}, "net": body(0)}, "net"),
        ({"models": [body(0), mlp(8).state_dict()]}, "models.0"),
        ({"a.b": {"c": {"d": {"e": body(0)}}}}, "a.b.c.d.e"),
    ],
)
def test_several_levels_down(values, place, tmp_path):
    encoder = load(written(tmp_path, values))
    assert same(encoder, 0) and encoder.origin.endswith(f", in {place!r}")


def test_a_known_place_goes_before_any_other(tmp_path):
    path = written(tmp_path, {"model": body(0), "ema": body(1), "predictor": mlp(8).state_dict()})
    encoder = load(path)
    assert same(encoder, 0) and encoder.origin == "torchvision or timm ResNet" and encoder.key is None
    assert dict(encoder.dropped)["ema (120 tensors)"] == "another network; --key ema takes it"
    chosen = load(path, key="ema")
    assert same(chosen, 1) and dict(chosen.dropped)["model (120 tensors)"] == "another network; --key model takes it"
    assert chosen.which == "key" and chosen.deviations() == ["the key encoder instead of the query encoder"]


def two_networks(tmp_path) -> str:
    """As I-JEPA's and BYOL's re-implementations keep them."""
    both = {"encoder": under("module.", body(0)), "target_encoder": under("module.", body(1))}
    return written(tmp_path, both | {"predictor": mlp(8).state_dict(), "opt": {}, "epoch": 9})


def test_of_several_networks_one_is_chosen(tmp_path):
    path = two_networks(tmp_path)
    assert "holds several networks, in 'encoder', 'target_encoder'; choose one: --key encoder" in error(path)
    assert "--key nothing names no single network in it; there are 'encoder', 't" in error(path, key="nothing")
    first, second = load(path, key="encoder"), load(path, key="target_encoder")
    assert same(first, 0) and same(second, 1)
    assert (first.which, second.which) == ("query", "key")
    assert "only the key encoder is in this file" in error(path, key="target_encoder", encoder="query")


def test_what_was_chosen_tells_runs_apart(tmp_path):
    """Same file, same architecture: without it, one network's features would be taken for the other's."""
    path = written(tmp_path, {"left": body(0), "right": body(1)})
    left, right = load(path, key="left"), load(path, key="right")
    assert left.identity() != right.identity() and left.run_name != right.run_name
    assert left.record()["key"] == "left" and "key" not in load(written(tmp_path, body(0), "plain.pth")).record()


@pytest.mark.parametrize("key", ["left", "nets.left"])
def test_of_several_prefixes_one_is_chosen(key, tmp_path):
    state = under("nets.left.", body(0)) | under("nets.right.", body(1)) | {"t": torch.zeros(1)}
    path = written(tmp_path, state)
    assert same(load(path, key=key), 0) and same(load(path, key="right"), 1)
    left = dict(load(path, key=key).dropped)
    assert any(name.startswith("other tensors (") for name in left)
    assert "--key nets names no single network in it" in error(path, key="nets")


def test_a_key_where_there_is_nothing_to_choose(tmp_path):
    assert "it holds a single one: leave it out" in error(written(tmp_path, body(0)), key="net")
    assert "pixels is a single network; leave it out" in error("pixels", key="net")
    path = written(tmp_path, {"state_dict": moco(mlp)})
    assert "networks are under 'encoder_q.', 'encoder_k.'" in error(path, key="net")


def test_tensors_without_a_backbone_are_named(tmp_path):
    message = error(written(tmp_path, {"net": {"features.0.weight": torch.zeros(2)}, "epoch": 3}))
    assert "holds tensors in 'net', and no backbone that we know among them (its tensors: features.0.weight" in message
    assert "holds no tensors; its entries: epoch" in error(written(tmp_path, {"epoch": 3}))


def test_the_commands_take_the_key(tmp_path, capfd, monkeypatch):
    path = two_networks(tmp_path)
    assert "choose one: --key encoder" in error_line(capfd, monkeypatch, "inspect", path)
    assert "in 'target_encoder'" in in_process(capfd, monkeypatch, "inspect", path, "--key", "target_encoder")[0]
    copy = tmp_path / "copy.pkl"
    convert(path, copy, "detectron2", key="target_encoder")
    assert same(load(str(copy)), 1)
    assert json.loads((tmp_path / "copy.pkl.json").read_text())["which"] == "key"


# Wrappers


WRAPPERS = (
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_fpw_module",
    "_forward_module",
    "_module",
)


@pytest.mark.parametrize("word", WRAPPERS)
@pytest.mark.parametrize("layout", ["bare", "moco", "prefix"])
def test_wrappers_inside_of_names_do_not_matter(word, layout, tmp_path):
    prefix = {"bare": "", "moco": "module.encoder_q.", "prefix": "my.net."}[layout]
    plain = under(prefix, body(0)) | ({"my.scale": torch.zeros(1)} if layout == "prefix" else {})
    inside = {name.replace("layer1.0.", f"layer1.{word}.0.{word}."): tensor for name, tensor in plain.items()}
    encoder = load(written(tmp_path, {"state_dict": under(f"{word}.", inside)}))
    assert same(encoder, 0) and encoder.origin == load(written(tmp_path, {"state_dict": plain})).origin


def test_only_whole_parts_of_names_are_wrappers():
    assert unwrapped("my_module.a_orig_mod.conv1._module") == "my_module.a_orig_mod.conv1._module"
    assert unwrapped("_orig_mod.module._forward_module.conv1.weight") == "conv1.weight"
