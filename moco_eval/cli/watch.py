"""moco-eval watch."""

from collections.abc import Sequence
from pathlib import Path

import click

from moco_eval.cli.options import (
    FOLDER,
    Options,
    data_option,
    dataset_options,
    encoder_options,
    extraction_options,
    log_option,
    require_slurm,
    sbatch_option,
    with_options,
)
from moco_eval.cli.shared import require_logs

# options of `moco-eval suite` that are handed on, by their names in Options
OF_DATA = ("dataset", "data", "name", "train_split", "test_split")
HANDED_ON = (*OF_DATA, "arch", "encoder", "key", "feature", "precision", "seed")
OF_MACHINE = ("device", "nproc", "workers", "batch_size")  # which move no number


@click.command()
@click.argument("folder", type=FOLDER)
@with_options(
    click.option("--tasks", metavar="PROTOCOL,...", help="As of `moco-eval suite`.  [default: knn,quick,logistic]"),
    dataset_options(),
    data_option,
    encoder_options,
    click.option("--feature", help="pooled (default), head, or a stage: layer3, blocks.8."),
    click.option("--output", type=FOLDER, help="Where results go.  [default: FOLDER/watch]"),
    click.option(
        "--every",
        type=click.FloatRange(0.2),
        default=30,
        show_default=True,
        metavar="SECONDS",
        help="From one look to the next; a file counts when it has not changed in between.",
    ),
    click.option("--once", is_flag=True, help="Judge what is there, and end."),
    click.option(
        "--patience", type=click.FloatRange(0, min_open=True), metavar="MINUTES", help="End so long after the last one."
    ),
    click.option("--slurm", is_flag=True, help="Judge each as a SLURM job; with --once submit them, and end."),
    sbatch_option,
    extraction_options,
    log_option,
)
def watch(
    folder: Path,
    tasks: str | None,
    every: float,
    once: bool,
    patience: float | None,
    slurm: bool,
    sbatch: tuple[str, ...],
    options: Options,
) -> None:
    """Judge each new checkpoint of a training while it is written, into one curve.

    FOLDER is a run directory of `moco-eval pretrain`, or any folder in which a trainer writes checkpoints. Every
    checkpoint is judged as `moco-eval suite` judges it; run again, nothing is judged twice.

    Example: moco-eval watch runs/pretrain-digits-digits --dataset digits --tasks knn,quick
    """
    require_slurm(slurm, sbatch)
    from moco_eval.classification.protocols import tasks as tasks_named
    from moco_eval.data.catalogue import open_splits

    if tasks:
        tasks_named(tasks)
    open_splits(options.called, options.data, options.train_split, options.test_split)  # refused before any checkpoint
    require_logs(options)

    from moco_eval.results.run_directory import hold
    from moco_eval.watch import watch as watching
    from moco_eval.watch.curve import write

    judged = _words(options, HANDED_ON, ("--tasks", tasks), *(("--pixels", pixels) for pixels in options.pixels))
    output, machine = options.output or folder / "watch", _words(options, OF_MACHINE)
    watched = watching.Watch(folder, output, judged, machine, every, sbatch if slurm else None)
    with hold(watched.output):
        curve = watching.watch(watched, once, None if patience is None else 60 * patience, options.logs)
        write(curve, watched.output / "curve.jsonl")
    click.echo(curve.table())


def _words(options: Options, names: Sequence[str], *more: tuple[str, str | None]) -> tuple[str, ...]:
    """Options as words of a command line."""
    given = [*more, *((f"--{name.replace('_', '-')}", getattr(options, name)) for name in names)]
    return tuple(word for option, value in given if value is not None for word in (option, str(value)))
