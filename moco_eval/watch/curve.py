"""The curve of a watched training: every judged checkpoint at its place, by protocol and metric."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
        stored: the step and the epoch that stand in it.
    """

    name: str
    written: int
    results: dict[str, dict[str, Any]]
    stored: Mapping[str, int] = field(default_factory=dict)

    def at(self, unit: str) -> int | None:
        """Its step, epoch or number: as its name says it, else as it stands in the file; None where neither tells."""
        named = position(self.name)
        return named[1] if named and named[0] == unit else self.stored.get(unit)

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

    `unit` says what x is: step, epoch, number, or order, which counts them as they were written.
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
    """Points at their steps, epochs or numbers where all have the same of these; else in the order of writing.

    What the names say comes first; for names that say nothing, what stands in the files.
    """
    written = sorted(points, key=lambda point: (point.written, point.name))
    named = [place[0] for point in written if (place := position(point.name))]
    for unit in dict.fromkeys((*named, "step", "epoch")):
        placed = [(x, point) for point in written if (x := point.at(unit)) is not None]
        if placed and len(placed) == len(written):
            return Curve(unit, tuple(sorted(placed, key=lambda pair: pair[0])))
    return Curve("order", tuple(enumerate(written, 1)))


def read_point(folder: Path, name: str, written: int, stored: Mapping[str, int]) -> Point:
    """A checkpoint with the results that its folder holds."""
    records = [run_files.read_record(place) for place in files.folders_with(folder, "result.json")]
    return Point(name, written, {record["protocol"]: record for record in records if record}, stored)


def write(curve: Curve, path: Path) -> None:
    """curve.jsonl, as a whole: it is made of the records, so that no restart can break it."""
    import json

    files.write_text(path, "".join(f"{json.dumps(line)}\n" for line in curve.lines()))
