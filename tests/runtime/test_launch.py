"""Processes meet where no other user can: nothing listens beyond loopback, nothing that arrives is executed."""

import contextlib
import os
import signal
import socket
import stat
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from commands import descendants, start
from ranks import run_ranks
from strangers import NOBODY, as_root, stranger

from moco_eval.errors import RunFailed
from moco_eval.runtime import launch, rendezvous
from moco_eval.runtime.collectives import from_main, gather_values, union
from moco_eval.runtime.messages import packed, unpacked
from moco_eval.runtime.rank import rank

CONNECT = "connection = socket.create_connection(('127.0.0.1', int(sys.argv[1]))); print('in', flush=True); input()"
ATTACK = """
try:
    print(os.listdir(sys.argv[1]))
except PermissionError:
    print('folder closed', flush=True)
signal.alarm(5)  # what is no store leaves a client of one waiting
store = dist.TCPStore('127.0.0.1', int(sys.argv[2]), is_master=False, wait_for_workers=False)
store.set('torch.rendezvous', 'a pickle')
print('set a key')
"""
VALUES = [
    [None, True, 1, 2**70, 0.1, float("inf"), "é\ud800", b"\x00\xff", {"a": 1, 3: (4, {5, 6})}, [], (), {}],
    {
        "scores": torch.rand(3, 4),
        "labels": np.arange(5),
        "empty": np.zeros((0, 2), np.float32),
        "scalar": np.float32(2),
    },
]


def assert_same(one, other) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key, value in one.items():
            assert_same(value, other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for values in zip(one, other):
            assert_same(*values)
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype and np.array_equal(one, other)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    else:
        assert one == other


@pytest.mark.parametrize("value", VALUES, ids=["plain", "arrays"])
def test_what_processes_tell_each_other_arrives_as_it_was(value):
    arrived = unpacked(packed(value))
    if isinstance(value, dict):
        assert arrived.pop("scalar") == value["scalar"]
        value = {name: item for name, item in value.items() if name != "scalar"}
    assert_same(arrived, value)


@pytest.mark.parametrize("value", [object(), np.array([object()]), Path("x")], ids=lambda value: type(value).__name__)
def test_they_tell_each_other_nothing_that_would_be_executed(value):
    with pytest.raises(TypeError, match="do not tell each other"):
        packed(value)


def in_each_rank() -> dict:
    """What two processes open and tell each other, where nothing can be unpickled."""
    dist.distributed_c10d._unpickler = None
    own = rendezvous._own_inodes()
    sockets = [each for each in rendezvous.tcp_sockets() if each.inode in own]
    return {
        "listening": [each.local for each in sockets if each.state == rendezvous.LISTENING],
        "from main": from_main([[rank(), (1, "é")], torch.arange(3)] if rank() == 0 else [None, None]),
        "values": gather_values({"rank": rank(), "rows": list(range(100 * rank()))}),
        "nothing": gather_values([]),
        "union": sorted(union({rank(), 7})),
    }


def test_two_processes_open_loopback_only_and_unpickle_nothing(tmp_path):
    for each in run_ranks(in_each_rank, tmp_path):
        assert each["listening"] and all(local.startswith("0100007F:") for local in each["listening"])
        assert each["from main"][0] == [0, (1, "é")] and torch.equal(each["from main"][1], torch.arange(3))
        assert each["values"] == [{"rank": 0, "rows": []}, {"rank": 1, "rows": list(range(100))}]
        assert each["nothing"] == [[], []] and each["union"] == [0, 1, 7]


def test_the_meeting_is_private_and_ends(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    with rendezvous.private_meeting():
        folder = Path(os.environ[rendezvous.FOLDER])
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and folder.parent == Path(tempfile.gettempdir())
        assert os.environ["GLOO_SOCKET_IFNAME"] == "lo" and os.environ["NCCL_SOCKET_IFNAME"] == "=lo"
    assert not folder.exists() and rendezvous.FOLDER not in os.environ
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7" and "NCCL_SOCKET_IFNAME" not in os.environ


def test_the_launcher_opens_no_store(monkeypatch, capfd):
    def refused(*arguments, **keywords):
        raise AssertionError("a TCP store was opened")

    monkeypatch.setattr("torch.distributed.TCPStore", refused)
    monkeypatch.setattr("torch.distributed.elastic.rendezvous.c10d_rendezvous_backend.TCPStore", refused)
    monkeypatch.setattr("torch.distributed.elastic.rendezvous.dynamic_rendezvous.TCPStore", refused, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv(launch.OWN_STORE, "1")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        assert launch.launch(2, ["--version"]) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert capfd.readouterr().out.count("moco-eval") == 2


@as_root
def test_another_users_connection_is_refused_and_our_own_is_not():
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()):
            rendezvous.require_own_peers()
            other = stranger("socket", CONNECT, server.getsockname()[1])
            assert other.stdout.readline() == "in\n"
            with pytest.raises(RunFailed, match=f"user {NOBODY} .* has connected"):
                rendezvous.require_own_peers()
            other.communicate("\n", timeout=10)
        rendezvous.require_own_peers()


def listening(pid: int) -> list[str]:
    """Addresses on which a process and those below it listen."""
    inodes = set()
    for process in (pid, *descendants(pid)):
        with contextlib.suppress(FileNotFoundError):  # it has ended meanwhile
            for name in os.listdir(f"/proc/{process}/fd"):  # noqa: PTH208
                with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
                    link = os.readlink(f"/proc/{process}/fd/{name}")  # noqa: PTH115
                    inodes.add(link.removeprefix("socket:[").removesuffix("]"))
    rows = rendezvous.tcp_sockets()
    return [each.local for each in rows if each.state == rendezvous.LISTENING and each.inode in inodes]


@pytest.mark.slow
@as_root
def test_a_stranger_finds_no_store_also_after_a_restart(tmp_path):
    settings = ["arch=resnet18_quarter", "views.size=32", "workers=0", "knn=null", "schedule.epochs=500"]
    run = ["pretrain", "digits", "--dataset", "digits", "--output", tmp_path / "run", "--nproc", "2"]
    process = start(*run, "--max-restarts", "1", *(f"--set={setting}" for setting in settings))
    try:
        folder = attacked_before_and_after_a_restart(process, tmp_path / "run" / "checkpoints" / "last.pth")
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        for pid in (process.pid, *descendants(process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert process.returncode == 3 and "resuming at step" in err, err
    assert not Path(folder).exists()


def attacked_before_and_after_a_restart(process: subprocess.Popen, checkpoint: Path) -> str:
    """The folder in which the processes of a launch met, which the attacks did not open."""
    for attempt in range(2):
        while not checkpoint.exists() or len(listening(process.pid)) < 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        addresses = listening(process.pid)
        assert all(address.startswith("0100007F:") for address in addresses), addresses
        worker = descendants(process.pid)[-1]
        (folder,) = [
            variable.partition("=")[2]
            for variable in Path(f"/proc/{worker}/environ").read_text().split("\0")
            if variable.startswith(rendezvous.FOLDER)
        ]
        ports = [int(address.partition(":")[2], 16) for address in addresses]
        for port in ports:
            attack = stranger("signal, torch.distributed as dist", ATTACK, folder, port)
            assert attack.communicate(timeout=60)[0] == "folder closed\n"
        if attempt == 0:
            os.kill(worker, signal.SIGKILL)
            while any(local in addresses for local in listening(process.pid)):
                time.sleep(0.05)
    return folder
