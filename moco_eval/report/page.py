"""The page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moco_eval.papers import cells
from moco_eval.report import template
from moco_eval.report.confusion import confusion
from moco_eval.report.figures import curves
from moco_eval.report.health import health
from moco_eval.report.maps import maps
from moco_eval.report.overview import overview, subtitle
from moco_eval.report.paired import paired
from moco_eval.report.papers import papers
from moco_eval.report.pictures import detections, has, image, neighbours
from moco_eval.report.provenance import deviations_by_protocol, provenance
from moco_eval.report.runs import KINDS, Run, encoder_names, kind_of, read_runs, sha_of
from moco_eval.report.scores import cautions, result_columns, summary
from moco_eval.report.watched import last_alone, watched
from moco_eval.results.sanity import is_small
from moco_eval.runtime import files
from moco_eval.runtime.console import warn

PAGE_BYTES = 3_000_000
SECTIONS = (  # anchor, title, and what must be there
    ("results", "results", "columns"),
    ("papers", "beside the papers", "columns"),
    ("training", "training", "curves"),
    ("watched", "checkpoints", "watched"),
    ("views", "views", "views"),
    ("neighbours", "neighbours", "neighbours"),
    ("maps", "maps", "maps"),
    ("health", "health", "health"),
    ("confusion", "confusion", "confusion"),
    ("paired", "class by class", "paired"),
    ("detections", "detections", "detections"),
    ("deviations", "deviations", "evaluated"),
    ("provenance", "provenance", "provenance"),
)


def write_report(runs: list[Path], output: Path, title: str = "moco-eval report") -> None:
    """Write the page about these runs.

    Args:
        runs: run directories, or folders that contain some.
        output: the HTML file; it needs no other.
    Raises:
        InputError: a path holds no finished run, a file of a run is damaged, the output cannot be written.
    """
    place = template.place_of(output, "--output", "report.html")
    watches = watched(runs)
    page = template.render("page.html", title=title, **_contents(last_alone(read_runs(runs), watches), watches))
    if len(page) > PAGE_BYTES:
        warn(f"{output} has {len(page) / 1e6:.1f} MB; report on fewer runs for a lighter page")
    files.write_text(place, page.decode("utf-8"))


def _sections(contents: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """Anchor, title, and whether there is anything: the table of contents."""
    return [(name, title, bool(contents[shown])) for name, title, shown in SECTIONS]


def _contents(runs: list[Run], watches: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Everything the template shows, section by section; `watches` are of `watched`."""
    names = encoder_names(runs)
    columns = result_columns(runs, names)
    kinds = {names[sha_of(run)]: kind_of(run.record["encoder"]) for run in runs if run.record}
    order = sorted(kinds, key=lambda name: (KINDS.index(kinds[name]), name))
    contents = {
        "summary": summary(columns, order, kinds),
        "subtitle": subtitle(runs),
        "overview": overview(columns, order),
        "cautions": cautions(runs, names),
        "pixels_missing": _pixels_missing(runs, kinds),
        "columns": columns,
        "papers": papers(runs),
        "cells": cells,
        "encoders": order,
        "kinds": kinds,
        "curves": [curves(run) for run in runs if any("loss" in line for line in run.metrics)],
        "watched": watches,
        "views": [(run.name, image(run.path / "views.png")) for run in runs if has(run, "views.png")],
        "neighbours": neighbours(runs, names, order),
        "maps": maps(runs, names, order),
        "health": health(runs, names, order),
        "confusion": confusion(runs, names, order),
        "paired": paired(runs, names, order, kinds),
        "detections": detections(runs, names, order),
        "provenance": [provenance(run, names) for run in runs],
        "deviations": deviations_by_protocol(runs),
        "evaluated": any(run.record for run in runs),
    }
    return contents | {"sections": _sections(contents)}


def _pixels_missing(runs: list[Run], kinds: dict[str, str]) -> str:
    """A small set of which raw pixels were not judged; empty where there is none, or they are among the runs."""
    small = [run.record["dataset"]["name"] for run in runs if run.record and is_small(run.record)]
    return small[0] if small and "pixels" not in kinds.values() else ""
