"""Further test sets of the training images' classes, judged by the one trained state: shifts, corruptions.

A set may lack classes (ImageNet-A and -R have 200 of the 1,000): then it is judged by the scores of its own classes
alone, as its authors do: their code takes the columns of the 200 from the 1,000 logits.
Source: Hendrycks et al. 2021, arXiv:1907.07174 (A) and arXiv:2006.16241 (R); Hendrycks and Dietterich 2019,
arXiv:1903.12261 (C), whose corruptions have a folder for each severity; Recht et al. 2019, arXiv:1902.10811 (V2), whose
folders have the numbers of the sorted classes for names.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moco_eval.config.load import did_you_mean
from moco_eval.data.image_set import ImageSet
from moco_eval.data.index import list_images
from moco_eval.errors import InputError
from moco_eval.results.metrics import accuracy, among_best, mean_per_class
from moco_eval.results.statistics import intervals, summarise

NAME = re.compile(r"[\w.-]+")
SPLITS = ("train", "val", "test", "valid", "validation")
NO_GUESS = -1e30  # of an image whose own classes all have minus infinity


@dataclass(frozen=True)
class FurtherTest:
    """One set.

    Attributes:
        name: as the user gave it.
        parts: the images; of corruptions one part for each folder of a severity, else one. Their labels are places in
            `classes`.
        classes: of the training classes those that it has, (M,), ascending.
    """

    name: str
    parts: tuple[ImageSet, ...]
    classes: np.ndarray

    def record(self) -> list[dict[str, Any]]:
        """What the parts are."""
        return [images.record() for images in self.parts]


def parse(given: Sequence[str]) -> dict[str, Path]:
    """NAME=FOLDER,NAME=FOLDER to folders by name.

    Raises:
        InputError: no such pair, a name twice, a folder that is none.
    """
    folders: dict[str, Path] = {}
    for pair in (pair for text in given for pair in text.split(",")):
        name, equals, folder = pair.partition("=")
        if not equals or not NAME.fullmatch(name) or not folder:
            raise InputError(f"--also {pair!r} is not NAME=FOLDER; for example --also imagenet-a=/datasets/imagenet-a")
        if name in folders:
            raise InputError(f"--also names {name!r} twice; give each set a name of its own")
        if not Path(folder).is_dir():
            raise InputError(f"--also {pair}: {folder} is not a folder; give one that holds class folders")
        folders[name] = Path(folder)
    return folders


def open_further(given: Sequence[str], train: ImageSet) -> tuple[FurtherTest, ...]:
    """The sets that --also names, matched with the training classes by the names of their folders.

    Raises:
        InputError: as `parse`; training images of several classes at once or of bands; folders that are no classes.
    """
    folders = parse(given)
    if folders and (train.multi_label or train.bands):
        kind = "several classes an image" if train.multi_label else "bands"
        raise InputError(f"--also takes photographs of one class, and {train.name} has {kind}; leave it out")
    return tuple(_opened(name, folder, train) for name, folder in folders.items())


def _opened(name: str, folder: Path, train: ImageSet) -> FurtherTest:
    roots = list(_roots(name, folder, train.classes))
    listings = [list_images(root.parent, root.name) for root in roots]
    owned = [[_place(one, train.classes) for one in listing.classes] for listing in listings]
    classes = np.array(sorted({place for places in owned for place in places if place is not None}))
    titles = tuple(train.classes[place] for place in classes)
    parts = []
    for root, listing, places in zip(roots, listings, owned):
        column = np.searchsorted(classes, np.array(places, dtype=np.int64))
        split = name if root == folder else f"{name}/{root.relative_to(folder).as_posix()}"
        labels = column[listing.labels]
        parts.append(ImageSet(name, split, titles, labels, listing.fingerprint, files=listing.files))
    return FurtherTest(name, tuple(parts), classes)


def _roots(name: str, folder: Path, classes: Sequence[str], depth: int = 0) -> Iterator[Path]:
    """The folders that hold class folders: this one, or those below it, as corruptions have them."""
    below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    strange = [path.name for path in below if _place(path.name, classes) is None]
    if below and not strange and not all(_holds_classes(path, classes) for path in below):
        yield folder
        return
    splits = [one for one in strange if one.lower() in SPLITS]
    if splits:
        raise InputError(f"--also {name}={folder} holds splits; give the one to test on: {name}={folder / splits[-1]}")
    if not below or 0 < len(strange) < len(below) or depth == 2:
        first = strange[0] if strange else None
        what = (
            f"has a folder {first!r}, which is not one of the {len(classes)} training classes" if first else "is empty"
        )
        raise InputError(
            f"--also {name}: {folder} {what}; it must hold class folders, or one folder of class folders for each "
            "severity."
            f"{did_you_mean(first, classes) if first else ''}"
        )
    for path in below:
        yield from _roots(name, path, classes, depth + 1)


def _holds_classes(folder: Path, classes: Sequence[str]) -> bool:
    """Whether there is nothing but class folders in it: a severity 1 is no class 1."""
    inside = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return bool(inside) and all(path.is_dir() and _place(path.name, classes) is not None for path in inside)


def _place(name: str, classes: Sequence[str]) -> int | None:
    """The class that a folder's name says: by its own name, or by its number where no class is named by one."""
    if name in classes:
        return classes.index(name)
    numbered = name.isdecimal() and name.isascii() and not any(one.isdecimal() for one in classes)
    return int(name) if numbered and int(name) < len(classes) else None


