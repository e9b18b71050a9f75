"""Photos to views, in a loader worker: decoded once, both crops cut, 8 bits handed over."""

import numpy as np
import torch
from torch.nn.functional import interpolate

from moco_eval.data.image_set import ImageSet


def photo(images: ImageSet, index: int) -> torch.Tensor:
    """An image as 8-bit RGB, (3, H, W), the pixels PIL gives; raises InputError naming what cannot be read.

    Of bands, (C, H, W) float32, as they are stored.
    """
    if images.bands:
        return torch.from_numpy(images.values(index))
    return torch.from_numpy(images.array(index)).permute(2, 0, 1)


def cut(image: torch.Tensor, box: np.ndarray, size: int) -> torch.Tensor:
    """A box (top, left, height, width; pixels) of (C, H, W), resized to (C, size, size), bilinear, antialiased."""
    top, left, height, width = box.tolist()
    part = image[None, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
    return interpolate(part, (size, size), mode="bilinear", antialias=True)[0]
