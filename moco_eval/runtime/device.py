"""Device and precision: the same work on a CPU or a GPU."""

import contextlib
import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from moco_eval.errors import InputError, RunFailed, message_of
from moco_eval.runtime.console import warn

LARGEST_PINNED = 64 << 20  # bytes
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
AMPERE = (8, 0)  # the first compute capability with bf16 and TF32


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if _mps_failure("auto") is None else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name!r} is not a device; take auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"--device {name}: no CUDA device is visible here; take --device cpu")
        if device.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE") or "1") > 1:
            raise InputError(
                f"--device {name} puts all {os.environ['LOCAL_WORLD_SIZE']} processes of this machine on one GPU; take "
                "--device cuda, and CUDA_VISIBLE_DEVICES to choose which"
            )
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if device.index >= torch.cuda.device_count():
            raise InputError(f"--device {device}: this machine has {torch.cuda.device_count()} GPUs, counted from 0")
        torch.cuda.set_device(device)
    elif device.type == "mps":
        if failure := _mps_failure(name):
            raise InputError(failure)
    elif device.type != "cpu":
        raise InputError(f"--device {name!r} is not supported; take auto, cpu, cuda, cuda:N or mps")
    return device


def _mps_failure(name: str) -> str | None:
    """Why Apple's GPU cannot be taken here; None where it can."""
    if not torch.backends.mps.is_built():
        return f"--device {name}: this torch has no MPS; take --device cpu"
    if not torch.backends.mps.is_available():
        return f"--device {name}: this machine has no MPS device; take --device cpu"
    if name not in ("auto", "mps", "mps:0"):
        return f"--device {name}: there is one MPS device; take --device mps"
    if int(os.environ.get("WORLD_SIZE") or "1") > 1:
        return f"--device {name}: MPS has no collectives, so it takes one process; leave --nproc out"
    return None


def with_float64(device: torch.device) -> torch.device:
    """Where float64 is computed for work on a device: there, but for MPS, which has none; then on the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device; a GPU fetches it by itself, and the host waits only for more than LARGEST_PINNED.

    Memory that is pinned is never given back, and rounded up to a power of two: a whole data set would cost it twice.
    What is pinned already, as a loader's batches are, is never waited for.
    """
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    if not tensor.is_pinned():
        if tensor.nbytes > LARGEST_PINNED:
            return tensor.to(device)
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start to fetch a tensor; what is returned waits for it. A GPU goes on meanwhile, and so does the host."""
    if tensor.device.type == "cpu":
        return lambda: tensor
    if tensor.device.type != "cuda" or tensor.nbytes > LARGEST_PINNED:
        whole = tensor.cpu()
        return lambda: whole
    here, arrived = torch.empty_like(tensor, device="cpu", pin_memory=True), torch.cuda.Event()
    here.copy_(tensor, non_blocking=True)
    arrived.record(torch.cuda.current_stream(tensor.device))

    def wait() -> torch.Tensor:
        arrived.synchronize()
        return here

    return wait


def place(net: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The network on a device; on a GPU with channels last in memory, as its convolutions take them.

    The first of them brings a batch into the same order. On a CPU the order stays, and with it every bit of the result.
    """
    net.to(device)
    return net.to(memory_format=torch.channels_last) if device.type == "cuda" else net


@contextlib.contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """bf16 or fp16 arithmetic where the precision says so, or `convolutions` in TF32; see `exact_arithmetic`."""
    half = torch.autocast(device.type, dtype=HALF.get(precision, torch.bfloat16), enabled=precision in HALF)
    with convolutions(device, precision), half:
        yield


@contextlib.contextmanager
def convolutions(device: torch.device, precision: str) -> Iterator[None]:
    """Within, a GPU's convolutions are in TF32 where the precision is tf32; matrix products stay in fp32.

    That is PyTorch's default on Ampere and newer GPUs, so the official code's. A backward pass outside `autocast` needs
    it too. The switch is the process's: other threads have it as long.
    """
    if precision != "tf32":
        yield
    elif device.type != "cuda" or torch.cuda.get_device_capability(device) < AMPERE:
        _say_that_tf32_is_fp32(str(device))
        yield
    else:
        with _tf32_convolutions.held():
            yield


@lru_cache
def _say_that_tf32_is_fp32(device: str) -> None:
    warn(f"{device} has no TF32: precision tf32 is fp32 there")


_generator = threading.RLock()


def _renew() -> None:
    """A forked process has no thread that could give the lock back."""
    global _generator
    _generator = threading.RLock()


os.register_at_fork(after_in_child=_renew)


@contextlib.contextmanager
def borrowed_generator(seed: int | None = None) -> Iterator[None]:
    """torch's generator on the CPU for one thread alone, seeded where asked to; afterwards it is as before.

    `torch.manual_seed` would seed every device too, and costs more than a crop.
    """
    with _generator, torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield


@contextlib.contextmanager
def seeded_generators(seed: int, device: torch.device) -> Iterator[None]:
    """`borrowed_generator` and the generator of a device, both seeded."""
    with borrowed_generator(seed), forked_generator(device):
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
        elif device.type == "mps":
            torch.mps.manual_seed(seed)
        yield


def forked_generator(device: torch.device) -> Any:
    """A context after which torch's generators, the CPU's and that of a device, are as before."""
    kind = "mps" if device.type == "mps" else "cuda"
    return torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=kind)


@contextlib.contextmanager
def seeded_host(seed: int) -> Iterator[None]:
    """Python's and NumPy's own generators, seeded, for one thread alone; afterwards they are as before."""
    with _generator:
        python, array = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)


class _Switch:
    """A switch that torch keeps for the whole process; of several users the first turns it, the last turns it back."""

    def __init__(self, turn: Callable[[], Callable[[], None]]):
        self.turn, self.users, self.lock = turn, 0, threading.Lock()
        self.give_back: Callable[[], None] = lambda: None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        with self.lock:
            if self.users == 0:
                self.give_back = self.turn()
            self.users += 1
        try:
            yield
        finally:
            with self.lock:
                self.users -= 1
                if self.users == 0:
                    self.give_back()


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """TF32 is off within: fp32 is fp32, also for the logits of a bf16 run. Afterwards all is as it was.

    torch keeps this switch for the whole process; of several threads the first turns it off, the last turns it back.
    `convolutions` turns a part of it on again inside.
    """
    with _exact.held():
        yield


def _turn_tf32(convolutions: bool) -> Callable[[], None]:
    """TF32 off, or on for convolutions alone, by the names that every torch has; returns what puts both kinds back.

    torch 2.9 has new names too, and reading an old one raises where the two contradict each other.
    """
    backends = torch.backends
    new: list[tuple[Any, str]] = []
    if hasattr(backends, "fp32_precision"):
        places = (backends, backends.cuda.matmul, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn)
        new = [(place, place.fp32_precision) for place in places]
    matmul, cudnn = _readable(torch.get_float32_matmul_precision), _readable(lambda: backends.cudnn.allow_tf32)
    if new:
        backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = convolutions

    def give_back() -> None:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if cudnn is not None:
            backends.cudnn.allow_tf32 = cudnn
        for place, value in new:
            if place.fp32_precision != value:
                place.fp32_precision = value

    return give_back


_exact = _Switch(lambda: _turn_tf32(convolutions=False))
_tf32_convolutions = _Switch(lambda: _turn_tf32(convolutions=True))


def _readable(read: Callable[[], Any]) -> Any:
    """A switch, or None where its old and new names contradict each other."""
    try:
        return read()
    except RuntimeError:
        return None


@lru_cache
def compile_failure(device: torch.device) -> str:
    """Why torch.compile does not work here, tried on one addition; empty where it works."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # no C++ compiler, no triton, an unsupported Python
        return " ".join(message_of(error).splitlines()[:2])
    return ""


@lru_cache
def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here; where it does not, that is said once."""
    if reason := compile_failure(device):
        warn(f"torch.compile does not work here ({reason}); continuing without it")
    return not reason


@lru_cache
def can_record(device: torch.device) -> bool:
    """Whether compiled networks run as CUDA graphs here: tried on one small network; where not, that is said once."""
    if device.type != "cuda":
        warn(f"compile reduce-overhead records CUDA graphs, which {device} does not have; continuing without graphs")
        return False
    try:
        with borrowed_generator(0):
            net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).to(device)
        net.compile(mode="reduce-overhead")
        for _ in range(4):  # warm up, record, replay
            torch.compiler.cudagraph_mark_step_begin()
            net(torch.ones(4, 3, 8, 8, device=device)).square().mean().backward()
            net.zero_grad(set_to_none=True)
        torch.cuda.synchronize(device)
    except Exception as error:  # whatever a driver, a compiler or an allocator raises
        reason = " ".join(message_of(error).splitlines()[:2])
        warn(f"CUDA graphs do not work here ({reason}); continuing without graphs")
        return False
    return True


def compile_(nets: Iterable[torch.nn.Module], device: torch.device, graphs: bool = False) -> None:
    """Compile networks in place where there is a compiler; their names and state dicts stay.

    Args:
        graphs: run them as CUDA graphs where these work; each step then begins with
            `torch.compiler.cudagraph_mark_step_begin()`, after which outputs of the step before are overwritten.
    """
    if can_compile(device):
        mode = "reduce-overhead" if graphs and can_record(device) else None
        for net in nets:
            net.compile(mode=mode)


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
