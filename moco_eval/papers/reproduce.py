"""A published table from nothing: plan the chain of its rows, run what is left of it, step after step."""

import difflib
import fcntl
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table as RichTable

from moco_eval.config import load as configs
from moco_eval.errors import InputError, Interrupted, RunFailed
from moco_eval.papers import steps as chain
from moco_eval.papers import tables
from moco_eval.papers.match import Record
from moco_eval.papers.steps import ChainStep, Places
from moco_eval.papers.tables import Row, Table
from moco_eval.papers.todo import costs, total
from moco_eval.runtime import child, files
from moco_eval.runtime.printable import shell_join
from moco_eval.runtime.text import as_text

if TYPE_CHECKING:
    from moco_eval.papers.todo import AnyCost

AGAIN = "run the same command to go on"
# Where the pages keep data: VOC of both years in one folder, what torchvision fetches side by side, others by name.
USUAL = {
    **dict.fromkeys(("voc", "voc07"), "/datasets/VOCdevkit"),
    **dict.fromkeys(("cifar10", "cifar100", "stl10", "flowers102", "pets", "food101", "dtd"), "/datasets"),
}


@dataclass(frozen=True)
class Plan:
    """The chain of a table's rows.

    Attributes:
        steps: in an order in which they can run.
        left: those that have to run.
        left_out: rows that cannot be had, each with the reason.
    """

    table: Table
    places: Places
    steps: list[ChainStep]
    left: list[ChainStep]
    left_out: list[tuple[str, str]] = field(default_factory=list)

    @property
    def reading(self) -> list[ChainStep]:
        """The steps that are left and read data of a folder."""
        return [step for step in self.left if step.kind != "convert" and step.dataset not in chain.BUILT_IN]

    @property
    def lacking(self) -> list[str]:
        """Data sets whose folder is needed and was not named."""
        names = dict.fromkeys(step.dataset for step in self.reading)
        return [name for name in names if name not in self.places.data]


def plan(name: str, asked: Sequence[str], places: Places, records: Sequence[Record]) -> Plan:
    """What produces the rows that are asked for, all that can be had where none are, and what of it is left.

    Raises:
        InputError: no such table or row, a row that cannot be had, a data set that there is not.
    """
    table = tables.load_table(name)
    rows, left_out = choose(table, asked)
    places = replace(places, data=_folders(places))
    steps = chain.steps(table, rows, places)
    return Plan(table, places, steps, chain.left(steps, table, records), left_out)


# Which rows


def choose(table: Table, asked: Sequence[str]) -> tuple[list[Row], list[tuple[str, str]]]:
    """The rows, and those left out with why.

    Args:
        asked: labels or parts of labels, in any case; a whole label means that row alone.
    Raises:
        InputError: a part that is in no label; only rows that cannot be had; nothing in the table can be had.
    """
    parts = [_named(table, part) for part in asked] or [list(table.rows)]
    chosen = [row for row in table.rows if any(row in part for part in parts)]
    reasons = {row.label: why for row in chosen if (why := chain.why_none(table, row))}
    refused = [row for part in parts if all(row.label in reasons for row in part) for row in part]
    if refused:
        raise InputError(f"cannot be reproduced of {table.id}: {_with_reasons(refused, reasons)}")
    return [row for row in chosen if row.label not in reasons], list(reasons.items())


def _named(table: Table, part: str) -> list[Row]:
    labels = [row.label for row in table.rows]
    named = [row for row in table.rows if row.label.lower() == part.lower()]
    named = named or [row for row in table.rows if part.lower() in row.label.lower()]
    if not named:
        near = difflib.get_close_matches(part, labels, 1)
        way_out = f"Did you mean {near[0]!r}?" if near else f"Its rows: {', '.join(map(repr, labels))}."
        raise InputError(f"no row of {table.id} has {part!r} in its label. {way_out}")
    return named


def _with_reasons(rows: Sequence[Row], reasons: Mapping[str, str], shown: int = 5) -> str:
    """The labels, each with why there is nothing of ours."""
    refusals = [f"{label!r} ({reasons[label]})" for label in dict.fromkeys(row.label for row in rows)]
    return ", ".join(refusals[:shown]) + (f", and {len(refusals) - shown} more" if refusals[shown:] else "")


# Data


def _folders(places: Places) -> Mapping[str, Path]:
    """The folders that are named, and MOCO_EVAL_DATA for all others."""
    from moco_eval.data import catalogue
    from moco_eval.data.boxes import check

    known = sorted({*catalogue.NAMES, *check.NAMES})
    for name in places.data:
        if name not in known:
            raise InputError(f"--data {name}=...: no data set {name!r}.{configs.did_you_mean(name, known)}")
    everywhere = os.environ.get("MOCO_EVAL_DATA")
    return (dict.fromkeys(known, Path(everywhere)) if everywhere else {}) | dict(places.data)


