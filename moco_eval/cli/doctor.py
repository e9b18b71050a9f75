"""moco-eval doctor."""

import tempfile
from pathlib import Path
from typing import Any

import click

from moco_eval.errors import RunFailed

LIMITS = {
    "network": "the network's arithmetic",
    "loader": "decoding and cutting views",
    "disk": "reading from the disk",
    "memory": "memory: too small for a step",
}


@click.command()
def doctor() -> int:
    """Show this machine on one page: what it has, how fast it is, what is broken, how long the recipes would take.

    Example: moco-eval doctor

    Exit code 1 where something is broken; the page says the way out.
    """
    from moco_eval.doctor import machine, measure
    from moco_eval.doctor.checks import checks
    from moco_eval.doctor.page import page
    from moco_eval.runtime.console import log

    try:
        room = tempfile.TemporaryDirectory(prefix="moco-eval-")
    except OSError as error:
        raise RunFailed(f"no folder for temporary files can be written ({error}); set TMPDIR to one that can") from None
    log("measuring this machine; it takes less than a minute")
    with room as folder:
        photos = Path(folder)
        measure.draw_photos(photos)
        here = machine.look(photos)
        lines = checks(here)
        works = not any(line.state == "broken" and line.name.startswith("GPU") for line in lines)
        click.echo(page(lines, _recipes(here, photos) if works else []))
    return 1 if any(line.state == "broken" for line in lines) else 0


def _recipes(here: Any, photos: Path) -> list[tuple[str, ...]]:
    """A row for each shipped recipe on a `machine.Machine`: the columns of `page.HEADINGS`."""
    import torch

    from moco_eval.runtime.text import duration
    from pretraining.forecast import Room, forecasts

    room = Room(torch.device(here.device), len(here.gpus), here.cores, here.disk)
    return [
        (
            each.recipe,
            str(each.processes),
            each.precision,
            "-" if each.seconds is None else duration(each.seconds),
            LIMITS[each.limit],
            each.options,
        )
        for each in forecasts(room, photos)
    ]
