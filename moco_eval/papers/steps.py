"""The steps behind the rows of a table, each a command of ours: pretrain, convert, evaluate."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Literal

from moco_eval.classification.protocols import kinds
from moco_eval.config import base, deviations
from moco_eval.config import load as configs
from moco_eval.config.protocol_name import kind_and_name
from moco_eval.errors import InputError
from moco_eval.papers import match
from moco_eval.papers.match import Record
from moco_eval.papers.tables import Column, Row, RowRecipe, Table
from moco_eval.runtime import files
from moco_eval.runtime.console import warn
from moco_eval.runtime.printable import shell_join

BUILT_IN = ("digits",)  # data sets that need no folder
RECIPES = ("detect", "segment")  # commands whose config is a recipe by iterations
EVALUATIONS = (*kinds(), *RECIPES)
CACHED = tuple(kind for kind, rows in kinds().items() if rows[0].frozen)  # they keep the features they extract


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
class ChainStep:
    """One command.

    Attributes:
        arguments: the command line after `moco-eval`.
        output: the run directory, or the file, that it leaves.
        dataset: what it reads.
        name: of its config: what the pretraining or the evaluation is.
        cells: the rows and columns that want it.
        after: the step before it; None where its encoder needs no training.
        recipe: of a pretraining.
    """

    kind: Literal["pretrain", "convert", "evaluate"]
    arguments: tuple[str, ...]
    output: Path
    dataset: str
    name: str
    cells: tuple[tuple[str, str], ...]
    after: "ChainStep | None" = None
    recipe: RowRecipe | None = None

    @property
    def command(self) -> str:
        return shell_join(("moco-eval", *self.arguments))

    @property
    def before(self) -> "list[ChainStep]":
        """The steps that it needs, the nearest first."""
        return [self.after, *self.after.before] if self.after else []

    def is_before(self, other: "ChainStep") -> bool:
        return any(step.arguments == self.arguments for step in other.before)


def steps(table: Table, rows: Sequence[Row], places: Places) -> list[ChainStep]:
    """What produces these rows, in an order in which it can run; a step that several rows want is there once.

    Raises:
        InputError: a column's protocol or config is none of ours.
    """
    there = _finished(places.runs) if any(row.recipe for row in rows) else []
    by_arguments: dict[tuple[str, ...], ChainStep] = {}
    for row in rows:
        for step in _of_row(table, row, places, there):
            before = by_arguments.get(step.arguments)
            cells = (*before.cells, *step.cells) if before else step.cells
            by_arguments[step.arguments] = replace(step, cells=tuple(dict.fromkeys(cells)))
    return list(by_arguments.values())


def why_none(table: Table, row: Row) -> str | None:
    """Why nothing of ours produces a row; None where something does."""
    if row.unavailable or any(table.columns[name].protocol for name in row.published):
        return row.unavailable
    return "no protocol of ours measures it"


def _of_row(table: Table, row: Row, places: Places, there: Sequence["Run"]) -> Iterator[ChainStep]:
    if why_none(table, row):
        return
    columns = {name: table.columns[name] for name in row.published if table.columns[name].protocol}
    trained, checkpoint, name = _encoder(row, places, there)
    if trained:
        yield trained
    converted = None
    if trained and any(command(column) == "detect" for column in columns.values()):
        converted = _converted(trained, checkpoint)
        yield converted
    for asked in _evaluations(columns):
        first = converted if converted and command(columns[asked[0]]) == "detect" else trained
        yield _evaluated(row, {key: columns[key] for key in asked}, checkpoint, name, first, places)


# Encoders


def _encoder(row: Row, places: Places, there: Sequence["Run"]) -> tuple[ChainStep | None, str, str]:
    """The pretraining that is needed, CHECKPOINT as commands take it, and a name for folders."""
    if row.released and (places.released or not (row.recipe or row.match)):
        return None, f"zoo:{row.released}", row.released
    if row.match:
        weights = {"random": "random:{}", "supervised": "torchvision:{}:IMAGENET1K_V1"}[row.match.weights]
        return None, weights.format(row.match.arch), f"{row.match.weights}-{row.match.arch}"
    assert row.recipe
    folder = _of(row.recipe, there) or places.runs / folder_name(row.recipe)
    arguments = (*_pretraining(row.recipe, places), "--output", str(folder))
    cells = tuple((row.label, column) for column in row.published)
    trained = ChainStep("pretrain", arguments, folder, row.recipe.dataset, row.recipe.config, cells, recipe=row.recipe)
    place = folder.relative_to(places.runs).parts if folder.is_relative_to(places.runs) else folder.parts[-2:]
    return trained, str(folder / "checkpoints/last.pth"), "-".join(place).removeprefix("pretrain-")


def _pretraining(recipe: RowRecipe, places: Places) -> tuple[str, ...]:
    arguments = ["pretrain", recipe.config, "--dataset", recipe.dataset, *_data(recipe.dataset, places)]
    for override in recipe.overrides:
        arguments += ["--set", override]
    return (*arguments, "--precision", "fp32", *_processes(places))  # published arithmetic, also on a GPU that has bf16


def folder_name(recipe: RowRecipe) -> str:
    """Of a recipe's run directory; rows of one recipe, in whichever table, share it."""
    settings = [re.sub(r"[^A-Za-z0-9_.]+", "-", override).strip("-") for override in recipe.overrides]
    return "-".join(["pretrain", recipe.config, recipe.dataset, *settings])


