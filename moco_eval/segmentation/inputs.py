"""What a segmentation reads: crops of images with their masks in batches, and whole test images.

All that is random about iteration i hangs on (seed, i) alone: a resumed run sees what it would have seen.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from moco_eval.config.segmentation import SegmentConfig, Views
from moco_eval.data.masks.samples import IGNORED, MaskSample, SegmentationData
from moco_eval.data.workers import rows

Draw = tuple[int, int, int]  # iteration, place in the batch, index of the sample
Batch = tuple[Tensor, Tensor]  # images (N, 3, S, S) and masks (N, S, S), both uint8
TRIES = 10  # crops that are drawn where one class has too much of them


def held_out(samples: Sequence[MaskSample], recipe: SegmentConfig) -> tuple[list[MaskSample], list[MaskSample]]:
    """The training images that are trained on, and those that choose among the heads of a sweep; none without one."""
    if recipe.sweep is None:
        return list(samples), []
    order = np.random.default_rng([recipe.seed, 5]).permutation(len(samples))
    count = min(max(1, round(recipe.sweep.held_out * len(samples))), len(samples) - 1)
    chosen = set(order[:count].tolist())
    parts: tuple[list[MaskSample], list[MaskSample]] = ([], [])
    for index, sample in enumerate(samples):
        parts[index in chosen].append(sample)
    return parts


def shuffled_masks(samples: Sequence[MaskSample], seed: int) -> list[MaskSample]:
    """The control: all masks dealt out anew among the images, so that none keeps its own."""
    order = np.random.default_rng([seed, 1]).permutation(len(samples))
    masks = {int(here): samples[int(there)].mask for here, there in zip(order, np.roll(order, 1))}
    return [MaskSample(sample.name, sample.image, masks[index]) for index, sample in enumerate(samples)]


def batches(count: int, recipe: SegmentConfig) -> Iterator[list[Draw]]:
    """Endless batches of `count` images from iteration 0 on, in a new order each epoch."""
    orders = (np.random.default_rng([recipe.seed, 2, epoch]).permutation(count) for epoch in itertools.count())
    indices = itertools.chain.from_iterable(order.tolist() for order in orders)
    for iteration in itertools.count():
        yield [(iteration, place, next(indices)) for place in range(recipe.batch_size)]


# An image and its mask on their way to a crop


def fitted(size: tuple[int, int], fit: tuple[int, int] | None, scale: float = 1.0) -> tuple[int, int]:
    """Width and height, times `scale`, of an image that is first brought into a longer and a shorter side."""
    if fit is not None:
        scale *= min(max(fit) / max(size), min(fit) / min(size))
    width, height = (max(1, int(side * scale + 0.5)) for side in size)
    return width, height


def drawn_scale(views: Views, random: np.random.Generator) -> float:
    """Any factor between the two, or one of those that are `step` apart."""
    low, high = views.scales
    if not views.step:
        return float(random.uniform(low, high))
    return low + views.step * int(random.integers(int((high - low) / views.step + 1e-6) + 1))


def resized(image: Image.Image, mask: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The image (antialiased bilinear, (h, w, 3) uint8) and the mask (nearest) of another width and height."""
    if image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    if (mask.shape[1], mask.shape[0]) != size:
        mask = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    return np.asarray(image), mask


def crop_place(mask: np.ndarray, views: Views, random: np.random.Generator) -> tuple[int, int]:
    """Left and top of a crop; another one where a class has more of it than it may, up to TRIES times."""
    left, top = 0, 0
    for _ in range(TRIES):
        left, top = (int(random.integers(max(side - views.crop, 0) + 1)) for side in (mask.shape[1], mask.shape[0]))
        if views.most_of_one_class == 1:
            break
        part = mask[top : top + views.crop, left : left + views.crop]
        counts = np.bincount(part.ravel(), minlength=IGNORED + 1)[:IGNORED]
        if (counts > 0).sum() > 1 and counts.max() < views.most_of_one_class * counts.sum():
            break
    return left, top


def filled(pixels: np.ndarray, side: int, value: Sequence[int] | int) -> np.ndarray:
    """A crop of less than `side` pixels along a side, filled up to the right and below."""
    height, width = pixels.shape[:2]
    if (height, width) == (side, side):
        return pixels
    whole = np.empty((side, side, *pixels.shape[2:]), np.uint8)
    whole[:] = value
    whole[:height, :width] = pixels
    return whole


