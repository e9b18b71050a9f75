"""The steps of an augmentation recipe, each in two forms: the published PIL transform, and on batches of uint8 images.

A step says how many uniform numbers it takes from an image's stream (`draws`). `parameters` makes of them, (N, draws),
what the step does to each image: (P, N), whether it was drawn among them as 0 or 1, for images of H x W pixels. Called
with images (N, 3, H, W) uint8, which it may overwrite, these parameters on the images' device, the size of a view in
pixels and whether to compute `for_all`, it returns images. `reference` is torchvision's transform.

An operation that is not drawn for every image is computed in one of two ways, with the same pixels. On a CPU, for the
images alone for which it was drawn: least arithmetic. On a GPU, or compiled, for all of them, and taken where it was
drawn: shapes do not depend on the draws, so that there is little to launch, nothing to wait for and one graph.
"""

from collections.abc import Callable, Sequence
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
Fuse = Callable[[Operation], Operation]  # compiles a recipe's steps, or leaves them as they are


def on_chosen(images: Tensor, chosen: Tensor, for_all: bool, operation: Operation, *parameters: Tensor) -> Tensor:
    """The operation applied to the chosen images, (N,) 1 or 0, each with its own parameters, (N,).

    May overwrite `images`; what is returned counts.
    """
    if for_all:
        return torch.where(chosen.view(-1, 1, 1, 1) > 0, operation(images, *parameters), images)
    rows = chosen.nonzero().squeeze(1)
    if len(rows) == 0:
        return images
    if len(rows) == len(images):
        return operation(images, *parameters)
    return images.index_copy_(0, rows, operation(images[rows], *(each[rows] for each in parameters)))


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

    def parameters(self, u: np.ndarray, height: int, width: int) -> np.ndarray:
        return self.boxes(u, *(np.full(len(u), side) for side in (height, width))).T

    def __call__(self, images: Tensor, parameters: Tensor, size: int, for_all: bool) -> Tensor:
        return pixel_ops.crop(images, parameters.T, size)


@dataclass(frozen=True)
class Flip:
    """Left and right exchanged with probability p."""

    p: float = 0.5
    draws: ClassVar[int] = 1

    def reference(self, size: int) -> Any:
        return transforms.RandomHorizontalFlip(self.p)

    def parameters(self, u: np.ndarray, height: int, width: int) -> np.ndarray:
        return (u[:, 0] < self.p)[None]

    def __call__(self, images: Tensor, parameters: Tensor, size: int, for_all: bool) -> Tensor:
        return on_chosen(images, parameters[0], for_all, pixel_ops.flip)


@dataclass(frozen=True)
class Grey:
    """Grey in three channels with probability p."""

    p: float
    draws: ClassVar[int] = 1

    def reference(self, size: int) -> Any:
        return transforms.RandomGrayscale(self.p)

    def parameters(self, u: np.ndarray, height: int, width: int) -> np.ndarray:
        return (u[:, 0] < self.p)[None]

    def __call__(self, images: Tensor, parameters: Tensor, size: int, for_all: bool) -> Tensor:
        return on_chosen(images, parameters[0], for_all, pixel_ops.grey)


