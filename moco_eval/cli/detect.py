"""moco-eval detect."""

import click

from moco_eval.cli.options import (
    Options,
    data_option,
    encoder_options,
    json_option,
    limit_option,
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
        "--dataset",
        help="voc, voc07, coco, lvis-v0.5, lvis-v1, cityscapes, voc-folder, coco-folder or digits (built in).",
    ),
    click.option(
        "--recipe",
        help="A shipped recipe or a file.  [default by the data: r50_c4_24k, voc07_r50_c4_9k, coco_r50_fpn_1x, "
        "lvis_v05_r50_fpn_1x, lvis_v1_r50_fpn_1x, cityscapes_r50_fpn_24k, digits_r50_c4; for a plain ViT take "
        "coco_vitdet_b, for other networks coco_r50_fpn_1x]",
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
    limit_option,
    try_option,
    encoder_options,
    run_options,
    json_option,
)
def detect(checkpoint: str, recipe: str | None, engine: str, options: Options) -> int:
    """Fine-tune a detector on the encoder and measure its average precision.

    Example: moco-eval detect my_encoder.pth --dataset voc --data /datasets/VOCdevkit
    """
    from moco_eval.config.detection import DetectConfig
    from moco_eval.detection.recipe import DATASETS, DEFAULTS

    dataset = options.dataset
    if dataset is None:
        raise InputError(
            "detect needs --dataset; for example: moco-eval detect runs/v2/checkpoints/last.pth --dataset voc "
            "--data /datasets/VOCdevkit, or built in: --dataset digits"
        )
    require_named(layout_of(dataset), DATASETS)
    name = recipe or DEFAULTS[dataset]
    options = tried(name, "detect", options)
    config = load_recipe(name, "detect", DetectConfig, options)
    pixels_of(checkpoint, options)

    from moco_eval.detection import detect as detection
    from moco_eval.detection.task import DetectionTask
    from moco_eval.papers.forecast import of_detection
    from moco_eval.results.run_directory import default_output

    encoder = load_encoder(checkpoint, options, config.seed)
    splits = (options.train_split, options.test_split)
    task = DetectionTask(
        encoder, config, options.called, options.data, *splits, options.trials, engine, limit=options.limit
    )
    output = options.output or default_output("detect", encoder, task.in_path, config.protocol)
    return fine_tuned(detection.plan, of_detection, detection.detect, detection.format_table, task, output, options)
