"""Photos to views, in a loader worker: decoded once, both crops cut, 8 bits handed over."""

import numpy as np
import simplejpeg
import torch
from torch.nn.functional import interpolate

from moco_eval import limits
from moco_eval.data.image_set import ImageSet, decode_bytes
from moco_eval.data.map_style import MapStyle
from moco_eval.data.pixels import pixels_in_scans

LARGEST = 2**26  # pixels; PIL, which decides about larger ones, refuses from 2.7 times as many


def photo(images: ImageSet, index: int) -> torch.Tensor:
    """An image as 8-bit RGB, (3, H, W), the pixels PIL gives; raises InputError naming what cannot be read.

    Of bands, (C, H, W) float32, as they are stored.

    Plain JPEG files by libjpeg-turbo, which needs two thirds of PIL's time for the same pixels; whatever it does not
    take (CMYK, PNG, damaged files) by PIL, which also says what is wrong with it.
    """
    if images.bands:
        return torch.from_numpy(images.values(index))
    if isinstance(images.files, MapStyle):
        return torch.from_numpy(np.array(images.image(index))).permute(2, 0, 1)
    data = images.read(index)
    if data[:3] == b"\xff\xd8\xff":
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            few_scans = limits.allows("scans", pixels_in_scans(data, height * width))
            if colours in ("YCbCr", "RGB", "Gray") and height * width < LARGEST and few_scans:
                return torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)
        except (ValueError, MemoryError):
            pass  # truncated or damaged: PIL says how
    image = decode_bytes(data, images.name_of(index))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def cut(image: torch.Tensor, box: np.ndarray, size: int) -> torch.Tensor:
    """A box (top, left, height, width; pixels) of (C, H, W), resized to (C, size, size), bilinear, antialiased."""
    top, left, height, width = box.tolist()
    part = image[None, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
    return interpolate(part, (size, size), mode="bilinear", antialias=True)[0]
