"""What a table lacks of ours: the steps that would produce it, what they cost here, and what cannot be had."""

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

LEFT_OUT = "loading and decoding images, cutting views and fitting classifiers to extracted features are not in it"


@dataclass(frozen=True)
class Missing:
    """What is left to do for a table.

    Attributes:
        steps: in an order in which they can run, each once, with its cost; None where nothing tells it.
        reasons: why rows cannot be had, each with their labels.
        unmeasured: titles of the columns that no protocol of ours measures, with the reason where there is one.
        machine: for which the costs are, in words; empty where there is no step.
    """

    steps: list[tuple[ChainStep, "Cost | None"]] = field(default_factory=list)
    reasons: dict[str, list[str]] = field(default_factory=dict)
    unmeasured: list[str] = field(default_factory=list)
    machine: str = ""

    def of(self, row: str, column: str) -> list[tuple[ChainStep, "Cost | None"]]:
        """The steps of one cell."""
        return [(step, cost) for step, cost in self.steps if (row, column) in step.cells]

    @property
    def total(self) -> str:
        """The costs together, in words."""
        return total([cost for _, cost in self.steps])


def total(costs: "Sequence[Cost | None]") -> str:
    """Of so many steps together, in words; empty where nothing is known."""
    known = [cost.seconds for cost in costs if cost]
    unknown = len(costs) - len(known)
    more = f", and {unknown} of unknown cost" if unknown else ""
    steps = f"{len(costs)} step{'s' if costs[1:] else ''}"
    return f"{steps}, in all about {duration(sum(known))}{more}" if known else ""


def find(table: Table, records: Sequence[Record], places: Places) -> Missing:
    """Look what is left of a table, and time what it takes; this imports torch, unless nothing is left.

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
    from moco_eval.papers.cost import costs, machine

    return Missing(list(zip(left, costs(left, table, records))), reasons, unmeasured, machine())


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
