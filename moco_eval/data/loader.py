"""Transforms, batches and loaders. Every draw comes from (seed, epoch, image), so a resumed run repeats it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import transforms

from moco_eval.data import band_transforms
from moco_eval.data.image_set import ImageSet
from moco_eval.data.workers import Loaded
from moco_eval.errors import InputError
from moco_eval.preprocessing import BANDS, Preprocessing
from moco_eval.runtime.console import tell
from moco_eval.runtime.device import borrowed_generator, to_device
from moco_eval.runtime.rank import rank, world_size

LARGEST = 2**26  # pixels that a resized image may have before it is cut
WINDOW = 16  # shards whose images are shuffled together
ROUND = 256  # images of which an epoch with repeats has whole numbers


def clean_transform(preprocessing: Preprocessing) -> transforms.Compose:
    """Resize, centre crop, to 0..1, normalise: main_lincls.py's validation transform at size 224."""
    return transforms.Compose([clean_cut(preprocessing), Normalise(preprocessing)])


def clean_cut(preprocessing: Preprocessing) -> transforms.Compose:
    """Its resize and centre crop, to (3, size, size) uint8; `Normalise` does the rest where the network is."""
    if preprocessing.channels == BANDS:
        return band_transforms.clean_cut(preprocessing)
    centre = ResizedCentre(
        preprocessing.resize,
        preprocessing.size,
        preprocessing.interpolation,
        preprocessing.antialias,
        preprocessing.squash,
    )
    return transforms.Compose([centre, transforms.PILToTensor()])


@dataclass(frozen=True)
class ResizedCentre:
    """torchvision's Resize and CenterCrop; of a very oblong image only what the crop shows is resized.

    Resized whole, an image of 1 x 20,000 pixels has 256 x 5,120,000.

    Attributes:
        resize: pixels of the shorter side.
        size: pixels of both sides of the crop.
        interpolation: bilinear or bicubic.
        antialias: as PIL resizes; else as torch interpolates tensors of 8 bits, but for very oblong images.
        squash: both sides become `resize`.
    """

    resize: int
    size: int
    interpolation: str = "bilinear"
    antialias: bool = True
    squash: bool = False

    def __call__(self, image: Image.Image) -> Image.Image:
        if self.squash:
            return transforms.functional.center_crop(self._resized(image, [self.resize] * 2), self.size)
        longer = self.resize * max(image.size) // min(image.size)
        if self.resize * longer <= LARGEST or longer <= self.size or self.resize < self.size:
            return transforms.functional.center_crop(self._resized(image, [self.resize]), self.size)
        sides = [self.resize if side == min(image.size) else longer for side in image.size]
        scales = [before / after for before, after in zip(image.size, sides)]
        starts = [round((side - self.size) / 2) * scale for side, scale in zip(sides, scales)]
        left, top = starts
        box = (left, top, left + self.size * scales[0], top + self.size * scales[1])
        return image.resize((self.size, self.size), Image.Resampling[self.interpolation.upper()], box=box)

    def _resized(self, image: Image.Image, sides: list[int]) -> Image.Image:
        """To that height and width, or with one side to it as the shorter one."""
        how = transforms.InterpolationMode(self.interpolation)
        if self.antialias:
            return transforms.functional.resize(image, sides, how)
        pixels = transforms.functional.pil_to_tensor(image)
        return transforms.functional.to_pil_image(transforms.functional.resize(pixels, sides, how, antialias=False))


def crop_transform(
    preprocessing: Preprocessing, crop_scale: tuple[float, float] = (0.08, 1.0), flip: bool = True
) -> transforms.Compose:
    """Random-resized crop, horizontal flip, normalise: main_lincls.py's training transform."""
    return transforms.Compose([crop_cut(preprocessing, crop_scale, flip), Normalise(preprocessing)])


def crop_cut(
    preprocessing: Preprocessing,
    crop_scale: tuple[float, float],
    flip: bool,
    interpolation: str = "bilinear",
    further: Sequence[Callable] = (),
) -> transforms.Compose:
    """Its crop and flip, to (3, size, size) uint8; `Normalise` does the rest where the network is.

    The interpolation is the protocol's, mostly bilinear, whatever the encoder's clean crop has: so do DINO's and iBOT's
    eval_linear.py (dino@04c0ad9, ibot@c24f870), whose clean crop is bicubic.

    Args:
        further: what happens to the PIL image afterwards.
    """
    if preprocessing.channels == BANDS:
        assert not further
        return band_transforms.crop_cut(preprocessing, crop_scale, flip)
    how = transforms.InterpolationMode(interpolation)
    crop = transforms.RandomResizedCrop(preprocessing.size, scale=crop_scale, interpolation=how)
    flips = [transforms.RandomHorizontalFlip()] if flip else []
    return transforms.Compose([crop, *flips, *further, transforms.PILToTensor()])


