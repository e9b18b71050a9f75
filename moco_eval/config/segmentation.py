"""A segmentation recipe: every number of a training on masks, and of the evaluation after it."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from moco_eval.config.base import Expect, Model, usual_workers
from moco_eval.config.detection import Count, Fraction, KeepState, Scenes

Side = Annotated[int, Field(ge=8, le=8192)]
Scale = Annotated[float, Field(gt=0, le=8)]
DigitSide = Annotated[int, Field(ge=8, le=128)]  # of a canvas of 128 pixels
Digits = Annotated[int, Field(ge=1, le=50)]


class Views(Model):
    """What is cut from a training image.

    fit: the longer and the shorter side that the image is resized into first, its shape kept; null leaves it as it is.
    scales: smallest and largest factor, drawn per image. step: between the factors; 0 draws any.
    crop: pixels along one side; what the image does not fill has its mean colour and is ignored.
    most_of_one_class: share of a crop that one class may have; another is drawn up to ten times.
    distort: brightness, contrast, saturation and hue, as mmsegmentation draws them.
    """

    fit: tuple[Side, Side] | None = None
    scales: tuple[Scale, Scale] = (0.5, 2.0)
    step: float = Field(default=0.0, ge=0, le=1)
    crop: Side
    flip: float = Field(default=0.5, ge=0, le=1)
    most_of_one_class: Fraction = 1.0
    distort: bool = False

    @model_validator(mode="after")
    def _scales_ascend(self):
        if self.scales[0] > self.scales[1]:
            raise ValueError(f"scales are the smallest and the largest factor, got {list(self.scales)}")
        return self


class Testing(Model):
    """How a test image is looked at: resized to `fit` as in training, whole or in windows of `window` pixels.

    stride: from one window to the next. The scores are brought back to the image's own size in any case.
    """

    fit: tuple[Side, Side] | None = None
    window: Side | None = None
    stride: Side | None = None

    @model_validator(mode="after")
    def _a_window_has_a_stride(self):
        if (self.window is None) != (self.stride is None):
            raise ValueError("test.window and test.stride belong together")
        if self.window and self.stride and self.stride > self.window:
            raise ValueError(f"test.stride {self.stride} would leave gaps between windows of {self.window} pixels")
        return self


class Optimizer(Model):
    """SGD with momentum, or AdamW; `lr` belongs to the batch size written beside it.

    decay_norms: whether the scales and biases of norms are decayed as the other weights are.
    """

    kind: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(gt=0)
    sgd_momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=1e-4, ge=0)
    decay_norms: bool = True


class Iterations(Model):
    """The rate of each iteration i of I, after a linear warm-up from lr x warmup_factor.

    step: a tenth (`gamma`) at each of `steps`; poly: (1 - i/I)^power down to `least`; power 1 is linear.
    """

    kind: Literal["step", "poly"]
    iterations: Count
    steps: tuple[Count, ...] = ()
    gamma: Fraction = 0.1
    power: float = Field(default=0.9, gt=0)
    least: float = Field(default=0.0, ge=0)
    warmup: int = Field(default=0, ge=0)
    warmup_factor: float = Field(default=0.001, ge=0, le=1)

    @model_validator(mode="after")
    def _steps_belong_to_step(self):
        if list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"schedule.steps must ascend, got {list(self.steps)}")
        if self.steps and self.kind != "step":
            raise ValueError(f"schedule.kind {self.kind!r} takes no steps")
        return self


class Sweep(Model):
    """Heads trained side by side on the same features, one for each pair of rate and decay.

    held_out: share of the training images that is not trained on, and chooses the head.
    """

    lr: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1)
    weight_decay: tuple[Annotated[float, Field(ge=0)], ...] = Field(min_length=1)
    held_out: float = Field(default=0.1, gt=0, lt=1)


class DataHandling(Model):
    """shuffle_masks: a control; the training masks are dealt out anew among all training images."""

    shuffle_masks: bool = False


class MaskScenes(Scenes):
    """The built-in scenes with masks; `side` and `count`: least and most pixels of a digit, and digits of a scene."""

    side: tuple[DigitSide, DigitSide] = (20, 40)
    count: tuple[Digits, Digits] = (2, 6)

    @model_validator(mode="after")
    def _ascend(self):
        for name in ("side", "count"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"scenes.{name} is the least and the most, got [{low}, {high}]")
        return self


class SegmentConfig(Model):
    """Semantic segmentation; see docs/segmentation.md.

    model: fcn16s (MoCo v1), fcn_d8 (mmsegmentation's FCN), or linear: a 1x1 convolution on the frozen encoder.
    bn: whether processes share the statistics of a batch (sync) or not (local).
    align_corners: how scores are enlarged: the corners of the map on those of the image, or edges on edges.
    mean_over: the pixels that the loss is a mean over: labelled, or all, where an ignored one counts as no loss.
    auxiliary: weight of the loss of a second head on layer3; 0 for none.
    output_stride: a frozen ResNet is dilated until its map has this stride; other networks keep theirs.
    """

    protocol: str
    model: Literal["fcn16s", "fcn_d8", "linear"]
    bn: Literal["sync", "local"] = "sync"
    views: Views
    test: Testing = Testing()
    align_corners: bool = False
    mean_over: Literal["labelled", "all"] = "labelled"
    auxiliary: float = Field(default=0.0, ge=0)
    output_stride: Literal[8, 16] | None = None
    dropout: float = Field(default=0.0, ge=0, lt=1)
    batch_size: Count = 16
    optimizer: Optimizer
    schedule: Iterations
    sweep: Sweep | None = None
    data: DataHandling = DataHandling()
    scenes: MaskScenes | None = None
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    checkpoints: KeepState = KeepState()
    log_every: int = Field(default=20, gt=0)
    workers: int = Field(default_factory=usual_workers, ge=0)
    seed: int = Field(default=0, ge=0)
    expect: Expect | None = None

    @model_validator(mode="after")
    def _parts_fit(self):
        if self.sweep and self.model != "linear":
            raise ValueError(f"sweep is only for frozen encoders (model linear), got {self.model}")
        if self.auxiliary and self.model != "fcn_d8":
            raise ValueError(f"auxiliary is only for model fcn_d8, got {self.model}")
        if self.output_stride and self.model != "linear":
            raise ValueError(f"output_stride is only for frozen encoders (model linear), got {self.model}")
        return self
