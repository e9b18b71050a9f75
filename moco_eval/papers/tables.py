"""Published tables as data: the models of configs/papers/*.yaml."""

import difflib
import math
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from moco_eval.config import deviations
from moco_eval.config import load as configs
from moco_eval.config.base import Expect, Model
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.encoders import zoo
from moco_eval.errors import InputError

Over = Literal["head", "labels", "finetune", "pretrain"]


class Column(Model):
    """One metric of one protocol on one data set; without a protocol nothing of ours belongs in it.

    trials: how many repetitions the published number is the mean of. config: the shipped config that evaluates it,
    where it is not the protocol's own. why: nothing of ours measures it, where there is a reason to give.
    """

    title: str
    unit: str = ""
    metric: str | None = None
    protocol: str | None = None
    dataset: str | None = None
    config: str | None = None
    why: str = ""
    trials: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _all_or_none(self):
        if len({self.metric is None, self.protocol is None, self.dataset is None}) > 1:
            raise ValueError("metric, protocol and dataset go together")
        if self.why and self.protocol:
            raise ValueError("why is of a column that no protocol measures")
        return self


class Match(Model):
    """An encoder that was not pretrained here.

    random: any encoder of that architecture before training. supervised: torchvision's V1 ImageNet weights.
    """

    weights: Literal["random", "supervised"]
    arch: str


class RowRecipe(Model):
    """How an encoder is pretrained: a shipped pretraining config, the data, and what a row sets (dotted keys)."""

    config: str
    dataset: str
    set: dict[str, Any] = Field({})

    @model_validator(mode="after")
    def _can_be_resolved(self):
        try:
            groups = self.set.keys() - self.settings().keys()
        except InputError as error:
            raise ValueError(str(error)) from None
        if groups:
            raise ValueError(f"{min(groups)} is a group of keys; set them one by one, with dots")
        return self

    @property
    def overrides(self) -> tuple[str, ...]:
        """What is set, as `--set` takes it."""
        return tuple(f"{key}={_as_yaml(value)}" for key, value in self.set.items())

    def resolved(self) -> PretrainConfig:
        """The config of the run; raises InputError."""
        return _resolved(self.config, self.overrides)

    def settings(self) -> dict[str, Any]:
        """The same with dotted keys, as a result record holds it."""
        return deviations.flatten(self.resolved().model_dump(mode="json"))


@cache
def _resolved(name: str, overrides: tuple[str, ...]) -> PretrainConfig:
    shipped = [path.removeprefix("pretrain/") for path in configs.shipped("pretrain")]
    if name not in shipped:
        raise InputError(f"no shipped pretraining config named {name!r}.{configs.did_you_mean(name, shipped)}")
    return configs.load(name, "pretrain", PretrainConfig, overrides)


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).splitlines()[0]


class States(Model):
    """What the paper says of an encoder's pretraining, in its symbols: K, m of Eqn. (2), tau.

    m: none where the mechanism has no momentum encoder. arch and data: in our names.
    """

    arch: str
    data: str
    epochs: int
    batch: int
    K: int
    m: float | None = None
    tau: float

    @classmethod
    def of(cls, recipe: RowRecipe) -> "States":
        """What a recipe of ours would have to state."""
        run = recipe.resolved()
        return cls(
            arch=run.arch,
            data=recipe.dataset,
            epochs=run.schedule.epochs,
            batch=run.batch_size,
            K=run.queue_size,
            m=run.momentum if run.mechanism in ("moco", "moco_v3") else None,
            tau=run.temperature,
        )


class Row(Model):
    """A published row: numbers by column; `std` and `trials` where printed; how its encoder is had, or why not.

    states: what the paper says of its pretraining; a recipe must agree. released: the checkpoint of those who published
    the row, by its name in the zoo.
    """

    label: str
    published: dict[str, int | float | None] = Field(min_length=1)
    std: dict[str, float] = Field({})
    trials: dict[str, tuple[float, ...]] = Field({})
    note: str = ""
    match: Match | None = None
    recipe: RowRecipe | None = None
    states: States | None = None
    released: str | None = None
    unavailable: Literal["data never public", "recipe never published", "not yet built"] | None = None

    @model_validator(mode="after")
    def _can_be_had_or_says_why_not(self):
        if [self.match, self.recipe, self.released, self.unavailable] == [None] * 4:
            raise ValueError(f"row {self.label!r} needs match, recipe, released or unavailable")
        if (self.match and self.recipe) or (self.unavailable and (self.match or self.recipe or self.released)):
            raise ValueError(f"row {self.label!r} has one of match, recipe and unavailable")
        return self

    @model_validator(mode="after")
    def _recipe_is_the_papers(self):
        if bool(self.recipe) != bool(self.states):
            raise ValueError(f"row {self.label!r}: recipe and states go together")
        if self.recipe and self.states:
            paper, ours = self.states.model_dump(), States.of(self.recipe).model_dump()
            differ = [f"{key} {paper[key]} in the paper, {ours[key]} in it" for key in paper if paper[key] != ours[key]]
            if differ:
                raise ValueError(f"row {self.label!r} has a recipe that is not its own: {'; '.join(differ)}")
        return self

    @model_validator(mode="after")
    def _released_is_in_the_zoo(self):
        if self.released:
            try:
                zoo.entry(self.released)
            except InputError as error:
                raise ValueError(str(error)) from None
        return self


