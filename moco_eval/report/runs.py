"""Runs as the report reads them, and the names of their encoders."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from moco_eval.errors import InputError
from moco_eval.results import run_files, schema
from moco_eval.results.record import DENSE
from moco_eval.results.run_directory import finished
from moco_eval.runtime import files

KINDS = ("trained", "other", "random", "pixels")  # the order of the rows
MOCO_PROTOCOLS = ("pretrain/moco", "pretrain/cifar10-demo")  # those of our own pretraining
MOCO_ORIGINS = ("facebookresearch/moco", "moco-eval")


@dataclass
class Run:
    """A run directory as it was read; `record` is None for a pretraining.

    `metrics`: the lines of a pretraining's metrics.jsonl; of a dense task `trials` has those of each training.
    `name`: the folder's name, with folders above it where runs that were read together share one.
    """

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    record: dict[str, Any] | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    trials: list[list[dict[str, Any]]] = field(default_factory=list)
    name: str = ""

    def __post_init__(self) -> None:
        self.name = self.name or _last(self.path, 1)

    @property
    def time(self) -> float:
        """When it was begun, in seconds of the epoch; 0 where its environment does not say."""
        try:
            return datetime.strptime(self.environment.get("time", ""), "%Y-%m-%dT%H:%M:%S%z").timestamp()
        except (ValueError, OverflowError):
            return 0.0


def _last(path: Path, count: int) -> str:
    """The last names of a path, as text: bytes that are no UTF-8 as backslashes."""
    resolved = path.resolve()
    return os.fsencode("/".join(resolved.parts[-count:])).decode("utf-8", "backslashreplace")


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
    _name(list(runs.values()))
    return list(runs.values())


def _name(runs: Sequence[Run]) -> None:
    """Give runs that share a name as many of the folders above as tell them apart."""
    deepest = max((len(run.path.resolve().parts) for run in runs), default=0)
    for count in range(2, deepest + 1):
        often = Counter(run.name for run in runs)
        for run in runs:
            if often[run.name] > 1:
                run.name = _last(run.path, count)


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise InputError(f"{path} is no folder; give run directories, or a folder that contains some")
    return files.folders_with(path, "config.yaml")


def _read(folder: Path) -> Run | None:
    """Raises InputError where a file of the run lacks what a report needs."""
    values = run_files.read_config(folder)
    if "command" not in values or not run_files.is_there(folder / "environment.json"):
        return None
    run = Run(folder, values, run_files.read_environment(folder), finished(folder))
    metrics = folder / "metrics.jsonl"
    if values["command"] == "pretrain" and run_files.is_there(metrics):
        run.metrics = run_files.read_metrics(metrics, schema.LoggedStep)
    if values["command"] in DENSE:
        paths = [path for path in (metrics, *sorted(folder.glob("trial_*/metrics.jsonl"))) if run_files.is_there(path)]
        run.trials = [lines for path in paths if (lines := run_files.read_metrics(path, schema.Iteration))]
    if not (run.record or run.metrics):
        return None
    schema.require(schema.Evaluation if run.record else schema.Pretraining, values, folder / "config.yaml")
    return run


# Names


def sha_of(run: Run) -> str:
    """What tells encoders apart: the file's sha256, and which encoder of the file where it is not the query encoder."""
    assert run.record
    which = _which(run.record["encoder"])
    return run.record["encoder"]["sha256"] + (f":{which}" if which != "query" else "")


def _which(encoder: dict[str, Any]) -> str:
    return encoder.get("which", "query")


def kind_of(encoder: dict[str, Any]) -> str:
    pretraining = encoder["pretraining"]
    if encoder["arch"] == "pixels":
        return "pixels"
    if encoder["origin"].startswith("random") or (
        pretraining and pretraining.get("epochs") == 0 and not pretraining.get("steps")
    ):
        return "random"
    return "trained" if pretraining else "other"


def encoder_names(runs: Sequence[Run]) -> dict[str, str]:
    """A human name for each encoder by `sha_of`: 'MoCo v2 (epoch 60)', 'random initialisation', 'raw pixels'.

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
    if kind == "trained" and _is_moco(encoder):
        epochs = encoder["pretraining"].get("epochs")
        name = method(encoder["pretraining"].get("protocol") or "", encoder["origin"])
        name += "" if epochs is None else f" (epoch {epochs})"
    else:
        name = {"pixels": "raw pixels", "random": "random initialisation"}.get(kind) or _run_name(encoder)
    which = _which(encoder)
    return name if which == "query" else f"{name}, {which} encoder"


def trained_by(run: Run) -> str:
    """A pretraining by what it trains and on what: 'MoCo v2 on digits, 20 epochs'."""
    config, data = run.config.get("config") or {}, run.config.get("dataset")
    name = data.get("name") if isinstance(data, dict) else data
    epochs = (config.get("schedule") or {}).get("epochs") if isinstance(config.get("schedule"), dict) else None
    parts = [method(str(config.get("protocol") or "")), f"on {name}" if name else ""]
    return " ".join(filter(None, parts)) + (f", {epochs} epochs" if isinstance(epochs, int) else "")


def method(protocol: str, origin: str = "") -> str:
    """MoCo v2 of pretrain/moco-v2@1, or of the layout facebookresearch/moco v2; MoCo where neither says the version."""
    version = re.match(r"pretrain/moco-(v\d)", protocol) or re.search(r"facebookresearch/moco (v\d)", origin)
    return f"MoCo {version[1]}" if version else "MoCo"


def _is_moco(encoder: dict[str, Any]) -> bool:
    """Whether MoCo trained it: our pretraining says so, or the layout that it, or what it was copied from, has."""
    protocol = encoder["pretraining"].get("protocol") or ""
    made_of = encoder["origin"].split(", from ")[-1]
    return protocol.startswith(MOCO_PROTOCOLS) or made_of.startswith(MOCO_ORIGINS)


def _run_name(encoder: dict[str, Any]) -> str:
    """Of runs/mine/checkpoints/last.pth 'mine', of moco_v2.pth 'moco_v2', of torchvision:resnet50 itself."""
    path = Path(encoder["path"])
    run = path.parent.parent.name if path.parent.name == "checkpoints" else ""
    return run or path.stem
