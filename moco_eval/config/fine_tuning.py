"""Recipes of fine-tunings by iterations: another batch size, and where a run leaves the recipe of its protocol."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from moco_eval.config import load as configs
from moco_eval.config.deviations import differences
from moco_eval.errors import InputError

RecipeT = TypeVar("RecipeT", bound=BaseModel)


@dataclass(frozen=True)
class Protocol:
    """What a protocol stands for: a shipped config and, where it fixes them, a data set and an architecture."""

    recipe: str
    dataset: str | None
    arch: str | None


def rescaled(recipe: RecipeT, batch: int) -> RecipeT:
    """The recipe for a batch of another size: the rate goes with it, and as many images are seen.

    Iterations, steps and warm-up are divided by what the rate is multiplied with, rounded. The rates of a sweep go with
    it too.

    Raises:
        InputError: the recipe cannot have such a batch.
    Source: Goyal et al. 2017, arXiv:1706.02677, and Kaiming He in facebookresearch/moco, issue 11 (batch 8, lr 0.01,
    twice the iterations and steps); the warm-up as in detectron2's auto_scale_workers.
    """
    values: dict[str, Any] = recipe.model_dump()
    factor, schedule, sweep = batch / values["batch_size"], values["schedule"], values.get("sweep")
    longer = {
        "iterations": max(1, round(schedule["iterations"] / factor)),
        "steps": sorted({max(1, round(step / factor)) for step in schedule["steps"]}),
        "warmup": round(schedule["warmup"] / factor),
    }
    changed = {
        "batch_size": batch,
        "optimizer": values["optimizer"] | {"lr": values["optimizer"]["lr"] * factor},
        "schedule": schedule | longer,
        "expect": None,
    }
    if sweep:
        changed["sweep"] = sweep | {"lr": [rate * factor for rate in sweep["lr"]]}
    try:
        return type(recipe).model_validate(values | changed)
    except ValidationError as error:
        raise InputError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


CARRIED = {
    "optimizer.lr": "lr",
    "schedule.iterations": "iterations",
    "schedule.steps": "steps",
    "schedule.warmup": "warm-up",
}  # what `rescaled` carries along, and what it is called


def as_set(after: Any, before: Any, overrides: Iterable[str]) -> Any:
    """A rescaled recipe with what overrides name as it was before.

    Args:
        overrides: key=value.
    """
    values, kept = after.model_dump(), before.model_dump()
    for key in {override.partition("=")[0] for override in overrides} & CARRIED.keys():
        part, name = key.split(".")
        values[part][name] = kept[part][name]
    return type(after).model_validate(values)


def rescaling(before: Any, after: Any) -> str:
    """In words, what another batch has changed: 'lr 0.005 instead of 0.02, 8 iterations instead of 2'."""
    changes = []
    for key, name in CARRIED.items():
        part, last = key.split(".")
        old, new = (getattr(getattr(recipe, part), last) for recipe in (before, after))
        old, new = [f"{value:g}" if isinstance(value, float) else value for value in (old, new)]
        if old != new:
            old, new = (list(value) if isinstance(value, tuple) else value for value in (old, new))
            counted = name == "iterations"
            changes.append(f"{new} iterations instead of {old}" if counted else f"{name} {new} instead of {old}")
    return ", ".join(changes) or "all else as set"


def protocol_deviations(
    recipe: Any, kind: str, protocols: Mapping[str, Protocol], dataset: str, arch: str, free: Iterable[str] = ()
) -> list[str]:
    """In words, where a run leaves the protocol it names.

    Args:
        kind: detect or segment; `protocols`: all of that kind.
        free: keys of the recipe that may differ.
    """
    if recipe.protocol not in protocols:
        return [f"protocol {recipe.protocol} is not one of moco-eval's"]
    protocol = protocols[recipe.protocol]
    deviations = recipe_differences(recipe, configs.load(protocol.recipe, kind, type(recipe)), free)
    if protocol.dataset not in (None, dataset):
        deviations.append(f"dataset {dataset} instead of {protocol.dataset}")
    if protocol.arch not in (None, arch, arch.removesuffix("_msra")):  # the supervised baseline is MSRA's ResNet-50
        deviations.append(f"arch {arch} instead of {protocol.arch}")
    return deviations


def warmed_up(lr: float, schedule: Any, iteration: int) -> float:
    """The rate of an iteration, counted from 0, in or behind a linear warm-up from lr x warmup_factor."""
    if iteration >= schedule.warmup:
        return lr
    done = iteration / schedule.warmup
    return lr * (schedule.warmup_factor * (1 - done) + done)


def recipe_differences(recipe: Any, canonical: Any, free: Iterable[str] = ()) -> list[str]:
    """In words, where a recipe leaves its protocol's; another batch with all that `rescaled` carries is one of them."""
    deviations = []
    followed = rescaled(canonical, recipe.batch_size)
    if recipe.batch_size != canonical.batch_size and _rates(recipe) == _rates(followed):
        deviations.append(
            f"batch {recipe.batch_size} instead of {canonical.batch_size}: lr, iterations, steps and warm-up rescaled "
            "by the linear rule"
        )
        canonical = followed
    return deviations + differences(recipe, canonical, free)


def _rates(recipe: Any) -> tuple:
    """What `rescaled` carries along."""
    schedule = recipe.schedule
    return (
        *(recipe.optimizer.lr, schedule.iterations, schedule.steps, schedule.warmup),
        getattr(recipe, "sweep", None),
    )
