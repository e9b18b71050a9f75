"""Protocols of segmentation: a config and the data that it is of; and the learning rate."""

from moco_eval.config.fine_tuning import Protocol, protocol_deviations, warmed_up
from moco_eval.config.segmentation import SegmentConfig

PROTOCOLS = {
    "segment/voc-fcn16s-30k@1": Protocol("voc_fcn16s_30k", "voc-aug", "resnet50"),
    "segment/cityscapes-fcn16s-90k@1": Protocol("cityscapes_fcn16s_90k", "cityscapes", "resnet50"),
    "segment/vocaug-fcn-20k@1": Protocol("vocaug_fcn_20k", "voc-aug", "resnet50"),
    "segment/linear@1": Protocol("linear", None, None),
    "segment/linear-dinov2@1": Protocol("linear_dinov2", None, None),
    "segment/digits-fcn16s@2": Protocol("digits_fcn16s", "digits", None),
    "segment/digits-linear@2": Protocol("digits_linear", "digits", None),
}
DEFAULTS = {
    "voc-aug": "voc_fcn16s_30k",
    "voc2012": "voc_fcn16s_30k",
    "cityscapes": "cityscapes_fcn16s_90k",
    "digits": "digits_fcn16s",
}  # the recipe of a data set where none is given; of the others linear
DATASETS = ("voc-aug", "voc2012", "cityscapes", "ade20k", "coco-stuff", "mask-folder", "digits")


def recipe_deviations(recipe: SegmentConfig, dataset: str, arch: str) -> list[str]:
    """In words, where a run leaves the protocol it names."""
    return protocol_deviations(recipe, "segment", PROTOCOLS, dataset, arch)


def learning_rate(recipe: SegmentConfig, iteration: int) -> float:
    """The learning rate of an iteration, counted from 0; heads of a sweep have it in the ratio of their own."""
    schedule = recipe.schedule
    if schedule.kind == "step":
        lr = recipe.optimizer.lr * schedule.gamma ** sum(iteration >= step for step in schedule.steps)
    else:
        left = (1 - iteration / schedule.iterations) ** schedule.power
        lr = (recipe.optimizer.lr - schedule.least) * left + schedule.least
    return warmed_up(lr, schedule, iteration)
