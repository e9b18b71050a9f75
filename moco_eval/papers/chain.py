"""The steps behind the rows of a table, each a command of ours: pretrain, convert, evaluate."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Literal

from moco_eval import config
from moco_eval.papers import beside
from moco_eval.papers.beside import Record
from moco_eval.papers.tables import Column, Recipe, Row, Table

BUILT_IN = ("digits",)  # data sets that need no folder


@dataclass(frozen=True)
class Places:
    """Where things are, and how the commands are started.

    Attributes:
        runs: the folder of the run directories.
        data: the folder of each data set, by name; FOLDER stands in commands for those that are not named.
        processes: `--nproc` of every command.
        released: take the authors' checkpoint instead of pretraining, where there is one.
    """

    runs: Path = Path("runs")
    data: Mapping[str, Path] = field(default_factory=dict)
    processes: int = 1
    released: bool = False


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        words: after `moco-eval`.
        output: the run directory, or the file, that it leaves.
        dataset: what it reads.
        name: of its config: what the pretraining or the evaluation is.
        cells: the rows and columns that want it.
        after: the step whose encoder it takes; None where that is there already, or needs no training.
    """

    kind: Literal["pretrain", "convert", "evaluate"]
    words: tuple[str, ...]
    output: Path
    dataset: str
    name: str
    cells: tuple[tuple[str, str], ...]
    after: "Step | None" = None

    @property
    def command(self) -> str:
        return shlex.join(("moco-eval", *self.words))


def steps(table: Table, rows: Sequence[Row], places: Places) -> list[Step]:
    """What produces these rows, in an order in which it can run; a step that several rows want is there once."""
    found: dict[tuple[str, ...], Step] = {}
    for row in rows:
        for step in _of_row(table, row, places):
            before = found.get(step.words)
            cells = (*before.cells, *step.cells) if before else step.cells
            found[step.words] = Step(**(vars(step) | {"cells": tuple(dict.fromkeys(cells))}))
    return list(found.values())


def _of_row(table: Table, row: Row, places: Places) -> Iterator[Step]:
    columns = {name: table.columns[name] for name in row.published if table.columns[name].protocol}
    if row.unavailable or not (columns or row.recipe):
        return
    trained, checkpoint, name = _encoder(row, places)
    if trained:
        yield trained
    if trained and any(command(column) == "detect" for column in columns.values()):
        yield _converted(trained, checkpoint, places)
    for asked in _evaluations(columns):
        yield _evaluated(row, {one: columns[one] for one in asked}, checkpoint, name, trained, places)


# Encoders


def _encoder(row: Row, places: Places) -> tuple[Step | None, str, str]:
    """The pretraining that is needed, CHECKPOINT as commands take it, and a name for folders."""
    if row.released and (places.released or not (row.recipe or row.match)):
        return None, f"zoo:{row.released}", row.released
    if row.match:
        weights = {"random": "random:{}", "supervised": "torchvision:{}:IMAGENET1K_V1"}[row.match.weights]
        return None, weights.format(row.match.arch), f"{row.match.weights}-{row.match.arch}"
    assert row.recipe
    folder = pretrained(row.recipe, places.runs) or places.runs / folder_name(row.recipe)
    words = (*_pretraining(row.recipe, places), "--output", str(folder))
    cells = tuple((row.label, column) for column in row.published)
    trained = Step("pretrain", words, folder, row.recipe.dataset, row.recipe.config, cells)
    return trained, str(folder / "checkpoints/last.pth"), folder.name.removeprefix("pretrain-")


def _pretraining(recipe: Recipe, places: Places) -> tuple[str, ...]:
    words = ["pretrain", recipe.config, "--dataset", recipe.dataset, *_data(recipe.dataset, places)]
    for override in recipe.overrides:
        words += ["--set", override]
    return (*words, "--precision", "fp32", *_processes(places))  # published arithmetic, also on a GPU that has bf16


def folder_name(recipe: Recipe) -> str:
    """Of a recipe's run directory; rows of one recipe, in whichever table, share it."""
    settings = [re.sub(r"[^A-Za-z0-9_.]+", "-", override).strip("-") for override in recipe.overrides]
    return "-".join(["pretrain", recipe.config, recipe.dataset, *settings])


