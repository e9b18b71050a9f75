"""Predictions as PNGs with a palette; image, truth and prediction side by side."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from moco_eval.data.masks.samples import IGNORED, MaskSample, SegmentationData
from moco_eval.results.colours import colour_of
from moco_eval.runtime import files

SIDE = 400  # pixels that the longer side of each third may have
GAP = 6
TINT = 0.65  # how much of a class's colour covers the image
UNLABELLED = (255, 255, 255)


def save_prediction(classes: np.ndarray, count: int, path: Path) -> None:
    """Class numbers, (H, W) uint8, as a compressed PNG whose palette has a colour for each of `count` classes."""
    image = Image.fromarray(classes)
    image.putpalette(palette(count).tobytes())
    with files.atomic(path) as temporary:
        image.save(temporary, format="PNG", optimize=True)


def palette(count: int) -> np.ndarray:
    """(256, 3) uint8: the background, class 0, black where there are more than two classes; white what is ignored."""
    colours = np.zeros((256, 3), np.uint8)
    for label in range(1, count):
        colours[label] = colour_of(label, count)
    colours[IGNORED] = UNLABELLED
    return colours


def chosen(count: int, wanted: int = 6) -> list[int]:
    """Places of a few images, spread over all of them."""
    return sorted(set(np.linspace(0, count - 1, num=min(wanted, count)).round().astype(int).tolist()))


def draw_picture(data: SegmentationData, sample: MaskSample, prediction: np.ndarray, path: Path) -> None:
    """Write a PNG: the image, the truth and the prediction over it; what has no class is white in the truth."""
    image, mask = data.pair(sample)
    scale = min(1.0, SIDE / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small, colours = image.resize(size), palette(len(data.classes))
    thirds = [small, *(_tinted(small, classes, colours) for classes in (mask, prediction))]
    whole = Image.new("RGB", (3 * small.width + 2 * GAP, small.height), "white")
    for number, third in enumerate(thirds):
        whole.paste(third, (number * (small.width + GAP), 0))
    with files.atomic(path) as temporary:
        whole.save(temporary, format="PNG")


def _tinted(image: Image.Image, classes: np.ndarray, colours: np.ndarray) -> Image.Image:
    over = Image.fromarray(colours[classes]).resize(image.size, Image.Resampling.NEAREST)
    return Image.blend(image, over, TINT)


def names(samples: Sequence[MaskSample]) -> list[str]:
    """A file's name for each image: its own, which no two share."""
    own = [Path(sample.name).name for sample in samples]
    return own if len(set(own)) == len(own) else [f"{number}-{name}" for number, name in enumerate(own)]
