"""What detection and segmentation share: an encoder, a recipe by iterations, data, and trials with seeds of their own.

Each trial has its folder, with trial.json last of all.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from moco_eval.config.data_name import called, in_path, layout_of
from moco_eval.config.detection import Scenes
from moco_eval.encoders.encoder import Encoder
from moco_eval.errors import InputError
from moco_eval.results import run_directory
from moco_eval.results.record import Cost
from moco_eval.runtime import collectives, console, files

DATA_FOLDERS = ("MOCO_EVAL_DATA", "DETECTRON2_DATASETS")


@dataclass(frozen=True)
class FineTuningTask:
    """What one evaluation is about that trains on annotated images.

    Attributes:
        encoder: from whose weights every training starts, or on which it stands.
        config: the recipe; its seed is the first trial's.
        dataset: its name; empty where `data` is open already.
        data: the data set's folder, or the data themselves, opened. For 'digits' the folder where its scenes are kept,
            by default output/scenes; for others None stands for what the environment names.
        train_split, test_split: of data in folders.
        trials: trainings on the one encoder, with seeds from config.seed on.
        limit: of images of each split, for a small try; None for all.
    """

    encoder: Encoder
    config: Any
    dataset: str = ""
    data: Any = None
    train_split: str | None = None
    test_split: str | None = None
    trials: int = 1
    limit: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        assert bool(self.dataset) == (self.opened is None), "a data set by its name, or open data"

    @property
    def opened(self) -> Any:
        """The data, where they were given open."""
        return None if self.data is None or isinstance(self.data, Path) else self.data

    @property
    def name(self) -> str:
        """Of the data set."""
        return self.opened.name if self.opened else called(self.dataset, self.folder or _of_environment())

    @property
    def layout(self) -> str:
        """Of the data set: its name, but for what a folder of one's own is called."""
        return layout_of(self.dataset)

    @property
    def in_path(self) -> str:
        """The data set's name as a part of a run directory's; two folders of one name differ."""
        folder = self.folder or _of_environment()
        place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest() if folder else ""
        return in_path(self.name, place)

    @property
    def folder(self) -> Path | None:
        """The data set's folder, where one was given."""
        return None if self.opened else self.data

    @property
    def scenes(self) -> Scenes | None:
        """What is drawn for 'digits'; None where nothing is drawn."""
        return (self.config.scenes or Scenes()) if self.dataset == "digits" else None

    @property
    def seeds(self) -> range:
        """Of the trials."""
        return range(self.config.seed, self.config.seed + self.trials)

    def of_seed(self, seed: int) -> Any:
        """The recipe of one trial."""
        return self.config.model_copy(update={"seed": seed})

    def limited(self, data: Any) -> Any:
        """The data with at most `limit` images of each split, evenly spread."""
        return data.limited(self.limit) if self.limit else data

    @property
    def limits(self) -> list[str]:
        """The deviation that a limit is, in words."""
        return [f"at most {self.limit} images of each split"] if self.limit else []

    def open(self) -> Any:
        """The data; None for 'digits', whose scenes are drawn below the run directory."""
        raise NotImplementedError

    @cached_property
    def at_hand(self) -> Any:
        """The same, opened once for whoever only plans."""
        return self.open()

    def draw(self, output: Path) -> Any:
        """The scenes of 'digits', drawn below `output` if they are not there. Collective."""
        raise NotImplementedError

    def deviations(self, data: Any = None) -> list[str]:
        """In words, where the run leaves its protocol; those of the data only where these are given."""
        raise NotImplementedError


def plan(task: FineTuningTask, data: Any, output: Path, about: dict[str, Any], lines: Sequence[str]) -> str:
    """What a run would do, in a few lines.

    Args:
        data: opened; None for 'digits', whose scenes are not drawn yet.
        about: everything that defines the run.
        lines: on model and schedule.
    Raises:
        InputError: `output` holds another run.
    """
    run_directory.holds(output, about)
    data = task.limited(data) if data else data
    encoder, protocol = task.encoder, task.config.protocol
    return "\n".join(
        [
            f"{protocol} of {encoder.source}: {encoder.origin}, {encoder.arch}",
            *lines,
            f"trials: {task.trials}, seeds from {task.config.seed}",
            f"data: {task.name}, {_extent(task, data)}",
            *(f"differs from {protocol}: {deviation}" for deviation in task.deviations(data)),
            f"output: {output}",
        ]
    )


def _extent(task: FineTuningTask, data: Any) -> str:
    if data:
        return f"{len(data.train)} training and {len(data.test)} test images, {len(data.classes)} classes"
    scenes = task.scenes
    assert scenes
    return f"{scenes.train} training and {scenes.test} test scenes drawn from seed {scenes.seed}"


