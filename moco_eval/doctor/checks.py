"""What the facts about a machine mean: a line each, and the way out where something is broken."""

import os
from dataclasses import dataclass
from typing import Literal

from moco_eval.data import workers
from moco_eval.doctor.machine import Machine
from moco_eval.runtime.device import AMPERE

BATCH_BYTES = 2 * 256 * 3 * 224**2  # both views of the MoCo recipes' batch, over all GPUs
WORKERS = 8  # loader processes that they have for each GPU
FEWEST_FILES = 512  # a loader process of ours keeps some 16 open for what it sends


@dataclass(frozen=True)
class Check:
    """One line of the page. `way_out`: what to do where it is broken, or to know."""

    name: str
    value: str
    state: Literal["ok", "note", "broken"] = "ok"
    way_out: str = ""


def checks(machine: Machine) -> list[Check]:
    """Everything about a machine, in the order of the page."""
    return [
        Check("Python", machine.python),
        _torch(machine),
        *_gpus(machine),
        *_exchange(machine),
        _compiler(machine),
        Check("processor", f"{machine.cpu}, {_many(machine.cores, 'core')} for this process"),
        Check("memory", f"{machine.memory / 1e9:.0f} GB"),
        _shared(machine),
        _temporary(machine),
        _open_files(machine),
        _disk(machine),
        Check("JPEG decoding", f"{machine.decoding:.0f} images/s a core, of 500 x 375 pixels"),
    ]


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _torch(machine: Machine) -> Check:
    built = f"{machine.torch}, {f'CUDA {machine.cuda}' if machine.cuda else 'without CUDA'}"
    if machine.gpus or not machine.driver:
        return Check("torch", built)
    if machine.cuda is None:
        way_out = (
            "this machine has an NVIDIA driver, but this torch is for CPUs only; install one with CUDA "
            "(pytorch.org/get-started)"
        )
    else:
        way_out = (
            f"torch finds no GPU: driver {machine.driver} may be too old for CUDA {machine.cuda}, CUDA_VISIBLE_DEVICES "
            "may hide them, or the container was started without docker run --gpus all"
        )
    return Check("torch", built, "broken", way_out)


def _gpus(machine: Machine) -> list[Check]:
    if not machine.gpus:
        driver = f"none visible; driver {machine.driver}" if machine.driver else "none: everything runs on the CPU"
        mps = "there; --device auto takes it; nothing was measured on one"
        return [Check("GPUs", driver)] if not machine.mps else [Check("MPS", mps)]
    lines = [
        Check("driver", machine.driver or "unknown"),
        Check("GPUs", "; ".join(_names(machine))),
        *(_broken(index, gpu.failure) for index, gpu in enumerate(machine.gpus) if gpu.failure),
    ]
    new = all(gpu.capability >= AMPERE for gpu in machine.gpus)
    known = Check("bf16, TF32", "yes, both") if new else Check("bf16, TF32", "no: --precision fp32 is used")
    links = [Check("links", ", ".join(machine.links) or "unknown")] if len(machine.gpus) > 1 else []
    return [*lines, *links, known]


def _broken(index: int, failure: str) -> Check:
    way_out = "look at nvidia-smi; CUDA_VISIBLE_DEVICES leaves it out, or torch has no kernels for it: install another"
    return Check(f"GPU {index}", failure, "broken", way_out)


def _names(machine: Machine) -> list[str]:
    """Each kind of GPU once, with its number and memory."""
    kinds = [f"{gpu.name} of {gpu.memory / 2**30:.0f} GiB" for gpu in machine.gpus]
    return [f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)]


def _exchange(machine: Machine) -> list[Check]:
    if machine.exchange_failure:
        way_out = (
            "run with NCCL_DEBUG=INFO to see why; NCCL_P2P_DISABLE=1 helps if GPUs cannot reach each other, and "
            "--nproc 1 works without it"
        )
        return [Check("NCCL all_reduce", machine.exchange_failure, "broken", way_out)]
    if machine.exchange is None:
        return []
    return [Check("NCCL all_reduce", f"{machine.exchange / 1e9:.0f} GB/s between {len(machine.gpus)} GPUs (bus)")]


def _compiler(machine: Machine) -> Check:
    if not machine.compiler:
        return Check("torch.compile", "works")
    way_out = "install a C++ compiler (apt-get install g++), or take --set compile=false"
    if machine.gpus:
        return Check(
            "torch.compile", machine.compiler, "broken", f"pretraining works without it, but more slowly; {way_out}"
        )
    return Check("torch.compile", machine.compiler, "note", "on a CPU it is used only with --set compile=true")


def _shared(machine: Machine) -> Check:
    name, needed = str(workers.SHARED_MEMORY), WORKERS * BATCH_BYTES
    if machine.shared is None or machine.shared_free is None:
        return Check(name, "none on this system")
    value = f"{machine.shared / 1e6:,.0f} MB, {machine.shared_free / 1e6:,.0f} MB free"
    if machine.shared_free >= workers.PREFETCH * needed:
        return Check(name, value)
    use = f"{WORKERS} loader processes of a recipe of 256 photos"
    way_out = "start the container with docker run --shm-size=8g (or --ipc=host)"
    if machine.shared_free >= needed:
        wanted = f"{use} use {workers.PREFETCH * needed / 1e6:,.0f} MB if there is room"
        return Check(name, value, "note", f"{wanted}; {way_out}")
    return Check(name, value, "broken", f"{use} need {needed / 1e6:,.0f} MB; {way_out}, or take --workers 0")


def _temporary(machine: Machine) -> Check:
    length = len(os.fsencode(machine.temporary))
    value = f"{machine.temporary}, {length} of at most {workers.LONGEST_TMPDIR} bytes"
    if length <= workers.LONGEST_TMPDIR:
        return Check("TMPDIR", value)
    return Check("TMPDIR", value, "broken", "too long for the sockets of loader processes; set TMPDIR=/tmp")


def _open_files(machine: Machine) -> Check:
    if machine.open_files < 0 or machine.open_files > 1 << 40:
        return Check("open files", "no limit")
    value = f"{machine.open_files:,} at most"
    if machine.open_files >= FEWEST_FILES:
        return Check("open files", value)
    return Check("open files", value, "broken", "loader processes send each batch as open files; ulimit -n 4096")


def _disk(machine: Machine) -> Check:
    if machine.disk is None:
        return Check("disk", f"{machine.place} cannot be written", "note", "MOCO_EVAL_DATA names another folder to try")
    return Check("disk", f"{machine.disk / 1e6:,.0f} MB/s read, in {machine.place}")
