"""Device, precision, processes: the same command on a CPU, one GPU or many.

Collectives vanish at world size 1.
"""

import contextlib
import hashlib
import logging
import os
import signal
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)

from moco_eval.errors import InputError, Interrupted, RunFailed, message_of

console = Console(stderr=True, highlight=False, soft_wrap=True)


def tell(message: str) -> None:
    """One line to stderr, from whichever process calls."""
    console.print(message, markup=False)


def log(message: str) -> None:
    """One line to stderr, from the first process only."""
    if is_main():
        tell(message)


def warn(message: str) -> None:
    log(f"warning: {message}")


# Processes


# With it torchrun opens a new store at each restart; in a shared one the dead workers' addresses are still found.
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def parallel(module: torch.nn.Module) -> torch.nn.Module:
    """The module with gradients averaged over ranks; buffers stay each rank's own. Itself at world size 1."""
    if world_size() == 1:
        return module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a new name for broadcast_buffers since torch 2.14
        return torch.nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def broadcast_(tensor: torch.Tensor) -> torch.Tensor:
    """Rank 0's values in place, on every rank."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0)
    return tensor


def from_main(values: list) -> list:
    """Rank 0's plain values, on every rank."""
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values


def found_by_main(look: Callable[[], Any]) -> Any:
    """What the first process finds, a plain value, on every process; its InputError is raised on all, and told once."""
    found, refusal = None, ""
    if is_main():
        try:
            found = look()
        except InputError as error:
            refusal = str(error)
    found, refusal = from_main([found, refusal])
    if refusal:
        refused = InputError(refusal)
        refused.told = not is_main()
        raise refused
    return found


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate every rank's tensor (equal shapes) along dimension 0, in rank order; no gradient."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    """`gather` whose backward sums over ranks what each rank's loss asks of a key, as one process would."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:
        return gather(rows)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = all_sum(gradient.clone(memory_format=torch.contiguous_format))
        N = len(gradient) // world_size()
        return gradient[rank() * N : (rank() + 1) * N]


def gather_with_gradient(rows: torch.Tensor) -> torch.Tensor:
    """Every rank's rows along dimension 0, in rank order; the gradient of each rank's loss comes back to its owner."""
    return rows if world_size() == 1 else _Gather.apply(rows)


def union(values: set) -> set:
    """The union over ranks, on every rank."""
    if world_size() == 1:
        return values
    everyone: list[set] = [set()] * world_size()
    dist.all_gather_object(everyone, values)
    return set().union(*everyone)


def gather_lists(values: list) -> list[list]:
    """Every rank's list, in rank order, on every rank."""
    if world_size() == 1:
        return [values]
    everyone: list[list] = [[]] * world_size()
    dist.all_gather_object(everyone, values)
    return everyone


def same_on_all_ranks(*tensors: torch.Tensor) -> bool:
    """Whether every rank holds bit-identical tensors: their sha256, compared."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return len(union({digest.hexdigest()})) == 1


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


@contextlib.contextmanager
def processes(device: str) -> Iterator[torch.device]:
    """Join torchrun's process group if there is one; yield this process's device; leave the group at the end.

    Raises:
        InputError: a device that is not there.
    """
    chosen = choose_device(device)
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and os.environ.get(OWN_STORE) != "1":
            warn(f"restarted workers may wait for the addresses of dead ones; give torchrun {OWN_STORE}=1")
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    try:
        yield chosen
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name!r} is no device; take auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"--device {name}: no CUDA device is visible here; take --device cpu")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if device.index >= torch.cuda.device_count():
            raise InputError(f"--device {device}: this machine has {torch.cuda.device_count()} GPUs, counted from 0")
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise InputError(f"--device {name!r} is not supported; take auto, cpu, cuda or cuda:N")
    return device


def launch(nproc: int, arguments: list[str], max_restarts: int = 0) -> int:
    """Run `moco-eval ARGUMENTS` in `nproc` processes on this machine by torchrun's elastic launcher.

    When a process dies, the others are ended and all start again, at most `max_restarts` times.

    Returns:
        The exit code: 0, or that of the process that failed first.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ[OWN_STORE] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
        monitor_interval=0.5,
        run_id=uuid.uuid4().hex,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "moco_eval", *arguments)
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        return next((code for code in (2, 3) if code in codes), 1)
    except (SignalException, KeyboardInterrupt):
        return 3
    return 0


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device; a GPU fetches it by itself, and the host waits for nothing."""
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start to fetch a tensor; what is returned waits for it. A GPU goes on meanwhile, and so does the host."""
    if tensor.device.type != "cuda":
        return lambda: tensor
    here, arrived = torch.empty_like(tensor, device="cpu", pin_memory=True), torch.cuda.Event()
    here.copy_(tensor, non_blocking=True)
    arrived.record(torch.cuda.current_stream(tensor.device))

    def wait() -> torch.Tensor:
        arrived.synchronize()
        return here

    return wait


# Precision


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """bf16 arithmetic where the precision says so. TF32 is off: fp32 is fp32, also for the logits of a bf16 run."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@lru_cache
def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here: tried on one addition."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # no C++ compiler, no triton, an unsupported Python
        warn(f"torch.compile does not work here ({' '.join(message_of(error).splitlines()[:2])}); going on without it")
        return False
    return True


def compile_(nets: Iterable[torch.nn.Module], device: torch.device) -> None:
    """Compile networks in place where there is a compiler; their names and state dicts stay."""
    if can_compile(device):
        for net in nets:
            net.compile()


def deterministic(wanted: bool) -> None:
    """Bit-identical repetition on a GPU, at some cost in speed; a CPU has it anyway. Otherwise cudnn tries its ways."""
    torch.backends.cudnn.benchmark = not wanted
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def require_finite_weights(net: torch.nn.Module, step: int) -> None:
    """Raises RunFailed where a parameter is not finite."""
    if not torch.stack([weight.isfinite().all() for weight in net.parameters()]).all():
        raise RunFailed(f"the weights are not finite after step {step}; a smaller optimizer.lr may help")


def require_finite(loss: float, what: str, way_out: str) -> None:
    """Raises RunFailed where the loss is not finite."""
    if not np.isfinite(loss):
        raise RunFailed(f"the loss is {loss} at {what}; {way_out}")


# Interruption


class Stop:
    """Turns SIGINT, SIGTERM and SIGUSR1 into a flag that long work looks at between steps.

    A second SIGINT ends the process at once. Every rank must agree before it stops: `requested` is collective.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    EVERY = 2.0  # seconds between two looks of several ranks

    def __init__(self) -> None:
        self.signal: int | None = None
        self._looked: tuple[int, float] | None = None
        self._next = 0

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def look(self, step: int, due: bool) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and whether rank 0's clock says that something is due.

        Called by every rank after every step. Several ranks look together every EVERY seconds, by rank 0's pace.
        """
        if world_size() == 1:
            return self.signal is not None, due
        if step < self._next:
            return False, False
        now = time.monotonic()
        before, at = self._looked or (step, now)
        steps = max(1, self.EVERY * (step - before) // max(now - at, 1e-3))
        first = torch.tensor([float(due), float(steps)]) * is_main()
        said = all_sum(first.cuda() if dist.get_backend() == "nccl" else first).tolist()
        self._looked, self._next = (step, now), step + int(said[1])
        return self.requested(), bool(said[0])

    def requested(self) -> bool:
        """Whether any rank was asked to stop."""
        if world_size() == 1:
            return self.signal is not None
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return bool(all_sum(torch.tensor([float(self.signal is not None)], device=device)).item())

    def check(self, saved: str) -> None:
        """Raises Interrupted on every rank where any was asked to stop; `saved` says what is safe. Collective."""
        if self.requested():
            name = "another process" if self.signal is None else signal.Signals(self.signal).name
            raise Interrupted(f"stopped by {name}; {saved}")


# Progress


class _Rate(ProgressColumn):
    def render(self, task: Task):
        from rich.text import Text

        per_step = task.fields.get("images", 1)
        return Text(f"{(task.speed or 0.0) * per_step:.0f} {task.fields.get('unit', 'images')}/s")


@contextlib.contextmanager
def progress(title: str, total: int, images: int = 1, done: int = 0, unit: str = "images"):
    """A progress bar with rate and time left; yields `advance(steps=1, note='')`.

    Args:
        title: what is under way.
        total: steps in all.
        images: images per step, for the rate.
        done: steps of an earlier session.
        unit: what is counted.
    """
    columns = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    ]
    with Progress(*columns, console=console, disable=not (is_main() and console.is_terminal)) as bar:
        task = bar.add_task(title, total=total, completed=done, images=images, unit=unit, note="")

        def advance(steps: int = 1, note: str | None = None) -> None:
            bar.advance(task, steps)
            if note is not None:
                bar.update(task, note=note)

        yield advance


def track(items: Iterable, title: str, total: int, images: int = 1) -> Iterator:
    """Iterate with a progress bar."""
    with progress(title, total, images) as advance:
        for item in items:
            yield item
            advance()
