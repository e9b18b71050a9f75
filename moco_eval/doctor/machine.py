"""This machine, as `doctor` sees it: plain facts, gathered in one place."""

import os
import platform
import re
import resource
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from moco_eval.data import workers
from moco_eval.doctor import measure
from moco_eval.errors import RunFailed, message_of
from moco_eval.results.environment import processor
from moco_eval.runtime.device import compile_failure

NVIDIA = Path("/proc/driver/nvidia/version")
CONTROL_GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Gpu:
    """A GPU that is visible. `failure`: why it could not multiply two numbers; empty where it could."""

    name: str
    memory: int  # bytes
    capability: tuple[int, int]
    failure: str = ""


@dataclass(frozen=True)
class Machine:
    """Facts about a machine; sizes in bytes, rates per second.

    Attributes:
        cuda: that torch was built for; None for a CPU build.
        driver: of NVIDIA, its version; empty where there is none.
        mps: whether there is one of Apple's GPUs.
        links: kinds of connection between GPUs, as nvidia-smi names them (NV18, PIX, PHB, SYS).
        compiler: why torch.compile does not work; empty where it does.
        exchange: bus bandwidth of an all_reduce between all GPUs; None with fewer than two, or where it failed.
        exchange_failure: why.
        cores: that this process may use.
        memory: that this process may use.
        shared, shared_free: of /dev/shm; None where a system has none.
        temporary: the folder for temporary files.
        open_files: that a process may have.
        disk: reading from `place`; None where that cannot be written.
        decoding: JPEG images of one core.
    """

    python: str
    torch: str
    cuda: str | None
    driver: str
    gpus: tuple[Gpu, ...]
    mps: bool
    links: tuple[str, ...]
    compiler: str
    exchange: float | None
    exchange_failure: str
    cpu: str
    cores: int
    memory: int
    shared: int | None
    shared_free: int | None
    temporary: str
    open_files: int
    place: str
    disk: float | None
    decoding: float

    @property
    def device(self) -> str:
        """Where training would run."""
        return "cuda" if self.gpus else "cpu"


def look(photos: Path) -> Machine:
    """Gather all facts, in some seconds. `photos`: a folder that `measure.draw_photos` has filled."""
    gpus, (shared, free), place = _gpus(), _shared(), measure.place_of_data()
    exchange, failure = _exchange(len(gpus)) if not any(gpu.failure for gpu in gpus) else (None, "")
    return Machine(
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        driver=_driver(),
        gpus=gpus,
        mps=torch.backends.mps.is_available(),
        links=links_of(_output("nvidia-smi", "topo", "-m")) if len(gpus) > 1 else (),
        compiler=compile_failure(torch.device("cuda" if gpus else "cpu")),
        exchange=exchange,
        exchange_failure=failure,
        cpu=processor(),
        cores=_cores(),
        memory=_memory(),
        shared=shared,
        shared_free=free,
        temporary=tempfile.gettempdir(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        place=str(place),
        disk=measure.disk_rate(place),
        decoding=measure.decoding_rate(photos),
    )


def _gpus() -> tuple[Gpu, ...]:
    return tuple(_gpu(index) for index in range(torch.cuda.device_count()))


def _gpu(index: int) -> Gpu:
    name, memory, capability, failure = f"GPU {index}", 0, (0, 0), ""
    try:
        about, capability = torch.cuda.get_device_properties(index), torch.cuda.get_device_capability(index)
        name, memory = about.name, about.total_memory
        ones = torch.ones(2, 2, device=f"cuda:{index}")
        (ones @ ones).sum().item()
    except (RuntimeError, AssertionError) as error:  # no kernels for it, in use, lost
        failure = message_of(error).splitlines()[0]
    return Gpu(name, memory, capability, failure)


def _driver() -> str:
    if version := _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").strip():
        return version.splitlines()[0]
    kernel = re.search(r"Module\s.*?([\d.]+)", NVIDIA.read_text()) if NVIDIA.is_file() else None
    return kernel[1] if kernel else ""


def _output(*command: str) -> str:
    """What a program prints; nothing where there is no such program, or it fails."""
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return shown.stdout


def links_of(matrix: str) -> tuple[str, ...]:
    """The kinds of link in the table of `nvidia-smi topo -m`, between GPUs alone."""
    rows = [re.sub(r"\x1b\[[\d;]*m", "", line).split() for line in matrix.splitlines()]
    gpus = [row for row in rows if len(row) > 1 and re.fullmatch(r"GPU\d+", row[0]) and "X" in row]
    return tuple(sorted({cell for row in gpus for cell in row[1 : 1 + len(gpus)]} - {"X"}))


def _exchange(gpus: int) -> tuple[float | None, str]:
    if gpus < 2:
        return None, ""
    try:
        return measure.exchange_rate(gpus), ""
    except RunFailed as error:
        return None, str(error)


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _first_line(CONTROL_GROUP / "cpu.max").split()
    if len(quota) == 2 and all(map(str.isdecimal, quota)):
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def _memory() -> int:
    """All of the machine, or what a container may have of it."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _first_line(CONTROL_GROUP / "memory.max")
    return min(whole, int(limit)) if limit.isdecimal() else whole


def _first_line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _shared() -> tuple[int | None, int | None]:
    """Size of /dev/shm, and how much of it is free."""
    if not workers.SHARED_MEMORY.is_dir():
        return None, None
    room = os.statvfs(workers.SHARED_MEMORY)
    return room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize
