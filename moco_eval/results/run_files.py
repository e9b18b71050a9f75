"""The files of a run, whoever wrote them: what table, report, compare, reproduce and Result.read read a run by."""

import json
import os
from pathlib import Path
from typing import Any

from moco_eval import limits
from moco_eval.config import load as configs
from moco_eval.errors import InputError
from moco_eval.results import schema
from moco_eval.results.record import SCHEMA
from moco_eval.runtime import files

# what the lines of a file may be
Lines = type[schema.LoggedStep] | type[schema.Iteration] | type[schema.JudgedCheckpoint]


def is_there(path: Path) -> bool:
    """Whether something has this name: a pipe or a broken link too, which its reader then refuses."""
    return os.path.lexists(path)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a finished run; None where there is no result.json, or one that is no run's of ours.

    What describes the run beside it, config.yaml and environment.json, is checked with it where it is there.

    Raises:
        InputError: a file is damaged, too large, or no regular file; or the record is of another version.
    """
    path = folder / "result.json"
    if not is_there(path):
        return None
    record = _json(path)
    if not is_of_ours(record):
        return None
    if record["schema"] != SCHEMA:
        raise OtherVersion(f"{path} is a {_short(record['schema'])} record, and {SCHEMA} is read; {schema.WAY_OUT}")
    schema.require(schema.Record, record, path)
    limits.require(path, "classes", record["dataset"].get("classes") or 0)
    limits.require(path, "classes", len(record.get("per_class") or {}))
    record.setdefault("interval", {})
    if is_there(folder / "config.yaml"):
        schema.require(schema.Evaluation, read_config(folder), folder / "config.yaml")
    if is_there(folder / "environment.json"):
        read_environment(folder)
    return record


class OtherVersion(InputError):
    """A record that an earlier or later version of ours has written."""


def is_of_ours(record: Any) -> bool:
    """Whether what a result.json holds says that it is a record of a run of ours, of whichever version."""
    return isinstance(record, dict) and str(record.get("schema", "")).startswith(SCHEMA.partition("@")[0])


def read_config(folder: Path) -> dict[str, Any]:
    """config.yaml of a run. Raises InputError where it is damaged."""
    try:
        return configs.read_yaml(folder / "config.yaml")[0]
    except InputError as error:
        raise InputError(f"{error}; {schema.WAY_OUT}") from None


def read_environment(folder: Path) -> dict[str, Any]:
    """environment.json of a run. Raises InputError where it is damaged."""
    path = folder / "environment.json"
    about = _json(path)
    schema.require(schema.Environment, about, path)
    return about


def read_metrics(path: Path, model: Lines) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl or curve.jsonl but for an unfinished last one, which may still be written.

    Raises:
        InputError: a line is damaged or not as `model` expects, or the file is too large.
    """
    *whole, last = files.split_lines(path) or [b""]
    lines = [_line(data, model, f"{path} line {number}") for number, data in enumerate(whole, 1)]
    try:
        return [*lines, _line(last, model, f"{path} line {len(lines) + 1}")]
    except InputError:
        if last:
            from moco_eval.runtime.console import warn

            warn(f"{path}: its last line is still being written or was cut off, and is left out")
        return lines


def _line(data: bytes, model: Lines, name: str) -> dict[str, Any]:
    try:
        line = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        raise InputError(f"{name} is not JSON; {schema.WAY_OUT}") from None
    schema.require(model, line, name)
    return line


def _json(path: Path) -> Any:
    try:
        return files.read_json(path)
    except InputError as error:
        raise InputError(f"{error}; {schema.WAY_OUT}") from None


def _short(value: Any) -> str:
    return value if len(value) <= 60 else f"{value[:57]}..."
