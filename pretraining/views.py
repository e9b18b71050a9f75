"""What the network sees: two views of each image.

Order and ranges: facebookresearch/moco, main_moco.py and moco/loader.py; the CIFAR-10 demo notebook.
"""

import math
from dataclasses import dataclass, replace

import torch

from moco_eval.config.pretrain import PretrainConfig, Views
from moco_eval.data.augment.steps import Affine, Blur, Crop, Flip, Grey, Jitter, Solarize, ViewRecipe
from moco_eval.data.augment.two_views import TwoViews
from moco_eval.data.band_transforms import without_colour
from moco_eval.data.catalogue import SMALL
from moco_eval.data.image_set import ImageSet
from moco_eval.preprocessing import Preprocessing

# moco_v1: grey before an always-on strong jitter. moco_v2: jitter with probability 0.8, grey, blur. cifar10: small
# crops allowed, flip before the jitter, no blur. digits (ours): strokes keep their side, so no flip; slant and
# thickness vary instead. moco_v3: BYOL's two recipes, the first view always blurred, the second seldom, and solarised.
_BYOL = (Crop((0.08, 1.0)), Jitter(0.4, 0.4, 0.2, 0.1, p=0.8), Grey(0.2))
RECIPES = {
    "moco_v1": ViewRecipe((Crop((0.2, 1.0)), Grey(0.2), Jitter(0.4, 0.4, 0.4, 0.4), Flip())),
    "moco_v2": ViewRecipe(
        (Crop((0.2, 1.0)), Jitter(0.4, 0.4, 0.4, 0.1, p=0.8), Grey(0.2), Blur((0.1, 2.0), p=0.5), Flip())
    ),
    "moco_v3": ViewRecipe((*_BYOL, Blur((0.1, 2.0), p=1.0), Solarize(0.0), Flip())),
    "cifar10": ViewRecipe((Crop((0.08, 1.0)), Flip(), Jitter(0.4, 0.4, 0.4, 0.1, p=0.8), Grey(0.2))),
    "digits": ViewRecipe(
        (Affine(15, 15), Crop((0.5, 1.0), (0.8, 1.25)), Jitter(0.4, 0.4, 0, 0), Blur((0.1, 2.0), p=0.3))
    ),
}
SECOND = {"moco_v3": ViewRecipe((*_BYOL, Blur((0.1, 2.0), p=0.1), Solarize(0.2), Flip()))}  # where it is another


def recipes(views: Views) -> tuple[ViewRecipe, ViewRecipe]:
    """Those of the first and of the second view, with the smallest crop that the config wants."""
    first = RECIPES[views.recipe]
    pair = first, SECOND.get(views.recipe, first)
    if views.crop_min is None:
        return pair
    crops = lambda step: replace(step, scale=(views.crop_min, 1.0)) if isinstance(step, Crop) else step  # noqa: E731
    first, second = (ViewRecipe(tuple(map(crops, recipe.steps))) for recipe in pair)
    return first, second


def preprocessing(views: Views, images: ImageSet | None = None) -> Preprocessing:
    """What a network trained on these views expects in evaluation; written into its checkpoints.

    Args:
        images: trained on; of bands it holds their mean and standard deviation.
    """
    if images and images.bands:
        sides = preprocessing(views)
        return images.bands.preprocessing(sides.size, sides.resize)
    if views.recipe in SMALL:
        small = SMALL[views.recipe]
        return Preprocessing(views.size, views.size, small.mean, small.std)
    return Preprocessing(views.size, math.ceil(views.size * 256 / 224))


@dataclass
class Batch:
    """This process's share of a batch: two views of each image, (N, 3, H, W) uint8; its index, (N,), on any device.

    Views of bands are (N, C, H, W) float32.
    """

    view_q: torch.Tensor
    view_k: torch.Tensor
    index: torch.Tensor

    def parts(self, number: int) -> list["Batch"]:
        """Equal parts, for gradient accumulation."""
        columns = (column.chunk(number) for column in (self.view_q, self.view_k, self.index))
        return [Batch(*part) for part in zip(*columns)]


def two_views(images: ImageSet, config: PretrainConfig, finished: bool = True) -> TwoViews:
    """The views of a config; the memory bank looks at one alone."""
    (first, second), backend, size = recipes(config.views), config.views.backend, config.views.size
    count = 1 if config.mechanism == "memory_bank" else 2
    if images.bands:
        first, second = without_colour(first), without_colour(second)
    other = second if second != first else None
    return TwoViews(images, first, size, config.seed, backend == "reference", finished, count, other)
