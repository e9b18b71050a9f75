"""The steps of an augmentation recipe, each in two forms: the published PIL transform, and on batches of uint8 images.

A step says how many uniform numbers it takes from an image's stream (`draws`), makes its parameters of them and
applies them to the whole batch: called with images (N, 3, H, W) uint8, which it may overwrite, the numbers (N, draws),
the size of a view in pixels and what compiles an operation, it returns images. `reference` is torchvision's transform
of the same parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms

from moco_eval.data.augment import pixel_ops
from moco_eval.data.augment.random_draws import CROP_DRAWS, crop_boxes, uniforms
from moco_eval.runtime.device import can_compile, to_device

Operation = Callable[..., Tensor]
Fuse = Callable[[Operation], Operation]  # compiles an operation, or leaves it as it is


def on_chosen(images: Tensor, chosen: np.ndarray, operation: Operation, *parameters: np.ndarray) -> Tensor:
    """The operation applied to the chosen images, (N,) bool, each with its own parameters, (N,).

    May overwrite `images`; what is returned counts.
    """
    rows = np.flatnonzero(chosen)
    if len(rows) == 0:
        return images
    values = [to_device(torch.from_numpy(each[rows].astype(np.float32)), images.device) for each in parameters]
    if len(rows) == len(images):
        return operation(images, *values)
    where = to_device(torch.from_numpy(rows), images.device)
    return images.index_copy_(0, where, operation(images[where], *values))


def between(u: np.ndarray, low: float | np.ndarray, high: float | np.ndarray) -> np.ndarray:
    """Uniform numbers of [0, 1) moved to [low, high)."""
    return low + (high - low) * u


class PilGaussianBlur:
    """PIL's Gaussian blur (box-approximated) with radius = sigma drawn uniformly from `sigma`, in pixels."""

    def __init__(self, sigma: tuple[float, float]):
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        low, high = self.sigma
        return image.filter(ImageFilter.GaussianBlur(radius=low + (high - low) * torch.rand(1).item()))


