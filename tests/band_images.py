"""Sets of images of many bands, drawn by the tests."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import tifffile


def tiff(path: Path | BinaryIO, image: np.ndarray, planar: bool = False, **options) -> None:
    """(C, H, W) as the samples of one page, interleaved or planar."""
    if len(image) == 1:
        layout, image = {}, image[0]
    elif planar:
        layout = {"planarconfig": "separate"}
    else:
        layout, image = {"planarconfig": "contig"}, image.transpose(1, 2, 0)
    tifffile.imwrite(path, image, photometric="minisblack", **layout, **options)


def pixels(bands: int, side: int = 24, seed: int = 0, bright: int = 0) -> np.ndarray:
    """(bands, side, side) float64, about 1000, every other band `bright` more."""
    draw = np.random.default_rng((seed, bands))
    levels = draw.uniform(500, 1500, (bands, 1, 1)) + bright * (np.arange(bands) % 2)[:, None, None]
    return (levels + draw.normal(0, 150, (bands, side, side))).clip(0)


def save(path: Path, image: np.ndarray, number: int = 0) -> None:
    """(C, H, W) as TIFF or .npy, in a layout that changes with `number`."""
    if path.suffix == ".npy":
        np.save(path, image if number % 2 else image.transpose(1, 2, 0))
    elif number % 2:
        tiff(path, image, planar=True)
    else:
        tiff(path, image, compression="zlib", predictor=2)


def draw_set(root: Path, bands: int, suffix: str, train: int = 20, test: int = 8, dtype: type = np.uint16) -> Path:
    """An imagefolder of two classes, which differ in every other band."""
    for split, count in (("train", train), ("val", test)):
        for number in range(count):
            name = ("field", "wood")[number % 2]
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            image = pixels(bands, seed=number + 1000 * (split == "val"), bright=900 * (number % 2))
            save(folder / f"{number}{suffix}", image.astype(dtype), number // 2)
    return root
