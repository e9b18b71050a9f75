"""What the torchvision engine reads: images resized and flipped as detectron2 does, in batches.

All that is random about iteration i hangs on (seed, i) alone: a resumed run sees what it would have seen.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moco_eval.data.boxes import Sample, read_image
from moco_eval.detection.recipe import DetectConfig
from moco_eval.errors import InputError

Draw = tuple[int, int, int]  # iteration, place in the batch, index of the sample
Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


def trainable(samples: Sequence[Sample]) -> list[Sample]:
    """The images that have a box to train on, without crowd regions."""
    kept = [
        replace(s, **{name: getattr(s, name)[~s.crowd] for name in ("boxes", "labels", "difficult", "crowd")})
        for s in samples
    ]
    return [sample for sample in kept if len(sample.labels)]


def shuffle_labels(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """The control: all labels dealt out anew among all boxes."""
    labels = np.random.default_rng([seed, 1]).permutation(np.concatenate([sample.labels for sample in samples]))
    ends = np.cumsum([len(sample.labels) for sample in samples])[:-1]
    return [replace(sample, labels=part) for sample, part in zip(samples, np.split(labels, ends))]


def batches(samples: Sequence[Sample], recipe: DetectConfig) -> Iterator[list[Draw]]:
    """Endless batches from iteration 0 on: a new order each epoch; wide and tall images apart if so asked."""
    waiting: dict[bool, list[int]] = {False: [], True: []}
    iteration = 0
    for epoch in itertools.count():
        for index in np.random.default_rng([recipe.seed, 2, epoch]).permutation(len(samples)).tolist():
            width, height = samples[index].size
            group = waiting[recipe.input.aspect_grouping and width > height]
            group.append(index)
            if len(group) == recipe.batch_size:
                yield [(iteration, place, chosen) for place, chosen in enumerate(group)]
                group.clear()
                iteration += 1


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


class _Training(Dataset):
    """A draw to an image and its target: boxes in its pixels, labels counted from 1."""

    def __init__(self, samples: Sequence[Sample], recipe: DetectConfig):
        self.samples = samples
        self.input = recipe.input
        self.seed = recipe.seed

    def __getitem__(self, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        iteration, place, index = draw
        random = np.random.default_rng([self.seed, 3, iteration, place])
        sample, image = self.samples[index], read_image(self.samples[index].path)
        size = resized(image.size, int(random.choice(self.input.min_size_train)), self.input.max_size)
        boxes = sample.boxes * np.tile(np.divide(size, image.size), 2)
        boxes = np.clip(boxes, 0, np.tile(size, 2))
        pixels = _pixels(image, size)
        if random.random() < self.input.flip:
            pixels = pixels.flip(2)
            boxes[:, [0, 2]] = size[0] - boxes[:, [2, 0]]
        solid = (boxes[:, 2:] - boxes[:, :2] > 1e-5).all(axis=1)
        target = {
            "boxes": torch.from_numpy(boxes[solid]).float(),
            "labels": torch.from_numpy(sample.labels[solid] + 1),
        }
        return pixels, target


class _Testing(Dataset):
    """An index to an image and its size on disk."""

    def __init__(self, samples: Sequence[Sample], recipe: DetectConfig):
        self.samples = samples
        self.input = recipe.input

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[int, int]]:
        image = read_image(self.samples[index].path)
        return _pixels(image, resized(image.size, self.input.min_size_test, self.input.max_size)), image.size


def training_batches(
    samples: Sequence[Sample], recipe: DetectConfig, start: int, stop: int, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """The shares of one of `world` processes in the batches of iterations start to stop - 1."""
    share = recipe.batch_size // world
    mine = slice(rank * share, (rank + 1) * share)
    draws = [batch[mine] for batch in itertools.islice(batches(samples, recipe), start, stop)]
    return _load(_Training(samples, recipe), draws, recipe.workers)


def images_to_detect(
    samples: Sequence[Sample], recipe: DetectConfig
) -> Iterator[tuple[list[Tensor], list[tuple[int, int]]]]:
    """The test images one by one, resized, each with its width and height on disk."""
    return _load(_Testing(samples, recipe), [[index] for index in range(len(samples))], recipe.workers)


class _Refusals(Dataset):
    """Hands on an unreadable image as a value: raised in a worker, it would bring that worker's traceback."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, key):
        try:
            return self.dataset[key]
        except InputError as error:
            return error


def _load(dataset: Dataset, keys: list, workers: int) -> Iterator[Any]:
    loader = DataLoader(_Refusals(dataset), batch_sampler=keys, num_workers=workers, collate_fn=list)
    for rows in loader:
        for row in rows:
            if isinstance(row, InputError):
                raise row
        yield tuple(list(column) for column in zip(*rows))


def seed_of(seed: int, number: int, part: int = 0) -> int:
    """What torch's generator is seeded with: 0 for the weights that are drawn, i + 1 for a part of iteration i."""
    return int(np.random.SeedSequence([seed, 4, number, part]).generate_state(1)[0])
