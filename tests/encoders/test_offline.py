"""Published weights without a network: one line within two seconds, and an earlier download where there is one."""

import logging
import socket
import time

import huggingface_hub
import pytest
import timm
import torch
from checkpoints import error, used
from safetensors.torch import save_file

from moco_eval.encoders.load import load
from moco_eval.runtime import connection

SOURCES = ("timm:resnet18", "timm:convnext_tiny.fb_in22k", "torchvision:resnet18")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of nobody's, of the hub and of torch, and no proxy."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return tmp_path / "hub"


def resolver(answer):
    def getaddrinfo(host, *_, **__):
        return answer(host)

    return getaddrinfo


def no_name(host):
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def a_closed_port(_host):
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 1))]


def no_answer(_host):
    time.sleep(4)
    return no_name(_host)


@pytest.mark.parametrize(
    ("source", "answer"),
    [*((source, answer) for source in SOURCES for answer in (no_name, a_closed_port)), ("timm:resnet18", no_answer)],
)
def test_one_line_within_two_seconds(source, answer, hub, monkeypatch, capfd):
    timm.list_models()
    monkeypatch.setattr(socket, "getaddrinfo", resolver(answer))
    start = time.perf_counter()
    message = error(source)
    assert time.perf_counter() - start < 2
    assert message.startswith(f"{source}: cannot download ") and message.endswith("give the path of a file")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:1", "127.0.0.1:1"])
def test_a_proxy_that_is_closed(proxy, hub, monkeypatch):
    monkeypatch.setenv("https_proxy", proxy)
    assert "127.0.0.1: Connection refused" in error("timm:resnet18")


def test_a_server_that_listens(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/file"
        assert connection.unreachable(url) is None
        monkeypatch.setenv("http_proxy", url)
        assert connection.unreachable("http://nowhere.invalid/file") is None
    assert connection.unreachable(url, wait=0.2)


def test_an_earlier_download_is_taken(hub, monkeypatch):
    """timm:NAME without a network, with the file that the hub's client left."""
    net = used(timm.create_model("resnet18", pretrained=False), 0).eval()
    published = timm.get_pretrained_cfg("resnet18")
    folder = hub / f"models--{published.hf_hub_id.replace('/', '--')}"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    save_file(net.state_dict(), folder / "snapshots" / "abc" / "model.safetensors")
    monkeypatch.setattr(socket, "getaddrinfo", resolver(no_name))
    encoder = load("timm:resnet18")
    theirs = net.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in encoder.backbone.state_dict().items())
    assert encoder.origin == "timm resnet18.a1_in1k"


def test_the_hubs_logger_is_as_before(hub, monkeypatch):
    logger = logging.getLogger("huggingface_hub")
    before = logger.level

    def fails(*_, **__):
        logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s")
        raise OSError("cut off")

    monkeypatch.setattr("moco_eval.encoders.libraries.unreachable", lambda *_: None)
    monkeypatch.setattr(timm, "create_model", fails)
    assert "cut off" in error("timm:resnet18")
    assert logger.level == before


def test_words_for_names_and_tags_that_there_are_not():
    assert "Did you mean convnext_tiny" in error("timm:convnex_tiny")
    assert "it has resnet18.a1_in1k, " in error("timm:resnet18.a1_in1kk")
    assert "random:timm:vit_small_patch16_18x2_224" in error("timm:vit_small_patch16_18x2_224")
