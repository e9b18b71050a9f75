"""What is seen first: when and on what the runs were, and one plot of all encoders."""

from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import Any

from markupsafe import Markup

from moco_eval.report.runs import Run
from moco_eval.report.scores import Column, measure

WIDTH, ROW, TOP, BOTTOM = 420, 26, 6, 34  # of the plot, in its own units
TICK = Markup(
    '<path d="M{0:.1f} {1}V{2}" stroke="var({4})" stroke-dasharray="{6}"/>'
    '<text x="{0:.1f}" y="{3}" text-anchor="middle" fill="var(--muted)">{5}</text>'
)
DOT = Markup(
    '<text x="{0:.1f}" y="{1:.1f}" text-anchor="end">{2}</text>'
    '<path d="M{3:.1f} {4:.1f}H{5:.1f}" stroke="var(--accent)" stroke-width="2"/>'
    '<circle cx="{6:.1f}" cy="{4:.1f}" r="4" fill="var(--accent)"/><text x="{7:.1f}" y="{1:.1f}">{8:.1f}</text>'
)


def subtitle(runs: Sequence[Run]) -> str:
    """The day of the newest run, the test sets with their sizes, and how many runs there are."""
    newest = max((run.time for run in runs), default=0.0)
    day = [datetime.fromtimestamp(newest, timezone.utc).strftime("%Y-%m-%d")] if newest else []
    data = dict.fromkeys(_data(run.record["dataset"]) for run in runs if run.record)
    return " \N{MIDDLE DOT} ".join([*day, *data, f"{len(runs)} run{'s' * (len(runs) > 1)}"])


def _data(dataset: dict[str, Any]) -> str:
    """A test set in words: 'digits (500 test images, 10 classes)'."""
    said = {"images": "test images", "classes": "classes"}
    counts = [f"{dataset[key]:,} {words}" for key, words in said.items() if dataset.get(key)]
    return dataset["name"] + (f" ({', '.join(counts)})" if counts else "")


def overview(columns: Sequence[Column], encoders: Sequence[str]) -> dict[str, Any] | None:
    """A dot and its interval over test images for each encoder, in one measure; None without a number."""
    column = max(columns, key=_preference, default=None)
    if column is None:
        return None
    title = f"{measure(column)} on {column.dataset}"
    title = title if title.startswith("kNN") else title[0].upper() + title[1:]
    shown = [name for name in encoders if name in column.scores]
    return {"title": title, "plot": _plot(column, shown, title)}


def _preference(column: Column) -> tuple:
    """Most encoders, most intervals, all labels before few; of equals the first is taken."""
    bounded = sum(score.interval is not None for score in column.scores.values())
    return len(column.scores), bounded, column.regime == "all labels"


def _plot(column: Column, shown: Sequence[str], title: str) -> Markup:
    low, high = _ends(column)
    left, bottom = 16 + 6.4 * max(len(_short(name)) for name in shown), TOP + ROW * len(shown)

    def at(value: float) -> float:
        return left + (value - low) * (WIDTH - left - 48) / (high - low)

    every = _step(low, high)
    parts = [
        TICK.format(at(value), TOP, bottom, bottom + 14, "--rule", value, "none")
        for value in range(low, high + 1, every)
    ]
    if column.chance is not None:
        parts.append(TICK.format(at(column.chance), TOP, bottom, bottom + 28, "--muted", "chance", "4 3"))
    parts += [_row(number, name, column, at, left) for number, name in enumerate(shown)]
    return Markup(
        '<svg role="img" aria-label="{}" viewBox="0 0 {} {}" font-size="12" fill="var(--ink)">{}</svg>'
    ).format(title, WIDTH, bottom + BOTTOM, Markup("").join(parts))


def _ends(column: Column) -> tuple[int, int]:
    """Round numbers around all that is drawn."""
    bounds = [end for score in column.scores.values() for end in (score.interval or (score.value, score.value))]
    drawn = [*bounds, *([] if column.chance is None else [column.chance])]
    every = _step(min(drawn), max(drawn))
    low = max(0, every * int(min(drawn) // every))
    return low, min(100, max(low + every, every * int(-(-max(drawn) // every))))


def _step(low: float, high: float) -> int:
    """Between ticks."""
    return 10 if high - low <= 50 else 20


def _row(number: int, name: str, column: Column, at: Callable[[float], float], left: float) -> Markup:
    score, y = column.scores[name], TOP + ROW * (number + 0.5)
    low, high = score.interval or (score.value, score.value)
    return DOT.format(
        left - 8, y + 4, _short(name), at(low), y, at(high), at(score.value), at(high) + 8, score.value
    )  # fmt: skip


def _short(name: str) -> str:
    return name if len(name) <= 26 else name[:25] + "…"
