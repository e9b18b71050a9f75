"""The run directory: made, opened again, refused where it holds another run."""

from pathlib import Path
from typing import Any

import yaml

from moco_eval.config import load as configs
from moco_eval.config.base import is_among
from moco_eval.config.deviations import flatten
from moco_eval.config.protocol_name import ProtocolName
from moco_eval.encoders.encoder import Encoder
from moco_eval.errors import InputError
from moco_eval.results.environment import environment
from moco_eval.results.record import SCHEMA
from moco_eval.runtime import files
from moco_eval.runtime.collectives import found_by_main

# config keys under which a run goes on although they differ: they do not change what it computes
RESUMABLE_KEYS = ("workers", "log_every", "checkpoints", "max_steps", "expect", "memory")


WHY = {"processes": " (the BN groups and the exchange of keys between them belong to the number of processes)"}


def default_output(command: str, encoder: Encoder, dataset: str, protocol: str | None = None) -> Path:
    """runs/<command>-<run name>-<sha8>-<dataset>-<protocol>: two encoders never collide. A suite has no protocol."""
    last = [ProtocolName.parse(protocol).name] if protocol else []
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
        same = holds(output, resolved)
        if (output / "result.json").is_file():
            return same  # finished: its environment is that of the run, not of whoever looks at it again
        write_resolved(output, resolved, environment(resolved.get("config", {}).get("seed")))
        return same

    return found_by_main(look)


def write_resolved(output: Path, resolved: dict[str, Any], where: dict[str, Any]) -> None:
    """config.yaml and environment.json, of what defines a run and of `environment.environment`."""
    files.write_text(output / "config.yaml", yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
    files.write_json(output / "environment.json", where)


def holds(output: Path, resolved: dict[str, Any]) -> bool:
    """Whether a directory holds this very run; raises InputError where it holds another, or something else."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; give a folder")
    if not output.is_dir() or _names(output) <= {"config.yaml", "environment.json"}:
        return False  # nothing there, or a run that was refused before it did anything
    if not (output / "config.yaml").is_file():
        raise InputError(f"--output {output} holds files that are no run of ours; choose another or empty it")
    before, _ = configs.read_yaml(output / "config.yaml")
    old, new = flatten(before), flatten(_plain(resolved))
    for key in dict.fromkeys((*new, *old)):
        kept = key.removeprefix("config.")
        if old.get(key) != new.get(key) and not is_among(kept, RESUMABLE_KEYS):
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
