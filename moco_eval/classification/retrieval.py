"""Image retrieval: each test image asks for the others of its class, found by the cosine similarity of features.

Every image of the set is a query; the bank is the set itself without the query. Nothing is trained.
Source: average precision over the whole ranking as Philbin et al. 2007 define it, the mean of the precisions at each
relevant place; recall@k as Jegou et al. 2011 and Oh Song et al. 2016 (arXiv:1511.06452): the share of queries of which
one of the k nearest is of their class.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moco_eval.classification.neighbours import nearest
from moco_eval.classification.task import Task
from moco_eval.config.base import usual_workers
from moco_eval.data.catalogue import preprocessing_deviations, split_deviations
from moco_eval.data.glance import tell_doubts
from moco_eval.data.image_set import require_single_label
from moco_eval.errors import InputError
from moco_eval.features.cache import Features
from moco_eval.features.stages import network
from moco_eval.results.record import Cost, ResultRecord
from moco_eval.results.run_directory import finished_as, open_run
from moco_eval.results.statistics import RESAMPLES, percentiles, resampled_means
from moco_eval.runtime.collectives import found_by_main

RECALLS = (1, 5, 10)
AT_ONCE = 256  # queries whose whole rankings are held at a time


@dataclass(frozen=True)
class Rankings:
    """How well each query ranked.

    Attributes:
        precision: average precision of each query, (Q,), in percent.
        hits: whether one of the k nearest is of its class, (Q, len(RECALLS)).
        queries: their places in the set, (Q,).
    """

    precision: np.ndarray
    hits: np.ndarray
    queries: np.ndarray

    def metrics(self) -> dict[str, float]:
        """mAP and recall@k over the queries, in percent."""
        recalls = {f"recall@{k}": 100 * float(self.hits[:, place].mean()) for place, k in enumerate(RECALLS)}
        return {"mAP": float(self.precision.mean())} | recalls

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % bootstrap intervals over the queries, in percent."""
        columns = {f"recall@{k}": 100.0 * self.hits[:, place] for place, k in enumerate(RECALLS)}
        together = np.zeros(len(self.queries), dtype=int)
        return {
            name: percentiles(resampled_means(values, together, RESAMPLES))
            for name, values in ({"mAP": self.precision} | columns).items()
        }


