"""One process of several fails: it says why, with its rank, and holds up nobody."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, environment

pytestmark = pytest.mark.slow
FAILS = """
import os
from moco_eval.errors import RunFailed
from moco_eval.cli.main import main
from pretraining.train import Trainer

after_step = Trainer.after_step

def failing(self):
    if self.step == 3 and os.environ["RANK"] == "1":
        raise {error}
    return after_step(self)

Trainer.after_step = failing
main()
"""


def both(folder: Path, error: str) -> list[tuple[int, str, float]]:
    """Exit code, standard error and seconds of two processes, the second of which fails in its third step."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = [f"--set={setting}" for setting in ("arch=resnet18_quarter", "views.size=32", "workers=0", "knn=null")]
    arguments = ["pretrain", "digits", "--dataset", "digits", "--output", str(folder / "run"), *settings]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FAILS.format(error=error), *arguments],
            env=environment() | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    ends = []
    for process in reversed(processes):
        _, err = process.communicate(timeout=120)
        ends.append((process.returncode, err, time.monotonic()))
    return ends[::-1]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("RunFailed('the paint is wet')", "(rank 1)"),
        ("ZeroDivisionError('the paint is wet')", "rank 1: Traceback"),
        ("RuntimeError('NCCL: the paint is wet')", "rank 1 has lost the other processes (NCCL: the paint is wet)"),
    ],
)
def test_it_says_why_and_the_others_end_too(tmp_path, error, reason):
    (code_0, err_0, end_0), (code_1, err_1, end_1) = both(tmp_path, error)
    assert code_1 == 1 and err_1.count(reason) == err_1.count("the paint is wet") == 1, err_1
    assert code_0 == 1 and err_0.count("rank 0 has lost the other processes") == 1, err_0
    assert "Traceback" not in err_0
    assert end_0 - end_1 < 10
