"""Scores of the classes as bars, and losses of a fine-tuning as curves; as files, and as figures for the report."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moco_eval.runtime import files

Scores = dict[str, float | None]  # of one class, by metric

ROWS = 30  # bars that one column takes; more are shared by two
MOST = 200  # bars that are drawn
ROW, WIDTH = 0.19, 4.6  # inches of a bar and of a column
SHADES = ("#1d1f23", "#1f5fae", "#686d76")  # words, data, lines; the report puts its own in their place
PARTS = {
    "loss_cls": ("class", "#d9822b"),
    "loss_box_reg": ("box", "#2a9d6f"),
    "loss_mask": ("mask", "#8b6fc0"),
    "loss_keypoint": ("keypoints", "#b08d2e"),
    "loss_rpn_cls": ("RPN object", "#c25563"),
    "loss_rpn_loc": ("RPN box", "#3d9db3"),
}  # words and colours of the losses, by detectron2's names; the colours stand on light and on dark
POINTS = 400  # of a drawn curve


def per_class_bars(per_class: dict[str, Scores], metric: str, path: Path) -> None:
    """Draw the bars of `bars_figure` into a file, SVG or PNG by its suffix."""
    _save(bars_figure(per_class, metric), path)


def loss_curves(metrics: Sequence[Path], path: Path) -> None:
    """Draw the losses of one or more metrics.jsonl (trials) into a file; see `loss_figure`. Nothing without a line."""
    trials = [lines for path in metrics if (lines := files.read_lines(path, "iteration"))]
    if trials:
        _save(loss_figure(trials), path)


def _save(figure: Figure, path: Path) -> None:
    with files.atomic(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150)


# Bars


def bars_figure(
    per_class: dict[str, Scores],
    metric: str,
    shades: tuple[str, str, str] = SHADES,
    order: Sequence[str] | None = None,
) -> Figure:
    """Horizontal bars, best class first, in two columns where they are many; a line at the mean.

    Classes without a value, which have no object in the test split, come last and say so. Of more than MOST classes
    those with a value are drawn: the best in the first column, the worst in the second.

    Args:
        per_class: percent of each class by metric.
        metric: which to draw, such as AP50.
        shades: colours of words, bars and lines.
        order: of the classes, where it is not to be by their own values.
    """
    values = {name: scores.get(metric) for name, scores in per_class.items()}
    order = list(order or best_first(per_class, metric))
    known = [value for value in values.values() if value is not None]
    drawn = ""
    if len(order) > MOST:
        order = order[: len(known)]
        drawn = f"; {MOST} of {len(known):,} classes" if len(known) > MOST else ""
        order = order[: MOST // 2] + order[-(MOST // 2) :] if drawn else order
    columns = 1 if len(order) <= ROWS else 2
    rows = -(-len(order) // columns)
    figure = Figure(figsize=(WIDTH * columns, 0.55 + ROW * max(rows, 3)), layout="constrained")
    for number, axes in enumerate(figure.subplots(1, columns, squeeze=False)[0]):
        part = order[number * rows : (number + 1) * rows]
        _bars(axes, part, [values[name] for name in part], rows, shades)
        if known:
            mean = float(np.mean(known))
            axes.axvline(mean, color=shades[2], linewidth=0.9, linestyle=(0, (5, 3)), zorder=0)
            axes.set_xlabel(f"{metric} (%), mean {mean:.1f}{drawn}", color=shades[0], fontsize=9)
    return figure


def best_first(per_class: dict[str, Scores], metric: str) -> list[str]:
    """The classes, the best first and those without a value last."""
    values = {name: scores.get(metric) for name, scores in per_class.items()}
    return sorted(values, key=lambda name: (values[name] is None, -(values[name] or 0.0)))


def _bars(
    axes: Axes, names: Sequence[str], values: Sequence[float | None], rows: int, shades: tuple[str, str, str]
) -> None:
    text, fill, muted = shades
    places = list(range(len(names)))
    axes.barh(places, [value or 0.0 for value in values], height=0.72, color=fill)
    for place, value in zip(places, values):
        note = "no object" if value is None else f"{value:.1f}"
        axes.text((value or 0.0) + 1, place, note, va="center", fontsize=7, color=muted if value is None else text)
    axes.set(xlim=(0, 108), ylim=(rows - 0.4, -0.6), xticks=range(0, 101, 20))
    axes.set_yticks(places, [_short(name) for name in names])
    _plain(axes, shades)
    axes.tick_params(axis="y", length=0)


def _short(name: str) -> str:
    name = name if len(name) <= 24 else f"{name[:23]}…"
    return name.replace("$", r"\$")  # a pair of them would be set as a formula


# Curves


def loss_figure(trials: Sequence[list[dict[str, Any]]], shades: tuple[str, str, str] = SHADES) -> Figure:
    """The total loss and its parts against iterations, smoothed; a dotted line where the learning rate falls.

    The total is also drawn as it was logged, faint; of trials after the first only the smoothed total is drawn.

    Args:
        trials: lines of metrics.jsonl: iteration, lr, loss (or total_loss) and its parts.
        shades: colours of words, the total and lines.
    """
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    axes = figure.add_subplot()
    for lines in trials[1:]:
        _curve(axes, lines, "loss", color=shades[1], linewidth=0.8, alpha=0.45)
    _curve(axes, trials[0], "loss", smooth=False, color=shades[1], linewidth=0.6, alpha=0.25)
    _curve(axes, trials[0], "loss", color=shades[1], linewidth=1.6, label="total")
    for name, (label, colour) in PARTS.items():
        _curve(axes, trials[0], name, color=colour, linewidth=1.1, label=label)
    _mark_drops(axes, trials[0], shades[2])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("iteration", color=shades[0], fontsize=9)
    axes.set_ylabel("loss", color=shades[0], fontsize=9)
    axes.set_ylim(bottom=0)
    _plain(axes, shades)
    shown = len(axes.get_legend_handles_labels()[0])
    figure.legend(
        loc="outside upper center", ncols=shown if shown <= 5 else 4, frameon=False, fontsize=8, labelcolor=shades[0],
        handlelength=1.2, columnspacing=1.2,
    )  # fmt: skip
    return figure


def _curve(axes: Axes, lines: Sequence[dict[str, Any]], name: str, smooth: bool = True, **look: Any) -> None:
    """One loss, where the lines have it, at no more than about POINTS places."""
    values = [(line["iteration"], value) for line in lines if (value := _value(line, name)) is not None]
    if not values:
        return
    iterations, losses = np.array(values, dtype=np.float64).T
    if smooth:
        losses = moving_mean(losses, width=1 + 2 * (len(losses) // 50))
    every = -(-len(losses) // POINTS)
    kept = np.unique([*range(0, len(losses), every), len(losses) - 1])
    axes.plot(iterations[kept], losses[kept], **look)


def _value(line: dict[str, Any], name: str) -> float | None:
    return line.get("loss", line.get("total_loss")) if name == "loss" else line.get(name)


def moving_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean over `width` neighbours (odd), at the ends over those that there are; (N,) -> (N,)."""
    sums, places = np.concatenate(([0.0], np.cumsum(values))), np.arange(len(values))
    first, last = np.maximum(places - width // 2, 0), np.minimum(places + width // 2 + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _mark_drops(axes: Axes, lines: Sequence[dict[str, Any]], colour: str) -> None:
    rates = [(line["iteration"], line["lr"]) for line in lines if line.get("lr")]
    for (_, before), (iteration, lr) in pairwise(rates):
        if lr < 0.9 * before:
            axes.axvline(iteration, color=colour, linewidth=0.9, linestyle=(0, (1, 2)))
            axes.annotate(
                f"lr {lr:g}", (iteration, 0.98), xycoords=("data", "axes fraction"), xytext=(-2, 0), rotation=90,
                textcoords="offset points", ha="right", va="top", color=colour, fontsize=7,
            )  # fmt: skip


def _plain(axes: Axes, shades: tuple[str, str, str]) -> None:
    axes.tick_params(colors=shades[0], labelsize=8, length=3, width=0.6)
    for side, spine in axes.spines.items():
        spine.set(color=shades[2], linewidth=0.6, visible=side in ("left", "bottom"))
