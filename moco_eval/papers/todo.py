"""What a table lacks of ours: the steps that would produce it, what they cost, and what cannot be had."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moco_eval.config import load as configs
from moco_eval.errors import InputError
from moco_eval.papers import steps as chain
from moco_eval.papers.match import Record
from moco_eval.papers.steps import ChainStep, Places
from moco_eval.papers.tables import Table
from moco_eval.runtime.text import duration

if TYPE_CHECKING:
    from moco_eval.papers.cost import Cost
    from moco_eval.papers.gpu_hours import GpuHours

    AnyCost = Cost | GpuHours | None

LEFT_OUT = "loading and decoding images, cutting views and fitting classifiers to extracted features are not in it"


@dataclass(frozen=True)
class Missing:
    """What is left to do for a table.

    Attributes:
        steps: in an order in which they can run, each once, with its cost; None where nothing tells it.
        reasons: why rows cannot be had, each with their labels.
        unmeasured: titles of the columns that no protocol of ours measures, with the reason where there is one.
        machine: that the costs were timed on, in words; empty where they are of published figures.
    """

    steps: list[tuple[ChainStep, "AnyCost"]] = field(default_factory=list)
    reasons: dict[str, list[str]] = field(default_factory=dict)
    unmeasured: list[str] = field(default_factory=list)
    machine: str = ""

    def of(self, row: str, column: str) -> list[tuple[ChainStep, "AnyCost"]]:
        """The steps of one cell."""
        return [(step, cost) for step, cost in self.steps if (row, column) in step.cells]

    @property
    def total(self) -> str:
        """The costs together, in words."""
        return total([cost for _, cost in self.steps])


def total(costs: "Sequence[AnyCost]") -> str:
    """Of so many steps together, in words; empty where nothing is known."""
    known = [cost for cost in costs if cost]
    unknown = len(costs) - len(known)
    more = f", and {unknown} of unknown cost" if unknown else ""
    steps = f"{len(costs)} step{'s' if costs[1:] else ''}"
    return f"{steps}, in all about {_sum(known)}{more}" if known else ""


def _sum(costs: "Sequence[Cost | GpuHours]") -> str:
    """Of one kind: seconds here, or hours of a GPU."""
    from moco_eval.papers.gpu_hours import GpuHours, amount

    hours = [cost.hours for cost in costs if isinstance(cost, GpuHours)]
    if hours:
        return f"{amount(sum(hours))} of a {next(cost.gpu for cost in costs if isinstance(cost, GpuHours))}"
    return duration(sum(cost.seconds for cost in costs if not isinstance(cost, GpuHours)))


def find(table: Table, records: Sequence[Record], places: Places, here: bool = False) -> Missing:
    """Look what is left of a table, and what it costs: by published figures, or with `here` timed on this machine.

    Raises:
        InputError: a folder is given for data that the table does not read.
    """
    reasons: dict[str, list[str]] = {}
    for row in table.rows:
        if why := chain.why_none(table, row):
            reasons.setdefault(why, []).append(row.label)
    columns = [column for column in table.columns.values() if column.protocol is None]
    unmeasured = [f"{column.title} ({column.why})" if column.why else column.title for column in columns]
    steps = chain.steps(table, table.rows, places)
    _require_read(table, steps, places)
    left = chain.left(steps, table, records)
    if not left:
        return Missing(reasons=reasons, unmeasured=unmeasured)
    where = ""
    if here:
        from moco_eval.papers.cost import machine

        where = machine()
    return Missing(list(zip(left, costs(left, table, records, here))), reasons, unmeasured, where)


def costs(steps: Sequence[ChainStep], table: Table, records: Sequence[Record], here: bool) -> "list[AnyCost]":
    """Of each step: hours of a GPU by published figures, or with `here` seconds on this machine, which is timed."""
    if here:
        from moco_eval.papers import cost

        return list(cost.costs(steps, table, records))
    from moco_eval.papers import gpu_hours

    return list(gpu_hours.costs(steps, table))


def _require_read(table: Table, steps: Sequence[ChainStep], places: Places) -> None:
    read = sorted({step.dataset for step in steps})
    for name in places.data:
        if name not in read:
            raise InputError(f"--data {name}: {table.id} reads {', '.join(read)}.{configs.did_you_mean(name, read)}")


def script(missing: Missing) -> str:
    """The commands in order: the rows that they are for and what each costs, then the command."""
    lines, before = [], None
    for step, cost in missing.steps:
        rows = "; ".join(dict.fromkeys(label for label, _ in step.cells))
        lines += [] if rows == before else [comment(rows)]
        lines += [comment(cost.phrase if cost else "cost unknown"), step.command]
        before = rows
    return "\n".join(lines)


def stopping_script(missing: Missing) -> str:
    """The same as a shell script that ends with the first command that fails."""
    if not missing.steps:
        return comment("nothing is left to run")
    unnamed = any("FOLDER" in step.arguments for step, _ in missing.steps)
    way_out = [comment("put the data set's folder in place of FOLDER, or name it: --data NAME=...")] if unnamed else []
    return "\n".join(("set -e", *way_out, script(missing)))


def comment(text: str, sign: str = "#") -> str:
    """On one line, whatever a label holds: a second line would be a command."""
    return f"{sign} {' '.join(text.split())}"
