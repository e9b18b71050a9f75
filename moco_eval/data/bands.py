"""Images of any number of channels: what a bands.yaml beside a data set says of them, and their pixels."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moco_eval.config import yaml_read
from moco_eval.config.load import did_you_mean
from moco_eval.data.pixels import open_image, other_than_image, reason_of
from moco_eval.errors import InputError
from moco_eval.preprocessing import BANDS, MOST_BANDS, Preprocessing
from moco_eval.runtime import files
from moco_eval.untrusted.band_files import NPY_START, TIFF_STARTS, read_npy, read_tiff, require_sides

FILE = "bands.yaml"
KEYS = ("mean", "std", "names", "bands")
FEW_BANDS = ("L", "RGB", "RGBA", "CMYK", "I;16", "I;16B", "F", "LA")  # Pillow's modes whose values are as stored
MEASURE = "moco-eval datasets check {} --data {} --write measures each channel's mean and std and writes it"


@dataclass(frozen=True)
class Bands:
    """What a bands.yaml says: of all bands that the files hold, and which of them are taken.

    Attributes:
        path: of the bands.yaml.
        mean, std: of each stored band, in the units in which it is stored; empty where they were not measured yet.
        names: of each stored band; empty where they have none.
        taken: places among the stored bands, from 0, in the order in which a network sees them; empty for all.
        stored: how many bands each file holds; 0 where nothing says so yet.
    """

    path: Path
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    names: tuple[str, ...] = ()
    taken: tuple[int, ...] = ()
    stored: int = 0

    @property
    def order(self) -> tuple[int, ...]:
        """Places of the bands that are taken."""
        return self.taken or tuple(range(self.stored))

    @property
    def count(self) -> int:
        """How many bands are taken."""
        return len(self.order)

    def record(self) -> dict[str, Any]:
        """For a result record: how many bands the files hold, and which are taken, counted from 1."""
        named = {"names": [self.names[place] for place in self.order]} if self.names else {}
        return {"stored": self.stored, "taken": [place + 1 for place in self.order]} | named

    def title(self, place: int) -> str:
        """What to call a stored band in a message; places are counted from 0."""
        return _band(place + 1, self.names)

    def preprocessing(self, size: int, resize: int) -> Preprocessing:
        """Bands less their mean, over their standard deviation."""
        mean, std = (tuple(values[place] for place in self.order) for values in (self.mean, self.std))
        return Preprocessing(size, resize, mean, std, channels=BANDS, range=0)

    def read(self, data: bytes, name: str) -> np.ndarray:
        """The bands that are taken, (C, H, W) float32, in the units in which they are stored.

        Raises:
            InputError: unreadable, of another number of bands, or with values that are not finite.
        """
        values = self.read_all(data, name)
        taken = values[list(self.taken)] if self.taken else values
        return np.array(taken, dtype=np.float32, order="C")  # always a copy: a tensor of it may be written to

    def read_all(self, data: bytes, name: str) -> np.ndarray:
        """All bands of an image as they are stored, (C, H, W)."""
        values = decode(data, name, self.stored)
        if self.stored and len(values) != self.stored:
            raise InputError(
                f"{name} has {_counted(len(values))}, and {self.path} describes {self.stored}; all images of a set "
                "have the same bands"
            )
        if values.dtype.kind == "f":
            _require_finite(values, name)
        return values

    def picture(self, values: np.ndarray) -> np.ndarray:
        """(..., C, H, W) to (..., 3, H, W) uint8 to look at: three bands, or one in grey; mean in the middle, 2 std."""
        mean, std = (np.asarray(part)[list(self.order), None, None] for part in (self.mean, self.std))
        shown = [0, 1, 2] if self.count >= 3 else [0, 0, 0]
        grey = (values - mean) / std * 63.75 + 127.5
        return grey.clip(0, 255).astype(np.uint8)[..., shown, :, :]


def _counted(count: int) -> str:
    return f"{count} channel{'s' * (count != 1)}"


def _require_finite(values: np.ndarray, name: str) -> None:
    with np.errstate(over="ignore"):
        finite = np.isfinite(values.astype(np.float32, copy=False))
    if not finite.all():
        band, row, column = np.argwhere(~finite)[0].tolist()
        raise InputError(
            f"{name} has {int((~finite).sum())} values that are not finite (first: {values[band, row, column]} in band "
            f"{band + 1}, row {row}, column {column}); fill them, or remove the image"
        )


def decode(data: bytes, name: str, stored: int = 0) -> np.ndarray:
    """An image as it is stored, (C, H, W): TIFF and .npy of any number of channels, other formats of 1 to 4.

    Args:
        data: what its file holds.
        name: what to call it in a message.
        stored: how many channels it should have, which tells (C, H, W) from (H, W, C); 0 where that is not known.
    Raises:
        InputError: no image, damaged, or larger than the limits.
    """
    if data.startswith(NPY_START):
        return _channels_first(read_npy(data, name), name, stored)
    if data.startswith(TIFF_STARTS):
        values = read_tiff(data, name)
        require_count(len(values), name)
        return values
    return _of_pillow(data, name)


def _channels_first(values: np.ndarray, name: str, stored: int) -> np.ndarray:
    """(H, W), (H, W, C) or (C, H, W) to (C, H, W); the channels are those of the right count, or the shorter end."""
    if values.ndim == 2:
        return values[None]
    first, last = values.shape[0], values.shape[2]
    if (first == stored) != (last == stored):
        is_first = first == stored
    elif first == last:
        raise InputError(
            f"{name} of shape {values.shape}: its first and last sides are equal, so it is not clear which are channels"
        )
    else:
        is_first = first < last
    values = values if is_first else values.transpose(2, 0, 1)
    require_count(len(values), name)
    return values


def require_count(count: int, name: str) -> None:
    """Raises InputError where an image has more channels than a network may take."""
    if count > MOST_BANDS:
        raise InputError(f"{name} has {count} channels, and {MOST_BANDS} are the most; take some of them out")


def _of_pillow(data: bytes, name: str) -> np.ndarray:
    try:
        with open_image(io.BytesIO(data), name) as image:
            if image.mode not in FEW_BANDS:
                raise InputError(f"{name} has pixels of the kind {image.mode}, which are not bands; save it in 8 bits")
            require_sides(name, (image.height, image.width, len(image.getbands())))
            values = np.asarray(image)
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file makes its decoder raise
        kind = other_than_image(data[:200])
        reason = f"is {kind}" if kind else f"cannot be decoded ({reason_of(error)})"
        raise InputError(f"{name} {reason}; remove or replace it") from None
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


# bands.yaml


def bands_of(folder: Path) -> Bands | None:
    """What the bands.yaml of a folder says; None where there is none.

    Raises:
        InputError: a key, a count or a value that makes no sense.
    """
    path = folder / FILE
    if not path.exists():
        return None
    _, values = yaml_read.read(path)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold keys and values, such as mean: [1354.4, 1118.2]")
    for key in values:
        if key not in KEYS:
            raise InputError(f"unknown key {str(key)!r} in {path}.{did_you_mean(str(key), KEYS)}")
    mean, std = (tuple(_numbers(path, key, values.get(key))) for key in ("mean", "std"))
    names = tuple(_names(path, values.get("names")))
    stored = _count(path, {"mean": mean, "std": std, "names": names})
    for band, value in enumerate(std, start=1):
        if value <= 0 and not _is_left_out(band, values.get("bands")):
            raise InputError(f"{path}: std of {_band(band, names)} is {value:g}; it must be above 0; {_constant(band)}")
    if bool(mean) != bool(std):
        raise InputError(f"{path} has {'mean' if mean else 'std'} without {'std' if mean else 'mean'}; give both")
    return Bands(path, mean, std, names, tuple(_places(path, values.get("bands"), stored)), stored)


def _is_left_out(band: int, taken: Any) -> bool:
    """Whether a list `bands` is without a band of this number."""
    return isinstance(taken, list) and bool(taken) and band not in taken


def _constant(band: int) -> str:
    return f"where all its values are equal, leave number {band} out by a list `bands` of the others"


def _band(number: int, names: Sequence[str]) -> str:
    return f"band {number} ({names[number - 1]})" if names else f"band {number}"


def _list(path: Path, key: str, given: Any) -> list[Any]:
    if given is None:
        return []
    if not isinstance(given, list) or not given:
        raise InputError(f"{path}: {key} is {given!r}; it must be a list, one entry for each band")
    return given


def _numbers(path: Path, key: str, given: Any) -> list[float]:
    numbers = _list(path, key, given)
    for band, value in enumerate(numbers, start=1):
        if type(value) not in (int, float) or not math.isfinite(value):
            raise InputError(f"{path}: {key} of band {band} is {value!r}; it must be a number")
    return [float(value) for value in numbers]


def _names(path: Path, given: Any) -> list[str]:
    names = [str(name) for name in _list(path, "names", given)]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path}: the name {name!r} is given to several bands")
    return names


def _count(path: Path, lists: dict[str, tuple]) -> int:
    """How many bands the lists are about. Raises InputError where they differ."""
    counts = {key: len(values) for key, values in lists.items() if values}
    if len(set(counts.values())) > 1:
        each = ", ".join(f"{count} in {key}" for key, count in counts.items())
        raise InputError(f"{path}: each list needs one entry per band, but there are {each}")
    count = max(counts.values(), default=0)
    if count > MOST_BANDS:
        raise InputError(f"{path} describes {count} bands, and {MOST_BANDS} are the most")
    return count


def _places(path: Path, given: Any, stored: int) -> list[int]:
    """`bands` counted from 0."""
    numbers = _list(path, "bands", given)
    for number in numbers:
        if type(number) is not int or not 1 <= number <= (stored or MOST_BANDS):
            most = f"1 to {stored}" if stored else f"at most {MOST_BANDS}"
            raise InputError(f"{path}: bands has {number!r}; bands are counted from 1, here {most}")
        if numbers.count(number) > 1:
            raise InputError(f"{path}: bands has {number} more than once")
    return [number - 1 for number in numbers]


def require_measured(bands: Bands, name: str) -> None:
    """Raises InputError where mean and std of the bands are not known yet; `name` is the data set's."""
    if not bands.mean:
        command = MEASURE.format(name, bands.path.parent)
        raise InputError(f"{bands.path} has no mean and std of the {_counted(bands.stored)} of its images; {command}")


