"""The transforms of RGB images for images of bands: (C, H, W) float32 in the units in which they are stored."""

from dataclasses import dataclass

import torch
from torchvision import transforms
from torchvision.transforms import InterpolationMode, functional

from moco_eval.data.augment.steps import Grey, Jitter, Solarize, ViewRecipe
from moco_eval.preprocessing import Preprocessing

LARGEST = 2**26  # values that a resized image may have before it is cut
OF_RGB = (Jitter, Grey, Solarize)  # steps that need red, green and blue of 0 to 255


@dataclass(frozen=True)
class ResizedCentre:
    """torchvision's Resize and CenterCrop of a tensor; of a very oblong image its middle square alone is resized.

    Attributes:
        resize: pixels of the shorter side.
        size: pixels of both sides of the crop, at most `resize`.
        interpolation: bilinear or bicubic.
        antialias: as PIL has it.
    """

    resize: int
    size: int
    interpolation: str = "bilinear"
    antialias: bool = True

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        channels, height, width = image.shape
        short, long = sorted((height, width))
        if channels * self.resize * (self.resize * long // short) > LARGEST:
            image = functional.center_crop(image, [short, short])
        mode = InterpolationMode(self.interpolation)
        resized = functional.resize(image, [self.resize], mode, antialias=self.antialias)
        return functional.center_crop(resized, [self.size, self.size])


def clean_cut(preprocessing: Preprocessing) -> transforms.Compose:
    """Resize, centre crop."""
    sides = (preprocessing.resize, preprocessing.size, preprocessing.interpolation, preprocessing.antialias)
    return transforms.Compose([ResizedCentre(*sides)])


def crop_cut(preprocessing: Preprocessing, crop_scale: tuple[float, float], flip: bool) -> transforms.Compose:
    """Random-resized crop, horizontal flip."""
    mode = InterpolationMode(preprocessing.interpolation)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                preprocessing.size, crop_scale, interpolation=mode, antialias=preprocessing.antialias
            ),
            *([transforms.RandomHorizontalFlip()] if flip else []),
        ]
    )


def without_colour(recipe: ViewRecipe) -> ViewRecipe:
    """A recipe for images of bands: without the steps that need RGB of 8 bits; crops, flips and blur stay."""
    return ViewRecipe(tuple(step for step in recipe.steps if not isinstance(step, OF_RGB)))


def left_out(recipe: ViewRecipe) -> str:
    """The steps that images of bands are spared, in words; empty for none."""
    names = {Jitter: "colour jitter", Grey: "grey", Solarize: "solarisation"}
    return ", ".join(names[type(step)] for step in recipe.steps if isinstance(step, OF_RGB))