Run = tuple[Path, Record]  # a finished pretraining: its folder, its config.yaml


def pretrained(recipe: RowRecipe, runs: Path) -> Path | None:
    """A run directory that holds this pretraining, finished; found by what its config says."""
    return _of(recipe, _finished(runs))


def _of(recipe: RowRecipe, there: Sequence[Run]) -> Path | None:
    return next((folder for folder, values in there if _is_of(values, recipe)), None)


def _finished(runs: Path) -> list[Run]:
    """Every finished pretraining below a folder; other files of that name are passed over."""
    folders = files.folders_with(runs, "config.yaml") if runs.is_dir() else []
    candidates = [(folder, _read(folder / "config.yaml")) for folder in folders if (folder / "checkpoints").is_dir()]
    return [(folder, values) for folder, values in candidates if _is_finished(folder, values)]


def _read(path: Path) -> Record:
    """Nothing, and a warning, of a file that is damaged or another program's."""
    try:
        return configs.read_yaml(path)[0]
    except InputError as error:
        warn(f"no pretraining of ours: {error}")
        return {}


def _is_finished(folder: Path, values: Record) -> bool:
    settings = values.get("config")
    if values.get("command") != "pretrain" or not isinstance(settings, dict):
        return False
    epochs = deviations.flatten(settings).get("schedule.epochs")
    names = ("last.pth", f"epoch_{epochs:04d}.pth") if isinstance(epochs, int) else ()
    return bool(names) and all((folder / "checkpoints" / name).is_file() for name in names)


def _is_of(values: Record, recipe: RowRecipe) -> bool:
    """Whether a finished run is this pretraining: nothing in it differs that may move a number."""
    settings, wanted = deviations.flatten(values["config"]), recipe.settings()
    about = {**values, "protocol": settings.get("protocol"), "epochs": settings["schedule.epochs"]}
    arithmetic = {"fp32", wanted["precision"]}
    return (
        match.is_pretrained({"arch": settings.get("arch"), "pretraining": about}, recipe)
        and settings.get("precision") in arithmetic
        and all(
            settings.get(key) == value
            for key, value in wanted.items()
            if not base.is_neutral(key) and key not in ("bn", "precision")
        )
    )


def _converted(trained: ChainStep, checkpoint: str) -> ChainStep:
    """The backbone for detectron2, the copy proven, before hours of fine-tuning."""
    out = trained.output / "detectron2.pkl"
    arguments = ("convert", checkpoint, str(out), "--to", "detectron2")
    return ChainStep("convert", arguments, out, trained.dataset, "detectron2", trained.cells, trained)


# Evaluations


def command(column: Column) -> str:
    """The command whose protocol a column is."""
    assert column.protocol
    return kind_and_name(column.protocol)[0]