class CurvePoint(Model):
    epoch: int
    knn_top1: float
    train_loss: float


class Curve(Model):
    """A published training log."""

    caption: str
    source: str
    note: str = ""
    points: tuple[CurvePoint, ...]


class Table(Model):
    """A published table; `reference` names the entries it gathers, `over` what its std is over."""

    id: str
    paper: str
    table: str
    caption: str
    source: str
    reference: tuple[str, ...]
    columns: dict[str, Column]
    rows: tuple[Row, ...] = Field(min_length=1)
    over: Over | None = None
    curve: Curve | None = None

    @model_validator(mode="after")
    def _columns_are_clear(self):
        titles = [column.title for column in self.columns.values()]
        if len(set(titles)) < len(titles):
            raise ValueError("two columns of one title: a column holds one metric of one protocol")
        measured = [column for column in self.columns.values() if column.protocol]
        held = [(column.metric, column.protocol, column.dataset) for column in measured]
        if len(set(held)) < len(held):
            raise ValueError("two columns of one metric, protocol and data set: each would show the other's runs")
        labels = [row.label for row in self.rows]
        if len(set(labels)) < len(labels):
            raise ValueError("two rows of one label")
        for row in self.rows:
            for name in (*row.published, *row.std, *row.trials):
                if name not in self.columns:
                    raise ValueError(f"row {row.label!r} has a number for {name!r}, which is no column")
        return self


def tables() -> list[tuple[str, str]]:
    """Id of every shipped table, its caption, and how many of its rows can be had; read without being checked."""
    return [(name, _line(configs.read_yaml(configs.folder() / "papers" / f"{name}.yaml")[0])) for name in _names()]


def _line(values: dict[str, Any]) -> str:
    rows = values["rows"]
    measured = {name for name, column in values["columns"].items() if "protocol" in column}
    had = sum("unavailable" not in row and bool(measured & row["published"].keys()) for row in rows)
    return f"{values['caption']} {len(rows)} row{'s' if rows[1:] else ''}, {had or 'none'} to be had."


def _names() -> list[str]:
    return [name.removeprefix("papers/") for name in configs.shipped("papers")]


def load_table(name: str) -> Table:
    """A published table by its id, or a table of one's own by its file.

    Raises:
        InputError: no such table; the message names the nearest.
    """
    if not name.endswith((".yaml", ".yml")) and name not in _names():
        near = difflib.get_close_matches(name, _names(), 1)
        way_out = f"Did you mean {near[0]!r}?" if near else "`moco-eval table --list` names them."
        raise InputError(f"no table {name!r}. {way_out}")
    if name not in _names() and not Path(name).is_file():
        raise InputError(f"table {name} does not exist; `moco-eval table --list` names the shipped ones")
    return configs.load(name, "papers", Table)


# How a row's encoder is pretrained


def recipe(table: Table, row: Row) -> PretrainConfig:
    """The config that a row's encoder is pretrained with; `expect` is the row's own number, None where it has none.

    Raises:
        InputError: the row has no recipe.
    """
    if row.recipe is None:
        raise InputError(f"row {row.label!r} of {table.id} has no recipe: {_why_none(row)}")
    return row.recipe.resolved().model_copy(update={"expect": _expect(table, row)})


def _why_none(row: Row) -> str:
    return row.unavailable or f"its encoder is not pretrained: {row.match.weights if row.match else ''}"


def _expect(table: Table, row: Row) -> Expect | None:
    """The number in the first column that a protocol of ours measures."""
    for name, column in table.columns.items():
        number = row.published.get(name)
        if number is not None and column.protocol and column.metric:
            metrics, std = {column.metric: float(number)}, row.std.get(name)
            return Expect(protocol=column.protocol, metrics=metrics, std=std, source=table.source)
    return None
