"""Features of a whole data set, in order, from however many processes."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from moco_eval.config.base import Augmentation
from moco_eval.data.augment.steps import Crop, Flip, ViewRecipe
from moco_eval.data.augment.two_views import TwoViews
from moco_eval.data.image_set import ImageSet
from moco_eval.data.loader import Batches, Examples, Normalise, clean_cut, loader, resident, share
from moco_eval.errors import InputError, RunFailed
from moco_eval.preprocessing import Preprocessing
from moco_eval.runtime.collectives import gather
from moco_eval.runtime.console import progress
from moco_eval.runtime.device import autocast, to_device, to_host
from moco_eval.runtime.rank import rank, world_size

# Pixels


@dataclass(frozen=True)
class Crops:
    """The training crops of one epoch: random-resized crop and flip, drawn from (seed, epoch, image)."""

    augmentation: Augmentation
    seed: int
    epoch: int

    def recipe(self) -> ViewRecipe:
        """The same as main_lincls.py's training transform, to PIL's pixels (bilinear); see docs/protocols/views.md."""
        flip = (Flip(),) if self.augmentation.flip else ()
        return ViewRecipe((Crop(self.augmentation.crop_scale), *flip))


Rows = Iterable[list[tuple[int, int]]]  # (epoch, index) of each image of each batch


def pixels(
    images: ImageSet,
    preprocessing: Preprocessing,
    crops: Crops | None,
    batches: Rows,
    device: torch.device,
    workers: int,
    tolerant: bool = False,
) -> Iterator[torch.Tensor]:
    """What the network takes of each batch: (N, 3, H, W) on the device.

    Args:
        crops: of training; None for the clean crop.
        tolerant: put a grey image in the place of one that cannot be read (clean crops only).
    Raises:
        InputError: an image cannot be read; it names the file.
    """
    if crops is not None:
        return _cropped(images, preprocessing, crops, batches, device, workers)
    if _fits_as_it_is(images, preprocessing):
        return _in_memory(images, preprocessing, batches, device)
    return _loaded(images, preprocessing, batches, device, workers, tolerant)


def _fits_as_it_is(images: ImageSet, preprocessing: Preprocessing) -> bool:
    """Whether the images are in memory and neither resized nor cropped."""
    side = preprocessing.size
    return images.pixels is not None and images.pixels.shape[1:3] == (side, side) and preprocessing.resize == side


def _in_memory(
    images: ImageSet, preprocessing: Preprocessing, batches: Rows, device: torch.device
) -> Iterator[torch.Tensor]:
    """Normalised images of each batch, from the device's memory."""
    held, normalise = resident(images, device), Normalise(preprocessing)
    for items in batches:
        yield normalise(held[to_device(torch.tensor([index for _, index in items]), device)])


def _loaded(
    images: ImageSet, preprocessing: Preprocessing, batches: Rows, device: torch.device, workers: int, tolerant: bool
) -> Iterator[torch.Tensor]:
    """Resized and cropped images of each batch, from loader workers; normalised on the device."""
    examples = Examples(images, clean_cut(preprocessing), tolerant=tolerant, size=preprocessing.size)
    normalise = Normalise(preprocessing)
    for views, _, _ in loader(examples, batches, workers, device):
        yield normalise(views.to(device, non_blocking=True))


def _cropped(
    images: ImageSet, preprocessing: Preprocessing, crops: Crops, batches: Rows, device: torch.device, workers: int
) -> Iterator[torch.Tensor]:
    """Training crops of each batch: cut from device memory, or cut by loader workers and flipped on the device."""
    normalise = Normalise(preprocessing)
    cuts = TwoViews(images, crops.recipe(), preprocessing.size, crops.seed, finished=False, count=1)
    if images.pixels is not None:
        held = resident(images, device)
        for items in batches:
            epoch, index = torch.tensor(items).T.contiguous()
            numbers = cuts.numbers(epoch.numpy(), index.numpy())
            yield normalise(cuts.of_pixels(held[to_device(index, device)], numbers)[0])
        return
    for views, index, substitute, numbers in loader(cuts, batches, workers, device):
        if (substitute >= 0).any():
            raise InputError(images.trouble_with(int(index[substitute >= 0][0])))
        yield normalise(cuts.finish(to_device(views, device), numbers.numpy())[0])


# Features


