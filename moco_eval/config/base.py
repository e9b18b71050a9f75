"""What every config is made of."""

import os
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_serializer, model_validator
from pydantic_core.core_schema import SerializationInfo, SerializerFunctionWrapHandler

Positive = Field(gt=0)


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        wanted = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and wanted in (int, float, int | None, float | None):
            raise ValueError("a number is wanted, not true or false")
        return value


WHOLE = "whole"  # the serialisation context that asks for every key


class Extended(Model):
    """A config with keys that came later: left out of its dump at their default, as records of before do not have them.

    Dumped in the context WHOLE it has them all.
    """

    later: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        values, fields = dump(self), type(self).model_fields
        unsaid = {key for key in self.later if getattr(self, key) == fields[key].default}
        return values if info.context == WHOLE else {key: values[key] for key in values if key not in unsaid}


MOST_WORKERS = 8


def usual_workers() -> int:
    """Loader processes of each process: as many as it has cores, at most 8; torchrun says how many share them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, min(MOST_WORKERS, cores // max(1, int(processes) if processes.isdecimal() else 1)))


class Run(Model):
    """What every recipe says of the work itself.

    batch_size: over all processes; workers: loader processes of each.
    """

    protocol: str
    batch_size: int = Positive
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    workers: int = Field(default_factory=usual_workers, ge=0)
    seed: int = Field(0, ge=0)


class Sgd(Model):
    """SGD; `lr` belongs to the batch size written beside it."""

    lr: float = Positive
    sgd_momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)


class Schedule(Model):
    """The learning rate, set once per epoch.

    cosine: lr/2 (1 + cos(pi e/E)); step: a tenth (`gamma`) at each of `milestones`. Epochs e are counted from
    `count_from`: 0 in MoCo v1 and v2, 1 in the CIFAR-10 demo.
    """

    kind: Literal["cosine", "step"]
    epochs: int = Positive
    milestones: tuple[int, ...] = ()
    gamma: float = Field(0.1, gt=0, le=1)
    count_from: Literal[0, 1] = 0

    @model_validator(mode="after")
    def _milestones_belong_to_step(self):
        if (self.kind == "step") != bool(self.milestones):
            raise ValueError(f"schedule.kind {self.kind!r} {'needs' if self.kind == 'step' else 'takes no'} milestones")
        return self


class Expect(Model):
    """A published number for this recipe."""

    protocol: str
    metrics: dict[str, float]
    std: float | None = None
    source: str


class Augmentation(Model):
    """Training crops of the linear protocol: area scale of the random-resized crop, horizontal flip or not."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: bool = True

    @field_validator("crop_scale")
    @classmethod
    def _an_area(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError("crop_scale is the smallest and largest area of a crop, 0 < smallest <= largest <= 1")
        return scale


class Published(Model):
    """A published number of a protocol: whose weights, what came out, where it stands."""

    encoder: str
    metrics: dict[str, float]
    source: str


# Keys that do not move a number beyond the spread of the seed; all others count as deviations.
NEUTRAL_KEYS = (
    "workers",
    "seed",
    "expect",
    "log_every",
    "checkpoints",
    "bad_images",
    "max_steps",
    "compile",
    "deterministic",
    "knn",
    "views.backend",
    "memory",
    "test_every",
)


def is_neutral(key: str) -> bool:
    """Whether a dotted key moves no number beyond the spread of the seed."""
    return is_among(key, NEUTRAL_KEYS)


def is_among(key: str, keys: Iterable[str]) -> bool:
    """Whether a dotted key is one of `keys` or below one of them."""
    return any(key == parent or key.startswith(f"{parent}.") for parent in keys)
