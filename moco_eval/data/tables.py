"""Images and labels in the columns of a table of Hugging Face's `datasets`: read where they lie, decoded by us."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from moco_eval import limits
from moco_eval.config.hf_name import HfName
from moco_eval.errors import InputError

SAMPLE = 512  # images whose bytes are in a fingerprint


@dataclass(frozen=True)
class TableImages:
    """Encoded images in a column: a sequence of names, which reads them.

    The table is mapped from the disk, and another process gets its files' paths, not its contents.

    Attributes:
        title: the data set and its split, for names.
        table: a `datasets.table.Table`.
        column: of structs with `bytes`, or of bytes.
        rows: which of its rows, (N,) int64.
        sizes: bytes of each image, (N,) int64.
    """

    title: str
    table: Any
    column: str
    rows: np.ndarray
    sizes: np.ndarray

    @classmethod
    def open(cls, title: str, table: Any, column: str) -> "TableImages":
        """All of a column's images.

        Raises:
            InputError: a damaged column, no images, or one that is kept by its path alone.
        """
        sizes = _sizes(title, _checked(title, table, column))
        if not len(sizes):
            raise InputError(f"{title} has no images")
        if missing := np.flatnonzero(sizes < 0).tolist():
            raise InputError(
                f"{len(missing)} images of {title} are not in the table (first: row {missing[0]}), which may name a "
                "file instead; save_to_disk of the datasets library puts them in"
            )
        return cls(title, table, column, np.arange(len(sizes)), sizes)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> str:
        return f"{self.title}[{self.rows[index]}]"

    def read(self, index: int) -> bytes:
        """An image's bytes. Raises InputError where it is too large."""
        limits.require(self[index], "image", int(self.sizes[index]))
        value = self.table.fast_slice(int(self.rows[index]), 1).column(self.column)[0]
        return (value["bytes"] if hasattr(value, "keys") else value).as_buffer().to_pybytes()

    def reader(self, index: int) -> Callable[[], bytes]:
        """What reads an image."""
        return partial(self.read, index)

    def take(self, rows: np.ndarray) -> "TableImages":
        """Some of the images, in that order."""
        return replace(self, rows=self.rows[rows], sizes=self.sizes[rows])

    def fingerprint(self, labels: np.ndarray | None, classes: tuple[str, ...]) -> str:
        """sha256 over the labels, the classes, the size of every image and the bytes of SAMPLE, evenly spread."""
        digest = hashlib.sha256("\0".join(classes).encode())
        digest.update(self.sizes.tobytes() if labels is None else self.sizes.tobytes() + labels.tobytes())
        for index in np.linspace(0, len(self) - 1, min(SAMPLE, len(self))).astype(int).tolist():
            digest.update(hashlib.sha256(self.read(index)).digest())
        return digest.hexdigest()


def _checked(title: str, table: Any, column: str) -> Any:
    """A column whose offsets stay within what was mapped. Raises InputError for a damaged one."""
    held = table.column(column)
    try:
        held.validate(full=True)
    except Exception as error:  # of pyarrow
        raise InputError(
            f"column {column} of {title} is damaged ({' '.join(str(error).split())[:120]}); fetch it again"
        ) from None
    return held


def _sizes(title: str, held: Any) -> np.ndarray:
    """Bytes of each image of a column, (N,) int64; -1 where there are none."""
    import pyarrow
    import pyarrow.compute

    encoded = pyarrow.compute.struct_field(held, "bytes") if pyarrow.types.is_struct(held.type) else held
    if not (pyarrow.types.is_binary(encoded.type) or pyarrow.types.is_large_binary(encoded.type)):
        raise InputError(f"the images of {title} are kept as {held.type}; give a column of encoded images")
    return pyarrow.compute.binary_length(encoded).fill_null(-1).to_numpy().astype(np.int64)


# Which columns


def image_column(dataset: Any, wanted: HfName, title: str) -> str:
    """The column of images: the one that is chosen, else the only one whose type is an image's.

    Raises:
        InputError: there is none, or several.
    """
    found = _column(dataset, wanted, "image", _is_image, title)
    if found is None:
        raise InputError(f"{title} has no column of images; its columns are {_described(dataset.features)}")
    return found


