"""Several protocols on one extraction: each image goes through the network once for each kind of crop.

The protocols are those of the commands of their own, with the same run directories and the same numbers.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.markup import escape
from rich.table import Table

from moco_eval.classification.judge import check as check_task
from moco_eval.classification.judge import check_images, judge, prepared, resolved
from moco_eval.classification.protocols import Protocol, by_name, feature_override
from moco_eval.classification.task import Task
from moco_eval.config import load as configs
from moco_eval.config.classification import KnnConfig
from moco_eval.config.protocol_name import ProtocolName
from moco_eval.errors import InputError, message_of
from moco_eval.features.cache import Source, features_of, missing
from moco_eval.features.stages import network
from moco_eval.results import sanity
from moco_eval.results.record import repeats
from moco_eval.results.run_directory import finished, finished_as, holds
from moco_eval.runtime.collectives import barrier
from moco_eval.runtime.console import log, warn
from moco_eval.runtime.text import as_text

BATCH = 256  # images in a step of the extraction


@dataclass(frozen=True)
class Item:
    """One task of a suite: a protocol's config, what it is to judge, and its run directory."""

    protocol: str
    config: Any
    task: Task
    output: Path

    @property
    def command(self) -> str:
        """The command of its own, which is also the folder of its config."""
        return ProtocolName.parse(self.protocol).kind

    @property
    def done(self) -> bool:
        """Whether its record is there."""
        return finished(self.output) is not None

    @cached_property
    def ready(self) -> Task:
        """What it judges, as the protocol wants it."""
        return prepared(self.task, self.config)

    @cached_property
    def sources(self) -> list[Source]:
        """The features that it needs; of trials on the same images once."""
        sources = by_name(self.protocol).code().sources
        assert sources is not None
        return sources(self.ready, self.config)


def items(task: Task, chosen: Sequence[Protocol], output: Path, overrides: Sequence[str] = ()) -> list[Item]:
    """The tasks of a suite, each by its protocol as it is shipped.

    Args:
        task: what all of them judge.
        overrides: of every config: precision, workers, seed.
    """
    return [_item(task, row, output, overrides) for row in chosen]


def _item(task: Task, row: Protocol, output: Path, overrides: Sequence[str]) -> Item:
    kind, name = row.name.kind, row.name.name
    overrides = [*overrides, *feature_override(row.model, task.feature)]
    config = configs.load(name, kind, row.model, overrides)
    if isinstance(config, KnnConfig) and config.k > (bank := _bank(task)):
        config = configs.load(name, kind, row.model, [*overrides, f"k={bank}"])  # its deviation says so
    return Item(row.protocol, config, task, output / f"{kind}-{name}")


def _bank(task: Task) -> int:
    """How many training images a trial has."""
    few = task.labels_per_class
    return few * len(task.train.classes) if few else len(task.train)


def able(suite: Sequence[Item]) -> tuple[list[Item], list[str]]:
    """Look at every task before anything is done: those that can be, and why the others are left out, said as well.

    Raises:
        InputError: images that no protocol takes; none of the tasks can be done on these images with this encoder; or
            a directory holds another run.
    """
    for item in suite:
        check_images(item.task)  # refused as they are, whatever the protocol
    kept, left_out = list[Item](), list[str]()
    for item in suite:
        network(item.task.encoder, item.task.feature)
        try:
            check_task(item.ready, item.config)
            assert item.sources  # the labels of every trial can be drawn
        except InputError as error:
            left_out.append(f"{item.protocol}: {message_of(error)}")
            continue
        about = resolved(item.ready, item.config)
        if holds(item.output, about):
            finished_as(item.output, about)
        kept.append(item)
    if not kept:
        raise InputError(left_out[0])
    for reason in left_out:
        warn(f"left out: {reason}")
    return kept, left_out


# What is extracted


@dataclass(frozen=True)
class Need:
    """Features that tasks need: `protocols` say which, `images` how many of them are not in the cache."""

    source: Source
    protocols: tuple[str, ...]
    images: int


def needs(suite: Sequence[Item], cache: Path, batch_size: int = BATCH) -> list[Need]:
    """The features that tasks which are not done need, each once, to be extracted in batches of that many images."""
    wanted: dict[Path, list[tuple[Source, str]]] = {}
    for item in suite:
        for source in [] if item.done else item.sources:
            resized = replace(source, batch_size=batch_size)
            wanted.setdefault(source.folder(cache), []).append((resized, item.protocol))
    return [
        Need(uses[0][0], tuple(dict.fromkeys(protocol for _, protocol in uses)), missing(uses[0][0], cache))
        for uses in wanted.values()
    ]


