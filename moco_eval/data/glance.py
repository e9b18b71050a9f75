"""A look at a few images of a set before anything runs on them: pictures that became black or white are doubtful."""

from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import Image

from moco_eval.data.image_set import ImageSet
from moco_eval.errors import InputError
from moco_eval.runtime.console import warn

LOOKED = 8  # images of a split
DARK = 63  # of 255: the brightest that 14 bits stored in 16 become
Unreadable = Literal["refuse", "say", "pass"]
_told: set[tuple] = set()


def doubts(images: ImageSet, unreadable: Unreadable = "refuse") -> list[str]:
    """What is doubtful about a few images of a set, evenly spread, in words; see `doubts_about`.

    Of images of bands, whose units nobody knows, only whether they can be read.
    """
    if images.bands:
        return _unreadable(images, unreadable)
    return doubts_about(f"{images.name} {images.split}", len(images), images.image, images.name_of, unreadable)


def _unreadable(images: ImageSet, unreadable: Unreadable) -> list[str]:
    """As `doubts`, of images of bands."""
    read: list[int] = []
    failed: list[InputError] = []
    looked = _spread(len(images))
    for index in looked:
        try:
            images.values(index)
            read.append(index)
        except InputError as error:
            if unreadable == "refuse":
                raise
            failed.append(error)
    if failed and not read:
        raise failed[0]
    if not failed or unreadable == "pass":
        return []
    title = f"{images.name} {images.split}"
    return [f"{title}: {len(failed)} of {len(looked)} images looked at cannot be read (first: {failed[0]})"]


def _spread(count: int) -> list[int]:
    """A few of `count` images, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(LOOKED, count)).astype(int)).tolist()


def passed_over(images: ImageSet) -> list[str]:
    """What lies beside the images and is no person's, as a warning in words; none where there is nothing."""
    return [f"{images.name} {images.split}: {images.passed_over}"] if images.passed_over else []


def doubts_about(
    title: str,
    count: int,
    read: Callable[[int], Image.Image],
    name_of: Callable[[int], str],
    unreadable: Unreadable = "refuse",
) -> list[str]:
    """What is doubtful about a few of `count` images, evenly spread, in words.

    Args:
        title: what to call the set.
        read, name_of: an image and its name, by index.
        unreadable: refuse an image that cannot be read, say so, or pass over it, as long as another can.
    Raises:
        InputError: an image cannot be read, or none of them.
    """
    flat: list[int] = []
    failed: list[InputError] = []
    brightest: list[int] = []
    for index in _spread(count):
        try:
            present = np.flatnonzero(np.reshape(read(index).histogram(), (-1, 256)).sum(axis=0))
        except InputError as error:
            if unreadable == "refuse":
                raise
            failed.append(error)
            continue
        brightest.append(int(present[-1]))
        if len(present) <= 2:
            flat.append(index)
    if failed and not brightest:
        raise failed[0]
    looked = len(brightest) + len(failed)
    words = []
    if failed and unreadable == "say":
        words.append(f"{title}: {len(failed)} of {looked} images looked at cannot be read (first: {failed[0]})")
    if 2 * len(flat) > len(brightest):
        words.append(
            f"{title}: {len(flat)} of {looked} images looked at have one or two values when decoded (first: "
            f"{name_of(flat[0])}); unless they are drawings in black and white, save them in 8 bits"
        )
    elif brightest and max(brightest) <= DARK:
        words.append(
            f"{title}: no pixel of {looked} images looked at is brighter than {max(brightest)} of 255; if they are of "
            "10 to 14 bits stored in 16, scale them to all 16, or save them in 8"
        )
    return words


def tell_doubts(images: ImageSet) -> None:
    """Warn of what is doubtful, once for each set in a process, and of what was passed over.

    Raises:
        InputError: one of the few images that are looked at cannot be read.
    """
    key = (images.name, images.split, images.fingerprint, images.subset, len(images))
    if key not in _told:
        for words in [*passed_over(images), *doubts(images)]:
            warn(words)
        _told.add(key)
