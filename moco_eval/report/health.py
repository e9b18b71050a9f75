"""How healthy each encoder's features are, from the records."""

from collections.abc import Sequence
from typing import Any

from moco_eval.report.pick import by_encoder, by_test_set, feature
from moco_eval.report.runs import Run


def health(runs: Sequence[Run], names: dict[str, str], order: Sequence[str]) -> list[dict[str, Any]]:
    """A group for each test set and feature: each encoder's newest `health`, one with an alignment before others."""
    groups = []
    for data, tested in by_test_set(runs):
        kept = [run for run in tested if run.record and run.record.get("health")]
        for stage in sorted({feature(run) for run in kept}, key=lambda name: (name != "pooled", name)):
            chosen = by_encoder([run for run in kept if feature(run) == stage], names, order, _has_alignment)
            title = data if stage == "pooled" else f"{data}, {stage} feature"
            rows = [{"name": name, **run.record["health"]} for name, run in chosen.items() if run.record]
            _one_alignment(rows)
            groups.append({"data": title, "rows": rows, "aligned": any(row["alignment"] is not None for row in rows)})
    return groups


def _one_alignment(rows: list[dict[str, Any]]) -> None:
    """Leave only alignments by the same crops of as many images: those that most encoders have."""
    kinds = [(str(row.get("crops")), row.get("alignment_images")) for row in rows if row["alignment"] is not None]
    for row in rows:
        if kinds and (str(row.get("crops")), row.get("alignment_images")) != max(kinds, key=kinds.count):
            row["alignment"] = None


def _has_alignment(run: Run) -> bool:
    assert run.record
    return run.record["health"]["alignment"] is not None
