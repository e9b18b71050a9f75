"""The commands that produce the rows of a table."""

import re
import shlex

from moco_eval.papers.tables import Recipe, Table


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
