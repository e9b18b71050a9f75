"""One's own encoder, saved in the ways in which people save: read to the last bit, or refused with the way out."""

import argparse
from collections.abc import Callable

import checkpoints
import pytest
import torch
from checkpoints import ARCH, body, error, network, under, written
from torch import nn

from moco_eval.encoders.load import load


class Own(nn.Module):
    """A network of one's own around a backbone."""

    def __init__(self):
        super().__init__()
        self.backbone = network(0)
        self.projector = nn.Linear(128, 16)


class Small(nn.Module):
    """A network that is none of those that are built here."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.fc1 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), nn.Linear(8, 10)


def weights() -> dict[str, torch.Tensor]:
    return network(0).state_dict()


def of_optimizer() -> dict:
    """The state of an optimiser that has made a step."""
    net = network(0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.zeros(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def halved() -> dict[str, torch.Tensor]:
    return {name: value.half() if value.is_floating_point() else value for name, value in weights().items()}


LIGHTNING: dict = {"pytorch-lightning_version": "2.4.0", "global_step": 9, "callbacks": {}, "loops": {}}
SHAPES: dict[str, Callable[[], dict]] = {
    "bare": weights,
    "net": lambda: {"net": weights(), "acc": 91.2, "epoch": 3},
    "model": lambda: {"model": weights(), "epoch": 3},
    "state_dict of DDP": lambda: {"state_dict": under("module.", weights()), "optimizer": of_optimizer(), "epoch": 3},
    "Lightning": lambda: {"state_dict": Own().state_dict(), "optimizer_states": [of_optimizer()], **LIGHTNING},
    "Lightning, named model": lambda: {"state_dict": under("model.", weights()), **LIGHTNING},
    "encoder": lambda: {"encoder": weights(), "projector": nn.Linear(128, 16).state_dict(), "args": {"lr": 0.1}},
    "unknown name": lambda: {"my_net": weights(), "optim": of_optimizer(), "epoch": 3, "loss": torch.tensor(0.3)},
    "half": lambda: {"net": halved()},
    "compiled": lambda: under("_orig_mod.", weights()),
    "compiled in DDP": lambda: {"net": under("module._orig_mod.", weights())},
    "DDP in compiled": lambda: {"net": under("_orig_mod.module.", weights())},
    "argparse beside": lambda: {"net": weights(), "args": argparse.Namespace(lr=0.1)},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_ones_own_checkpoint_is_read(shape, tmp_path):
    encoder = load(written(tmp_path, SHAPES[shape]()))
    assert encoder.arch == ARCH
    arrived = encoder.backbone.state_dict()
    for name, tensor in body(0).items():
        wanted = tensor.half().float() if shape == "half" and tensor.is_floating_point() else tensor
        assert torch.equal(arrived[name], wanted), name
    assert any("float16" in warning for warning in encoder.warnings) == (shape == "half")


SAVED = "torch.save(model.state_dict(), 'encoder.pth')"
REFUSED: dict[str, tuple[Callable, str]] = {
    "a whole network": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), "holds a whole network"),
    "a whole network in a dict": (lambda: {"net": nn.Sequential(nn.ReLU()), "epoch": 3}, "a whole network as 'net'"),
    "a whole network of one's own": (Small, "wants to run code named"),
    "a list": (lambda: [weights(), 3], "holds a list, not a dict of named tensors"),
}


@pytest.mark.parametrize("shape", REFUSED)
def test_what_is_no_state_dict_is_refused_with_the_line_that_saves_one(shape, tmp_path):
    values, words = REFUSED[shape]
    path = tmp_path / "own.pth"
    torch.save(values(), path)
    assert words in error(str(path)) and SAVED in error(str(path))


@pytest.mark.parametrize("name", ["net", None])
def test_a_network_that_is_not_built_here_is_told_the_truth(name, tmp_path):
    """It is a state_dict already: nobody is asked to save one."""
    state = Small().state_dict()
    message = error(written(tmp_path, {name: state} if name else state))
    assert "moco_eval.wrap" in message and "saved" not in message


def test_the_cifar_network_of_a_usual_tutorial_gives_its_own_features(tmp_path):
    """Shortcuts by another name, three-pixel stem: the numbers are those of the network as its author runs it."""
    file = checkpoints.FILES["kuangliu"]()
    encoder = load(written(tmp_path, file.values))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(encoder.backbone(images), by_hand(file.values["net"], images))
    assert encoder.preprocessing is not None and encoder.preprocessing.size == 32


def by_hand(tensors: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """A ResNet of basic blocks, (N, 3, H, W) to (N, dim), step by step."""

    def conv(name: str, values: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight = tensors[f"module.{name}.weight"]
        return torch.conv2d(values, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(name: str, values: torch.Tensor) -> torch.Tensor:
        of = (tensors[f"module.{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return torch.nn.functional.batch_norm(values, *of)

    values = norm("bn1", conv("conv1", images)).relu()
    for layer in range(1, 5):
        for block in range(2):
            at, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            out = norm(f"{at}.bn1", conv(f"{at}.conv1", values, stride)).relu()
            out = norm(f"{at}.bn2", conv(f"{at}.conv2", out))
            if f"module.{at}.shortcut.0.weight" in tensors:
                values = norm(f"{at}.shortcut.1", conv(f"{at}.shortcut.0", values, stride))
            values = (out + values).relu()
    return values.mean((2, 3))
