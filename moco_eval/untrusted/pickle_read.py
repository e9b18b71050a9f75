"""Pickles from others, read without running them: plain containers, numpy arrays, and stand-ins for all other objects.

numpy itself has no part in it: an array is made here of its shape, its dtype and its bytes, once these fit together.
"""

import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moco_eval.errors import InputError
from moco_eval.untrusted.pickle_scan import DAMAGED, DEEPEST, DISTRUST, MOST, SAVE, Refused, Scan, python_3, scan, shown

# Reading and writing


def read(path: Path, encoding: str = "ASCII") -> Any:
    """What a pickle of numpy arrays and plain containers holds, numpy 1's and numpy 2's alike.

    Args:
        encoding: of Python 2's strings; 'bytes' leaves them as bytes.
    Raises:
        InputError: missing, damaged, or in need of anything but arrays and plain containers.
    """
    try:
        with path.open("rb") as file:
            return plain(_load(file, path.stat().st_size, encoding))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except MemoryError:
        raise InputError(f"{path} does not fit into memory; read it on a larger machine") from None
    except Refused as error:
        raise InputError(f"{path} {error}") from None


def _load(file: BinaryIO, size: int, encoding: str) -> Any:
    effects = scan(file, size)
    _require_arrays_only(effects)
    file.seek(0)
    try:
        return _ArraysOnly(file, encoding=encoding).load()
    except (MemoryError, Refused):
        raise
    except Exception as error:  # whatever a damaged pickle makes the unpickler raise
        raise Refused(f"is not a pickle of arrays ({shown(error)}): {DAMAGED}") from None


def _require_arrays_only(effects: Scan) -> None:
    for name in effects.names:
        if effects.storages and _REBUILT.match(name):
            raise Refused(UNPACKED)
        if not ARRAYS.fullmatch(name):
            raise Refused(refusal(name))
    if effects.storages:
        raise Refused(UNPACKED)
    for name, arguments in effects.calls:
        if name == "collections.OrderedDict" and not set(arguments) <= {"list", "dict", "tuple"}:
            raise Refused(f"calls {name} in a way that no checkpoint does; {DISTRUST}")


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = python_3(module, name)
        if not ARRAYS.fullmatch(full):
            raise Refused(refusal(full))
        return OrderedDict if full == "collections.OrderedDict" else stand_in(full)


UNPACKED = (
    "is the data.pkl of a checkpoint that was unpacked, without the tensors, which lie beside it: give the checkpoint "
    "as it was, or pack its folder again (zip -0 -r model.pth FOLDER)"
)
_REBUILT = re.compile(r"torch\.(storage\._load_from_bytes|_utils\._rebuild|_tensor\.)")
# Tensors that are no plain ones in memory, by what rebuilds them
_ELSEWHERE = (
    (
        r"torch\._utils\._rebuild_(xla_tensor|device_tensor_from_\w+)",
        "holds tensors of another device, such as a TPU's, which no CPU rebuilds: have them moved by .cpu() and saved",
    ),
    (
        r"torch\._utils\._rebuild_wrapper_subclass|torch\.distributed\.(_?tensor|_shard|device_mesh|_mesh_layout)\b.*",
        "holds distributed tensors, as FSDP2 and tensor parallelism keep them: have them gathered before saving, by "
        "full_tensor() or torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict",
    ),
)


def elsewhere(name: str) -> str | None:
    """What is said of a file whose tensors this global rebuilds, where these are not plain tensors in memory."""
    reason = next((reason for pattern, reason in _ELSEWHERE if re.fullmatch(pattern, name)), None)
    return f"{reason} ({shown(name)}); nothing was executed" if reason else None


NETWORK = re.compile(r"torch\.nn\.modules\.|torchvision\.|timm\.|lightly(_train)?\.")


def refusal(name: str) -> str:
    """Why a file that names this global is not read, in words that follow its path."""
    if NETWORK.match(name):
        return f"holds a whole network (class {shown(name)}), whose code we do not run; nothing was executed: {SAVE}"
    if reason := elsewhere(name):
        return reason
    if _REBUILT.match(name):
        return (
            f"is a plain pickle of torch tensors ({shown(name)}); nothing was executed: have it written by torch.save"
        )
    return f"wants to run code named {shown(name)}; {DISTRUST}; if it is your own, {SAVE}"


