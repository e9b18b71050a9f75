"""Revisited Oxford and Paris: a database of landmark photographs, and queries with what answers each of them.

DATA/roxford5k/ or DATA/rparis6k/ holds jpg/NAME.jpg and gnd_<name>.pkl, as they are given out. That file is a pickle,
and is read without running anything in it.

Source: Radenovic et al. 2018, arXiv:1803.11285; filipradenovic/revisitop@3bb68d3, python/dataset.py; read, not copied.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moco_eval import limits
from moco_eval.data.boxes.samples import inside
from moco_eval.data.image_set import ImageSet, decode_bytes
from moco_eval.errors import InputError
from moco_eval.untrusted import pickle_read

COUNTS = {"roxford5k": (4993, 70), "rparis6k": (6322, 70)}  # images of the database, and queries
KINDS = ("easy", "hard", "junk")
SITE = "http://cmp.felk.cvut.cz/revisitop/"


Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Query:
    """A photograph that asks, and the places in the database of what shows the same landmark.

    Attributes:
        box: x0, y0, x1, y1 of the landmark in its photograph, to which it is cut.
        easy, hard: what answers it; junk: what counts neither way.
    """

    name: str
    box: Box
    easy: np.ndarray
    hard: np.ndarray
    junk: np.ndarray


@dataclass(frozen=True)
class Landmarks:
    """A database and its queries; the images of `asking` are those of `queries`, cut to their boxes."""

    database: ImageSet
    asking: ImageSet
    queries: tuple[Query, ...]


class _Photographs:
    """Photographs as a map-style data set; each of its own class, `boxes` cuts them."""

    def __init__(self, paths: Sequence[Path], boxes: Sequence[Box] | None = None):
        self.paths, self.boxes = paths, boxes
        self.targets = list(range(len(paths)))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path = self.paths[index]
        image = decode_bytes(limits.read_bytes(path, "image"), str(path))
        return (image.crop(self.boxes[index]) if self.boxes else image), index


def open_landmarks(name: str, data: Path) -> Landmarks:
    """The set of that name.

    Args:
        name: roxford5k or rparis6k.
        data: the folder that holds name/, or that folder itself.
    Raises:
        InputError: what is missing, damaged or contradictory, with its file.
    """
    root = data / name if (data / name).is_dir() else data
    path = root / f"gnd_{name}.pkl"
    if not path.is_file():
        raise InputError(f"{path} does not exist; {name} is given out at {SITE}, its photographs by Oxford's VGG")
    limits.require(path, "list", path.stat().st_size)
    names, queries = _read(path)
    _check_counts(path, name, len(names), len(queries))
    photographs = [_photograph(root, each) for each in (*names, *(query.name for query in queries))]
    stored, asking = photographs[: len(names)], photographs[len(names) :]
    return Landmarks(
        _images(name, "database", _Photographs(stored), names),
        _images(name, "queries", _Photographs(asking, [query.box for query in queries]), [q.name for q in queries]),
        tuple(queries),
    )


def _images(name: str, split: str, photographs: _Photographs, names: Sequence[str]) -> ImageSet:
    return ImageSet.from_dataset(photographs, classes=names, name=name, split=split)


def _photograph(root: Path, name: str) -> Path:
    path = root / "jpg" / f"{name}.jpg"
    if not path.is_file():
        raise InputError(f"{path} does not exist; the photographs of the set belong there, without sub-folders")
    return path


def _check_counts(path: Path, name: str, database: int, queries: int) -> None:
    if (database, queries) != COUNTS[name]:
        published = "{} and {}".format(*COUNTS[name])
        raise InputError(
            f"{path} lists {database} images and {queries} queries, and {name} has {published}; fetch it from {SITE}"
        )


# The file


def _read(path: Path) -> tuple[list[str], list[Query]]:
    """Names of the database's images, and the queries."""
    values = pickle_read.read(path, encoding="latin1")
    kinds = {"imlist": list, "qimlist": list, "gnd": list}
    if not isinstance(values, dict) or not all(isinstance(values.get(key), kind) for key, kind in kinds.items()):
        raise InputError(f"{path} is no dict with lists imlist, qimlist and gnd; fetch it from {SITE}")
    names, asking, answers = (values[key] for key in kinds)
    for each in (*names, *asking):
        if not isinstance(each, str) or not each or not inside(each):
            raise InputError(f"{path}: {str(each)[:60]!r} is no name of a photograph; fetch the file from {SITE}")
    if len(answers) != len(asking):
        raise InputError(f"{path} has answers to {len(answers)} of {len(asking)} queries; fetch it from {SITE}")
    return names, [_query(path, name, about, len(names)) for name, about in zip(asking, answers)]


def _query(path: Path, name: str, about: Any, count: int) -> Query:
    about = about if isinstance(about, dict) else {}
    try:
        box = np.array(about["bbx"], np.float64)
        places = [np.array(about[kind]).reshape(-1) for kind in KINDS]
    except (KeyError, TypeError, ValueError, OverflowError):
        raise InputError(f"{path}: query {name} needs bbx, easy, hard and junk; fetch the file from {SITE}") from None
    whole = [place.astype(np.int64) if place.size == 0 else place for place in places]
    if not all(place.dtype.kind in "iu" and ((place >= 0) & (place < count)).all() for place in whole):
        raise InputError(f"{path}: query {name} has answers that are no places in its {count} images; fetch it again")
    if box.shape != (4,) or not np.isfinite(box).all() or not (np.round(box[2:]) > np.round(box[:2])).all():
        raise InputError(f"{path}: the box of query {name} is {str(about['bbx'])[:60]}; fetch the file from {SITE}")
    easy, hard, junk = (place.astype(np.int64) for place in whole)
    x0, y0, x1, y1 = box.tolist()
    return Query(name, (x0, y0, x1, y1), easy, hard, junk)
