"""moco-eval configs, datasets and demo."""

from pathlib import Path

import click

from moco_eval.cli.options import FOLDER, Options, data_option, mask_options, split_options, with_options
from moco_eval.errors import InputError


@click.command()
@click.argument("action", type=click.Choice(["list", "show"]), default="list")
@click.argument("name", required=False)
def configs(action: str, name: str | None) -> None:
    """Name the shipped configs, or show one: moco-eval configs show pretrain/cifar10"""
    from moco_eval.config import load

    if action == "list":
        for shipped in load.shipped():
            click.echo(shipped)
        return
    if name not in load.shipped():
        raise InputError(f"no shipped config named {name!r}.{load.did_you_mean(str(name), load.shipped())}")
    click.echo((load.folder() / f"{name}.yaml").read_text(encoding="utf-8"), nl=False)


@click.command()
@click.argument("action", type=click.Choice(["list", "check"]), default="list")
@click.argument("name", required=False)
@with_options(
    data_option,
    split_options,
    mask_options,
    click.option("--write", "writes", is_flag=True, help="Measure mean and std of each band, into bands.yaml."),
)
def datasets(
    action: str, name: str | None, writes: bool, classes: Path | None, ignore: tuple[int, ...], options: Options
) -> None:
    """Name the data sets, or look whether one is whole: moco-eval datasets check pets --data /datasets"""
    from moco_eval.data import catalogue
    from moco_eval.data.boxes import check as boxes
    from moco_eval.data.masks import check as masks

    if action == "list":
        for line in catalogue.known() + boxes.known() + masks.known():
            click.echo(line)
        return
    if name is None:
        raise InputError("datasets check needs a NAME; moco-eval datasets names them")
    where = (name, options.data, options.train_split, options.test_split)
    if (classes or ignore) and name != "mask-folder":
        raise InputError(f"--classes and --ignore are of mask-folder, and {name} has none: leave them out")
    lines: list[str] = []
    refusals: dict[str, str | None] = {}  # by command
    if writes or name not in (*masks.NAMES, *boxes.NAMES):
        lines = catalogue.check(*where, writes)
    if name in masks.NAMES and not writes:
        lines, refusals["segment"] = masks.check(name, options.data, where[2:], classes, ignore or (255,))
    if name in boxes.NAMES and not writes:
        about, refusals["detect"] = boxes.check(*where)
        lines += [f"as instances: {line}" for line in about] if lines else about
        lines += catalogue.check_too(*where)
    for line in lines:
        click.echo(line)
    for command, refusal in refusals.items():
        if refusal:
            raise InputError(f"{command} refuses these data: {refusal}")


@click.command()
@click.option("--output", type=FOLDER, default=Path("runs/demo"), show_default=True)
@click.option("--device", default="cpu", show_default=True)
def demo(output: Path, device: str) -> None:
    """The whole path on built-in real data, in minutes, on a CPU."""
    from moco_eval.demo import run

    run(output, device)
