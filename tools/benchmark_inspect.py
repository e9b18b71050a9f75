#!/usr/bin/env python3
"""Seconds and peak memory of `moco-eval inspect` on a training checkpoint that is larger than its encoder by far.

python tools/benchmark_inspect.py [--folder FOLDER] [--gigabytes 10] [--repeats 1] [--json FILE]

- training: the official MoCo v2 layout, ResNet-50: query and key encoder, queue, and an optimiser's state of many
  tensors that fills the size, as torch.save writes it.
- safetensors: both encoders and a queue that fills the size.

Each is inspected in a process of its own, once after the file has left the page cache (cold) and once again (warm).
Much of the time is the file's own sha256, which reads all of it. Peak: resident memory, in which mapped pages that were
touched count; anonymous: the part that is no file's, sampled every 10 ms on Linux.
"""

import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

import click
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
PIECE = 1 << 22  # float32 numbers of one tensor that fills the size: 16 MB
DIM = 128  # of a key in the queue
Figures = dict[str, float]


def make(kind: str, path: Path, size: int) -> None:
    """Write a checkpoint of `size` bytes; run in a process of its own, so that its memory is nobody else's."""
    import torch
    from safetensors.torch import save_file
    from torchvision.models import resnet50

    torch.manual_seed(0)
    net = resnet50(num_classes=DIM)
    net.fc = torch.nn.Sequential(torch.nn.Linear(2048, 2048), torch.nn.ReLU(), net.fc)
    weights = net.state_dict()
    state = {f"module.encoder_{which}.{name}": tensor for which in "qk" for name, tensor in weights.items()}
    state = {name: tensor.clone() for name, tensor in state.items()}
    left = size - sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if kind == "safetensors":
        save_file(state | {"module.queue": torch.zeros(DIM, left // 4 // DIM)}, path)
        return
    state["module.queue"] = torch.nn.functional.normalize(torch.randn(DIM, 65536), dim=0)
    state["module.queue_ptr"] = torch.zeros(1, dtype=torch.int64)
    pieces = (left // 4 - DIM * 65536) // PIECE
    optimizer = {"state": {i: {"momentum_buffer": torch.zeros(PIECE)} for i in range(pieces)}, "param_groups": []}
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": optimizer}, path)


def forget(path: Path) -> None:
    """Put a file out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def inspect(path: Path) -> Figures:
    """Seconds and MB of `moco-eval inspect PATH` in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "moco_eval", "inspect", str(path)], env=environment, stdout=subprocess.DEVNULL
    )
    anonymous = 0
    while True:
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            break
        anonymous = max(anonymous, _anonymous(process.pid))
        time.sleep(0.01)
    if status:
        raise click.ClickException(f"moco-eval inspect {path} failed with status {status}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": time.perf_counter() - began, "peak_mb": peak / 1e6, "anonymous_mb": anonymous / 1e6}


def _anonymous(pid: int) -> int:
    """Bytes of resident memory that are no file's; 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def measure(path: Path, repeats: int) -> dict[str, Figures]:
    """Medians over repeats, cold and warm in turn."""
    every: dict[str, list[Figures]] = {"cold": [], "warm": []}
    for _ in range(repeats):
        forget(path)
        for cache in every:
            every[cache].append(inspect(path))
    return {
        cache: {name: statistics.median(figures[name] for figures in runs) for name in runs[0]}
        for cache, runs in every.items()
    }


@click.command(help=__doc__)
@click.option(
    "--folder", type=click.Path(path_type=Path, file_okay=False), help="Where to write; temporary if left out."
)
@click.option("--gigabytes", type=click.FloatRange(0.5), default=10, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=1, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(folder: Path | None, gigabytes: float, repeats: int, json_file: Path | None) -> None:
    medians: dict[str, dict[str, Figures]] = {}
    table = Table(title=f"moco-eval inspect, {gigabytes:g} GB", title_justify="left")
    for heading in ("", "cache", "seconds", "peak MB", "anonymous MB"):
        table.add_column(heading, justify="right" if "MB" in heading or heading == "seconds" else "left")
    for kind, suffix in (("training", ".pth.tar"), ("safetensors", ".safetensors")):
        with tempfile.TemporaryDirectory(dir=folder) as inside:
            path = Path(inside) / f"checkpoint{suffix}"
            maker = multiprocessing.get_context("spawn").Process(target=make, args=(kind, path, int(gigabytes * 1e9)))
            maker.start()
            maker.join()
            medians[kind] = measure(path, repeats)
        for cache, figures in medians[kind].items():
            table.add_row(kind, cache, *(f"{figures[name]:.4g}" for name in ("seconds", "peak_mb", "anonymous_mb")))
    Console(file=sys.stdout, width=100).print(table)
    if json_file is not None:
        from moco_eval.results.environment import environment
        from moco_eval.runtime.files import write_json

        about = {"gigabytes": gigabytes, "repeats": repeats, "environment": environment()}
        write_json(json_file, {"inspect": medians} | about)


if __name__ == "__main__":
    main()
