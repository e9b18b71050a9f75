"""Trials that are fine-tunings: each in its folder, with trial.json last of all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moco_eval.runtime import files


def folders(output: Path, seeds: Sequence[int]) -> list[Path]:
    """Of each trial; a single one is in the run directory itself."""
    return [output if len(seeds) == 1 else output / f"trial_{seed}" for seed in seeds]


def finished(folder: Path, answers: str) -> dict[str, Any] | None:
    """What trial.json says of a trial that is finished and has its answers, the file of that name, still beside it."""
    whole = all((folder / name).is_file() for name in ("trial.json", answers))
    return files.read_json(folder / "trial.json") if whole else None
