"""About how long each shipped recipe would train on this machine, what limits it, and the options to set.

A query forward and backward and a key forward are timed as for a paper's table; what loader processes do and what the
device augments, as for a profile. Exchanges between processes are left out, as is what compiled encoders gain.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from moco_eval.config import load as configs
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.data.catalogue import open_images, open_splits
from moco_eval.encoders.architectures import build_backbone
from moco_eval.errors import InputError
from moco_eval.papers import cost
from moco_eval.papers.forecast import Forecast as Planned
from moco_eval.papers.forecast import Part
from moco_eval.papers.forecast import forecast as planned
from moco_eval.runtime.printable import shell_join
from pretraining.bottleneck import seconds, worker_seconds
from pretraining.mechanisms import build
from pretraining.plan import Plan, by_device, smaller_step
from pretraining.views import recipes, two_views

DATA = {
    **dict.fromkeys(("moco_v1_r50", "moco_v2_r50", "moco_v3_r50", "moco_v3_vit_small", "moco_v3_vit_base"), "imagenet"),
    **{"cifar10": "cifar10", "digits": "digits", "digits_v3": "digits"},
}
STORED = {"imagenet": 110_000}  # bytes of an image; other sets are read once
SOME = 32  # images of a timed batch of views


@dataclass(frozen=True)
class Room:
    """What a machine has for a training. `disk`: bytes per second; None where nobody knows."""

    device: torch.device
    gpus: int
    cores: int
    disk: float | None


@dataclass(frozen=True)
class Pieces:
    """Seconds of all of a recipe's training.

    Attributes:
        network: of the devices, sharing the work.
        augmentation: of the devices.
        worker: of one core that makes views, all images in turn; 0 where the data are in memory.
        reading: of the disk.
    """

    network: float
    augmentation: float
    worker: float
    reading: float


@dataclass(frozen=True)
class Forecast:
    """A recipe on this machine.

    Attributes:
        seconds: None where a step does not fit into memory.
        limit: what takes longest.
        options: to set, as on a command line.
    """

    recipe: str
    dataset: str
    processes: int
    precision: str
    seconds: float | None
    limit: Literal["network", "loader", "disk", "memory"]
    options: str


def forecasts(room: Room, photos: Path) -> list[Forecast]:
    """Every shipped recipe, timed now. `photos`: a folder of JPEG files that stand for a data set's."""
    timed = cache(lambda probe: cost.timed_anew(probe, room.device))
    return [forecast(recipe, dataset, room, photos, timed) for recipe, dataset in DATA.items()]


def forecast(
    recipe: str, dataset: str, room: Room, photos: Path, timed: Callable[[cost.Probe], float | None]
) -> Forecast:
    """One recipe, from `timed` seconds of an image through each network and from its views, which are timed here."""
    config = configs.load(recipe, "pretrain", PretrainConfig)
    config = config.model_copy(update=by_device(config, room.device))
    processes = max(1, room.gpus) if config.bn == "auto" and dataset in STORED else 1  # what is made for one GPU, stays
    network = 0.0
    for probe, images in cost.pretraining(config, dataset, config.precision, processes):
        each = timed(probe)
        if each is None:
            return Forecast(recipe, dataset, processes, config.precision, None, "memory", smaller_step(config))
        network += each * images / processes
    images = config.schedule.epochs * cost.images_of(dataset, "train")
    if dataset in STORED:
        worker = _worker(config, photos, room.device)
        on_device = 0.0 if room.device.type == "cpu" else _augmentation(config, room.device)
        reading = images * STORED[dataset] / room.disk if room.disk else 0.0
    else:
        worker, on_device, reading = 0.0, _augmentation(config, room.device), 0.0
    pieces = Pieces(network, images * on_device / processes, images * worker, reading)
    return together(recipe, dataset, config, processes, pieces, room)


