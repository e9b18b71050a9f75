"""Tables and durations as plain text."""

import io
import re
import shutil
import sys

from rich.console import Console
from rich.table import Table

from moco_eval.runtime.printable import printable


def as_text(*parts: str | Table) -> str:
    """Lines and tables below each other, without a newline at the end.

    For a terminal its width; elsewhere as wide as the words are, so that the text is always the same.
    """
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=False, highlight=False, emoji=False, color_system=None)
    for part in parts:
        console.print(part, markup=False)
    text = printable(out.getvalue()).removesuffix("\n")
    return "\n".join(line.rstrip() for line in text.split("\n"))


def duration(seconds: float) -> str:
    """In the unit that fits: 0.2 s, 34 s, 12 min, 3.4 h, 53 days, 12 years."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 or seconds == 0 else f"{seconds:.1f} s"
    hours = seconds / 3600
    if hours < 100 / 60:
        return f"{seconds / 60:.0f} min"
    days = hours / 24
    return f"{hours:.1f} h" if days < 3 else f"{days:,.0f} days" if days < 1000 else f"{days / 365:,.0f} years"


def without_dashes(message: str) -> str:
    """A message of the command line in Python's words: --batch-size is batch_size, --set key=value is key=value."""
    plain = re.sub(r"--set (?=['\"]?[\w.]+)", "", message)
    return re.sub(r"(?<![\w-])--([a-z][a-z-]*)", lambda option: option[1].replace("-", "_"), plain)
