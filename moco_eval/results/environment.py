"""Where a result was made: command line, versions, hardware, commit."""

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moco_eval import __version__
from moco_eval.runtime import command

LIBRARIES = ("torch", "torchvision", "numpy", "scikit-learn", "pycocotools", "pillow", "detectron2")


def environment(seed: int | None = None) -> dict[str, Any]:
    """Command line (null where a Python program made the result), versions, hardware, git commit, seed."""
    return {
        "command": command.line(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {"moco-eval": __version__, "python": platform.python_version()}
        | {name: _version(name) for name in LIBRARIES},
        "hardware": hardware(),
        "commit": _commit(),
        "seed": seed,
    }


def hardware() -> dict[str, Any]:
    import torch

    return {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # or it runs from its source
        return getattr(sys.modules.get(name), "__version__", None)


def _commit() -> str | None:
    """The commit of the clone we run from; None from an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        shown = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return shown.stdout.strip()


def peak_memory_mb(device: str) -> float:
    """Peak memory of this process in MB: on the GPU where one is used, resident otherwise."""
    if device.startswith("cuda"):
        import torch

        return round(torch.cuda.max_memory_allocated() / 1e6, 1)
    import resource

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(kilobytes / (1e6 if sys.platform == "darwin" else 1e3), 1)
