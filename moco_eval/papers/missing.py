"""What a table lacks of ours: the steps that would produce it, what they cost here, and what cannot be had."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moco_eval.papers import chain
from moco_eval.papers.beside import Record
from moco_eval.papers.chain import Places, Step
from moco_eval.papers.tables import Table
from moco_eval.text import duration

if TYPE_CHECKING:
    from moco_eval.papers.cost import Cost

LEFT_OUT = "loading and decoding images, cutting views and fitting classifiers to extracted features are not in it"


@dataclass(frozen=True)
class Missing:
    """What is left to do for a table.

    Attributes:
        steps: in an order in which they can run, each once, with its cost; None where nothing tells it.
        reasons: why rows cannot be had, each with their labels.
        unmeasured: titles of the columns that no protocol of ours measures.
        machine: for which the costs are, in words; empty where there is no step.
    """

    steps: list[tuple[Step, "Cost | None"]] = field(default_factory=list)
    reasons: dict[str, list[str]] = field(default_factory=dict)
    unmeasured: list[str] = field(default_factory=list)
    machine: str = ""

    def of(self, row: str, column: str) -> list[tuple[Step, "Cost | None"]]:
        """The steps of one cell."""
        return [(step, cost) for step, cost in self.steps if (row, column) in step.cells]

    @property
    def total(self) -> str:
        """The costs together, in words."""
        known = [cost.seconds for _, cost in self.steps if cost]
        unknown = len(self.steps) - len(known)
        more = f", and {unknown} of unknown cost" if unknown else ""
        return f"{len(self.steps)} steps, in all about {duration(sum(known))}{more}" if known else ""


def find(table: Table, records: Sequence[Record], places: Places) -> Missing:
    """Look what is left of a table, and time what it takes; this imports torch, unless nothing is left."""
    reasons: dict[str, list[str]] = {}
    for row in table.rows:
        if row.unavailable:
            reasons.setdefault(row.unavailable, []).append(row.label)
    unmeasured = [column.title for column in table.columns.values() if column.protocol is None]
    steps = left(table, records, places)
    if not steps:
        return Missing(reasons=reasons, unmeasured=unmeasured)
    from moco_eval.papers.cost import costs, machine

    return Missing(list(zip(steps, costs(steps, table, records))), reasons, unmeasured, machine())


def left(table: Table, records: Sequence[Record], places: Places) -> list[Step]:
    """The steps that are not done, but for those whose outcome nothing waits for."""
    steps = chain.steps(table, table.rows, places)
    todo = [step for step in steps if not chain.is_done(step, table, records)]
    return [step for step in todo if _is_awaited(step, steps, todo)]


def _is_awaited(step: Step, steps: Sequence[Step], todo: Sequence[Step]) -> bool:
    """An evaluation always; a conversion by a detection; a pretraining by anything, or for its own sake."""
    if step.kind == "evaluate":
        return True
    source = step.words if step.kind == "pretrain" else step.after and step.after.words
    after = [one for one in steps if one.kind == "evaluate" and one.after and one.after.words == source]
    if step.kind == "convert":
        after = [one for one in after if one.words[0] == "detect"]
    elif not after:
        return True
    return any(one.words == other.words for one in after for other in todo)


def script(missing: Missing) -> str:
    """The commands as a shell script: what each is for, the command, what it costs."""
    lines = []
    for step, cost in missing.steps:
        rows = dict.fromkeys(label for label, _ in step.cells)
        lines += [f"# {'; '.join(rows)}", step.command, f"# {cost.words if cost else 'cost unknown'}"]
    return "\n".join(lines)
