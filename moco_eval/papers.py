"""Published tables, and our result records beside them, like against like only. See docs/comparing.md."""

import csv
import io
import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator
from rich import box
from rich.markup import escape
from rich.table import Table as RichTable

from moco_eval import config
from moco_eval.config import Expect, Model, PretrainConfig
from moco_eval.errors import InputError
from moco_eval.statistics import REPEATS, mean_and_std
from moco_eval.text import as_text

Record = dict[str, Any]
Over = Literal["head", "labels", "finetune", "pretrain"]
# Config values by which rows of one protocol are told apart; `_asked` adds those that not every recipe has.
TOLD_APART = (
    *("mechanism", "queue_size", "symmetric", "batch_size", "bn_groups", "bn_permute", "schedule.kind"),
    *("head", "views.recipe"),
)
PROTECTED = ("shuffle", "split")  # kinds of BN that do not leak


class Column(Model):
    """One metric of one protocol on one data set; without a protocol nothing of ours belongs in it."""

    title: str
    unit: str = ""
    metric: str | None = None
    protocol: str | None = None
    dataset: str | None = None

    @model_validator(mode="after")
    def _all_or_none(self):
        if len({self.metric is None, self.protocol is None, self.dataset is None}) > 1:
            raise ValueError("metric, protocol and dataset go together")
        return self


class Match(Model):
    """An encoder that was not pretrained here.

    random: any encoder of that architecture before training. supervised: torchvision's V1 ImageNet weights.
    """

    weights: Literal["random", "supervised"]
    arch: str


class Recipe(Model):
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
        return config.flatten(self.resolved().model_dump(mode="json"))


@cache
def _resolved(name: str, overrides: tuple[str, ...]) -> PretrainConfig:
    shipped = [path.removeprefix("pretrain/") for path in config.shipped("pretrain")]
    if name not in shipped:
        raise InputError(f"no shipped pretraining config named {name!r}.{config.did_you_mean(name, shipped)}")
    return config.load(name, "pretrain", PretrainConfig, overrides)


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).splitlines()[0]


class Row(Model):
    """A published row: numbers by column; `std` and `trials` where printed; how its encoder is had, or why not."""

    label: str
    published: dict[str, int | float | None]
    std: dict[str, float] = Field({})
    trials: dict[str, tuple[float, ...]] = Field({})
    note: str = ""
    match: Match | None = None
    recipe: Recipe | None = None
    unavailable: Literal["data never public", "recipe never published", "not yet built"] | None = None

    @model_validator(mode="after")
    def _can_be_had_or_says_why_not(self):
        if [self.match, self.recipe, self.unavailable].count(None) != 2:
            raise ValueError(f"row {self.label!r} needs one of match, recipe and unavailable")
        return self


class Point(Model):
    epoch: int
    knn_top1: float
    train_loss: float


class Curve(Model):
    """A published training log."""

    caption: str
    source: str
    note: str = ""
    points: tuple[Point, ...]


class Table(Model):
    """A published table; `reference` names the entries it gathers, `over` what its std is over."""

    id: str
    paper: str
    table: str
    caption: str
    source: str
    reference: tuple[str, ...]
    columns: dict[str, Column]
    rows: tuple[Row, ...]
    over: Over | None = None
    curve: Curve | None = None

    @model_validator(mode="after")
    def _columns_are_clear(self):
        titles = [column.title for column in self.columns.values()]
        if len(set(titles)) < len(titles):
            raise ValueError("two columns of one title: a column holds one metric of one protocol")
        for row in self.rows:
            for name in (*row.published, *row.std, *row.trials):
                if name not in self.columns:
                    raise ValueError(f"row {row.label!r} has a number for {name!r}, which is no column")
        return self


@dataclass
class Ours:
    """What we measured for a cell: mean and std over `n` repeats of `over`, and how it departs."""

    mean: float
    std: float | None
    n: int
    over: str
    runs: list[str]
    deviations: list[str]


