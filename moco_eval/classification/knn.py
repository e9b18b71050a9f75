"""Weighted k-nearest-neighbour classification on frozen features.

Source: Wu et al. 2018 (InstDisc), arXiv:1805.01978, Sec. 3.4; facebookresearch/moco, CIFAR-10 demo notebook.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moco_eval.classification.neighbours import (
    Distance,
    Neighbours,
    held,
    nearest,
    nearest_by_ranks,
    nearest_in_shares,
    require_enough,
)
from moco_eval.classification.probe import Probe
from moco_eval.classification.task import Code, Outcome, Passes, Task, clean_features
from moco_eval.config.classification import KnnConfig, KnnGridConfig
from moco_eval.data.image_set import ImageSet
from moco_eval.features.extract import extract, extract_share
from moco_eval.preprocessing import Preprocessing
from moco_eval.results.metrics import accuracy
from moco_eval.runtime.rank import world_size

EPSILON = 1e-5  # solo-learn's
ON_GPU = 1024  # images of each process in a step of the monitor, where they are in memory: loaded ones cross /dev/shm


def weights(neighbours: Neighbours, temperature: float | None) -> torch.Tensor:
    """What each neighbour adds to its class, (queries, k), nearest first.

    exp(similarity / temperature) of a cosine similarity, up to a factor that a query's neighbours share, so that the
    nearest adds 1; 1 / (distance + 1e-5) of a Euclidean distance, which has no temperature.

    Source: Wu et al. 2018, Sec. 3.4; vturrisi/solo-learn@9187ea3, solo/utils/knn.py, for the Euclidean one.
    """
    if neighbours.distance == "euclidean":
        return 1 / (EPSILON - neighbours.similarity)
    assert temperature is not None
    return ((neighbours.similarity - neighbours.similarity[:, :1]) / temperature).exp()


def vote(neighbours: Neighbours, labels: torch.Tensor, classes: int, temperature: float | None = None) -> torch.Tensor:
    """Class scores, (queries, classes): each neighbour adds its weight to its own class.

    Args:
        labels: class of each image in the bank, (B,).
    """
    votes = weights(neighbours, temperature)
    return votes.new_zeros((len(votes), classes)).scatter_add_(1, labels[neighbours.index], votes)


def guesses(neighbours: Neighbours, labels: torch.Tensor, classes: int, temperature: float | None) -> torch.Tensor:
    """The scores of `vote`, and minus infinity of a class that no neighbour votes for: it is no guess.

    Args: as `vote`.
    """
    scores = vote(neighbours, labels, classes, temperature)
    named = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, labels[neighbours.index], True)
    return scores.masked_fill_(~named, -torch.inf)


def monitor(
    net: nn.Module,
    train: ImageSet,
    test: ImageSet,
    preprocessing: Preprocessing,
    device: torch.device,
    *,
    k: int,
    temperature: float,
    workers: int,
    precision: str = "fp32",
) -> float:
    """Top-1 in percent of the kNN monitor during pretraining: bank of clean training images; puts `net` back.

    Collective: every rank has the features of its own images, and searches among these for all queries.
    An unreadable image is named and counts as a grey one: a monitor must not end a run, least of all on one rank.

    Args:
        precision: of the encoder's arithmetic; the search is in fp32.
    """
    assert train.labels is not None and test.labels is not None
    training = net.training
    net.eval()
    how: dict[str, Any] = {"workers": workers, "precision": precision, "title": "kNN", "tolerant": True}
    large = device.type == "cuda" and train.pixels is not None
    how["batch_size"] = ON_GPU * world_size() if large else 256
    bank, index = extract_share(net, train, preprocessing, device, **how)
    queries = extract(net, test, preprocessing, device, **how)
    net.train(training)
    scores = vote(
        nearest_in_shares(queries, bank, index, min(k, len(train)), device=device),
        torch.as_tensor(train.labels, device=device),
        len(train.classes),
        temperature,
    )
    return accuracy(scores.cpu(), torch.as_tensor(test.labels))


def prepare(task: Task, config: KnnConfig | KnnGridConfig) -> Task:
    """The task with the config's feature: the CIFAR-10 demo's protocol has the head's. Nothing is drawn but labels."""
    return replace(task, feature=config.feature, trials=task.trials if task.labels_per_class else 1)


def check(task: Task, config: KnnConfig) -> None:
    """Raises InputError where there are too few training images."""
    require_enough(config.k, len(task.training_images(config.seed)))


def run_trial(task: Task, config: KnnConfig, seed: int, _state: Path | None, device: torch.device) -> Outcome:
    """Find each test image's nearest training images, and let them vote."""
    images = task.training_images(seed)
    bank, queries = (task.features(part, config, device) for part in (images, task.test))
    search: dict[str, Any] = {"memory": in_bytes(config.memory), "device": device}
    answer = outcome(nearest_by_ranks(queries, bank, config.k, **search), images, task.test, config.temperature)
    for split, features in task.further_features(config, device).items():
        neighbours = nearest_by_ranks(features, bank, config.k, **search)
        answer.further[split] = outcome(neighbours, images, task.test, config.temperature).scores
    return answer


def passes(_config: KnnConfig | KnnGridConfig, train: int, test: int) -> Passes:
    """Every image once."""
    return Passes(extracted=train + test)


def own_work(config: KnnConfig, probe: Probe) -> tuple[float, str]:
    """The search; see `task.Code`."""
    return search_seconds(probe, config.k, config.memory), f"{probe.test:,} x {probe.train:,} products"


def memory(config: KnnConfig, probe: Probe) -> float:
    """The search's blocks and the scores; see `task.Code`."""
    blocks = held(probe.train, probe.test, probe.dim, config.k, probe.device, in_bytes(config.memory))
    return blocks + 4 * probe.test * probe.classes


def search_seconds(
    probe: Probe, k: int, memory: float | None, distance: Distance = "cosine", queries: int | None = None
) -> float:
    """About how long a search takes for the k nearest in the whole bank for all queries."""
    queries = queries or probe.test
    bank, rows = probe.rows(probe.train), probe.rows(queries)

    def piece(count: int) -> None:
        some = rows[:count]
        nearest(some, bank, min(k, len(bank)), distance=distance, memory=in_bytes(memory), device=probe.device)

    return probe.scaled(piece, len(rows), probe.seconds / 2) * queries / len(rows) * probe.train / len(bank)


def in_bytes(gigabytes: float | None) -> float | None:
    return None if gigabytes is None else 1e9 * gigabytes


def outcome(
    neighbours: Neighbours, train: ImageSet, test: ImageSet, temperature: float | None, **notes: Any
) -> Outcome:
    """What the neighbours of the test images say of their classes."""
    labels = torch.as_tensor(train.labels, device=neighbours.index.device)
    scores = guesses(neighbours, labels, len(train.classes), temperature).cpu()
    first = {"neighbour": neighbours.index[:, :10].cpu().numpy()}
    return Outcome(scores, len(train) + len(test), notes, arrays=first)


def draw(task: Task, seed: int, outcome: Outcome, output: Path) -> None:
    """neighbours.png; see `task.Code`."""
    from moco_eval.classification.neighbour_sheet import draw_neighbours

    neighbours = torch.from_numpy(outcome.arrays["neighbour"])
    draw_neighbours(task.training_images(seed), task.test, neighbours, output / "neighbours.png")


CODE = Code(run_trial, passes, prepare, check, sources=clean_features, own_work=own_work, memory=memory, draw=draw)