def swap_colours(images: torch.Tensor) -> torch.Tensor:
    """RGB to BGR, or back: (..., 3, H, W)."""
    return images.flip(-3)


class Normalise:
    """8-bit RGB images, (N, 3, H, W) uint8, to what an encoder takes: less the mean, by the standard deviation.

    Bit for bit ToTensor and Normalize, but on the images' device. Bands, (N, C, H, W) float32, are in their own units.
    """

    def __init__(self, preprocessing: Preprocessing):
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in preprocessing.rgb())
        self.swap, self.bands = preprocessing.channels == "BGR", preprocessing.channels == BANDS

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if self.mean.device != images.device:
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        if self.bands:
            return images.sub(self.mean).div_(self.std)
        pixels = images.float().div_(255).sub_(self.mean).div_(self.std)
        return swap_colours(pixels) if self.swap else pixels


def draw_seed(seed: int, epoch: int, index: int) -> int:
    """A 64-bit seed for one image in one epoch."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0])


class Sized(Protocol):
    """A data set that knows about how many bytes one of its items has."""

    @property
    def item_bytes(self) -> int: ...


@dataclass
class Examples(Dataset):
    """(image tensor, label, index) of an ImageSet; items are (epoch, index) pairs.

    The label is -1 where there is none, or where there may be several.
    `tolerant`: an unreadable image is named and a grey one takes its place (the kNN monitor); otherwise InputError.
    `size`: of the tensors, in pixels; 0 where nobody asks. `floats`: whether they are float32 rather than bytes.
    """

    images: ImageSet
    transform: transforms.Compose
    seed: int = 0
    tolerant: bool = False
    size: int = 0
    floats: bool = False

    @property
    def item_bytes(self) -> int:
        """Of a tensor."""
        return (4 if self.images.bands or self.floats else 1) * self.images.channels * self.size**2

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, int, int]:
        epoch, index = item
        image = self._image(index)
        with borrowed_generator(draw_seed(self.seed, epoch, index)):
            tensor = self.transform(image)
        labels = self.images.labels
        label = -1 if labels is None or labels.ndim == 2 else int(labels[index])
        return tensor, label, index

    def _image(self, index: int) -> Image.Image | torch.Tensor:
        try:
            bands = self.images.bands
            return torch.from_numpy(self.images.values(index)) if bands else self.images.image(index)
        except InputError as error:
            if not self.tolerant:
                raise
            tell(f"warning: {error}; a grey image is used in its place", "warnings")
            return _grey(self.images)

    def __len__(self) -> int:
        return len(self.images)


def _grey(images: ImageSet) -> Image.Image | torch.Tensor:
    """In the place of an image that cannot be read; of bands their mean."""
    if not images.bands:
        return Image.new("RGB", (64, 64), (128, 128, 128))
    mean = [images.bands.mean[place] for place in images.bands.order]
    return torch.tensor(mean).view(-1, 1, 1).expand(-1, 64, 64).contiguous()


@dataclass
class Batches:
    """A batch sampler: this rank's (epoch, index) pairs of each batch, for a run of epochs.

    The batch is global: each rank takes its contiguous share of every batch, so ranks are disjoint and the
    order of images does not depend on how many ranks share them.

    `shards`: where each shard's images end, (S,), of a set that comes in shards. Shards are then shuffled, taken
    WINDOW at a time, and their images shuffled together: a window's order is drawn when its turn comes.

    `repeats`: an image stands so often in an epoch of a set without shards, in a row; the epoch ends after as many
    images as ever, in whole ROUNDs. Each repeat has an epoch number, and so draws, of its own.
    `groups`: neighbours of the order are dealt out to so many equal parts of a whole batch, as to so many GPUs.
    """

    images: int
    batch_size: int
    seed: int
    epochs: range
    shuffle: bool
    drop_last: bool
    first_step: int = 0
    shards: np.ndarray | None = None
    repeats: int = 1
    groups: int = 1

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in self.epochs:
            start = self.first_step if epoch == self.epochs.start else 0
            for batch in self._whole(epoch, start):
                mine = share(self._dealt(batch))
                yield [self._item(epoch, int(place)) for place in (mine if len(mine) else batch[:1])]

    def _dealt(self, batch: np.ndarray) -> np.ndarray:
        """A whole batch, each group's images together: 0, groups, 2 groups, ..., then 1, groups + 1, ..."""
        return batch.reshape(-1, self.groups).T.ravel() if len(batch) == self.batch_size else batch

    def _item(self, epoch: int, place: int) -> tuple[int, int]:
        """Of a place among all repeats: the epoch that its draws are from, and the image."""
        index, repeat = divmod(place, self.repeats)
        return epoch * self.repeats + repeat, index

    def _whole(self, epoch: int, start: int) -> Iterator[np.ndarray]:
        """The batches of an epoch from step `start` on, all ranks' together."""
        rest = np.empty(0, np.int64)
        for images in self._windows(epoch, start * self.batch_size):
            rest = np.concatenate([rest, images])
            whole = len(rest) - len(rest) % self.batch_size
            yield from (rest[at : at + self.batch_size] for at in range(0, whole, self.batch_size))
            rest = rest[whole:]
        if len(rest) and not self.drop_last:
            yield rest

    def _windows(self, epoch: int, skip: int) -> Iterator[np.ndarray]:
        """The order of an epoch without its first `skip` images, in parts; skipped windows are not drawn."""
        if self.shards is None or not self.shuffle:
            yield self.order(epoch)[skip:]
            return
        sizes = np.diff(self.shards, prepend=0)
        shards = np.random.default_rng((self.seed, epoch)).permutation(len(sizes))
        for number, at in enumerate(range(0, len(shards), WINDOW), start=1):
            window = shards[at : at + WINDOW]
            if skip < sizes[window].sum():
                ends = self.shards[window]
                images = np.concatenate([np.arange(end - size, end) for end, size in zip(ends, sizes[window])])
                yield np.random.default_rng((self.seed, epoch, number)).permutation(images)[skip:]
            skip = max(0, skip - int(sizes[window].sum()))

    def order(self, epoch: int) -> np.ndarray:
        """The order of all images in an epoch of a set without shards, the same on every rank; repeats are numbered."""
        images = np.arange(self.images)
        if self.shuffle:
            images = np.random.default_rng((self.seed, epoch)).permutation(self.images)
        if self.repeats == 1:
            return images
        return (images[:, None] * self.repeats + np.arange(self.repeats)).ravel()[: self.shown]

    @property
    def shown(self) -> int:
        """Images of an epoch, repeats counted. Source: facebookresearch/deit@7e160fe, samplers.py."""
        whole = self.images - self.images % ROUND
        return whole if whole and self.repeats > 1 else self.images

    @property
    def steps_per_epoch(self) -> int:
        whole, rest = divmod(self.shown, self.batch_size)
        return whole + bool(rest and not self.drop_last)

    def size(self, step: int) -> int:
        """How many images the given batch of an epoch holds, over all ranks."""
        return min(self.batch_size, self.shown - step * self.batch_size)

    def mine(self, step: int) -> int:
        """How many of them are this rank's; the loader hands over one that does not count where there are none."""
        return len(share(range(self.size(step))))

    def __len__(self) -> int:
        return len(self.epochs) * self.steps_per_epoch - self.first_step


