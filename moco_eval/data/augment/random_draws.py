"""Random numbers that belong to an image, whoever draws them: a worker, the main process, any number of ranks."""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seed: int, epoch: np.ndarray, index: np.ndarray, view: int, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1) that depend on (seed, epoch, index, view) alone.

    Args:
        seed: of the run.
        epoch, index: of each image, (N,).
        view: 0 the query's, 1 the key's.
        count: numbers per image, D.
    Returns:
        (N, D) float64.
    Source: SplitMix64 (Steele, Lea and Flood 2014), one stream for each image; the stream's start is a hash by the
    same function.
    """
    state = np.zeros(len(index), dtype=np.uint64)
    for part in (np.full(len(index), seed), epoch, index, np.full(len(index), view)):
        state = _mix(state + part.astype(np.uint64) + GOLDEN)
    steps = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
    return (_mix(state[:, None] + steps) >> np.uint64(11)) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


CROP_DRAWS = 22


def crop_boxes(
    u: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """Random-resized crops: area uniform, log aspect ratio uniform, ten tries, then the middle of the image.

    Args:
        u: (N, CROP_DRAWS) uniform numbers.
        heights, widths: of the images in pixels, (N,).
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest width over height.
    Returns:
        (N, 4) int64: top, left, height, width in pixels.
    Source: torchvision.transforms.RandomResizedCrop.get_params.
    """
    H, W = heights[:, None], widths[:, None]
    area = H * W * (scale[0] + (scale[1] - scale[0]) * u[:, :10])
    low, high = np.log(ratio)
    aspect = np.exp(low + (high - low) * u[:, 10:20])
    width, height = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (width > 0) & (width <= W) & (height > 0) & (height <= H)
    first = fits.argmax(1)[:, None]
    height, width = (np.take_along_axis(tries, first, 1)[:, 0] for tries in (height, width))
    top, left = np.floor(u[:, 20] * (heights - height + 1)), np.floor(u[:, 21] * (widths - width + 1))
    boxes = np.stack([top, left, height, width], 1).astype(np.int64)
    for n in np.flatnonzero(~fits.any(1)):
        boxes[n] = _middle(int(heights[n]), int(widths[n]), ratio)
    return boxes


def _middle(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    """The largest crop in the middle whose aspect ratio is allowed."""
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w