@cache
def evaluation(protocol: str) -> str:
    """The shipped config of a protocol: the one of its name, or the only one that follows it.

    Raises:
        InputError: no protocol of ours, or several configs follow it.
    """
    kind, name = kind_and_name(protocol)
    followed = _followed(kind)
    if followed.get(name) == protocol:
        return name
    following = [config for config, other in followed.items() if other == protocol]
    if len(following) > 1:
        raise InputError(f"{protocol} is followed by {', '.join(following)}; the column must say which: `config: ...`")
    if not following:
        known = sorted({other for kind in EVALUATIONS for other in _followed(kind).values()})
        raise InputError(f"no protocol {protocol!r}.{configs.did_you_mean(protocol, known)}")
    return following[0]


def _followed(kind: str) -> dict[str, str]:
    """The protocol of each shipped config of a kind."""
    return {
        path.partition("/")[2]: configs.read_yaml(configs.folder() / f"{path}.yaml")[0]["protocol"]
        for path in configs.shipped(kind)
        if kind in EVALUATIONS
    }


def _config(column: Column) -> str:
    """The config that evaluates a column; raises InputError where it follows another protocol."""
    assert column.protocol
    if column.config is None:
        return evaluation(column.protocol)
    protocol = configs.merged(column.config, command(column), ()).get("protocol")
    if protocol != column.protocol:
        raise InputError(
            f"column {column.title!r} is of {column.protocol} and its config {column.config} of {protocol}; "
            "take a config that follows the column's protocol"
        )
    return column.config


def _evaluations(columns: Mapping[str, Column]) -> list[list[str]]:
    """Names of the columns, together where one run gives all of them."""
    groups: dict[tuple, list[str]] = {}
    for name, column in columns.items():
        groups.setdefault((column.protocol, column.dataset, column.config), []).append(name)
    return list(groups.values())


def _evaluated(
    row: Row, columns: Mapping[str, Column], checkpoint: str, name: str, after: ChainStep | None, places: Places
) -> ChainStep:
    column = next(iter(columns.values()))
    assert column.dataset
    kind, asked = command(column), _config(column)
    arguments = [kind, checkpoint, "--dataset", column.dataset, *_data(column.dataset, places)]
    arguments += ["--recipe" if kind in RECIPES else "--protocol", asked]
    trials = max(column.trials for column in columns.values())
    arguments += ["--trials", str(trials)] if trials > 1 else []
    arguments += ["--cache", str(places.runs / "features")] if kind in CACHED and places.runs != Path("runs") else []
    folder = [kind, name, column.dataset, Path(asked).stem, *([f"{trials}-trials"] if trials > 1 else [])]
    output = places.runs / "-".join(folder)
    cells = tuple((row.label, key) for key in columns)
    arguments += [*_processes(places), "--output", str(output)]
    return ChainStep("evaluate", tuple(arguments), output, column.dataset, asked, cells, after)


def _data(dataset: str, places: Places) -> list[str]:
    return [] if dataset in BUILT_IN else ["--data", str(places.data.get(dataset, PurePosixPath("FOLDER")))]


def _processes(places: Places) -> list[str]:
    return ["--nproc", str(places.processes)] if places.processes > 1 else []


# What is left to do


def left(steps: Sequence[ChainStep], table: Table, records: Sequence[Record]) -> list[ChainStep]:
    """What has to run: what is not done, but for encoders that nothing takes which is left."""
    remaining: list[ChainStep] = []
    for step in reversed(steps):
        takers = [taker for taker in steps if step.is_before(taker)]
        if not is_done(step, table, records) and (not takers or any(taker in remaining for taker in takers)):
            remaining.append(step)
    return remaining[::-1]


def is_done(step: ChainStep, table: Table, records: Sequence[Record]) -> bool:
    """Whether its work is there: in its own place or, of an evaluation, in any comparable record."""
    if step.recipe:
        values = _read(step.output / "config.yaml") if (step.output / "config.yaml").is_file() else {}
        return _is_finished(step.output, values) and _is_of(values, step.recipe)
    if step.kind == "convert":
        return step.output.is_file()
    rows = {row.label: row for row in table.rows}
    return all(_is_there(step, table.columns[name], rows[label], records) for label, name in step.cells)


def _is_there(step: ChainStep, column: Column, row: Row, records: Sequence[Record]) -> bool:
    """Whether a record gives a cell: one in the step's own place also with deviations, which its config may have."""
    own = [record for record in records if Path(record.get("run", "")) == step.output]
    return any(match.is_of(record, column, row) for record in own) or any(
        match.is_comparable(record, column, row) for record in records
    )
