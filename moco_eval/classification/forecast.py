"""What a suite would take on this machine, from at most a minute of small timed pieces of its own work.

Nothing is written. Extraction is timed on the real images and the real network; each protocol's own work on random
features of the right shape, in pieces that are taken as proportional to their size.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.markup import escape
from rich.table import Table
from torch import nn

from moco_eval.classification import knn_grid, logistic, svm
from moco_eval.classification.knn import in_bytes
from moco_eval.classification.linear import Classifier
from moco_eval.classification.neighbours import Neighbours, nearest
from moco_eval.classification.suite import Item, Need
from moco_eval.config.classification import KnnConfig, KnnGridConfig, LogisticConfig, QuickConfig, SvmConfig
from moco_eval.features.cache import Source
from moco_eval.features.extract import pixels
from moco_eval.features.stages import network
from moco_eval.runtime.device import autocast
from moco_eval.runtime.text import as_text, duration

SECONDS, PART, LEAST = 50.0, 10.0, 1.0  # of all parts of the probe together, of one at most, of one at least
ROWS = 8192  # random features at most
# of L-BFGS in uncorrelated coordinates, as seen on the digits: iterations for each C of a path and for the last fit,
PATH_ITERATIONS, LAST_ITERATIONS = 25, 150
LONGEST_PART = 0.43  # and what the costliest of a path's five parts has of them


@dataclass(frozen=True)
class Own:
    """What a protocol does beside the extraction: about so many seconds, and what was assumed."""

    protocol: str
    seconds: float
    basis: str


@dataclass(frozen=True)
class Forecast:
    """The plan of a suite, and about how long it takes.

    Attributes:
        dim: of the features.
        rates: images per second of this process, of clean crops (False) and training crops (True), where needed.
        own: of the tasks that are not done.
        took: seconds of the probe.
    """

    needs: list[Need]
    dim: int
    rates: dict[bool, float]
    own: list[Own]
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
        return sum(map(self.seconds, self.needs)) + sum(one.seconds for one in self.own)


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

    dim = dimension(suite[0].sources[0], device)
    rates = {cropped: rate(source, device, share(done)) for done, (cropped, source) in enumerate(missing.items())}
    own = [own_work(item, dim, device, share(done)) for done, item in enumerate(todo, len(missing))]
    return Forecast(needs, dim, rates, own, time.perf_counter() - began, device, processes)


# Extraction


@torch.no_grad()
def dimension(source: Source, device: torch.device) -> int:
    """D of the features."""
    net, side = network(source.encoder, source.feature).to(device).eval(), source.preprocessing.size
    with autocast(device, source.precision):
        return net(torch.zeros(1, 3, side, side, device=device)).flatten(1).shape[1]


def rate(source: Source, device: torch.device, seconds: float) -> float:
    """Images per second through the loader and the network.

    In this process first, in growing batches until a sixteenth of the time is used for one; then as the extraction
    will do it, on so many images that half of the time is enough even without help from its workers.
    """
    net = network(source.encoder, source.feature).to(device).eval()
    size, alone = 1, replace(source, workers=0)
    while (took := _through(alone, net, size, size, device)) < seconds / 16 and size < source.batch_size:
        size = min(4 * size, source.batch_size)
    count = int(min(len(source.images), max(size, seconds / 2 * size / took)))
    batch = max(1, min(source.batch_size, count // (4 * max(1, source.workers))))
    return count / _through(source, net, count, batch, device)


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
    task, config = item.judged, item.config
    images = task.training_images(config.seed)
    shape = Shape(len(images), len(task.test), dim, len(task.train.classes), device, seconds)
    if isinstance(config, KnnConfig):
        about, basis = shape.search(config.k, config.memory), f"{shape.test:,} x {shape.train:,} products"
    elif isinstance(config, KnnGridConfig):
        about, basis = shape.grid(config), f"{len(config.distance)} leave-one-out searches"
    elif isinstance(config, QuickConfig):
        about, basis = shape.quick(config), f"{config.schedule.epochs} epochs of SGD"
    elif isinstance(config, LogisticConfig):
        about = shape.logistic(config)
        basis = f"{config.path.count} values of C of {PATH_ITERATIONS} iterations, one fit of {LAST_ITERATIONS}"
    elif config.low_shot:
        about, basis = shape.low_shot(config), f"{len(config.costs)} costs, {len(config.shots)} numbers of shots"
    else:
        about, basis = shape.svm(config), f"{len(config.costs)} costs for each of {shape.classes} classes"
    trials = f", {task.trials} trials" if task.trials > 1 else ""
    return Own(item.protocol, task.trials * about, basis + trials)


@dataclass(frozen=True)
class Shape:
    """How many images, features and classes a protocol works on, and how long each of its pieces may be timed."""

    train: int
    test: int
    dim: int
    classes: int
    device: torch.device
    seconds: float

    def search(self, k: int, memory: float | None, distance: str = "cosine", queries: int | None = None) -> float:
        """Of the k nearest in the whole bank for all queries."""
        queries = queries or self.test
        bank, asked = self.rows(self.train), self.rows(queries)

        def piece(count: int) -> None:
            options = {"memory": in_bytes(memory), "device": self.device}
            nearest(asked[:count], bank, min(k, len(bank)), distance=distance, **options)  # type: ignore[arg-type]

        return self.scaled(piece, len(asked), self.seconds / 2) * queries / len(asked) * self.train / len(bank)

    def grid(self, config: KnnGridConfig) -> float:
        """Of the searches of a grid, and of its votes."""
        part = replace(self, seconds=self.seconds / (len(config.distance) + 2))
        ks = sorted(k for k in config.k if k < self.train)
        asked = min(self.train, config.queries)
        searches = [part.search(ks[-1], config.memory, distance, asked) for distance in config.distance]
        labels = torch.randint(self.classes, (self.train,), device=self.device)
        found = torch.randint(self.train, (min(asked, ROWS), ks[-1]), device=self.device)

        def vote(count: int) -> None:
            some = Neighbours(torch.rand(count, ks[-1], device=self.device), found[:count])
            for temperature in config.temperature:
                for _ in knn_grid.predicted(some, labels, self.classes, ks, temperature):
                    pass

        votes = part.scaled(vote, len(found), part.seconds) * asked / len(found)
        return sum(searches) + votes + searches[0] * self.test / asked

    def quick(self, config: QuickConfig) -> float:
        """Of the steps of SGD on one classifier."""
        steps = -(-self.train // config.batch_size)
        features, labels = self.rows(self.train).to(self.device), self.labels()
        settings = (config.optimizer, config.schedule)
        classifier = Classifier(self.dim, self.classes, *settings, seed=0, device=self.device, alone=True)
        batch = self.train // steps

        def piece(count: int) -> None:
            for _ in range(count):
                rows = torch.randint(len(features), (batch,), device=self.device)
                classifier.step(features[rows], labels[rows], 0, batch)

        return self.scaled(piece, config.schedule.epochs * steps, self.seconds)

    def logistic(self, config: LogisticConfig) -> float:
        """Of the iterations of L-BFGS, the path in several processes on a CPU, and of starting these."""
        started, jobs = start_processes() if self.device.type == "cpu" else (0.0, 1.0)
        part = replace(self, seconds=max(LEAST, self.seconds - started) / 2)
        threads = torch.get_num_threads()
        alone = part.iterations(threads)
        each = part.iterations(max(1, int(threads / jobs))) if threads > 1 and jobs > 1 else alone
        on_path = config.path.count * PATH_ITERATIONS * (1 - config.held_out) * each / min(jobs, 1 / LONGEST_PART)
        return started + on_path + LAST_ITERATIONS * alone

    def iterations(self, threads: int) -> float:
        """Of one iteration of L-BFGS on all training images."""
        before, count = torch.get_num_threads(), min(self.train, ROWS)
        features = logistic.resident(self.rows(count), self.device)
        labels = self.labels().cpu().numpy()
        labels[-self.classes :] = np.arange(self.classes)
        axes = logistic.uncorrelated(features, self.device)
        few = logistic.SolverSettings(max_iterations=5)

        def piece(rows: int) -> None:
            some = np.arange(count - rows, count)  # with every class
            logistic.fit_torch(features[count - rows :], labels[some], 1.0, self.device, None, few, axes)

        torch.set_num_threads(threads)
        try:
            return self.scaled(piece, count, self.seconds, min(count, 4 * self.classes)) * self.train / count / 5
        finally:
            torch.set_num_threads(before)

    def svm(self, config: SvmConfig) -> float:
        """Of every cost for one class, times the classes, in as many processes as there are cores."""
        started, jobs = start_processes()
        count = min(self.train, ROWS)
        features = svm.normalise(self.rows(count).numpy())
        target = self.one_class(count)

        def piece(rows: int) -> None:
            for cost in config.costs:
                svm.validate(features[:rows], target[:rows], cost, 0, config.max_iterations)

        one = (
            self.scaled(piece, count, max(LEAST, self.seconds - started), min(count, 8 * self.classes))
            * self.train
            / count
        )
        return started + one * self.classes / jobs

    def low_shot(self, config: SvmConfig) -> float:
        """Of every cost for one class at a middling number of shots, times the classes and numbers of shots."""
        started, jobs = start_processes()
        shots = min(config.shots, key=lambda one: abs(one - sum(config.shots) / len(config.shots)))
        count, asked = min(self.train, ROWS), min(self.test, ROWS)
        train, test = (svm.normalise(self.rows(rows).numpy()) for rows in (count, asked))
        labels, test_labels = self.one_class(count), self.one_class(asked)
        drawn = np.where(np.arange(count) < shots * self.classes, labels > 0, -1)

        def piece(number: int) -> None:
            some = config.costs[:number]
            svm.low_shot_class(train, drawn, labels, test, test_labels, some, 0, config.max_iterations)

        one = self.scaled(piece, len(config.costs), max(LEAST, self.seconds - started))
        return started + one * self.train / count * self.classes * len(config.shots) / jobs

    def one_class(self, count: int) -> np.ndarray:
        """1 for every image of one class in turn, -1 for the others."""
        return np.where(np.arange(count) % max(2, min(self.classes, count // 8)) == 0, 1, -1)

    def rows(self, count: int) -> torch.Tensor:
        """Random features."""
        return torch.rand(min(count, ROWS), self.dim)

    def labels(self) -> torch.Tensor:
        """Random labels of as many."""
        return torch.randint(self.classes, (min(self.train, ROWS),), device=self.device)

    def scaled(self, piece: Callable[[int], None], whole: int, seconds: float, size: int = 1) -> float:
        """Seconds of a whole piece of work, from the largest part of it for which a third of the time is enough."""
        piece(size)  # warms up
        while True:
            began = time.perf_counter()
            piece(size)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            took = time.perf_counter() - began
            if size >= whole or took > seconds / 6:
                return took * whole / size
            size = min(whole, max(size + 1, int(size * min(8.0, seconds / 3 / max(took, 1e-6)))))


def start_processes() -> tuple[float, float]:
    """Seconds until joblib's processes are there, and how many of them this machine really serves at once."""
    from joblib import Parallel, cpu_count, delayed

    jobs, run = cpu_count(), Parallel(n_jobs=cpu_count())
    features, target = np.random.default_rng(0).random((1000, 64)), np.where(np.arange(1000) % 10 == 0, 1, -1)
    work = delayed(svm.validate)(features, target, 1.0, 0, 200)

    def seconds(copies: int) -> float:
        began = time.perf_counter()
        run([work] * copies)
        return time.perf_counter() - began

    started, alone, together = seconds(jobs), seconds(1), seconds(jobs)
    return max(0.0, started - together), min(float(jobs), max(1.0, jobs * alone / together))