def with_stored(bands: Bands, first: bytes, name: str) -> Bands:
    """The bands with their count, as the first image of a set has it.

    Args:
        first: what its file holds.
        name: what to call it in a message.
    Raises:
        InputError: it cannot be read, or bands.yaml describes another number.
    """
    stored = len(decode(first, name, bands.stored))
    if bands.stored not in (0, stored):
        entries = "means" if bands.mean else "names"
        raise InputError(f"{bands.path} has {bands.stored} {entries} for the {_counted(stored)} of {name}")
    if bands.taken and max(bands.taken) >= stored:
        raise InputError(f"{bands.path}: bands has {max(bands.taken) + 1}, but {name} has {_counted(stored)}")
    return replace(bands, stored=stored)


def refuse_many_channels(data: bytes, name: str) -> None:
    """Raises InputError where a file that Pillow does not take is an image of bands, and says how such are read."""
    if not data.startswith((NPY_START, *TIFF_STARTS)):
        return
    try:
        values = decode(data, name)
    except InputError:
        return
    raise InputError(
        f"{name} has {_counted(len(values))} of {values.dtype}, and without a {FILE} beside the data images are RGB of "
        f"8 bits; {MEASURE.format('imagefolder', 'FOLDER')}"
    )


def write(bands: Bands) -> None:
    """Write a bands.yaml with all that is known of the bands."""
    known = {
        "names": list(bands.names),
        "bands": [place + 1 for place in bands.taken],
        "mean": list(bands.mean),
        "std": list(bands.std),
    }
    text = yaml.safe_dump(
        {key: values for key, values in known.items() if values}, sort_keys=False, width=120, default_flow_style=None
    )
    with files.atomic(bands.path) as temporary:
        temporary.write_text(
            f"# The images here, band by band, in the units in which they are stored (docs/datasets.md)\n{text}",
            encoding="utf-8",
        )
