"""Run a function in several processes, on gloo or on the twin of a GPU each, and collect what each returns."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moco_eval.runtime.rendezvous import FOLDER, ON_LOOPBACK, private_meeting

# The ranks are forks of one server, which imports the libraries once for all tests; never our own code.
LIBRARIES = ["torch.utils.tensorboard", "torchvision", "sklearn.datasets", "matplotlib.figure", "pydantic", "pytest"]


def run_ranks(
    function: Callable[..., Any], folder: Path, *arguments: Any, ranks: int = 2, device: str = "cpu"
) -> list[Any]:
    """`function(*arguments)` in each rank of a group; its result must be plain or tensors.

    Args:
        device: `cuda` gives each rank a twin of one, `mps` the only rank; see twin.py.
    """
    multiprocessing.set_forkserver_preload(LIBRARIES)
    with private_meeting():  # each rank is told where, as the server was started in another environment
        meeting = {name: os.environ[name] for name in (FOLDER, *ON_LOOPBACK)}
        torch.multiprocessing.start_processes(
            _rank, (ranks, device, meeting, folder, function, arguments), nprocs=ranks, start_method="forkserver"
        )
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(ranks)]


def _rank(
    rank: int, ranks: int, device: str, meeting: dict, folder: Path, function: Callable, arguments: tuple
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
        **meeting,
    }
    torch.set_num_threads(1)
    if device == "cuda":
        import twin

        twin.install(ranks)
    if device == "mps":
        import twin

        twin.install_mps()
    from moco_eval.runtime.command import running
    from moco_eval.runtime.launch import processes

    with running("moco-eval"), processes(device):
        torch.save(function(*arguments), folder / f"rank_{rank}.pt")
    sys.stdout.flush()
