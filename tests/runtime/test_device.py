"""Switches that torch keeps for the whole process: off while we compute, and back."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import backends

from moco_eval.runtime import device as devices
from moco_eval.runtime.device import autocast, borrowed_generator, convolutions, exact_arithmetic

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


GPU, HALF_EXACT = torch.device("cuda", 0), ["highest", True, False]


@pytest.fixture
def ampere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))


def test_tf32_is_on_for_convolutions_alone_and_off_again(host, ampere):
    with exact_arithmetic():
        before = seen()
        with convolutions(GPU, "tf32"):
            assert seen()[-3:] == HALF_EXACT  # no name raises: torch's own compiler reads them
            assert backends.cudnn.conv.fp32_precision == "tf32" != backends.cuda.matmul.fp32_precision
            with convolutions(GPU, "tf32"):
                pass
            assert seen()[-3:] == HALF_EXACT
        assert seen() == before
    assert seen() == host


def test_of_several_threads_the_last_turns_tf32_off(host, ampere):
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with convolutions(GPU, "tf32"):
            entered.set()
            leave.wait(10)

    with exact_arithmetic():
        thread = threading.Thread(target=other)
        with convolutions(GPU, "tf32"):
            thread.start()
            assert entered.wait(10)
        assert seen()[-3:] == HALF_EXACT
        leave.set()
        thread.join()
        assert "tf32" not in seen()[:5]
    assert seen() == host


def test_an_error_turns_convolutions_back_too(host, ampere):
    with exact_arithmetic():
        with pytest.raises(KeyError), convolutions(GPU, "tf32"):
            raise KeyError
        assert seen()[-3:] == ["highest", False, False]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_precisions_turn_nothing_on(precision, ampere):
    with exact_arithmetic(), autocast(torch.device("cpu"), precision), convolutions(GPU, precision):
        assert seen()[-3:] == ["highest", False, False]


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_where_there_is_no_tf32_it_is_fp32_and_said_once(device, monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    devices._say_that_tf32_is_fp32.cache_clear()
    with exact_arithmetic():
        for _ in range(2):
            with convolutions(torch.device(device), "tf32"):
                assert seen()[-3:] == ["highest", False, False]
    assert capfd.readouterr().err == f"warning: {device} has no TF32: precision tf32 is fp32 there\n"


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
    assert devices.place(net, torch.device("cpu")) is net and net.weight.is_contiguous()


# Compiled networks


@pytest.fixture
def modes(monkeypatch):
    """The modes in which networks are compiled, where compilers and graphs work."""
    taken: list = []
    monkeypatch.setattr(devices, "can_compile", lambda device: True)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode=None: taken.append(mode))
    tried = devices.can_record
    tried.cache_clear()
    yield taken
    tried.cache_clear()


def test_graphs_are_left_with_a_word_on_a_cpu(modes, capfd):
    for _ in range(2):
        devices.compile_([torch.nn.Linear(1, 1)], torch.device("cpu"), graphs=True)
    assert modes == [None, None]
    assert capfd.readouterr().err == (
        "warning: compile reduce-overhead records CUDA graphs, which cpu does not have; continuing without graphs\n"
    )


def test_graphs_are_left_with_a_word_where_they_fail(modes, monkeypatch, capfd):
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)

    def fails(self, mode=None):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    before = torch.random.get_rng_state()
    monkeypatch.setattr(torch.nn.Module, "compile", fails)
    assert not devices.can_record(GPU)
    assert "do not work here (operation not permitted" in capfd.readouterr().err
    assert torch.equal(torch.random.get_rng_state(), before)


def test_graphs_are_taken_where_they_work_and_asked_for(modes, monkeypatch):
    monkeypatch.setattr(devices, "can_record", lambda device: True)
    for graphs in (True, False):
        devices.compile_([torch.nn.Linear(1, 1)], GPU, graphs=graphs)
    assert modes == ["reduce-overhead", None]


@pytest.mark.gpu
def test_graphs_work_on_a_gpu():
    devices.can_record.cache_clear()
    assert devices.can_record(GPU)
