"""Which labels to train on: a few of each class, those of a published list, all but a held-out share."""

import hashlib
from pathlib import Path

import numpy as np

from moco_eval import limits
from moco_eval.data.index import ImageFiles
from moco_eval.errors import InputError

# sha256 of published lists to what they are: google-research/simclr@383d414, imagenet_subsets/
PUBLISHED = {
    "71e82a48ba78252683ae334c4d019ebd5c6e855b9599c1389fbe83eb9549cf17": "ImageNet 1 % (SimCLR's list)",  # 12,811
    "6d09de11e7bdaf5b1f3b1f249b6183695f97310cdd20f0c03e7235b6b9392091": "ImageNet 10 % (SimCLR's list)",  # 128,116
}


def draw(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Sorted rows of `per_class` images of each class, drawn from `seed`; each class must have so many.

    Args:
        labels: class of each image, (N,).
    """
    generator = np.random.default_rng(seed)
    chosen = [generator.permutation(np.flatnonzero(labels == label))[:per_class] for label in range(labels.max() + 1)]
    return np.sort(np.concatenate(chosen))


def held_out(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Part a training split in one to train on and one to choose hyperparameters on; fixed by its arguments.

    Of a class's n images round(share * n) are held out, at least one and at most n - 1; a class of one image is not
    held out. Images of several classes are held out at random: round(share * N) of all.

    Args:
        labels: (N,) classes, or (N, C) where an image may show several.
        share: of the images that is held out, above 0 and below 1.
    Returns:
        Rows to train on and rows held out, both sorted, (M,) and (N - M,) int64.
    """
    assert 0 < share < 1
    order = np.random.default_rng(seed).permutation(len(labels))
    if labels.ndim == 2:
        held = order[: _held(len(labels), share)]
    else:
        order = order[np.argsort(labels[order], kind="stable")]
        counts = np.unique(labels, return_counts=True)[1]
        starts = np.cumsum(counts) - counts
        held = np.concatenate([order[start : start + _held(n, share)] for start, n in zip(starts, counts.tolist())])
    train = np.ones(len(labels), bool)
    train[held] = False
    return np.flatnonzero(train), np.flatnonzero(~train)


def _held(images: int, share: float) -> int:
    return min(max(1, round(share * images)), images - 1)


def is_published(subset: str | None) -> bool:
    """Whether these words of `read_list` are those of a published list."""
    return subset in PUBLISHED.values()


def read_list(path: Path) -> tuple[list[str], str]:
    """The names in a list file, an image a line, and what list it is: by its sha256 a published one, or none.

    Raises:
        InputError: it cannot be read, is no regular file or too large, is empty, or names an image twice.
    """
    try:
        data = limits.read_bytes(path, "list")
        names = [line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    except InputError as error:
        raise InputError(f"cannot read --labels {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text; save it as UTF-8"
        raise InputError(f"cannot read --labels {path}: {reason}") from None
    if not names:
        raise InputError(f"--labels {path} names no images; it needs one per line, such as n01440764_10026.JPEG")
    digest = hashlib.sha256(data).hexdigest()
    return names, PUBLISHED.get(digest, f"the {len(names)} images of an unpublished list, sha256 {digest}")


def find(names: list[str], files: ImageFiles, path: Path) -> np.ndarray:
    """The sorted rows of the images with these names: NAME, or CLASS/NAME and longer ends of a path.

    Args:
        path: of the list, for messages.
    Raises:
        InputError: no image or several have a name, or two names are the same image's; the first of them.
    """
    wanted: dict[bytes, list[int]] = {name.encode(): [] for name in names}
    depths = sorted({name.count(b"/") + 1 for name in wanted})
    for row, relative in enumerate(files.relative()):
        parts = relative.split(b"/")
        for depth in depths:
            if (rows := wanted.get(b"/".join(parts[-depth:]))) is not None and depth <= len(parts):
                rows.append(row)
    seen: dict[int, str] = {}
    for name in names:
        rows = wanted[name.encode()]
        if not rows:
            raise InputError(f"--labels {path}: {name!r} is not an image of the training split")
        if len(rows) > 1:
            both = " and ".join(files[row] for row in rows[:2])
            raise InputError(f"--labels {path}: {name!r} may be {both}; write CLASS/NAME")
        if rows[0] in seen:
            raise InputError(f"--labels {path}: {name!r} and {seen[rows[0]]!r} are one image; keep one")
        seen[rows[0]] = name
    return np.array(sorted(seen), np.int64)
