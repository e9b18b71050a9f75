"""Where a config leaves the recipe of its protocol, in words."""

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel

from moco_eval.config.base import NEUTRAL_KEYS, WHOLE, is_among


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(ours: BaseModel, canonical: BaseModel, free: Iterable[str] = ()) -> list[str]:
    """In words, where `ours` leaves the canonical recipe of its protocol; `free` keys are the row's own choice."""
    left, right = (flatten(config.model_dump(mode="json", context=WHOLE)) for config in (ours, canonical))
    skipped = (*NEUTRAL_KEYS, *free)
    return [
        f"{key} {left.get(key)} instead of {right.get(key)}"
        for key in dict.fromkeys((*left, *right))
        if left.get(key) != right.get(key) and not is_among(key, skipped)
    ]
