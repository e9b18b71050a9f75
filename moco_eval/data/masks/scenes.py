"""The built-in digit scenes with a mask each: 0 background, 1 to 10 the digits 0 to 9."""

from pathlib import Path

import numpy as np
from PIL import Image

from moco_eval.data.boxes.scenes import COUNT, DIGITS, SIDE, Scene, draw_scenes, written_once

CLASSES = ("background", *DIGITS)


def write_mask_scenes(
    folder: Path,
    seed: int = 0,
    train: int = 200,
    test: int = 60,
    side: tuple[int, int] = SIDE,
    count: tuple[int, int] = COUNT,
) -> Path:
    """Draw the scenes of `boxes.scenes` and write them as a mask-folder; the same arguments give the same bytes.

    Args:
        folder: made at once under its final name; if it already holds these scenes it is left as it is.
        side, count: least and most pixels of a digit, and digits of a scene.
    Raises:
        InputError: the folder holds something else, or cannot be written.
    """
    wanted = {"scenes": "digit-masks@2", "seed": seed, "train": train, "test": test}
    wanted |= {"side": list(side), "count": list(count)}

    def write(place: Path) -> None:
        for split, scenes in draw_scenes(seed, train, test, side, count).items():
            _write(place, split, scenes)

    return written_once(folder, wanted, write)


def _write(root: Path, split: str, scenes: list[Scene]) -> None:
    (root / split).mkdir()
    (root / f"{split}_masks").mkdir()
    for number, scene in enumerate(scenes):
        Image.fromarray(scene.canvas).convert("RGB").save(root / split / f"{number:04d}.png")
        Image.fromarray(mask_of(scene)).save(root / f"{split}_masks" / f"{number:04d}.png")


def mask_of(scene: Scene) -> np.ndarray:
    """The class of each pixel of a scene, (H, W) uint8."""
    mask = np.zeros(scene.canvas.shape, np.uint8)
    for ((x0, y0, x1, y1), digit), ink in zip(scene.objects, scene.inks):
        mask[y0:y1, x0:x1][ink] = digit + 1
    return mask
