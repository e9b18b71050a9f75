#!/usr/bin/env python3
"""What processes send each other in a pretraining step, ours and the official code's, and what that makes of the rate.

python tools/benchmark_scaling.py moco_v2_r50 --rate 2500 --bandwidth 20 --latency 20
python tools/benchmark_scaling.py cifar10 --measure                  # rate and gloo's bandwidth, here, two processes

Bytes that a rank receives in a step, N images a rank, R ranks, s pixels, C dimensions, K keys, G numbers of gradient,
B numbers of BN statistics:

    shuffling    ours      N (R-1)/R 3 s^2         the images it needs, uint8; mean over permutations
                 official  N (R-1) 3 s^2 4         every image of every rank, fp32
    keys         both      N (R-1) C 4             all keys to all ranks
    gradients    both      2 (R-1)/R G 4           ring all-reduce
    buffers      official  (K C + B) 4             DDP sends rank 0's queue and statistics to all

A step takes  t = t0 + bytes / bandwidth + latency * messages,  with t0 the time of a step on one device and nothing
hidden behind the backward pass, so the prediction is a floor; messages: log2(R) for each collective but all-to-all and
all-gather, which take R-1. The rate is N R / t.
"""

import math
import os
import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

import click
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from moco_eval.config import load as configs
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.results.environment import environment
from moco_eval.runtime import rendezvous
from moco_eval.runtime.device import choose_device
from moco_eval.runtime.files import write_json
from pretraining.bottleneck import seconds
from pretraining.mechanisms import build_encoder
from pretraining.plan import shuffle_bytes

RANKS = (1, 8, 64, 512)


def received(config: PretrainConfig, share: int, ranks: int) -> dict[str, dict[str, float]]:
    """Bytes that one rank receives in a step, by purpose, ours and officially."""
    encoder = build_encoder(config, "shuffle")
    gradients = sum(weight.numel() for weight in encoder.parameters())
    statistics = 2 * sum(buffer.numel() for buffer in encoder.buffers())  # both encoders'
    ours, official = shuffle_bytes(config.model_copy(update={"batch_size": share * ranks}), ranks)
    both = {
        "keys": share * (ranks - 1) * config.dim * 4 * (1 + config.symmetric),
        "gradients": 2 * (ranks - 1) / ranks * gradients * 4,
    }
    buffers = (config.queue_size * config.dim + statistics) * 4 if ranks > 1 else 0
    return {
        "ours": {"shuffling": ours, **both, "buffers": 0},
        "official": {"shuffling": official, **both, "buffers": buffers},
    }


def messages(ranks: int, official: bool) -> float:
    """Of a step: shuffling and keys go to each other rank, gradients (and buffers) along a tree."""
    return 2 * (ranks - 1) + (1 + official) * math.log2(ranks)


def predict(config: PretrainConfig, rate: float, bandwidth: float, latency: float) -> list[dict]:
    """A line for each number of ranks.

    Args:
        rate: images per second of one device.
        bandwidth: bytes per second that a rank receives.
        latency: seconds of a message.
    """
    share = config.batch_size // 8 if config.batch_size % 8 == 0 else config.batch_size
    lines = []
    for ranks in RANKS:
        for who, parts in received(config, share, ranks).items():
            total = sum(parts.values())
            step = share / rate + total / bandwidth + latency * messages(ranks, who == "official")
            lines.append(
                {"ranks": ranks, "who": who, **parts, "bytes": total, "images_per_second": share * ranks / step}
            )
    return lines


def two_processes(rank: int, results) -> None:
    """gloo's bandwidth and latency between two processes of this machine."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    large, small, cpu = torch.ones(2**24), torch.ones(1), torch.device("cpu")
    rendezvous.join(cpu, timedelta(minutes=5))
    taken = [seconds(lambda tensor=tensor: dist.all_reduce(tensor), cpu, 20) for tensor in (large, small)]
    if rank == 0:
        results.put((large.numel() * 4 / taken[0], taken[1]))
    dist.destroy_process_group()


def measured(config: PretrainConfig) -> tuple[float, float, float]:
    """Rate of a step here, and gloo's bandwidth (bytes per second received) and latency (seconds)."""
    from benchmark_pretrain import ours, pictures, resolved_at

    device = choose_device("auto")
    run = resolved_at(config, device)
    rate = len(pictures(run, device).index) / seconds(ours(run, pictures(run, device), device), device, 3)
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    children = [context.Process(target=two_processes, args=(rank, results)) for rank in range(2)]
    with rendezvous.private_meeting():
        for child in children:
            child.start()
        bandwidth, latency = results.get()
        for child in children:
            child.join()
    return rate, bandwidth, latency


@click.command()
@click.argument("recipe", default="moco_v2_r50")
@click.option("--rate", type=float, help="Images per second of one device; see tools/benchmark_pretrain.py.")
@click.option("--bandwidth", type=float, help="GB/s that a rank receives.")
@click.option("--latency", type=float, default=20.0, show_default=True, help="Microseconds of a message.")
@click.option("--measure", is_flag=True, help="Rate, bandwidth and latency of this machine instead.")
@click.option("--batch-size", type=click.IntRange(8), help="Over 8 ranks; the recipe's own where not given.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(recipe: str, rate, bandwidth, latency, measure: bool, batch_size, json_file: Path | None) -> None:
    """Bytes per rank and step, and predicted images per second, for 8, 64 and 512 ranks of RECIPE."""
    settings = [f"batch_size={batch_size}"] if batch_size else []
    config = configs.load(recipe, "pretrain", PretrainConfig, settings)
    if measure:
        rate, bandwidth, latency = measured(config)
    elif rate is None or bandwidth is None:
        raise click.UsageError("give --rate and --bandwidth as measured, or --measure")
    else:
        bandwidth, latency = bandwidth * 1e9, latency * 1e-6
    lines = predict(config, rate, bandwidth, latency)
    title = f"{recipe}: {rate:.4g} images/s a device, {bandwidth / 1e9:.3g} GB/s, {1e6 * latency:.3g} us a message"
    table = Table(title=title, title_justify="left")
    names = ("shuffling", "keys", "gradients", "buffers", "bytes")
    for heading in ("ranks", "", *(f"{name} MiB" for name in names), "images/s", "of linear"):
        table.add_column(heading, justify="right")
    for line in lines:
        linear = line["images_per_second"] / (rate * line["ranks"])
        sizes = (f"{line[name] / 2**20:.3g}" for name in names)
        table.add_row(str(line["ranks"]), line["who"], *sizes, f"{line['images_per_second']:.4g}", f"{linear:.2f}")
    Console(width=120).print(table)
    if json_file:
        parts = {"rate": rate, "bandwidth": bandwidth, "latency": latency}
        write_json(json_file, {"measured": parts, "lines": lines, "environment": environment()})


if __name__ == "__main__":
    main()