class _ForBothNumpys(pickle._Pickler):
    """Names numpy's reconstructor where numpy 1 and numpy 2 both find it."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if getattr(obj, "__module__", "").startswith("numpy._core"):
            module = obj.__module__.replace("numpy._core", "numpy.core")
            self.write(pickle.GLOBAL + f"{module}\n{obj.__name__}\n".encode())  # type: ignore[attr-defined]
            self.memoize(obj)  # type: ignore[attr-defined]
        else:
            super().save_global(obj, name)  # type: ignore[misc]


def write(path: Path, value: Any) -> None:
    """A pickle (protocol 4) that numpy 1 and numpy 2 both read."""
    with path.open("wb") as file:
        _ForBothNumpys(file, protocol=4).dump(value)


# Stand-ins


class StandIn:
    """Stands for an object whose class a file names and nobody made: it keeps nothing and runs nothing.

    Attributes:
        of: the name of the class.
    """

    of = "object"

    def __new__(cls, *_arguments: Any, **_named: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *_arguments: Any, **_named: Any):
        pass

    def __setstate__(self, _state: Any) -> None:
        pass

    def __repr__(self) -> str:
        return f"<{self.of}, not made>"


class _Mapping(StandIn):
    def __new__(cls, *_arguments: Any, **_named: Any) -> Any:
        return OrderedDict()


class _Sequence(StandIn):
    def __new__(cls, *_arguments: Any, **_named: Any) -> Any:
        return []


class _Dtype(StandIn):
    """numpy.dtype, of numbers only; `known` is None for all others (objects, strings, records)."""

    def __init__(self, code: Any = "", *_copy: Any):
        self.code, self.order = code.decode("ascii") if isinstance(code, bytes) else code, "="

    def __setstate__(self, state: Any) -> None:
        _version, order, *_fields = state
        self.order = order.decode("ascii") if isinstance(order, bytes) else order

    @property
    def known(self) -> np.dtype | None:
        if not re.fullmatch(r"[biufc](1|2|4|8|16)", str(self.code)) or self.order not in ("<", ">", "=", "|"):
            return None
        try:
            return np.dtype(f"{self.order}{self.code}")
        except TypeError:  # f1, i16
            return None


class _Array(StandIn):
    """numpy.ndarray: what numpy's `_reconstruct` returns, then given its state."""

    of = "numpy.ndarray"
    value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        *_version, shape, dtype, fortran, data = state
        self.value = _array(shape, dtype, bool(fortran), data)


class _Scalar(StandIn):
    """A number, in place of what numpy's `scalar` returns."""

    def __new__(cls, dtype: Any, data: Any = b"") -> Any:
        value = _array((), dtype, False, data)
        return super().__new__(cls) if value is None else value.item()


class _FromBuffer(StandIn):
    """What numpy's `_frombuffer` returns: an array of pickle protocol 5."""

    def __new__(cls, data: Any, dtype: Any, shape: Any, order: Any, *_axes: Any) -> Any:
        array = super().__new__(_Array)
        array.value = _array(shape, dtype, order == "F", data) if order in ("C", "F") else None
        return array


def _array(shape: Any, dtype: Any, fortran: bool, data: Any) -> np.ndarray | None:
    """The array of these bytes, which it shares; None where it holds no numbers."""
    kind = dtype.known if isinstance(dtype, _Dtype) else None
    if kind is None:
        return None
    data = data.encode("latin1") if isinstance(data, str) else data
    dense = isinstance(shape, tuple) and len(shape) < 64 and all(type(size) is int and size >= 0 for size in shape)
    if not dense:
        raise Refused(f"has an array of the shape {shown(shape)}: {DAMAGED}")
    if len(data) != math.prod(shape) * kind.itemsize:
        raise Refused(f"has an array of {'x'.join(map(str, shape))} {kind} and {len(data)} bytes for it: {DAMAGED}")
    array = np.ndarray(0, np.int8)
    array.__setstate__((1, shape, kind, fortran, bytes(data)))
    return array


