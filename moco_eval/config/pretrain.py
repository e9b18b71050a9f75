"""A pretraining recipe."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from moco_eval.config.base import Expect, Extended, Model, Positive, Schedule, Sgd, usual_workers


class Views(Extended):
    """How an image becomes a query and a key; the recipes are in pretraining/views.py.

    backend: device cuts views in the workers and augments batches on the training device; reference is the published
    PIL pipeline, image after image in the workers.
    crop_min: smallest area of a crop, as a share of the image; none is the recipe's own.
    """

    later = ("crop_min",)

    recipe: Literal["moco_v1", "moco_v2", "moco_v3", "cifar10", "digits"]
    backend: Literal["device", "reference"] = "device"
    size: int = Field(224, ge=8)
    crop_min: float | None = Field(None, gt=0, le=1)


class Optimizer(Extended, Sgd):
    """SGD, LARS, AdamW or LAMB; `sgd_momentum` is of the first two, the betas of the others are 0.9 and 0.999."""

    later: ClassVar[tuple[str, ...]] = ("kind",)

    kind: Literal["sgd", "lars", "adamw", "lamb"] = "sgd"

    @model_validator(mode="after")
    def _adam_has_betas(self):
        given = self.sgd_momentum != type(self).model_fields["sgd_momentum"].default
        if given and self.kind in ("adamw", "lamb"):
            raise ValueError(
                f"sgd_momentum {self.sgd_momentum:g} does not apply to optimizer.kind {self.kind}, which has betas; "
                "leave it out"
            )
        return self


class PretrainSchedule(Extended, Schedule):
    """The learning rate, set once per epoch or, after `warmup_epochs` from 0 on, per step."""

    later = ("per", "warmup_epochs")

    per: Literal["epoch", "step"] = "epoch"
    warmup_epochs: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _steps_follow_a_cosine(self):
        if self.per == "step" and (self.kind != "cosine" or self.count_from):
            raise ValueError("schedule.per step is a cosine counted from 0; take schedule.kind=cosine and count_from=0")
        if self.warmup_epochs and self.per == "epoch":
            raise ValueError(f"warmup_epochs {self.warmup_epochs} rise step by step; take schedule.per=step")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs} leave nothing of {self.epochs} epochs; at most {self.epochs - 1}"
            )
        return self


class KnnMonitor(Model):
    """The kNN monitor during pretraining. `feature`: pooled, or head (the 128-d output, as the CIFAR-10 demo)."""

    every: int = Positive
    k: int = Field(200, gt=0)
    temperature: float = Field(0.07, gt=0)
    feature: Literal["pooled", "head"] = "pooled"


class KeepCheckpoints(Model):
    """Which epochs stay on disk: the `last` ones and each `every`-th. Inside an epoch last.pth is renewed each
    `minutes`, and each `steps` where given."""

    last: int = Field(2, gt=0)
    every: int = Field(50, gt=0)
    minutes: float = Field(30, gt=0)
    steps: int | None = Field(None, gt=0)


class PretrainConfig(Extended):
    """A pretraining recipe in the paper's symbols; see docs/protocols.

    hidden_dim: of MoCo v3's projector and predictor. momentum_schedule: cosine raises m to 1 at the end, per step.
    freeze_patches: a ViT's patch projection stays random. accumulate: a batch in so many parts, one after the other; in
    MoCo v3 with the loss and the gradient of the whole batch, otherwise with BN groups and a loss of their own.
    predictor, head_bn, positions: what MoCo v3 leaves out or changes, one at a time, in its Sec. 6.2: the prediction
    head, the batch norms of both heads, a ViT's fixed positions.
    """

    later = ("hidden_dim", "momentum_schedule", "freeze_patches", "predictor", "head_bn", "positions")

    protocol: str
    arch: str
    mechanism: Literal["moco", "memory_bank", "end_to_end", "moco_v3"] = "moco"
    head: Literal["linear", "mlp"] = "linear"
    hidden_dim: int | None = Field(None, gt=0)
    dim: int = Field(128, gt=0)
    freeze_patches: bool = False
    predictor: bool = True
    head_bn: bool = True
    positions: Literal["sincos", "learned", "none"] = "sincos"
    queue_size: int = Positive
    momentum: float = Field(0.999, ge=0, le=1)
    momentum_schedule: Literal["constant", "cosine"] = "constant"
    temperature: float = Positive
    symmetric: bool = False
    views: Views
    bn: Literal["auto", "shuffle", "split", "sync", "none"] = "auto"
    bn_groups: int = Field(8, gt=0)
    bn_permute: bool = True
    batch_size: int = Positive
    accumulate: int = Field(1, gt=0)
    optimizer: Optimizer
    schedule: PretrainSchedule
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    compile: Literal["auto", "reduce-overhead"] | bool = "auto"
    deterministic: bool = False
    knn: KnnMonitor | None = None
    checkpoints: KeepCheckpoints = Field(default_factory=lambda: KeepCheckpoints.model_validate({}))
    bad_images: int = Field(100, ge=0)
    max_steps: int | None = Field(None, gt=0)
    log_every: int = Field(10, gt=0)
    workers: int = Field(default_factory=usual_workers, ge=0)
    seed: int = Field(0, ge=0)
    expect: Expect | None = None

    @property
    def pushed(self) -> int:
        """Keys that enter the queue at each step."""
        return self.batch_size * (2 if self.symmetric else 1)

    @model_validator(mode="after")
    def _the_mechanism_has_its_dictionary(self):
        if self.symmetric and self.mechanism not in ("moco", "moco_v3"):
            raise ValueError(f"symmetric is MoCo's option; mechanism {self.mechanism} has one direction")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} does not divide batch_size {self.batch_size}")
        part = self.batch_size // self.accumulate
        if self.mechanism == "end_to_end" and self.queue_size != part:
            raise ValueError(
                f"queue_size {self.queue_size} is not the dictionary of mechanism {self.mechanism}, whose K is the "
                f"{part} keys encoded together (batch_size / accumulate); take --set queue_size={part}"
            )
        if self.mechanism == "moco_v3" and self.queue_size != self.batch_size:
            raise ValueError(
                f"queue_size {self.queue_size} is not the dictionary of mechanism moco_v3, whose keys are those of the "
                f"batch; take --set queue_size={self.batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _what_is_of_moco_v3_alone(self):
        if self.mechanism != "moco_v3":
            if self.hidden_dim is not None:
                raise ValueError(f"hidden_dim is only for mechanism moco_v3, not for {self.mechanism}")
            if self.freeze_patches:
                raise ValueError(f"freeze_patches is only for a ViT in mechanism moco_v3, not for {self.mechanism}")
            for key in ("predictor", "head_bn", "positions"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} is only for mechanism moco_v3, not for {self.mechanism}; leave it out")
            if self.momentum_schedule == "cosine" and self.mechanism != "moco":
                raise ValueError(f"momentum_schedule needs a momentum encoder; mechanism {self.mechanism} has none")
            return self
        if not self.symmetric:
            raise ValueError("mechanism moco_v3 sums the losses of both directions; take --set symmetric=true")
        if self.hidden_dim is None:
            raise ValueError("mechanism moco_v3 has a hidden layer in its projector; the paper's: hidden_dim=4096")
        if self.head != "mlp":
            raise ValueError(f"head {self.head} is not MoCo v3's, whose projector is an MLP; take --set head=mlp")
        if self.bn not in ("auto", "sync", "none"):
            raise ValueError(f"bn {self.bn} is for shuffled keys, which moco_v3 has not; take --set bn=sync")
        return self

    @model_validator(mode="after")
    def _the_queue_holds_a_step(self):
        pushed = self.pushed
        if self.mechanism == "moco" and self.queue_size < pushed:
            how = f"batch {self.batch_size}" + (", symmetric" if self.symmetric else "")
            raise ValueError(
                f"queue_size {self.queue_size} holds less than one step's {pushed} keys ({how}); take at least {pushed}"
            )
        return self