def label_column(dataset: Any, wanted: HfName, title: str) -> str | None:
    """The column of classes: the one that is chosen, else the only ClassLabel; None where there is none.

    Raises:
        InputError: there are several, or the chosen one is not there.
    """
    from datasets import ClassLabel

    return _column(dataset, wanted, "label", lambda feature: isinstance(feature, ClassLabel), title)


def no_labels(dataset: Any, wanted: HfName, title: str) -> InputError:
    """That a split has no labels, and the way out."""
    return InputError(
        f"{title} has no column of classes (ClassLabel); its columns are {_described(dataset.features)}. Choose one of "
        f"whole numbers or words: {wanted.with_choice(label='COLUMN')}"
    )


def _column(dataset: Any, wanted: HfName, key: str, fits: Callable[[Any], bool], title: str) -> str | None:
    features, chosen = dataset.features, getattr(wanted, key)
    if chosen is not None:
        if chosen not in features:
            raise InputError(f"{title} has no column {chosen!r}; its columns are {_described(features)}")
        return chosen
    found = [name for name, feature in features.items() if fits(feature)]
    if len(found) > 1:
        raise InputError(
            f"{title} has {len(found)} columns that may be the {key}: {', '.join(found)}. Choose one: "
            f"{wanted.with_choice(**{key: found[0]})}"
        )
    return found[0] if found else None


def _is_image(feature: Any) -> bool:
    """Whether a column is an Image, or is stored like one."""
    from datasets import Image

    return isinstance(feature, Image) or (isinstance(feature, dict) and {"bytes", "path"} == set(feature))


def _described(features: Any) -> str:
    kinds = ((name, getattr(feature, "dtype", None), type(feature).__name__) for name, feature in features.items())
    return ", ".join(f"{name} ({dtype if kind == 'Value' else kind})" for name, dtype, kind in kinds) or "none"


# Labels


def labels_of(dataset: Any, column: str, title: str, known: tuple[str, ...] | None) -> tuple[np.ndarray, Any]:
    """(N,) int64, -1 where there is none; and the names of the classes.

    Args:
        known: of the training split; a ClassLabel has its own.
    Raises:
        InputError: values that are no classes, or of a class that `known` lacks.
    """
    held = _checked(title, dataset.data, column)
    names = getattr(dataset.features[column], "names", None)
    if names is None:
        return _numbered(held, column, title, known)
    labels = held.fill_null(-1).to_numpy().astype(np.int64)
    if labels.max(initial=0) >= len(names):
        raise InputError(f"{title}[{labels.argmax()}] has the label {labels.max()}, and {column} names {len(names)}")
    return labels, tuple(names)


def _numbered(held: Any, column: str, title: str, known: tuple[str, ...] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """The same of whole numbers or words, whose classes are what occurs, in order."""
    import pyarrow

    kinds = (pyarrow.types.is_integer, pyarrow.types.is_string, pyarrow.types.is_large_string)
    if not any(is_kind(held.type) for is_kind in kinds):
        raise InputError(f"column {column} of {title} holds {held.type}; give one class an image: numbers or words")
    values, present = held.to_pylist(), held.is_valid().to_numpy()
    names = known or tuple(map(str, sorted({value for value in values if value is not None})))
    limits.require(title, "classes", len(names))
    places = {name: place for place, name in enumerate(names)}
    labels = np.array([places.get(str(value), -1) if value is not None else -1 for value in values], np.int64)
    if (odd := np.flatnonzero((labels < 0) & present)).size:
        raise InputError(f"{title}[{odd[0]}] is of class {values[odd[0]]!r}, which no training image has")
    return labels, names


def require_labels(labels: np.ndarray, wanted: HfName, title: str, others: list[str]) -> None:
    """Raises InputError where labels are missing: many test splits keep them hidden."""
    missing = np.flatnonzero(labels < 0)
    if len(missing):
        ways = [wanted.with_choice(test=name) for name in others]
        raise InputError(
            f"{title} has no label for {len(missing)} of {len(labels)} images (first: row {missing[0]})"
            + (f"; judge on another split: {ways[0]}" if ways else "; remove these, or label them")
        )
