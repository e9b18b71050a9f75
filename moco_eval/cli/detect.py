"""moco-eval detect."""

from dataclasses import replace
from typing import Any

import click

from moco_eval.cli.options import Options, data_option, encoder_options, run_options, with_options
from moco_eval.cli.shared import launch_again, load_config, load_encoder, rescaled_recipe
from moco_eval.errors import InputError


@click.command()
@click.argument("checkpoint")
@with_options(
    click.option("--dataset", help="voc, voc07, coco, voc-folder, coco-folder or digits (built in)."),
    click.option(
        "--recipe",
        help="A shipped recipe or a file.  [default by the data: r50_c4_24k, voc07_r50_c4_9k, coco_r50_fpn_1x, "
        "digits_r50_c4; for a plain ViT take coco_vitdet_b, for other networks coco_r50_fpn_1x]",
    ),
    click.option("--train-split", help="Of voc-folder and coco-folder."),
    click.option("--test-split", help="Of voc-folder and coco-folder."),
    click.option(
        "--engine", type=click.Choice(["auto", "torchvision", "detectron2"]), default="auto", show_default=True
    ),
    click.option(
        "--trials", type=click.IntRange(1), default=1, show_default=True, help="Fine-tunings with their own seeds."
    ),
    data_option,
    encoder_options,
    run_options,
)
def detect(checkpoint: str, recipe: str | None, engine: str, options: Options) -> int:
    """Fine-tune a detector on the encoder and measure its average precision."""
    from moco_eval.detection import detect as detection
    from moco_eval.detection.recipe import DEFAULTS
    from moco_eval.detection.task import DetectionTask
    from moco_eval.results.run_directory import default_output
    from moco_eval.runtime.device import choose_device
    from moco_eval.runtime.launch import processes
    from moco_eval.runtime.rank import is_main

    dataset = options.dataset
    if dataset is None:
        raise InputError(
            "detect needs --dataset; for example: moco-eval detect runs/v2/checkpoints/last.pth --dataset voc "
            "--data /datasets/VOCdevkit, or built in: --dataset digits"
        )
    config = _recipe(recipe or DEFAULTS.get(dataset, "r50_c4_24k"), options)
    encoder = load_encoder(checkpoint, options, config.seed)
    output = options.output or default_output("detect", encoder, dataset, config.protocol)
    splits = (options.train_split, options.test_split)
    task = DetectionTask(encoder, config, dataset, options.data, *splits, engine, options.trials)
    if options.nproc > 1 or options.dry_run:
        planned = detection.plan(task, output, options.nproc)
        if options.dry_run:
            choose_device(options.device)
            click.echo(planned)
            return 0
        return launch_again(options)
    with processes(options.device) as device:
        record = detection.detect(task, output, device)
        if is_main():
            click.echo(detection.format_table(record))
    return 0


def _recipe(name: str, options: Options) -> Any:
    """A detection recipe with --set and the shared options applied; --batch-size carries rate and schedule along."""
    from moco_eval.config.detection import DetectConfig

    before = load_config(name, "detect", DetectConfig, replace(options, batch_size=None))
    return rescaled_recipe(before, options.batch_size)
