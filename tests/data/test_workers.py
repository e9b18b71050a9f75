"""Loader processes that cannot send, die or wait: one line that says why, and signals that are heard."""

import multiprocessing
import os
import re
import signal
import tempfile
import threading
import time
from types import SimpleNamespace

import click
import pytest
import torch
from commands import error_line

from moco_eval.data import workers
from moco_eval.data.workers import Loaded, explanation, prefetch
from moco_eval.errors import InputError, Interrupted, RunFailed
from moco_eval.runtime.launch import processes
from moco_eval.runtime.stop import Stop


class Numbers:
    """Item i is the tensor i, but for those of which `odd` says otherwise."""

    def __init__(self, odd=None):
        self.odd = odd or (lambda index: None)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        special = self.odd(index)
        return torch.tensor([index]) if special is None else special


class Unsendable:
    def __reduce__(self):
        raise OSError(24, "Too many open files")


ONE_BY_ONE = [[index] for index in range(8)]


@pytest.mark.parametrize("count", [0, 2])
def test_batches_come_in_order(count):
    assert torch.cat(list(Loaded(Numbers(), ONE_BY_ONE, count))).flatten().tolist() == list(range(8))


def test_a_batch_that_cannot_be_sent_ends_the_iteration_with_the_reason():
    """multiprocessing prints it and goes on; who waits for the batch would wait for ever."""
    numbers = Numbers(lambda index: Unsendable() if index == 3 else None)
    began = time.monotonic()
    with pytest.raises(RunFailed, match=r"too few open files .*ulimit -n says \d+.*--workers 0"):
        list(Loaded(numbers, ONE_BY_ONE, 1, collate_fn=list))
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("Caught RuntimeError in DataLoader worker process 0.\nunable to write to file </torch_9_1_0>: No space left "
         "on device (28)", "/dev/shm has no room for the batches"),
        ("DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that dataloader's workers are out "
         "of shared memory.", "docker run --shm-size=8g, or --ipc=host"),
        ("AF_UNIX path too long; DataLoader worker (pid(s) 12, 13) exited unexpectedly", "set TMPDIR=/tmp"),
        ("received 0 items of ancdata", "ulimit -n 4096"),
        ("DataLoader worker (pid 12) is killed by signal: Killed. ", r"pid 12\) was ended by signal 'Killed', perhaps"),
        ("DataLoader worker (pid(s) 12, 13) exited unexpectedly", r"\(pid 12, 13\) has ended.*run the same command"),
    ],
)  # fmt: skip
def test_what_ends_loader_processes_is_explained(error, words):
    assert re.search(words, explanation(error))


def test_other_errors_are_their_own():
    assert explanation("mat1 and mat2 shapes cannot be multiplied") is None


def test_the_reason_of_a_worker_counts():
    lost = "DataLoader worker (pid(s) 12) exited unexpectedly"
    assert "TMPDIR is too long" in explanation(lost, "OSError: AF_UNIX path too long")
    assert "could not send its batch (ValueError: odd)" in explanation(lost, "ValueError: odd")


@pytest.mark.parametrize(("megabytes", "ready"), [(64, None), (160, 1), (400, 2), (10_000, 4)])
def test_what_workers_send_must_fit_into_shared_memory(megabytes, ready, monkeypatch, capfd):
    """Docker gives 64 MB; a batch of the shipped recipe, two views of 256 images of 224 pixels, takes 77."""
    monkeypatch.setattr(workers.os, "statvfs", lambda _: SimpleNamespace(f_bavail=megabytes * 1000, f_frsize=1000))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    batch = 2 * 256 * 3 * 224**2
    if ready is None:
        with pytest.raises(RunFailed, match=r"64 MB free, and 2 loader processes send batches of 77 MB.*--workers 0"):
            prefetch(2, batch)
        return
    assert prefetch(2, batch) == ready
    assert ("instead of 4" in capfd.readouterr().err) == (ready < 4)
    assert prefetch(2, 0) == 4


def test_a_long_tmpdir_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + 71 * "t")
    with pytest.raises(RunFailed, match=r"has 76 characters.*set TMPDIR=/tmp, or take --workers 0"):
        Loaded(Numbers(), ONE_BY_ONE, 1)
    Loaded(Numbers(), ONE_BY_ONE, 0)
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + 70 * "t")
    Loaded(Numbers(), ONE_BY_ONE, 1)


def _stalls(index: int) -> None:
    """Storage that does not answer: a pipe into which nobody writes."""
    if index == 2:
        reader, _writer = os.pipe()
        os.read(reader, 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("count", [0, 1])
def test_a_signal_is_heard_while_no_data_come(count, number, monkeypatch):
    monkeypatch.setattr(Stop, "PATIENCE", 0.2)
    began, seen = time.monotonic(), []
    threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
    with Stop(), pytest.raises(Interrupted, match=f"stopped by {signal.Signals(number).name} while no data came"):
        for batch in Loaded(Numbers(_stalls), ONE_BY_ONE, count):
            seen.append(batch.item())
    assert seen == [0, 1] and time.monotonic() - began < 15


def test_a_batch_that_comes_late_is_still_taken(monkeypatch):
    """Within the patience after a signal; the step after it decides."""
    monkeypatch.setattr(Stop, "PATIENCE", 30)
    numbers = Numbers(lambda index: time.sleep(0.5) if index == 1 else None)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with Stop() as stop:
        assert len(list(Loaded(numbers, ONE_BY_ONE, 0))) == 8
        assert stop.requested()


def _signals_itself(index: int) -> None:
    """What a scheduler does that signals every process of a job."""
    for number in Stop.SIGNALS if index == 2 else ():
        os.kill(os.getpid(), number)


def test_loader_processes_outlive_the_signals_that_the_step_is_to_hear():
    assert [batch.item() for batch in Loaded(Numbers(_signals_itself), ONE_BY_ONE, 1)] == list(range(8))


def _waits(writer: int) -> None:
    """A loader process whose storage does not answer."""
    workers.outlive_signals()
    os.write(writer, b"x")
    os.read(os.pipe()[0], 1)


def test_a_loader_process_that_waits_for_its_storage_ends_when_its_parent_says_so():
    reader, writer = os.pipe()
    child = multiprocessing.get_context("fork").Process(target=_waits, args=(writer,))
    child.start()
    os.read(reader, 1)
    child.terminate()
    child.join(20)
    assert child.exitcode == 0


def test_a_command_says_in_one_line_what_ended_a_loader_process(capfd, monkeypatch):
    """torch raises it wherever the waiting process happens to be."""

    def killed(*_: object, **__: object) -> None:
        raise RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. ")

    monkeypatch.setattr(click.Group, "invoke", killed)
    assert "a loader process (pid 12) was ended by signal 'Killed'" in error_line(capfd, monkeypatch, "configs", code=1)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK is 1 and MASTER_ADDR and MASTER_PORT not set"),
        ({"RANK": "1"}, "WORLD_SIZE and MASTER_ADDR and MASTER_PORT not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "x"}, "MASTER_PORT is 'x', which is no"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "0"}, None),
    ],
)
def test_half_an_environment_of_torchrun_is_refused(environment, words, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if words is None:
        with processes("cpu") as device:
            assert device == torch.device("cpu")
        return
    with pytest.raises(InputError, match=words), processes("cpu"):
        pass
