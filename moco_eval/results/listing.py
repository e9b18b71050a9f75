"""All of one's own numbers as one list: a row for each metric of each finished run below a folder."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from moco_eval.results import run_directory
from moco_eval.runtime.printable import one_line
from moco_eval.runtime.text import as_text

FORMATS = ("text", "csv", "json", "markdown")
COLUMNS = ("run", "encoder", "protocol", "dataset", "metric", "value", "std", "low", "high", "trials", "deviations")
NUMBERS = ("value", "std", "low", "high", "trials")


def rows(folder: Path) -> list[dict[str, Any]]:
    """A row for each metric of each run, by COLUMNS; percent, and None where a run has no such spread.

    `low` and `high` bound the 95 % interval over test images, `std` is over `trials`; `deviations` are sentences, none
    of them where the number may stand beside published ones.

    Raises:
        InputError: no such folder, or a damaged run in it.
    """
    return [row for record in run_directory.read(folder) for row in _of_record(record)]


def _of_record(record: dict[str, Any]) -> list[dict[str, Any]]:
    about = {
        "run": record["run"],
        "encoder": record["encoder"]["path"],
        "protocol": record["protocol"],
        "dataset": record["dataset"]["name"],
    }
    common = {"trials": len(record["trials"]), "deviations": record["deviations"]}
    return [
        about
        | dict(zip(("metric", "value", "std"), (name, value, record["std"].get(name))))
        | dict(zip(("low", "high"), record["interval"].get(name, (None, None))))
        | common
        for name, value in record["metrics"].items()
    ]


def render(listed: Sequence[dict[str, Any]], form: str) -> str:
    """The rows in one of FORMATS; outside JSON a row's deviations are one text."""
    if form == "json":
        return json.dumps(listed, indent=2)
    cells = [[_cell(row[name], form) for name in COLUMNS] for row in listed]
    if form == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([COLUMNS, *cells])
        return out.getvalue().removesuffix("\n")
    if form == "markdown":
        rules = ["---:" if name in NUMBERS else "---" for name in COLUMNS]
        safe = [[cell.replace("|", "\\|") for cell in row] for row in cells]
        return "\n".join(f"| {' | '.join(row)} |" for row in [COLUMNS, rules, *safe])
    return as_text(_table([[*row[:-1], "no" if row[-1] else "yes"] for row in cells]))


def _cell(value: Any, form: str) -> str:
    if isinstance(value, float):
        return repr(value) if form == "csv" else f"{value:.2f}"
    if isinstance(value, list):
        return one_line("; ".join(value))
    return "" if value is None else one_line(str(value))


def _table(cells: Sequence[Sequence[str]]) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in (*COLUMNS[:-1], "as published"):
        grid.add_column(name, justify="right" if name in NUMBERS else "left", overflow="fold")
    for row in cells:
        grid.add_row(*map(escape, row))
    return grid
