"""Configs: YAML files checked by pydantic models. Nothing unknown, mistyped or impossible gets past `load`."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from moco_eval.errors import InputError

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


class Views(Model):
    """How an image becomes a query and a key; the recipes are in pretraining/views.py.

    backend: device cuts views in the workers and augments batches on the training device; reference is the published
    PIL pipeline, image after image in the workers.
    """

    recipe: Literal["moco_v1", "moco_v2", "cifar10", "digits"]
    backend: Literal["device", "reference"] = "device"
    size: int = Field(224, ge=8)


class Sgd(Model):
    """SGD; `lr` belongs to the batch size written beside it."""

    lr: float = Positive
    sgd_momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)


class Schedule(Model):
    """The learning rate, set once per epoch.

    cosine: lr/2 (1 + cos(pi e/E)) with e counted from `count_from` (0 in MoCo v2, 1 in the CIFAR-10 demo);
    step: a tenth (`gamma`) at each of `milestones`, in epochs.
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


class Expect(Model):
    """A published number for this recipe."""

    protocol: str
    metrics: dict[str, float]
    std: float | None = None
    source: str


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
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Literal["auto"] | bool = "auto"
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


class LinearConfig(Model):
    """Linear classification on frozen features, trained on crops."""

    protocol: Literal["linear/moco-lincls@1", "linear/mocov3@1"]
    batch_size: int = Positive
    optimizer: Sgd
    schedule: Schedule
    augmentation: Augmentation = Augmentation()
    precision: Literal["fp32", "bf16"] = "fp32"
    workers: int = Field(8, ge=0)
    seed: int = Field(0, ge=0)


class FinetuneSchedule(Model):
    """The learning rates while a backbone is fine-tuned.

    step: they fall to `gamma` of themselves at each of `milestones`, in epochs;
    cosine: they fall after every step, half a cosine from all to a thousandth of themselves.
    """

    kind: Literal["cosine", "step"]
    epochs: int = Positive
    milestones: tuple[int, ...] = ()
    gamma: float = Field(0.1, gt=0, le=1)

    @model_validator(mode="after")
    def _milestones_belong_to_step(self):
        if (self.kind == "step") != bool(self.milestones):
            raise ValueError(f"schedule.kind {self.kind!r} {'needs' if self.kind == 'step' else 'takes no'} milestones")
        return self


class Published(Model):
    """A published number of a protocol: whose weights, what came out, where it stands."""

    encoder: str
    metrics: dict[str, float]
    source: str


