"""Run a function in several gloo processes and collect what each returns."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# The ranks are forks of one server, which imports the libraries once for all tests; never our own code.
LIBRARIES = ["torch.utils.tensorboard", "torchvision", "sklearn.datasets", "matplotlib.figure", "pydantic", "pytest"]


def run_ranks(function: Callable[..., Any], folder: Path, *arguments: Any, ranks: int = 2) -> list[Any]:
    """`function(*arguments)` in each rank of a gloo group; its result must be plain or tensors."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(LIBRARIES)
    torch.multiprocessing.start_processes(
        _rank, (ranks, port, folder, function, arguments), nprocs=ranks, start_method="forkserver"
    )
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(ranks)]


def _rank(rank: int, ranks: int, port: int, folder: Path, function: Callable, arguments: tuple) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    from moco_eval.runtime.command import running
    from moco_eval.runtime.launch import processes

    with running("moco-eval"), processes("cpu"):
        torch.save(function(*arguments), folder / f"rank_{rank}.pt")
    sys.stdout.flush()
