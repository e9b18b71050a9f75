"""Arrays of an .npz that a stranger may have written: what their headers say is looked at before they are unpacked."""

import math
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moco_eval import limits

KINDS = "biufU"  # of numbers and text: no objects, which are pickles, and no records
MEMBERS = 100  # arrays in a file at most
PACKED = 64 << 20  # bytes that any array may have, however well it is packed


@dataclass(frozen=True)
class Header:
    """What an array is, before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Arrays:
    """The arrays of an open file by name; used as a context, or through `read`.

    Raises, here and in all it does:
        InputError: not a regular file, or an array beyond a limit.
        Exception: of many kinds, for whatever a damaged file makes zipfile and numpy raise.
    """

    def __init__(self, path: Path):
        self.path, self._file = path, limits.open_regular(path)
        try:
            self._archive = zipfile.ZipFile(self._file)
            self._members = {name.removesuffix(".npy"): name for name in self._archive.namelist()}
            if len(self._members) > MEMBERS:
                raise ValueError(f"{len(self._members):,} arrays")
            self.headers = {name: self._header(self._archive.getinfo(full)) for name, full in self._members.items()}
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Arrays":
        return self

    def __exit__(self, *_: Any) -> None:
        self._archive.close()
        self._file.close()

    def _header(self, member: zipfile.ZipInfo) -> Header:
        """Refuses what is not as long as its header says, or larger than a limit."""
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{member.filename} is packed in a way that numpy never does")
        if member.header_offset + member.compress_size > os.fstat(self._file.fileno()).st_size:
            raise ValueError(f"{member.filename} is cut off")
        with self._archive.open(member) as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError(f"{member.filename} is of a version of .npy that is never written here")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            size = file.tell() + math.prod(shape) * dtype.itemsize
        if dtype.kind not in KINDS or not dtype.itemsize or min(shape, default=0) < 0:
            raise ValueError(f"{member.filename} of shape {shape} is of type {dtype}")
        if size != member.file_size:
            raise ValueError(f"{member.filename} of shape {shape} has {member.file_size} bytes instead of {size}")
        limits.require(f"{member.filename} in {self.path}", "array", size)
        if size > PACKED:
            ratio = math.ceil(size / max(1, member.compress_size))
            limits.require(f"{member.filename} in {self.path}", "packing", ratio)
        return Header(shape, dtype)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._members:
            raise ValueError(f"it holds no array {name!r}")
        with self._archive.open(self._members[name]) as file:
            return np.lib.format.read_array(file, allow_pickle=False)


def read(path: Path, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Some arrays, or all; raises as `Arrays`."""
    with Arrays(path) as arrays:
        return {name: arrays[name] for name in (arrays.headers if names is None else names)}
