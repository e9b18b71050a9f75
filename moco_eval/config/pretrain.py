"""A pretraining recipe."""

from typing import Literal

from pydantic import Field, model_validator

from moco_eval.config.base import Expect, Model, Positive, Schedule, Sgd


class Views(Model):
    """How an image becomes a query and a key; the recipes are in pretraining/views.py.

    backend: device cuts views in the workers and augments batches on the training device; reference is the published
    PIL pipeline, image after image in the workers.
    """

    recipe: Literal["moco_v1", "moco_v2", "cifar10", "digits"]
    backend: Literal["device", "reference"] = "device"
    size: int = Field(224, ge=8)


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


class PretrainConfig(Model):
    """A pretraining recipe in the paper's symbols; see docs/protocols."""

    protocol: str
    arch: str
    mechanism: Literal["moco", "memory_bank", "end_to_end"] = "moco"
    head: Literal["linear", "mlp"] = "linear"
    dim: int = Field(128, gt=0)
    queue_size: int = Positive
    momentum: float = Field(0.999, ge=0, le=1)
    temperature: float = Positive
    symmetric: bool = False
    views: Views
    bn: Literal["auto", "shuffle", "split", "sync", "none"] = "auto"
    bn_groups: int = Field(8, gt=0)
    bn_permute: bool = True
    batch_size: int = Positive
    accumulate: int = Field(1, gt=0)
    optimizer: Sgd
    schedule: Schedule
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    compile: Literal["auto", "reduce-overhead"] | bool = "auto"
    deterministic: bool = False
    knn: KnnMonitor | None = None
    checkpoints: KeepCheckpoints = Field(default_factory=lambda: KeepCheckpoints.model_validate({}))
    bad_images: int = Field(100, ge=0)
    max_steps: int | None = Field(None, gt=0)
    log_every: int = Field(10, gt=0)
    workers: int = Field(8, ge=0)
    seed: int = Field(0, ge=0)
    expect: Expect | None = None

    @property
    def pushed(self) -> int:
        """Keys that enter the queue at each step."""
        return self.batch_size * (2 if self.symmetric else 1)

    @model_validator(mode="after")
    def _the_mechanism_has_its_dictionary(self):
        if self.symmetric and self.mechanism != "moco":
            raise ValueError(f"symmetric is MoCo's option; mechanism {self.mechanism} has one direction")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate {self.accumulate} does not divide batch_size {self.batch_size}")
        part = self.batch_size // self.accumulate
        if self.mechanism == "end_to_end" and self.queue_size != part:
            raise ValueError(
                f"queue_size {self.queue_size} is not the dictionary of mechanism end_to_end, whose K is the "
                f"{part} keys encoded together (batch_size / accumulate); take --set queue_size={part}"
            )
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
