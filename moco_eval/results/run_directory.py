"""The run directory: made, opened again, refused where it holds another run."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from moco_eval.config import load as configs
from moco_eval.config.base import is_among
from moco_eval.config.data_name import agree
from moco_eval.config.deviations import flatten
from moco_eval.config.protocol_name import ProtocolName
from moco_eval.errors import InputError
from moco_eval.results import run_files
from moco_eval.results.environment import environment
from moco_eval.runtime import files, lock
from moco_eval.runtime.console import LOG, logged, warn

if TYPE_CHECKING:  # whoever looks into a run directory needs no torch
    from moco_eval.encoders.encoder import Encoder

# config keys under which a run goes on although they differ: they do not change what it computes
RESUMABLE_KEYS = ("workers", "log_every", "checkpoints", "max_steps", "expect", "memory")
NAMES = ("dataset", "dataset.name", "dataset.train.name", "dataset.test.name")  # fingerprints tell data apart
BEGUN = {"config.yaml", "environment.json", LOG}  # what a run has before it does anything
WHY = {"processes": " (the BN groups and the exchange of keys between them belong to the number of processes)"}


def default_output(command: str, encoder: "Encoder", dataset: str, protocol: str | None = None) -> Path:
    """runs/<command>-<run name>-<sha8>-<dataset>-<protocol>: two encoders never collide. A suite has no protocol."""
    last = [ProtocolName.parse(protocol).name] if protocol else []
    return Path("runs") / "-".join((command, encoder.run_name, encoder.sha256[:8], dataset, *last))


@contextmanager
def open_run(output: Path, resolved: dict[str, Any]) -> Iterator[bool]:
    """Make or re-open a run directory, and hold it: no other command works there until the end. Collective.

    Args:
        output: the directory; made if it is not there.
        resolved: everything that defines the run (config, data, weights); written to config.yaml.
    Yields:
        Whether the directory already held this very run.
    Raises:
        InputError: it holds another run or something else, another command works there, or it cannot be written.
    """
    from moco_eval.runtime.collectives import found_by_main

    with ExitStack() as stack:

        def look() -> bool:
            _require_ours(output)
            done = (output / "result.json").is_file()
            if not done or os.access(output, os.W_OK):  # a finished run may have been put away where nobody writes
                stack.enter_context(lock.alone(output))
            same = holds(output, resolved)
            if not done:  # else its environment is that of the run, not of who looks
                write_resolved(output, resolved, environment(resolved.get("config", {}).get("seed")))
                stack.enter_context(logged(output))
            return same

        yield found_by_main(look)


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """A folder of run directories, which one command fills one after the other. Collective; raises as `open_run`."""
    from moco_eval.runtime.collectives import found_by_main

    with ExitStack() as stack:
        found_by_main(lambda: stack.enter_context(lock.alone(folder)))
        yield


def write_resolved(output: Path, resolved: dict[str, Any], where: dict[str, Any]) -> None:
    """config.yaml and environment.json, of what defines a run and of `environment.environment`."""
    files.write_text(output / "config.yaml", yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
    files.write_json(output / "environment.json", where)


def holds(output: Path, resolved: dict[str, Any]) -> bool:
    """Whether a directory holds this very run; raises InputError where it holds another, or something else."""
    _require_ours(output)
    if not output.is_dir() or _names(output) <= BEGUN:
        return False  # nothing there, or a run that was refused before it did anything
    before, _ = configs.read_yaml(output / "config.yaml")
    old, new = flatten(before), flatten(_plain(resolved))
    for key in dict.fromkeys((*new, *old)):
        kept = key.removeprefix("config.")
        if key in NAMES and agree(old.get(key), new.get(key)):
            continue
        if old.get(key) != new.get(key) and not is_among(kept, RESUMABLE_KEYS):
            raise InputError(
                f"--output {output} holds another run: {key} is {old.get(key)} there and {new.get(key)} now"
                f"{WHY.get(key, '')}; choose another --output"
            )
    return True


def _require_ours(output: Path) -> None:
    """Raises InputError where something else than a run is there."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; give a folder")
    if output.is_dir() and not _names(output) <= BEGUN and not (output / "config.yaml").is_file():
        raise InputError(f"--output {output} holds files that are no run of ours; choose another or empty it")


