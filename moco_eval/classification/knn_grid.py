"""knn/grid@1: k, temperature and distance of the kNN classifier, chosen by leave-one-out on the training images.

One search per distance at the largest k answers every point of the grid.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moco_eval.classification.knn import draw, in_bytes, outcome, passes, prepare, search_seconds, weights
from moco_eval.classification.neighbours import Distance, Neighbours, Rows, held, nearest_by_ranks, require_enough
from moco_eval.classification.probe import ROWS, Probe
from moco_eval.classification.task import Code, Outcome, Task, clean_features
from moco_eval.config.classification import KnnGridConfig
from moco_eval.runtime.console import log

VOTING = 2**26  # class scores held at once


def check(task: Task, config: KnnGridConfig) -> None:
    """Raises InputError where there are too few training images for the smallest k."""
    require_enough(min(config.k), len(task.training_images(config.seed)) - 1)


def run_trial(task: Task, config: KnnGridConfig, seed: int, _state: Path | None, device: torch.device) -> Outcome:
    """Choose on the training images, then classify the test images once."""
    images = task.training_images(seed)
    bank, queries = (task.features(part, config, device) for part in (images, task.test))
    chosen = choose(bank, torch.as_tensor(images.labels), len(images.classes), config, seed, device)
    if chosen.left_out:
        log(f"k {', '.join(map(str, chosen.left_out))} left out: each image has only {len(images) - 1} others")
    best = chosen.best
    search: dict[str, Any] = {"distance": best.distance, "memory": in_bytes(config.memory), "device": device}
    neighbours = nearest_by_ranks(queries, bank, best.k, **search)
    answer = outcome(neighbours, images, task.test, best.temperature, grid=chosen.record())
    for split, features in task.further_features(config, device).items():
        neighbours = nearest_by_ranks(features, bank, best.k, **search)
        answer.further[split] = outcome(neighbours, images, task.test, best.temperature).scores
    return answer


@dataclass(frozen=True)
class GridPoint:
    """One setting of the classifier; Euclidean votes have no temperature."""

    distance: Distance
    k: int
    temperature: float | None


@dataclass(frozen=True)
class Choice:
    """The leave-one-out accuracy of every point, in percent, and the best; `left_out`: the k that the bank is too
    small for."""

    best: GridPoint
    accuracy: dict[GridPoint, float]
    queries: int
    left_out: tuple[int, ...]

    def record(self) -> dict[str, Any]:
        return {
            "chosen": asdict(self.best),
            "queries": self.queries,
            "left_out_k": list(self.left_out),
            "points": [asdict(point) | {"top1": top1} for point, top1 in self.accuracy.items()],
        }


def choose(
    features: Rows,
    labels: torch.Tensor,
    classes: int,
    config: KnnGridConfig,
    seed: int,
    device: torch.device,
) -> Choice:
    """Classify training images by all the others, at every point of the grid. Collective.

    Of equally good points the one with the smallest k is taken, cosine before Euclidean, then the largest temperature.

    Args:
        features: (N, D) of the training images; labels: their classes, (N,).
    Raises:
        InputError: not even the smallest k has as many other images.
    """
    others = len(features) - 1
    require_enough(min(config.k), others)
    ks = sorted(k for k in config.k if k <= others)
    own = left_out(len(features), config.queries, seed)
    queries = features if len(own) == len(features) else features[own.numpy()]
    right = dict[GridPoint, int]()
    for distance in config.distance:
        options = {"distance": distance, "memory": in_bytes(config.memory), "device": device}
        neighbours = nearest_by_ranks(queries, features, ks[-1], own=own, **options)
        right |= _right(
            neighbours, labels.to(device), labels[own].to(device), classes, ks, _temperatures(config, distance)
        )
    best = min(right, key=lambda point: (-right[point], point.k, point.distance, -(point.temperature or 0)))
    top1 = {point: 100 * count / len(own) for point, count in right.items()}
    return Choice(best, top1, len(own), tuple(k for k in config.k if k > others))


def left_out(images: int, most: int, seed: int) -> torch.Tensor:
    """Which training images are left out in turn: all, or `most` of them drawn from the seed; ascending."""
    if images <= most:
        return torch.arange(images)
    return torch.from_numpy(np.sort(np.random.default_rng(seed).choice(images, most, replace=False)))


def _temperatures(config: KnnGridConfig, distance: Distance) -> Sequence[float | None]:
    return config.temperature if distance == "cosine" else (None,)


def _right(
    neighbours: Neighbours,
    labels: torch.Tensor,
    truth: torch.Tensor,
    classes: int,
    ks: Sequence[int],
    temperatures: Sequence[float | None],
) -> dict[GridPoint, int]:
    """How many queries each point classifies rightly; labels (B,) of the bank, truth (Q,) of the queries."""
    right = {GridPoint(neighbours.distance, k, temperature): 0 for k in ks for temperature in temperatures}
    for part in torch.arange(len(truth)).split(max(1, VOTING // classes)):
        here = slice(int(part[0]), int(part[-1]) + 1)
        some = Neighbours(neighbours.similarity[here], neighbours.index[here], neighbours.distance)
        for temperature in temperatures:
            for k, predictions in predicted(some, labels, classes, ks, temperature):
                right[GridPoint(neighbours.distance, k, temperature)] += int((predictions == truth[here]).sum())
    return right


def predicted(
    neighbours: Neighbours, labels: torch.Tensor, classes: int, ks: Sequence[int], temperature: float | None
) -> Iterator[tuple[int, torch.Tensor]]:
    """The classes that the k nearest vote for, (queries,), for each k of an ascending sequence."""
    votes, voters = weights(neighbours, temperature), labels[neighbours.index]
    scores, done = votes.new_zeros((len(votes), classes)), 0
    for k in ks:
        scores.scatter_add_(1, voters[:, done:k], votes[:, done:k])
        done = k
        yield k, scores.argmax(dim=1)


def own_work(config: KnnGridConfig, probe: Probe) -> tuple[float, str]:
    """The searches of a grid, and its votes; see `task.Code`."""
    part = replace(probe, seconds=probe.seconds / (len(config.distance) + 2))
    ks = sorted(k for k in config.k if k < probe.train)
    queries = min(probe.train, config.queries)
    searches = [search_seconds(part, ks[-1], config.memory, distance, queries) for distance in config.distance]
    labels = torch.randint(probe.classes, (probe.train,), device=probe.device)
    index = torch.randint(probe.train, (min(queries, ROWS), ks[-1]), device=probe.device)

    def vote(count: int) -> None:
        some = Neighbours(torch.rand(count, ks[-1], device=probe.device), index[:count])
        for temperature in config.temperature:
            for _ in predicted(some, labels, probe.classes, ks, temperature):
                pass

    votes = part.scaled(vote, len(index), part.seconds) * queries / len(index)
    return sum(searches) + votes + searches[0] * probe.test / queries, f"{len(config.distance)} leave-one-out searches"


def memory(config: KnnGridConfig, probe: Probe) -> float:
    """The largest search's blocks, and the rows that it asks for where it draws some; see `task.Code`."""
    k, asked = max(k for k in config.k if k < probe.train), min(probe.train, config.queries)
    bound = in_bytes(config.memory)
    drawn = 4 * probe.dim * asked if asked < probe.train else 0
    searches = (held(probe.train, count, probe.dim, k, probe.device, bound) for count in (asked, probe.test))
    return drawn + max(searches)


CODE = Code(run_trial, passes, prepare, check, sources=clean_features, own_work=own_work, memory=memory, draw=draw)
