"""Augmentations of whole batches, on any device, that give the pixels PIL gives.

Images are uint8, (N, 3, H, W), before and after each operation, rounded as PIL rounds; parameters are one per image,
(N,) float32. Tolerances against PIL, per recipe and operation: tests/data/test_augment.py and docs/protocols/views.md.
Flip and blur also take bands, (N, C, H, W) float32, and round nothing of them.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, pad


def luma(images: Tensor) -> Tensor:
    """PIL's grey (ITU-R 601-2 in 16-bit fixed point), whole numbers as float32, (N, H, W)."""
    red, green, blue = images.float().unbind(1)
    sums = (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471)  # below 2^24, so exact
    return sums.add_(32768).mul_(1 / 65536).floor_()


def _bytes(values: Tensor) -> Tensor:
    """Cut to whole numbers, 0 to 255. By way of int32: a CPU casts floats straight to uint8 ten times slower."""
    return values.to(torch.int32).to(torch.uint8)


def _blend(images: Tensor, reference: Tensor, factor: Tensor) -> Tensor:
    """reference + factor (image - reference), clipped and cut to whole numbers: PIL's Image.blend."""
    mixed = images.float().sub_(reference).mul_(factor.view(-1, 1, 1, 1)).add_(reference)
    return _bytes(mixed.clamp_(0, 255))


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Away from or towards black; factor 1 leaves an image as it is. PIL ImageEnhance.Brightness."""
    return _bytes(images.float().mul_(factor.view(-1, 1, 1, 1)).clamp_(0, 255))


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Away from or towards the image's mean grey. PIL ImageEnhance.Contrast."""
    mean = luma(images).mean(dim=(1, 2)).add_(0.5).floor_()
    return _blend(images, mean.view(-1, 1, 1, 1), factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Away from or towards each pixel's grey. PIL ImageEnhance.Color."""
    return _blend(images, luma(images)[:, None], factor)


def blend(images: Tensor, factor: Tensor, is_contrast: Tensor, is_saturation: Tensor) -> Tensor:
    """Contrast or saturation where it is 1 instead of 0, brightness elsewhere; to the bit the pixels of each alone."""
    grey = luma(images)
    mean = grey.mean(dim=(1, 2), keepdim=True).add_(0.5).floor_()
    reference = grey.mul_(is_saturation.view(-1, 1, 1)).add_(mean.mul_(is_contrast.view(-1, 1, 1)))
    return _blend(images, reference[:, None], factor)


def hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the colour circle by `shift` turns, -0.5 to 0.5, in 8-bit HSV. torchvision adjust_hue on PIL images."""
    red, green, blue = images.float().unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    spread = value - torch.minimum(torch.minimum(red, green), blue)
    per_spread = 1 / spread.clamp(min=1)
    is_red, is_green = _is_zero(value - red), _is_zero(value - green)
    sixths = (red - green).mul_(per_spread).add_(4)  # of the circle; blue is largest
    sixths = sixths.mul_(1 - is_green).addcmul_(is_green, (blue - red).mul_(per_spread).add_(2))
    sixths = sixths.mul_(1 - is_red).addcmul_(is_red, (green - blue).mul_(per_spread))
    sixths.add_((sixths * -256).clamp_(0, 1), alpha=6)  # magenta is below zero
    turned = sixths.mul_(255 / 6).floor_().add_((shift * 255).trunc_().remainder_(256).view(-1, 1, 1))
    turned.sub_((turned - 255).clamp_(0, 1), alpha=256)
    sixths = turned.mul_(6 / 255)
    fall = spread.div_(value.clamp(min=1)).mul_(255).floor_().mul_(value).mul_(1 / 255)  # value times 8-bit saturation
    channels = (
        (sixths - 3).abs_().sub_(1).clamp_(0, 1),
        (sixths - 2).abs_().neg_().add_(2).clamp_(0, 1),
        (sixths - 4).abs_().neg_().add_(2).clamp_(0, 1),
    )
    base = value.sub_(fall).add_(0.5)
    return torch.stack([_bytes(channel.mul_(fall).add_(base)) for channel in channels], dim=1)


def _is_zero(whole: Tensor) -> Tensor:
    """1.0 where a whole number that is not negative is zero, else 0.0; comparisons are slow on a CPU."""
    return (1 - whole).clamp_(min=0)


def grey(images: Tensor) -> Tensor:
    """Three equal channels of grey. torchvision RandomGrayscale."""
    return _bytes(luma(images))[:, None].expand_as(images).contiguous()


def solarize(images: Tensor) -> Tensor:
    """Values of 128 and above inverted. PIL ImageOps.solarize at its default threshold."""
    return torch.where(images >= 128, 255 - images, images)


def flip(images: Tensor) -> Tensor:
    """Left and right exchanged."""
    return images.flip(-1)


def blur(images: Tensor, sigma: Tensor, reach: int) -> Tensor:
    """PIL's GaussianBlur of radius sigma, pixels: three extended box filters along each axis, 8 bits in between.

    Args:
        reach: pixels on either side that the boxes touch, at least `box_reach` of the largest sigma.
    Source: Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box filtering".
    """
    variance = sigma * sigma / 3
    inner = ((12 * variance + 1).sqrt() - 1).div(2).floor()
    edge = (2 * inner + 1) * (inner * (inner + 1) - 3 * variance) / (6 * (variance - (inner + 1) ** 2))
    offsets = torch.arange(reach + 1, device=sigma.device)
    inside, last = offsets <= inner[:, None], offsets == inner[:, None] + 1
    weights = torch.where(inside, 1.0, torch.where(last, edge[:, None], 0.0)) / (2 * (inner + edge) + 1)[:, None]
    weights = weights.view(-1, reach + 1, 1, 1, 1)
    bands, blurred = images.is_floating_point(), images.float()
    for axis in (-1, -2):
        for _ in range(3):
            blurred = _box(blurred, weights, axis) if bands else _box(blurred, weights, axis).round_()
    return blurred if bands else _bytes(blurred)


def box_reach(sigma: float) -> int:
    """How many pixels on either side one of the three boxes of a Gaussian blur touches."""
    return int((math.sqrt(4 * sigma * sigma + 1) - 1) / 2) + 1


def _box(images: Tensor, weights: Tensor, axis: int) -> Tensor:
    """One symmetric filter along an axis, weights (N, reach + 1, ...) from the middle out; borders are repeated."""
    reach, size = weights.shape[1] - 1, images.shape[axis]
    padded = pad(images, (reach, reach, 0, 0) if axis == -1 else (0, 0, reach, reach), mode="replicate")
    result = images * weights[:, 0]
    for off in range(1, reach + 1):
        pair = padded.narrow(axis, reach - off, size) + padded.narrow(axis, reach + off, size)
        result.addcmul_(pair, weights[:, off])
    return result


def crop(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut a box out of each image and resize it, bilinear with antialiasing, across then down, 8 bits in between.

    Args:
        boxes: (N, 4): top, left, height, width in pixels.
        size: of the square result, in pixels.
    Source: PIL Image.resize of a cropped image; both passes are products with a matrix per image.
    """
    top, left, height, width = boxes.float().unbind(1)
    across, down = (
        resampling(*axis, images.shape[dim], size) for axis, dim in (((left, width), 3), ((top, height), 2))
    )
    rows = (images.float() @ across[:, None].mT).add_(0.5).floor_()  # (N, 3, H, size)
    return _bytes((down[:, None] @ rows).add_(0.5))


def resampling(start: Tensor, length: Tensor, pixels: int, size: int) -> Tensor:
    """The weights of each input pixel in each output pixel along one axis, (N, size, pixels); rows sum to one.

    A triangle as wide as the larger of an input and an output pixel, inside start .. start + length.
    """
    place = torch.arange(pixels, device=start.device) + 0.5
    scale = (length / size).view(-1, 1, 1)
    centre = start.view(-1, 1, 1) + (torch.arange(size, device=start.device).view(-1, 1) + 0.5) * scale
    weights = (1 - (place - centre).abs() / scale.clamp(min=1)).clamp_(min=0)
    inside = (place > start.view(-1, 1, 1)) & (place < (start + length).view(-1, 1, 1))
    weights = weights * inside
    return weights / weights.sum(dim=2, keepdim=True)


def affine(images: Tensor, angle: Tensor, shear: Tensor) -> Tensor:
    """Rotate by `angle` and slant by `shear`, both in degrees, about the middle; bilinear, black outside.

    Source: torchvision.transforms.functional.affine (its inverse matrix, no translation, no scale).
    """
    turn, slant = torch.deg2rad(angle), torch.deg2rad(shear).tan()
    cos, sin, zero = turn.cos(), turn.sin(), torch.zeros_like(turn)
    tall = images.shape[2] / images.shape[3]  # the grid measures each axis in halves of the image
    across, down = (cos - slant * sin, (sin + slant * cos) * tall, zero), (-sin / tall, cos, zero)
    inverse = torch.stack([*across, *down], dim=1).view(-1, 2, 3)
    grid = affine_grid(inverse, list(images.shape), align_corners=False)
    inside = (grid.abs() < 1).all(dim=-1)[:, None]
    sampled = grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return _bytes(sampled * inside)