@torch.no_grad()
def extract(
    net: nn.Module,
    images: ImageSet,
    preprocessing: Preprocessing,
    device: torch.device,
    *,
    batch_size: int = 256,
    workers: int = 0,
    precision: str = "fp32",
    title: str = "features",
    tolerant: bool = False,
    crops: Crops | None = None,
) -> torch.Tensor:
    """Features of all images, (images, D) float32 on the CPU, in the data set's order, on every rank.

    Args:
        net: (N, 3, H, W) to (N, D), in evaluation mode.
        batch_size: images per step, over all processes.
        tolerant: put a grey image in the place of one that cannot be read.
        crops: training crops instead of the clean one.
    Raises:
        InputError: an image cannot be read; it names the file.
        RunFailed: a feature is not finite.
    """
    batches = _batches(images, batch_size, crops)
    views = pixels(images, preprocessing, crops, batches, device, workers, tolerant)
    everything = Filled(len(images))
    for step, mine in enumerate(_features(net, views, batches, device, precision, title)):
        everything.add(in_order(mine, batches.size(step)))
    return require_finite_features(everything.rows(), title)


@torch.no_grad()
def extract_share(
    net: nn.Module,
    images: ImageSet,
    preprocessing: Preprocessing,
    device: torch.device,
    *,
    batch_size: int = 256,
    workers: int = 0,
    precision: str = "fp32",
    title: str = "features",
    tolerant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `extract`, but each rank keeps only what it has made itself.

    Returns:
        (n, D) float32 on the CPU, and which images these are, (n,) int64, ascending.
    """
    batches = _batches(images, batch_size, None)
    views = pixels(images, preprocessing, None, batches, device, workers, tolerant)
    starts = range(0, len(images), batch_size)
    index = [share(range(start, start + batches.size(step))) for step, start in enumerate(starts)]
    mine = torch.tensor(list(chain.from_iterable(index)), dtype=torch.long)
    rows = Filled(len(mine))
    for features in _features(net, views, batches, device, precision, title):
        rows.add(features)
    return require_finite_features(rows.rows(), title), mine


def _batches(images: ImageSet, batch_size: int, crops: Crops | None) -> Batches:
    epoch = 0 if crops is None else crops.epoch
    return Batches(len(images), batch_size, 0, range(epoch, epoch + 1), shuffle=False, drop_last=False)


def _features(
    net: nn.Module,
    views: Iterator[torch.Tensor],
    batches: Batches,
    device: torch.device,
    precision: str,
    title: str,
) -> Iterator[torch.Tensor]:
    """This rank's rows of each batch, (n, D) float32 on the device."""
    with progress(title, len(batches), batches.batch_size) as advance:
        for step, batch in enumerate(views):
            with autocast(device, precision):
                mine = net(batch).flatten(1).float()[: batches.mine(step)]
            yield mine
            advance()


class Filled:
    """Rows on the CPU, added piece by piece to memory that is taken once; a GPU's arrive while it makes the next."""

    def __init__(self, count: int):
        self.count, self.done = count, 0
        self.room: torch.Tensor | None = None
        self.coming: Callable[[], torch.Tensor] | None = None

    def add(self, rows: torch.Tensor) -> None:
        """(n, D), the first of which says how wide they are."""
        arrives = to_host(rows)
        self._settle()
        self.coming = arrives

    def _settle(self) -> None:
        """Put the piece that is on its way in its place."""
        if self.coming is None:
            return
        rows, self.coming = self.coming(), None
        if self.room is None:
            self.room = torch.empty(self.count, *rows.shape[1:])
        self.room[self.done : self.done + len(rows)] = rows
        self.done += len(rows)

    def rows(self) -> torch.Tensor:
        """All of them, (count, D)."""
        self._settle()
        assert self.room is not None and self.done == self.count
        return self.room


def require_finite_features(features: torch.Tensor, title: str) -> torch.Tensor:
    """The features; raises RunFailed where one is not finite."""
    if not features.isfinite().all():
        raise RunFailed(f"{title}: the encoder gives features that are not finite; are its BN statistics damaged?")
    return features


def in_order(mine: torch.Tensor, batch: int) -> torch.Tensor:
    """All rows of a batch from the ranks' contiguous shares of it; see `data.loader.share`."""
    ranks = world_size()
    if ranks == 1:
        return mine
    bounds = [batch * r // ranks for r in range(ranks + 1)]
    longest = max(bounds[r + 1] - bounds[r] for r in range(ranks))
    assert len(mine) == bounds[rank() + 1] - bounds[rank()]
    padded = mine.new_zeros((longest, *mine.shape[1:]))
    padded[: len(mine)] = mine
    everyone = gather(padded)
    return torch.cat([everyone[r * longest : r * longest + bounds[r + 1] - bounds[r]] for r in range(ranks)])
