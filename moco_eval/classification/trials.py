"""The trials of an evaluation: run in memory, or kept on disk and not repeated, by any number of processes."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moco_eval.classification.task import Outcome, Task, Trial
from moco_eval.errors import RunFailed
from moco_eval.results.record import Cost
from moco_eval.runtime import files
from moco_eval.runtime.collectives import barrier, from_main
from moco_eval.runtime.console import warn
from moco_eval.runtime.rank import is_main, world_size
from moco_eval.untrusted import npz

ARRAY, FURTHER = "array_", "further_"  # before the names of an outcome's arrays, and further scores, in a trial's file
BEAT, PATIENCE = 10.0, 300.0  # seconds between two signs of life, and without one until a process is given up


def in_memory(task: Task, config: Any, trial: Trial, cost: Cost, device: torch.device) -> list[Outcome]:
    """The outcome of every trial; nothing is written. Every process calls it, and has them all afterwards."""
    outcomes = []
    for seed in task.seeds(config):
        task.cached.clear()
        with cost.clock():
            outcome = trial(task, config, seed, None, device)
        outcome = Outcome(**from_main([outcome and vars(outcome)])[0])
        cost.images += outcome.images
        cost.cached_images += task.cached.total()
        outcomes.append(outcome)
    return outcomes


def kept(task: Task, config: Any, trial: Trial, cost: Cost, device: torch.device, output: Path) -> list[Outcome]:
    """The outcome of every trial, each made, or as an earlier session kept it below `output`.

    Every process calls it, and has read them all afterwards.

    Raises:
        RunFailed: the process that works on a trial shows no life.
    """
    outcomes = []
    for index, seed in enumerate(task.seeds(config)):
        place = output / f"trial_{index}"
        if not from_main([_is_whole(place.with_suffix(".npz"))])[0]:
            _run(task, config, trial, seed, place, device)
        outcomes.append(_read(place.with_suffix(".npz"), cost))
    barrier()  # every process has read every trial
    return outcomes


def forget(output: Path) -> None:
    """Remove the trials' files, when predictions.npz and result.json hold what counts."""
    for path in (*output.glob("trial_*.npz"), *output.glob("trial_*.alive")):
        path.unlink()


def _run(task: Task, config: Any, trial: Trial, seed: int, place: Path, device: torch.device) -> None:
    """Run a trial, and keep it; a process that leaves the work to the first one waits for it."""
    began, state, path = time.perf_counter(), place.with_suffix(".pth"), place.with_suffix(".npz")
    task.cached.clear()
    with _signs_of_life(place.with_suffix(".alive")):
        outcome = trial(task, config, seed, state, device)
        if outcome is not None and is_main():
            _keep(path, outcome, outcome.seconds + time.perf_counter() - began, task.cached.total())
            state.unlink(missing_ok=True)
    _wait_for(path, place.with_suffix(".alive"))


@contextlib.contextmanager
def _signs_of_life(path: Path) -> Iterator[None]:
    """Touch a file every BEAT seconds, from the first of several processes: no collective waits as long as a trial."""
    if not is_main() or world_size() == 1:
        yield
        return
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT):
            with contextlib.suppress(OSError):
                path.touch()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        path.unlink(missing_ok=True)


def _wait_for(path: Path, alive: Path) -> None:
    """Raises RunFailed where a trial does not appear, and the process that works on it has not responded for long."""
    sign, since = None, time.monotonic()
    while not path.is_file():
        newest = _changed(alive)
        if newest != sign:
            sign, since = newest, time.monotonic()
        if time.monotonic() - since > PATIENCE:
            raise RunFailed(
                f"{path} is not there: the process that works on it has not responded for {PATIENCE:.0f} s; is "
                f"{path.parent} a folder that all processes share? Run the same command to go on"
            )
        time.sleep(0.2)


def _changed(path: Path) -> int | None:
    """When a file was changed last, in ns; None where it is not there, as another process may have removed it."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _read(path: Path, cost: Cost) -> Outcome:
    """A trial as it was kept; what it took is added to the cost."""
    with npz.Arrays(path) as arrays:
        notes, metrics = json.loads(str(arrays["notes"]))
        outcome = Outcome(torch.from_numpy(arrays["scores"]), int(arrays["images"]), notes, metrics=metrics)
        names = [name for name in arrays.headers if name.startswith(ARRAY)]
        outcome.arrays = {name.removeprefix(ARRAY): arrays[name] for name in names}
        splits = [name for name in arrays.headers if name.startswith(FURTHER)]
        outcome.further = {name.removeprefix(FURTHER): torch.from_numpy(arrays[name]) for name in splits}
        cost.seconds += float(arrays["seconds"])
        cost.images += outcome.images
        cost.cached_images += int(arrays["cached"])
    return outcome


def _is_whole(path: Path) -> bool:
    """Whether a trial was kept; on the first process, which removes a damaged one."""
    if not is_main() or not path.is_file():
        return False
    try:
        with npz.Arrays(path) as arrays:
            json.loads(str(arrays["notes"]))
            return bool(arrays["scores"].size) and "cached" in arrays.headers
    except Exception as error:  # whatever a damaged file makes zipfile and numpy raise
        warn(f"{path} cannot be read ({error}); this trial is repeated")
        path.unlink()
        return False


def _keep(path: Path, outcome: Outcome, seconds: float, cached: int) -> None:
    notes = json.dumps([outcome.notes, outcome.metrics], allow_nan=False)
    arrays: dict[str, Any] = {f"{ARRAY}{name}": array for name, array in outcome.arrays.items()}
    arrays |= {f"{FURTHER}{split}": scores.numpy() for split, scores in outcome.further.items()}
    arrays |= {"scores": outcome.scores.numpy(), "images": outcome.images, "cached": cached}
    with files.atomic(path) as temporary:
        np.savez(temporary, notes=notes, seconds=seconds, **arrays)
