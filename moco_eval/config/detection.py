"""A detection recipe: every number of a fine-tuning."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from moco_eval.config.base import Expect, Model, Sgd, usual_workers

FPN_LEVELS = 5  # p2 to p6


Count = Annotated[int, Field(gt=0)]


Fraction = Annotated[float, Field(gt=0, le=1)]


class Input(Model):
    """The shorter side of an image, in pixels: drawn per image from `min_size_train`, fixed at test.

    `jitter`: large-scale jitter in place of `min_size_train`; the image is resized to fit a square of `max_size` times
    a scale drawn between these two, then cut to that square somewhere.
    `format`: the order of the colours that the encoder must expect; auto takes what it does.
    """

    min_size_train: tuple[Count, ...] = Field(min_length=1)
    min_size_test: Count
    max_size: Count = 1333
    flip: float = Field(0.5, ge=0, le=1)
    jitter: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = None
    aspect_grouping: bool = True
    format: Literal["auto", "rgb", "bgr"] = "auto"

    @field_validator("jitter")
    @classmethod
    def _scales(cls, jitter: tuple[float, float] | None) -> tuple[float, float] | None:
        if jitter is not None and jitter[0] > jitter[1]:
            raise ValueError(f"jitter is the smallest and the largest scale, got {list(jitter)}")
        return jitter


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


class Optimizer(Sgd):
    """SGD, or AdamW, which has no use for `sgd_momentum`.

    `layer_decay`: the rate of a ViT's layer is that of the layer above times this; what is new has the whole rate.
    """

    kind: Literal["sgd", "adamw"] = "sgd"
    layer_decay: Fraction = 1.0


class Iterations(Model):
    """Steps of the optimizer: linear warm-up from lr x warmup_factor, a tenth (`gamma`) at each of `steps`."""

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
    `drop_path`: of a ViT, the probability that an image skips the last block; it rises from 0 at the first.
    """

    protocol: str
    model: Literal["r50_c4", "r50_dc5", "r50_fpn", "vitdet"] = "r50_c4"
    drop_path: float = Field(0.0, ge=0, lt=1)
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
    optimizer: Optimizer
    schedule: Iterations
    precise_bn: int = Field(200, ge=0)
    data: DataHandling = DataHandling()
    scenes: Scenes | None = None
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    checkpoints: KeepState = KeepState()
    log_every: int = Field(20, gt=0)
    workers: int = Field(default_factory=usual_workers, ge=0)
    seed: int = Field(default=0, ge=0)
    expect: Expect | None = None

    @model_validator(mode="after")
    def _parts_fit(self):
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} does not divide into accumulate {self.accumulate} parts")
        if self.keypoints and self.model != "r50_fpn":
            raise ValueError(f"keypoints need model r50_fpn, got {self.model}")
        if self.model != "vitdet" and (self.drop_path or self.optimizer.layer_decay != 1):
            raise ValueError(f"drop_path and optimizer.layer_decay need model vitdet, got {self.model}")
        if self.model in ("r50_fpn", "vitdet") and len(self.anchors.sizes) != FPN_LEVELS:
            raise ValueError(f"an FPN has {FPN_LEVELS} levels with an anchor size each, got {len(self.anchors.sizes)}")
        return self
