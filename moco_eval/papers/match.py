"""Our result records set beside the rows of a published table."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from moco_eval.config.base import is_neutral
from moco_eval.config.data_name import is_called
from moco_eval.config.deviations import flatten
from moco_eval.encoders import zoo
from moco_eval.papers.tables import Column, Row, RowRecipe, Table, completed
from moco_eval.results.statistics import mean_and_std

Record = dict[str, Any]
# Config values by which rows of one protocol are told apart; `_asked` adds those that not every recipe has.
TOLD_APART = (
    *("mechanism", "queue_size", "symmetric", "batch_size", "bn_groups", "bn_permute", "schedule.kind"),
    *("head", "views.recipe"),
)
PROTECTED = ("shuffle", "split")  # kinds of BN that do not leak


@dataclass
class Ours:
    """What we measured for a cell: mean and std over `n` repeats of `over`, and its deviations."""

    mean: float
    std: float | None
    n: int
    over: str
    runs: list[str]
    deviations: list[str]


@dataclass
class Line:
    """One number of the published table with ours, if any.

    Attributes:
        published_std: as printed, over `published_n` repeats of `published_over`, where these are printed too.
        mark: points into the footnotes.
    """

    row: str
    column: Column
    published: float | None
    published_std: float | None
    published_n: int | None = None
    published_over: str | None = None
    ours: Ours | None = None
    mark: int | None = None

    @property
    def difference(self) -> float | None:
        return None if self.ours is None or self.published is None else self.ours.mean - self.published

    @property
    def judgement(self) -> Literal["within", "above", "below"] | None:
        """Where ours lies to the published mean ± std; None unless both are over the same thing, and comparable."""
        if self.difference is None or self.published_std is None or self.mark:
            return None
        assert self.ours is not None
        if self.ours.over != self.published_over or self.ours.n < (self.published_n or self.column.trials):
            return None
        if round(abs(self.difference), 9) <= self.published_std:  # 61.0 - 60.8 is 0.2000000000000028
            return "within"
        return "above" if self.difference > 0 else "below"


@dataclass
class Comparison:
    """A table with our records in it; `footnotes` are the deviations of the marked runs, by mark from 1."""

    table: Table
    lines: list[Line] = field(default_factory=list)
    footnotes: list[str] = field(default_factory=list)


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
            cell_records = [record for record in records if _belongs(record, column, row)]
            groups: list[Ours | None] = [*_groups(cell_records, column, row)]
            for ours in groups or [None]:
                n = len(row.trials.get(name, ())) or (column.trials if column.trials > 1 else None)
                line = Line(row.label, column, published, row.std.get(name), n, table.over, ours)
                line.mark = _mark(done.footnotes, ours)
                done.lines.append(line)
    return done


def _mark(footnotes: list[str], ours: Ours | None) -> int | None:
    if ours is None or not ours.deviations:
        return None
    footnote = f"{', '.join(ours.runs)}: {'; '.join(ours.deviations)}"
    if footnote not in footnotes:
        footnotes.append(footnote)
    return footnotes.index(footnote) + 1


def _belongs(record: Record, column: Column, row: Row) -> bool:
    return (
        column.protocol is not None
        and record["protocol"] == column.protocol
        and is_called(record["dataset"]["name"], str(column.dataset))
        and not {"labels_per_class", "subset"} & record["dataset"].keys()
        and record["metrics"].get(column.metric) is not None
        and _is_encoder(record["encoder"], row)
    )


def is_of(record: Record, column: Column, row: Row) -> bool:
    """Whether a record is of this cell, from as many trials as the published number."""
    return _belongs(record, column, row) and len(record["trials"]) >= column.trials


def is_comparable(record: Record, column: Column, row: Row) -> bool:
    """Whether it is that, without deviations."""
    return is_of(record, column, row) and not _deviations(record, row)


def _is_encoder(encoder: Record, row: Row) -> bool:
    if row.released and encoder["path"] == f"zoo:{row.released}":  # the zoo has verified the file
        arch = zoo.entry(row.released).recipe.arch
        return not arch.startswith("resnet") or encoder["arch"].removesuffix("_msra") == arch  # not another --arch
    if row.recipe:
        return is_pretrained(encoder, row.recipe)
    if row.match is None or encoder["arch"] != row.match.arch:
        return False
    if row.match.weights == "random":
        return encoder["origin"].startswith("random") or is_untrained(encoder)
    # a converted checkpoint has torchvision's layout too: the name decides
    named = encoder["path"].endswith("_V1") or encoder["origin"].endswith("_V1")
    return encoder["path"].startswith("torchvision:") and named


def is_untrained(encoder: Record) -> bool:
    """Whether it is the first checkpoint of a pretraining of ours; earlier ones told its steps by their name alone."""
    pretraining = encoder["pretraining"] or {}
    steps = pretraining.get("steps", 0 if encoder["path"].endswith("epoch_0000.pth") else None)
    return pretraining.get("protocol") is not None and pretraining.get("epochs") == steps == 0


def is_pretrained(encoder: Record, recipe: RowRecipe) -> bool:
    """By the row's recipe, to the end of its schedule, with BN that protects from leaking."""
    pretraining, wanted = encoder["pretraining"] or {}, recipe.resolved()
    settings = completed(pretraining.get("config", {}))
    return (
        encoder["arch"] == wanted.arch
        and pretraining.get("protocol") == wanted.protocol
        and is_called(str(pretraining.get("dataset", {}).get("name")), recipe.dataset)
        and wanted.schedule.epochs == pretraining.get("epochs") == settings.get("schedule.epochs")
        and _bn(pretraining) in (("sync",) if wanted.mechanism == "moco_v3" else PROTECTED)
        and all(key in settings and settings[key] == value for key, value in _asked(recipe).items())
    )