@dataclass
class Line:
    """One number of the published table with ours, if any; `mark` points into the footnotes."""

    row: str
    column: Column
    published: float | None
    published_std: float | None
    ours: Ours | None = None
    mark: int | None = None

    @property
    def difference(self) -> float | None:
        return None if self.ours is None or self.published is None else self.ours.mean - self.published


@dataclass
class Comparison:
    """A table with our records in it; `footnotes` are the deviations of the marked runs, by mark from 1."""

    table: Table
    lines: list[Line] = field(default_factory=list)
    footnotes: list[str] = field(default_factory=list)


def tables() -> list[tuple[str, str]]:
    """Id and caption of every shipped table."""
    return [(name, load_table(name).caption) for name in _names()]


def _names() -> list[str]:
    return [name.removeprefix("papers/") for name in config.shipped("papers")]


def load_table(name: str) -> Table:
    """A published table by its id.

    Raises:
        InputError: no such table; the message names the nearest.
    """
    if name not in _names():
        raise InputError(f"no table {name!r}.{config.did_you_mean(name, _names())}")
    return config.load(name, "papers", Table)


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


def commands(table: Table) -> list[tuple[str, str]]:
    """Label and command of each row that has a recipe; rows of one recipe share their output folder."""
    return [(row.label, _command(row.recipe)) for row in table.rows if row.recipe]


def _command(recipe: Recipe) -> str:
    words = ["moco-eval", "pretrain", recipe.config, "--dataset", recipe.dataset, "--data", "FOLDER"]
    for override in recipe.overrides:
        words += ["--set", override]
    words += ["--precision", "fp32"]  # published arithmetic, also on a GPU that has bf16
    if recipe.set:
        settings = [re.sub(r"[^A-Za-z0-9_.]+", "-", override).strip("-") for override in recipe.overrides]
        words += ["--output", f"runs/{'-'.join(['pretrain', recipe.config, recipe.dataset, *settings])}"]
    return shlex.join(words)


# Which record belongs where


def compare(table: Table, records: Sequence[Record]) -> Comparison:
    """Set our records beside the published rows.

    A cell takes the records of its column's protocol, data set and metric whose encoder is the row's. Those
    without deviations are its number; those with some follow it in lines of their own, marked.
    """
    done = Comparison(table)
    for row in table.rows:
        for name, published in row.published.items():
            column = table.columns[name]
            found = [record for record in records if _belongs(record, column, row)]
            groups: list[Ours | None] = [*_groups(found, column, row)]
            for ours in groups or [None]:
                line = Line(row.label, column, published, row.std.get(name), ours)
                line.mark = _mark(done.footnotes, ours)
                done.lines.append(line)
    return done


def _mark(footnotes: list[str], ours: Ours | None) -> int | None:
    if ours is None or not ours.deviations:
        return None
    words = f"{', '.join(ours.runs)}: {'; '.join(ours.deviations)}"
    if words not in footnotes:
        footnotes.append(words)
    return footnotes.index(words) + 1


def _belongs(record: Record, column: Column, row: Row) -> bool:
    return (
        column.protocol is not None
        and record["protocol"] == column.protocol
        and record["dataset"]["name"] == column.dataset
        and not {"labels_per_class", "subset"} & record["dataset"].keys()
        and record["metrics"].get(column.metric) is not None
        and _is_encoder(record["encoder"], row)
    )


def _is_encoder(encoder: Record, row: Row) -> bool:
    if row.recipe:
        return _is_pretrained(encoder, row.recipe)
    if row.match is None or encoder["arch"] != row.match.arch:
        return False
    if row.match.weights == "random":
        return encoder["origin"].startswith("random") or (encoder["pretraining"] or {}).get("epochs") == 0
    # a converted checkpoint has torchvision's layout too: the name decides
    named = encoder["path"].endswith("_V1") or encoder["origin"].endswith("_V1")
    return encoder["path"].startswith("torchvision:") and named


