"""What the torchvision engine reads: images resized and flipped as detectron2 does, in batches.

All that is random about iteration i hangs on (seed, i) alone: a resumed run sees what it would have seen.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from moco_eval.config.detection import DetectConfig, Input
from moco_eval.data.boxes.samples import Sample, read_image
from moco_eval.data.workers import rows
from moco_eval.detection.masks import Segmentation, decoded
from moco_eval.errors import InputError
from moco_eval.runtime import console

Draw = tuple[int, int, int]  # iteration, place in the batch, index of the sample
Batch = tuple[list[Tensor], list[dict[str, Any]]]  # images (3, H, W) uint8 and their targets, as `Detector` takes them


def trainable(samples: Sequence[Sample], masks: bool = False, keypoints: bool = False) -> list[Sample]:
    """The images that have an object to train on, without crowd regions, and with what the recipe asks for.

    With masks, objects without one go, and this is said. With keypoints, images without a labelled one go.

    Raises:
        InputError: no image is left.
    """
    kept = [_only(sample, ~sample.crowd) for sample in samples]
    if masks:
        usable = [np.array([mask is not None for mask in s.masks] or [False] * len(s.labels), bool) for s in kept]
        if dropped := sum(int((~has).sum()) for has in usable):
            console.log(f"{dropped} training objects without a mask are left out")
        kept = [_only(sample, has) for sample, has in zip(kept, usable)]
    if keypoints:
        kept = [sample for sample in kept if sample.keypoints is not None and (sample.keypoints[..., 2] > 0).any()]
    kept = [sample for sample in kept if len(sample.labels)]
    if not kept:
        kind = "mask" if masks else "labelled keypoint" if keypoints else "box"
        asked = [f"--set {name}=false" for name, given in (("masks", masks), ("keypoints", keypoints)) if given]
        way_out = f"take {' '.join(asked)}, or other data" if asked else "take other data"
        raise InputError(
            f"none of the {len(samples)} training images has an object with a {kind} (crowd regions do not count); "
            f"{way_out}"
        )
    return kept


def _only(sample: Sample, chosen: np.ndarray) -> Sample:
    """A sample with some of its objects."""
    arrays = {name: getattr(sample, name)[chosen] for name in ("boxes", "labels", "difficult", "crowd")}
    points = None if sample.keypoints is None else sample.keypoints[chosen]
    return replace(sample, **arrays, masks=tuple(itertools.compress(sample.masks, chosen)), keypoints=points)


def shuffle_labels(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """The control: all labels dealt out anew among all boxes."""
    labels = np.random.default_rng([seed, 1]).permutation(np.concatenate([sample.labels for sample in samples]))
    ends = np.cumsum([len(sample.labels) for sample in samples])[:-1]
    return [replace(sample, labels=part) for sample, part in zip(samples, np.split(labels, ends))]


def batches(samples: Sequence[Sample], recipe: DetectConfig) -> Iterator[list[Draw]]:
    """Endless batches from iteration 0 on: a new order each epoch; wide and tall images apart if so asked.

    Images of rare classes may stand in an epoch more often; see `repeat_factors`.
    """
    waiting: dict[bool, list[int]] = {False: [], True: []}
    iteration, repeats = 0, repeat_factors(samples, recipe.data.repeat_threshold)
    for epoch in itertools.count():
        for index in _epoch(repeats, np.random.default_rng([recipe.seed, 2, epoch])).tolist():
            width, height = samples[index].size
            group = waiting[recipe.input.aspect_grouping and width > height]
            group.append(index)
            if len(group) == recipe.batch_size:
                yield [(iteration, place, chosen) for place, chosen in enumerate(group)]
                group.clear()
                iteration += 1


def repeat_factors(samples: Sequence[Sample], threshold: float) -> np.ndarray:
    """How often each image stands in an epoch, in the mean, (N,): that of the rarest of its classes, at least 1.

    Source: Gupta et al. 2019, arXiv:1908.03195, Appendix B.2.
    """
    if not threshold:
        return np.ones(len(samples))
    shown = [np.unique(sample.labels) for sample in samples]
    images = np.bincount(np.concatenate([np.zeros(0, np.int64), *shown]))  # of each class
    with np.errstate(divide="ignore"):
        factors = np.maximum(1.0, np.sqrt(threshold * len(samples) / images))
    return np.array([factors[labels].max(initial=1.0) for labels in shown])


def _epoch(repeats: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The images of an epoch in their order; what a factor has beyond a whole number is the chance of once more."""
    whole = repeats.astype(np.int64)
    if (repeats == whole).all():
        return random.permutation(np.repeat(np.arange(len(repeats)), whole))
    more = random.random(len(repeats)) < repeats - whole
    return random.permutation(np.repeat(np.arange(len(repeats)), whole + more))


