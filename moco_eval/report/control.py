"""Recipe control: what another seed of the same pretraining changes, the unit for every other difference."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moco_eval.papers.match import pretraining_of, seed_of
from moco_eval.report.runs import method
from moco_eval.results.statistics import mean_and_std

Record = dict[str, Any]


@dataclass(frozen=True)
class Control:
    """One recipe, pretrained from several seeds and judged alike.

    Attributes:
        recipe: what it is called.
        values: of the metric, percent, by seed.
        std: the sample standard deviation (n - 1) of these.
    """

    recipe: str
    values: dict[int, float]
    std: float

    @property
    def range(self) -> float:
        """From the lowest to the highest."""
        return max(self.values.values()) - min(self.values.values())

    def in_std(self, gap: float) -> float | None:
        """A difference in units of the seeds' standard deviation; None where the seeds do not differ."""
        return abs(gap) / self.std if self.std else None


def control_of(records: Sequence[Record], metric: str) -> Control | None:
    """The recipe with most seeds, of equals the one whose seeds differ most; None where none has two.

    Args:
        records: of one protocol on the same data, the newest last: of one seed it counts.
    """
    recipes: dict[str, dict[int, Record]] = {}
    for record in records:
        if (seed := seed_of(record["encoder"])) is not None and metric in record["metrics"]:
            recipes.setdefault(_recipe(record), {})[seed] = record
    controls = [_control(by_seed, metric) for by_seed in recipes.values() if len(by_seed) > 1]
    return max(controls, key=lambda control: (len(control.values), control.std), default=None)


def _recipe(record: Record) -> str:
    """What its repeats share, as text: the pretraining but for the seed, how far it had come, which encoder, trials."""
    encoder = record["encoder"]
    came = [(encoder["pretraining"] or {}).get(key) for key in ("epochs", "steps")]
    which = [encoder["arch"], encoder.get("which", "query"), len(record["trials"])]
    return json.dumps([pretraining_of(encoder), came, which], sort_keys=True, default=str)


def _control(by_seed: dict[int, Record], metric: str) -> Control:
    values = {seed: by_seed[seed]["metrics"][metric] for seed in sorted(by_seed)}
    _, std = mean_and_std(list(values.values()))
    encoder = next(iter(by_seed.values()))["encoder"]
    epochs = encoder["pretraining"].get("epochs")
    name = method(encoder["pretraining"].get("protocol") or "", encoder["origin"])
    assert std is not None
    return Control(name + ("" if epochs is None else f" (epoch {epochs})"), values, std)
