"""Folders of real digits as image files, and the same bytes as Hugging Face's `datasets` keeps them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moco_eval.data import in_memory

SPLITS = {"train": "train", "val": "validation"}  # our folders, and what the library calls them


def digits_folder(root: Path, train: int = 12, val: int = 6) -> Path:
    """An imagefolder of so many digits of each of three classes."""
    for split, source, count in (("train", "train", train), ("val", "test", val)):
        digits = in_memory.digits(source)
        for label, name in enumerate(("nought", "one", "two")):
            (root / split / name).mkdir(parents=True)
            for row in np.flatnonzero(digits.labels == label)[:count].tolist():
                ending = ("png", "jpg")[row % 2]
                Image.fromarray(digits.pixels[row]).save(root / split / name / f"{row:04}.{ending}")
    return root


def table_of(datasets: Any, folder: Path) -> Any:
    """The image files of a folder of class folders as a Dataset, byte for byte, in the order of their paths."""
    names = sorted(path.name for path in folder.iterdir())
    files = [(path, label) for label, name in enumerate(names) for path in sorted((folder / name).iterdir())]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    images = [{"bytes": path.read_bytes(), "path": path.name} for path, _ in files]
    return datasets.Dataset.from_dict({"image": images, "label": [label for _, label in files]}, features=features)


def saved(datasets: Any, root: Path, folder: Path) -> Path:
    """An imagefolder as `save_to_disk` leaves it."""
    tables = {theirs: table_of(datasets, root / ours) for ours, theirs in SPLITS.items()}
    datasets.DatasetDict(tables).save_to_disk(str(folder))
    return folder


def parquet(datasets: Any, root: Path, folder: Path, splits: Iterable[str] = tuple(SPLITS)) -> Path:
    """An imagefolder as parquet files, as the hub keeps them."""
    folder.mkdir(parents=True)
    for split in splits:
        table_of(datasets, root / split).to_parquet(str(folder / f"{SPLITS[split]}-00000-of-00001.parquet"))
    return folder


def column_of(datasets: Any, folder: Path, **columns: Any) -> Path:
    """A saved single split of these columns: (feature, values) by name."""
    features = datasets.Features({name: feature for name, (feature, _) in columns.items()})
    values = {name: held for name, (_, held) in columns.items()}
    datasets.Dataset.from_dict(values, features=features).save_to_disk(str(folder))
    return folder
