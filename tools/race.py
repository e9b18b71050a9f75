"""Several ways of doing the same work, timed in turn in one run: medians, and ratios against the first."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moco_eval.results.environment import environment
from moco_eval.runtime.files import write_json

Run = Callable[[], object]


def race(runs: Mapping[str, Run], amount: int, repeats: int, warm_up: int = 1) -> dict[str, Any]:
    """Time every run in each repeat, so that a drift of the machine's speed meets all alike.

    Args:
        runs: by name; the first is what the others are compared with. A GPU's work must be waited for inside.
        amount: images of one run.
    Returns:
        `per_second` (median over repeats), `ratio` (median over repeats of a rate over the first one's in the same
        repeat), `spread` (smallest and largest of those), `repeats`, `environment`.
    """
    for run in runs.values():
        for _ in range(warm_up):
            run()
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            rates[name].append(amount / (time.perf_counter() - started))
    first = rates[next(iter(rates))]
    ratios = {name: [mine / its for mine, its in zip(every, first)] for name, every in rates.items()}
    return {
        "per_second": {name: statistics.median(every) for name, every in rates.items()},
        "ratio": {name: statistics.median(every) for name, every in ratios.items()},
        "spread": {name: [min(every), max(every)] for name, every in ratios.items()},
        "repeats": repeats,
        "environment": environment(),
    }


def report(title: str, result: dict[str, Any], json_file: Path | None, unit: str = "images/s") -> None:
    """The table to stdout, the figures to a file."""
    table = Table(title=title, title_justify="left")
    for heading in ("", unit, "ratio", "smallest", "largest"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, rate in result["per_second"].items():
        low, high = result["spread"][name]
        table.add_row(name, f"{rate:.4g}", f"{result['ratio'][name]:.2f}", f"{low:.2f}", f"{high:.2f}")
    Console(file=sys.stdout, width=100).print(table)
    if json_file is not None:
        write_json(json_file, result)
