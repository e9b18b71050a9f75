"""Retrieval of landmarks: Revisited Oxford and Paris, by their easy, medium and hard rules.

Nothing is trained: each query, cut to its landmark, ranks the database by the cosine similarity of features.

Source: Radenovic et al. 2018, arXiv:1803.11285, Section 2.3; filipradenovic/revisitop@3bb68d3, python/evaluate.py and
example_evaluate.py; read, not copied.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moco_eval.classification.neighbours import nearest
from moco_eval.classification.retrieval import Settings, deviations
from moco_eval.classification.task import Task
from moco_eval.data.glance import tell_doubts
from moco_eval.data.landmarks import Landmarks, Query
from moco_eval.features.stages import network
from moco_eval.results.record import Cost, ResultRecord
from moco_eval.results.run_directory import finished_as, open_run
from moco_eval.results.statistics import RESAMPLES, percentiles, resampled_means
from moco_eval.runtime.collectives import found_by_main

PROTOCOL = "retrieve/revisited@1"
PLACES = (1, 5, 10)
# what answers a query, and what counts neither way
RULES = {
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
    "easy": (("easy",), ("junk", "hard")),
}
NAMES = ("mAP", *(f"mP@{k}" for k in PLACES))


def average_precision(ranking: np.ndarray, right: np.ndarray, neither: np.ndarray) -> np.ndarray:
    """Average precision of a query and its precision at 1, 5 and 10, (4,), in percent; NaN where nothing answers it.

    The area under precision over recall between straight lines (trapezoids), from precision 1 where the first image is
    right. Behind its last right image a query's precision falls no further: P@10 of one with three is that of their
    ranks.

    Args:
        ranking: places in the database, nearest first, (N,).
        right, neither: places that answer it, and that are taken out of the ranking.
    """
    if not len(right):
        return np.full(1 + len(PLACES), np.nan)
    kept = ranking[~np.isin(ranking, neither)]
    ranks = np.flatnonzero(np.isin(kept, right))  # from 0
    before = np.arange(len(ranks))  # right ones ahead of each
    above = np.where(ranks > 0, before / np.maximum(ranks, 1), 1.0)
    area = ((above + (before + 1) / (ranks + 1)) / 2).sum() / len(right)
    last = [min(ranks[-1] + 1, k) for k in PLACES]
    return 100 * np.array([area, *((ranks < k).sum() / k for k in last)])


def scores(index: np.ndarray, queries: Sequence[Query]) -> dict[str, np.ndarray]:
    """Average precision and precisions of each query by each rule, (Q, 4); see `average_precision`.

    Args:
        index: the database's places, nearest first, by query, (Q, N).
    """
    table = {}
    for rule, kinds in RULES.items():
        rows = []
        for ranking, query in zip(index, queries):
            right, neither = (np.concatenate([getattr(query, kind) for kind in part]) for part in kinds)
            rows.append(average_precision(ranking, right, neither))
        table[rule] = np.array(rows)
    return table


def metrics(table: dict[str, np.ndarray]) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Means over the queries that something answers, mAP_medium and its like; and bootstrap intervals over them."""
    means, intervals = {}, {}
    for rule, rows in table.items():
        answered = rows[~np.isnan(rows[:, 0])]
        for name, values in zip(NAMES, answered.T if len(answered) else ()):
            means[f"{name}_{rule}"] = float(values.mean())
            together = np.zeros(len(values), dtype=int)
            intervals[f"{name}_{rule}"] = percentiles(resampled_means(values, together, RESAMPLES))
    return means, intervals


# The evaluation


def retrieve(
    task: Task, landmarks: Landmarks, settings: Settings, output: Path, device: torch.device
) -> dict[str, Any]:
    """Judge an encoder on the landmarks, of which `task.test` is the database. Collective.

    Returns:
        The result record; that of a finished run at once.
    Raises:
        InputError, RunFailed, Interrupted: as `judge.judge` does.
    """
    check(task)
    about = resolved(task, landmarks, settings)
    with open_run(output, about):
        if record := found_by_main(lambda: finished_as(output, about)):
            return record
        cost = Cost(str(device))
        with cost.clock():
            asking, stored = (task.features(images, settings, device) for images in (landmarks.asking, task.test))
            table = found_by_main(lambda: _searched(asking, stored, landmarks, settings, device))
        cost.images, cost.cached_images = len(task.test) + len(landmarks.asking), task.cached.total()
        return found_by_main(lambda: _record(task, landmarks, settings, table, cost).write(output))


def check(task: Task) -> None:
    """Raises InputError for a feature that the encoder does not have, or images that it does not take."""
    network(task.encoder, task.feature)
    assert task.preprocessing  # raises where the channels differ
    tell_doubts(task.test)


def resolved(task: Task, landmarks: Landmarks, settings: Settings) -> dict[str, Any]:
    """Everything that defines a run, for its config.yaml."""
    return {
        "command": "retrieve",
        "dataset": {"test": task.test.record(), "queries": landmarks.asking.record()},
        "encoder": task.encoder.identity() | {"feature": task.feature},
        "trials": 1,
        "config": {"protocol": PROTOCOL, "seed": 0, **asdict(settings)},
    }


def _searched(
    asking: Any, stored: Any, landmarks: Landmarks, settings: Settings, device: torch.device
) -> dict[str, np.ndarray]:
    memory = None if settings.memory is None else 1e9 * settings.memory
    found = nearest(asking[:], stored, len(stored), memory=memory, device=device)
    return scores(found.index.cpu().numpy(), landmarks.queries)


def _record(
    task: Task, landmarks: Landmarks, settings: Settings, table: dict[str, np.ndarray], cost: Cost
) -> ResultRecord:
    means, intervals = metrics(table)
    return ResultRecord(
        protocol=PROTOCOL,
        dataset=task.test.record(),
        encoder=task.encoder,
        trials=[{"seed": 0, "metrics": means}],
        over="nothing",
        selection="nothing is chosen or trained",
        cost=cost,
        interval=intervals,
        deviations=deviations(task, settings),
        extra={
            "preprocessing": task.preprocessing.to_dict(),
            "queries": len(landmarks.queries),
            "unanswered": {rule: int(np.isnan(rows[:, 0]).sum()) for rule, rows in table.items()},
        },
    )