# How it is shown


def describe(suite: Sequence[Item], found: Forecast, output: Path) -> str:
    """The plan as text."""
    first = suite[0].task
    extraction = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("features", "for", "images", "in the cache", "to disk", "about"):
        extraction.add_column(heading, justify="left" if heading in ("features", "for") else "right")
    for need in found.needs:
        extraction.add_row(*(escape(cell) for cell in _cells(need, found)))
    own = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("protocol", "its own work", "about"):
        own.add_column(heading, justify="right" if heading == "about" else "left")
    about = {one.protocol: one for one in found.own}
    for item in suite:
        one = about.get(item.protocol)
        own.add_row(
            item.protocol, *((one.basis, duration(one.seconds)) if one else (f"already done: {item.output}", "-"))
        )
    return as_text(
        f"suite of {first.encoder.source} ({first.encoder.arch}, {first.encoder.origin}): {first.feature} feature, "
        f"{found.dim} numbers, {suite[0].config.precision}",
        f"data: {first.train.name}, {len(first.train):,} training and {len(first.test):,} test images, "
        f"{len(first.train.classes)} classes",
        f"output: {output}",
        f"cache: {first.cache}",
        *([extraction] if found.needs else []),
        own,
        _in_all(found),
    )


def _cells(need: Need, found: Forecast) -> tuple[str, ...]:
    images, source = len(need.source.images), need.source
    size = need.images * found.dim * (2 if source.precision == "bf16" else 4)
    crop = "clean crop" if source.crops is None else f"crops of epoch {source.crops.epoch}"
    part = source.images.subset
    return (
        f"{source.images.split}, {crop}" + (f" ({part})" if part else ""),
        "every task" if len(need.protocols) == len(found.own) > 1 else ", ".join(need.protocols),
        f"{images:,}",
        f"{images - need.images:,}",
        f"{size / 1e6:,.1f} MB",
        duration(found.seconds(need)),
    )


def _in_all(found: Forecast) -> str:
    names = {False: "clean crops", True: "training crops"}
    rates = "".join(f", {rate:,.0f} images/s of {names[cropped]}" for cropped, rate in found.rates.items())
    where = f"{found.device}, {torch.get_num_threads()} threads" if found.device.type == "cpu" else str(found.device)
    several = f" in one process (of {found.processes})" if found.processes > 1 else ""
    return (
        f"in all about {found.total / 60:.1f} minutes: a prediction, from a probe of {found.took:.0f} s{several} on "
        f"{where}{rates}"
    )
