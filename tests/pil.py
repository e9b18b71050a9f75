"""What the published pipeline does to one PIL image when its parameters are given: the naive reference of the steps."""

from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as tv

from moco_eval.data.augment.steps import Affine, Blur, Crop, Flip, Grey, Jitter, Solarize, ViewRecipe, ViewStep


def photos(size: tuple[int, int], count: int) -> list[Image.Image]:
    """Pieces of the two real photos that scikit-learn ships, of width x height pixels."""
    from sklearn.datasets import load_sample_image

    both = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    random = np.random.default_rng(0)
    pieces = []
    for i in range(count):
        photo, zoom = both[i % 2], random.uniform(0.4, 1)
        width, height = (int(side * zoom) for side in photo.size)
        left, top = (int(random.uniform(0, whole - part)) for whole, part in zip(photo.size, (width, height)))
        pieces.append(photo.crop((left, top, left + width, top + height)).resize(size))
    return pieces


def tensor(images: list[Image.Image]) -> torch.Tensor:
    """(N, 3, H, W) uint8."""
    return torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2).contiguous()


def view(recipe: ViewRecipe, image: Image.Image, u: np.ndarray, size: int) -> Image.Image:
    """One view by PIL, with the parameters that the numbers (D,) stand for."""
    start = 0
    for step in recipe.steps:
        image = apply(step, image, u[None, start : start + step.draws], size)
        start += step.draws
    return image


def apply(step: ViewStep, image: Image.Image, u: np.ndarray, size: int) -> Image.Image:
    if isinstance(step, Crop):
        top, left, height, width = step.boxes(u, np.array([image.height]), np.array([image.width]))[0].tolist()
        return tv.resized_crop(image, top, left, height, width, [size, size])
    if isinstance(step, Affine):
        angle, shear = (float(one[0]) for one in step.angles(u))
        bilinear = tv.InterpolationMode.BILINEAR
        return tv.affine(image, angle, [0, 0], 1.0, [shear, 0.0], interpolation=bilinear)
    if u[0, 0] >= step.p:
        return image
    if isinstance(step, Jitter):
        return jitter(step, image, u)
    if isinstance(step, Blur):
        return image.filter(ImageFilter.GaussianBlur(radius=float(step.sigmas(u)[0])))
    plain: dict[type, Callable] = {
        Flip: ImageOps.mirror,
        Grey: lambda image: tv.rgb_to_grayscale(image, 3),
        Solarize: ImageOps.solarize,
    }
    return plain[type(step)](image)


def jitter(step: Jitter, image: Image.Image, u: np.ndarray) -> Image.Image:
    operations = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    spans = (step.brightness, step.contrast, step.saturation, step.hue)
    for i in step.order(u)[0]:
        if spans[i]:
            image = operations[i](image, float(step.factors(u)[0, i]))
    return image


def changed_by_a_tenth(step: ViewStep) -> dict[str, ViewStep]:
    """The step with one range changed by a tenth, by the range's name."""
    changed = {}
    for name in (field.name for field in fields(step) if getattr(step, field.name)):
        before = getattr(step, name)
        if isinstance(before, tuple):
            tenth = (before[1] - before[0]) / 10
            after = (before[0] + tenth, before[1]) if name == "scale" else (before[0], before[1] - tenth)
        else:
            after = before * 0.9 if before == 1 else before * 1.1
        changed[name] = replace(step, **{name: after})
    return changed
