"""The curves of `moco-eval watch`: how each checkpoint of a training was judged, with intervals over test images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from moco_eval.errors import InputError
from moco_eval.report.figures import ACCENT, axes_of, svg
from moco_eval.report.runs import Run
from moco_eval.results import run_files, schema
from moco_eval.runtime import files

CURVE, MEMORY = "curve.jsonl", "checkpoints.json"  # what a watch leaves


def watched(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """A group for each watch in these folders, with a figure for each protocol.

    Raises:
        InputError: a curve is damaged.
    """
    found = {place.resolve(): place for path in paths for place in files.folders_with(path, CURVE)}
    folders = [place for place in found.values() if run_files.is_there(place / MEMORY)]
    return [group for folder in folders if (group := _group(folder))]


def last_alone(runs: Sequence[Run], watches: Sequence[dict[str, Any]]) -> list[Run]:
    """The runs without those of a watch's earlier checkpoints, which its curve shows."""
    return [run for run in runs if not any(_is_earlier(run, watch) for watch in watches)]


def _is_earlier(run: Run, watch: dict[str, Any]) -> bool:
    if run.record is None or not run.path.resolve().is_relative_to(watch["folder"]):
        return False
    return run.record["encoder"]["sha256"] != watch["last"]


def _group(folder: Path) -> dict[str, Any] | None:
    lines = run_files.read_metrics(folder / CURVE, schema.JudgedCheckpoint)
    if not lines:
        return None
    units = {unit for line in lines for unit in schema.UNITS if unit in line}
    if len(units) > 1:
        counted = " and ".join(sorted(units))
        raise InputError(f"{folder / CURVE} is damaged: it counts by {counted}; {schema.WAY_OUT}")
    (unit,) = units
    of_protocol: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        of_protocol.setdefault(line["protocol"], []).append(line)
    folder = folder.resolve()
    return {
        "name": folder.parent.name if folder.name == "watch" else folder.name,
        "folder": folder,
        "last": max(lines, key=lambda line: line[unit])["sha256"],
        "checkpoints": len({line["sha256"] for line in lines}),
        "curves": [_curve(protocol, own, unit) for protocol, own in of_protocol.items()],
    }


def _curve(protocol: str, lines: list[dict[str, Any]], unit: str) -> dict[str, Any]:
    """The first metric of a protocol over its checkpoints."""
    metric = next(iter(lines[0]["metrics"]))
    lines = sorted((line for line in lines if metric in line["metrics"]), key=lambda line: line[unit])
    points = [(line[unit], line["metrics"][metric], line["interval"].get(metric)) for line in lines]
    figure, axes = axes_of(unit, f"{metric[:40]} (%)".replace("$", r"\$"))
    for at, _, bounds in points:
        if bounds:
            axes.vlines(at, *bounds, color=ACCENT, linewidth=0.9, alpha=0.55)
    places, values, _ = zip(*points)
    axes.plot(places, values, color=ACCENT, linewidth=1.4, marker="o", markersize=2.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(y=0.12)
    x, value, bounds = points[-1]
    interval = " [{:.1f}, {:.1f}]".format(*bounds) if bounds else ""
    return {
        "protocol": protocol,
        "plot": svg(figure, "Judged checkpoints"),
        "last": f"{metric} {value:.1f}{interval} at {unit} {x}",
    }
