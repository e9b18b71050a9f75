"""Figures as SVG in the colours of the page, and the curves of a pretraining."""

import hashlib
import io
import re
import warnings
from itertools import pairwise
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moco_eval.report.published import in_steps, published
from moco_eval.report.runs import Run, trained_by

TEXT, ACCENT, MUTED = "#010203", "#040506", "#070809"  # stand for the page's colours, light or dark
COLOURS = {TEXT: "currentColor", ACCENT: "var(--accent)", MUTED: "var(--muted)"}


def curves(run: Run) -> dict[str, Any]:
    chance = next((line for line in run.metrics if "chance" in line), {})
    steps = [line for line in run.metrics if "loss" in line]
    epochs = [line for line in run.metrics if "knn_top1" in line]
    begins = chance.get("queue_full_step") or 0  # a line is the mean since the one before it
    full = [line for before, line in pairwise([{"step": 0}, *steps]) if before["step"] >= begins]
    steps = full if len(full) > 1 else steps
    log = published(run)
    log_losses = in_steps(log, steps) if log else []
    log_top1 = [(float(point.epoch), point.knn_top1) for point in log.points] if log else []
    return {
        "name": run.name,
        "title": trained_by(run),
        "loss": _loss_curve(steps, chance.get("chance"), chance.get("queue_full_step"), log_losses),
        "first": steps[0]["loss"],
        "last": steps[-1]["loss"],
        "chance": chance.get("chance"),
        "queue_full": chance.get("queue_full_step") if len(full) > 1 else None,
        "knn": _knn_curve(epochs, log_top1) if epochs else None,
        "knn_last": epochs[-1] if epochs else None,
        "published": log,
    }


def _loss_curve(
    lines: list[dict[str, Any]], chance: float | None, queue_full: int | None, log: list[tuple[float, float]]
) -> Markup:
    figure, axes = axes_of("step", "loss (nats)")
    log = [(step, loss) for step, loss in log if step >= lines[0]["step"]]
    _draw_published(axes, log)
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], color=ACCENT, linewidth=1.4)
    if chance is not None:
        axes.axhline(chance, color=MUTED, linewidth=0.9, linestyle=(0, (5, 3)))
        axes.annotate(
            f"chance {chance:.2f}", (0.99, chance), xycoords=("axes fraction", "data"), xytext=(0, 3),
            textcoords="offset points", ha="right", color=MUTED, fontsize=8,
        )  # fmt: skip
    if queue_full is not None and lines[0]["step"] < queue_full <= lines[-1]["step"]:
        axes.axvline(queue_full, color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)))
        axes.annotate(
            "queue full", (queue_full, 0.03), xycoords=("data", "axes fraction"), xytext=(4, 0),
            textcoords="offset points", color=MUTED, fontsize=8,
        )  # fmt: skip
    axes.margins(y=0.12)
    return svg(figure, "Training loss against step")


def _knn_curve(lines: list[dict[str, Any]], log: list[tuple[float, float]]) -> Markup:
    figure, axes = axes_of("epoch", "kNN top-1 (%)")
    _draw_published(axes, log)
    epochs, top1 = [line["epoch"] for line in lines], [line["knn_top1"] for line in lines]
    axes.plot(epochs, top1, color=ACCENT, linewidth=1.4, marker="o", markersize=2.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(epochs) == 1:
        axes.set_xlim(0, 2 * epochs[0])
    axes.margins(y=0.12)
    return svg(figure, "kNN accuracy against epoch")


def _draw_published(axes: Any, log: list[tuple[float, float]]) -> None:
    """Published points, muted, behind our curve."""
    if not log:
        return
    axes.plot(*zip(*log), color=MUTED, linewidth=1, linestyle=(0, (4, 2)), marker="o", markersize=2)
    axes.annotate("published", log[-1], xytext=(0, 5), textcoords="offset points", ha="right", color=MUTED, fontsize=8)


def axes_of(x: str, y: str):
    figure = Figure(figsize=(4.6, 2.9), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x, color=TEXT, fontsize=9)
    axes.set_ylabel(y, color=TEXT, fontsize=9)
    axes.tick_params(colors=TEXT, labelsize=8, length=3, width=0.6)
    for side, spine in axes.spines.items():
        spine.set(color=MUTED, linewidth=0.6, visible=side in ("left", "bottom"))
    return figure, axes


def svg(figure: Figure, label: str) -> Markup:
    """The figure as inline SVG in the page's own colours and font, without a word about any address.

    Its names are its own and it brings no style, which would hold for the whole page.
    """
    out = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # in its own font: the page's has them
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for colour, name in COLOURS.items():
        text = text.replace(colour, name)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    own = f"f{hashlib.sha256(text.encode()).hexdigest()[:8]}-"
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{own}", text)
    start = rf'<svg class="plot" role="img" aria-label="{label}" \1>'
    return Markup(re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', start, text, count=1))
