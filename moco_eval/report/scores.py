"""The result table of a report, and what it says in words."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from moco_eval.config.data_name import layout_of
from moco_eval.config.protocol_name import kind_and_name
from moco_eval.report.pick import settings, terms
from moco_eval.report.runs import Run, sha_of
from moco_eval.results import compare
from moco_eval.results.record import repeats
from moco_eval.results.sanity import chance, disagreement, disagreements, looks_untrained

METRICS = {"top1": "top-1", "mean_per_class": "mean per class"}
METRICS |= {name: name for name in ("AP50", "AP", "APbb", "APmk", "APkp", "mAP", "mIoU")}
TASKS = {"linear": "linear", "knn": "kNN", "detect": "detection", "segment": "segmentation"}
NOT_COMPARED = "not compared (a run kept no answers) with"
_, LEVEL, _ = compare.VERDICTS
WITHOUT_LABELS = ("detection", "segmentation")  # tasks that have no few labels


@dataclass
class Score:
    """A number of the table; `spread` is a standard deviation over `trials` ('5 heads'), `interval` over images."""

    value: float
    spread: float | None
    trials: str
    interval: tuple[float, float] | None
    run: Run

    @property
    def text(self) -> str:
        return f"{self.value:.1f}" + (f" ± {self.spread:.1f}" if self.spread is not None else "")


@dataclass
class Column:
    """One metric of one protocol on the same data with the same settings, by encoder name.

    Attributes:
        key: the metric's name in the records; `metric` is its title.
        chance: what guessing reaches, where that is known.
        verdicts: of pairs (encoder, rival), as far as they were asked for; see `verdict`.
    """

    task: str
    regime: str
    dataset: str
    metric: str
    protocol: str
    key: str
    chance: float | None = None
    scores: dict[str, Score] = field(default_factory=dict)
    verdicts: dict[tuple[str, str], str | None] = field(default_factory=dict)

    @cached_property
    def leading(self) -> set[str]:
        """The encoders to colour, where there are rivals: the highest, and those that `compare` finds level with it."""
        highest = max(self.scores, key=lambda name: self.scores[name].value)
        level = {name for name in self.scores if name != highest and verdict(self, name, highest) == LEVEL}
        return {highest} | level if len(self.scores) > 1 else set()


def result_columns(runs: Sequence[Run], names: dict[str, str]) -> list[Column]:
    """The columns, fewest labels first; of two runs of the same thing the newer counts."""
    columns: dict[Any, Column] = {}
    for run in sorted(runs, key=lambda run: run.time):
        record = run.record
        for metric in filter(_rank, record["metrics"] if record else ()):
            assert record
            column = columns.setdefault(_key(record, metric), _column(record, metric))
            column.dataset = record["dataset"]["name"]  # what the newest calls it
            column.scores[names[sha_of(run)]] = _score(run, metric)
    order = sorted(columns, key=lambda key: (key[0] or float("inf"), *map(str, key[1:])))
    _number_data({key: columns[key] for key in order})
    return _tell_apart([columns[key] for key in order])


def _number_data(columns: dict[Any, Column]) -> None:
    """Number data of one name, where their files or splits differ; scenes are not the images of a classification."""
    seen: dict[tuple[str, bool], list[tuple]] = {}
    names = {key: (column.dataset, column.task in WITHOUT_LABELS) for key, column in columns.items()}
    for key, name in names.items():
        seen.setdefault(name, []).append(key[3])
    for key, column in columns.items():
        data = list(dict.fromkeys(seen[names[key]]))
        if len(data) > 1:
            column.dataset += f", data {data.index(key[3]) + 1}"


def _rank(metric: str) -> int | None:
    """The place of a metric that is shown, from 1: those of METRICS, then the mAP of so many shots (`mAP_4`)."""
    if metric.startswith("mAP_") and metric[4:].isdecimal() and len(metric) < 12:
        return len(METRICS) + int(metric[4:])
    return list(METRICS).index(metric) + 1 if metric in METRICS else None


def _title(metric: str) -> str:
    return METRICS.get(metric) or f"mAP, {metric[4:]} shots"


def _key(record: dict[str, Any], metric: str) -> tuple:
    """What a column holds fixed: labels, protocol, data, metric, and the settings that left the protocol."""
    dataset = record["dataset"]
    task, _ = kind_and_name(record["protocol"])
    own = settings(record)
    where = (layout_of(dataset["name"]), dataset.get("split"), dataset.get("fingerprint"))
    return (
        dataset.get("labels_per_class"),
        list(TASKS).index(task) if task in TASKS else 9,
        record["protocol"],
        where,
        f"{_rank(metric):03}",
        bool(own),  # first those that kept to the protocol
        own,
        dataset.get("subset", ""),
    )


def _column(record: dict[str, Any], metric: str) -> Column:
    task, few = kind_and_name(record["protocol"])[0], record["dataset"].get("labels_per_class")
    regime = f"{few} labels per class" if few else record["dataset"].get("subset", "all labels")
    return Column(
        TASKS.get(task, task),
        regime,
        record["dataset"]["name"],
        _title(metric),
        record["protocol"],
        metric,
        chance(metric, record["dataset"].get("classes")),
    )


def _tell_apart(columns: list[Column]) -> list[Column]:
    """Number the columns that differ only in settings."""
    seen: Counter = Counter()
    for column in columns:
        head = (column.task, column.regime, column.dataset, column.metric, column.protocol)
        seen[head] += 1
        if seen[head] > 1:
            column.regime += f", settings {seen[head]}"
    return columns


def _score(run: Run, metric: str) -> Score:
    record = run.record
    assert record
    interval = record["interval"].get(metric)
    spread, trials = record["std"].get(metric), repeats(record)
    return Score(record["metrics"][metric], spread, trials, tuple(interval) if interval else None, run)


def summary(columns: Sequence[Column], encoders: Sequence[str], kinds: dict[str, str]) -> list[str]:
    """What the table says: the first column in numbers, then where each trained encoder stands in all."""
    if not columns:
        return []
    first = columns[0]
    reached = ", ".join(f"{name} {first.scores[name].text}" for name in encoders if name in first.scores)
    words = measure(first)
    words = words if words.startswith("kNN") else words[0].upper() + words[1:]
    sentences = [f"{words} on {first.dataset}, in percent: {reached}."]
    for name in encoders:
        for rival in encoders:
            if kinds[name] == "trained" and kinds[rival] != "trained":
                sentences += _standing(columns, name, rival)
    return sentences


def cautions(runs: Sequence[Run], names: dict[str, str]) -> list[str]:
    """What makes numbers of the table suspicious: weights that look untrained, protocols that disagree."""
    doubts = {names[sha_of(run)]: looks_untrained(run.record) for run in runs if run.record}
    sentences = [f"{name}: {doubt}." for name, said in doubts.items() for doubt in said]
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: run.time, reverse=True):
        if run.record:
            about = (
                names[sha_of(run)],
                layout_of(run.record["dataset"]["name"]),
                run.record["dataset"].get("fingerprint"),
            )
            groups.setdefault((*about, *terms(run)[1:4]), []).append(run.record)
    for key, records in groups.items():
        data = records[0]["dataset"]["name"]
        sentences += [f"{key[0]} on {data}: {disagreement(*apart)}." for apart in disagreements(records)]
    return sentences


def measure(column: Column) -> str:
    """What a column measures, in words: 'kNN top-1 with all labels'."""
    words = f"{column.task} {column.metric}"
    return words if column.task in WITHOUT_LABELS else f"{words} with {column.regime}"


def verdict(column: Column, name: str, rival: str) -> str | None:
    """What `compare` says of two encoders by this column; None where a run kept no answers to compare.

    It resamples the test images, so a pair is asked once; level is level in both directions.
    """
    if column.verdicts.get((rival, name)) == LEVEL:
        return LEVEL
    if (name, rival) not in column.verdicts:
        runs = column.scores[rival].run.path, column.scores[name].run.path
        column.verdicts[name, rival] = compare.verdict(*runs, column.key)
    return column.verdicts[name, rival]


def _standing(columns: Sequence[Column], name: str, rival: str) -> list[str]:
    """In which columns one encoder is ahead of another, level, or behind; nothing where they never meet."""
    places: dict[str, list[str]] = {"ahead of": [], "level with": [], "behind": [], NOT_COMPARED: []}
    for column in columns:
        if name in column.scores and rival in column.scores:
            places[verdict(column, name, rival) or NOT_COMPARED].append(measure(column))
    judged = {standing: where for standing, where in places.items() if where}
    if not judged:
        return []
    if len(judged) == 1 and len(columns) > 1:
        ((standing, where),) = judged.items()
        return [f"{name} is {standing} {rival} in {'all' if where[1:] else 'the'} {_count(where)} they share."]
    parts = [f"{standing} {rival} in {', '.join(where)}" for standing, where in judged.items()]
    return [f"{name} is {'; '.join(parts)}."]


def _count(where: list[str]) -> str:
    return f"{len(where)} measures" if where[1:] else "one measure"
