"""Batches of views on the training device: from loader workers, or from device memory."""

from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from moco_eval.data.augment.steps import fusing
from moco_eval.data.loader import Batches, beside, loader, resident
from moco_eval.runtime.device import to_device
from pretraining.plan import Plan
from pretraining.views import Batch, two_views


class Feed:
    """This process's batches of each step of a run from `first_step` on, with the images that could not be read.

    `images_there` is called when a batch's images are on the device, before anything is done to them there.
    """

    def __init__(self, run: Plan, device: torch.device, images_there: Callable[[], None] = lambda: None):
        self.run, self.config, self.device, self.images_there = run, run.config, device, images_there
        self.views = two_views(run.images, run.config, finished=device.type == "cpu")
        self.in_memory = run.images.pixels is not None and not self.views.reference
        self.fuse = fusing(device, bool(run.config.compile))

    def __call__(self, first_step: int) -> Iterator[tuple[Batch, list[int]]]:
        epoch, step = divmod(first_step, self.run.steps_per_epoch)
        epochs = range(epoch, self.config.schedule.epochs)
        numbers = len(self.run.images), self.config.batch_size, self.config.seed
        batches = Batches(*numbers, epochs, True, drop_last=True, first_step=step, shards=self.run.images.shards)
        return self._from_memory(batches) if self.in_memory else self._from_files(batches)

    def _from_memory(self, batches: Batches) -> Iterator[tuple[Batch, list[int]]]:
        """All images live on the device; there are no workers."""
        for items in batches:
            epoch, index = np.ascontiguousarray(np.array(items).T)
            rows = to_device(torch.from_numpy(index), self.device)
            self.images_there()
            views = self.views.of_pixels(self.pixels[rows], self.views.numbers(epoch, index), self.fuse)
            yield Batch(views[0], views[-1], rows), []

    @cached_property
    def pixels(self) -> Tensor:
        return resident(self.run.images, self.device)

    def _from_files(self, batches: Batches) -> Iterator[tuple[Batch, list[int]]]:
        """Workers decode and cut; on a GPU the recipe's other steps are done there."""
        loaded = loader(self.views, batches, self.config.workers, self.device)
        for views, index, substitute, numbers in beside(loaded, self.device):
            self.images_there()
            if not self.views.finished:
                views = self.views.finish(views, numbers.numpy(), self.fuse)
            yield Batch(views[0], views[-1], index), index[substitute >= 0].tolist()

    def device_part(self, items: list[tuple[int, int]]) -> Callable[[], Tensor]:
        """What the training device does to make the views of a batch, and nothing before it."""
        epoch, index = np.ascontiguousarray(np.array(items).T)
        numbers = self.views.numbers(epoch, index)
        if self.in_memory:
            pixels = self.pixels[to_device(torch.from_numpy(index), self.device)]
            return lambda: self.views.of_pixels(pixels, numbers, self.fuse)
        views = to_device(self.views.__getitems__(items)[0], self.device)
        return lambda: views if self.views.finished else self.views.finish(views, numbers, self.fuse)
