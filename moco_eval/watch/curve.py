"""The curve of a watched training: every judged checkpoint at its place, by protocol and metric."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from moco_eval.results import run_files
from moco_eval.runtime import files
from moco_eval.runtime.text import as_text
from moco_eval.watch.checkpoints import position


@dataclass(frozen=True)
class Point:
    """A judged checkpoint.

    Attributes:
        name: its file's, from the watched folder.
        written: when it was written, in nanoseconds.
        results: the record of each protocol.
    """

    name: str
    written: int
    results: dict[str, dict[str, Any]]

    @property
    def place(self) -> tuple[str, int] | None:
        """Its step, epoch or number; None where nothing tells."""
        return position(self.name)

    def scalars(self) -> dict[str, float]:
        """For loggers: each of its metrics by name."""
        return {
            f"watch/{protocol}/{metric}": value
            for protocol, record in self.results.items()
            for metric, value in record["metrics"].items()
        }


@dataclass(frozen=True)
class Curve:
    """The points in the order of the training, each with its x.

    `unit` says what x is: step, epoch, number, or checkpoint, which counts them in the order of writing.
    """

    unit: str
    points: tuple[tuple[int, Point], ...]

    def lines(self) -> list[dict[str, Any]]:
        """For curve.jsonl: one object for each checkpoint and protocol."""
        return [
            {
                self.unit: x,
                "checkpoint": point.name,
                "protocol": protocol,
                "metrics": record["metrics"],
                "interval": record["interval"],
                "sha256": record["encoder"]["sha256"],
            }
            for x, point in self.points
            for protocol, record in point.results.items()
        ]

    def x(self, point: Point) -> int:
        """Where a point stands."""
        return next(x for x, other in self.points if other == point)

    def table(self) -> str:
        """A row for each checkpoint, the first metric of each protocol with its interval."""
        protocols = list(dict.fromkeys(protocol for _, point in self.points for protocol in point.results))
        grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in (self.unit, "checkpoint", *protocols):
            grid.add_column(heading, justify="left" if heading == "checkpoint" else "right")
        for x, point in self.points:
            grid.add_row(str(x), point.name, *(_cell(point.results.get(protocol)) for protocol in protocols))
        return as_text(grid, "in percent; interval: over test images")


def _cell(record: dict[str, Any] | None) -> str:
    if record is None:
        return "-"
    name, value = next(iter(record["metrics"].items()))
    interval = record["interval"].get(name)
    return f"{name} {value:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def curve_of(points: Sequence[Point]) -> Curve:
    """Points at their steps, epochs or numbers where the names of all tell these; else in the order of writing."""
    units = {point.place[0] if point.place else None for point in points}
    unit = units.pop() if len(units) == 1 else None
    written = sorted(points, key=lambda point: (point.written, point.name))
    if unit is None:
        return Curve("checkpoint", tuple(enumerate(written, 1)))
    placed = [(point.place[1], point) for point in written if point.place]
    return Curve(unit, tuple(sorted(placed, key=lambda pair: pair[0])))


def read_point(folder: Path, name: str, written: int) -> Point:
    """A checkpoint with the results that its folder holds."""
    records = [run_files.read_record(place) for place in files.folders_with(folder, "result.json")]
    return Point(name, written, {record["protocol"]: record for record in records if record})


def write(curve: Curve, path: Path) -> None:
    """curve.jsonl, as a whole: it is made of the records, so that no restart can break it."""
    import json

    files.write_text(path, "".join(f"{json.dumps(line)}\n" for line in curve.lines()))
