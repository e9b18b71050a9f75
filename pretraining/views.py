"""What the network sees: two views of each image, by the published PIL pipelines.

Order and ranges: facebookresearch/moco, main_moco.py and moco/loader.py; the CIFAR-10 demo notebook.
"""

import math
from dataclasses import dataclass

import torch
from PIL import Image, ImageFilter
from torch.utils.data import Dataset
from torchvision import transforms

from moco_eval.config import Views
from moco_eval.data.images import SMALL, ImageSet
from moco_eval.data.loader import draw_seed, drawing
from moco_eval.encoders.encoder import Preprocessing
from moco_eval.errors import InputError


class GaussianBlur:
    """PIL's Gaussian blur (box-approximated) with radius = sigma drawn uniformly from `sigma`, in pixels."""

    def __init__(self, sigma: tuple[float, float]):
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        low, high = self.sigma
        return image.filter(ImageFilter.GaussianBlur(radius=low + (high - low) * torch.rand(1).item()))


def _jitter(brightness: float, contrast: float, saturation: float, hue: float, p: float):
    return transforms.RandomApply([transforms.ColorJitter(brightness, contrast, saturation, hue)], p=p)


def recipe(views: Views) -> list:
    """The augmentations of a recipe in their published order, PIL image to PIL image.

    moco_v1: grey before an always-on strong jitter. moco_v2: jitter with probability 0.8, grey, blur.
    cifar10: small crops allowed, flip before the jitter, no blur. digits (ours): strokes keep their side, so no
    flip; slant and thickness vary instead.
    """
    if views.recipe == "moco_v1":
        return [
            transforms.RandomResizedCrop(views.size, scale=(0.2, 1.0)),
            transforms.RandomGrayscale(p=0.2),
            _jitter(0.4, 0.4, 0.4, 0.4, p=1.0),
            transforms.RandomHorizontalFlip(),
        ]
    if views.recipe == "moco_v2":
        return [
            transforms.RandomResizedCrop(views.size, scale=(0.2, 1.0)),
            _jitter(0.4, 0.4, 0.4, 0.1, p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([GaussianBlur((0.1, 2.0))], p=0.5),
            transforms.RandomHorizontalFlip(),
        ]
    if views.recipe == "cifar10":
        return [
            transforms.RandomResizedCrop(views.size),
            transforms.RandomHorizontalFlip(p=0.5),
            _jitter(0.4, 0.4, 0.4, 0.1, p=0.8),
            transforms.RandomGrayscale(p=0.2),
        ]
    return [
        transforms.RandomAffine(degrees=15, shear=15, interpolation=transforms.InterpolationMode.BILINEAR),
        transforms.RandomResizedCrop(views.size, scale=(0.5, 1.0), ratio=(0.8, 1.25)),
        transforms.ColorJitter(brightness=0.4, contrast=0.4),
        transforms.RandomApply([GaussianBlur((0.1, 2.0))], p=0.3),
    ]


def preprocessing(views: Views) -> Preprocessing:
    """What a network trained on these views expects in evaluation; written into its checkpoints."""
    if views.recipe in SMALL:
        small = SMALL[views.recipe]
        return Preprocessing(views.size, views.size, small.mean, small.std)
    return Preprocessing(views.size, math.ceil(views.size * 256 / 224))


class Normalise:
    """Views as they travel, uint8, to what an encoder takes: 0..1, less the mean, by the standard deviation.

    Bit for bit ToTensor and Normalize, but on the training device.
    """

    def __init__(self, views: Views):
        expects = preprocessing(views)
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (expects.mean, expects.std))

    def __call__(self, view: torch.Tensor) -> torch.Tensor:
        if self.mean.device != view.device:
            self.mean, self.std = self.mean.to(view.device), self.std.to(view.device)
        return view.float().div_(255).sub_(self.mean).div_(self.std)


@dataclass
class Batch:
    """This process's share of a batch: two views of each image, (N, 3, H, W) uint8, and its index, (N,)."""

    view_q: torch.Tensor
    view_k: torch.Tensor
    index: torch.Tensor

    def parts(self, number: int) -> list["Batch"]:
        """Equal parts, for gradient accumulation."""
        columns = (column.chunk(number) for column in (self.view_q, self.view_k, self.index))
        return [Batch(*part) for part in zip(*columns)]


@dataclass
class TwoViews(Dataset):
    """(view_q, view_k, index, substitute): two independent draws of the recipe for an (epoch, index) item.

    The draw depends on (seed, epoch, index) alone. An unreadable image is replaced by the next readable one, so
    that every rank keeps its share; `substitute` is then the index that took its place, otherwise -1.
    `both`: otherwise view_q alone is drawn and serves as view_k, which the memory bank does not look at.
    """

    images: ImageSet
    views: Views
    seed: int
    both: bool = True

    def __post_init__(self) -> None:
        self.transform = transforms.Compose([*recipe(self.views), transforms.PILToTensor()])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        epoch, index = item
        image, substitute = self._readable(index)
        with drawing(draw_seed(self.seed, epoch, index)):
            view_q = self.transform(image)
            return view_q, self.transform(image) if self.both else view_q, index, substitute

    def _readable(self, index: int) -> tuple[Image.Image, int]:
        for step in range(len(self)):
            other = (index + step) % len(self)
            try:
                return self.images.image(other), (other if step else -1)
            except InputError:
                continue
        raise InputError(f"none of the {len(self)} images of {self.images.name} can be read")
