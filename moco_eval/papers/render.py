"""A comparison as text, Markdown or CSV."""

import csv
import io
from collections.abc import Callable
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table as RichTable

from moco_eval import config
from moco_eval.errors import InputError
from moco_eval.papers.beside import Comparison, Line, Ours
from moco_eval.statistics import REPEATS
from moco_eval.text import as_text

HEADINGS = ("row", "metric", "published", "ours", "difference")
CSV_COLUMNS = (
    *("row", "metric", "protocol", "dataset", "published", "published_std"),
    *("ours", "ours_std", "n", "over", "difference", "comparable", "deviations"),
)


def render(comparison: Comparison, form: str) -> str:
    """The comparison as text, markdown or csv, ending without a newline."""
    forms: dict[str, Callable[[Comparison], str]] = {"text": _text, "markdown": _markdown, "csv": _csv}
    if form not in forms:
        raise InputError(f"no format {form!r}.{config.did_you_mean(form, forms)}")
    return forms[form](comparison).rstrip("\n")


def _cells(line: Line) -> tuple[str, str, str, str, str]:
    metric = line.column.title + (f" ({line.column.unit})" if line.column.unit else "")
    return line.row, metric, _published(line), _ours_words(line), _difference(line)


def _published(line: Line) -> str:
    if line.published is None:
        return "-"
    return f"{line.published}" + (f" ± {line.published_std}" if line.published_std is not None else "")


def _ours_words(line: Line) -> str:
    if line.ours is None:
        return "-"
    ours = line.ours
    spread = f" ± {ours.std:.2f}" if ours.std is not None else ""
    repeats = f"n={ours.n}" if ours.n == 1 else f"n={ours.n} {REPEATS.get(ours.over, ours.over)}"
    mark = f" [{line.mark}]" if line.mark else ""
    return f"{ours.mean:.2f}{spread} ({repeats}){mark}"


def _difference(line: Line) -> str:
    if line.difference is None:
        return "-"
    return f"({line.difference:+.2f})" if line.mark else f"{line.difference:+.2f}"


def _below(comparison: Comparison) -> list[str]:
    marks = [f"[{i}] not comparable: {words}" for i, words in enumerate(comparison.footnotes, 1)]
    notes = [f"{row.label}: {row.note}" for row in comparison.table.rows if row.note]
    return [*marks, *notes]


def _text(comparison: Comparison) -> str:
    table = comparison.table
    grid = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in HEADINGS:
        grid.add_column(heading, justify="left" if heading in HEADINGS[:2] else "right")
    before = ""
    for line in comparison.lines:
        label, *others = (escape(cell) for cell in _cells(line))
        grid.add_row("" if label == before else label, *others)
        before = label
    above = (f"{table.id}: {table.paper}, {table.table}", table.caption)
    return as_text(*above, grid, *_below(comparison), f"published: {table.source}")


def _markdown(comparison: Comparison) -> str:
    table = comparison.table
    rows = [HEADINGS, ("---", "---", "---:", "---:", "---:"), *map(_cells, comparison.lines)]
    grid = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    below = [f"- {words}" for words in (*_below(comparison), f"published: {table.source}")]
    return "\n".join([f"**{table.id}: {table.paper}, {table.table}.** {table.caption}", "", *grid, "", *below])


def _csv(comparison: Comparison) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for line in comparison.lines:
        ours = line.ours
        writer.writerow(
            {
                "row": line.row,
                "metric": line.column.title,
                "protocol": line.column.protocol,
                "dataset": line.column.dataset,
                "published": line.published,
                "published_std": line.published_std,
                "difference": line.difference,
            }
            | (_csv_ours(ours) if ours else {})
        )
    return out.getvalue()


def _csv_ours(ours: Ours) -> dict[str, Any]:
    return {
        "ours": ours.mean,
        "ours_std": ours.std,
        "n": ours.n,
        "over": ours.over,
        "comparable": "no" if ours.deviations else "yes",
        "deviations": "; ".join(ours.deviations),
    }
