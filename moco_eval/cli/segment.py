"""moco-eval segment."""

from pathlib import Path

import click

from moco_eval.cli.options import (
    Options,
    data_option,
    encoder_options,
    json_option,
    limit_option,
    mask_options,
    run_options,
    try_option,
    with_options,
)
from moco_eval.cli.shared import fine_tuned, load_encoder, load_recipe, pixels_of, tried
from moco_eval.config.data_name import layout_of
from moco_eval.config.load import require_named
from moco_eval.errors import InputError


@click.command()
@click.argument("checkpoint")
@with_options(
    click.option(
        "--dataset", help="voc-aug, voc2012, cityscapes, ade20k, coco-stuff, mask-folder or digits (built in)."
    ),
    click.option(
        "--recipe",
        help="A shipped recipe or a file.  [default by the data: voc_fcn16s_30k, cityscapes_fcn16s_90k, digits_fcn16s, "
        "else linear]",
    ),
    click.option("--train-split", help="Of mask-folder.  [default: train]"),
    click.option("--test-split", help="Of mask-folder.  [default: test, or val]"),
    mask_options,
    click.option(
        "--trials", type=click.IntRange(1), default=1, show_default=True, help="Trainings with their own seeds."
    ),
    data_option,
    limit_option,
    try_option,
    encoder_options,
    run_options,
    json_option,
)
def segment(
    checkpoint: str, recipe: str | None, classes: Path | None, ignore: tuple[int, ...], options: Options
) -> int:
    """Train a semantic segmentation on the encoder and measure its mean intersection over union.

    Example: moco-eval segment my_encoder.pth --dataset voc-aug --data /datasets/VOCdevkit
    """
    from moco_eval.config.segmentation import SegmentConfig
    from moco_eval.segmentation.recipe import DATASETS, DEFAULTS

    dataset = options.dataset
    if dataset is None:
        raise InputError(
            "segment needs --dataset; for example: moco-eval segment runs/v2/checkpoints/last.pth --dataset voc-aug "
            "--data /datasets/VOCdevkit, or built in: --dataset digits"
        )
    require_named(layout_of(dataset), DATASETS)
    name = recipe or DEFAULTS.get(layout_of(dataset), "linear")
    options = tried(name, "segment", options)
    config = load_recipe(name, "segment", SegmentConfig, options)
    pixels_of(checkpoint, options)

    from moco_eval.papers.forecast import of_segmentation
    from moco_eval.results.run_directory import default_output
    from moco_eval.segmentation import segment as segmentation
    from moco_eval.segmentation.task import SegmentationTask

    encoder = load_encoder(checkpoint, options, config.seed)
    task = SegmentationTask(
        encoder,
        config,
        options.called,
        options.data,
        options.train_split,
        options.test_split,
        options.trials,
        classes,
        ignore or (255,),
        limit=options.limit,
    )
    output = options.output or default_output("segment", encoder, task.in_path, config.protocol)
    return fine_tuned(
        segmentation.plan, of_segmentation, segmentation.segment, segmentation.format_table, task, output, options
    )
