"""Two encoders on the same test images, class by class."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from moco_eval.report.confusion import class_names
from moco_eval.report.pick import by_encoder, by_test_set, description, has_answers, preference, terms
from moco_eval.report.runs import Run
from moco_eval.results import compare
from moco_eval.results.statistics import RESAMPLES, Answers, percentiles, resampled_means

PAIRS = 4  # at most, for each test set
FEWEST = 10  # images of a class whose interval says something
CLASSES = 40  # at most in a drawing, half from each end
WIDTH, ROW, GAP = 360, 15, 14  # of a drawing, in its own units


def paired(
    runs: Sequence[Run], names: dict[str, str], order: Sequence[str], kinds: dict[str, str]
) -> list[dict[str, Any]]:
    """Each trained encoder against the encoders of other kinds, then against the other trained ones, by class.

    Args:
        kinds: of each encoder name; 'trained' for those that carry their pretraining.
    Raises:
        InputError: the answers of a run are damaged.
    """
    comparisons = []
    for data, tested in by_test_set(runs):
        answered = [run for run in tested if has_answers(run)]
        both = [(*two, *same) for two in pairs(order, kinds) if (same := _common(answered, names, *two))]
        shown = [_comparison(data, *pair) for pair in both[:PAIRS]]
        for last in shown[-1:]:
            last["not_shown"] = len(both) - len(shown)
        comparisons += shown
    return comparisons


def pairs(order: Sequence[str], kinds: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(encoder, its rival): other kinds first, then the trained ones among themselves."""
    trained = [name for name in order if kinds[name] == "trained"]
    yield from ((name, rival) for name in trained for rival in order if kinds[rival] != "trained")
    yield from ((name, rival) for number, name in enumerate(trained) for rival in trained[number + 1 :])


def _common(runs: Sequence[Run], names: dict[str, str], *two: str) -> tuple[Run, Run] | None:
    """The newest runs of two encoders by one protocol on the same labels: the one that is shown first of those."""
    preferences = {terms(run): preference(run) for run in runs}
    for kind in sorted(preferences, key=lambda kind: preferences[kind], reverse=True):
        same = by_encoder([run for run in runs if terms(run) == kind], names, two, lambda run: 0)
        if len(same) == 2:
            return same[two[0]], same[two[1]]
    return None


def _comparison(data: str, name: str, rival: str, run: Run, rival_run: Run) -> dict[str, Any]:
    done = compare.compare(rival_run.path, run.path)
    assert isinstance(done.a.answers, Answers) and isinstance(done.b.answers, Answers)
    labels = done.a.answers.labels
    difference = done.b.answers.right() - done.a.answers.right()
    rows = by_class(difference, labels, class_names(run, int(labels.max()) + 1))
    low, high = done.over_images.interval
    return {
        "name": name,
        "rival": rival,
        "data": data,
        "description": description(run),
        "metric": done.metric,
        "images": len(labels),
        "difference": f"{done.difference:+.1f}",
        "verdict": done.verdict,
        "interval": f"[{low:+.1f}, {high:+.1f}]",
        "p": compare.p_words(done.over_images.p),
        "classes": len(rows),
        "drawn": min(len(rows), CLASSES),
        "not_shown": 0,
        "plot": plot(
            extremes(rows),
            f"Difference of accuracy of each class, {name} less {rival}",
        ),
    }


def by_class(
    difference: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> list[tuple[str, float, float, float, bool]]:
    """(class, difference of accuracy in points, low, high, coloured), the largest difference first.

    The 95 % interval is a paired bootstrap's over the test images of that class alone. A class is coloured where that
    leaves 0 out and rests on ten images at least: with fewer it has hardly a width.

    Args:
        difference: how much more often each image was classified rightly, -1 to 1, (N,).
    """
    rows = []
    for index in np.unique(labels):
        own = 100 * difference[labels == index]
        low, high = percentiles(resampled_means(own, np.zeros(len(own), dtype=int), RESAMPLES))
        rows.append((classes[index], float(own.mean()), low, high, len(own) >= FEWEST and not low <= 0 <= high))
    return sorted(rows, key=lambda row: -row[1])


def extremes(rows: Sequence[tuple]) -> list[tuple]:
    """All rows where they can be drawn, else half of as many from each end.

    The ends of many classes are not coloured: chance alone puts classes there whose interval leaves 0 out.
    """
    if len(rows) <= CLASSES:
        return list(rows)
    return [(*row[:4], False) for row in (*rows[: CLASSES // 2], *rows[-CLASSES // 2 :])]


# Drawing


def plot(rows: Sequence[tuple[str, float, float, float, bool]], title: str) -> Markup:
    """A line for each class: the difference as a dot, its interval as a line."""
    left = 14 + 6 * max(len(_short(row[0])) for row in rows)
    low, high = (end(sign, *(bound for row in rows for bound in row[1:4])) for end, sign in ((min, -1.0), (max, 1.0)))
    scale = (WIDTH - GAP - left) / (high - low)
    zero = left - low * scale
    lines = [_row(number, row, left, zero, scale) for number, row in enumerate(rows)]
    bottom = len(rows) * ROW + 4
    ticks = [_tick(at, zero + at * scale, bottom) for at in ticks_within(low, high)]
    return Markup(
        '<svg role="img" aria-label="{}" viewBox="0 0 {} {}" font-size="10" fill="var(--ink)">'
        '<g stroke="var(--rule)" fill="var(--muted)">{}</g>{}</svg>'
    ).format(title, WIDTH, bottom + 18, Markup("").join(ticks), Markup("").join(lines))


def ticks_within(low: float, high: float) -> list[float]:
    """Round numbers from low to high, 0 among them, nine at most; low is at most -1 and high at least 1."""
    step = next(step for step in (0.5, 1, 2, 5, 10, 20, 25, 50) if (high - low) / step < 9)
    return [step * number for number in range(-int(-low / step), int(high / step) + 1)]


def _tick(at: float, x: float, bottom: float) -> Markup:
    return Markup(
        '<path d="M{:.1f} 0V{:g}"{}/><text x="{:.1f}" y="{:g}" text-anchor="middle" stroke="none">{}</text>'
    ).format(
        x,
        bottom,
        Markup(' stroke="var(--muted)"') if at == 0 else "",
        x,
        bottom + 13,
        f"{at:+g}" if at else "0",
    )


def _row(number: int, row: tuple[str, float, float, float, bool], left: float, zero: float, scale: float) -> Markup:
    name, value, low, high, coloured = row
    y, colour = number * ROW + ROW / 2 + 2, "var(--accent)" if coloured else "var(--muted)"
    return Markup(
        '<g><title>{}: {:+.1f} points, [{:+.1f}, {:+.1f}]</title>'
        '<text x="{:g}" y="{:g}" text-anchor="end">{}</text>'
        '<path d="M{:.1f} {:g}H{:.1f}" stroke="{}" stroke-width="1.5"/>'
        '<circle cx="{:.1f}" cy="{:g}" r="3.2" fill="{}"/></g>'
    ).format(
        name, value, low, high, left - 8, y + 3.5, _short(name),
        zero + low * scale, y, zero + high * scale, colour, zero + value * scale, y, colour,
    )  # fmt: skip


def _short(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "…"
