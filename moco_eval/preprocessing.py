"""What an encoder expects of its pixels."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from moco_eval.errors import InputError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """What the network expects: pixels of 0..`range`, less `mean`, over `std`, their colours in the order `channels`.

    `size` pixels are cut from a resize to `resize`; `mean` and `std` are in the units of `range`, in that order.
    Without `resize`, 224 pixels are cut from 256, and images of another size are taken whole.
    """

    size: int = 224
    resize: int = 0
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    channels: str = "RGB"
    range: int = 1

    def __post_init__(self) -> None:
        if self.resize == 0:
            object.__setattr__(self, "resize", 256 if self.size == 224 else self.size)

    def rgb(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of RGB pixels of 0..1."""
        order = 1 if self.channels == "RGB" else -1
        mean, std = self.mean[::order], self.std[::order]
        return (mean, std) if self.range == 1 else (scaled(mean, self.range), scaled(std, self.range))

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as they come back from a file."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessing":
        """Raises InputError for a value that is missing, of another kind or out of its range."""
        if values.get("resize") == 0:
            raise InputError("its preprocessing makes no sense: it resizes to 0 pixels")
        try:
            found = cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
        except (TypeError, KeyError) as error:
            raise InputError(f"its preprocessing is damaged: {error}") from None
        numbers, sizes = (*found.mean, *found.std), (found.size, found.resize)
        sound = (
            len(numbers) == 6
            and all(type(value) in (int, float) and math.isfinite(value) for value in numbers)
            and min(numbers[3:]) > 0
            and all(type(side) is int and 0 < side <= 4096 for side in sizes)
            and found.size <= found.resize
            and found.channels in ("RGB", "BGR")
        )
        if not sound:
            raise InputError(f"its preprocessing makes no sense: {found}")
        if type(found.range) is not int or found.range not in (1, 255):
            raise InputError(f"its preprocessing has pixels of 0..{found.range!r}; 1 and 255 are known")
        return found


def scaled(values: tuple[float, ...], by: float) -> tuple[float, ...]:
    return tuple(value / by for value in values)
