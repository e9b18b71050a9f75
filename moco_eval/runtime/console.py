"""What a person sees: lines and progress bars on stderr, from the first process.

A command says everything; in a library the host decides, and hears warnings alone unless it asks for more.
"""

import contextlib
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn

from moco_eval.errors import InputError
from moco_eval.runtime.command import is_command
from moco_eval.runtime.printable import one_line, printable
from moco_eval.runtime.rank import is_main
from moco_eval.runtime.text import without_dashes

LEVELS = ("silent", "warnings", "info")
_level: str | None = None
_bar = threading.Lock()  # a terminal has room for the bar of one thread


class _Console(Console):
    """rich's, which draws bars with control characters, on the stream itself; see `printable.PrintableStream`."""

    @property  # type: ignore[misc]  # nothing sets it
    def file(self) -> IO[str]:
        stream = sys.stderr
        while (behind := getattr(stream, "rich_proxied_file", None)) is not None:
            stream = behind
        return stream


console = _Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)


def set_verbosity(level: str) -> None:
    """How much is said on stderr: silent, warnings (the default in a library), or info, with progress bars.

    Raises:
        InputError: another level.
    """
    global _level
    if level not in LEVELS:
        raise InputError(f"level is {level!r}; take {', '.join(LEVELS[:-1])} or {LEVELS[-1]}")
    _level = level


def _says(level: str) -> bool:
    """Whether what belongs to a level is said."""
    chosen = _level or ("info" if is_command() else "warnings")
    return LEVELS.index(chosen) >= LEVELS.index(level)


def tell(message: str, level: str = "info") -> None:
    """One line to stderr, from whichever process calls."""
    if _says(level):
        console.print(printable(message if is_command() else without_dashes(message)), markup=False)


def log(message: str) -> None:
    """One line to stderr, from the first process only."""
    if is_main():
        tell(message)


def warn(message: str) -> None:
    """One line to stderr, from the first process only, which a library says too."""
    if is_main():
        tell(f"warning: {one_line(message)}", "warnings")


class _Rate(ProgressColumn):
    def render(self, task: Task):
        from rich.text import Text

        per_step = task.fields.get("images", 1)
        return Text(f"{(task.speed or 0.0) * per_step:.0f} {task.fields.get('unit', 'images')}/s")


@contextlib.contextmanager
def progress(title: str, total: int, images: int = 1, done: int = 0, unit: str = "images"):
    """A progress bar with rate and time left; yields `advance(steps=1, note='')`.

    Args:
        title: what is under way.
        total: steps in all.
        images: images per step, for the rate.
        done: steps of an earlier session.
        unit: what is counted.
    """
    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    ]
    with (
        _alone(is_main() and console.is_terminal and _says("info")) as shown,
        Progress(*columns, console=console, disable=not shown) as bar,
    ):
        task = bar.add_task(one_line(title), total=total, completed=done, images=images, unit=unit, note="")

        def advance(steps: int = 1, note: str | None = None) -> None:
            bar.advance(task, steps)
            if note is not None:
                bar.update(task, note=one_line(note))

        yield advance


@contextlib.contextmanager
def _alone(wanted: bool) -> Iterator[bool]:
    """Whether this bar is shown: not beside the bar of another thread, or inside another bar."""
    shown = wanted and _bar.acquire(blocking=False)
    try:
        yield shown
    finally:
        if shown:
            _bar.release()


def track(items: Iterable, title: str, total: int, images: int = 1) -> Iterator:
    """Iterate with a progress bar."""
    with progress(title, total, images) as advance:
        for item in items:
            yield item
            advance()
