"""hf:ORG/NAME[/FILE] through the hub's own client, against a small hub of this machine's own."""

import hashlib
import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from checkpoints import error, used
from hub_server import running
from safetensors.torch import save

from moco_eval.encoders import hub
from moco_eval.encoders.architectures import build_backbone
from moco_eval.encoders.load import load
from moco_eval.encoders.sources import require_source
from moco_eval.errors import InputError, RunFailed


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub of nobody's and an empty cache."""
    with running() as own:
        template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
        template = template.replace(huggingface_hub.constants.ENDPOINT, own.address)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", own.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)
        yield own


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    return used(build_backbone("resnet18_quarter"), 0).eval()


@pytest.fixture
def published(server, net) -> dict[str, bytes]:
    """A repository with weights, settings that change its pixels, and what nobody asks for."""
    pixels = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 160, 160], "crop_pct": 1.0}
    files = {
        "README.md": b"# a model",
        "model.safetensors": save(net.state_dict()),
        "config.json": json.dumps({"pretrained_cfg": pixels}).encode(),
    }
    server.repositories["somebody/net"] = files
    return files


def test_weights_and_settings_come_from_the_hub_once(server, published, net, capfd):
    encoder = load("hf:somebody/net")
    theirs = net.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in encoder.backbone.state_dict().items())
    assert (encoder.source, encoder.run_name) == ("hf:somebody/net", "hf-somebody_net")
    assert encoder.origin.endswith("settings of config.json, commit 0123456789 of hf:somebody/net")
    assert encoder.sha256 == hashlib.sha256(published["model.safetensors"]).hexdigest()
    assert encoder.preprocessing.size == 160 and not any("README" in path for path in server.asked)
    downloads = server.downloads()
    assert len(downloads) == 2 and load("hf:somebody/net/model.safetensors").sha256 == encoder.sha256
    assert server.downloads() == downloads
    assert capfd.readouterr() == ("", "")


def test_an_earlier_download_is_taken_without_a_network(published, monkeypatch):
    before = load("hf:somebody/net")
    monkeypatch.setattr(hub, "unreachable", lambda url: "no way")
    again = load("hf:somebody/net")
    assert (again.sha256, again.origin) == (before.sha256, before.origin)
    message = error("hf:somebody/other")
    assert message.startswith("hf:somebody/other: cannot download it (no way)") and message.endswith("path of a file")


def test_what_is_not_as_the_hub_lists_it_is_not_kept(server, published, tmp_path):
    server.listed["model.safetensors"] = {"lfs": {"sha256": "a" * 64, "size": 1, "pointerSize": 1}}
    with pytest.raises(RunFailed, match=f"expected {'a' * 64} as the hub lists; it is not kept"):
        load("hf:somebody/net")
    assert not list(tmp_path.rglob("model.safetensors"))
    server.listed.clear()
    assert load("hf:somebody/net").arch == "resnet18_quarter"


def test_a_file_beyond_the_limit_is_not_fetched(server, published):
    server.listed["model.safetensors"] = {"size": 17_000_000_000}
    assert "has 17000000" in error("hf:somebody/net")
    assert not server.downloads()


def test_which_file_is_taken(server):
    files = dict.fromkeys(["a.pth", "b.bin", "sub/c.safetensors", "README.md"], b"")
    server.repositories["somebody/many"] = files
    assert (
        "several files of weights: a.pth, b.bin, sub/c.safetensors. Name one, such as hf:somebody/many/a.pth"
        in error("hf:somebody/many")
    )
    assert "no such file there; its weights are a.pth, b.bin, sub/c.safetensors" in error("hf:somebody/many/x.pth")
    server.repositories["somebody/none"] = {"README.md": b""}
    assert "has no weights (.pth, " in error("hf:somebody/none")
    message = error("hf:somebody/nowhere")
    assert "cannot be had from http://127.0.0.1:" in message and "no such repository, or a private one" in message


def test_the_shards_that_an_index_lists_come_along(server, net):
    tensors = net.state_dict()
    halves = list(tensors)[::2], list(tensors)[1::2]
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {tensor: name for name, half in zip(names, halves) for tensor in half}}
    files = {name: save({tensor: tensors[tensor] for tensor in half}) for name, half in zip(names, halves)}
    files |= {"model.safetensors.index.json": json.dumps(index).encode(), "other-00001-of-00002.safetensors": b""}
    server.repositories["somebody/large"] = files
    assert load("hf:somebody/large").tensors_loaded and not any("other" in path for path in server.asked)


@pytest.mark.parametrize("rest", ["", "net", "../x/y", "a/b/../../c", "/data/net.pth", "a/b/c@"])
def test_what_is_no_name_of_the_hub(rest):
    with pytest.raises(InputError, match="a file on this machine is given by its path alone"):
        require_source(f"hf:{rest}")


def test_names_with_a_file_and_a_revision():
    for text in ("hf:a/b", "hf:a/b/c.pth", "hf:a/b@v1", "hf:a/b/sub/c.pth@refs/pr/1"):
        assert str(hub.parse(text.removeprefix("hf:"))) == text
    assert hub.parse("a/b/sub/c.pth@v1") == hub.HubName("a/b", "sub/c.pth", "v1")
    assert hub.commit_of(Path("/cache/models--a--b/snapshots/0123/sub/c.pth")) == "0123"
