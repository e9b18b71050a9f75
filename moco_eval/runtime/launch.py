"""Processes: started on this machine, and joined to a group."""

import contextlib
import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from moco_eval.errors import InputError
from moco_eval.runtime import rendezvous
from moco_eval.runtime.console import others_speak, tell, warn
from moco_eval.runtime.device import choose_device, exact_arithmetic

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

# With it torchrun opens a new store at each restart; in a shared one the dead workers' addresses are still found.
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


@contextlib.contextmanager
def processes(device: str) -> Iterator[torch.device]:
    """Join the launcher's process group if there is one; yield this process's device; leave the group at a good end.

    Raises:
        InputError: a device that is not there, or an environment that is not torchrun's.
        RunFailed: another user's process is connected to this one.
    """
    _require_whole_environment()
    chosen = choose_device(device)
    if os.environ.get("RANK") and int(os.environ.get("WORLD_SIZE") or "1") > 1:
        if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and os.environ.get(OWN_STORE) != "1":
            warn(f"restarted workers may wait for the addresses of dead ones; give torchrun {OWN_STORE}=1")
        rendezvous.join(chosen, timedelta(minutes=30))
    with exact_arithmetic():
        yield chosen
    if dist.is_initialized():  # not after an error: leaving is collective, and the others are elsewhere
        dist.destroy_process_group()


def launch(nproc: int, arguments: list[str], max_restarts: int = 0) -> int:
    """Run `moco-eval ARGUMENTS` in `nproc` processes on this machine by torchrun's elastic launcher.

    They meet where no other user and no other machine can; see `rendezvous`. When a process dies, the others are ended
    and all start again, at most `max_restarts` times.

    Returns:
        The exit code: 0, or that of the process that failed first.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _prepare(nproc)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        rdzv_backend=rendezvous.IN_MEMORY,
        local_addr="localhost",
        max_restarts=max_restarts,
        monitor_interval=0.5,
        run_id=uuid.uuid4().hex,
    )
    rendezvous.keep_in_memory()
    others_speak()
    try:
        with rendezvous.private_meeting():
            elastic_launch(config, sys.executable)("-m", "moco_eval", *arguments)
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        if agreed := next((code for code in (2, 3) if code in codes), None):
            return agreed
        _tell_of_first(error)
        return 1
    except (SignalException, KeyboardInterrupt):
        return 3
    return 0


def _prepare(nproc: int) -> None:
    """The launcher's log is quiet, and its processes share the cores and have time to save."""
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):  # each has a level of its own
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ[OWN_STORE] = "1"
    cores = str(max(1, (os.cpu_count() or 1) // nproc))
    os.environ.setdefault("OMP_NUM_THREADS", cores)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", cores)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "240")  # seconds for a step and a checkpoint after SIGTERM


def _tell_of_first(error: "ChildFailedError") -> None:
    """A line about the process that ended first: by a signal, of which it could not speak, or with words of its own."""
    killed = {rank: failure for rank, failure in error.failures.items() if failure.exitcode < 0}
    first = min(killed, key=lambda rank: (killed[rank].exitcode == -signal.SIGTERM, rank), default=None)
    if first is None:
        rank, failure = error.get_first_failure()
        tell(
            f"rank {rank} (process {failure.pid}) ended first, with exit code {failure.exitcode}; what it said is above"
        )
        return
    name = signal.Signals(-killed[first].exitcode).name  # SIGTERM: how the launcher ends the others
    tell(
        f"Error: process {killed[first].pid} (rank {first}) was ended by {name}, perhaps for lack of memory, and "
        "the others with it; run the same command to go on"
    )


def _require_whole_environment() -> None:
    """Raises InputError where some of what torchrun tells its processes is missing, or is no number."""
    values = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    alone = values["WORLD_SIZE"] == "1" or not (values["WORLD_SIZE"] or values["RANK"].strip("0"))
    if not values["RANK"] or alone:
        return
    way_out = "start by torchrun, which sets them all, or with --nproc, or unset RANK"
    if missing := [name for name, value in values.items() if not value]:
        raise InputError(f"RANK is {values['RANK']} and {' and '.join(missing)} not set; {way_out}")
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not values[name].isdecimal():
            raise InputError(f"{name} is {values[name]!r}, which is no number; {way_out}")
