"""All runs below a folder on one page: like beside like, each number with its spread and a link to its run."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from moco_eval.config.data_name import layout_of
from moco_eval.errors import InputError
from moco_eval.papers.match import seed_of
from moco_eval.report import template
from moco_eval.report.control import Control, control_of
from moco_eval.report.overview import subtitle
from moco_eval.report.pick import settings
from moco_eval.report.runs import Run, encoder_names, kind_of, sha_of
from moco_eval.report.scores import cautions
from moco_eval.results import compare, run_directory
from moco_eval.results.record import repeats
from moco_eval.results.sanity import chance, is_small
from moco_eval.results.statistics import Answers
from moco_eval.runtime import files
from moco_eval.runtime.printable import one_line

Record = dict[str, Any]
QUICK = "top1"  # the metric of which `compare` answers within milliseconds


@dataclass(frozen=True)
class Judged:
    """A finished run: its folder, its record, the names of its encoder and folder, and the link to it from the page."""

    path: Path
    record: Record
    encoder: str
    name: str
    link: str


@dataclass(frozen=True)
class Row:
    """A run in a table.

    Attributes:
        kind: of its encoder; `seed`: of a pretraining of ours.
        cells: by metric: the number in percent, its spread over trials and its interval over test images.
        gap: from the highest of the table in its first metric, in points; None where there is none.
        standing: what `compare` says of the two, 'level with the highest'; empty where it was not asked.
    """

    run: Judged
    kind: str
    seed: int | None
    cells: dict[str, tuple[str, str, str]]
    gap: float | None
    standing: str


@dataclass(frozen=True)
class Table:
    """Runs that may be set beside each other: of one protocol, on the same data, with the same settings.

    Attributes:
        settings: where they left the protocol, in words; none where they kept to it.
        metrics: in the order of the records; `chance`: of those for which it is known, percent.
        rows: the highest first.
        control: what another seed of one recipe changes; None where no recipe has several.
    """

    settings: tuple[str, ...]
    metrics: list[str]
    chance: dict[str, float]
    rows: list[Row]
    control: Control | None


@dataclass(frozen=True)
class Group:
    """The runs of one protocol on the same data with as many labels; the table that kept to the protocol is first.

    Attributes:
        labels: how few, in words; empty for all.
    """

    protocol: str
    data: str
    labels: str
    about: str
    pixels_missing: bool
    tables: list[Table]


def write_board(folder: Path, output: Path) -> None:
    """Write the page about every finished evaluation below a folder.

    Args:
        output: the HTML file; it needs no other, and its links lead from where it lies.
    Raises:
        InputError: the folder holds no finished run, a file of a run is damaged, the output cannot be written.
    """
    place = template.place_of(output, "--html", "results.html")
    records = run_directory.read(folder)
    if not records:
        raise InputError(f"{folder} holds no finished run, so there is no page to write")
    runs = [Run(Path(record["run"]), {}, record.get("environment", {}), record) for record in records]
    runs.sort(key=lambda run: run.time)
    names = encoder_names(runs)
    page = template.render(
        "board.html",
        ("page.js", "board.js"),
        title="moco-eval results",
        subtitle=subtitle(runs),
        cautions=cautions(runs, names),
        groups=groups([_judged(run, names, folder, output) for run in runs]),
    )
    files.write_text(place, page.decode("utf-8"))


def _judged(run: Run, names: dict[str, str], folder: Path, output: Path) -> Judged:
    assert run.record
    name = os.fsencode(os.path.relpath(run.path, folder)).decode("utf-8", "backslashreplace")
    name = run.name if name == "." else name
    return Judged(run.path, run.record, one_line(names[sha_of(run)]), one_line(name), link(run.path, output))


def link(run: Path, output: Path) -> str:
    """The address of a run's folder from a page: relative, so that both can be moved together."""
    return quote(os.fsencode(os.path.relpath(run, output.parent))) + "/"


# What may stand beside what


def groups(runs: Sequence[Judged]) -> list[Group]:
    """The runs by what they share, in the order of data, protocol and labels.

    Args:
        runs: the oldest first: data are called as the newest calls them.
    """
    of_group: dict[tuple, list[Judged]] = {}
    for run in runs:
        dataset = run.record["dataset"]
        key = (run.record["protocol"], _images(dataset), dataset.get("labels_per_class"), dataset.get("subset"))
        of_group.setdefault(key, []).append(run)
    called = _data_names(runs)
    made = [_group(some, called[key[1]]) for key, some in of_group.items()]
    return sorted(made, key=lambda group: (group.data, group.protocol, group.labels))


