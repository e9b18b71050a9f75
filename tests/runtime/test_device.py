"""Switches that torch keeps for the whole process: off while we compute, and back."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import backends

from moco_eval.runtime import device
from moco_eval.runtime.device import borrowed_generator, exact_arithmetic

pytestmark = pytest.mark.skipif(
    not hasattr(backends, "fp32_precision"), reason="torch before 2.9 has the old names only"
)


def places() -> tuple:
    return backends, backends.cuda.matmul, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn


def seen() -> list:
    """Every name's value; None where torch cannot say it."""
    values: list = [place.fp32_precision for place in places()]
    for read in (
        torch.get_float32_matmul_precision,
        lambda: backends.cudnn.allow_tf32,
        lambda: backends.cuda.matmul.allow_tf32,
    ):
        try:
            values.append(read())
        except RuntimeError:
            values.append(None)
    return values


def set_all(**names) -> None:
    for place, value in names.items():
        owner = {"matmul": backends.cuda.matmul, "conv": backends.cudnn.conv, "all": backends}[place]
        owner.fp32_precision = value


HOSTS = {
    "usual": lambda: None,
    "matmul by the old name": lambda: setattr(backends.cuda.matmul, "allow_tf32", True),
    "cudnn by the old name": lambda: setattr(backends.cudnn, "allow_tf32", False),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "by the new names": lambda: set_all(matmul="tf32", conv="tf32"),
    "all by the new name": lambda: set_all(all="tf32"),
}


@pytest.fixture(params=HOSTS)
def host(request) -> Iterator[list]:
    """A host with its own wishes: what it sees of them."""
    before = seen()
    HOSTS[request.param]()
    yield seen()
    backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = True
    for place, value in zip(places(), before):
        if place.fp32_precision != value:
            place.fp32_precision = value
    assert seen() == before


def test_tf32_is_off_within_and_as_it_was_afterwards(host):
    with exact_arithmetic():
        assert seen()[-3:] == ["highest", False, False]  # no name raises: torch's own compiler reads them
        assert "tf32" not in seen()[:5]
        with exact_arithmetic():
            pass
        assert "tf32" not in seen()[:5]
    assert seen() == host


def test_the_last_thread_turns_it_back(host):
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with exact_arithmetic():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with exact_arithmetic():
        thread.start()
        assert entered.wait(10)
    assert "tf32" not in seen()[:5]
    leave.set()
    thread.join()
    assert seen() == host


def test_an_error_turns_it_back_too(host):
    with pytest.raises(KeyError), exact_arithmetic():
        raise KeyError
    assert seen() == host


def test_a_borrowed_generator_is_given_back():
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    with borrowed_generator(7):
        inside = torch.rand(4)
    assert torch.equal(torch.rand(4), wanted)
    with borrowed_generator(7):
        assert torch.equal(torch.rand(4), inside)


def test_on_a_cpu_a_network_keeps_its_layout():
    net = torch.nn.Conv2d(3, 8, 3)
    assert device.place(net, torch.device("cpu")) is net and net.weight.is_contiguous()