def share(batch: Sequence | np.ndarray) -> Sequence | np.ndarray:
    """This rank's contiguous share of a batch; shares differ by one at most."""
    ranks, mine = world_size(), rank()
    return batch[len(batch) * mine // ranks : len(batch) * (mine + 1) // ranks]


def loader(examples: Sized, batches: Iterable[list[tuple[int, int]]], workers: int, device: torch.device) -> Loaded:
    """Those batches of (epoch, index) pairs, loaded by workers that live as long as the iteration.

    Workers are a process group of their own: a signal to ours, which torchrun and Ctrl-C send, ends no batch that is
    still wanted, and the workers go when their process goes.
    """
    return Loaded(
        examples,
        batches,
        workers,
        batch_bytes=examples.item_bytes * _largest(batches),
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # for the workers' seeds, which nothing draws from: the host's generator stays
        collate_fn=_as_it_is if hasattr(examples, "__getitems__") else None,
    )


def _largest(batches: Iterable[list[tuple[int, int]]]) -> int:
    """How many items this process has in a batch, at most."""
    if isinstance(batches, Batches):
        return len(share(range(min(batches.batch_size, batches.images))))
    return max(map(len, batches), default=0) if isinstance(batches, list) else 0


def _as_it_is(batch):
    """A data set that hands over whole batches has nothing left to collate."""
    return batch


def resident(images: ImageSet, device: torch.device) -> torch.Tensor:
    """All images of a set in memory, (images, 3, H, W) uint8, on the device."""
    assert images.pixels is not None
    return to_device(torch.from_numpy(images.pixels).permute(0, 3, 1, 2).contiguous(), device)


def beside(loaded: Iterable[tuple[torch.Tensor, ...]], device: torch.device) -> Iterator[tuple[torch.Tensor, ...]]:
    """The views of each loaded batch on the device; index, substitute and numbers as they came.

    A GPU fetches them on a stream of its own, while the step before is still running.
    """
    for views, *rest in loaded:
        if device.type != "cuda":
            yield to_device(views, device), *rest
            continue
        here, copies = torch.cuda.current_stream(device), _copy_stream(device)
        with torch.cuda.stream(copies):
            moved = to_device(views, device)
        here.wait_stream(copies)
        moved.record_stream(here)
        yield moved, *rest


@lru_cache
def _copy_stream(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)
