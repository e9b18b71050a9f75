"""The page."""

from pathlib import Path
from typing import Any

import jinja2

from moco_eval import __version__, files
from moco_eval.report.figures import curves
from moco_eval.report.pictures import detections, has, image, neighbours
from moco_eval.report.provenance import departures, provenance
from moco_eval.report.read import KINDS, Run, encoder_names, kind_of, read_runs, sha_of
from moco_eval.report.scores import result_columns, summary
from moco_eval.runtime import warn

PAGE_BYTES = 3_000_000


def write_report(runs: list[Path], output: Path, title: str = "moco-eval report") -> None:
    """Write the page about these runs.

    Args:
        runs: run directories, or folders that contain some.
        output: the HTML file; it needs no other.
    Raises:
        InputError: a path holds no finished run, a file of a run is damaged, the output cannot be written.
    """
    found = read_runs(runs)
    page = _template().render(title=title, version=__version__, **_contents(found))
    if len(page.encode()) > PAGE_BYTES:
        warn(f"{output} has {len(page.encode()) / 1e6:.1f} MB; report on fewer runs for a lighter page")
    files.write_text(output, page)


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    undefined = jinja2.StrictUndefined
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=undefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html")


def _contents(runs: list[Run]) -> dict[str, Any]:
    """Everything the template shows, section by section."""
    names = encoder_names(runs)
    columns = result_columns(runs, names)
    kinds = {names[sha_of(run)]: kind_of(run.record["encoder"]) for run in runs if run.record}
    order = sorted(kinds, key=lambda name: (KINDS.index(kinds[name]), name))
    return {
        "summary": summary(columns, order, kinds),
        "columns": columns,
        "encoders": order,
        "kinds": kinds,
        "curves": [curves(run) for run in runs if any("loss" in line for line in run.metrics)],
        "views": [(run.path.name, image(run.path / "views.png")) for run in runs if has(run, "views.png")],
        "neighbours": neighbours(runs, names, order),
        "detections": detections(runs, names, order),
        "provenance": [provenance(run, names) for run in runs],
        "deviations": departures(runs),
    }
