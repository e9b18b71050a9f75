"""What the report needs of a run's files; more may be in them. A file that has it not is damaged, and said to be."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, InstanceOf, ValidationError, model_validator

from moco_eval.errors import InputError

Text = InstanceOf[str]  # of any characters: names of files may be no UTF-8
Numbers = dict[str, float]
WAY_OUT = "leave that run out, or run it again into another --output"
SAID = dict.fromkeys(("model_type", "dict_type"), "no mapping of keys to values")
SAID |= dict.fromkeys(("float_type", "int_type"), "no number") | {"is_instance_of": "no text", "list_type": "no list"}


class _Expected(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Dataset(_Expected):
    name: Text
    split: Text | None = None
    fingerprint: Text | None = None
    images: int | None = None
    classes: int | None = None
    labels_per_class: int | None = None
    subset: Text | None = None


class _Named(_Expected):
    name: Text | None = None


class _Pretraining(_Expected):
    protocol: Text | None = None
    dataset: _Named = _Named()
    epochs: float | None = None
    bn: Text = "none"
    config: dict[str, Any] = {}


class _Encoder(_Expected):
    path: Text
    sha256: Text
    origin: Text
    arch: Text
    which: Text = "query"
    pretraining: _Pretraining | None


class _Trial(_Expected):
    seed: int


class _Cost(_Expected):
    seconds: float
    images: int
    peak_memory: float = Field(alias="peak_memory_MB")
    device: Text


class _Health(_Expected):
    images: int
    dimensions: int
    uniformity: float | None
    alignment: float | None
    effective_rank: float
    dead_dimensions: int


class _Hardware(_Expected):
    gpus: list[Text] | None = None


class Environment(_Expected):
    """environment.json, and the same in a record."""

    time: Text = ""
    hardware: _Hardware | None = None
    versions: dict[str, Any] | None = None


class Record(_Expected):
    """result.json. Records of 0.1.0 have no `health` and may have no `interval`."""

    protocol: Text
    dataset: _Dataset
    encoder: _Encoder
    metrics: Numbers
    std: Numbers
    interval: dict[str, Annotated[list[float], Field(min_length=2, max_length=2)]] = {}
    trials: list[_Trial] = Field(min_length=1)
    over: Text
    selection: Text
    equivalences: list[Text]
    deviations: list[Text]
    cost: _Cost
    environment: Environment = Environment()
    health: _Health | None = None
    per_class: dict[str, dict[str, float | None]] | None = None


class _Feature(_Expected):
    feature: Text = "pooled"


class Evaluation(_Expected):
    """config.yaml of an evaluation."""

    command: Text
    encoder: _Feature | None = None


class Pretraining(_Expected):
    """config.yaml of a pretraining."""

    command: Text
    dataset: _Dataset | Text | None = None
    bn: Text = "none"
    config: dict[str, Any] | None = None


class LoggedStep(_Expected):
    """A line of a pretraining's metrics.jsonl: of a step, of an epoch's monitor, or the first, of chance."""

    step: float = Field(ge=0)
    epoch: float = Field(ge=0)
    loss: float = Field(0.0, allow_inf_nan=True)
    knn_top1: float = 0.0
    chance: float | None = None
    queue_full_step: float | None = None

    @model_validator(mode="after")
    def _a_loss_is_of_a_step(self) -> "LoggedStep":
        if "loss" in self.model_fields_set and not self.epoch:
            raise ValueError("a loss before the first step")
        return self


class Iteration(_Expected):
    """A line of a fine-tuning's metrics.jsonl: beside iteration and learning rate the loss and its parts."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | None]

    iteration: float
    lr: float | None = None


def require(model: type[_Expected], value: Any, path: Path | str) -> None:
    """Raises InputError where a value that was read from `path` is not as expected."""
    try:
        model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"] if not str(part).startswith("_"))  # our models' names
        said = SAID.get(first["type"]) or first["msg"].removeprefix("Value error, ").replace(
            "Input should", "it should"
        )
        lacks = first["type"] == "missing"
        trouble = f"it lacks {key}" if lacks else f"{key or 'it'} is {_short(first['input'])}, {said}"
        raise InputError(f"{path} is damaged: {trouble}; {WAY_OUT}") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