def pretrained(recipe: Recipe, runs: Path) -> Path | None:
    """A run directory that holds this pretraining, finished; found by what its config says."""
    for path in sorted(runs.rglob("config.yaml")) if runs.is_dir() else ():
        values, _ = config.read_yaml(path)
        if values.get("command") == "pretrain" and _is_finished(path.parent, values) and _is_of(values, recipe):
            return path.parent
    return None


def _is_finished(folder: Path, values: Record) -> bool:
    epochs = config.flatten(values.get("config") or {}).get("schedule.epochs")
    return isinstance(epochs, int) and (folder / "checkpoints" / f"epoch_{epochs:04d}.pth").is_file()


def _is_of(values: Record, recipe: Recipe) -> bool:
    settings = values["config"]
    about = {**values, "protocol": settings.get("protocol"), "epochs": settings["schedule"]["epochs"]}
    return beside.is_pretrained({"arch": settings.get("arch"), "pretraining": about}, recipe)


def _converted(trained: Step, checkpoint: str, places: Places) -> Step:
    """The backbone for detectron2, the copy proven, before hours of fine-tuning."""
    out = trained.output / "detectron2.pkl"
    words = ("convert", checkpoint, str(out), "--to", "detectron2")
    return Step("convert", words, out, trained.dataset, "detectron2", trained.cells, trained)


# Evaluations


def command(column: Column) -> str:
    """The command whose protocol a column is."""
    assert column.protocol
    return column.protocol.split("/")[0]


@cache
def evaluation(protocol: str) -> str:
    """The shipped config of a protocol: the one of its name, or the only one that follows it."""
    kind, name = protocol.split("@")[0].split("/")
    shipped = [one.removeprefix(f"{kind}/") for one in config.shipped(kind)]
    if name in shipped:
        return name
    following = [
        one for one in shipped if config.read_yaml(config.folder() / kind / f"{one}.yaml")[0]["protocol"] == protocol
    ]
    assert len(following) == 1, f"{protocol} is followed by {following}"
    return following[0]


def _evaluations(columns: Mapping[str, Column]) -> list[list[str]]:
    """Names of the columns, together where one run gives all of them."""
    groups: dict[tuple, list[str]] = {}
    for name, column in columns.items():
        groups.setdefault((column.protocol, column.dataset, column.config), []).append(name)
    return list(groups.values())


def _evaluated(
    row: Row, columns: Mapping[str, Column], checkpoint: str, name: str, trained: Step | None, places: Places
) -> Step:
    column = next(iter(columns.values()))
    assert column.protocol and column.dataset
    kind, asked = command(column), column.config or evaluation(column.protocol)
    words = [kind, checkpoint, "--dataset", column.dataset, *_data(column.dataset, places)]
    words += ["--recipe" if kind == "detect" else "--protocol", asked]
    trials = max(one.trials for one in columns.values())
    words += ["--trials", str(trials)] if trials > 1 else []
    output = places.runs / f"{kind}-{name}-{column.dataset}-{asked}"
    cells = tuple((row.label, one) for one in columns)
    words += [*_processes(places), "--output", str(output)]
    return Step("evaluate", tuple(words), output, column.dataset, asked, cells, trained)


def _data(dataset: str, places: Places) -> list[str]:
    return [] if dataset in BUILT_IN else ["--data", str(places.data.get(dataset, PurePosixPath("FOLDER")))]


def _processes(places: Places) -> list[str]:
    return ["--nproc", str(places.processes)] if places.processes > 1 else []


# What is left to do


def is_done(step: Step, table: Table, records: Sequence[Record]) -> bool:
    """Whether its work is there: in its own place or, of an evaluation, in any comparable record."""
    if step.kind == "pretrain":
        values = config.read_yaml(step.output / "config.yaml")[0] if (step.output / "config.yaml").is_file() else {}
        return bool(values) and _is_finished(step.output, values)
    if step.kind == "convert":
        return step.output.is_file()
    if (step.output / "result.json").is_file():
        return True
    rows = {row.label: row for row in table.rows}
    return all(
        any(beside.is_comparable(record, table.columns[name], rows[label]) for record in records)
        for label, name in step.cells
    )
