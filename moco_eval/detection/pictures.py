"""Ground truth and detections side by side."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from moco_eval import files
from moco_eval.data.boxes import DetectionData, Sample, read_image
from moco_eval.detection.average_precision import Detections

TRUTH, FOUND = (40, 200, 80), (255, 150, 30)
WIDTH = 320  # pixels of each half


def draw_pictures(
    data: DetectionData, found: Sequence[Detections], folder: Path, count: int = 6, score: float = 0.3
) -> list[Path]:
    """Write PNGs of images spread over the test split: left the truth, right what scores `score` or more.

    Returns:
        Their paths, folder/<number>-<image>.png.
    """
    chosen = np.unique(np.linspace(0, len(data.test) - 1, num=min(count, len(data.test))).round().astype(int))
    paths = []
    for number, index in enumerate(chosen.tolist()):
        sample = data.test[index]
        path = folder / f"{number}-{Path(str(sample.image_id)).name}.png"
        with files.atomic(path) as temporary:
            _picture(sample, found[index], data.classes, score).save(temporary, format="PNG")
        paths.append(path)
    return paths


def _picture(sample: Sample, detections: Detections, classes: Sequence[str], score: float) -> Image.Image:
    image = read_image(sample.path)
    scale = WIDTH / image.width
    image = image.resize((WIDTH, max(1, round(image.height * scale))))
    left, right = image.copy(), image
    for box, label in zip(sample.boxes * scale, sample.labels):
        _box(left, box, classes[label], TRUTH)
    for place in np.flatnonzero(detections.scores >= score)[::-1]:
        words = f"{classes[detections.labels[place]]} {detections.scores[place]:.2f}"
        _box(right, detections.boxes[place] * scale, words, FOUND)
    both = Image.new("RGB", (2 * WIDTH + 4, image.height), "white")
    both.paste(left, (0, 0))
    both.paste(right, (WIDTH + 4, 0))
    return both


def _box(image: Image.Image, box: np.ndarray, words: str, colour: tuple[int, int, int]) -> None:
    draw = ImageDraw.Draw(image)
    x0, y0, x1, y1 = box.tolist()
    draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour, width=2)
    words = words.encode("latin-1", "replace").decode("latin-1")
    corner = (max(x0, 0), max(y0 - 11, 0))
    draw.rectangle(draw.textbbox(corner, words), fill=colour)
    draw.text(corner, words, fill="black")
