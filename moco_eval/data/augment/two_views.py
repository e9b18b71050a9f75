"""Two views of each image of a data set: cut by loader workers, or made from device memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.utils import save_image

from moco_eval.data.augment.decode import cut, photo
from moco_eval.data.augment.steps import Crop, Fuse, ViewRecipe, is_for_all, unfused
from moco_eval.data.image_set import ImageSet
from moco_eval.data.loader import draw_seed
from moco_eval.errors import InputError
from moco_eval.runtime import files
from moco_eval.runtime.device import borrowed_generator


@dataclass
class TwoViews(Dataset):
    """(views, index, substitute, numbers) of a list of (epoch, index) items: two independent draws of a recipe, or one
    each of two.

    The draws depend on (seed, epoch, index) alone. An unreadable image is replaced by the next readable one, so that
    every rank keeps its share; `substitute` is then the index that took its place, otherwise -1.

    Attributes:
        images: in memory, or files.
        recipe: the augmentation.
        size: of a view, in pixels.
        seed: of the run.
        reference: by the published PIL pipeline, image after image.
        finished: otherwise views of files are only cut, and `finish` does the other steps by the image's `numbers`;
            a recipe that does not start with a crop is always finished.
        count: 2, or 1 where only the first view is looked at.
        second: the second view's recipe, where it is another; its steps are the first's, with other parameters.
    """

    images: ImageSet
    recipe: ViewRecipe
    size: int
    seed: int
    reference: bool = False
    finished: bool = True
    count: int = 2
    second: ViewRecipe | None = None

    def __post_init__(self) -> None:
        first = self.recipe.steps[0]
        self.crop = first if isinstance(first, Crop) else None
        self.recipes = (self.recipe, self.second or self.recipe)[: self.count]
        assert all([*map(type, each.steps)] == [*map(type, self.recipe.steps)] for each in self.recipes)
        assert all(each.steps[0] == first for each in self.recipes)  # one cut serves both
        self.finished = self.finished or self.reference or self.crop is None
        last = transforms.PILToTensor()
        self.published = [transforms.Compose([each.reference(self.size), last]) for each in self.recipes]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def item_bytes(self) -> int:
        """Of the views of an image: bytes, or float32 of each band."""
        return self.count * self.images.channels * self.size**2 * self.dtype.itemsize

    @property
    def dtype(self) -> torch.dtype:
        """Of the views."""
        return torch.float32 if self.images.bands else torch.uint8

    def __getitems__(self, items: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Views (count, N, C, size, size) uint8, of bands float32; index and substitute (N,); numbers (count, N, D)."""
        epoch, index = np.ascontiguousarray(np.array(items).T)
        numbers = self.numbers(epoch, index)
        substitute = torch.full((len(items),), -1)
        if self.reference:
            views = self._published(items, substitute)
        elif self.images.pixels is not None:
            pixels = torch.from_numpy(self.images.pixels[index]).permute(0, 3, 1, 2)
            views = self.of_pixels(pixels, numbers)
        else:
            views = self._of_files(index, numbers, substitute)
        return views, torch.from_numpy(index), substitute, torch.from_numpy(numbers)

    def numbers(self, epoch: np.ndarray, index: np.ndarray) -> np.ndarray:
        """The uniform numbers behind each view, (count, N, D)."""
        drawn = (each.uniforms(self.seed, epoch, index, view) for view, each in enumerate(self.recipes))
        return np.stack(list(drawn))

    def of_pixels(self, pixels: Tensor, numbers: np.ndarray, fuse: Fuse = unfused) -> Tensor:
        """Views of whole images of one size, (N, 3, H, W) uint8, on their device."""
        return self._views(pixels.expand(len(numbers), *pixels.shape), numbers, 0, fuse)

    def finish(self, views: Tensor, numbers: np.ndarray, fuse: Fuse = unfused) -> Tensor:
        """All steps after the cut, on the views' device."""
        return self._views(views, numbers, 1, fuse)

    def _views(self, views: Tensor, numbers: np.ndarray, skip: int, fuse: Fuse) -> Tensor:
        """The steps from `skip` on, of all views at once where an operation is computed for all images."""
        if self.second or not is_for_all(views, fuse):
            each = zip(self.recipes, views, numbers)
            return torch.stack([recipe.apply(view, u, self.size, skip, fuse) for recipe, view, u in each])
        together = self.recipe.apply(views.flatten(0, 1), numbers.reshape(-1, numbers.shape[2]), self.size, skip, fuse)
        return together.unflatten(0, (len(numbers), -1))

    def _published(self, items: list[tuple[int, int]], substitute: Tensor) -> Tensor:
        views = self._room(len(items))
        for n, (epoch, index) in enumerate(items):
            image, substitute[n] = self.decoded(index)
            with borrowed_generator(draw_seed(self.seed, epoch, index)):
                for view, published in zip(views, self.published):
                    view[n] = published(image)
        return views

    def _of_files(self, index: np.ndarray, numbers: np.ndarray, substitute: Tensor) -> Tensor:
        views = self._room(len(index))
        for n, number in enumerate(index.tolist()):
            image, substitute[n] = self.decoded(number)
            for view, pixels in zip(views, self._of_photo(image, numbers[:, n])):
                view[n] = pixels
        return self.finish(views, numbers) if self.finished and self.crop else views

    def _of_photo(self, image: Tensor, numbers: np.ndarray) -> Sequence[Tensor] | Tensor:
        """Views of one image, (3, size, size) each: cut, or made whole where something comes before the cut."""
        if self.crop is None:
            return self.of_pixels(image[None], numbers[:, None])[:, 0]
        sides = (np.full(self.count, side) for side in image.shape[1:])
        return [cut(image, box, self.size) for box in self.crop.boxes(numbers, *sides)]

    def _room(self, count: int) -> Tensor:
        """For views, in the order of bytes in which they are cut: a pixel's colours beside each other."""
        sides = (self.size, self.size, self.images.channels)
        return torch.empty(self.count, count, *sides, dtype=self.dtype).permute(0, 1, 4, 2, 3)

    def decoded(self, index: int) -> tuple[Any, int]:
        """An image as the backend takes it, or the next readable one and its index; -1 where it is the image itself.

        Raises:
            InputError: none can be read.
        """
        for step in range(len(self)):
            other = (index + step) % len(self)
            try:
                image = self.images.image(other) if self.reference else photo(self.images, other)
                return image, (other if step else -1)
            except InputError:
                continue
        raise InputError(f"none of the {len(self)} images of {self.images.name} can be read")

    def draw(self, path: Path, pairs: int = 8) -> None:
        """A picture of what the network sees: first views above second ones, one image a column."""
        chosen = range(0, len(self), max(1, len(self) // pairs))[:pairs]
        views, *_ = self.__getitems__([(0, index) for index in chosen])
        if self.images.bands:
            views = torch.from_numpy(self.images.bands.picture(views.numpy()))
        with files.atomic(path) as temporary:
            save_image(views.flatten(0, 1) / 255, temporary, nrow=len(chosen), padding=2, pad_value=1.0)
