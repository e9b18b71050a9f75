"""The run directory and the result record: what was done, on what, with which weights, and how it came out."""

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel

from moco_eval import __version__
from moco_eval.config import load as configs
from moco_eval.encoders.encoder import Encoder
from moco_eval.errors import InputError
from moco_eval.results.statistics import REPEATS, summarise
from moco_eval.runtime import files
from moco_eval.runtime.device import found_by_main, is_main, log

SCHEMA = "moco-eval/result@1"
LIBRARIES = ("torch", "torchvision", "numpy", "scikit-learn", "pycocotools", "pillow", "detectron2")
# config keys under which a run goes on although they differ: they do not change what it computes
RESUMABLE_KEYS = ("workers", "log_every", "checkpoints", "max_steps", "expect", "memory")
WHY = {"processes": " (the BN groups and the exchange of keys between them belong to the number of processes)"}


def default_output(command: str, encoder: Encoder, dataset: str, protocol: str | None = None) -> Path:
    """runs/<command>-<run name>-<sha8>-<dataset>-<protocol>: two encoders never collide. A suite has no protocol."""
    last = [protocol.split("@")[0].split("/")[-1]] if protocol else []
    return Path("runs") / "-".join((command, encoder.run_name, encoder.sha256[:8], dataset, *last))


