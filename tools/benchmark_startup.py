#!/usr/bin/env python3
"""From a folder of images to the first batch of views, with and without an index; and the memory of loader processes.

FOLDER is filled with hard links to a few dozen JPEG files. Each time is the median over fresh processes, imports not
counted; the file system's own cache is warm in all of them.
"""

import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

import click
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from moco_eval.data.augment.two_views import TwoViews
from moco_eval.data.catalogue import open_images
from moco_eval.data.loader import Batches, loader
from pretraining.views import RECIPES

ORIGINALS, CLASSES = 48, 100
LARGE, SMALL = (500, 375), (64, 64)
WORKERS, BATCH = 2, 256
HELD: list[Iterator] = []  # a loader that is let go waits for batches that nobody wants


def make(folder: Path, files: int, size: tuple[int, int]) -> Path:
    """An imagefolder of `files` images, each one a directory entry of its own; what is there already stays."""
    originals = folder / "originals"
    originals.mkdir(parents=True, exist_ok=True)
    for i in range(ORIGINALS):
        noise = np.random.default_rng(i).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        if not (originals / f"{i}.jpg").exists():
            Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(originals / f"{i}.jpg", quality=90)
    for number in range(CLASSES):
        below = folder / "train" / f"class_{number:03}"
        below.mkdir(parents=True, exist_ok=True)
        for i in range(number, files, CLASSES):
            if not (below / f"{i:08}.jpg").exists():
                os.link(originals / f"{i % ORIGINALS}.jpg", below / f"{i:08}.jpg")
    for below in (folder / "train", *(folder / "train").iterdir()):
        os.utime(below, (0, 0))  # as if they had not just changed, which would keep no index
    return folder


def batches(folder: Path, size: int) -> Iterator:
    """The batches of the first epoch, as pretraining loads them."""
    images = open_images("imagefolder", folder, "train")
    order = Batches(len(images), BATCH, 0, range(1), shuffle=True, drop_last=True, shards=images.shards)
    views = TwoViews(images, RECIPES["moco_v2"], size, seed=0, finished=False)
    return iter(loader(views, order, WORKERS, torch.device("cpu")))


def seconds_to_open(folder: Path) -> float:
    began = time.perf_counter()
    open_images("imagefolder", folder, "train")
    return time.perf_counter() - began


def seconds_to_first_batch(folder: Path) -> float:
    began = time.perf_counter()
    HELD.append(batches(folder, 224))
    next(HELD[0])
    return time.perf_counter() - began


def memory_over_an_epoch(folder: Path, points: int = 6) -> list[dict[str, float]]:
    """MiB of each loader process on average, at equal distances over an epoch.

    private: pages of its own (USS). shared_out: its own and its part of those that it shares (PSS).
    """
    averages, steps = [], sum(1 for _ in (folder / "train").glob("*/*")) // BATCH
    marks = {round(i * (steps - 9) / (points - 1)) for i in range(points)}  # before the workers run out of work
    HELD.append(batches(folder, 32))
    for step, _ in enumerate(HELD[0]):
        if step in marks:
            each = [_memory(process.pid) for process in multiprocessing.active_children()]
            mean = {name: statistics.mean(memory[name] for memory in each) for name in ("private", "shared_out")}
            averages.append({"images": (step + 1) * BATCH, "processes": len(each)} | mean)
    return averages


def _memory(pid: int | None) -> dict[str, float]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
    return {"private": (kib["Private_Clean"] + kib["Private_Dirty"]) / 1024, "shared_out": kib["Pss"] / 1024}


def fresh(function: Callable, folder: Path) -> Any:
    """What a function returns in a new process."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_answer, args=(theirs, function, folder))
    process.start()
    theirs.close()
    answer = ours.recv()
    process.join()
    return answer


def _answer(pipe: Any, function: Callable, folder: Path) -> None:
    multiprocessing.set_start_method("fork", force=True)  # its loader processes start as training's do
    pipe.send(function(folder))
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(0)


def medians(folder: Path, cache: Path, repeats: int) -> dict[str, float]:
    """Seconds to open and to the first batch, without an index and with one, taken in turn."""
    times: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, function in (("open", seconds_to_open), ("first_batch", seconds_to_first_batch)):
            shutil.rmtree(cache, ignore_errors=True)
            for state in ("cold", "index"):
                times.setdefault(f"{name}.{state}", []).append(fresh(function, folder))
    return {name: statistics.median(values) for name, values in times.items()}


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--files", default=50_000, show_default=True, type=click.IntRange(5000))
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1))
@click.option("--json", "out", type=click.Path(path_type=Path), help="Where to write the figures.")
def main(folder: Path, files: int, repeats: int, out: Path | None) -> None:
    cache = folder / "cache"
    os.environ["MOCO_EVAL_CACHE"] = str(cache)
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # of loaders that were killed
    large, small = make(folder / f"large-{files}", files, LARGE), make(folder / f"small-{files}", files, SMALL)
    result = {"files": files, "repeats": repeats, "torch": torch.__version__, "cpus": os.cpu_count()}
    result |= {"seconds": medians(large, cache, repeats), "memory": fresh(memory_over_an_epoch, small)}
    table = Table("seconds", "cold", "index", title=f"{files} files, median of {repeats}")
    for name in ("open", "first_batch"):
        table.add_row(name, *(f"{result['seconds'][f'{name}.{state}']:.3f}" for state in ("cold", "index")))
    memory = Table("images seen", "private MiB", "shared out MiB", title=f"each of {WORKERS} loaders, one epoch")
    for point in result["memory"]:
        memory.add_row(str(point["images"]), f"{point['private']:.1f}", f"{point['shared_out']:.1f}")
    Console().print(table, memory)
    if out:
        out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