@dataclass(frozen=True)
class Crop:
    """Random-resized crop: share of the area from `scale`, width over height from `ratio`; to size x size pixels."""

    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    draws: ClassVar[int] = CROP_DRAWS

    def reference(self, size: int) -> Any:
        return transforms.RandomResizedCrop(size, self.scale, self.ratio)

    def boxes(self, u: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """(N, 4): top, left, height, width in pixels."""
        return crop_boxes(u, heights, widths, self.scale, self.ratio)

    def __call__(self, images: Tensor, u: np.ndarray, size: int, fuse: Fuse) -> Tensor:
        height, width = (np.full(len(u), side) for side in images.shape[2:])
        boxes = to_device(torch.from_numpy(self.boxes(u, height, width)), images.device)
        return pixel_ops.crop(images, boxes, size)


@dataclass(frozen=True)
class Flip:
    """Left and right exchanged with probability p."""

    p: float = 0.5
    draws: ClassVar[int] = 1

    def reference(self, size: int) -> Any:
        return transforms.RandomHorizontalFlip(self.p)

    def __call__(self, images: Tensor, u: np.ndarray, size: int, fuse: Fuse) -> Tensor:
        return on_chosen(images, u[:, 0] < self.p, pixel_ops.flip)


@dataclass(frozen=True)
class Grey:
    """Grey in three channels with probability p."""

    p: float
    draws: ClassVar[int] = 1

    def reference(self, size: int) -> Any:
        return transforms.RandomGrayscale(self.p)

    def __call__(self, images: Tensor, u: np.ndarray, size: int, fuse: Fuse) -> Tensor:
        return on_chosen(images, u[:, 0] < self.p, fuse(pixel_ops.grey))


@dataclass(frozen=True)
class Solarize:
    """Values of 128 and above inverted with probability p."""

    p: float
    draws: ClassVar[int] = 1

    def reference(self, size: int) -> Any:
        return transforms.RandomSolarize(128, self.p)

    def __call__(self, images: Tensor, u: np.ndarray, size: int, fuse: Fuse) -> Tensor:
        return on_chosen(images, u[:, 0] < self.p, fuse(pixel_ops.solarize))


@dataclass(frozen=True)
class Blur:
    """Gaussian blur with probability p, sigma in pixels uniform from `sigma`."""

    sigma: tuple[float, float]
    p: float
    draws: ClassVar[int] = 2

    def reference(self, size: int) -> Any:
        return transforms.RandomApply([PilGaussianBlur(self.sigma)], self.p)

    def sigmas(self, u: np.ndarray) -> np.ndarray:
        return between(u[:, 1], *self.sigma)

    def __call__(self, images: Tensor, u: np.ndarray, size: int, fuse: Fuse) -> Tensor:
        chosen, sigmas = u[:, 0] < self.p, self.sigmas(u)
        reach = pixel_ops.box_reach(sigmas.max(where=chosen, initial=0))
        return on_chosen(images, chosen, partial(fuse(pixel_ops.blur), reach=reach), sigmas)


@dataclass(frozen=True)
class Affine:
    """Rotation and slant, each uniform in plus or minus so many degrees."""

    degrees: float
    shear: float
    draws: ClassVar[int] = 2

    def reference(self, size: int) -> Any:
        bilinear = transforms.InterpolationMode.BILINEAR
        return transforms.RandomAffine(self.degrees, shear=self.shear, interpolation=bilinear)

    def angles(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rotation and slant in degrees, (N,) each."""
        return between(u[:, 0], -self.degrees, self.degrees), between(u[:, 1], -self.shear, self.shear)

    def __call__(self, images: Tensor, u: np.ndarray, size: int, fuse: Fuse) -> Tensor:
        return on_chosen(images, np.ones(len(u), dtype=bool), pixel_ops.affine, *self.angles(u))


@dataclass(frozen=True)
class Jitter:
    """Colour jitter with probability p: its operations in an order drawn for each image, as torchvision's ColorJitter.

    brightness, contrast, saturation: factors from 1 - x to 1 + x; hue: turns from -x to x. Zero leaves one out.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float
    p: float = 1.0
    draws: ClassVar[int] = 9

    def reference(self, size: int) -> Any:
        jitter = transforms.ColorJitter(self.brightness, self.contrast, self.saturation, self.hue)
        return transforms.RandomApply([jitter], self.p)

    def order(self, u: np.ndarray) -> np.ndarray:
        """(N, 4): which operation comes first, second, ...; 0 brightness, 1 contrast, 2 saturation, 3 hue."""
        return u[:, 1:5].argsort(axis=1)

    def factors(self, u: np.ndarray) -> np.ndarray:
        """(N, 4): brightness, contrast and saturation factors, hue shift in turns."""
        spans = np.array([self.brightness, self.contrast, self.saturation, self.hue])
        middle = np.array([1, 1, 1, 0])
        low = np.maximum(middle - spans, (0, 0, 0, -0.5))
        return between(u[:, 5:9], low, middle + spans)

    def __call__(self, images: Tensor, u: np.ndarray, size: int, fuse: Fuse) -> Tensor:
        chosen, order, factors = u[:, 0] < self.p, self.order(u), self.factors(u)
        operations = (pixel_ops.brightness, pixel_ops.contrast, pixel_ops.saturation, pixel_ops.hue)
        wanted = [i for i, span in enumerate((self.brightness, self.contrast, self.saturation, self.hue)) if span]
        for turn in range(4):
            for i in wanted:
                images = on_chosen(images, chosen & (order[:, turn] == i), fuse(operations[i]), factors[:, i])
        return images


ViewStep = Crop | Flip | Grey | Solarize | Blur | Affine | Jitter
CACHE_PIXELS = 100_000  # a CPU takes so many pixels at a time: their floats stay in its cache


def unfused(operation: Operation) -> Operation:
    return operation


def fusing(device: torch.device, wanted: bool) -> Fuse:
    """Compiles each operation once, for any number of images, where that is wanted and works."""
    if not (wanted and can_compile(device)):
        return unfused
    return lru_cache(partial(torch.compile, dynamic=True))


@dataclass(frozen=True)
class ViewRecipe:
    """Steps in their published order."""

    steps: tuple[ViewStep, ...]

    def reference(self, size: int) -> transforms.Compose:
        """The published pipeline, PIL image to PIL image."""
        return transforms.Compose([step.reference(size) for step in self.steps])

    def uniforms(self, seed: int, epoch: np.ndarray, index: np.ndarray, view: int) -> np.ndarray:
        """All the numbers that make a view of each image, (N, D); those of the first step first."""
        return uniforms(seed, epoch, index, view, sum(step.draws for step in self.steps))

    def apply(self, images: Tensor, u: np.ndarray, size: int, skip: int = 0, fuse: Fuse = unfused) -> Tensor:
        """Views of a batch of images, (N, 3, H, W) uint8 to (N, 3, size, size) uint8.

        Args:
            u: (N, D) from `uniforms`.
            skip: steps already done.
            fuse: what compiles an operation.
        """
        batch = len(images) if images.device.type != "cpu" else max(1, CACHE_PIXELS // (size * size))
        parts = []
        for first in range(0, len(images), batch):
            part, numbers = images[first : first + batch], u[first : first + batch]
            part = part.clone(memory_format=torch.contiguous_format)
            for i, step in list(enumerate(self.steps))[skip:]:
                start = sum(before.draws for before in self.steps[:i])
                part = step(part, numbers[:, start : start + step.draws], size, fuse)
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)
