"""Pickles from others, read without running them: numpy arrays and plain containers, nothing else that is code."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from moco_eval.errors import InputError

NUMPY_2 = int(np.__version__.split(".")[0]) >= 2
ALLOWED = frozenset(
    {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
        ("collections", "OrderedDict"),
    }
)


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it wants to run {module}.{name}, which was not done")
        here, there = ("numpy._core", "numpy.core") if NUMPY_2 else ("numpy.core", "numpy._core")
        return super().find_class(module.replace(there, here) if module.startswith(there) else module, name)


def read(path: Path, encoding: str = "ASCII") -> Any:
    """What a pickle holds, numpy 1's and numpy 2's alike.

    Raises:
        InputError: missing, damaged, or in need of anything but arrays and plain containers.
    """
    try:
        with path.open("rb") as file:
            return _ArraysOnly(file, encoding=encoding).load()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # whatever a damaged pickle makes the unpickler raise
        raise InputError(f"{path} is not a pickle of arrays: {error}") from None


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