# Judging


def of_own_classes(scores: torch.Tensor, classes: np.ndarray) -> torch.Tensor:
    """The columns of a set's own classes, (N, M); and where some image has no guess among them one more, which wins."""
    own = scores[:, torch.from_numpy(classes)]
    lost = (own == -torch.inf).all(dim=1)
    if not lost.any():
        return own
    return torch.cat([own, torch.where(lost, NO_GUESS, -torch.inf)[:, None].to(own)], dim=1)


def judged(tests: Sequence[FurtherTest], trials: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, dict[str, Any]]:
    """What the trials say of every set: `also` in a record.

    Args:
        trials: of each the scores for all training classes, (N, C), by the parts' splits.
    Returns:
        By name: `images`, `classes`, `of_classes`, `metrics`, `std` and `interval` (95 % over its images) in percent;
        of several parts the means over them, and `parts` with each one's metrics.
    """
    return {test.name: _judged(test, trials) for test in tests}


def _judged(test: FurtherTest, trials: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, Any]:
    rows = [
        {part.split: _metrics(of_own_classes(trial[part.split], test.classes), part) for part in test.parts}
        for trial in trials
    ]
    means = [_mean(list(row.values())) for row in rows]
    metrics, std = summarise(means)
    pooled = [torch.cat([trial[part.split] for part in test.parts]) for trial in trials]
    labels = np.concatenate([np.asarray(part.labels) for part in test.parts])
    scores = _stacked([of_own_classes(scores, test.classes) for scores in pooled])
    about = {
        "images": len(labels),
        "classes": len(test.classes),
        "of_classes": next(iter(trials[0].values())).shape[1],
        "fingerprints": [part.fingerprint for part in test.parts],
        "metrics": metrics,
        "std": std,
        "interval": {name: list(ends) for name, ends in intervals(list(metrics), labels, scores=scores).items()},
    }
    if len(test.parts) > 1:
        about["parts"] = {part.split: _mean([row[part.split] for row in rows]) for part in test.parts}
    return about


def _stacked(scores: Sequence[torch.Tensor]) -> np.ndarray:
    """(T, N, M or M + 1): a column of no guess for all trials where one has it."""
    width = max(one.shape[1] for one in scores)
    return np.stack(
        [torch.nn.functional.pad(one, (0, width - one.shape[1]), value=-torch.inf).numpy() for one in scores]
    )


def _metrics(scores: torch.Tensor, images: ImageSet) -> dict[str, float]:
    labels = torch.as_tensor(images.labels)
    values = {"top1": accuracy(scores, labels)}
    if len(images.classes) > 5:
        values["top5"] = 100 * among_best(scores, labels, 5).double().mean().item()
    return values | {"mean_per_class": mean_per_class(scores, labels)}


def _mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
