"""A comparison as one self-contained HTML page."""

from itertools import groupby
from pathlib import Path

import jinja2

from moco_eval.papers import cells
from moco_eval.papers.match import Comparison
from moco_eval.papers.todo import Missing, script


def page(comparison: Comparison, missing: Missing) -> str:
    """No script and no request; light and dark."""
    table = comparison.table
    groups = [(label, list(lines)) for label, lines in groupby(comparison.lines, key=lambda line: line.row)]
    return _template().render(
        title=cells.title(table),
        caption=table.caption,
        headings=cells.HEADINGS,
        groups=groups,
        cells=cells,
        below=cells.below(comparison),
        unobtainable=cells.unobtainable(missing),
        missing=missing,
        script=script(missing),
    )


def _template() -> jinja2.Template:
    loader, undefined = jinja2.FileSystemLoader(Path(__file__).parent), jinja2.StrictUndefined
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=undefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("table.html")
