"""The configs of the classification protocols."""

from typing import ClassVar, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from moco_eval.config.base import Augmentation, Extended, Model, Positive, Published, Run, Schedule, Sgd
from moco_eval.config.pretrain import Optimizer


class LinearConfig(Run):
    """Linear classification on frozen features, trained on crops."""

    optimizer: Sgd
    schedule: Schedule
    augmentation: Augmentation = Augmentation()


class FinetuneSchedule(Extended):
    """The learning rates while a backbone is fine-tuned.

    step: they fall to `gamma` of themselves at each of `milestones`, in epochs;
    cosine: they fall after every step, half a cosine from all to a thousandth of themselves;
    warmup_cosine: they rise after every step, from `warmup_lr` on, and then fall by half a cosine to `min_lr`;
    deit: they change once per epoch and one epoch late, and the cosine began with the warm-up.
    """

    later = ("warmup_epochs", "warmup_lr", "min_lr")

    kind: Literal["cosine", "step", "warmup_cosine", "deit"]
    epochs: int = Positive
    milestones: tuple[int, ...] = ()
    gamma: float = Field(0.1, gt=0, le=1)
    warmup_epochs: int = Field(0, ge=0)
    warmup_lr: float = Field(0.0, ge=0)
    min_lr: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _milestones_belong_to_step(self):
        if (self.kind == "step") != bool(self.milestones):
            raise ValueError(f"schedule.kind {self.kind!r} {'needs' if self.kind == 'step' else 'takes no'} milestones")
        return self

    @model_validator(mode="after")
    def _warmup_has_its_kinds(self):
        if self.kind in ("cosine", "step") and (self.warmup_epochs or self.warmup_lr or self.min_lr):
            raise ValueError(
                f"schedule.kind {self.kind!r} takes no warmup_epochs, warmup_lr and min_lr; warmup_cosine and deit do"
            )
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs} leave nothing of {self.epochs} epochs; at most {self.epochs - 1}"
            )
        return self


