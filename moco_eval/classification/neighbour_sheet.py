"""A picture of test images and their nearest training images, each with its class and whether that is right."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from moco_eval.data.class_names import readable
from moco_eval.data.image_set import ImageSet
from moco_eval.runtime import files

SIDE, GAP, LABEL = 80, 8, 18  # of an image, between images, and the height of the words below one, in pixels
APART = 20  # between the test image and its neighbours
RIGHT, WRONG, WORDS = "#2f7d4f", "#b3372f", "#1d1f23"  # frames and marks; words of the test image
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def draw_neighbours(train: ImageSet, test: ImageSet, neighbours: torch.Tensor, path: Path, rows: int = 8) -> None:
    """Each row a test image and its five nearest training images.

    A neighbour that shares a class with the test image has a tick and a green frame, another a cross and a red one.

    Args:
        neighbours: training images of each test image, nearest first, (test images, k).
    """
    shown = np.linspace(0, len(test) - 1, min(rows, len(test))).astype(int)
    width, names = min(5, neighbours.shape[1]), readable(test.classes)
    size = (SIDE * (width + 1) + GAP * (width - 1) + APART + 2, (SIDE + LABEL + GAP) * len(shown) + 2)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.truetype(str(FONT), 11)
    for row, query in enumerate(shown.tolist()):
        y, truth = row * (SIDE + LABEL + GAP) + 1, _classes(test, query)
        _place(sheet, test.image(query), 1, y)
        _write(pen, font, _words(truth, names), 1, y, WORDS)
        for number in range(width):
            other = int(neighbours[query, number])
            theirs, x = _classes(train, other), 1 + SIDE + APART + number * (SIDE + GAP)
            colour, mark = (RIGHT, "\N{CHECK MARK}") if theirs & truth else (WRONG, "\N{MULTIPLICATION SIGN}")
            _place(sheet, train.image(other), x, y)
            pen.rectangle((x - 1, y - 1, x + SIDE, y + SIDE), outline=colour, width=2)
            _write(pen, font, f"{mark} {_words(theirs, names)}", x, y, colour)
    with files.atomic(path) as temporary:
        sheet.save(temporary, format="PNG")


def _classes(images: ImageSet, index: int) -> set[int]:
    assert images.labels is not None
    label = images.labels[index]
    return set(np.flatnonzero(label == 1).tolist()) if images.labels.ndim == 2 else {int(label)}


def _words(classes: set[int], names: tuple[str, ...]) -> str:
    return ", ".join(names[number] for number in sorted(classes))


def _place(sheet: Image.Image, image: Image.Image, x: int, y: int) -> None:
    """The whole image within its square."""
    scale = SIDE / max(image.size)
    small = image.resize(tuple(max(1, round(scale * side)) for side in image.size))
    sheet.paste(small, (x + (SIDE - small.width) // 2, y + (SIDE - small.height) // 2))


def _write(pen: ImageDraw.ImageDraw, font: Any, text: str, x: int, y: int, colour: str) -> None:
    """Below an image, no wider than it."""
    while len(text) > 1 and pen.textlength(text, font) > SIDE:
        text = text[:-2].rstrip() + "…"
    pen.text((x, y + SIDE + 3), text, fill=colour, font=font)
