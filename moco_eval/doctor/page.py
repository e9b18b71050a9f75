"""The page that `moco-eval doctor` prints."""

from collections.abc import Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from moco_eval.doctor.checks import Check
from moco_eval.runtime.text import as_text

MARKS = {"ok": "", "note": "note", "broken": "BROKEN"}
HEADINGS = ("recipe", "processes", "precision", "about", "limited by", "moco-eval pretrain RECIPE ...")


def page(checks: Sequence[Check], recipes: Sequence[Sequence[str]]) -> str:
    """Facts and what is wrong with them, the recipes (a row each, as HEADINGS), and a last line with the verdict."""
    facts = Table(box=None, show_header=False, pad_edge=False)
    for _ in range(3):
        facts.add_column()
    for check in checks:
        facts.add_row(*(escape(cell) for cell in (check.name, MARKS[check.state], check.value)))
    about = [f"{MARKS[check.state]}: {check.name}: {check.way_out}" for check in checks if check.state != "ok"]
    parts: list[str | Table] = [facts, *([""] if about else []), *about]
    if recipes:
        predicted = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in HEADINGS:
            predicted.add_column(heading, justify="right" if heading == "about" else "left")
        for row in recipes:
            predicted.add_row(*map(escape, row))
        parts += [predicted]
    return as_text(*parts, _verdict(checks))


def _verdict(checks: Sequence[Check]) -> str:
    broken = [check.name for check in checks if check.state == "broken"]
    return f"broken: {', '.join(broken)}" if broken else "nothing is broken"
