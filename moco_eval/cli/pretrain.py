"""moco-eval pretrain."""

from pathlib import Path
from typing import Any

import click

from moco_eval.cli.options import (
    DATASETS,
    Options,
    data_option,
    limit_option,
    pretraining_options,
    try_option,
    with_options,
)
from moco_eval.cli.shared import launch_again, load_config, require_logs, tried, warn_of_rate
from moco_eval.errors import InputError


@click.command()
@click.argument("config")
@with_options(
    click.option("--dataset", help=f"{DATASETS}, flat or webdataset."),
    data_option,
    limit_option,
    try_option,
    pretraining_options,
    click.option("--max-restarts", type=click.IntRange(0), default=0, help="With --nproc: after a process has died."),
    click.option(
        "--profile", "profiled", type=click.IntRange(1), help="Run so many steps, say what limits, keep nothing."
    ),
)
def pretrain(config: str, max_restarts: int, profiled: int | None, options: Options) -> int:
    """Train an encoder by momentum contrast.

    Example: moco-eval pretrain moco_v2_r50 --dataset imagenet --data /datasets/imagenet --nproc 8

    CONFIG is a file or a shipped name; `moco-eval configs` lists them.
    """
    if options.dataset is None:
        raise InputError("pretrain needs --dataset; for example: moco-eval pretrain digits --dataset digits")

    from moco_eval.config.pretrain import PretrainConfig
    from moco_eval.data.catalogue import require_there

    options = tried(config, "pretrain", options)
    resolved = load_config(config, "pretrain", PretrainConfig, options)
    require_there(options.called, options.data)
    if options.batch_size is None:
        warn_of_rate(resolved, config, "pretrain")
    require_logs(options)

    if options.dry_run:
        return _planned(config, resolved, options)

    import torch

    from moco_eval.runtime.console import log
    from moco_eval.runtime.launch import processes
    from moco_eval.runtime.rank import is_main, world_size
    from pretraining.plan import plan
    from pretraining.train import pretrain as train

    if options.nproc > 1:
        plan(
            resolved, options.called, options.data, options.nproc, torch.device("cpu"), options.limit
        )  # or refused here
        return launch_again(options, max_restarts)
    with processes(options.device) as device:
        run = plan(resolved, options.called, options.data, world_size(), device, options.limit)
        log(run.describe())
        if profiled:
            from pretraining.profile import profile

            parts = profile(run, device, profiled)
            if is_main():
                click.echo(parts.report())
            return 0
        last = train(run, _output(config, run, options), device, options.logs)
        log(f"done: {last}")
    return 0


def _planned(config: str, resolved: Any, options: Options) -> int:
    """The plan of a dry run, and about how long it takes and how much memory."""
    from moco_eval.results.run_directory import holds
    from moco_eval.runtime.device import choose_device
    from pretraining.forecast import of_run
    from pretraining.plan import plan

    device = choose_device(options.device)
    run = plan(resolved, options.called, options.data, options.nproc, device, options.limit)
    output = _output(config, run, options)
    holds(output, run.resolved())
    click.echo(f"{run.describe()}\noutput: {output}")
    click.echo(of_run(run, device).phrase)
    return 0


def _output(config: str, run: Any, options: Options) -> Path:
    """--output, or runs/pretrain-<config>-<data>."""
    from moco_eval.config.data_name import in_path

    images = run.images
    return options.output or Path("runs") / f"pretrain-{Path(config).stem}-{in_path(images.name, images.fingerprint)}"
