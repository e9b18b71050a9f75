"""Pixels that the user chooses (`--pixels`): read, put in the place of the method's own, and held against these."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from moco_eval.config.load import did_you_mean
from moco_eval.errors import InputError
from moco_eval.preprocessing import BANDS, Preprocessing

if TYPE_CHECKING:  # what --pixels says is checked without torch
    from moco_eval.encoders.encoder import Encoder

DEFAULTS = asdict(Preprocessing())
KEYS = tuple(field.name for field in fields(Preprocessing))
OF_RESIZING = ("size", "resize", "interpolation", "antialias", "squash")
WHOLE = ("size", "mean", "std")  # what must be given where an encoder does not say its pixels


@dataclass(frozen=True)
class Doubt:
    """Pixels that no byte of a file tells.

    Attributes:
        keys: which of them.
        sentence: what was taken, and who wants others.
        example: pixels that the way out names.
    """

    keys: tuple[str, ...]
    sentence: str
    example: Preprocessing

    def left(self, given: Mapping[str, Any]) -> list[str]:
        """The doubt in words, with the option that settles it; none where the user has settled it."""
        keys = [key for key in self.keys if key not in given]
        return [f"{self.sentence}: --pixels {as_option(self.example, keys)}"] if keys else []


def as_option(pixels: Preprocessing, keys: Sequence[str]) -> str:
    """Those of an encoder's pixels as `--pixels` takes them."""
    return ",".join(f"{key}={_written(getattr(pixels, key))}" for key in keys)


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{value[0]:g}" if len(set(value)) == 1 else ",".join(f"{number:g}" for number in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def parsed(options: Sequence[str]) -> dict[str, Any]:
    """What --pixels says, which may be repeated: KEY=VALUE, several between commas, mean=0.5 or mean=0.4,0.5,0.6.

    Raises:
        InputError: an unknown key, or a value of another kind.
    """
    given: dict[str, Any] = {}
    for option in options:
        for part in re.split(r",(?=\s*[A-Za-z_]+\s*=)", option):
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals:
                raise InputError(f"--pixels {part}: write it as KEY=VALUE, for example interpolation=bicubic")
            _require_key(key)
            given[key] = _read(key, value)
    return given


def _require_key(key: Any) -> None:
    if key not in KEYS:
        known = did_you_mean(str(key), KEYS) or f" It takes {', '.join(KEYS)}."
        raise InputError(f"--pixels {key}: there is no such key.{known}")


def _read(key: str, value: str) -> Any:
    kind = type(DEFAULTS[key])
    try:
        if kind is tuple:
            return tuple(float(number) for number in value.split(","))
        return {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        wanted = {tuple: "numbers between commas", bool: "true or false", int: "a whole number"}[kind]
        raise InputError(f"--pixels {key}={value}: give {wanted}") from None


def with_pixels(encoder: "Encoder", given: Mapping[str, Any]) -> "Encoder":
    """The encoder with the pixels that the user chose, under a name that says so; what deviates is kept in words.

    Args:
        given: some of the attributes of a Preprocessing; a single mean or standard deviation stands for all channels.
    Raises:
        InputError: an unknown key or a senseless value; size, mean or std is missing where the encoder says no pixels.
    """
    from moco_eval.encoders.naming import safe_name

    if not given:
        return encoder
    own = encoder.preprocessing
    if own is None and (missing := [key for key in WHOLE if key not in given]):
        raise InputError(
            f"--pixels: {encoder.source} does not say its pixels, so that {', '.join(WHOLE)} must be given together; "
            f"{', '.join(missing)} missing"
        )
    chosen = _applied(own or Preprocessing(), given)
    settled = replace(own, **{key: getattr(chosen, key) for key in encoder.open_pixels}) if own else chosen
    whose = encoder.settings or encoder.origin.partition(",")[0]
    return replace(
        encoder,
        preprocessing=chosen,
        pixels={key: getattr(chosen, key) for key in given},
        pixel_deviations=differences(chosen, settled, whose),
        run_name=f"{encoder.run_name}-{safe_name(as_option(chosen, list(given)))}",
    )


def _applied(own: Preprocessing, given: Mapping[str, Any]) -> Preprocessing:
    for key in given:
        _require_key(key)
    values = dict(given)
    for key in ("mean", "std"):
        if key in values:
            values[key] = _for_channels(key, values[key], own)
    if "size" in values:
        values.setdefault("resize", Preprocessing(size=values["size"]).resize)
    if values.get("channels", own.channels) != own.channels and BANDS in (values["channels"], own.channels):
        values.setdefault("range", 0 if values["channels"] == BANDS else 1)
    try:
        return Preprocessing.from_dict(asdict(own) | values)
    except InputError as error:
        shown = ",".join(f"{key}={_written(value)}" for key, value in given.items())
        raise InputError(f"--pixels {shown}: {str(error).removeprefix('its ')}") from None


def _for_channels(key: str, value: Any, own: Preprocessing) -> tuple[float, ...]:
    """One number for each channel. Raises InputError for what is no numbers."""
    numbers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not numbers or any(type(number) not in (int, float) for number in numbers):
        raise InputError(f"--pixels {key}={value!r}: give numbers")
    return numbers * own.in_channels if len(numbers) == 1 else numbers


def differences(chosen: Preprocessing, own: Preprocessing, whose: str) -> list[str]:
    """In words, where pixels are others than the method's own."""
    pairs = [(aspect(chosen), aspect(own)) for aspect in (_cut, _antialiasing, _shape, _statistics, _colours)]
    if chosen.interpolation != own.interpolation:
        pairs.insert(0, (f"{chosen.interpolation} resize", own.interpolation))
    return [f"{used} instead of {whose}'s {usual}" for used, usual in pairs if used != usual]


def _cut(pixels: Preprocessing) -> str:
    return f"images of {pixels.size} pixels (resized to {pixels.resize})"


def _antialiasing(pixels: Preprocessing) -> str:
    return "antialiased resize" if pixels.antialias else "resize without antialiasing"


def _shape(pixels: Preprocessing) -> str:
    return "images squashed to a square" if pixels.squash else "images in their proportions"


def _statistics(pixels: Preprocessing) -> str:
    return f"pixels of mean {_written(pixels.mean)} and std {_written(pixels.std)}"


def _colours(pixels: Preprocessing) -> str:
    return pixels.channels if pixels.channels == BANDS else f"{pixels.channels} of 0..{pixels.range}"
