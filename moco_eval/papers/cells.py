"""What every format of a comparison says, in words."""

from moco_eval.papers.match import Comparison, Line, Ours
from moco_eval.papers.tables import Table
from moco_eval.papers.todo import LEFT_OUT, Missing
from moco_eval.results.statistics import REPEATS
from moco_eval.runtime.printable import one_line

HEADINGS = ("row", "metric", "published", "ours", "difference")


def title(table: Table) -> str:
    return f"{table.id}: {table.paper}, {table.table}"


def metric(line: Line) -> str:
    return line.column.title + (f" ({line.column.unit})" if line.column.unit else "")


def published(line: Line) -> tuple[str, str]:
    """The number as printed, and its spread with what it is over, where these are printed."""
    if line.published is None:
        return "-", ""
    std = f"± {line.published_std}" if line.published_std is not None else ""
    n = f"(n={line.published_n})" if line.published_n else ""
    return f"{line.published}", f"{std} {n}".strip()


def ours(line: Line) -> tuple[str, str]:
    """Our mean; and its spread, the number of repeats, and the mark."""
    if line.ours is None:
        return "-", ""
    spread = f"± {line.ours.std:.2f}" if line.ours.std is not None else ""
    mark = f"[{line.mark}]" if line.mark else ""
    return f"{line.ours.mean:.2f}", " ".join(filter(None, (spread, f"({repeats(line.ours)})", mark)))


def repeats(ours: Ours) -> str:
    return f"n={ours.n}" if ours.n == 1 else f"n={ours.n} {REPEATS.get(ours.over, ours.over)}"


def difference(line: Line) -> tuple[str, str]:
    """In brackets where it is marked; and where it lies to the published spread, where that can be said."""
    if line.difference is None:
        return "-", ""
    return (f"({line.difference:+.2f})" if line.mark else f"{line.difference:+.2f}"), line.judgement or ""


def cells(line: Line) -> tuple[str, ...]:
    """One line, by HEADINGS."""
    numbers = (published(line), ours(line), difference(line))
    return (line.row, metric(line), *(" ".join(filter(None, parts)) for parts in numbers))


def short_ours(line: Line) -> tuple[str, str, str]:
    """Our mean; its spread and mark; and in brackets the difference, and where it lies to the published spread."""
    apart, judgement = difference(line)
    inside = ", ".join(filter(None, (apart.strip("()"), judgement)))
    return *ours(line), f"({inside})" if line.difference is not None else ""


def below(comparison: Comparison) -> list[str]:
    """The deviations of the marked runs, what the judgements mean, the paper's notes, the source."""
    table = comparison.table
    notes = [f"[{i}] not comparable: {footnote}" for i, footnote in enumerate(comparison.footnotes, 1)]
    if any(line.judgement for line in comparison.lines):
        over = REPEATS.get(str(table.over), str(table.over))
        notes.append(f"within, above, below: beside the published mean ± its standard deviation over {over}")
    notes += [f"{row.label}: {row.note}" for row in table.rows if row.note]
    return [one_line(note) for note in (*notes, f"published: {table.source}")]


def heading(missing: Missing) -> str:
    """Above the commands."""
    if missing.machine:
        return f"to produce what is missing (costs on this machine, {missing.machine}; {LEFT_OUT}):"
    figures = "costs by published figures, see docs/comparing.md; --here times this machine instead"
    return f"to produce what is missing ({figures}; {LEFT_OUT}):"


def unobtainable(missing: Missing) -> list[str]:
    """Rows and columns of which nothing of ours can be had, by their reason."""
    rows = [f"cannot be had ({reason}): {'; '.join(labels)}" for reason, labels in missing.reasons.items()]
    columns = [f"of no protocol of ours: {', '.join(missing.unmeasured)}"] if missing.unmeasured else []
    return [*rows, *columns]