def _is_pretrained(encoder: Record, recipe: Recipe) -> bool:
    """By the row's recipe, to the end of its schedule, with BN that protects from leaking."""
    pretraining, wanted = encoder["pretraining"] or {}, recipe.resolved()
    settings = config.flatten(pretraining.get("config", {}))
    return (
        encoder["arch"] == wanted.arch
        and pretraining.get("protocol") == wanted.protocol
        and pretraining.get("dataset", {}).get("name") == recipe.dataset
        and wanted.schedule.epochs == pretraining.get("epochs") == settings.get("schedule.epochs")
        and _bn(pretraining) in PROTECTED
        and all(key in settings and settings[key] == value for key, value in _asked(recipe).items())
    )


def _asked(recipe: Recipe) -> dict[str, Any]:
    """The config values that a record must share with its row: those that tables vary, and all that the row sets."""
    settings = recipe.settings()
    keys = [*TOLD_APART, *recipe.set]
    if settings["mechanism"] == "moco":
        keys.append("momentum")  # plays no part in the other mechanisms
    if settings["schedule.kind"] == "step":
        keys.append("schedule.milestones")
    return {key: settings[key] for key in keys}


def _bn(pretraining: Record) -> str:
    """The kind of BN that was used; shuffling within one process shuffles nothing."""
    bn, processes = pretraining.get("bn", "none"), pretraining.get("processes", 1)
    return "none" if bn == "shuffle" and processes == 1 else bn


def _groups(records: list[Record], column: Column, row: Row) -> list[Ours]:
    """Records by their deviations, the comparable ones first, then the newest first."""
    newest_first = sorted(records, key=_time, reverse=True)
    by_deviations: dict[tuple[str, ...], list[Record]] = {}
    for record in newest_first:
        by_deviations.setdefault(tuple(_deviations(record, row)), []).append(record)
    kinds = sorted(by_deviations, key=bool)  # stable: the newest stay first
    return [_ours(by_deviations[kind], column, list(kind)) for kind in kinds]


def _deviations(record: Record, row: Row) -> list[str]:
    """A record's deviations, but for those that the row itself asks for (the ablations)."""
    asked = tuple(f"encoder: {key} " for key in (_asked(row.recipe) if row.recipe else {}))
    return [words for words in record["deviations"] if not (asked and words.startswith(asked))]


def _ours(records: list[Record], column: Column, deviations: list[str]) -> Ours:
    """The newest record, and with it only repeats of the same pretraining, judged in the same way."""
    assert column.metric and {record["protocol"] for record in records} == {column.protocol}
    newest = records[0]
    repeats: dict[Any, Record] = {}
    for record in records:
        if _same(record, newest):
            repeats.setdefault(_seed(record["encoder"]), record)
    runs = [record.get("run", "") for record in repeats.values()]
    if len(repeats) > 1:
        mean, std = mean_and_std([record["metrics"][column.metric] for record in repeats.values()])
        return Ours(mean, std, len(repeats), "pretrain", runs, deviations)
    std = newest["std"].get(column.metric)
    return Ours(newest["metrics"][column.metric], std, len(newest["trials"]), newest["over"], runs, deviations)


def _same(record: Record, other: Record) -> bool:
    fingerprints = [each["dataset"].get("fingerprint") for each in (record, other)]
    return fingerprints[0] == fingerprints[1] and _settings(record["encoder"]) == _settings(other["encoder"])


def _settings(encoder: Record) -> Record | None:
    """How an encoder was pretrained, its seed and what moves no number aside."""
    if not encoder["pretraining"]:
        return None
    settings = config.flatten(encoder["pretraining"]["config"])
    return {key: value for key, value in settings.items() if not key.startswith(config.NEUTRAL_KEYS)}


def _seed(encoder: Record) -> Any:
    """What tells repeats apart: the pretraining's seed (one run leaves several files), or the weights."""
    return encoder["pretraining"]["config"].get("seed") if encoder["pretraining"] else encoder["sha256"]


