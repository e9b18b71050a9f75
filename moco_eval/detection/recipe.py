"""A detection recipe: every number of a fine-tuning, as a config; and its learning rate."""

from moco_eval.config.detection import DetectConfig
from moco_eval.config.fine_tuning import Protocol, protocol_deviations, warmed_up
from moco_eval.config.protocol_name import kind_and_name

PROTOCOLS = {
    "detect/voc-r50-c4-24k@1": Protocol("r50_c4_24k", "voc", "resnet50"),
    "detect/voc-r50-dc5-24k@1": Protocol("r50_dc5_24k", "voc", "resnet50"),
    "detect/voc07-r50-c4-9k@1": Protocol("voc07_r50_c4_9k", "voc07", "resnet50"),
    "detect/voc07-r50-dc5-9k@1": Protocol("voc07_r50_dc5_9k", "voc07", "resnet50"),
    **{
        f"detect/coco-r50-{model}-{schedule}@1": Protocol(f"coco_r50_{model}_{schedule}", "coco", "resnet50")
        for model in ("c4", "fpn")
        for schedule in ("1x", "2x", "6x")
    },
    "detect/coco-keypoints-r50-fpn-2x@1": Protocol("coco_keypoints_r50_fpn_2x", "coco", "resnet50"),
    "detect/coco-vitdet-b@1": Protocol("coco_vitdet_b", "coco", "vit_base_patch16_224"),
    "detect/voc-own-vitdet-b-24k@1": Protocol("voc_own_vitdet_b_24k", "voc", "vit_base_patch16_224"),
    "detect/digits-r50-c4@1": Protocol("digits_r50_c4", "digits", None),
}


DEFAULTS = {
    "voc": "r50_c4_24k",
    "voc07": "voc07_r50_c4_9k",
    "voc-folder": "r50_c4_24k",
    "coco": "coco_r50_fpn_1x",
    "coco-folder": "coco_r50_fpn_1x",
    "digits": "digits_r50_c4",
}  # the recipe of a data set where none is given
DATASETS = tuple(DEFAULTS)


def is_on(protocol: str, *data: str) -> bool:
    """Whether a protocol's name says that it is detection on one of these data: detect/voc-r50-c4-24k@1 on voc.

    It may be one of the user's own.
    """
    kind, name = kind_and_name(protocol)
    return kind == "detect" and name.startswith(data)


def recipe_deviations(recipe: DetectConfig, dataset: str, arch: str) -> list[str]:
    """In words, where a run leaves the protocol it names."""
    free = ("input.format",)  # which can only agree with the encoder
    return protocol_deviations(recipe, "detect", PROTOCOLS, dataset, arch, free)


def learning_rate(recipe: DetectConfig, iteration: int) -> float:
    """The learning rate of an iteration, counted from 0."""
    schedule = recipe.schedule
    return warmed_up(
        recipe.optimizer.lr * schedule.gamma ** sum(iteration >= step for step in schedule.steps), schedule, iteration
    )