def check(plan: Plan, asked: Sequence[str], could_start: Callable[..., object]) -> None:
    """Look whether every step that is left could start, as far as its data tell.

    Args:
        asked: the words of the command, to be shown with what they lack.
        could_start: `pretraining.plan.plan`, which checks a config, a data set, its folder and a number of processes.
    Raises:
        InputError: data that are not named, not there, or too few for a pretraining.
    """
    if plan.lacking:
        more = [word for name in plan.lacking for word in ("--data", f"{name}={USUAL.get(name, f'/datasets/{name}')}")]
        raise InputError(
            f"{plan.table.id} needs the folder of {' and of '.join(plan.lacking)}; for example: "
            f"{shell_join((*asked, *more))}"
        )
    looked_at = set()
    for step in plan.left:
        source = (step.dataset, step.arguments[0], step.name if step.arguments[0] == "detect" else "")
        if step.recipe or (step in plan.reading and source not in looked_at):
            _check(step, plan.places, could_start)
        looked_at.add(source)


def _check(step: ChainStep, places: Places, could_start: Callable[..., object]) -> None:
    """Open a step's data as the step will. Raises InputError."""
    from moco_eval.config.detection import DetectConfig
    from moco_eval.data.catalogue import open_splits
    from moco_eval.detection.task import open_data
    from moco_eval.segmentation.task import open_data as open_masks

    folder = places.data.get(step.dataset)
    try:
        if step.recipe:
            could_start(step.recipe.resolved(), step.dataset, folder, places.processes)
        elif step.arguments[0] == "detect":
            open_data(step.dataset, folder, (None, None), configs.load(step.name, "detect", DetectConfig))
        elif step.arguments[0] == "segment":
            open_masks(step.dataset, folder)
        else:
            open_splits(step.dataset, folder)
    except InputError as error:
        raise InputError(f"{_title(step)}: {error}") from None


# The plan in words


def costs_of(plan: Plan, records: Sequence[Record], here: bool = False) -> "list[AnyCost]":
    """What each step that is left costs, as for a table: by published figures, or with `here` timed on this machine."""
    return costs(plan.left, plan.table, records, here) if plan.left else []


def describe(plan: Plan, jobs: Mapping[Path, str], costs: "Sequence[AnyCost]" = ()) -> str:
    """Each step with its state, and the rows that are left out; with the costs also the commands that are left.

    Args:
        jobs: what SLURM says of a step, by its output.
        costs: of the steps that are left; None where nothing tells one. Empty where nobody asks.
    """
    grid = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("step", "rows", "state", *(["costs"] if costs else [])):
        grid.add_column(heading)
    takes = {step.arguments: cost.phrase if cost else "not known" for step, cost in zip(plan.left, costs)}
    for step in plan.steps:
        rows = "; ".join(dict.fromkeys(label for label, _ in step.cells))
        cells = (_title(step), rows, _state(step, plan, jobs), takes.get(step.arguments, ""))
        grid.add_row(*(escape(cell) for cell in cells[: len(grid.columns)]))
    shown = as_text(grid, *(f"left out: {label}: {why}" for label, why in plan.left_out))
    if not costs:
        return shown
    # not through rich, which would break commands at the terminal's width
    return "\n".join(filter(None, (shown, *(step.command for step in plan.left), total(costs))))


def _title(step: ChainStep) -> str:
    if step.kind == "convert":
        return "convert to detectron2"
    return f"{step.arguments[0]} {step.name} on {step.dataset}"


def _state(step: ChainStep, plan: Plan, jobs: Mapping[Path, str]) -> str:
    if step not in plan.left:
        done = chain.is_done(step, plan.table, ()) or step.kind == "evaluate"
        return "done" if done else "not needed"  # all that it is for is done
    if step.output in jobs:
        return jobs[step.output]
    if step in plan.reading and step.dataset in plan.lacking:
        return f"data missing: {step.dataset}"
    return "begun" if step.output.exists() else "left"


# Running


@contextmanager
def alone(runs: Path) -> Iterator[IO[Any]]:
    """Yield a locked file, whose lock a step's process shares; raises InputError where another has it.

    So the step of a killed `reproduce` keeps the next one away until it ends.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("reproduce starts the processes of its steps itself: give it --nproc, not torchrun")
    try:
        runs.mkdir(parents=True, exist_ok=True)
        lock = files.lock_file(runs / ".reproduce.lock")
    except OSError as error:
        raise InputError(f"cannot write --runs {runs}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another reproduce, or a step that it left running, is at work in {runs}; wait, or take another --runs"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield lock


def run(plan: Plan, jobs: Mapping[Path, str], lock: IO[Any]) -> None:
    """Run what is left, in order, each step a process of its own that resumes as the command itself does.

    Raises:
        InputError: a step is a SLURM job's.
        InputError, RunFailed: a step was refused, or has failed; those after it have not run.
        Interrupted: told to stop; the step was told too, and has saved what it does.
    """
    from moco_eval.runtime.console import tell

    for step in plan.left:
        if step.output in jobs:
            raise InputError(f"{step.output} is a SLURM job's ({jobs[step.output]}); take --slurm, or scancel the job")
    for number, step in enumerate(plan.left, 1):
        tell(f"step {number} of {len(plan.left)}: {step.command}")
        code, told = child.run(step.arguments, [lock.fileno()])
        where = f"step {number} of {len(plan.left)}"
        if told or code == 3:
            raise Interrupted(f"stopped in {where}; {AGAIN}")
        if code == 2:
            raise InputError(f"{where} was refused, see above: {step.command}")
        if code:
            how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            raise RunFailed(f"{where} failed ({how}): {step.command}; {AGAIN}")
