"""What several commands do: resolve a config, warn, start processes."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from moco_eval.cli.options import Options


def tell_once(message: str) -> None:
    """A line to stderr, from the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        click.echo(message, err=True)


def require_logs(options: Options) -> None:
    """Raises InputError, in the first process, where what --log names is not there."""
    if options.logs and os.environ.get("RANK", "0") == "0":
        from moco_eval.results.loggers import require

        require(options.logs)


def tried(name: str, kind: str, options: Options) -> Options:
    """The options with what --try changes of a config; what is given beside it counts more."""
    if not options.attempt:
        return options
    from moco_eval.config import load as configs
    from moco_eval.config.attempt import shrunk, sizes_of

    overrides = shrunk(kind, configs.merged(name, kind, []))
    images, batch = sizes_of(kind)
    return replace(
        options,
        overrides=(*overrides, *options.overrides),
        limit=options.limit or images,
        batch_size=options.batch_size or batch,
    )


def load_config(name: str, kind: str, model: Any, options: Options, more: Sequence[str] = ()) -> Any:
    """A config with --set and the shared options applied; --batch-size carries a learning rate along that is not set.

    Args:
        more: further overrides.
    """
    from moco_eval.config import load as configs
    from moco_eval.config.batch import rescaled

    overrides = [*options.overrides, *more, *options.of_every_config]
    if options.batch_size is not None:
        carried, message = rescaled(configs.merged(name, kind, overrides), options.batch_size, options.overrides)
        overrides += carried
        if message:
            tell_once(message)
    return configs.load(name, kind, model, overrides)


def warn_of_rate(config: Any, name: str, kind: str) -> None:
    """Warns of a learning rate that belongs to another batch than the config of that name has now."""
    from moco_eval.config import load as configs

    written = configs.merged(name, kind, [])
    optimizer = written.get("optimizer")
    if not isinstance(optimizer, dict) or config.batch_size == written.get("batch_size"):
        return
    if config.optimizer.lr == optimizer.get("lr"):
        tell_once(
            f"warning: batch_size {config.batch_size} with lr {config.optimizer.lr:g}, which belongs to batches of "
            f"{written['batch_size']}; --batch-size {config.batch_size} rescales it"
        )


def load_recipe(name: str, kind: str, model: Any, options: Options) -> Any:
    """A recipe by iterations with --set and the shared options; --batch-size carries rate and schedule along.

    What --set names is as it says, whatever the batch.
    """
    from moco_eval.config.fine_tuning import as_set, rescaled, rescaling

    before, batch_size = load_config(name, kind, model, replace(options, batch_size=None)), options.batch_size
    if batch_size in (None, before.batch_size):
        warn_of_rate(before, name, kind)
        return before
    after = as_set(rescaled(before, batch_size), before, options.overrides)
    tell_once(f"--batch-size {batch_size} instead of {before.batch_size}: {rescaling(before, after)}")
    return after


def show(records: Any, text: str, options: Options) -> None:
    """A result on stdout: its lines, or with --json the record itself, of several a list."""
    if options.as_json:
        import json

        text = json.dumps(records, indent=2)
    click.echo(text)


def show_and_log(record: dict[str, Any], text: str, output: Path, options: Options) -> None:
    """A result on stdout, and where --log says."""
    from moco_eval.results.loggers import send_result

    show(record, text, options)
    send_result(record, output, options.logs)


def pixels_of(checkpoint: str, options: Options) -> dict[str, Any]:
    """What --pixels says; CHECKPOINT is there too. Both are looked at without torch.

    Raises:
        InputError: no such checkpoint, or a wrong --pixels.
    """
    from moco_eval.encoders.pixel_choice import parsed
    from moco_eval.encoders.sources import require_source

    require_source(checkpoint)
    return parsed(options.pixels)


def fine_tuned(plan: Any, cost: Any, run: Any, table: Any, task: Any, output: Path, options: Options) -> int:
    """The plan of a dry run and its cost, or the run, in as many processes as asked for, and its table.

    Args:
        plan, cost, run, table: of detection or segmentation.
    """
    from moco_eval.runtime.device import choose_device
    from moco_eval.runtime.launch import processes
    from moco_eval.runtime.rank import is_main

    require_logs(options)
    if options.nproc > 1 or options.dry_run:
        planned = plan(task, output, options.nproc)
        if options.dry_run:
            device = choose_device(options.device)
            click.echo(planned)
            click.echo(cost(task, options.nproc, device).phrase)
            return 0
        return launch_again(options)
    with processes(options.device) as device:
        record = run(task, output, device)
        if is_main():
            show_and_log(record, table(record), output, options)
    return 0


def load_encoder(checkpoint: str, options: Options, seed: int) -> Any:
    """The encoder, with the doubts of its load where they would move a number."""
    from moco_eval.encoders.load import load
    from moco_eval.encoders.pixel_choice import parsed
    from moco_eval.runtime.console import warn

    encoder = load(checkpoint, options.arch, options.encoder, seed, options.key, parsed(options.pixels))
    for doubt in encoder.warnings:
        warn(f"{encoder.source}: {doubt}")
    return encoder


def launch_again(options: Options, max_restarts: int = 0) -> int:
    """This very command in several processes. Raises InputError where one device would serve them all."""
    from moco_eval.errors import InputError
    from moco_eval.runtime.launch import launch

    if options.device.startswith("mps"):
        raise InputError(f"--device {options.device} takes one process; leave --nproc {options.nproc} out")
    if options.device.startswith("cuda:"):
        raise InputError(
            f"--device {options.device} puts all {options.nproc} processes on one GPU; take --device cuda, and "
            "CUDA_VISIBLE_DEVICES to choose which"
        )
    kept, skip = [], False
    for argument in sys.argv[1:]:
        if not skip and argument != "--nproc" and not argument.startswith("--nproc="):
            kept.append(argument)
        skip = argument == "--nproc"
    return launch(options.nproc, kept, max_restarts)