@dataclass(frozen=True)
class Solarize:
    """Values of 128 and above inverted with probability p."""

    p: float
    draws: ClassVar[int] = 1

    def reference(self, size: int) -> Any:
        return transforms.RandomSolarize(128, self.p)

    def parameters(self, u: np.ndarray, height: int, width: int) -> np.ndarray:
        return (u[:, 0] < self.p)[None]

    def __call__(self, images: Tensor, parameters: Tensor, size: int, for_all: bool) -> Tensor:
        return on_chosen(images, parameters[0], for_all, pixel_ops.solarize)


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

    def parameters(self, u: np.ndarray, height: int, width: int) -> np.ndarray:
        return np.stack([u[:, 0] < self.p, self.sigmas(u)])

    def __call__(self, images: Tensor, parameters: Tensor, size: int, for_all: bool) -> Tensor:
        chosen, sigmas = parameters
        largest = max(self.sigma) if for_all else (chosen * sigmas).max().item()  # beyond its boxes, weights are zero
        blur = partial(pixel_ops.blur, reach=pixel_ops.box_reach(largest))
        return on_chosen(images, chosen, for_all, blur, sigmas)


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

    def parameters(self, u: np.ndarray, height: int, width: int) -> np.ndarray:
        return np.stack(self.angles(u))

    def __call__(self, images: Tensor, parameters: Tensor, size: int, for_all: bool) -> Tensor:
        return pixel_ops.affine(images, *parameters)


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

    def parameters(self, u: np.ndarray, height: int, width: int) -> np.ndarray:
        """Whether hue is turned, and how far; then of each place: its factor, and which operation is due there.

        Places are what the others need before and after hue, which is thus computed once: as many as there are of
        them on either side, so that any order fits in, and factor 1, which changes nothing, where none is due.
        """
        chosen, turns, factors = u[:, 0] < self.p, self.order(u).argsort(axis=1), self.factors(u)
        wanted = np.array([self.brightness, self.contrast, self.saturation]) > 0
        earlier = (turns[:, None, :3] < turns[:, :3, None]) & wanted
        after_hue = (turns[:, :3] > turns[:, 3:]) & (self.hue > 0)
        place = earlier.sum(2) + after_hue * wanted.sum()  # (N, 3)
        due = (place == np.arange(self.places)[:, None, None]) & wanted & chosen[:, None]  # (places, N, 3)
        factor = np.where(due, factors[:, :3], 0).sum(2) + ~due.any(2)
        blends = np.concatenate([factor[..., None], due], axis=2)
        return np.stack([chosen & (self.hue > 0), factors[:, 3], *blends.swapaxes(1, 2).reshape(-1, len(u))])

    @property
    def places(self) -> int:
        return sum(span > 0 for span in (self.brightness, self.contrast, self.saturation)) * (2 if self.hue else 1)

    def __call__(self, images: Tensor, parameters: Tensor, size: int, for_all: bool) -> Tensor:
        turned, shift = parameters[:2]
        blends = parameters[2:].unflatten(0, (self.places, 4))
        before = self.places // 2 if self.hue else self.places
        for factor, *due in blends[:before]:
            images = blend(images, factor, due, for_all)
        if self.hue:
            images = on_chosen(images, turned, for_all, pixel_ops.hue, shift)
        for factor, *due in blends[before:]:
            images = blend(images, factor, due, for_all)
        return images


def blend(images: Tensor, factor: Tensor, due: Sequence[Tensor], for_all: bool) -> Tensor:
    """Brightness, contrast or saturation, whichever is due for an image, (N,) each 1 or 0."""
    if for_all:
        return pixel_ops.blend(images, factor, *due[1:])
    for chosen, operation in zip(due, (pixel_ops.brightness, pixel_ops.contrast, pixel_ops.saturation)):
        images = on_chosen(images, chosen, for_all, operation, factor)
    return images


ViewStep = Crop | Flip | Grey | Solarize | Blur | Affine | Jitter
CACHE_PIXELS = 100_000  # a CPU takes so many pixels at a time: their floats stay in its cache


def unfused(steps: Operation) -> Operation:
    return steps


def fusing(device: torch.device, wanted: bool) -> Fuse:
    """Compiles the steps of a recipe as one on a GPU, where that is wanted and works; once, and again for other shapes.

    Nothing on a CPU: what is compiled is computed for all images, which costs it more than fusing spares. Nothing on
    MPS, where nobody has compared the pixels.
    """
    return lru_cache(torch.compile) if wanted and device.type == "cuda" and can_compile(device) else unfused


def is_for_all(images: Tensor, fuse: Fuse) -> bool:
    """Whether an operation is computed for all images; see above."""
    return images.device.type != "cpu" or fuse is not unfused


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
            fuse: what compiles the steps.
        """
        if 0 < len(images) < 4 and fuse is not unfused:  # graphs hold for four images and more
            return self.apply(images.repeat(4, 1, 1, 1), np.tile(u, (4, 1)), size, skip, fuse)[: len(images)]
        if len(self.steps) == skip:
            return images.clone(memory_format=torch.contiguous_format)
        parameters = self._parameters(u, images, skip)
        if is_for_all(images, fuse):
            return fuse(self._views)(images.contiguous(), parameters, size, skip, True)
        count = max(1, CACHE_PIXELS // (size * size))
        batches = zip(images.split(count), zip(*(each.split(count, dim=1) for each in parameters)))
        copies = ((part.clone(memory_format=torch.contiguous_format), numbers) for part, numbers in batches)
        parts = [self._views(part, numbers, size, skip, False) for part, numbers in copies]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _parameters(self, u: np.ndarray, images: Tensor, skip: int) -> tuple[Tensor, ...]:
        """What each step from `skip` on does to each image, (P, N), on the images' device by one copy."""
        ends = np.cumsum([step.draws for step in self.steps])[skip:]
        height, width = images.shape[2:]
        each = [
            step.parameters(u[:, end - step.draws : end], height, width) for step, end in zip(self.steps[skip:], ends)
        ]
        together = np.concatenate([np.empty((0, len(u))), *each]).astype(np.float32)
        return to_device(torch.from_numpy(together), images.device).split([len(rows) for rows in each])

    def _views(self, images: Tensor, parameters: Sequence[Tensor], size: int, skip: int, for_all: bool) -> Tensor:
        for step, rows in zip(self.steps[skip:], parameters):
            images = step(images, rows, size, for_all)
        return images
