"""What the commands need of a run's files; more may be in them. A file that has it not is damaged, and said to be."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, InstanceOf, ValidationError, model_validator

from moco_eval.errors import InputError

Text = InstanceOf[str]  # of any characters: names of files may be no UTF-8
LARGEST = 1e9  # no percentage, second or count of a record comes near
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Count = Annotated[int, Field(ge=0, le=10**15)]
Numbers = dict[str, Number]
WAY_OUT = "leave that run out, or run it again into another --output"
SAID = dict.fromkeys(("model_type", "dict_type"), "no mapping of keys to values")
SAID |= dict.fromkeys(("float_type", "int_type"), "no number") | {"is_instance_of": "no text", "list_type": "no list"}


class _Expected(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Dataset(_Expected):
    name: Text
    split: Text | None = None
    fingerprint: Text | None = None
    images: Count | None = None
    classes: Count | None = None
    labels_per_class: Count | None = None
    subset: Text | None = None


class _Named(_Expected):
    name: Text | None = None


class _Pretraining(_Expected):
    protocol: Text | None = None
    dataset: _Named = _Named()
    epochs: Number | None = None
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
    seconds: Number
    images: Count
    peak_memory: Number = Field(alias="peak_memory_MB")
    device: Text


class _Health(_Expected):
    images: Count
    dimensions: Count
    uniformity: Number | None
    alignment: Number | None
    effective_rank: Number
    dead_dimensions: Count


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
    interval: dict[str, Annotated[list[Number], Field(min_length=2, max_length=2)]] = {}
    trials: list[_Trial] = Field(min_length=1)
    over: Text
    selection: Text
    equivalences: list[Text]
    deviations: list[Text]
    cost: _Cost
    environment: Environment = Environment()
    health: _Health | None = None
    per_class: dict[str, dict[str, Number | None]] | None = None


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

    step: float = Field(ge=0, le=LARGEST)
    epoch: float = Field(ge=0, le=LARGEST)
    loss: float = Field(0.0, allow_inf_nan=True)
    knn_top1: Number = 0.0
    chance: Number | None = None
    queue_full_step: Number | None = None

    @model_validator(mode="after")
    def _a_loss_is_of_a_step(self) -> "LoggedStep":
        if "loss" in self.model_fields_set and not self.epoch:
            raise ValueError("a loss before the first step")
        return self


UNITS = ("step", "epoch", "number", "order")  # of a watched checkpoint's place


class JudgedCheckpoint(_Expected):
    """A line of a watch's curve.jsonl: a checkpoint by one protocol, at one place of UNITS."""

    checkpoint: Text
    protocol: Text
    metrics: Numbers = Field(min_length=1)
    interval: dict[str, Annotated[list[Number], Field(min_length=2, max_length=2)]]
    sha256: Text
    step: Count | None = None
    epoch: Count | None = None
    number: Count | None = None
    order: Count | None = None

    @model_validator(mode="after")
    def _it_has_one_place(self) -> "JudgedCheckpoint":
        if len(self.model_fields_set & {*UNITS}) != 1 or all(getattr(self, unit) is None for unit in UNITS):
            raise ValueError("it has no single place")
        return self


class Iteration(_Expected):
    """A line of a fine-tuning's metrics.jsonl: beside iteration and learning rate the loss and its parts."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Number | None]

    iteration: Number
    lr: Number | None = None


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
