"""A comparison as text, Markdown or CSV; latex.py and html.py have the other formats."""

import csv
import io
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table as RichTable

from moco_eval.config import load as configs
from moco_eval.errors import InputError
from moco_eval.papers import cells
from moco_eval.papers.gpu_hours import GpuHours
from moco_eval.papers.html import page
from moco_eval.papers.latex import latex
from moco_eval.papers.match import Comparison, Line, Ours
from moco_eval.papers.todo import Missing, script
from moco_eval.runtime.printable import printable
from moco_eval.runtime.text import as_text

FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # what a spreadsheet takes for the start of one
CSV_COLUMNS = (
    *("row", "metric", "protocol", "dataset", "published", "published_std", "published_n"),
    *("ours", "ours_std", "n", "over", "difference", "judgement", "comparable", "deviations"),
    *("status", "commands", "hours", "gpu_hours"),
)


def render(comparison: Comparison, form: str, missing: Missing | None = None) -> str:
    """The comparison, and what is missing, as text, markdown, csv, latex or html, ending without a newline."""
    forms: dict[str, Callable[[Comparison, Missing], str]] = {
        "text": _text,
        "markdown": _markdown,
        "csv": _csv,
        "latex": latex,
        "html": page,
    }
    if form not in forms:
        raise InputError(f"no format {form!r}.{configs.did_you_mean(form, forms)}")
    return forms[form](comparison, missing or Missing()).rstrip("\n")


def _text(comparison: Comparison, missing: Missing) -> str:
    table = comparison.table
    parts = [as_text(cells.title(table), table.caption, _grid(comparison), *cells.below(comparison))]
    if missing.steps:  # not through rich, which would break commands at the terminal's width
        parts += [cells.heading(missing), script(missing), missing.total]
    parts.append("\n".join(cells.unobtainable(missing)))
    return "\n\n".join(filter(None, parts))


def _grid(comparison: Comparison) -> RichTable:
    """As the paper has it: a row for each model, a column for each metric; ours below the published numbers."""
    grid = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = {line.column.title: cells.metric(line) for line in comparison.lines}
    grid.add_column("row", overflow="fold")
    for title in columns.values():
        grid.add_column(escape(title), justify="right", overflow="fold")
    for label, some in groupby(comparison.lines, key=lambda line: line.row):
        row: dict[str, list[Line]] = {title: [] for title in columns}
        for line in some:
            row[line.column.title].append(line)
        grid.add_row(escape(label), *(_said(lines[:1], cells.published) for lines in row.values()))
        of_ours = {title: [line for line in lines if line.ours] for title, lines in row.items()}
        for number in range(max(map(len, of_ours.values()))):  # those that left their protocol on lines of their own
            found = (lines[number : number + 1] for lines in of_ours.values())
            grid.add_row("  ours", *(_said(lines, cells.short_ours) for lines in found))
    return grid


def _said(lines: Sequence[Line], words: Callable[[Line], tuple[str, ...]]) -> str:
    """A cell: what the words say of a line, where there is one."""
    return escape(" ".join(filter(None, (part for line in lines for part in words(line)))))


def _markdown(comparison: Comparison, missing: Missing) -> str:
    table = comparison.table
    rows: list[tuple[str, ...]] = [cells.HEADINGS, ("---", "---", "---:", "---:", "---:")]
    rows += [tuple(map(_plain, cells.cells(line))) for line in comparison.lines]
    grid = ["| " + " | ".join(row) + " |" for row in rows]
    below = [_item(note) for note in (*cells.below(comparison), *cells.unobtainable(missing))]
    lines = [f"**{_plain(cells.title(table))}.** {_plain(table.caption)}", "", *grid, "", *below]
    if missing.steps:
        fence = _fence(script(missing))
        lines += ["", _plain(cells.heading(missing)), "", f"{fence}sh", script(missing), fence, "", missing.total]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text on one line that Markdown shows as it is: no column's edge, HTML, link, picture, code or emphasis."""
    special = r"[\\`*<|~&#]|\[(?!\d+\](?![(\[:]))|(?<![^\W_])_|_(?![^\W_])"  # a mark such as [1] is no link
    return re.sub(special, r"\\\g<0>", " ".join(text.split()))


def _item(text: str) -> str:
    """The same as an item of a list, which begins no list or heading of its own."""
    return "- " + re.sub(r"^(?=[-+=])|(?<=^\d)(?=[.)]\s)|(?<=^\d\d)(?=[.)]\s)", r"\\", _plain(text))


def _fence(code: str) -> str:
    """Longer than any row of backticks in the code that it encloses."""
    return "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))


def _inert(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: text that begins like one gets a ' before it; numbers stay."""
    if not isinstance(value, str):
        return value
    mark = "'" if value.startswith(FORMULA) and not _is_number(value) else ""
    return mark + printable(value)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text) is not None


def _csv(comparison: Comparison, missing: Missing) -> str:
    names = {column.title: name for name, column in comparison.table.columns.items()}
    reasons = {label: reason for reason, labels in missing.reasons.items() for label in labels}
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for line in comparison.lines:
        values = {
            "row": line.row,
            "metric": line.column.title,
            "protocol": line.column.protocol,
            "dataset": line.column.dataset,
            "published": line.published,
            "published_std": line.published_std,
            "published_n": line.published_n,
            "difference": line.difference,
            "judgement": line.judgement,
            "status": _status(line, reasons),
        }
        values |= (_csv_ours(line.ours) if line.ours else {}) | _csv_steps(line, names, missing)
        writer.writerow({name: _inert(value) for name, value in values.items()})
    return out.getvalue()


def _status(line: Line, reasons: dict[str, str]) -> str:
    if line.ours:
        return "not comparable" if line.mark else "there"
    return reasons.get(line.row) or ("missing" if line.column.protocol else "not measured")


def _csv_ours(ours: Ours) -> dict[str, Any]:
    return {
        "ours": ours.mean,
        "ours_std": ours.std,
        "n": ours.n,
        "over": ours.over,
        "comparable": "no" if ours.deviations else "yes",
        "deviations": "; ".join(ours.deviations),
    }


def _csv_steps(line: Line, names: dict[str, str], missing: Missing) -> dict[str, Any]:
    """The commands of one cell, to be run one after the other, and their hours if all are known."""
    steps = missing.of(line.row, names[line.column.title])
    if not steps:
        return {}
    known = [cost for _, cost in steps if cost]
    of_gpu = [cost.hours for cost in known if isinstance(cost, GpuHours)]
    here = [cost.seconds / 3600 for cost in known if not isinstance(cost, GpuHours)]
    hours, column = (of_gpu, "gpu_hours") if of_gpu else (here, "hours")
    total = round(sum(hours), 3) if len(hours) == len(steps) else None
    return {"commands": " && ".join(step.command for step, _ in steps), column: total}
