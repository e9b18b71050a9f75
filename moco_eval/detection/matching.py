"""Boxes against boxes: which object a box answers for, which boxes are trained on, and one box told from another.

Source: facebookresearch/detectron2@02b5c4e, modeling/matcher.py, sampling.py and box_regression.py.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor
from torchvision.ops import box_iou

LARGEST_GROWTH = math.log(1000 / 16)  # of a side, against overflow: 16 pixels to 1000


def match(
    objects: Tensor, boxes: Tensor, background: float, foreground: float, closest: bool = False
) -> tuple[Tensor, Tensor]:
    """The object that each box overlaps most, (N,), and what the box is: 1 foreground, 0 background, -1 neither, (N,).

    Args:
        objects: (M, 4), M may be 0.
        boxes: (N, 4).
        background, foreground: IoU below which, and from which on.
        closest: the boxes that overlap an object more than all others do are foreground too, however little that is.
    """
    if len(objects) == 0:
        nothing = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        return nothing, nothing.clone()
    iou = box_iou(objects, boxes)
    best, matched = iou.max(dim=0)
    kind = torch.full_like(matched, -1)
    kind[best < background] = 0
    kind[best >= foreground] = 1
    if closest:
        kind[(iou == iou.max(dim=1, keepdim=True).values).any(dim=0)] = 1
    return matched, kind


def sample(kind: Tensor, count: int, fraction: float) -> tuple[Tensor, Tensor]:
    """Draw `count` boxes, at most `fraction` of them foreground: the places of foreground and background.

    Background fills up where foreground lacks; both may run out.
    """
    foreground, background = torch.where(kind == 1)[0], torch.where(kind == 0)[0]
    positives = min(len(foreground), int(count * fraction))
    negatives = min(len(background), count - positives)
    order = (torch.randperm(len(places), device=kind.device) for places in (foreground, background))
    return foreground[next(order)[:positives]], background[next(order)[:negatives]]


def encode(wanted: Tensor, boxes: Tensor, weights: tuple[float, ...] = (1, 1, 1, 1)) -> Tensor:
    """What makes `wanted` (N, 4) of `boxes` (N, 4): shift over side, log of side over side, times the weights."""
    sides, goal = boxes[:, 2:] - boxes[:, :2], wanted[:, 2:] - wanted[:, :2]
    centres, aims = boxes[:, :2] + 0.5 * sides, wanted[:, :2] + 0.5 * goal
    weight = _constant(weights, boxes.dtype, boxes.device)
    return torch.cat((weight[:2] * (aims - centres) / sides, weight[2:] * torch.log(goal / sides)), dim=1)


def decode(deltas: Tensor, boxes: Tensor, weights: tuple[float, ...] = (1, 1, 1, 1)) -> Tensor:
    """The way back, for (..., 4)."""
    deltas = deltas / _constant(weights, deltas.dtype, deltas.device)
    sides = boxes[..., 2:] - boxes[..., :2]
    centres = boxes[..., :2] + 0.5 * sides + deltas[..., :2] * sides
    half = 0.5 * sides * deltas[..., 2:].clamp(max=LARGEST_GROWTH).exp()
    return torch.cat((centres - half, centres + half), dim=-1)


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (N, 4) cut to an image of that height and width."""
    height, width = size
    return torch.minimum(boxes.clamp(min=0), _constant((width, height, width, height), boxes.dtype, boxes.device))


@lru_cache(maxsize=4096)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on a device, copied there once: the host waits for such a copy."""
    return torch.tensor(values, dtype=dtype, device=device)


def solid(boxes: Tensor) -> Tensor:
    """Which boxes have an area, and no corner that is no number, (N,)."""
    return (boxes[:, 2:] > boxes[:, :2]).all(dim=1) & boxes.isfinite().all(dim=1)