def resized(size: tuple[int, int], shorter: int, longest: int) -> tuple[int, int]:
    """Width and height for a shorter side of `shorter` and a longer of at most `longest`, rounded half up."""
    width, height = size
    scale = shorter / min(width, height)
    new_width, new_height = (shorter, scale * height) if width < height else (scale * width, shorter)
    if max(new_width, new_height) > longest:
        scale = longest / max(new_width, new_height)
        new_width, new_height = new_width * scale, new_height * scale
    return int(new_width + 0.5), int(new_height + 0.5)


def _pixels(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """A resized image (antialiased bilinear on 8 bits), (3, H, W) uint8."""
    if image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@dataclass(frozen=True)
class View:
    """What becomes of an image before training: resized, then perhaps flipped, then perhaps cut.

    Attributes:
        before, after: width and height on disk and resized.
        corner: x and y in the resized and flipped image at which the cut begins.
        cut: width and height of what is left; None where all is.
    """

    before: tuple[int, int]
    after: tuple[int, int]
    flipped: bool
    corner: tuple[int, int] = (0, 0)
    cut: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of what the detector sees."""
        return self.cut or self.after

    def pixels(self, image: Image.Image) -> Tensor:
        pixels = _pixels(image, self.after)
        return self._cut(pixels.flip(2) if self.flipped else pixels)

    def _cut(self, pixels: Any) -> Any:
        """Of an image (..., H, W)."""
        if self.cut is None:
            return pixels
        (x, y), (width, height) = self.corner, self.cut
        return pixels[..., y : y + height, x : x + width]

    def points(self, points: np.ndarray) -> np.ndarray:
        """Coordinates (..., 2), moved along."""
        moved = points * np.divide(self.after, self.before)
        if self.flipped:
            moved[..., 0] = self.after[0] - moved[..., 0]
        return moved if self.cut is None else moved - self.corner

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes (N, 4), moved along and cut to the image."""
        corners = self.points(boxes.reshape(-1, 2, 2))
        moved = np.concatenate((corners.min(axis=1), corners.max(axis=1)), axis=1)
        return np.clip(moved, 0, np.tile(self.size, 2))

    def mask(self, mask: Any) -> Segmentation:
        """A COCO segmentation as polygons, not cut to the image; or, from its run-length code, as a bitmap (H, W)."""
        if not isinstance(mask, dict):
            return [self.points(np.reshape(polygon, (-1, 2))).reshape(-1) for polygon in mask]
        bitmap = np.array(Image.fromarray(decoded(mask)).resize(self.after, Image.Resampling.NEAREST))
        if not self.flipped and self.cut is None:
            return bitmap
        return np.ascontiguousarray(self._cut(bitmap[:, ::-1] if self.flipped else bitmap))

    def extent(self, mask: Segmentation) -> np.ndarray:
        """The box (4,) about what of a moved mask lies in the image; without an area where nothing does."""
        if isinstance(mask, np.ndarray):
            rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
            ends = np.array([(columns[0], rows[0]), (columns[-1] + 1, rows[-1] + 1)] if len(rows) else [])
        else:
            ends = np.concatenate([_clipped(polygon.reshape(-1, 2), self.size) for polygon in mask])
        if len(ends) == 0:
            return np.zeros(4)
        return np.concatenate((ends.min(axis=0), ends.max(axis=0))).astype(float)

    def keypoints(self, keypoints: np.ndarray, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
        """Keypoints (N, K, 3), moved along; left and right change places; those outside the image lose their label."""
        moved = np.concatenate((self.points(keypoints[..., :2]), keypoints[..., 2:]), axis=-1)
        inside = ((moved[..., :2] >= 0) & (moved[..., :2] <= self.size)).all(axis=-1)
        moved[~inside | (moved[..., 2] == 0)] = 0
        if self.flipped:
            order = np.arange(moved.shape[1])
            for left, right in pairs:
                order[[left, right]] = right, left
            moved = moved[:, order]
        return moved


def _clipped(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A polygon (P, 2) cut to an image of that width and height, side by side (Sutherland and Hodgman 1974)."""
    for axis, sign, limit in ((0, 1, 0), (1, 1, 0), (0, -1, -size[0]), (1, -1, -size[1])):
        kept = []
        for point, before in zip(points, np.roll(points, 1, axis=0)):
            here, there = sign * point[axis] - limit, sign * before[axis] - limit
            if here * there < 0:
                kept.append(before + (point - before) * (there / (there - here)))
            if here >= 0:
                kept.append(point)
        points = np.array(kept).reshape(-1, 2)
    return points


def _view(size: tuple[int, int], wanted: Input, random: np.random.Generator) -> View:
    """What is drawn of an image of that width and height.

    Source of the jitter: detectron2@02b5c4e2, ResizeScale and FixedSizeCrop in data/transforms; read, not copied.
    """
    if wanted.jitter is None:
        after = resized(size, int(random.choice(wanted.min_size_train)), wanted.max_size)
        return View(size, after, bool(random.random() < wanted.flip))
    flipped, square = bool(random.random() < wanted.flip), wanted.max_size
    scale = random.uniform(*wanted.jitter) * square / max(size)
    after = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    share = random.random()
    corner = round(max(after[0] - square, 0) * share), round(max(after[1] - square, 0) * share)
    return View(size, after, flipped, corner, (min(after[0], square), min(after[1], square)))


class _Training(Dataset):
    """A draw to an image and its target: boxes in its pixels, labels from 1, masks and keypoints if so asked."""

    def __init__(self, samples: Sequence[Sample], recipe: DetectConfig, pairs: Sequence[tuple[int, int]]):
        self.samples, self.recipe, self.pairs = samples, recipe, pairs

    def __getitem__(self, draw: Draw) -> tuple[Tensor, dict[str, Any]]:
        iteration, place, index = draw
        random, wanted = np.random.default_rng([self.recipe.seed, 3, iteration, place]), self.recipe.input
        sample, image = self.samples[index], _read(self.samples[index])
        view = _view(image.size, wanted, random)
        return view.pixels(image), self.target(sample, view)

    def target(self, sample: Sample, view: View) -> dict[str, Any]:
        """The objects of which the image still shows something; where it was cut, boxes are those of cut masks."""
        boxes = view.boxes(sample.boxes)
        shown = (boxes[:, 2:] - boxes[:, :2] > 1e-5).all(axis=1)
        target: dict[str, Any] = {}
        if self.recipe.masks:
            masks = [view.mask(mask) for mask in sample.masks]
            if view.cut is not None:
                boxes = np.array([view.extent(mask) for mask in masks]).reshape(-1, 4)
                shown &= (boxes[:, 2:] - boxes[:, :2] > 1e-5).all(axis=1)
            shown &= [not isinstance(mask, np.ndarray) or bool(mask.any()) for mask in masks]
            target["masks"] = list(itertools.compress(masks, shown))
        if self.recipe.keypoints:
            assert sample.keypoints is not None
            points = view.keypoints(sample.keypoints, self.pairs)[shown]
            target["keypoints"] = torch.from_numpy(points).float()
        target["boxes"] = torch.from_numpy(boxes[shown]).float()
        target["labels"] = torch.from_numpy(sample.labels[shown] + 1)
        return target


class _Testing(Dataset):
    """An index to an image and its size on disk."""

    def __init__(self, samples: Sequence[Sample], recipe: DetectConfig):
        self.samples = samples
        self.input = recipe.input

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[int, int]]:
        image = _read(self.samples[index])
        return _pixels(image, resized(image.size, self.input.min_size_test, self.input.max_size)), image.size


def _read(sample: Sample) -> Image.Image:
    """The image; refused where its annotation is of another size."""
    image = read_image(sample.path)
    if image.size != sample.size:
        (width, height), (said_width, said_height) = image.size, sample.size
        raise InputError(
            f"{sample.path} is {width}x{height} and its annotation says {said_width}x{said_height}; "
            "correct the annotation, or put the right image in its place"
        )
    return image


def training_batches(
    samples: Sequence[Sample],
    recipe: DetectConfig,
    start: int,
    stop: int,
    rank: int = 0,
    world: int = 1,
    pairs: Sequence[tuple[int, int]] = (),
) -> Iterator[Batch]:
    """The shares of one of `world` processes in the batches of iterations start to stop - 1.

    The shares of all, one after the other, are the batch of a single process: pixels and targets.

    Args:
        pairs: the keypoints that a mirror exchanges, as in `DetectionData`.
    """
    assert recipe.batch_size % world == 0
    share = recipe.batch_size // world
    mine = slice(rank * share, (rank + 1) * share)
    # Not a list: the draws of 540,000 iterations of 16 images take 0.9 GB.
    draws = (batch[mine] for batch in itertools.islice(batches(samples, recipe), start, stop))
    return rows(_Training(samples, recipe, pairs), draws, recipe.workers)


def images_to_detect(
    samples: Sequence[Sample], recipe: DetectConfig
) -> Iterator[tuple[list[Tensor], list[tuple[int, int]]]]:
    """The test images one by one, resized, each with its width and height on disk."""
    return rows(_Testing(samples, recipe), [[index] for index in range(len(samples))], recipe.workers)