class FinetuneOptimizer(Optimizer):
    """SGD, or AdamW without weight decay on biases, norms, positions and the class token.

    layer_decay: the rate of a transformer's block, in multiples of the next one's; the last layer's is `lr`.
    """

    later: ClassVar[tuple[str, ...]] = ("kind", "layer_decay")

    kind: Literal["sgd", "adamw"] = "sgd"
    layer_decay: float = Field(1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _layers_are_adamws(self):
        if self.kind != "adamw" and self.layer_decay != 1:
            raise ValueError(f"optimizer.layer_decay {self.layer_decay:g} needs optimizer.kind adamw")
        return self


class RandAugment(Model):
    """timm's RandAugment: two operations, each at probability a half, of a strength N(magnitude, magnitude_std), of 10;
    those that grow with it."""

    magnitude: int = Field(9, ge=0, le=10)
    magnitude_std: float = Field(0.5, ge=0)


class FinetuneAugmentation(Extended, Augmentation):
    """Crop, flip, RandAugment, and noise in the place of a rectangle (random erasing), at probability `erasing`."""

    later = ("interpolation", "rand_augment", "erasing")

    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    rand_augment: RandAugment | None = None
    erasing: float = Field(default=0.0, ge=0, le=1)


class Mixup(Model):
    """Pairs of images mixed: the whole (alpha of mixup's beta distribution) or a rectangle (cutmix's), half of the
    time each where both are given.

    groups: equal parts of a batch with a draw of their own, as so many GPUs have; pairs are of one part.
    """

    alpha: float = Field(0.0, ge=0)
    cutmix: float = Field(0.0, ge=0)
    groups: int = Field(1, gt=0)

    @model_validator(mode="after")
    def _something_is_mixed(self):
        if not (self.alpha or self.cutmix):
            raise ValueError("mixup.alpha and mixup.cutmix are 0; for no mixing say mixup: null")
        return self


class FinetuneConfig(Extended, Run):
    """A backbone and a new linear layer trained together.

    head_lr: the layer's learning rate, in multiples of the backbone's.
    head_init: bias 0 and weights N(0, 0.01) (normal), N(0, 0.02) (deit) or N(0, 2e-5) (near_zero); uniform is torch's
        own for nn.Linear.
    bn_groups: equal parts of a batch whose statistics batch norm takes apart, as so many GPUs do; 1 is the whole batch,
        however many processes share it.
    drop_last: leave out the images of an epoch that make no whole batch.
    smoothing: share of a label that goes to all classes alike.
    drop_path: how often a sample skips the last block's branches; rises from 0 at the first block.
    pooling: mean is the patch tokens' mean behind a new layer norm; none is the encoder's own.
    repeated_augmentation: how often an image stands in an epoch, each time augmented anew; an epoch stays as long.
    test_interpolation: of test images; none is what the encoder expects.
    test_every: epochs between two looks at the test images; the last epoch is always looked at, and reported.
    """

    later = ("smoothing", "mixup", "drop_path", "pooling", "repeated_augmentation", "test_interpolation")

    optimizer: FinetuneOptimizer
    head_lr: float = Positive
    head_init: Literal["normal", "uniform", "deit", "near_zero"] = "normal"
    schedule: FinetuneSchedule
    augmentation: FinetuneAugmentation = FinetuneAugmentation()
    mixup: Mixup | None = None
    smoothing: float = Field(0.0, ge=0, lt=1)
    drop_path: float = Field(0.0, ge=0, lt=1)
    pooling: Literal["mean"] | None = None
    repeated_augmentation: int = Field(1, gt=0)
    bn_groups: int = Field(1, gt=0)
    drop_last: bool = False
    test_interpolation: Literal["bilinear", "bicubic"] | None = None
    test_every: int = Field(1, gt=0)
    expect: tuple[Published, ...] | None = None

    @model_validator(mode="after")
    def _groups_are_equal(self):
        if self.bn_groups > 1 and (self.batch_size % self.bn_groups or not self.drop_last):
            raise ValueError(
                f"bn_groups {self.bn_groups} needs a batch_size that it divides, not {self.batch_size}, and drop_last "
                "true"
            )
        return self

    @model_validator(mode="after")
    def _pairs_are_whole(self):
        if self.mixup and (self.batch_size % (2 * self.mixup.groups) or not self.drop_last):
            raise ValueError(
                f"mixup.groups {self.mixup.groups} of pairs need a batch_size that {2 * self.mixup.groups} divides, "
                f"not {self.batch_size}, and drop_last true; --set mixup.groups=1 takes any even batch_size"
            )
        return self

    @model_validator(mode="after")
    def _adamw_has_one_rate(self):
        if self.optimizer.kind == "adamw" and self.head_lr != 1:
            raise ValueError(f"head_lr {self.head_lr:g} is SGD's; with optimizer.kind adamw it must be 1")
        return self


class QuickConfig(Run):
    """A linear classifier on features of `crops` epochs of random crops and of the clean crop, extracted once."""

    crops: int = Field(5, ge=0)
    optimizer: Sgd
    schedule: Schedule
    augmentation: Augmentation = Augmentation()


class SweepConfig(Run):
    """Many linear classifiers in one pass: each of `learning_rates` with each of `weight_decays`, each of `features`,
    with and without parameter-free batch norm; chosen on `held_out`, a share of the training images.
    """

    learning_rates: tuple[PositiveFloat, ...] = Field(min_length=1)
    weight_decays: tuple[NonNegativeFloat, ...] = Field(min_length=1)
    batch_norm: tuple[bool, ...] = Field(min_length=1)
    features: tuple[str, ...] = Field(("pooled",), min_length=1)
    sgd_momentum: float = Field(0.9, ge=0, lt=1)
    held_out: float = Field(0.1, gt=0, lt=1)
    schedule: Schedule
    augmentation: Augmentation = Augmentation()

    @field_validator("learning_rates", "weight_decays", "batch_norm", "features")
    @classmethod
    def _no_head_twice(cls, values: tuple, info: ValidationInfo) -> tuple:
        if len(set(values)) != len(values):
            raise ValueError(f"{info.field_name} holds a value twice")
        return values


class KnnConfig(Run):
    """Weighted kNN classification: exp(cosine similarity / temperature) votes of the k nearest.

    memory: GB of working blocks of the search, per process; None is 1 on a CPU, a quarter of what is free on a GPU.
    """

    k: int = Positive
    temperature: float = Positive
    feature: str = "pooled"  # or head, or a stage of the network
    memory: float | None = Field(None, gt=0)
    batch_size: int = Field(256, gt=0)


class KnnGridConfig(Run):
    """Weighted kNN with k, temperature and distance chosen by leave-one-out on the training images.

    A temperature belongs to cosine alone. queries: training images left out in turn, at most; drawn from the seed.
    memory: as in KnnConfig.
    """

    k: tuple[int, ...] = Field(min_length=1)
    temperature: tuple[float, ...] = Field(min_length=1)
    distance: tuple[Literal["cosine", "euclidean"], ...] = Field(min_length=1)
    queries: int = Field(50_000, gt=0)
    feature: str = "pooled"
    memory: float | None = Field(None, gt=0)
    batch_size: int = Field(256, gt=0)

    @field_validator("k", "temperature", "distance")
    @classmethod
    def _a_grid(cls, values: tuple, info: ValidationInfo) -> tuple:
        if len(set(values)) != len(values):
            raise ValueError(f"{info.field_name} holds a value twice")
        if info.field_name != "distance" and min(values) <= 0:
            raise ValueError(f"every {info.field_name} must be greater than 0")
        return values


class CostPath(Model):
    """`count` values of C, the inverse of the regularisation of the summed loss, evenly spaced in their logarithm."""

    low: float = Positive
    high: float = Positive
    count: int = Positive

    @model_validator(mode="after")
    def _it_goes_up(self):
        if self.count > 1 and self.low >= self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        return self


class LogisticConfig(Run):
    """Logistic regression on frozen features; C is chosen on `held_out`, a share of the training images.

    solver: torch's L-BFGS or scikit-learn's; they reach the same optimum, see docs/protocols/logistic.md.
    tolerance: of the gradient's largest entry; a fit that is stopped at max_iterations before says so.
    """

    path: CostPath
    held_out: float = Field(0.2, gt=0, lt=1)
    solver: Literal["torch", "sklearn"] = "torch"
    tolerance: float = Field(1e-5, gt=0)
    max_iterations: int = Field(1000, gt=0)
    batch_size: int = Field(256, gt=0)


class SvmConfig(Run):
    """One linear SVM per class on frozen features, the C of each from `costs` by three-fold cross-validation.

    svm/voc07-low-shot@1 trains on each of `shots` images per class, `samples` times, and chooses one C for all classes.
    """

    costs: tuple[PositiveFloat, ...] = Field(min_length=1)
    max_iterations: int = Field(2000, gt=0)
    shots: tuple[PositiveInt, ...] = ()
    samples: int = Field(1, gt=0)
    batch_size: int = Field(256, gt=0)

    @property
    def low_shot(self) -> bool:
        """Whether it trains on few images."""
        return self.protocol == "svm/voc07-low-shot@1"

    @model_validator(mode="after")
    def _shots_belong_to_low_shot(self):
        if self.low_shot != bool(self.shots):
            raise ValueError(f"shots are for svm/voc07-low-shot@1, which needs them; the protocol is {self.protocol}")
        return self
