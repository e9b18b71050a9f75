"""moco-eval configs, datasets and demo."""

from pathlib import Path

import click

from moco_eval.cli.options import FOLDER, Options, folder_option, mask_options, split_options, with_options
from moco_eval.errors import InputError


@click.command()
@click.argument("action", type=click.Choice(["list", "show"]), default="list")
@click.argument("name", required=False)
def configs(action: str, name: str | None) -> None:
    """List the shipped configs, or show one.

    Example: moco-eval configs show pretrain/cifar10
    """
    from moco_eval.config import load

    if action == "list":
        click.echo("NAME")
        for shipped in load.shipped():
            click.echo(shipped)
        return
    if name not in load.shipped():
        raise InputError(f"no shipped config named {name!r}.{load.did_you_mean(str(name), load.shipped())}")
    click.echo((load.folder() / f"{name}.yaml").read_text(encoding="utf-8"), nl=False)


@click.command()
@click.argument("action", type=click.Choice(["list", "check"]), default="list")
@click.argument("dataset", metavar="[NAME]", required=False)
@with_options(
    folder_option,
    split_options,
    mask_options,
    click.option("--quick", is_flag=True, help="Look at the images' headers alone; else every image is decoded."),
    click.option("--write", "writes", is_flag=True, help="Measure mean and std of each band, into bands.yaml."),
)
def datasets(
    action: str, writes: bool, quick: bool, classes: Path | None, ignore: tuple[int, ...], options: Options
) -> None:
    """List the data sets, or check that a copy of one is whole.

    Example: moco-eval datasets check imagefolder --data my_images
    """
    from moco_eval.data import catalogue
    from moco_eval.data.boxes import check as boxes
    from moco_eval.data.masks import check as masks

    if action == "list":
        click.echo(catalogue.row("NAME", "IMAGES: TRAINING -> TEST, OR FOLDERS", "METRIC"))
        for line in catalogue.known() + boxes.known() + masks.known():
            click.echo(line)
        return
    name = options.dataset
    if name is None:
        raise InputError("datasets check needs a NAME; moco-eval datasets names them")
    where = (name, options.data, options.train_split, options.test_split)
    if (classes or ignore) and name != "mask-folder":
        raise InputError(f"--classes and --ignore are of mask-folder, and {name} has none: leave them out")
    lines, refusals = list[str](), dict[str, str | None]()
    if name in masks.NAMES and not writes:
        lines, refusals["segment"] = masks.check(name, options.data, where[2:], classes, ignore or (255,))
    if name in boxes.NAMES and not writes:
        more, refusals["detect"] = boxes.check(*where)
        lines += [f"as instances: {line}" if lines else line for line in more] + catalogue.check_too(*where)
    for line in lines if refusals else catalogue.check(*where, writes, options.val_fraction, quick):
        click.echo(line)
    refused = [f"{command} refuses these data: {refusal}" for command, refusal in refusals.items() if refusal]
    if refused and len(refused) == len(refusals):
        raise InputError("; ".join(refused))
    for line in refused:  # cityscapes may be there for one of them alone
        click.echo(line)


@click.command()
@click.option("--output", type=FOLDER, default=Path("runs/demo"), show_default=True)
@click.option("--device", default="cpu", show_default=True)
def demo(output: Path, device: str) -> None:
    """Pretrain, judge and report on built-in real data: minutes on a CPU.

    Example: moco-eval demo
    """
    from moco_eval.demo import run

    click.echo(run(output, device))
