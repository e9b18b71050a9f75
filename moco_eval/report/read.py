"""Runs as the report reads them, and the names of their encoders."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moco_eval import config, files, results
from moco_eval.errors import InputError

KINDS = ("trained", "other", "random", "pixels")  # the order of the rows


@dataclass
class Run:
    """A run directory as it was read; `record` is None for a pretraining.

    `metrics`: the lines of a pretraining's metrics.jsonl; of a detection run `trials` has those of each fine-tuning.
    """

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    record: dict[str, Any] | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    trials: list[list[dict[str, Any]]] = field(default_factory=list)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The finished evaluations and the pretrainings in these folders, each once.

    Raises:
        InputError: a path holds none, or a file is damaged.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        here = [run for folder in _folders(path) if (run := _read(folder))]
        if not here:
            raise InputError(f"{path} holds no finished run (config.yaml with result.json or metrics.jsonl)")
        runs |= {run.path.resolve(): run for run in here}
    return list(runs.values())


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise InputError(f"{path} is no folder; give run directories, or a folder that contains some")
    return sorted(file.parent for file in path.rglob("config.yaml"))


def _read(folder: Path) -> Run | None:
    values, _ = config.read_yaml(folder / "config.yaml")
    if "command" not in values or not (folder / "environment.json").is_file():
        return None
    run = Run(folder, values, files.read_json(folder / "environment.json"), results.finished(folder))
    if run.record is not None and run.record.get("schema") != results.SCHEMA:
        raise InputError(f"{folder / 'result.json'} is no {results.SCHEMA} record")
    if values["command"] == "pretrain" and (folder / "metrics.jsonl").is_file():
        run.metrics = _read_lines(folder / "metrics.jsonl")
    if values["command"] == "detect":
        paths = [folder / "metrics.jsonl", *sorted(folder.glob("trial_*/metrics.jsonl"))]
        run.trials = [lines for path in paths if path.is_file() and (lines := _read_lines(path))]
    return run if run.record or run.metrics else None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that is still being written is passed over."""
    lines = path.read_text(encoding="utf-8").splitlines()
    parsed = []
    for number, line in enumerate(lines, 1):
        try:
            parsed.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise InputError(f"{path} line {number} is not JSON") from None
    return parsed


# Names


def sha_of(run: Run) -> str:
    assert run.record
    return run.record["encoder"]["sha256"]


def kind_of(encoder: dict[str, Any]) -> str:
    pretraining = encoder["pretraining"]
    if encoder["arch"] == "pixels":
        return "pixels"
    if encoder["origin"].startswith("random") or (pretraining and pretraining.get("epochs") == 0):
        return "random"
    return "trained" if pretraining else "other"


def encoder_names(runs: Sequence[Run]) -> dict[str, str]:
    """A human name for each encoder by its sha256: 'MoCo (epoch 60)', 'random initialisation', 'raw pixels'.

    Where two encoders would share one, the run or the weights' first digits tell them apart.
    """
    encoders = {sha_of(run): run.record["encoder"] for run in runs if run.record}
    plain = {sha: _plain_name(encoder) for sha, encoder in encoders.items()}
    longer = {sha: f"{name}, {_run_name(encoders[sha])}" for sha, name in plain.items()}
    longest = {sha: f"{name}, {sha[:8]}" for sha, name in longer.items()}
    shared, still = Counter(plain.values()), Counter(longer.values())
    return {
        sha: name if shared[name] == 1 else longer[sha] if still[longer[sha]] == 1 else longest[sha]
        for sha, name in plain.items()
    }


def _plain_name(encoder: dict[str, Any]) -> str:
    kind = kind_of(encoder)
    if kind == "trained":
        return f"MoCo (epoch {encoder['pretraining']['epochs']})"
    return {"pixels": "raw pixels", "random": "random initialisation"}.get(kind) or _run_name(encoder)


def _run_name(encoder: dict[str, Any]) -> str:
    """Of runs/mine/checkpoints/last.pth 'mine', of moco_v2.pth 'moco_v2', of torchvision:resnet50 itself."""
    path = Path(encoder["path"])
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.stem