def distorted(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation and hue, each in half of the images, (h, w, 3) uint8.

    Source: mmsegmentation 0.x, PhotoMetricDistortion: plus up to 32; times 0.5 to 1.5, before or after the colours;
    times 0.5 to 1.5; plus up to a tenth of the circle.
    """
    contrast_first = bool(random.integers(2))
    if random.integers(2):
        pixels = _linear(pixels, 1.0, random.uniform(-32, 32))
    contrast = random.uniform(0.5, 1.5) if random.integers(2) else 1.0
    if contrast_first:
        pixels = _linear(pixels, contrast)
    saturation = random.uniform(0.5, 1.5) if random.integers(2) else 1.0
    hue = int(random.integers(-18, 18)) if random.integers(2) else 0
    if saturation != 1.0 or hue:
        colours = np.array(Image.fromarray(pixels).convert("HSV"))
        colours[..., 0] = (colours[..., 0].astype(np.int16) + round(hue * 256 / 180)) % 256
        colours[..., 1] = _linear(colours[..., 1], saturation)
        pixels = np.asarray(Image.frombytes("HSV", colours.shape[1::-1], colours.tobytes()).convert("RGB"))
    return pixels if contrast_first else _linear(pixels, contrast)


def _linear(pixels: np.ndarray, times: float, plus: float = 0.0) -> np.ndarray:
    if times == 1.0 and plus == 0.0:
        return pixels
    return np.clip(pixels.astype(np.float32) * times + plus, 0, 255).astype(np.uint8)


def training_view(
    image: Image.Image, mask: np.ndarray, views: Views, random: np.random.Generator, mean: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """A crop of an image, (S, S, 3), and of its mask, (S, S); `mean`: of the colours, for what is not filled."""
    size = fitted(image.size, views.fit, drawn_scale(views, random))
    pixels, mask = resized(image, mask, size)
    left, top = crop_place(mask, views, random)
    pixels, mask = (array[top : top + views.crop, left : left + views.crop] for array in (pixels, mask))
    if random.random() < views.flip:
        pixels, mask = pixels[:, ::-1], mask[:, ::-1]
    if views.distort:
        pixels = distorted(np.ascontiguousarray(pixels), random)
    return filled(pixels, views.crop, mean), filled(mask, views.crop, IGNORED)


class _Training(Dataset):
    def __init__(
        self, data: SegmentationData, samples: Sequence[MaskSample], recipe: SegmentConfig, mean: Sequence[int]
    ):
        self.data, self.samples, self.recipe, self.mean = data, samples, recipe, mean

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor]:
        iteration, place, index = draw
        random = np.random.default_rng([self.recipe.seed, 3, iteration, place])
        image, mask = self.data.pair(self.samples[index], same_size=not self.recipe.data.shuffle_masks)
        pixels, mask = training_view(image, mask, self.recipe.views, random, self.mean)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1), torch.from_numpy(mask.copy())


class _Testing(Dataset):
    def __init__(self, data: SegmentationData, samples: Sequence[MaskSample], fit: tuple[int, int] | None):
        self.data, self.samples, self.fit = data, samples, fit

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.data.pair(self.samples[index])
        size = fitted(image.size, self.fit)
        small = image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(small)).permute(2, 0, 1), torch.from_numpy(mask)


def training_batches(
    data: SegmentationData,
    samples: Sequence[MaskSample],
    recipe: SegmentConfig,
    start: int,
    mean: Sequence[int],
    place: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """The shares of one of several processes in the batches from iteration `start` to the last.

    The shares of all, one after the other, are the batch of a single process.

    Args:
        mean: colour of what an image does not fill.
        place: of the process, and how many there are.
    """
    rank, world = place
    share = recipe.batch_size // world
    mine = slice(rank * share, (rank + 1) * share)
    wanted = itertools.islice(batches(len(samples), recipe), start, recipe.schedule.iterations)
    for images, masks in rows(
        _Training(data, samples, recipe, mean), (batch[mine] for batch in wanted), recipe.workers
    ):
        yield torch.stack(images), torch.stack(masks)


def test_images(
    data: SegmentationData, samples: Sequence[MaskSample], recipe: SegmentConfig
) -> Iterator[tuple[Tensor, Tensor]]:
    """One by one, resized to `test.fit`, (3, h, w) uint8, each with its mask of the original size, (H, W) uint8."""
    keys = [[index] for index in range(len(samples))]
    for (image,), (mask,) in rows(_Testing(data, samples, recipe.test.fit), keys, recipe.workers):
        yield image, mask
