"""A detection recipe: every number of a fine-tuning, as a config; and its learning rate."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from moco_eval.config import load as configs
from moco_eval.config.load import Expect, Model, Sgd
from moco_eval.errors import InputError
from moco_eval.results.record import deviations

FPN_LEVELS = 5  # p2 to p6
Count = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Input(Model):
    """The shorter side of an image, in pixels: drawn per image from `min_size_train`, fixed at test.

    `format`: the order of the colours that the encoder must expect; auto takes what it does.
    """

    min_size_train: tuple[Count, ...] = Field(min_length=1)
    min_size_test: Count
    max_size: Count = 1333
    flip: float = Field(0.5, ge=0, le=1)
    aspect_grouping: bool = True
    format: Literal["auto", "rgb", "bgr"] = "auto"


class Anchors(Model):
    """Side of the square anchor, in pixels of the resized image, and height over width.

    With an FPN each size belongs to a level of its own, p2 to p6.
    """

    sizes: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1)
    ratios: tuple[Annotated[float, Field(gt=0)], ...] = Field((0.5, 1.0, 2.0), min_length=1)


class Rpn(Model):
    """Region proposals: how many before (of each level) and after NMS, and the anchors sampled per image."""

    pre_nms_train: Count = 12000
    post_nms_train: Count = 2000
    pre_nms_test: Count = 6000
    post_nms_test: Count = 1000
    nms: Fraction = 0.7
    background_iou: float = Field(default=0.3, ge=0, le=1)
    foreground_iou: float = Field(default=0.7, ge=0, le=1)
    batch_per_image: Count = 256
    positive_fraction: Fraction = 0.5


class Roi(Model):
    """Regions sampled per image, what counts as foreground, and the side of the pooled region.

    `mask_pool_size`: of the regions that the mask and the keypoint head see; C4 shares those of the boxes.
    `box_beta`: of the smooth L1 loss; 0 is L1.
    """

    batch_per_image: Count = 512
    positive_fraction: Fraction = 0.25
    foreground_iou: Fraction = 0.5
    pool_size: int = Field(default=14, ge=2)
    mask_pool_size: int = Field(default=14, ge=2)
    box_beta: float = Field(default=0.0, ge=0)


class Testing(Model):
    """What the detector may say: least score, NMS among boxes of a class, boxes per image."""

    score: float = Field(default=0.05, ge=0, lt=1)
    nms: Fraction = 0.5
    detections: Count = 100


class Iterations(Model):
    """Steps of SGD: linear warm-up from lr x warmup_factor, a tenth (`gamma`) at each of `steps`."""

    iterations: Count
    steps: tuple[Count, ...] = ()
    gamma: Fraction = 0.1
    warmup: int = Field(100, ge=0)
    warmup_factor: float = Field(0.001, ge=0, le=1)

    @model_validator(mode="after")
    def _steps_ascend(self):
        if list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"schedule.steps must ascend, got {list(self.steps)}")
        return self


class DataHandling(Model):
    """`clip`: cut boxes to their image and pass over unknown classes; both are refused otherwise.

    `shuffle_labels`: a control; the training labels are dealt out anew among all training boxes.
    """

    clip: bool = False
    shuffle_labels: bool = False


class Scenes(Model):
    """How many of the built-in scenes `--dataset digits` draws; other data have no use for it."""

    train: Count = 200
    test: Count = 60
    seed: int = Field(default=0, ge=0)


class KeepState(Model):
    every: Count = 1000


class DetectConfig(Model):
    """Fine-tuning of Faster R-CNN, Mask R-CNN or its keypoint version; see docs/detection.md.

    `bn`: how processes share the statistics of a batch: naive_sync (each process counts the same), sync (each element
    does), local (not at all). One process has one batch, and they are the same.
    `accumulate`: a step's batch in so many parts, one after the other; BN sees each part alone.
    """

    protocol: str
    model: Literal["r50_c4", "r50_dc5", "r50_fpn"] = "r50_c4"
    masks: bool = False
    keypoints: bool = False
    bn: Literal["naive_sync", "sync", "local"] = "naive_sync"
    input: Input
    anchors: Anchors
    rpn: Rpn = Rpn()
    roi: Roi = Roi()
    test: Testing = Testing()
    batch_size: Count = 16
    accumulate: Count = 1
    optimizer: Sgd
    schedule: Iterations
    precise_bn: int = Field(200, ge=0)
    data: DataHandling = DataHandling()
    scenes: Scenes | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoints: KeepState = KeepState()
    log_every: int = Field(20, gt=0)
    workers: int = Field(4, ge=0)
    seed: int = Field(default=0, ge=0)
    expect: Expect | None = None

    @model_validator(mode="after")
    def _parts_fit(self):
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} does not divide into accumulate {self.accumulate} parts")
        if self.keypoints and self.model != "r50_fpn":
            raise ValueError(f"keypoints need model r50_fpn, got {self.model}")
        if self.model == "r50_fpn" and len(self.anchors.sizes) != FPN_LEVELS:
            raise ValueError(f"an FPN has {FPN_LEVELS} levels with an anchor size each, got {len(self.anchors.sizes)}")
        return self


@dataclass(frozen=True)
class Protocol:
    """What a protocol stands for: a shipped config, a data set and, where it fixes one, an architecture."""

    recipe: str
    dataset: str
    arch: str | None


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


def departures(recipe: DetectConfig, dataset: str, arch: str) -> list[str]:
    """In words, where a run leaves the protocol it names."""
    if recipe.protocol not in PROTOCOLS:
        return [f"protocol {recipe.protocol} is not one of moco-eval's"]
    protocol = PROTOCOLS[recipe.protocol]
    canonical = configs.load(protocol.recipe, "detect", DetectConfig)
    words = []
    followed = rescaled(canonical, recipe.batch_size)
    if recipe.batch_size != canonical.batch_size and _rates(recipe) == _rates(followed):
        words.append(
            f"batch {recipe.batch_size} instead of {canonical.batch_size}: lr, iterations, steps and warm-up rescaled "
            "by the linear rule"
        )
        canonical = followed
    words += deviations(recipe, canonical, free=("input.format",))  # which can only agree with the encoder
    if dataset != protocol.dataset:
        words.append(f"dataset {dataset} instead of {protocol.dataset}")
    if protocol.arch not in (None, arch, arch.removesuffix("_msra")):  # the supervised baseline is MSRA's ResNet-50
        words.append(f"arch {arch} instead of {protocol.arch}")
    return words


def rescaled(recipe: DetectConfig, batch: int) -> DetectConfig:
    """The recipe for a batch of another size: the rate goes with it, and as many images are seen.

    Iterations, steps and warm-up are divided by what the rate is multiplied with, rounded.

    Raises:
        InputError: the batch does not divide into `accumulate` parts.
    Source: Goyal et al. 2017, arXiv:1706.02677, and Kaiming He in facebookresearch/moco, issue 11 (batch 8, lr 0.01,
    twice the iterations and steps); the warm-up as in detectron2's auto_scale_workers.
    """
    factor, schedule = batch / recipe.batch_size, recipe.schedule
    longer = {
        "iterations": max(1, round(schedule.iterations / factor)),
        "steps": sorted({max(1, round(step / factor)) for step in schedule.steps}),
        "warmup": round(schedule.warmup / factor),
    }
    changed = {
        "batch_size": batch,
        "optimizer": recipe.optimizer.model_dump() | {"lr": recipe.optimizer.lr * factor},
        "schedule": schedule.model_dump() | longer,
        "expect": None,
    }
    try:
        return DetectConfig.model_validate(recipe.model_dump() | changed)
    except ValidationError as error:
        raise InputError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def _rates(recipe: DetectConfig) -> tuple:
    """What `rescaled` carries along."""
    schedule = recipe.schedule
    return (recipe.optimizer.lr, schedule.iterations, schedule.steps, schedule.warmup)


def learning_rate(recipe: DetectConfig, iteration: int) -> float:
    """The learning rate of an iteration, counted from 0."""
    schedule = recipe.schedule
    lr = recipe.optimizer.lr * schedule.gamma ** sum(iteration >= step for step in schedule.steps)
    if iteration < schedule.warmup:
        done = iteration / schedule.warmup
        lr *= schedule.warmup_factor * (1 - done) + done
    return lr
