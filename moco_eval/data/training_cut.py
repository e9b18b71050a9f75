"""What becomes of a training image in fine-tuning: crop and flip, then RandAugment and random erasing by timm."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torchvision import transforms

from moco_eval.config.classification import FinetuneAugmentation
from moco_eval.data.loader import Normalise, crop_cut
from moco_eval.errors import InputError
from moco_eval.preprocessing import BANDS, Preprocessing
from moco_eval.runtime.device import seeded_host


@dataclass(frozen=True)
class Cut:
    """Two parts of it.

    Attributes:
        in_workers: an image to a tensor, (C, size, size).
        on_device: a batch of those to what the network takes.
        floats: whether the workers' tensors are float32 rather than bytes.
    """

    in_workers: transforms.Compose
    on_device: Callable[[torch.Tensor], torch.Tensor]
    floats: bool = False


def training_cut(preprocessing: Preprocessing, augmentation: FinetuneAugmentation) -> Cut:
    """The augmentation of a recipe; erasing puts noise into normalised pixels, so that workers normalise before it.

    Raises:
        InputError: RandAugment on images that are not RGB.
    Source: timm 0.3.2's transforms_imagenet_train, as facebookresearch/deit@7e160fe calls it.
    """
    from timm.data.random_erasing import RandomErasing

    further = [rand_augment(preprocessing, augmentation)] if augmentation.rand_augment else []
    shape = (augmentation.crop_scale, augmentation.flip, augmentation.interpolation)
    cut, normalise = crop_cut(preprocessing, *shape, further), Normalise(preprocessing)
    if not augmentation.erasing:
        return Cut(cut, normalise)
    erase = ByTimm(RandomErasing(augmentation.erasing, mode="pixel", device="cpu"))
    return Cut(transforms.Compose([*cut.transforms, normalise, erase]), nothing_more, floats=True)


def rand_augment(preprocessing: Preprocessing, augmentation: FinetuneAugmentation) -> "ByTimm":
    """timm's RandAugment of operations that grow with their strength; what they uncover has the mean colour."""
    from timm.data.auto_augment import rand_augment_transform
    from timm.data.transforms import str_to_pil_interp

    assert augmentation.rand_augment
    if preprocessing.channels == BANDS:
        raise InputError(
            "augmentation.rand_augment is for RGB images, not for bands; add --set augmentation.rand_augment=null"
        )
    strength = augmentation.rand_augment
    settings: dict[str, Any] = {
        "translate_const": int(preprocessing.size * 0.45),
        "img_mean": tuple(min(255, round(255 * part)) for part in preprocessing.rgb()[0]),
        "interpolation": str_to_pil_interp(augmentation.interpolation),
    }
    name = f"rand-m{strength.magnitude}-mstd{strength.magnitude_std}-inc1"
    augment = rand_augment_transform(name, settings)
    for operation in augment.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = posterize
    return ByTimm(augment)


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's; where its strength leaves no bit, the black that older versions of Pillow gave: newer ones refuse it."""
    from timm.data.auto_augment import posterize as with_bits

    return with_bits(image, bits) if bits else Image.new(image.mode, image.size)


@dataclass(frozen=True)
class ByTimm:
    """A step of timm's, which draws from Python's, NumPy's and torch's generators; the draws follow from torch's."""

    step: Callable[[Any], Any]

    def __call__(self, image: Image.Image | torch.Tensor) -> Image.Image | torch.Tensor:
        with seeded_host(int(torch.randint(2**63 - 1, ()))):
            return self.step(image)


def nothing_more(images: torch.Tensor) -> torch.Tensor:
    """They are normalised already."""
    return images
