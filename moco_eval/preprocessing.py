"""What an encoder expects of its pixels."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from moco_eval.errors import InputError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INTERPOLATIONS = ("bilinear", "bicubic")
BANDS = "bands"
MOST_BANDS = 64


@dataclass(frozen=True)
class Preprocessing:
    """What the network expects: pixels of 0..`range`, less `mean`, over `std`, their colours in the order `channels`.

    `size` pixels are cut from a resize to `resize`; `mean` and `std` are in the units of `range`, in that order.
    Without `resize`, 224 pixels are cut from 256, and images of another size are taken whole.
    `interpolation`: of the resize, bilinear or bicubic, with `antialias` as PIL has it. The shorter side becomes
    `resize`, or with `squash` both sides, whatever the image's shape.
    `channels`: RGB or BGR, for photographs of 8 bits; `bands` for images of any number of channels, one `mean` and
    `std` for each, in the order and the units in which they are stored (`range` is then 0).
    """

    size: int = 224
    resize: int = 0
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    channels: str = "RGB"
    range: int = 1
    interpolation: str = "bilinear"
    antialias: bool = True
    squash: bool = False

    def __post_init__(self) -> None:
        if self.resize == 0:
            object.__setattr__(self, "resize", 256 if self.size == 224 else self.size)

    @property
    def in_channels(self) -> int:
        """How many channels the images have."""
        return len(self.mean)

    def rgb(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of RGB pixels of 0..1; of bands, in their own units."""
        order = -1 if self.channels == "BGR" else 1
        mean, std = self.mean[::order], self.std[::order]
        return (scaled(mean, 255), scaled(std, 255)) if self.range == 255 else (mean, std)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as they come back from a file."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessing":
        """Raises InputError for a value that is missing, of another kind or out of its range."""
        if values.get("resize") == 0:
            raise InputError("its preprocessing makes no sense: it resizes to 0 pixels")
        try:
            preprocessing = cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
        except (TypeError, KeyError) as error:
            raise InputError(f"its preprocessing is damaged: {error}") from None
        if not preprocessing._is_sound():
            raise InputError(f"its preprocessing makes no sense: {preprocessing}")
        bands = preprocessing.channels == BANDS
        if type(preprocessing.range) is not int or preprocessing.range not in ((0,) if bands else (1, 255)):
            known = "0 stands for the units of bands" if bands else "1 and 255 are known"
            raise InputError(f"its preprocessing has pixels of 0..{preprocessing.range!r}; {known}")
        return preprocessing

    def _is_sound(self) -> bool:
        numbers, sizes = (*self.mean, *self.std), (self.size, self.resize)
        counts = (3,) if self.channels in ("RGB", "BGR") else range(1, MOST_BANDS + 1)
        return (
            len(self.mean) == len(self.std)
            and len(self.mean) in counts
            and all(type(value) in (int, float) and math.isfinite(value) for value in numbers)
            and min(self.std) > 0
            and all(type(side) is int and 0 < side <= 4096 for side in sizes)
            and self.size <= self.resize
            and self.channels in ("RGB", "BGR", BANDS)
            and self.interpolation in INTERPOLATIONS
            and type(self.antialias) is type(self.squash) is bool
        )


def scaled(values: tuple[float, ...], by: float) -> tuple[float, ...]:
    return tuple(value / by for value in values)