def _time(record: Record) -> float:
    try:
        return datetime.strptime(record["environment"]["time"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except (KeyError, ValueError):
        return 0.0


# How it is shown

HEADINGS = ("row", "metric", "published", "ours", "difference")
CSV_COLUMNS = (
    *("row", "metric", "protocol", "dataset", "published", "published_std"),
    *("ours", "ours_std", "n", "over", "difference", "comparable", "deviations"),
)


def render(comparison: Comparison, form: str) -> str:
    """The comparison as text, markdown or csv, ending without a newline."""
    forms: dict[str, Callable[[Comparison], str]] = {"text": _text, "markdown": _markdown, "csv": _csv}
    if form not in forms:
        raise InputError(f"no format {form!r}.{config.did_you_mean(form, forms)}")
    return forms[form](comparison).rstrip("\n")


def _cells(line: Line) -> tuple[str, str, str, str, str]:
    metric = line.column.title + (f" ({line.column.unit})" if line.column.unit else "")
    return line.row, metric, _published(line), _ours_words(line), _difference(line)


def _published(line: Line) -> str:
    if line.published is None:
        return "-"
    return f"{line.published}" + (f" ± {line.published_std}" if line.published_std is not None else "")


def _ours_words(line: Line) -> str:
    if line.ours is None:
        return "-"
    ours = line.ours
    spread = f" ± {ours.std:.2f}" if ours.std is not None else ""
    repeats = f"n={ours.n}" if ours.n == 1 else f"n={ours.n} {REPEATS.get(ours.over, ours.over)}"
    mark = f" [{line.mark}]" if line.mark else ""
    return f"{ours.mean:.2f}{spread} ({repeats}){mark}"


def _difference(line: Line) -> str:
    if line.difference is None:
        return "-"
    return f"({line.difference:+.2f})" if line.mark else f"{line.difference:+.2f}"


def _below(comparison: Comparison) -> list[str]:
    marks = [f"[{i}] not comparable: {words}" for i, words in enumerate(comparison.footnotes, 1)]
    notes = [f"{row.label}: {row.note}" for row in comparison.table.rows if row.note]
    return [*marks, *notes]


def _text(comparison: Comparison) -> str:
    table = comparison.table
    grid = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in HEADINGS:
        grid.add_column(heading, justify="left" if heading in HEADINGS[:2] else "right")
    before = ""
    for line in comparison.lines:
        label, *others = (escape(cell) for cell in _cells(line))
        grid.add_row("" if label == before else label, *others)
        before = label
    above = (f"{table.id}: {table.paper}, {table.table}", table.caption)
    return as_text(*above, grid, *_below(comparison), f"published: {table.source}")


def _markdown(comparison: Comparison) -> str:
    table = comparison.table
    rows = [HEADINGS, ("---", "---", "---:", "---:", "---:"), *map(_cells, comparison.lines)]
    grid = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    below = [f"- {words}" for words in (*_below(comparison), f"published: {table.source}")]
    return "\n".join([f"**{table.id}: {table.paper}, {table.table}.** {table.caption}", "", *grid, "", *below])


def _csv(comparison: Comparison) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for line in comparison.lines:
        ours = line.ours
        writer.writerow(
            {
                "row": line.row,
                "metric": line.column.title,
                "protocol": line.column.protocol,
                "dataset": line.column.dataset,
                "published": line.published,
                "published_std": line.published_std,
                "difference": line.difference,
            }
            | (_csv_ours(ours) if ours else {})
        )
    return out.getvalue()


def _csv_ours(ours: Ours) -> dict[str, Any]:
    return {
        "ours": ours.mean,
        "ours_std": ours.std,
        "n": ours.n,
        "over": ours.over,
        "comparable": "no" if ours.deviations else "yes",
        "deviations": "; ".join(ours.deviations),
    }
