"""What a person sees: lines and progress bars on stderr, from the first process."""

import contextlib
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn

from moco_eval.runtime.rank import is_main

console = Console(stderr=True, highlight=False, soft_wrap=True)


def tell(message: str) -> None:
    """One line to stderr, from whichever process calls."""
    console.print(message, markup=False)


def log(message: str) -> None:
    """One line to stderr, from the first process only."""
    if is_main():
        tell(message)


def warn(message: str) -> None:
    log(f"warning: {message}")


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
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    ]
    with Progress(*columns, console=console, disable=not (is_main() and console.is_terminal)) as bar:
        task = bar.add_task(title, total=total, completed=done, images=images, unit=unit, note="")

        def advance(steps: int = 1, note: str | None = None) -> None:
            bar.advance(task, steps)
            if note is not None:
                bar.update(task, note=note)

        yield advance


def track(items: Iterable, title: str, total: int, images: int = 1) -> Iterator:
    """Iterate with a progress bar."""
    with progress(title, total, images) as advance:
        for item in items:
            yield item
            advance()