def carry_out(
    task: FineTuningTask,
    data: Any,
    output: Path,
    about: dict[str, Any],
    answers: str,
    trial: Callable[[Any, int, Path], dict[str, Any]],
    record: Callable[[Any, Sequence[dict[str, Any]]], dict[str, Any]],
) -> dict[str, Any]:
    """The result record: that of a finished run at once, else of every trial that is not finished yet. Collective.

    Args:
        data: opened; None for 'digits', whose scenes are drawn now.
        about: everything that defines the run.
        answers: name of the file that a finished trial leaves beside trial.json.
        trial: makes one, of the data, its seed and its folder; collective.
        record: writes it, from the data and all trials; called in the first process.
    Raises:
        InputError: another run is there, or no folder on every process; and what a trial raises.
    """
    with run_directory.open_run(output, about):
        if not (output / "config.yaml").is_file():
            raise InputError(f"{output} is not there on every process; several machines need a folder that they share")
        if done := collectives.found_by_main(lambda: run_directory.finished_as(output, about, task.deviations())):
            return done
        data = task.limited(data or task.draw(output))
        trials = []
        for seed, folder in zip(task.seeds, folders(output, task.seeds)):
            kept = collectives.found_by_main(partial(finished, folder, answers))
            trials.append(kept or trial(data, seed, folder))
        return collectives.found_by_main(lambda: record(data, trials))


def folders(output: Path, seeds: Sequence[int]) -> list[Path]:
    """Of each trial; a single one is in the run directory itself."""
    return [output if len(seeds) == 1 else output / f"trial_{seed}" for seed in seeds]


def finished(folder: Path, answers: str) -> dict[str, Any] | None:
    """What trial.json says of a trial that is finished and has its answers, the file of that name, still beside it."""
    whole = all((folder / name).is_file() for name in ("trial.json", answers))
    return files.read_json(folder / "trial.json") if whole else None


def write_trial(folder: Path, seed: int, metrics: dict[str, float], cost: Cost, more: dict[str, Any]) -> dict[str, Any]:
    """trial.json, the last file of a trial; `more`: what else it says, behind the metrics."""
    trial = {"seed": seed, "metrics": metrics, **more, "seconds": cost.seconds, "images": cost.images}
    files.write_json(folder / "trial.json", trial)
    return trial


def cost_of(trials: Sequence[dict[str, Any]], device: Any) -> Cost:
    """Of all trials."""
    return Cost(str(device), *(sum(trial[name] for trial in trials) for name in ("seconds", "images")))


# Checks


def check_schedule(config: Any, unit: int, processes: str) -> None:
    """Warns of a rate that never falls or never gets up. Raises InputError where a batch does not divide.

    Args:
        unit: by which it must divide; `processes`: the same in words.
    """
    schedule = config.schedule
    if schedule.steps and schedule.steps[0] >= schedule.iterations:
        console.warn(
            f"schedule.steps {list(schedule.steps)} lie behind {schedule.iterations} iterations: the rate never falls"
        )
    if schedule.warmup > schedule.iterations:
        console.warn(
            f"schedule.warmup {schedule.warmup} is longer than the {schedule.iterations} iterations: the rate never "
            f"reaches optimizer.lr; --set schedule.warmup={schedule.iterations // 10} would"
        )
    if config.batch_size % unit:
        below = config.batch_size // unit * unit
        near = [size for size in (below, below + unit) if size]
        raise InputError(
            f"batch_size {config.batch_size} does not divide into {processes}; "
            f"take --batch-size {' or '.join(map(str, near))}, or another --nproc"
        )


def _of_environment() -> Path | None:
    """The folder that the environment names, where it names one."""
    return next((Path(os.environ[name]) for name in DATA_FOLDERS if os.environ.get(name)), None)


def data_folder(command: str, dataset: str, data: Path | None, variables: Sequence[str]) -> Path:
    """The data set's folder: `data`, or what the first of these environment variables names.

    Raises:
        InputError: no folder.
    """
    for variable in variables:
        data = data or (Path(os.environ[variable]) if os.environ.get(variable) else None)
    if data is None:
        raise InputError(
            f"--dataset {dataset} needs --data (or {', or '.join(variables)}); for example: moco-eval {command} "
            f"CHECKPOINT --dataset {dataset} --data path/to/data"
        )
    if not data.is_dir():
        raise InputError(f"--data {data} {'is a file' if data.exists() else 'does not exist'}; give the data's folder")
    return data
