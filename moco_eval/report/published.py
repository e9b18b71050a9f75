"""The published training log of a recipe, for a pretraining that follows that recipe."""

from typing import Any

from moco_eval.config import deviations as configs
from moco_eval.papers.match import is_pretrained
from moco_eval.papers.tables import Curve, RowRecipe, load_table, tables
from moco_eval.report.runs import Run


def published(run: Run) -> Curve | None:
    """The log that was published for the recipe of a pretraining, finished or not; None where there is none.

    A table's log is of its recipe as shipped, nothing set.
    """
    for name, _ in tables():
        table = load_table(name)
        for row in table.rows if table.curve else ():
            if row.recipe and not row.recipe.set and _follows(run.config, row.recipe):
                return table.curve
    return None


def _follows(values: dict[str, Any], recipe: RowRecipe) -> bool:
    settings = values.get("config") or {}
    about = {**values, "protocol": settings.get("protocol"), "epochs": configs.flatten(settings).get("schedule.epochs")}
    if not isinstance(values.get("dataset"), dict):
        return False
    return is_pretrained({"arch": settings.get("arch"), "pretraining": about}, recipe)


def in_steps(curve: Curve, lines: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(step, loss) of the published log, an epoch's mean loss at its middle, in the steps of our run.

    Args:
        lines: of our run, with `step` and `epoch`.
    """
    last = max(lines, key=lambda line: line["step"])
    per_epoch = last["step"] / last["epoch"]
    return [(per_epoch * (point.epoch - 0.5), point.train_loss) for point in curve.points]
