"""Protocols of segmentation: a config and the data that it is of; and the learning rate."""

from dataclasses import dataclass

from moco_eval.config import load as configs
from moco_eval.config.fine_tuning import recipe_differences
from moco_eval.config.segmentation import SegmentConfig


@dataclass(frozen=True)
class Protocol:
    """What a protocol stands for: a shipped config and, where it fixes them, a data set and an architecture."""

    recipe: str
    dataset: str | None
    arch: str | None


PROTOCOLS = {
    "segment/voc-fcn16s-30k@1": Protocol("voc_fcn16s_30k", "voc-aug", "resnet50"),
    "segment/cityscapes-fcn16s-90k@1": Protocol("cityscapes_fcn16s_90k", "cityscapes", "resnet50"),
    "segment/vocaug-fcn-20k@1": Protocol("vocaug_fcn_20k", "voc-aug", "resnet50"),
    "segment/linear@1": Protocol("linear", None, None),
    "segment/linear-dinov2@1": Protocol("linear_dinov2", None, None),
    "segment/digits-fcn16s@1": Protocol("digits_fcn16s", "digits", None),
    "segment/digits-linear@1": Protocol("digits_linear", "digits", None),
}
DEFAULTS = {
    "voc-aug": "voc_fcn16s_30k",
    "voc2012": "voc_fcn16s_30k",
    "cityscapes": "cityscapes_fcn16s_90k",
    "digits": "digits_fcn16s",
}  # the recipe of a data set where none is given; of the others linear


def recipe_deviations(recipe: SegmentConfig, dataset: str, arch: str) -> list[str]:
    """In words, where a run leaves the protocol it names."""
    if recipe.protocol not in PROTOCOLS:
        return [f"protocol {recipe.protocol} is not one of moco-eval's"]
    protocol = PROTOCOLS[recipe.protocol]
    canonical = configs.load(protocol.recipe, "segment", SegmentConfig)
    deviations = recipe_differences(recipe, canonical)
    if protocol.dataset not in (None, dataset):
        deviations.append(f"dataset {dataset} instead of {protocol.dataset}")
    if protocol.arch not in (None, arch, arch.removesuffix("_msra")):  # the supervised baseline is MSRA's ResNet-50
        deviations.append(f"arch {arch} instead of {protocol.arch}")
    return deviations


def learning_rate(recipe: SegmentConfig, iteration: int) -> float:
    """The learning rate of an iteration, counted from 0; heads of a sweep have it in the ratio of their own."""
    schedule = recipe.schedule
    if schedule.kind == "step":
        lr = recipe.optimizer.lr * schedule.gamma ** sum(iteration >= step for step in schedule.steps)
    else:
        left = (1 - iteration / schedule.iterations) ** schedule.power
        lr = (recipe.optimizer.lr - schedule.least) * left + schedule.least
    if iteration < schedule.warmup:
        done = iteration / schedule.warmup
        lr *= schedule.warmup_factor * (1 - done) + done
    return lr
