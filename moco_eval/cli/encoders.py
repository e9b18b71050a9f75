"""moco-eval inspect, convert and fetch."""

from pathlib import Path

import click

from moco_eval.cli.options import FOLDER, Options, encoder_options, with_options
from moco_eval.cli.shared import pixels_of
from moco_eval.errors import InputError


@click.command()
@click.argument("checkpoint")
@with_options(encoder_options)
def inspect(checkpoint: str, options: Options) -> None:
    """Say whose checkpoint this is, with every tensor accounted for, or why it cannot be read.

    Example: moco-eval inspect my_encoder.pth
    """
    chosen = (options.arch, options.encoder, options.key, pixels_of(checkpoint, options))

    from moco_eval.encoders.inspect import describe, format_description

    click.echo(format_description(describe(checkpoint, *chosen)))


@click.command()
@click.argument("checkpoint")
@click.argument("out", type=FOLDER)
@with_options(
    click.option("--to", required=True, type=click.Choice(["detectron2", "torchvision", "timm", "safetensors"])),
    click.option("--force", is_flag=True, help="Overwrite OUT."),
    encoder_options,
)
def convert(checkpoint: str, out: Path, to: str, force: bool, options: Options) -> None:
    """Write an encoder in another framework's format, and prove the copy.

    Example: moco-eval convert my_encoder.pth backbone.pth --to torchvision
    """
    pixels = pixels_of(checkpoint, options)

    from moco_eval.encoders.export.convert import convert as convert_checkpoint

    chosen = {"arch": options.arch, "encoder": options.encoder, "key": options.key}
    click.echo(convert_checkpoint(checkpoint, out, to, **chosen, force=force, pixels=pixels))


@click.command()
@click.argument("name", required=False)
@click.option("--output", type=FOLDER, metavar="FILE", help="Where to put it; in the cache where not given.")
@click.option("--list", "list_names", is_flag=True, help="Name every known checkpoint.")
def fetch(name: str | None, output: Path | None, list_names: bool) -> None:
    """Download a known public checkpoint, verify it, and print its path.

    Example: moco-eval fetch moco_v2_800ep

    Running it again continues a broken download, or verifies the file that is there.
    """
    from moco_eval.encoders import zoo

    if list_names:
        for line in zoo.lines():
            click.echo(line)
        return
    if name is None:
        raise InputError("fetch needs a NAME; moco-eval fetch --list names them")
    zoo.entry(name)

    from moco_eval.encoders import download

    click.echo(download.fetch(name, output))
