"""Seconds and accuracy of the linear protocols on the same images, encoder and machine.

python tools/benchmark_linear.py FOLDER CHECKPOINT [--dataset cifar10] [--train 5000] [--test 2000] [--json FILE]

Nothing is cached: each run pays for every image that goes through the network. Rows run in turn in each repeat, each
repeat with its own seed; a ratio is the median over repeats of the first row's seconds over this row's in the same one.

- moco-lincls: linear/moco-lincls@1 as published, 100 epochs of crops. The official script also looks at the test images
  after each epoch, which is left out here: its time would be longer by that.
- quick: linear/quick@1.
- one head: linear/sweep@1 with one learning rate, one weight decay, no batch norm.
- forty heads: linear/sweep@1.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from moco_eval.classification.judge import judge
from moco_eval.classification.protocols import load_config
from moco_eval.classification.task import Task
from moco_eval.data.catalogue import open_splits
from moco_eval.data.image_set import ImageSet
from moco_eval.encoders.load import load
from moco_eval.results.environment import environment
from moco_eval.runtime.files import write_json
from moco_eval.runtime.launch import processes

ONE = ("learning_rates=[1]", "weight_decays=[0]", "batch_norm=[false]")
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "moco-lincls": ("moco-lincls", ()),
    "quick": ("quick", ()),
    "one head": ("sweep", ONE),
    "forty heads": ("sweep", ()),
}  # a shipped config, and what is set in it


def some(images: ImageSet, count: int) -> ImageSet:
    """A fixed subset with as many images of each class."""
    each = count // len(images.classes)
    return images.few_labels(each, 0) if each and len(images) > count else images


def timed(task: Task, config: Any, device: torch.device) -> tuple[float, float]:
    """Seconds and top-1 of one evaluation in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        record = judge(task, config, Path(folder) / "run", device)
        return time.perf_counter() - began, record["metrics"]["top1"]


def compare(task: Task, names: Sequence[str], repeats: int, workers: int, device: torch.device) -> dict[str, Any]:
    """Seconds, top-1 and ratios of the rows named, medians over repeats."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    top1: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name in names:
            shipped, settings = ROWS[name]
            config = load_config(shipped, "linear", [*settings, f"workers={workers}", f"seed={repeat}"])
            took, right = timed(task, config, device)
            seconds[name].append(took)
            top1[name].append(right)
    ratios = {name: [a / b for a, b in zip(seconds[names[0]], every)] for name, every in seconds.items()}
    result = {
        "seconds": {name: statistics.median(every) for name, every in seconds.items()},
        "top1": {name: [float(np.mean(every)), *every] for name, every in top1.items()},
        "ratio": {name: statistics.median(every) for name, every in ratios.items()},
        "repeats": repeats,
        "train": len(task.train),
        "test": len(task.test),
        "encoder": task.encoder.source,
        "environment": environment(),
    }
    if {"one head", "forty heads"} <= seconds.keys():
        pairs = zip(seconds["forty heads"], seconds["one head"])
        result["forty_over_one"] = statistics.median(a / b for a, b in pairs)
    return result


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("checkpoint")
@click.option("--dataset", default="cifar10", show_default=True)
@click.option("--train", default=5000, show_default=True, help="Training images.")
@click.option("--test", default=2000, show_default=True, help="Test images.")
@click.option("--workers", default=0, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--rows", default=",".join(ROWS), show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(
    folder: Path,
    checkpoint: str,
    dataset: str,
    train: int,
    test: int,
    workers: int,
    device: str,
    repeats: int,
    rows: str,
    json_file: Path | None,
) -> None:
    """Time the linear protocols."""
    encoder, splits = load(checkpoint), open_splits(dataset, folder)
    task = Task(encoder, some(splits[0], train), some(splits[1], test))
    task = Task(encoder, *(replace(part, labels_per_class=None) for part in (task.train, task.test)))
    with processes(device) as place:
        result = compare(task, rows.split(","), repeats, workers, place)
    _report(result)
    if json_file is not None:
        write_json(json_file, result)


def _report(result: dict[str, Any]) -> None:
    title = f"{result['train']} + {result['test']} images, {result['encoder']}, {result['repeats']} repeats"
    table = Table(title=title, title_justify="left")
    for heading in ("", "seconds", "times less", "top-1, mean", "each"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, took in result["seconds"].items():
        mean, *each = result["top1"][name]
        values = " ".join(f"{top1:.2f}" for top1 in each)
        table.add_row(name, f"{took:.1f}", f"{result['ratio'][name]:.2f}", f"{mean:.2f}", values)
    console = Console(file=sys.stdout, width=110)
    console.print(table)
    if "forty_over_one" in result:
        console.print(f"forty heads take {result['forty_over_one']:.2f} times the time of one")


if __name__ == "__main__":
    main()