def rank(features: Features | torch.Tensor, labels: np.ndarray, memory: float | None, device: torch.device) -> Rankings:
    """Rank all others for each image that has another one of its class.

    Of images that are equally near, one before the other by their places in the set.

    Args:
        features: (N, D); labels: (N,).
    Raises:
        InputError: no class has two images.
    """
    queries = _queries(labels)
    count, parts = len(labels), []
    for rows in np.array_split(queries, -(-len(queries) // AT_ONCE)):
        own = torch.from_numpy(rows)
        found = nearest(features[own], features, count - 1, own=own, memory=memory, device=device)
        parts.append(_of_ranking(found.index.cpu().numpy(), labels, rows))
    precision, hits = (np.concatenate(column) for column in zip(*parts))
    return Rankings(precision, hits, queries)


def _queries(labels: np.ndarray) -> np.ndarray:
    """The images of which there is another one of their class. Raises InputError where there are none."""
    queries = np.flatnonzero(np.bincount(labels)[labels] > 1)
    if not len(queries):
        raise InputError(
            "no class has two images, so no query has an answer; give a set with several images of each class"
        )
    return queries


def _of_ranking(index: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average precision (Q,) in percent and hits (Q, len(RECALLS)) of rankings (Q, N - 1), nearest first."""
    relevant = labels[index] == labels[rows, None]
    precision = relevant.cumsum(axis=1) / np.arange(1, index.shape[1] + 1)
    average = (precision * relevant).sum(axis=1) / relevant.sum(axis=1)
    return 100 * average, np.stack([relevant[:, :k].any(axis=1) for k in RECALLS], axis=1)


def by_class(rankings: Rankings, labels: np.ndarray, classes: tuple[str, ...]) -> dict[str, dict[str, float | None]]:
    """The metrics of each class's queries; None where a class has none."""
    table: dict[str, dict[str, float | None]] = {}
    for place, name in enumerate(classes):
        own = labels[rankings.queries] == place
        part = Rankings(rankings.precision[own], rankings.hits[own], rankings.queries[own])
        table[name] = dict(part.metrics()) if own.any() else dict.fromkeys(("mAP", *(f"recall@{k}" for k in RECALLS)))
    return table


# The evaluation


PROTOCOL = "retrieve/cosine@1"


@dataclass(frozen=True)
class Settings:
    """How features are extracted and searched; `memory`: GB of the search's blocks."""

    precision: str = "fp32"
    batch_size: int = 256
    workers: int = field(default_factory=usual_workers)
    memory: float | None = None


def retrieve(task: Task, settings: Settings, output: Path, device: torch.device) -> dict[str, Any]:
    """Judge an encoder on `task.test`, of which every image asks for the others of its class. Collective.

    Returns:
        The result record; that of a finished run at once.
    Raises:
        InputError, RunFailed, Interrupted: as `judge.judge` does.
    """
    check(task)
    about = resolved(task, settings)
    with open_run(output, about):
        if record := found_by_main(lambda: finished_as(output, about)):
            return record
        cost = Cost(str(device))
        with cost.clock():
            features = task.features(task.test, settings, device)
            ranked = found_by_main(lambda: _ranked(task, features, settings, device))
        cost.images, cost.cached_images = len(task.test), task.cached.total()
        return found_by_main(lambda: _record(task, settings, ranked, cost).write(output))


def check(task: Task) -> None:
    """Raises InputError for images without labels or of several classes, and where no class has two of them."""
    require_single_label(task.test)
    if task.test.labels is None or not len(task.test):
        raise InputError(f"{task.test.name} {task.test.split} has no labels, so no answer can be checked")
    _queries(task.test.labels)
    network(task.encoder, task.feature)
    assert task.preprocessing  # raises where the channels differ
    tell_doubts(task.test)


def resolved(task: Task, settings: Settings) -> dict[str, Any]:
    """Everything that defines a run, for its config.yaml."""
    return {
        "command": "retrieve",
        "dataset": {"test": task.test.record()},
        "encoder": task.encoder.identity() | {"feature": task.feature},
        "trials": 1,
        "config": {"protocol": PROTOCOL, "seed": 0, **asdict(settings)},
    }


def _ranked(task: Task, features: Features, settings: Settings, device: torch.device) -> Rankings:
    assert task.test.labels is not None
    memory = None if settings.memory is None else 1e9 * settings.memory
    return rank(features, task.test.labels, memory, device)


def deviations(task: Task, settings: Settings) -> list[str]:
    """In words, where a retrieval is not the protocol's."""
    return [
        *([f"precision {settings.precision} instead of fp32"] if settings.precision != "fp32" else []),
        *([f"{task.feature} feature instead of pooled"] if task.feature != "pooled" else []),
        *split_deviations(task.test),
        *preprocessing_deviations(task.test.name, task.preprocessing),
    ]


def _record(task: Task, settings: Settings, ranked: Rankings, cost: Cost) -> ResultRecord:
    assert task.test.labels is not None
    return ResultRecord(
        protocol=PROTOCOL,
        dataset=task.test.record(),
        encoder=task.encoder,
        trials=[{"seed": 0, "metrics": ranked.metrics()}],
        over="nothing",
        selection="nothing is chosen or trained",
        cost=cost,
        interval=ranked.intervals(),
        deviations=deviations(task, settings),
        extra={
            "preprocessing": task.preprocessing.to_dict(),
            "queries": len(ranked.queries),
            "alone_in_their_class": len(task.test) - len(ranked.queries),
            "per_class": by_class(ranked, task.test.labels, task.test.classes),
        },
    )
