"""What a suite would take on this machine, time and memory, from at most a minute of small timed pieces of its work.

Nothing is written. Extraction is timed on the real images and the real network; each protocol's own work on random
features of the right shape, in pieces that are taken as proportional to their size. Memory is what this process has
taken: for the extraction as it grows with the batch, for a protocol with what it says that it holds.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich import box
from rich.markup import escape
from rich.table import Table
from torch import nn

from moco_eval.classification.probe import LEAST, Probe
from moco_eval.classification.protocols import by_name
from moco_eval.classification.suite import Item, Need
from moco_eval.features.cache import Source
from moco_eval.features.extract import pixels
from moco_eval.features.stages import network, placed
from moco_eval.results.environment import peak_memory_mb
from moco_eval.runtime.device import autocast
from moco_eval.runtime.text import as_text, duration

SECONDS, PART = 50.0, 10.0  # of all parts of the probe together, of one at most


@dataclass(frozen=True)
class Own:
    """What a protocol does beside the extraction: about so many seconds, what was assumed, and bytes that it holds."""

    protocol: str
    seconds: float
    basis: str
    memory: float = 0.0


@dataclass(frozen=True)
class Forecast:
    """The plan of a suite, and about how long it takes.

    Attributes:
        dim: of the features.
        rates: images per second of this process, of clean crops (False) and training crops (True), where needed.
        own: of the tasks that are not done.
        memory: bytes of one process, on the GPU where one is used.
        took: seconds of the probe.
    """

    needs: list[Need]
    dim: int
    rates: dict[bool, float]
    own: list[Own]
    memory: float
    took: float
    device: torch.device
    processes: int = 1

    def seconds(self, need: Need) -> float:
        """Of an extraction; several processes share a CPU, but have a GPU each."""
        at_once = self.processes if self.device.type == "cuda" else 1
        return need.images / self.rates[need.source.crops is not None] / at_once if need.images else 0.0

    @property
    def total(self) -> float:
        """Seconds of everything."""
        return sum(map(self.seconds, self.needs)) + sum(work.seconds for work in self.own)


def forecast(suite: Sequence[Item], needs: list[Need], device: torch.device, processes: int = 1) -> Forecast:
    """Time small pieces of everything that a suite has still to do.

    Raises:
        InputError: an image cannot be read.
    """
    began = time.perf_counter()
    todo = [item for item in suite if not item.done]
    missing = {need.source.crops is not None: need.source for need in needs if need.images}
    parts = len(todo) + len(missing)

    def share(done: int) -> float:
        """Of the time that is left, for the next part."""
        left = SECONDS - (time.perf_counter() - began)
        return max(LEAST, min(PART, left / (parts - done)))

    dim, base = dimension(suite[0].sources[0], device), _peak(device)
    rates, weights = dict[bool, float](), [base]
    for done, (cropped, source) in enumerate(missing.items()):
        rates[cropped], weight = rate(source, device, share(done), processes)
        weights.append(weight)
    own = [own_work(item, dim, device, share(done)) for done, item in enumerate(todo, len(missing))]
    most = max([*weights, *(base + work.memory for work in own)])
    return Forecast(needs, dim, rates, own, most, time.perf_counter() - began, device, processes)


def _peak(device: torch.device) -> float:
    """Bytes that this process has taken at most."""
    return 1e6 * peak_memory_mb(device.type)


# Extraction


@torch.no_grad()
def dimension(source: Source, device: torch.device) -> int:
    """D of the features."""
    net, side = placed(network(source.encoder, source.feature), source.encoder, device), source.preprocessing.size
    with autocast(device, source.precision):
        return net(torch.zeros(1, source.images.channels, side, side, device=device)).flatten(1).shape[1]


def rate(source: Source, device: torch.device, seconds: float, processes: int = 1) -> tuple[float, float]:
    """Images per second through the loader and the network, and bytes of this process with a whole batch.

    In this process first, in growing batches until a sixteenth of the time is used for one; then as the extraction
    will do it, on so many images that half of the time is enough even without help from its workers.
    """
    net = placed(network(source.encoder, source.feature), source.encoder, device)
    size, alone, peaks = 1, replace(source, workers=0), list[tuple[int, float]]()
    while True:
        took = _through(alone, net, size, size, device)
        peaks.append((size, _peak(device)))
        if took >= seconds / 16 or size == source.batch_size:
            break
        size = min(4 * size, source.batch_size)
    count = int(min(len(source.images), max(size, seconds / 2 * size / took)))
    batch = max(1, min(source.batch_size, count // (4 * max(1, source.workers))))
    weight = grown(peaks, min(source.batch_size, len(source.images)) / processes)
    return count / _through(source, net, count, batch, device), weight


def grown(peaks: Sequence[tuple[int, float]], batch: float) -> float:
    """Bytes with a batch, from (images, bytes) of smaller ones: as they grew from the last but one to the last."""
    (few, less), (many, most) = peaks[-2:] if len(peaks) > 1 else (peaks[0], peaks[0])
    growth = (most - less) / (many - few) if many > few else 0.0
    return most + growth * max(0.0, batch - many)


@torch.no_grad()
def _through(source: Source, net: nn.Module, count: int, batch: int, device: torch.device) -> float:
    """Seconds for `count` images, spread over the set, after one image that is left out."""
    epoch = source.crops.epoch if source.crops else 0
    rows = [(epoch, index * len(source.images) // count) for index in range(count)]
    batches = [rows[:1], *(rows[at : at + batch] for at in range(0, count, batch))]
    began = 0.0
    for images in pixels(source.images, source.preprocessing, source.crops, batches, device, source.workers):
        with autocast(device, source.precision):
            net(images).flatten(1).float().cpu()
        began = began or time.perf_counter()
    return time.perf_counter() - began


# Each protocol's own work


def own_work(item: Item, dim: int, device: torch.device, seconds: float) -> Own:
    """About how long one protocol works on features that are there, all trials together."""
    task, config = item.ready, item.config
    images = task.training_images(config.seed)
    probe = Probe(len(images), len(task.test), dim, len(task.train.classes), device, seconds)
    code = by_name(item.protocol).code()
    assert code.own_work is not None and code.memory is not None
    about, basis = code.own_work(config, probe)
    trials = f", {task.trials} trials" if task.trials > 1 else ""
    return Own(item.protocol, task.trials * about, basis + trials, code.memory(config, probe))


# How it is shown


def describe(suite: Sequence[Item], plan: Forecast, output: Path) -> str:
    """The plan as text."""
    first = suite[0].task
    extraction = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("features", "for", "images", "in the cache", "to disk", "about"):
        extraction.add_column(heading, justify="left" if heading in ("features", "for") else "right")
    for need in plan.needs:
        extraction.add_row(*(escape(cell) for cell in _cells(need, plan)))
    own = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("protocol", "its own work", "about"):
        own.add_column(heading, justify="right" if heading == "about" else "left")
    about = {work.protocol: work for work in plan.own}
    for item in suite:
        work = about.get(item.protocol)
        own.add_row(
            item.protocol, *((work.basis, duration(work.seconds)) if work else (f"already done: {item.output}", "-"))
        )
    return as_text(
        f"suite of {first.encoder.source} ({first.encoder.arch}, {first.encoder.origin}): {first.feature} feature, "
        f"{plan.dim} numbers, {suite[0].config.precision}",
        f"data: {first.train.name}, {len(first.train):,} training and {len(first.test):,} test images, "
        f"{len(first.train.classes)} classes",
        f"output: {output}",
        f"cache: {first.cache}",
        *([extraction] if plan.needs else []),
        own,
        _in_all(plan),
    )


def _cells(need: Need, plan: Forecast) -> tuple[str, ...]:
    images, source = len(need.source.images), need.source
    size = need.images * plan.dim * (2 if source.precision == "bf16" else 4)
    crop = "clean crop" if source.crops is None else f"crops of epoch {source.crops.epoch}"
    part = source.images.subset
    return (
        f"{source.images.split}, {crop}" + (f" ({part})" if part else ""),
        "every task" if len(need.protocols) == len(plan.own) > 1 else ", ".join(need.protocols),
        f"{images:,}",
        f"{images - need.images:,}",
        f"{size / 1e6:,.1f} MB",
        duration(plan.seconds(need)),
    )


def _in_all(plan: Forecast) -> str:
    names = {False: "clean crops", True: "training crops"}
    rates = "".join(f", {rate:,.0f} images/s of {names[cropped]}" for cropped, rate in plan.rates.items())
    where = f"{plan.device}, {torch.get_num_threads()} threads" if plan.device.type == "cpu" else str(plan.device)
    several = f" in one process (of {plan.processes})" if plan.processes > 1 else ""
    each = f" in each of {plan.processes} processes" if plan.processes > 1 else ""
    return (
        f"in all about {plan.total / 60:.1f} minutes and {plan.memory / 1e9:.1f} GB{each}: a prediction, from a probe "
        f"of {plan.took:.0f} s{several} on {where}{rates}"
    )
