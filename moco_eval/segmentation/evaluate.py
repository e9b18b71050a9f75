"""A segmentation on test images: whole or in windows, at their own size, counted pixel by pixel.

Source: mmsegmentation 0.x, EncoderDecoder.slide_inference and whole_inference, read, not copied.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from moco_eval.config.segmentation import SegmentConfig
from moco_eval.data.masks.samples import MaskSample, SegmentationData
from moco_eval.runtime import collectives, console, rank
from moco_eval.runtime.device import autocast, to_device
from moco_eval.runtime.stop import Stop
from moco_eval.segmentation import inputs
from moco_eval.segmentation.networks import Segmenter
from moco_eval.segmentation.scores import confusion, counts_of

Keep = Callable[[int, np.ndarray], None]  # takes the place of a test image and its classes, (H, W) uint8


@torch.no_grad()
def counts_of_heads(
    model: Segmenter,
    data: SegmentationData,
    samples: Sequence[MaskSample],
    recipe: SegmentConfig,
    device: torch.device,
    stop: Stop,
    heads: Sequence[int],
    keep: Keep | None = None,
) -> np.ndarray:
    """Pixels that prediction and truth share, of the prediction and of the truth, (heads, N, 3, C) int64.

    Collective: every process takes its share of the images.

    Args:
        heads: of the model.
        keep: is given the first head's answers.
    """
    model.eval()
    first, world = rank.rank(), rank.world_size()
    mine = range(first, len(samples), world)
    images = inputs.test_images(data, [samples[index] for index in mine], recipe)
    rounds = range(-(-len(samples) // world))
    counts = torch.zeros(len(heads), len(samples), 3, len(data.classes), dtype=torch.int64, device=device)
    for number, image in console.track(zip_longest(rounds, images), "evaluate", len(rounds), world):
        if stop.look(recipe.schedule.iterations + number, False)[0]:
            stop.check("the trained segmentation is saved; run the same command to go on")
        if image is None:
            continue
        pixels, mask = to_device(image[0], device), image[1].numpy()
        for row, head in enumerate(heads):
            prediction = classes_of(model, pixels, (mask.shape[0], mask.shape[1]), recipe, head)
            matrix = confusion(prediction, mask, len(data.classes))
            counts[row, mine[number]] = torch.from_numpy(counts_of(matrix)).to(device)
            if keep and row == 0:
                keep(mine[number], prediction)
    return collectives.all_sum(counts).cpu().numpy()


def classes_of(model: Segmenter, pixels: Tensor, size: tuple[int, int], recipe: SegmentConfig, head: int) -> np.ndarray:
    """The class of each pixel of an image on disk, (H, W) uint8.

    Args:
        pixels: the image as the model sees it, (3, h, w) uint8.
        size: height and width on disk.
    """
    with autocast(pixels.device, recipe.precision):
        scores = window_scores(model, pixels, recipe, head) if recipe.test.window else model.scores(pixels[None], head)
    if scores.shape[2:] != size:
        scores = F.interpolate(scores, size, mode="bilinear", align_corners=recipe.align_corners)
    return scores[0].argmax(dim=0).to(torch.uint8).cpu().numpy()


def window_scores(model: Segmenter, pixels: Tensor, recipe: SegmentConfig, head: int) -> Tensor:
    """Scores of an image from windows that overlap, their mean where several cover a pixel, (1, C, h, w) fp32.

    A side that is shorter than a window is filled up with the mean colour, and cut again.
    """
    assert recipe.test.window and recipe.test.stride
    window, (height, width) = recipe.test.window, pixels.shape[1:]
    whole = model.mean.round().to(torch.uint8).expand(3, max(height, window), max(width, window)).clone()
    whole[:, :height, :width] = pixels
    total = count = None
    for top, left in windows((whole.shape[1], whole.shape[2]), window, recipe.test.stride):
        part = whole[:, top : top + window, left : left + window]
        scores = model.scores(part[None], head)[0]
        if total is None or count is None:
            total = scores.new_zeros(len(scores), *whole.shape[1:])
            count = scores.new_zeros(whole.shape[1:])
        total[:, top : top + window, left : left + window] += scores
        count[top : top + window, left : left + window] += 1
    assert total is not None and count is not None
    return (total / count)[None, :, :height, :width]


def windows(size: tuple[int, int], window: int, stride: int) -> Iterator[tuple[int, int]]:
    """Top and left of the windows that cover an image; the last of a row or column ends with the image."""
    for top in _starts(size[0], window, stride):
        for left in _starts(size[1], window, stride):
            yield top, left


def _starts(side: int, window: int, stride: int) -> list[int]:
    """Of the windows along a side that is no shorter than one."""
    count = -(-(side - window) // stride) + 1
    return [min(number * stride, side - window) for number in range(count)]
