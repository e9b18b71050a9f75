"""Configs: YAML files checked by pydantic models. Nothing unknown, mistyped or impossible gets past `load`."""

import difflib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from moco_eval.config import yaml_read
from moco_eval.config.base import Model, is_neutral
from moco_eval.config.deviations import flatten
from moco_eval.errors import InputError

ModelT = TypeVar("ModelT", bound=Model)


@cache
def folder() -> Path:
    """The shipped configs: inside the installed package, or beside it in a clone."""
    here = Path(__file__).parents[1]
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


@cache
def _shipped() -> tuple[str, ...]:
    """Names of all shipped configs: they stay as they were installed while a process runs."""
    return tuple(sorted(path.relative_to(folder()).with_suffix("").as_posix() for path in folder().glob("*/*.yaml")))


def shipped(kind: str | None = None) -> list[str]:
    """Names of the shipped configs, such as 'pretrain/moco_v2_r50'; of one kind, or all."""
    return [name for name in _shipped() if kind is None or name.startswith(f"{kind}/")]


def find(name: str, kind: str) -> Path:
    """The file of a config given by path or by shipped name ('moco_v2_r50' or 'pretrain/moco_v2_r50').

    Raises:
        InputError: neither a file nor a shipped name; the message names the closest.
    """
    if name.endswith((".yaml", ".yml")) or Path(name).is_file():
        if not Path(name).is_file():
            raise InputError(f"config {name} does not exist; shipped ones: {', '.join(short_names(kind))}")
        return Path(name)
    path = folder() / kind / f"{name.removeprefix(kind + '/')}.yaml"
    if not path.is_file():
        raise InputError(f"no {kind} config named {name!r}.{did_you_mean(name, short_names(kind))}")
    return path


def short_names(kind: str) -> list[str]:
    """The shipped configs of a kind, without it."""
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


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """Python values as overrides: {"schedule": {"epochs": 10}} is schedule.epochs=10.

    Raises:
        InputError: a value that no config can hold.
    """
    overrides = []
    for key, value in flatten(dict(settings)).items():
        try:
            text = yaml.safe_dump(_plain(value), default_flow_style=True, width=sys.maxsize)
        except yaml.YAMLError:
            raise InputError(
                f"{key} is {value!r}, of type {type(value).__name__}, which a config cannot hold"
            ) from None
        overrides.append(f"{key}={text.removesuffix('...' + chr(10)).strip()}")
    return overrides


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's."""
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _is_as_shipped(override: str) -> bool:
    """Whether a recipe's published number still belongs to it; fp32 is what was published."""
    return override == "precision=fp32" or is_neutral(override.partition("=")[0])


def merged(name: str, kind: str, overrides: Sequence[str]) -> dict[str, Any]:
    """A config's values with the overrides, not checked yet; raises InputError as `load` does."""
    values, lines = read_yaml(find(name, kind))
    for override in overrides:
        _apply(values, lines, override)
    return values


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A YAML mapping and, for each dotted key, where it stands ('line 14').

    Raises:
        InputError: unreadable, not YAML, more than a config holds, not a mapping, or the same key twice.
    """
    node, values = yaml_read.read(path)
    if not isinstance(values, dict):
        raise InputError(f"{path} does not hold keys and values")
    lines: dict[str, str] = {}
    for key, line in _keys(node, ""):
        if key in lines:
            raise InputError(f"key {key!r} appears twice in {path.name}, {lines[key]} and line {line}")
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
        _, value = yaml_read.parse(text, text)
    except InputError:
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
    # a mistyped key explains a missing one
    first = min(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in first["loc"])
    where = lines.get(key) or next((lines[key[:i]] for i in _dots(key) if key[:i] in lines), "")
    where = where or next((line for name, line in lines.items() if name.startswith(f"{key}.")), "")
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


def require_named(dataset: str, names: Iterable[str]) -> None:
    """Raises InputError for a data set that is none of these."""
    names = list(names)
    if dataset not in names:
        raise InputError(f"Invalid value for '--dataset': {dataset!r}.{did_you_mean(dataset, names)}")


def dump(config: BaseModel) -> str:
    """The fully resolved config as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
