"""Keypoints of regions: their head, its loss, and where a heat map says that a keypoint is.

Coordinates are on the scale of the boxes throughout: the middle of pixel i is i + 0.5.

Source: facebookresearch/detectron2@02b5c4e, modeling/roi_heads/keypoint_head.py and structures/keypoints.py.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moco_eval.detection.masks import msra_fill

CONVS, DIM = 8, 512


class KeypointHead(nn.Sequential):
    """Pooled features (R, C, S, S) to a heat map of logits for each keypoint, (R, K, 4S, 4S), float32.

    The submodules carry detectron2's names.
    """

    def __init__(self, channels: int, keypoints: int):
        layers: list[tuple[str, nn.Module]] = []
        for number in range(1, CONVS + 1):
            layers += [(f"conv_fcn{number}", nn.Conv2d(channels, DIM, 3, padding=1)), (f"relu{number}", nn.ReLU())]
            channels = DIM
        layers.append(("score_lowres", nn.ConvTranspose2d(DIM, keypoints, 4, stride=2, padding=1)))
        super().__init__(OrderedDict(layers))
        msra_fill(self)

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x).float()
        return F.interpolate(logits, scale_factor=2.0, mode="bilinear", align_corners=False)


def keypoint_loss(logits: Tensor, keypoints: Tensor, boxes: Tensor) -> Tensor:
    """Cross entropy over the places of each heat map, mean over the labelled keypoints inside their boxes.

    0 where there is none.

    Args:
        logits: (R, K, M, M).
        keypoints: (R, K, 3): x, y and 0 where not labelled.
        boxes: (R, 4).
    """
    places, valid = heat_places(keypoints, boxes, logits.shape[-1])
    if not valid.any():
        return logits.sum() * 0  # the head's weights still take part, as DDP wants
    return F.cross_entropy(logits.flatten(2)[valid], places[valid])


def heat_places(keypoints: Tensor, boxes: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """In which cell of its box's side x side heat map each keypoint lies, row by row, and whether it does, (R, K)."""
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    points = keypoints[:, :, :2]
    cells = ((points - low) * (side / (high - low))).floor().long()
    cells[points == high.expand_as(points)] = side - 1  # the far edges belong to the last cells
    valid = (keypoints[:, :, 2] > 0) & ((cells >= 0) & (cells < side)).all(dim=2)
    return (cells[:, :, 1] * side + cells[:, :, 0]) * valid, valid


def keypoints_of(logits: Tensor, boxes: Tensor) -> Tensor:
    """x, y and score of each keypoint, (N, K, 3): the highest place of its heat map, enlarged to its box's pixels.

    The score is that place's share of the map's softmax, whose sum is taken before enlarging: it does not hang on the
    size of the box.

    Args:
        logits: (N, K, M, M).
        boxes: (N, 4).
    """
    points = logits.new_zeros((*logits.shape[:2], 3))
    sizes = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    pixels = sizes.ceil()
    for here, maps, low, cell, (width, height) in zip(
        points, logits, boxes[:, :2], sizes / pixels, pixels.long().tolist()
    ):
        enlarged = F.interpolate(maps[None], size=(height, width), mode="bicubic", align_corners=False)[0]
        highest, place = enlarged.flatten(1).max(dim=1)
        corner = torch.stack((place % width, place // width), dim=1)
        here[:, :2] = low + (corner + 0.5) * cell
        here[:, 2] = 1 / (maps - highest[:, None, None]).exp().sum(dim=(1, 2))
    return points