def _images(dataset: Record) -> tuple:
    """What tells sets of test images apart."""
    return (layout_of(dataset["name"]), *(dataset.get(key) for key in ("split", "fingerprint", "images")))


def _data_names(runs: Sequence[Judged]) -> dict[tuple, str]:
    """What sets of test images are called; with their fingerprint where several have one name."""
    called: dict[tuple, str] = {}
    for run in runs:
        dataset = run.record["dataset"]
        called[_images(dataset)] = one_line(" ".join(filter(None, (dataset["name"], dataset.get("split")))))
    shared = Counter(called.values())
    return {key: name if shared[name] == 1 else f"{name} {str(key[2])[:8]}" for key, name in called.items()}


def _group(runs: Sequence[Judged], data: str) -> Group:
    newest = runs[-1].record
    dataset, few = newest["dataset"], newest["dataset"].get("labels_per_class")
    counts = {"images": "test images", "classes": "classes"}
    about = [f"{dataset[key]:,} {words}" for key, words in counts.items() if dataset.get(key)]
    of_settings: dict[tuple[str, ...], list[Judged]] = {}
    for run in runs:
        of_settings.setdefault(settings(run.record), []).append(run)
    return Group(
        newest["protocol"],
        data,
        f"{few} labels per class" if few else dataset.get("subset") or "",
        ", ".join([*about, f"fingerprint {str(dataset.get('fingerprint'))[:8]}"]),
        is_small(newest) and all(run.record["encoder"]["arch"] != "pixels" for run in runs),
        [_table(own, of_settings[own]) for own in sorted(of_settings, key=lambda own: (bool(own), own))],
    )


def _table(own: tuple[str, ...], runs: Sequence[Judged]) -> Table:
    metrics = list(dict.fromkeys(name for run in runs for name in run.record["metrics"]))
    classes = runs[-1].record["dataset"].get("classes")
    guesses = {name: guess for name in metrics if (guess := chance(name, classes)) is not None}
    first = metrics[0] if metrics else ""
    ordered = sorted(runs, key=lambda run: run.record["metrics"].get(first, float("-inf")), reverse=True)
    rows = [_row(*about, ordered[0].record, first) for about in zip(ordered, _standings(ordered, first))]
    return Table(own, metrics, guesses, rows, control_of([run.record for run in runs], first))


# A row


def _row(run: Judged, standing: str, highest: Record, metric: str) -> Row:
    record = run.record
    values = [one["metrics"].get(metric) for one in (record, highest)]
    return Row(
        run,
        kind_of(record["encoder"]),
        seed_of(record["encoder"]),
        {name: _cell(record, name) for name in record["metrics"]},
        values[0] - values[1] if values[0] is not None and values[1] is not None else None,
        standing,
    )


def _cell(record: Record, name: str) -> tuple[str, str, str]:
    std, interval = record["std"].get(name), record["interval"].get(name)
    spread = f"± {std:.2f} ({repeats(record)})" if std is not None else ""
    return f"{record['metrics'][name]:.2f}", spread, "[{:.2f}, {:.2f}]".format(*interval) if interval else ""


def _standings(ordered: Sequence[Judged], metric: str) -> list[str]:
    """What `compare` says of each run and the highest; empty where it would take long, or a run kept no answers."""
    runs = [_answered(run, metric) for run in ordered] if metric == QUICK and ordered[1:] else [None] * len(ordered)
    return [
        f"{compare.compare(runs[0], run, metric).verdict} the highest" if runs[0] and run and number else ""
        for number, run in enumerate(runs)
    ]


def _answered(run: Judged, metric: str) -> compare.Run | None:
    """The run with its one class of each test image; None where it has not that metric, or kept no such answers."""
    if metric not in run.record["metrics"] or not compare.has_answers(run.path, run.record):
        return None
    answered = compare.with_answers(run.path, run.record)
    is_of_classes = isinstance(answered.answers, Answers) and answered.answers.predictions is not None
    return answered if is_of_classes else None
