"""The runs of a report beside the published rows that they are of."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from moco_eval.papers import cells, match
from moco_eval.papers.match import Comparison
from moco_eval.papers.tables import load_table, tables
from moco_eval.report.runs import Run


def papers(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each published table of which one of these runs has a number: the columns they have, whole."""
    records = [run.record | {"run": run.name} for run in runs if run.record]
    comparisons = (match.compare(load_table(name), records) for name, _ in tables()) if records else ()
    return [_shown(comparison) for comparison in comparisons if any(_meets(line) for line in comparison.lines)]


def _meets(line: match.Line) -> bool:
    return line.ours is not None and line.published is not None


def _shown(comparison: Comparison) -> dict[str, Any]:
    met = {line.column.title for line in comparison.lines if _meets(line)}
    lines = [line for line in comparison.lines if line.column.title in met]
    below = cells.below(replace(comparison, lines=lines))
    if others := [column.title for column in comparison.table.columns.values() if column.title not in met]:
        below.append(f"of these runs nothing for: {', '.join(others)}")
    return {
        "title": cells.title(comparison.table),
        "caption": comparison.table.caption,
        "groups": [(label, list(some)) for label, some in groupby(lines, key=lambda line: line.row)],
        "below": below,
    }
