"""The result table of a report as text, for a terminal."""

from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from moco_eval.report.runs import KINDS, encoder_names, kind_of, read_runs, sha_of
from moco_eval.report.scores import Column, cautions, result_columns, summary
from moco_eval.runtime.text import as_text


def table(folders: list[Path]) -> str:
    """A row for each encoder, a column for each measure, chance below, and what the page says in words.

    Raises:
        InputError: a path holds no finished run, or a file of a run is damaged.
    """
    runs = read_runs(folders)
    names = encoder_names(runs)
    kinds = {names[sha_of(run)]: kind_of(run.record["encoder"]) for run in runs if run.record}
    order = sorted(kinds, key=lambda name: (KINDS.index(kinds[name]), name))
    columns = result_columns(runs, names)
    if not columns:
        return "no evaluation is among these runs yet"
    words = [*summary(columns, order, kinds)[1:], *cautions(runs, names)]
    return as_text(_grid(columns, order), *map(escape, words))


def _grid(columns: list[Column], encoders: list[str]) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("encoder", overflow="fold")
    for column in columns:
        few = "" if column.regime == "all labels" else f", {column.regime}"
        grid.add_column(escape(f"{column.task} {column.metric} on {column.dataset}{few}"), justify="right")
    for name in encoders:
        grid.add_row(escape(name), *(_cell(column, name) for column in columns))
    if any(column.chance is not None for column in columns):
        grid.add_row("chance", *("-" if column.chance is None else f"{column.chance:.1f}" for column in columns))
    return grid


def _cell(column: Column, name: str) -> str:
    if name not in column.scores:
        return "-"
    score = column.scores[name]
    bounds = f" [{score.interval[0]:.1f}, {score.interval[1]:.1f}]" if score.interval else ""
    return escape(score.text + bounds)
