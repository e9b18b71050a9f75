"""Mean and standard deviation of each band over all pixels of all training images, in one pass."""

from dataclasses import dataclass, replace

import numpy as np

from moco_eval.data.bands import Bands
from moco_eval.data.image_set import ImageSet
from moco_eval.runtime.console import progress

APART = 0.01  # standard deviations: what a written mean or std may differ by from the measured one


@dataclass
class Moments:
    """Running count, mean and sum of squared differences from the mean of C bands.

    Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """

    count: int = 0
    mean: np.ndarray | float = 0.0
    squares: np.ndarray | float = 0.0

    def add(self, values: np.ndarray) -> None:
        """The pixels of an image, (C, H, W)."""
        rows = values.reshape(len(values), -1).astype(np.float64)
        mean = rows.mean(axis=1)
        rows -= mean[:, None]
        apart, together = mean - self.mean, self.count + rows.shape[1]
        self.squares = self.squares + (rows * rows).sum(axis=1) + apart**2 * (self.count * rows.shape[1] / together)
        self.mean = self.mean + apart * (rows.shape[1] / together)
        self.count = together

    @property
    def std(self) -> np.ndarray:
        """Of all pixels, (C,)."""
        return np.sqrt(self.squares / self.count)


def measured(images: ImageSet) -> Bands:
    """The bands of a set with the mean and standard deviation of its images, of all that are stored.

    Raises:
        InputError: an image cannot be read, or has other bands.
    """
    assert images.bands is not None
    moments = Moments()
    with progress("mean and std of the bands", len(images)) as advance:
        for index in range(len(images)):
            moments.add(images.bands.read_all(images.read(index), images.name_of(index)))
            advance()
    mean, std = (tuple(float(value) for value in np.asarray(part)) for part in (moments.mean, moments.std))
    return replace(images.bands, mean=mean, std=std)


def table(bands: Bands) -> list[str]:
    """A line for each stored band: its number, name, mean and standard deviation."""
    taken = set(bands.order)
    return [
        f"{bands.title(place)}: mean {mean:.6g}, std {std:.6g}{'' if place in taken else ' (not used)'}"
        for place, (mean, std) in enumerate(zip(bands.mean, bands.std))
    ]


def differences(written: Bands, measured: Bands) -> list[str]:
    """In words, where bands.yaml says another mean or standard deviation than the images have."""
    return [
        f"{written.path} says {key} {said:.6g} of {written.title(place)}, and these images have {has:.6g}"
        for key, both in (("mean", (written.mean, measured.mean)), ("std", (written.std, measured.std)))
        for place, (said, has) in enumerate(zip(*both))
        if abs(said - has) > APART * measured.std[place]
    ]