def _names(folder: Path) -> set[str]:
    """What is in a folder, but for files that a killed process was still writing."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return yaml.safe_load(yaml.safe_dump(values, sort_keys=False))


def finished(output: Path) -> dict[str, Any] | None:
    """The record of a run that is already done. Raises InputError where it is damaged, or something else."""
    record = run_files.read_record(output)
    if record is None and run_files.is_there(output / "result.json"):
        raise InputError(f"{output / 'result.json'} is no result record of ours; remove it, or choose another --output")
    return record


def finished_as(
    output: Path, resolved: dict[str, Any], deviations: Sequence[str] | None = None
) -> dict[str, Any] | None:
    """The record of this very run, where it is already done.

    Args:
        resolved: what `open_run` was given.
        deviations: those of the config, in words; None where nobody asks.
    Raises:
        InputError: the record is of another protocol, data set, encoder, seed or config than the directory.
    """
    record = finished(output)
    if record is None:
        return None
    stated, wanted = _of_record(record), _of_resolved(resolved)
    if deviations is not None:
        keys = flatten(resolved["config"])
        about = (record.get("deviations", []), deviations)
        stated["settings"], wanted["settings"] = (
            "; ".join(sorted(words for words in several if words.split(" ")[0] in keys)) for several in about
        )
    for name, value in wanted.items():
        if name == "data set" and agree(stated[name], value):
            continue
        if value is not None and stated[name] != value:
            raise InputError(
                f"{output / 'result.json'} is of another run than config.yaml beside it: its {name} is "
                f"{stated[name] or 'the usual'}, not {value or 'the usual'}; move that folder away and run this again"
            )
    return record


def _of_record(record: dict[str, Any]) -> dict[str, Any]:
    """What a record says of the run that it is of."""
    dataset, encoder = record.get("dataset", {}), record.get("encoder", {})
    return {
        "protocol": record.get("protocol"),
        "data set": dataset.get("name"),
        "data set's fingerprint": dataset.get("fingerprint"),
        "encoder's sha256": encoder.get("sha256"),
        "encoder": encoder.get("which", "query"),
        "seeds": [trial.get("seed") for trial in record.get("trials", [])],
    }


def _of_resolved(resolved: dict[str, Any]) -> dict[str, Any]:
    """The same as the configuration says it; None where it leaves it open."""
    dataset, encoder, config = resolved["dataset"], resolved["encoder"], resolved["config"]
    test = {"name": dataset, **resolved} if isinstance(dataset, str) else dataset["test"]  # of a detection: the name
    return {
        "protocol": config["protocol"],
        "data set": test["name"],
        "data set's fingerprint": test["fingerprint"],
        "encoder's sha256": encoder["sha256"],
        "encoder": encoder["which"],
        "seeds": [config["seed"] + trial for trial in range(resolved["trials"])],
    }


def read(folder: Path) -> list[dict[str, Any]]:
    """Every result record below a folder, each with its run directory under `run`.

    A result.json that does not say it is ours is passed over, and so, with a warning, is one of another version.

    Raises:
        InputError: the folder does not exist, a file of a run is damaged, or its own record is of another version.
    """
    if not folder.is_dir():
        way_out = "give the folder that holds your runs; commands put them below runs/ where they are started"
        raise InputError(f"--runs {folder} does not exist; {way_out}")
    places = files.folders_with(folder, "result.json")
    records = [(place, _read_or_pass(place, place == folder)) for place in places]
    return [record | {"run": str(place)} for place, record in records if record]


def _read_or_pass(place: Path, is_asked_for: bool) -> dict[str, Any] | None:
    try:
        return run_files.read_record(place)
    except run_files.OtherVersion as error:
        if is_asked_for:
            raise
        warn(f"{error}; it is passed over")
        return None