class _Bytes(StandIn):
    """Bytes as pickle protocol 2 writes them: as text in Latin 1."""

    def __new__(cls, text: Any = "", encoding: Any = "latin1") -> Any:
        return text.encode("latin1")


class _Set(StandIn):
    def __new__(cls, items: Any = ()) -> Any:
        return set(items) if isinstance(items, list) else set()


# What is made in place of what a pickle names; the first row that fits is taken.
MADE: tuple[tuple[str, type[StandIn]], ...] = (
    (r"numpy\._?core\.multiarray\._reconstruct", _Array),
    (r"numpy\._?core\.multiarray\.scalar", _Scalar),
    (r"numpy\._?core\.numeric\._frombuffer", _FromBuffer),
    (r"numpy\.dtype", _Dtype),
    (r"numpy\.ndarray", StandIn),
    (r"_codecs\.encode|builtins\.bytes", _Bytes),
    (r"builtins\.(set|frozenset)", _Set),
    (r"collections\.defaultdict", _Mapping),
    (r"collections\.deque", _Sequence),
)
ARRAYS = re.compile("|".join((r"collections\.OrderedDict", *(pattern for pattern, _ in MADE))))
CONTAINERS = {"dict": _Mapping, "list": _Sequence}


@lru_cache(maxsize=10_000)
def stand_in(name: str, filled: str = "") -> type[StandIn]:
    """The class to be made in place of the one of this name; torch finds it by its own module and name.

    Args:
        filled: 'dict' or 'list' where the pickle puts items into what it makes.
    """
    usual = CONTAINERS.get(filled, StandIn)
    base = next((kind for pattern, kind in MADE if re.fullmatch(pattern, name)), usual)
    module, _, own = name.rpartition(".")
    of = name if base.of == StandIn.of else base.of
    return type(own, (base,), {"__module__": module, "__qualname__": own, "of": of})


# Afterwards


def plain(value: Any, other: Callable[[Any], Any] = lambda value: value) -> Any:
    """A copy in plain containers: dict, list, tuple, set, of strings, bytes, numbers, None, stand-ins.

    Args:
        other: what to make of an array, and of all else that is none of these.
    Raises:
        Refused: nested or repeated beyond measure.
    """
    return _Plain(other).copy(value, 0)[0]


SIMPLE = (str, int, float, bool, complex, bytes, type(None))
Measured = tuple[Any, int, int]  # a copy, its height in levels, its size when every sharing is unfolded


class _Plain:
    def __init__(self, other: Callable[[Any], Any]):
        self.other = other
        self.seen: dict[int, Measured] = {}

    def copy(self, value: Any, depth: int) -> Measured:
        if type(value) in SIMPLE:
            return value, 0, 1
        if isinstance(value, (dict, list, tuple, set)):
            if id(value) not in self.seen:
                self.seen[id(value)] = self._container(value, depth)
            return self.seen[id(value)]
        if isinstance(value, type) and issubclass(value, StandIn):  # named, never called
            return object.__new__(value), 0, 1
        value = value.value if isinstance(value, _Array) and value.value is not None else value
        return value if isinstance(value, StandIn) else self.other(value), 0, 1

    def _container(self, value: Any, depth: int) -> Measured:
        if depth == DEEPEST:
            raise Refused(f"nests its entries more than {DEEPEST} deep; {DISTRUST}")
        members = [*value, *value.values()] if isinstance(value, dict) else list(value)
        copies, height, size = [], 1, 1
        for member in members:
            copy, above, unfolded = self.copy(member, depth + 1)
            copies.append(copy)
            height, size = max(height, above + 1), size + unfolded
        if depth + height > DEEPEST or size > MOST:
            raise Refused(f"nests the same entries in each other, {height} deep, to {size:,} entries; {DISTRUST}")
        if isinstance(value, dict):
            return dict(zip(copies[: len(value)], copies[len(value) :])), height, size
        kind = next(kind for kind in (list, tuple, set) if isinstance(value, kind))
        return kind(copies), height, size