class FinetuneConfig(Model):
    """A backbone and a new linear layer trained together.

    head_lr: the layer's learning rate, in multiples of the backbone's.
    head_init: normal is N(0, 0.01) and bias 0; uniform is torch's own for nn.Linear.
    bn_groups: equal parts of a batch whose statistics batch norm takes apart, as so many GPUs do; 1 is the whole batch,
        however many processes share it.
    drop_last: leave out the images of an epoch that make no whole batch.
    test_every: epochs between two looks at the test images; the last epoch is always looked at, and reported.
    """

    protocol: Literal["finetune/openselfsup-1percent@1", "finetune/openselfsup-10percent@1", "finetune/lightly@1"]
    batch_size: int = Positive
    optimizer: Sgd
    head_lr: float = Positive
    head_init: Literal["normal", "uniform"] = "normal"
    schedule: FinetuneSchedule
    augmentation: Augmentation = Augmentation()
    bn_groups: int = Field(1, gt=0)
    drop_last: bool = False
    test_every: int = Field(1, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    workers: int = Field(8, ge=0)
    seed: int = Field(0, ge=0)
    expect: tuple[Published, ...] | None = None

    @model_validator(mode="after")
    def _groups_are_equal(self):
        if self.bn_groups > 1 and (self.batch_size % self.bn_groups or not self.drop_last):
            raise ValueError(
                f"bn_groups {self.bn_groups} needs a batch_size that it divides, not {self.batch_size}, and drop_last "
                "true"
            )
        return self


class QuickConfig(Model):
    """A linear classifier on features of `crops` epochs of random crops and of the clean crop, extracted once."""

    protocol: Literal["linear/quick@1"]
    crops: int = Field(5, ge=0)
    batch_size: int = Positive
    optimizer: Sgd
    schedule: Schedule
    augmentation: Augmentation = Augmentation()
    precision: Literal["fp32", "bf16"] = "fp32"
    workers: int = Field(8, ge=0)
    seed: int = Field(0, ge=0)


class SweepConfig(Model):
    """Many linear classifiers in one pass: each of `learning_rates` with each of `weight_decays`, each of `features`,
    with and without parameter-free batch norm; chosen on `held_out`, a share of the training images.
    """

    protocol: Literal["linear/sweep@1"]
    batch_size: int = Positive
    learning_rates: tuple[PositiveFloat, ...] = Field(min_length=1)
    weight_decays: tuple[NonNegativeFloat, ...] = Field(min_length=1)
    batch_norm: tuple[bool, ...] = Field(min_length=1)
    features: tuple[str, ...] = Field(("pooled",), min_length=1)
    sgd_momentum: float = Field(0.9, ge=0, lt=1)
    held_out: float = Field(0.1, gt=0, lt=1)
    schedule: Schedule
    augmentation: Augmentation = Augmentation()
    precision: Literal["fp32", "bf16"] = "fp32"
    workers: int = Field(8, ge=0)
    seed: int = Field(0, ge=0)

    @field_validator("learning_rates", "weight_decays", "batch_norm", "features")
    @classmethod
    def _no_head_twice(cls, values: tuple, info: ValidationInfo) -> tuple:
        if len(set(values)) != len(values):
            raise ValueError(f"{info.field_name} holds a value twice")
        return values


class KnnConfig(Model):
    """Weighted kNN classification: exp(cosine similarity / temperature) votes of the k nearest.

    memory: GB of working blocks of the search, per process; None is 1 on a CPU, a quarter of what is free on a GPU.
    """

    protocol: Literal["knn/instdisc@1", "knn/cifar10-demo@1"]
    k: int = Positive
    temperature: float = Positive
    feature: str = "pooled"  # or head, or a stage of the network
    memory: float | None = Field(None, gt=0)
    batch_size: int = Field(256, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    workers: int = Field(8, ge=0)
    seed: int = Field(0, ge=0)


class KnnGridConfig(Model):
    """Weighted kNN with k, temperature and distance chosen by leave-one-out on the training images.

    A temperature belongs to cosine alone. queries: training images left out in turn, at most; drawn from the seed.
    memory: as in KnnConfig.
    """

    protocol: Literal["knn/grid@1"]
    k: tuple[int, ...] = Field(min_length=1)
    temperature: tuple[float, ...] = Field(min_length=1)
    distance: tuple[Literal["cosine", "euclidean"], ...] = Field(min_length=1)
    queries: int = Field(50_000, gt=0)
    feature: str = "pooled"
    memory: float | None = Field(None, gt=0)
    batch_size: int = Field(256, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    workers: int = Field(8, ge=0)
    seed: int = Field(0, ge=0)

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


class LogisticConfig(Model):
    """Logistic regression on frozen features; C is chosen on `held_out`, a share of the training images.

    solver: torch's L-BFGS or scikit-learn's; they reach the same optimum, see docs/protocols/logistic.md.
    tolerance: of the gradient's largest entry; a fit that is stopped at max_iterations before says so.
    """

    protocol: Literal["logistic/lbfgs@1"]
    path: CostPath
    held_out: float = Field(0.2, gt=0, lt=1)
    solver: Literal["torch", "sklearn"] = "torch"
    tolerance: float = Field(1e-5, gt=0)
    max_iterations: int = Field(1000, gt=0)
    batch_size: int = Field(256, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    workers: int = Field(8, ge=0)
    seed: int = Field(0, ge=0)


class SvmConfig(Model):
    """One linear SVM per class on frozen features, the C of each from `costs` by three-fold cross-validation.

    svm/voc07-low-shot@1 trains on each of `shots` images per class, `samples` times, and chooses one C for all classes.
    """

    protocol: Literal["svm/voc07@1", "svm/voc07-low-shot@1"]
    costs: tuple[PositiveFloat, ...] = Field(min_length=1)
    max_iterations: int = Field(2000, gt=0)
    shots: tuple[PositiveInt, ...] = ()
    samples: int = Field(1, gt=0)
    batch_size: int = Field(256, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    workers: int = Field(8, ge=0)
    seed: int = Field(0, ge=0)

    @property
    def low_shot(self) -> bool:
        """Whether it trains on few images."""
        return self.protocol == "svm/voc07-low-shot@1"

    @model_validator(mode="after")
    def _shots_belong_to_low_shot(self):
        if self.low_shot != bool(self.shots):
            raise ValueError(f"shots are for svm/voc07-low-shot@1, which needs them; the protocol is {self.protocol}")
        return self


# The models of each kind of classification config.
JUDGES: dict[str, tuple[type[Model], ...]] = {
    "knn": (KnnConfig, KnnGridConfig),
    "linear": (LinearConfig, SweepConfig, QuickConfig),
    "logistic": (LogisticConfig,),
    "svm": (SvmConfig,),
    "finetune": (FinetuneConfig,),
}

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

ModelT = TypeVar("ModelT", bound=Model)


def is_neutral(key: str) -> bool:
    """Whether a dotted key moves no number beyond the spread of the seed."""
    return _is_among(key, NEUTRAL_KEYS)


def _is_among(key: str, keys: Iterable[str]) -> bool:
    """Whether a dotted key is one of `keys` or below one of them."""
    return any(key == one or key.startswith(f"{one}.") for one in keys)


def folder() -> Path:
    """The shipped configs: inside the installed package, or beside it in a clone."""
    here = Path(__file__).parents[1]
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def shipped(kind: str | None = None) -> list[str]:
    """Names of the shipped configs, such as 'pretrain/moco_v2_r50'; of one kind, or all."""
    pattern = f"{kind}/*.yaml" if kind else "*/*.yaml"
    return sorted(path.relative_to(folder()).with_suffix("").as_posix() for path in folder().glob(pattern))


def find(name: str, kind: str) -> Path:
    """The file of a config given by path or by shipped name ('moco_v2_r50' or 'pretrain/moco_v2_r50').

    Raises:
        InputError: neither a file nor a shipped name; the message names the closest.
    """
    if name.endswith((".yaml", ".yml")) or Path(name).is_file():
        if not Path(name).is_file():
            raise InputError(f"config {name} does not exist; shipped ones: {', '.join(_short(kind))}")
        return Path(name)
    path = folder() / kind / f"{name.removeprefix(kind + '/')}.yaml"
    if not path.is_file():
        raise InputError(f"no {kind} config named {name!r}.{did_you_mean(name, _short(kind))}")
    return path


def _short(kind: str) -> list[str]:
    return [name.split("/", 1)[1] for name in shipped(kind)]


def load(name: str, kind: str, model: type[ModelT], overrides: Sequence[str] = ()) -> ModelT:
    """Read, override and check a config.

    Args:
        name: a path, or the name of a shipped config of this kind.
        kind: its folder under configs/.
        model: the pydantic model it must satisfy.
        overrides: 'key=value' strings with dotted keys; values are YAML. Where one is more than neutral, the
            published number of the file's recipe is left behind: it belongs to the recipe as shipped.
    Raises:
        InputError: with file, line (or the --set), the value and, for an unknown key, the nearest known one.
    """
    path = find(name, kind)
    values, lines = read_yaml(path)
    if "expect" in model.model_fields and not all(map(_is_as_shipped, overrides)):
        values["expect"] = None
    for override in overrides:
        _apply(values, lines, override)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise InputError(_explain(error, path, lines, model)) from None


def _is_as_shipped(override: str) -> bool:
    """Whether a recipe's published number still belongs to it; fp32 is what was published."""
    return override == "precision=fp32" or is_neutral(override.partition("=")[0])


def judge_model(name: str, kind: str, overrides: Sequence[str] = ()) -> type[Model]:
    """What a config of a classification protocol must satisfy: its protocol says. Raises InputError as `load` does."""
    protocol = merged(name, kind, overrides).get("protocol")
    known = {one: model for model in JUDGES[kind] for one in get_args(model.model_fields["protocol"].annotation)}
    return known.get(protocol, JUDGES[kind][0])


def merged(name: str, kind: str, overrides: Sequence[str]) -> dict[str, Any]:
    """A config's values with the overrides, not checked yet; raises InputError as `load` does."""
    values, lines = read_yaml(find(name, kind))
    for override in overrides:
        _apply(values, lines, override)
    return values


LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's where PyYAML has it: ten times as fast


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A YAML mapping and, for each dotted key, where it stands ('line 14').

    Raises:
        InputError: unreadable, not YAML, not a mapping, or the same key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=LOADER)
        values = yaml.load(text, Loader=LOADER)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no mapping of keys to values")
    lines: dict[str, str] = {}
    for key, line in _keys(node, ""):
        if key in lines:
            raise InputError(f"key {key!r} stands twice in {path.name}, {lines[key]} and line {line}")
        lines[key] = f"line {line}"
    return values, lines


def _keys(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = f"{prefix}{key_node.value}"
            yield key, key_node.start_mark.line + 1
            yield from _keys(value_node, key + ".")


def _apply(values: dict[str, Any], lines: dict[str, str], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override!r} is not key=value; for example --set batch_size=64")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"--set {override!r}: {text!r} is not a YAML value") from None
    *parents, last = key.split(".")
    place = values
    for parent in parents:
        if not isinstance(place.get(parent), dict):
            place[parent] = {}
        place = place[parent]
    place[last] = value
    lines[key] = f"--set {override}"


def _explain(error: ValidationError, path: Path, lines: dict[str, str], model: type[Model]) -> str:
    first = min(
        error.errors(), key=lambda one: one["type"] != "extra_forbidden"
    )  # a mistyped key explains a missing one
    key = ".".join(str(part) for part in first["loc"])
    where = lines.get(key) or next((lines[key[:i]] for i in _dots(key) if key[:i] in lines), "")
    place = where if where.startswith("--set") else f"{path.name} {where}".strip()
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r} in {place}.{did_you_mean(key, _fields(model))}"
    if first["type"] == "missing":
        return f"{path.name} lacks the key {key!r}"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if not key:  # a combination: the message starts with the key that does not fit
        where = lines.get(message.split()[0], "")
        return f"{where if where.startswith('--set') else f'{path.name} {where}'.strip()}: {message}"
    return f"{key} is {first['input']!r} in {place}: {message}"


def _dots(key: str) -> list[int]:
    return [i for i in range(len(key) - 1, 0, -1) if key[i] == "."]


def _fields(model: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        for inner in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                names += _fields(inner, f"{prefix}{name}.")
    return names


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' or the list of what there is, for the end of an error message."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not close and "." not in word:
        close = [name for name in known if name.rsplit(".", 1)[-1] == word][:1]
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known)}."


def dump(config: BaseModel) -> str:
    """The fully resolved config as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def differences(ours: BaseModel, canonical: BaseModel, free: Iterable[str] = ()) -> list[str]:
    """In words, where `ours` leaves the canonical recipe of its protocol; `free` keys are the row's own choice."""
    left, right = flatten(ours.model_dump(mode="json")), flatten(canonical.model_dump(mode="json"))
    skipped = (*NEUTRAL_KEYS, *free)
    return [
        f"{key} {left.get(key)} instead of {right.get(key)}"
        for key in dict.fromkeys((*left, *right))
        if left.get(key) != right.get(key) and not _is_among(key, skipped)
    ]
