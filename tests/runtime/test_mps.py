"""Apple's GPU: taken where torch says that it is there, refused in one line elsewhere. No machine here has one."""

import pytest
import torch

from moco_eval.config import load as configs
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.errors import InputError
from moco_eval.runtime.device import choose_device, with_float64
from pretraining.plan import by_device

MPS, CPU = torch.device("mps"), torch.device("cpu")


@pytest.fixture
def there(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("is_built", "is_available"):
        monkeypatch.setattr(torch.backends.mps, name, lambda: True)


@pytest.mark.parametrize("name", ["auto", "mps", "mps:0"])
def test_it_is_taken_where_it_is(there, name):
    assert choose_device(name).type == "mps"


def test_several_processes_take_the_cpu_or_are_refused(there, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose_device("auto") == CPU
    with pytest.raises(InputError, match="--device mps: MPS has no collectives, so it takes one process"):
        choose_device("mps")


def test_a_second_one_is_refused(there):
    with pytest.raises(InputError, match="--device mps:1: there is one MPS device"):
        choose_device("mps:1")


def test_elsewhere_it_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    with pytest.raises(InputError, match="--device mps: this machine has no MPS device; take --device cpu"):
        choose_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: False)
    with pytest.raises(InputError, match="--device mps: this torch has no MPS; take --device cpu"):
        choose_device("mps")


def test_a_gpu_of_nvidia_comes_first(there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert choose_device("auto").type == "cuda"


def test_float64_is_the_cpus():
    assert with_float64(MPS) == CPU
    assert {with_float64(device) for device in (CPU, torch.device("cuda", 1))} == {CPU, torch.device("cuda", 1)}


def test_arithmetic_is_as_published_and_fp16_is_refused():
    def config(precision: str) -> PretrainConfig:
        return configs.load("digits", "pretrain", PretrainConfig, [f"precision={precision}"])

    assert by_device(config("auto"), MPS) | {"compile": False} == {"precision": "fp32", "compile": False}
    with pytest.raises(InputError, match=r"precision fp16 .* MPS"):
        by_device(config("fp16"), MPS)