@dataclass(frozen=True)
class Extraction:
    """How many images went through the network, how many were in the cache, and the seconds."""

    images: int
    cached: int
    seconds: float

    def line(self) -> str:
        """For a line of its own."""
        if not self.images:
            return "extraction: nothing was missing"
        rate = self.images / max(self.seconds, 1e-9)
        had = f"; {self.cached:,} more were in the cache" if self.cached else ""
        return f"extraction: {self.images:,} images and crops in {self.seconds:.1f} s, {rate:,.0f} a second{had}"


def run(
    suite: Sequence[Item], cache: Path, device: torch.device, batch_size: int = BATCH
) -> tuple[list[dict[str, Any]], Extraction]:
    """Extract what is missing, then do every task that is not done. Collective.

    Args:
        batch_size: of the extraction, over all processes; the protocols keep their own.
    Returns:
        The record of each task, and what was extracted.
    Raises:
        InputError, RunFailed, Interrupted: as `cache.features_of` and `judge.judge` do.
    """
    wanted = needs(suite, cache, batch_size)
    barrier()  # every process has looked
    began = time.perf_counter()
    for need in wanted:
        features_of(need.source, cache, device)
    images = sum(need.images for need in wanted)
    total = sum(len(need.source.images) for need in wanted)
    extraction = Extraction(images, total - images, time.perf_counter() - began)
    records = []
    for number, item in enumerate(suite, 1):
        log(f"{number}/{len(suite)} {item.protocol}")
        records.append(judge(item.task, item.config, item.output, device))
    return records, extraction


# How it is shown

HEADINGS = ("protocol", "metric", "value", "95 % interval", "seconds")


def table(
    records: Sequence[dict[str, Any]],
    extraction: Extraction,
    runs: Path | None = None,
    left_out: Sequence[str] = (),
) -> str:
    """The numbers of all records as text, deviations in footnotes; chance and raw pixels beside those of a small set.

    Args:
        runs: where a run of raw pixels may lie.
        left_out: tasks that could not be done, each with its reason.
    """
    data, footnotes = records[0]["dataset"], list[str]()
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in HEADINGS:
        grid.add_column(heading, justify="left" if heading in HEADINGS[:2] else "right")
    for record in records:
        for deviation in record["deviations"]:
            if deviation not in footnotes:
                footnotes.append(deviation)
        marks = "".join(f" [{footnotes.index(deviation) + 1}]" for deviation in record["deviations"])
        for number, name in enumerate(record["metrics"]):
            first = (record["protocol"] + marks, f"{record['cost']['seconds']:.1f}") if number == 0 else ("", "")
            grid.add_row(escape(first[0]), *(escape(cell) for cell in _cells(record, name)), first[1])
    return as_text(
        f"{records[0]['encoder']['path']} on {data['name']}, {data['images']:,} test images; in percent",
        grid,
        *(f"[{number}] not comparable with published numbers: {text}" for number, text in enumerate(footnotes, 1)),
        *(f"left out: {reason}" for reason in left_out),
        *_beside(records, runs),
        *(f"look: {sanity.disagreement(*apart)}" for apart in sanity.disagreements(records)),
        "interval: over test images; ±: over the repetitions named; seconds: without the extraction",
        extraction.line(),
    )


def overview(records: Sequence[dict[str, Any]]) -> str:
    """Several encoders and data sets in one table: a row for each pair of them, a column for each number."""
    columns = list(dict.fromkeys((record["protocol"], name) for record in records for name in record["metrics"]))
    rows: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for record in records:
        mark = "*" if record["deviations"] else ""
        cells = rows.setdefault((record["encoder"]["path"], record["dataset"]["name"]), {})
        for name in record["metrics"]:
            cells[record["protocol"], name] = _cells(record, name)[1] + mark
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("encoder", "data set"):
        grid.add_column(heading)
    for protocol, name in columns:
        grid.add_column(escape(f"{protocol} {name}"), justify="right")
    for (encoder, data), cells in rows.items():
        grid.add_row(escape(encoder), escape(data), *(escape(cells.get(column, "-")) for column in columns))
    return as_text(grid, "in percent; *: not comparable with published numbers, result.json says why")


def _beside(records: Sequence[dict[str, Any]], runs: Path | None) -> list[str]:
    """Chance once, and raw pixels by each protocol that they were judged by, or how to judge them."""
    lines = [
        line if line.startswith("chance") or "not measured" in line else f"{record['protocol']} of {line}"
        for record in records
        for line in sanity.beside(record, runs, "suite")
    ]
    return list(dict.fromkeys(lines))


def _cells(record: dict[str, Any], name: str) -> tuple[str, str, str]:
    std, interval = record["std"].get(name), record["interval"].get(name)
    spread = f" ± {std:.2f} ({repeats(record)})" if std is not None else ""
    bounds = f"[{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "-"
    return name, f"{record['metrics'][name]:.2f}{spread}", bounds
