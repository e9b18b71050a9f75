"""The result record: what was done, on what, with which weights, and how it came out."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moco_eval.results.environment import environment, peak_memory_mb
from moco_eval.results.statistics import REPEATS, summarise
from moco_eval.runtime import files
from moco_eval.runtime.console import log
from moco_eval.runtime.rank import is_main

if TYPE_CHECKING:  # whoever reads a record needs no torch
    from moco_eval.encoders.encoder import Encoder

SCHEMA = "moco-eval/result@1"
# evaluations that answer for places of an image, by their commands
DENSE = {"detect": "detection", "segment": "segmentation"}


@dataclass
class Cost:
    """Seconds, images and peak memory of an evaluation, over its sessions.

    `images`: what it looked at, epochs counted; `cached_images`: those of them whose features were there already.
    """

    device: str
    seconds: float = 0.0
    images: int = 0
    cached_images: int = 0

    @contextmanager
    def clock(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start

    def record(self) -> dict[str, Any]:
        return {
            "seconds": round(self.seconds, 2),
            "images": self.images,
            "cached_images": self.cached_images,
            "peak_memory_MB": peak_memory_mb(self.device),
            "device": self.device,
        }


@dataclass
class ResultRecord:
    """What a result record is made of; percent under `metrics`. Field meanings: docs/results.md.

    `over` says what the trials vary: head, labels (which few are drawn), finetune or pretrain; `interval` is over test
    images, per metric.
    `deviations` are the differences from the protocol that may move the number; empty means comparable.
    """

    protocol: str
    dataset: dict[str, Any]
    encoder: "Encoder"
    trials: list[dict[str, Any]]
    over: str
    selection: str
    cost: Cost
    interval: dict[str, tuple[float, float]] = field(default_factory=dict)
    equivalences: list[str] = field(default_factory=list)
    deviations: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        metrics, std = summarise([trial["metrics"] for trial in self.trials])
        return {
            "schema": SCHEMA,
            "protocol": self.protocol,
            "dataset": self.dataset,
            "encoder": self.encoder.record(),
            "metrics": metrics,
            "std": std,
            "interval": {name: list(bounds) for name, bounds in self.interval.items()},
            "trials": self.trials,
            "over": self.over,
            "selection": self.selection,
            "equivalences": [*self.equivalences, *self.encoder.equivalences()],
            "deviations": [*self.deviations, *self.encoder.deviations()],
            "cost": self.cost.record(),
            "environment": environment(),
        } | self.extra

    def write(self, output: Path) -> dict[str, Any]:
        """Write result.json (first process only) and say where; returns the record."""
        record = self.record()
        if is_main():
            files.write_json(output / "result.json", record)
            log(f"result: {output / 'result.json'}")
        return record


def repeats(record: dict[str, Any]) -> str:
    """How many trials a record has, and of what: '5 label draws'."""
    over = record["over"]
    if over == "head" and record["dataset"].get("labels_per_class"):
        over = "labels"  # as records said before label draws had a word of their own
    return f"{len(record['trials'])} {REPEATS.get(over, over)}"