def of_run(run: Plan, device: torch.device) -> Planned:
    """Time and memory of a planned run: its networks, and views that the device augments."""
    config, images = run.config, len(run.images)
    monitored = _test_images(run) if config.knn else 0
    pieces = list(cost.pretraining_on(images, monitored, config, config.precision, run.processes))
    on_device = _augmentation(config, device) if config.views.backend == "device" else 0.0
    parts = []
    for probe, through in pieces:
        at_once = min(probe.batch, cost.CPU_BATCH) if device.type == "cpu" else probe.batch
        held = probe.batch * (_passes(config) if probe.kind == "train" else 1)
        parts.append(Part(cost.encoder_pieces(replace(probe, batch=at_once), device), through, held))
    return planned(parts, device, run.processes, images * config.schedule.epochs * on_device, _beside(run))


def _passes(config: PretrainConfig) -> int:
    """Whose activations wait for the backward pass: of both views where both have a gradient; of one part at a time."""
    if config.mechanism == "moco_v3" and config.accumulate > 1:
        return 1
    return 2 if config.symmetric or config.mechanism == "end_to_end" else 1


def _beside(run: Plan) -> int:
    """Bytes of what a training holds besides the probed backbone and its gradient.

    That is all else of the model (heads, key encoder, dictionary), its gradients, and what the optimiser remembers.
    """
    with torch.device("meta"):
        model, probed = build(run), build_backbone(run.config.arch)
    everything = sum(one.numel() for one in (*model.parameters(), *model.buffers()))
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    moments = 2 if run.config.optimizer.kind in ("adamw", "lamb") else 1
    return 4 * (everything + (1 + moments) * trained - 2 * sum(one.numel() for one in probed.parameters()))


def _test_images(run: Plan) -> int:
    """Of the kNN monitor; 0 where the data have none."""
    try:
        return len(open_splits(run.dataset, run.data)[1])
    except InputError:
        return 0


def together(recipe: str, dataset: str, config: PretrainConfig, processes: int, pieces: Pieces, room: Room) -> Forecast:
    """What the pieces make: devices, cores and the disk work beside each other, but a CPU is device and cores."""
    busy, shared = pieces.network + pieces.augmentation, room.device.type == "cpu"
    at_hand = max(1, room.cores // processes)
    wanted = math.ceil(pieces.worker / busy / processes) if not shared else config.workers
    workers = max(1, min(at_hand, max(wanted, config.workers))) if pieces.worker else 0
    loader = pieces.worker / room.cores if shared else pieces.worker / max(1, min(room.cores, workers * processes))
    took = max(busy + loader if shared else max(busy, loader), pieces.reading)
    limit: Literal["network", "loader", "disk"] = "network"
    if pieces.reading >= took:
        limit = "disk"
    elif loader > busy:
        limit = "loader"
    words = ["--dataset", dataset]
    words += ["--nproc", str(processes)] if processes > 1 else []
    words += ["--workers", str(workers)] if workers not in (0, config.workers) else []
    return Forecast(recipe, dataset, processes, config.precision, took, limit, shell_join(words))


def _worker(config: PretrainConfig, photos: Path, device: torch.device) -> float:
    """Seconds of one core for both views of a photo."""
    views = two_views(open_images("flat", photos, "pretrain"), config, finished=device.type == "cpu")
    items = [(0, index) for index in range(len(views))]
    return worker_seconds(views, items)[0] / len(items)


def _augmentation(config: PretrainConfig, device: torch.device) -> float:
    """Seconds of the training device for what it does to both views of an image."""
    (recipe, _), size = recipes(config.views), config.views.size
    count = SOME if device.type == "cpu" else config.batch_size
    pixels = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, device=device)
    epoch, index = torch.zeros(count, dtype=torch.long).numpy(), torch.arange(count).numpy()
    draws = recipe.uniforms(config.seed, epoch, index, 0)
    return 2 * seconds(lambda: recipe.apply(pixels, draws, size), device, 2) / count