def open_run(output: Path, resolved: dict[str, Any]) -> bool:
    """Make or re-open a run directory.

    Args:
        output: the directory; made if it is not there.
        resolved: everything that defines the run (config, data, weights); written to config.yaml.
    Returns:
        Whether the directory already held this very run.
    Raises:
        InputError: it holds another run or something else, or cannot be written.
    """

    def look() -> bool:
        found = holds(output, resolved)
        if (output / "result.json").is_file():
            return found  # finished: its environment is that of the run, not of whoever looks at it again
        files.write_text(output / "config.yaml", yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
        files.write_json(output / "environment.json", environment(resolved.get("config", {}).get("seed")))
        return found

    return found_by_main(look)


def holds(output: Path, resolved: dict[str, Any]) -> bool:
    """Whether a directory holds this very run; raises InputError where it holds another, or something else."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; give a folder")
    if not output.is_dir() or _names(output) <= {"config.yaml", "environment.json"}:
        return False  # nothing there, or a run that was refused before it did anything
    if not (output / "config.yaml").is_file():
        raise InputError(f"--output {output} holds files that are no run of ours; choose another or empty it")
    before, _ = configs.read_yaml(output / "config.yaml")
    old, new = configs.flatten(before), configs.flatten(_plain(resolved))
    for key in dict.fromkeys((*new, *old)):
        kept = key.removeprefix("config.")
        if old.get(key) != new.get(key) and not kept.startswith(RESUMABLE_KEYS):
            raise InputError(
                f"--output {output} holds another run: {key} is {old.get(key)} there and {new.get(key)} now"
                f"{WHY.get(key, '')}; choose another --output"
            )
    return True


def _names(folder: Path) -> set[str]:
    """What is in a folder, but for files that a killed process was still writing."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return yaml.safe_load(yaml.safe_dump(values, sort_keys=False))


def environment(seed: int | None = None) -> dict[str, Any]:
    """Command line, versions, hardware, git commit, seed."""
    return {
        "command": shlex.join(["moco-eval", *sys.argv[1:]]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {"moco-eval": __version__, "python": platform.python_version()}
        | {
            name: _version(name)
            for name in ("torch", "torchvision", "numpy", "scikit-learn", "pycocotools", "pillow", "detectron2")
        },
        "hardware": hardware(),
        "commit": _commit(),
        "seed": seed,
    }


def hardware() -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # or it runs from its source
        return getattr(sys.modules.get(name), "__version__", None)


def _commit() -> str | None:
    """The commit of the clone we run from; None from an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        shown = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return shown.stdout.strip()


@dataclass
class Cost:
    """Seconds, images and peak memory of an evaluation, over its sessions.

    `images`: what it looked at, epochs counted; `cached_images`: those of them whose features were there already.
    """

    device: str
    seconds: float = 0.0
    images: int = 0
    cached_images: int = 0

    @contextmanager
    def clock(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start

    def record(self) -> dict[str, Any]:
        return {
            "seconds": round(self.seconds, 2),
            "images": self.images,
            "cached_images": self.cached_images,
            "peak_memory_MB": peak_memory_mb(self.device),
            "device": self.device,
        }


def peak_memory_mb(device: str) -> float:
    """Peak memory of this process in MB: on the GPU where one is used, resident otherwise."""
    if device.startswith("cuda"):
        return round(torch.cuda.max_memory_allocated() / 1e6, 1)
    import resource

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(kilobytes / (1e6 if sys.platform == "darwin" else 1e3), 1)


@dataclass
class Result:
    """The result record; percent under `metrics`. Field meanings: docs/results.md.

    `over` says what the trials vary: head, labels (which few are drawn), finetune or pretrain; `interval` is over test
    images, per metric.
    `deviations` are the differences from the protocol that may move the number; empty means comparable.
    """

    protocol: str
    dataset: dict[str, Any]
    encoder: Encoder
    trials: list[dict[str, Any]]
    over: str
    selection: str
    cost: Cost
    interval: dict[str, tuple[float, float]] = field(default_factory=dict)
    equivalences: list[str] = field(default_factory=list)
    deviations: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        metrics, std = summarise([trial["metrics"] for trial in self.trials])
        return {
            "schema": SCHEMA,
            "protocol": self.protocol,
            "dataset": self.dataset,
            "encoder": self.encoder.record(),
            "metrics": metrics,
            "std": std,
            "interval": {name: list(bounds) for name, bounds in self.interval.items()},
            "trials": self.trials,
            "over": self.over,
            "selection": self.selection,
            "equivalences": [*self.equivalences, *self.encoder.equivalences()],
            "deviations": [*self.deviations, *self.encoder.deviations()],
            "cost": self.cost.record(),
            "environment": environment(),
        } | self.extra

    def write(self, output: Path) -> dict[str, Any]:
        """Write result.json (first process only) and say where; returns the record."""
        record = self.record()
        if is_main():
            files.write_json(output / "result.json", record)
            log(f"result: {output / 'result.json'}")
        return record


def repeats(record: dict[str, Any]) -> str:
    """How many trials a record has, and of what: '5 label draws'."""
    over = record["over"]
    if over == "head" and record["dataset"].get("labels_per_class"):
        over = "labels"  # as records said before label draws had a word of their own
    return f"{len(record['trials'])} {REPEATS.get(over, over)}"


def finished(output: Path) -> dict[str, Any] | None:
    """The record of a run that is already done."""
    path = output / "result.json"
    if not path.is_file():
        return None
    record = files.read_json(path)
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise InputError(f"{path} is no result record of ours; remove it, or choose another --output")
    return record


def read(folder: Path) -> list[dict[str, Any]]:
    """Every result record below a folder, each with its run directory under `run`; other files are passed over.

    Raises:
        InputError: the folder does not exist, or a result.json is damaged.
    """
    if not folder.is_dir():
        raise InputError(f"--runs {folder} does not exist")
    records = []
    for path in sorted(folder.rglob("result.json")):
        try:
            record = files.read_json(path)
        except InputError as error:
            raise InputError(f"{error}; remove that file, and running the command again makes it anew") from None
        if isinstance(record, dict) and record.get("schema") == SCHEMA:
            records.append(record | {"run": str(path.parent)})
    return records


def deviations(ours: BaseModel, canonical: BaseModel, free: tuple[str, ...] = ()) -> list[str]:
    """Differences of a config from its protocol's, in words; see `config.differences`."""
    return configs.differences(ours, canonical, free)
