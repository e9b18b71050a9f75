"""The options that many commands share, and the one frozen object in which a command finds what was given."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from moco_eval.errors import InputError

FOLDER = click.Path(path_type=Path)
DATASETS = (
    "digits (built in), imagefolder, imagenet, cifar10, cifar100, stl10, flowers102, pets, food101, dtd, voc07, "
    "voc-folder, hf:PLACE"
)  # what can be evaluated on; `moco-eval datasets` says more


@dataclass(frozen=True)
class Options:
    """What the shared options were given; a command that lacks an option finds its default here.

    Attributes:
        logs: what --log says.
        overrides: what --set says, as key=value.
        pixels: what --pixels says, as key=value.
        folders: what --data says where it names data sets: NAME=FOLDER.
        also: further test sets, NAME=FOLDER between commas.
    """

    dataset: str | None = None
    name: str | None = None
    data: Path | None = None
    train_split: str | None = None
    test_split: str | None = None
    val_fraction: float | None = None
    arch: str | None = None
    encoder: str | None = None
    key: str | None = None
    pixels: tuple[str, ...] = ()
    feature: str | None = None
    cache: Path | None = None
    labels: str | None = None
    trials: int = 1
    output: Path | None = None
    device: str = "auto"
    nproc: int = 1
    precision: str | None = None
    workers: int | None = None
    seed: int | None = None
    batch_size: int | None = None
    overrides: tuple[str, ...] = ()
    dry_run: bool = False
    runs: Path = Path("runs")
    folders: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    released: bool = False
    as_json: bool = False
    limit: int | None = None
    attempt: bool = False
    logs: tuple[str, ...] = ()

    @property
    def called(self) -> str:
        """The data set with what --name calls it. Raises InputError where it has a name of its own."""
        from moco_eval.config.data_name import with_name

        return with_name(str(self.dataset), self.name)

    @property
    def of_every_config(self) -> list[str]:
        """The options that are keys of every config, as overrides."""
        given = {"precision": self.precision, "workers": self.workers, "seed": self.seed}
        return [f"{key}={value}" for key, value in given.items() if value is not None]


SHARED = {field.name for field in fields(Options)}


def with_options(*wanted: click.Option | Callable) -> Callable:
    """Click options for a command, shown in the order given; what is shared comes to it as `options`."""

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def called(**given: Any) -> Any:
            shared = {name: given.pop(name) for name in list(given) if name in SHARED}
            return command(options=Options(**shared), **given)

        return several(*wanted)(called)

    return decorate


def several(*wanted: click.Option | Callable) -> Callable:
    """Several click options as one decorator, shown in the order given."""

    def decorate(command: Callable) -> Callable:
        for option in reversed(wanted):
            command = option(command)
        return command

    return decorate


def on_machine(*precisions: str) -> Callable:
    """Where and in which of these precisions a command computes."""
    arithmetic = "Arithmetic; the config's where not given."
    return several(
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."),
        click.option(
            "--nproc", type=click.IntRange(1), default=1, show_default=True, help="Processes on this machine."
        ),
        click.option("--precision", type=click.Choice(precisions), help=arithmetic),
        click.option(
            "--workers",
            type=click.IntRange(0),
            help="Loader processes of each process.  [default: its cores, at most 8]",
        ),
        click.option("--seed", type=click.IntRange(0), help="Seed of everything drawn."),
    )


log_option = click.option(
    "--log",
    "logs",
    multiple=True,
    type=click.Choice(["wandb", "mlflow"]),
    help="Send curves and results there, too; may be repeated.",
)


def of_a_run(machine: Callable) -> Callable:
    """What a command takes that has a config and a run directory."""
    return several(
        click.option("--output", type=FOLDER, help="Run directory; running again in the same place resumes."),
        machine,
        click.option("--batch-size", type=click.IntRange(1), help="Over all processes; the learning rate is rescaled."),
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Any config key; may be repeated."),
        click.option("--dry-run", is_flag=True, help="Check everything, print the plan, do nothing."),
        log_option,
    )


machine_options = on_machine("fp32", "tf32", "bf16")
run_options = of_a_run(machine_options)
pretraining_options = of_a_run(on_machine("fp32", "tf32", "bf16", "fp16"))
extraction_options = several(
    machine_options,
    click.option(
        "--batch-size",
        type=click.IntRange(1),
        default=256,
        show_default=True,
        help="Of the extraction, over all processes; the protocols keep theirs.",
    ),
)
limit_option = click.option(
    "--limit",
    type=click.IntRange(1),
    metavar="N",
    help="For a small try: at most so many images of each split; a deviation.",
)
try_option = click.option(
    "--try",
    "attempt",
    is_flag=True,
    help="Minutes on any machine: few images and steps, a small batch, smaller images; each a deviation.",
)
sbatch_option = click.option(
    "--sbatch", multiple=True, metavar="KEY=VALUE", help="sbatch's options, with --slurm; may be repeated."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result record as JSON on stdout.")
folder_option = click.option(
    "--data", type=FOLDER, help="The data set's folder; or MOCO_EVAL_DATA. digits and hf need none."
)
name_option = click.option("--name", help="What to call a folder of your own.  [default: the folder's name]")
data_option = several(folder_option, name_option)
encoder_options = several(
    click.option("--arch", help="Architecture, where the shapes leave it open (the heads of a ViT) or are misread."),
    click.option(
        "--encoder",
        type=click.Choice(["query", "key"]),
        help="key is the momentum encoder.  [default: query; DINO: key]",
    ),
    click.option("--key", metavar="NAME", help="Of several networks in a file, the entry or prefix to take."),
    click.option(
        "--pixels",
        multiple=True,
        metavar="KEY=VALUE",
        help="Of the preprocessing, such as interpolation=bicubic or mean=0.5,std=0.5.  [default: the method's own]",
    ),
)
split_options = several(
    click.option(
        "--val-fraction",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        metavar="SHARE",
        help="Of an imagefolder or hf with a single split: test on so much of each class, drawn from seed 0.",
    ),
    click.option("--train-split", help="Of voc-folder: a list in ImageSets/Main; of hf: a split."),
    click.option("--test-split", help="Of voc-folder: a list in ImageSets/Main; of hf: a split."),
)
mask_options = several(
    click.option("--classes", type=FOLDER, metavar="FILE", help="Of mask-folder: a name a line, from 0."),
    click.option(
        "--ignore",
        type=click.IntRange(0, 65535),
        multiple=True,
        metavar="VALUE",
        help="Of mask-folder: pixels without a class; may be repeated.  [default: 255]",
    ),
)
feature_options = several(
    click.option("--feature", help="pooled (default), head, or a stage: layer3, blocks.8."),
    click.option("--cache", type=FOLDER, help="Folder of extracted features.  [default: runs/features]"),
)
trial_options = several(
    click.option(
        "--labels",
        metavar="WHICH",
        help="Train on N-per-class, drawn anew in each trial; 1% or 10% (DATA/1percent.txt), or any list of names.",
    ),
    click.option(
        "--trials", type=click.IntRange(1), default=1, show_default=True, help="Repetitions with their own seeds."
    ),
)
places_options = several(
    click.option("--runs", type=FOLDER, default=Path("runs"), show_default=True, help="Where the results are."),
    click.option("--data", "folders", multiple=True, metavar="NAME=FOLDER", help="Of a data set; may be repeated."),
    click.option("--released", is_flag=True, help="Take the authors' checkpoints instead of pretraining."),
    click.option("--nproc", type=click.IntRange(1), default=1, show_default=True, help="Processes of every step."),
)


def require_slurm(slurm: bool, sbatch: tuple[str, ...]) -> None:
    """Raises InputError where there are options of sbatch and nothing to submit."""
    if sbatch and not slurm:
        raise InputError(f"--sbatch {sbatch[0]} is for SLURM jobs; add --slurm")


def dataset_options(default: str = "imagenet") -> Callable:
    """--dataset and the splits that a voc-folder has."""
    return several(click.option("--dataset", default=default, show_default=True, help=f"{DATASETS}."), split_options)
