"""What an evaluation gives a Python program: numbers, their spread, the answers behind them, and the record."""

import html
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moco_eval.errors import InputError
from moco_eval.results.compare import read_run
from moco_eval.results.record import repeats
from moco_eval.results.run_directory import holds, write_resolved
from moco_eval.runtime import files, lock
from moco_eval.runtime.printable import one_line
from moco_eval.untrusted import npz


@dataclass(frozen=True)
class Result:
    """A finished evaluation.

    Attributes:
        record: the result record, as result.json holds it (docs/results.md).
        arrays: what predictions.npz holds: `prediction` (trials, N), `label`, `scores`; empty for a detection.
        resolved: everything that defines the run, as config.yaml holds it.
    """

    record: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(repr=False, default_factory=dict)
    resolved: dict[str, Any] = field(repr=False, default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Result":
        """Of a finished run directory of a classification. Raises InputError where it is none."""
        return cls(read_run(folder).record, npz.read(folder / "predictions.npz"))

    @property
    def protocol(self) -> str:
        """Which protocol, and which version of it."""
        return self.record["protocol"]

    @property
    def metrics(self) -> dict[str, float]:
        """In percent, the mean over the trials; the first is the one that the data set's papers report."""
        return self.record["metrics"]

    @property
    def std(self) -> dict[str, float]:
        """Over trials, in percentage points; empty for a single one."""
        return self.record["std"]

    @property
    def interval(self) -> dict[str, tuple[float, float]]:
        """95 % over test images, in percent, of the metrics that have one."""
        return {name: (bounds[0], bounds[1]) for name, bounds in self.record["interval"].items()}

    @property
    def deviations(self) -> list[str]:
        """Where it left the protocol; empty means that the number may stand beside published ones."""
        return self.record["deviations"]

    @property
    def scores(self) -> np.ndarray:
        """Of the first trial, (N, classes): of each test image for each class."""
        return self._array("scores")[0]

    @property
    def predictions(self) -> np.ndarray:
        """Of the first trial, (N,): the class of the highest score."""
        return self._array("prediction")[0]

    @property
    def labels(self) -> np.ndarray:
        """(N,), or (N, classes) where an image may show several."""
        return self._array("label")

    def _array(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise InputError(f"{self.protocol} has no {name}: it gives no answer for each image")
        return self.arrays[name]

    def save(self, folder: str | Path) -> Path:
        """Write config.yaml, environment.json, predictions.npz and result.json, which the report and compare read.

        Raises:
            InputError: the folder holds another run, or something else, or a command works there.
        """
        folder = Path(folder)
        try:
            holds(folder, self.resolved)
            with lock.alone(folder):
                self._write(folder)
        except InputError as error:
            raise InputError(str(error).replace("--output", "folder")) from None
        return folder

    def _write(self, folder: Path) -> None:
        """Into a folder that is ours."""
        holds(folder, self.resolved)
        write_resolved(folder, self.resolved, self.record["environment"])
        if self.arrays:
            with files.atomic(folder / "predictions.npz") as temporary:
                np.savez(temporary, **self.arrays)  # type: ignore[arg-type]
        files.write_json(folder / "result.json", self.record)

    def __str__(self) -> str:
        """The numbers in lines, as the command prints them."""
        return "\n".join(lines(self.record))

    def __repr__(self) -> str:
        """Its first number; the whole record has thousands of characters."""
        return f"<Result {lines(self.record)[0]}>"

    def _repr_html_(self) -> str:
        """A table, for notebooks."""
        cell = "<td style='text-align: right'>{}</td>".format
        rows = []
        for name, value in self.metrics.items():
            spread = f"± {self.std[name]:.2f}" if name in self.std else ""
            bounds = "[{:.2f}, {:.2f}]".format(*self.interval[name]) if name in self.interval else ""
            rows.append(f"<tr><td>{html.escape(name)}</td>{cell(f'{value:.2f}')}{cell(spread)}{cell(bounds)}</tr>")
        data, encoder = self.record["dataset"], self.record["encoder"]
        caption = f"{self.protocol} of {encoder['path']} on {data['name']}, {data['images']:,} test images, percent"
        head = "".join(f"<th>{title}</th>" for title in ("metric", "value", "over trials", "95 % over test images"))
        notes = "".join(f"<li>{html.escape(deviation)}</li>" for deviation in self.deviations)
        remarks = f"<p>Not comparable with published numbers:</p><ul>{notes}</ul>" if notes else ""
        return f"<table><caption>{html.escape(caption)}</caption><tr>{head}</tr>{''.join(rows)}</table>{remarks}"


def lines(record: dict[str, Any]) -> list[str]:
    """The numbers of a result record, a metric a line, and what keeps them from a published table."""
    rows = []
    for name, value in record["metrics"].items():
        std, bounds = record["std"].get(name), record["interval"].get(name)
        spread = f" ± {std:.2f} ({repeats(record)})" if std is not None else ""
        interval = f"  [{bounds[0]:.2f}, {bounds[1]:.2f}] over test images" if bounds else ""
        rows.append(f"{record['protocol']} {record['dataset']['name']} {name} {value:.2f}{spread}{interval}")
    for name, about in record.get("also", {}).items():
        classes = f"{about['classes']} of {about['of_classes']} classes"
        parts = f", mean of {len(about['parts'])} parts" if "parts" in about else ""
        for metric, value in about["metrics"].items():
            std, bounds = about["std"].get(metric), about["interval"].get(metric)
            spread = f" ± {std:.2f} ({repeats(record)})" if std is not None else ""
            interval = f"  [{bounds[0]:.2f}, {bounds[1]:.2f}] over its images" if bounds else ""
            rows.append(f"{record['protocol']} {name} ({classes}{parts}) {metric} {value:.2f}{spread}{interval}")
    rows += [f"  not comparable with published numbers: {deviation}" for deviation in record["deviations"]]
    return [one_line(row) for row in rows]