def _asked(recipe: RowRecipe) -> dict[str, Any]:
    """The config values that a record must share with its row: those that tables vary, and all that the row sets."""
    settings = recipe.settings()
    keys = [*TOLD_APART, *recipe.set]
    if settings["mechanism"] in ("moco", "moco_v3"):
        keys.append("momentum")  # plays no part in the other mechanisms
    if settings["schedule.kind"] == "step":
        keys.append("schedule.milestones")
    return {key: settings[key] for key in keys}


def _bn(pretraining: Record) -> str:
    """The kind of BN that was used; shuffling within one process shuffles nothing."""
    bn, processes = pretraining.get("bn", "none"), pretraining.get("processes", 1)
    return "none" if bn == "shuffle" and processes == 1 else bn


def _groups(records: list[Record], column: Column, row: Row) -> list[Ours]:
    """Records by their deviations, the comparable ones first, then those of enough trials, then the newest."""

    def rank(record: Record) -> tuple[bool, float]:
        return len(record["trials"]) >= column.trials, _time(record)

    by_deviations: dict[tuple[str, ...], list[Record]] = {}
    for record in sorted(records, key=rank, reverse=True):
        by_deviations.setdefault(tuple(_deviations(record, row)), []).append(record)
    kinds = sorted(by_deviations, key=bool)  # stable: the newest stay first
    return [_ours(by_deviations[kind], column, list(kind)) for kind in kinds]


def _deviations(record: Record, row: Row) -> list[str]:
    """A record's deviations, but for what the row's own recipe does as well (the ablations)."""
    if not row.recipe:
        return record["deviations"]
    wanted, settings = row.recipe.settings(), completed(_config(record["encoder"]) or {})
    asked = tuple(f"encoder: {key} " for key, value in wanted.items() if key in settings and settings[key] == value)
    return [deviation for deviation in record["deviations"] if not deviation.startswith(asked)]


def _ours(records: list[Record], column: Column, deviations: list[str]) -> Ours:
    """The first record; with it only repeats of the same pretraining of ours, judged in the same way.

    Not where the published number is a mean over trials of one encoder.
    """
    assert column.metric and {record["protocol"] for record in records} == {column.protocol}
    newest = records[0]
    repeats: dict[str, Record] = {}
    for record in records if column.trials == 1 and _config(newest["encoder"]) else [newest]:
        if _same(record, newest):
            repeats.setdefault(str(seed_of(record["encoder"])), record)
    runs = [record.get("run", "") for record in repeats.values()]
    if len(repeats) > 1:
        mean, std = mean_and_std([record["metrics"][column.metric] for record in repeats.values()])
        return Ours(mean, std, len(repeats), "pretrain", runs, deviations)
    std = newest["std"].get(column.metric)
    return Ours(newest["metrics"][column.metric], std, len(newest["trials"]), newest["over"], runs, deviations)


def _same(record: Record, other: Record) -> bool:
    return _kind(record) == _kind(other)


def _kind(record: Record) -> list[Any]:
    """What repeats share: the data, the trials, and the pretraining but for its seed."""
    return [record["dataset"].get("fingerprint"), len(record["trials"]), *pretraining_of(record["encoder"])]


def pretraining_of(encoder: Record) -> list[Any]:
    """How an encoder was pretrained, but for the seed and what moves no number: its data, batch norm and settings."""
    pretraining = encoder["pretraining"] or {}
    data = (pretraining.get("dataset") or {}).get("fingerprint")
    settings = _settings(encoder) if _config(encoder) else {}
    settings = {key: value for key, value in settings.items() if not is_neutral(key)}
    return [data, pretraining.get("bn"), pretraining.get("processes"), settings]


def seed_of(encoder: Record) -> int | None:
    """Of a pretraining of ours; None of others' checkpoints."""
    seed = _settings(encoder)["seed"] if _config(encoder) else None
    return seed if isinstance(seed, int) else None


def _settings(encoder: Record) -> Record:
    """How an encoder of ours was pretrained, with dotted keys."""
    settings = flatten(_config(encoder) or {})
    return settings | {"seed": settings.get("seed")}


def _config(encoder: Record) -> Record | None:
    """The config of a pretraining of ours; others' checkpoints carry none."""
    return (encoder["pretraining"] or {}).get("config")


def _time(record: Record) -> float:
    try:
        return datetime.strptime(record["environment"]["time"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except (KeyError, ValueError):
        return 0.0
