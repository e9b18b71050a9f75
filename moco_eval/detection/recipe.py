"""A detection recipe: every number of a fine-tuning, as a config; and its learning rate."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from moco_eval import config
from moco_eval.config import Expect, Model, Sgd
from moco_eval.results import deviations

Count = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Input(Model):
    """The shorter side of an image, in pixels: drawn per image from `min_size_train`, fixed at test."""

    min_size_train: tuple[Count, ...] = Field(min_length=1)
    min_size_test: Count
    max_size: Count = 1333
    flip: float = Field(0.5, ge=0, le=1)
    aspect_grouping: bool = True


class Anchors(Model):
    """Side of the square anchor, in pixels of the resized image, and height over width."""

    sizes: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1)
    ratios: tuple[Annotated[float, Field(gt=0)], ...] = Field((0.5, 1.0, 2.0), min_length=1)


class Rpn(Model):
    """Region proposals: how many before and after NMS, and the anchors sampled per image."""

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
    """Regions sampled per image, what counts as foreground, and the side of the pooled region."""

    batch_per_image: Count = 512
    positive_fraction: Fraction = 0.25
    foreground_iou: Fraction = 0.5
    pool_size: int = Field(default=14, ge=2)


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
    """Faster R-CNN fine-tuning; see docs/detection.md."""

    protocol: str
    model: Literal["r50_c4"] = "r50_c4"
    input: Input
    anchors: Anchors
    rpn: Rpn = Rpn()
    roi: Roi = Roi()
    test: Testing = Testing()
    batch_size: Count = 16
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


@dataclass(frozen=True)
class Protocol:
    """What a protocol stands for: a shipped config, a data set and, where it fixes one, an architecture."""

    recipe: str
    dataset: str
    arch: str | None


PROTOCOLS = {
    "detect/voc-r50-c4-24k@1": Protocol("r50_c4_24k", "voc", "resnet50"),
    "detect/digits-r50-c4@1": Protocol("digits_r50_c4", "digits", None),
}


def departures(recipe: DetectConfig, dataset: str, arch: str) -> list[str]:
    """In words, where a run leaves the protocol it names."""
    if recipe.protocol not in PROTOCOLS:
        return [f"protocol {recipe.protocol} is not one of moco-eval's"]
    protocol = PROTOCOLS[recipe.protocol]
    words = deviations(recipe, config.load(protocol.recipe, "detect", DetectConfig))
    if dataset != protocol.dataset:
        words.append(f"dataset {dataset} instead of {protocol.dataset}")
    if protocol.arch not in (None, arch):
        words.append(f"arch {arch} instead of {protocol.arch}")
    return words


def learning_rate(recipe: DetectConfig, iteration: int) -> float:
    """The learning rate of an iteration, counted from 0."""
    schedule = recipe.schedule
    lr = recipe.optimizer.lr * schedule.gamma ** sum(iteration >= step for step in schedule.steps)
    if iteration < schedule.warmup:
        done = iteration / schedule.warmup
        lr *= schedule.warmup_factor * (1 - done) + done
    return lr
