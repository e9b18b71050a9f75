"""Ground truth and detections side by side."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from moco_eval.data.boxes.samples import DetectionData, Sample, read_image
from moco_eval.detection.average_precision import Detections
from moco_eval.results.colours import Colour, colour_of
from moco_eval.runtime import files

SIDE = 400  # pixels that the longer side of each half may have
GAP = 6
TINT = 0.4  # how much of a mask's colour covers the image


def draw_pictures(
    data: DetectionData, detections: Sequence[Detections], folder: Path, count: int = 6, score: float = 0.3
) -> list[Path]:
    """Write PNGs of images spread over those of the test split that have an object, or over all where none has.

    Left is the truth, right what scores `score` or more. A class has the same colour everywhere. Difficult objects and
    crowds say so.

    Returns:
        Their paths, folder/<number>-<image>.png.
    """
    some = [index for index, sample in enumerate(data.test) if len(sample.labels)] or list(range(len(data.test)))
    chosen = np.linspace(0, len(some) - 1, num=min(count, len(some))).round().astype(int)
    paths = []
    for number, index in enumerate(some[place] for place in chosen):
        sample = data.test[index]
        path = folder / f"{number}-{Path(str(sample.image_id)).name}.png"
        with files.atomic(path) as temporary:
            _picture(sample, detections[index], data.classes, score).save(temporary, format="PNG")
        paths.append(path)
    return paths


def _picture(sample: Sample, detections: Detections, classes: Sequence[str], score: float) -> Image.Image:
    image = read_image(sample.path)
    scale = SIDE / max(image.size)
    small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    halves = [
        _draw(small, _truth(sample, classes), classes, image.size),
        _draw(small, _said(detections, classes, score), classes, image.size),
    ]
    both = Image.new("RGB", (2 * small.width + GAP, small.height), "white")
    for half, left in zip(halves, (0, small.width + GAP)):
        both.paste(half, (left, 0))
    return both


Thing = tuple[np.ndarray, int, str, Any, np.ndarray | None]  # box, label, text, mask, keypoints


def _truth(sample: Sample, classes: Sequence[str]) -> list[Thing]:
    things: list[Thing] = []
    for place, label in enumerate(sample.labels.tolist()):
        note = " (crowd)" if sample.crowd[place] else " (difficult)" if sample.difficult[place] else ""
        points = None if sample.keypoints is None else sample.keypoints[place]
        mask = sample.masks[place] if len(sample.masks) and not sample.crowd[place] else None  # a crowd's hides much
        things.append((sample.boxes[place], label, classes[label] + note, mask, points))
    return things


def _said(detections: Detections, classes: Sequence[str], score: float) -> list[Thing]:
    """What scores enough, the best last, so that it lies on top."""
    things: list[Thing] = []
    for place in np.flatnonzero(detections.scores >= score)[::-1].tolist():
        label = int(detections.labels[place])
        text = f"{classes[label]} {detections.scores[place]:.2f}"
        points = None if detections.keypoints is None else detections.keypoints[place]
        mask = None if detections.masks is None else detections.masks[place]
        things.append((detections.boxes[place], label, text, mask, points))
    return things


def _draw(small: Image.Image, things: list[Thing], classes: Sequence[str], size: tuple[int, int]) -> Image.Image:
    """Masks first, boxes and keypoints over them, words on top; `size` is that of the image on disk."""
    scale = small.width / size[0], small.height / size[1]
    image = small.copy()
    for _, label, _, mask, _ in things:
        if mask is not None:
            shape = Image.fromarray((decode(mask, size) * (255 * TINT)).astype(np.uint8))
            image.paste(colour_of(label, len(classes)), mask=shape.resize(small.size))
    draw = ImageDraw.Draw(image)
    for box, label, _, _, points in things:
        x0, y0, x1, y1 = (box * np.tile(scale, 2)).tolist()
        colour = colour_of(label, len(classes))
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=2)
        for x, y, seen in (points * (*scale, 1)).tolist() if points is not None else ():
            if seen > 0:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour, outline="white")
    for box, label, text, _, _ in things:
        _write(draw, (box[0] * scale[0], box[1] * scale[1]), text, colour_of(label, len(classes)))
    return image


def decode(mask: Any, size: tuple[int, int]) -> np.ndarray:
    """A mask as COCO writes it (polygons, or runs as numbers or text) as an (H, W) array of 0 and 1."""
    from pycocotools import mask as coco

    width, height = size
    if not isinstance(mask, dict):
        mask = coco.merge(coco.frPyObjects([np.asarray(polygon).tolist() for polygon in mask], height, width))
    elif isinstance(mask["counts"], list):
        mask = coco.frPyObjects(mask, height, width)
    return coco.decode(mask)


def _write(draw: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, colour: Colour) -> None:
    """Words on their colour above a corner, inside the image, dark on light colours and light on dark ones."""
    font = _font()
    _, top, width, bottom = font.getbbox(text)
    image_width, _ = draw.im.size
    x, y = max(min(corner[0], image_width - width - 4), 0), max(corner[1] - (bottom - top) - 3, 0)
    draw.rectangle((x, y, x + width + 3, y + bottom - top + 3), fill=colour)
    light = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 140
    draw.text((x + 2, y + 2 - top), text, fill="black" if light else "white", font=font)


@cache
def _font() -> ImageFont.FreeTypeFont:
    """matplotlib's own, which has Latin, Greek, Cyrillic and more."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size=11)
