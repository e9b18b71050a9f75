"""Tables as plain text."""

import io
import shutil
import sys

from rich.console import Console
from rich.table import Table


def as_text(*parts: str | Table) -> str:
    """Lines and tables below each other, without a newline at the end.

    For a terminal its width; elsewhere as wide as the words are, so that the text is always the same.
    """
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=False, highlight=False, color_system=None)
    for part in parts:
        console.print(part, markup=False)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
