"""What a person sees: lines and progress bars on stderr, from the first process.

A command says everything; in a library the host decides, and hears warnings alone unless it asks for more.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn

from moco_eval.errors import InputError
from moco_eval.runtime import command
from moco_eval.runtime.command import is_command
from moco_eval.runtime.printable import one_line, printable
from moco_eval.runtime.rank import is_main
from moco_eval.runtime.text import duration, without_dashes

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
    usual = "info" if is_command() and command.voice() != command.QUIET else "warnings"
    chosen = _level or usual
    return LEVELS.index(chosen) >= LEVELS.index(level)


def tell(message: str, level: str = "info") -> None:
    """One line to stderr, and to the run's log, from whichever process calls."""
    words = printable(message if is_command() else without_dashes(message))
    _journal.write(words)
    if _says(level):
        _journal.spoke()
        console.print(words, markup=False)


def log(message: str) -> None:
    """One line to stderr, from the first process only."""
    if is_main():
        tell(message)


def warn(message: str) -> None:
    """One line to stderr, from the first process only, which a library says too."""
    if is_main():
        tell(f"warning: {one_line(message)}", "warnings")


# The log of a run, and signs of life

LOG = "log.txt"
SILENCE = 30.0  # seconds without a line, at most, where no terminal shows a bar
KEPT = 200  # lines that a command has said before its run directory was there


class _Journal:
    """What a command has said: when last, and in which file it is kept."""

    def __init__(self) -> None:
        self.file: Path | None = None
        self.early: list[str] = []
        self.last = time.monotonic()

    def spoke(self) -> None:
        self.last = time.monotonic()

    def write(self, words: str) -> None:
        """A line of the log, with the time; a log that cannot be written stops no run."""
        if not is_command():
            return
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {words}\n"
        if self.file is None:
            self.early = [*self.early, line][-KEPT:]
            return
        with contextlib.suppress(OSError), self.file.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line)


_journal = _Journal()


def note(message: str) -> None:
    """A line of the log that is not shown: what a library says."""
    _journal.write(one_line(message))


@contextlib.contextmanager
def logged(folder: Path) -> Iterator[None]:
    """Within, what this command says is kept in the folder's log, what it has said before included; a guest keeps none.

    Called by the first process alone.
    """
    if not is_command() or _journal.file:
        yield
        return
    early, _journal.early, _journal.file = _journal.early, [], folder / LOG
    _journal.write(command.line() or "")
    with contextlib.suppress(OSError), _journal.file.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(early)
    try:
        yield
    except BaseException as error:
        _journal.write(f"ended by {type(error).__name__}: {error}")
        raise
    finally:
        _journal.file = None


@dataclass
class _Work:
    """A loop under way: how far it is, where no bar shows it."""

    title: str
    total: int
    per_step: int
    unit: str
    done: int
    note: str = ""
    began: float = field(default_factory=time.monotonic)
    before: int = field(init=False)

    def __post_init__(self) -> None:
        self.before = self.done

    def line(self) -> str:
        """'pretrain: 120 of 4,000 (3 %), 85 images/s, 12 min left'."""
        seconds, steps = time.monotonic() - self.began, self.done - self.before
        parts = [f"{self.title}: {self.done:,} of {self.total:,} ({100 * self.done / max(1, self.total):.0f} %)"]
        if steps:
            left = (self.total - self.done) * seconds / steps
            parts += [rate(steps * self.per_step / seconds, self.unit), f"{duration(left)} left"]
        return ", ".join([*parts, *([self.note] if self.note else [])])


def rate(per_second: float, unit: str) -> str:
    """'85 images/s', and '0.31 images/s' where it is slow."""
    return f"{per_second:.0f} {unit}/s" if per_second >= 10 else f"{per_second:.2g} {unit}/s"


_under_way: list[_Work] = []  # the outermost first


def begin() -> None:
    """Nothing has been said yet."""
    _journal.__init__()  # type: ignore[misc]


def beat(since: float) -> None:
    """Say how far the command is, where it has said nothing for SILENCE seconds and no bar shows it.

    Args:
        since: when it began, of time.monotonic.
    """
    if time.monotonic() - _journal.last < SILENCE or _bar.locked() or os.environ.get("RANK", "0") != "0":
        return
    tell(_under_way[0].line() if _under_way else f"at work for {duration(time.monotonic() - since)}")
    _journal.spoke()


def others_speak() -> None:
    """The processes that this one starts say how far they are."""
    _journal.last = float("inf")


class _Rate(ProgressColumn):
    def render(self, task: Task):
        from rich.text import Text

        per_step = task.fields.get("images", 1)
        return Text(rate(task.speed * per_step, task.fields.get("unit", "images")) if task.speed else "")


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
    work = _Work(one_line(title), total, images, unit, done)
    with (
        _alone(is_main() and console.is_terminal and _says("info")) as shown,
        Progress(*columns, console=console, disable=not shown) as bar,
        _known(work),
    ):
        task = bar.add_task(work.title, total=total, completed=done, images=images, unit=unit, note="")

        def advance(steps: int = 1, note: str | None = None) -> None:
            bar.advance(task, steps)
            work.done += steps
            if note is not None:
                work.note = one_line(note)
                bar.update(task, note=work.note)

        yield advance


@contextlib.contextmanager
def _known(work: _Work) -> Iterator[None]:
    """Within, the work is among what is under way."""
    _under_way.append(work)
    try:
        yield
    finally:
        _under_way.remove(work)


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
