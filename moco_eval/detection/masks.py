"""Masks of regions: their head, what it is trained on, and pasting what it says into the image.

Source: facebookresearch/detectron2@02b5c4e, modeling/roi_heads/mask_head.py, structures/masks.py, layers/mask_ops.py.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import roi_align

Segmentation = list[np.ndarray] | np.ndarray  # polygons (x0, y0, x1, y1, ...), or a bitmap (H, W) uint8


class MaskHead(nn.Sequential):
    """Pooled features (R, C, S, S) to logits of every class, (R, classes, 2S, 2S), float32.

    `norm`: a layer norm after each of the `convs`. The submodules carry detectron2's names.
    """

    def __init__(self, channels: int, classes: int, convs: int, dim: int = 256, norm: bool = False):
        layers: list[tuple[str, nn.Module]] = []
        for number in range(1, convs + 1):
            layers.append((f"mask_fcn{number}", nn.Conv2d(channels, dim, 3, padding=1, bias=not norm)))
            layers += [(f"norm{number}", LayerNorm2d(dim, eps=1e-6))] if norm else []
            layers.append((f"relu{number}", nn.ReLU()))
            channels = dim
        layers += [("deconv", nn.ConvTranspose2d(channels, dim, 2, stride=2)), ("deconv_relu", nn.ReLU())]
        layers.append(("predictor", nn.Conv2d(dim, classes, 1)))
        super().__init__(OrderedDict(layers))
        msra_fill(self)
        nn.init.normal_(self.predictor.weight, std=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


def msra_fill(head: nn.Module) -> None:
    """Draw all convolutions of a head as Caffe2's MSRA fill does; biases are 0."""
    for layer in head.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


# Training


def mask_targets(segmentations: Sequence[Segmentation], boxes: Tensor, side: int) -> Tensor:
    """What each mask should be, (R, side, side) bool on the device of the boxes.

    Args:
        segmentations: that of each box's object, in pixels of the same image as the boxes.
        boxes: (R, 4).
    """
    targets = torch.zeros(len(boxes), side, side, dtype=torch.bool)
    corners = boxes.detach().float().cpu()
    bitmaps: dict[int, list[int]] = {}  # the regions of each: making a tensor of it takes ten times a region's work
    for place, segmentation in enumerate(segmentations):
        if isinstance(segmentation, np.ndarray):
            bitmaps.setdefault(id(segmentation), []).append(place)
        else:
            targets[place] = _polygons_inside(segmentation, corners[place], side)
    for own in bitmaps.values():
        bitmap = segmentations[own[0]]
        assert isinstance(bitmap, np.ndarray)
        targets[own] = _bitmap_inside(bitmap, corners[own], side)
    return targets.to(boxes.device)


def _polygons_inside(polygons: list[np.ndarray], box: Tensor, side: int) -> Tensor:
    """The polygons rasterised by COCO's rule, with the box as their canvas of side x side pixels."""
    left, top, right, bottom = box.numpy()
    # The scales stay in single precision, as detectron2 has them: COCO's rule rounds, and the last bit can decide.
    scales = side / max(right - left, 0.1), side / max(bottom - top, 0.1)
    moved = [((part.reshape(-1, 2) - (left, top)) * scales).reshape(-1) for part in polygons]
    drawn = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(moved, side, side)))
    return torch.from_numpy(drawn)


def _bitmap_inside(bitmap: np.ndarray, boxes: Tensor, side: int) -> Tensor:
    """Where at least half of the place in each box is covered, (N, side, side)."""
    image = torch.from_numpy(bitmap).float()[None, None]
    return roi_align(image, [boxes], side, sampling_ratio=0, aligned=True)[:, 0] >= 0.5


def mask_loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross entropy of the masks of the objects' own classes; 0 where there is no region.

    Args:
        logits: (R, classes, M, M).
        labels: (R,), from 0.
        targets: (R, M, M) bool.
    """
    if len(labels) == 0:
        return logits.sum() * 0  # the head's weights still take part, as DDP wants
    own = logits[torch.arange(len(labels), device=labels.device), labels]
    return F.binary_cross_entropy_with_logits(own, targets.to(own.dtype))


# Detection


def paste(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Masks as COCO's run-length codes of the whole image: bilinear between the middles of their cells, then >= 0.5.

    All on the CPU, mask by mask: one window is small, and the next is another.

    Args:
        probabilities: (N, M, M).
        boxes: (N, 4), where each mask lies, in pixels of the image.
        size: width and height of the image.
    """
    return [encoded(_pasted(mask, box, size)) for mask, box in zip(probabilities.float().cpu(), boxes.float().cpu())]


def _pasted(mask: Tensor, box: Tensor, size: tuple[int, int]) -> np.ndarray:
    """One mask, (H, W) bool. Only pixels about the box are looked at: outside it no value reaches a half."""
    columns, x = _window(box[0::2], size[0])
    rows, y = _window(box[1::2], size[1])
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    values = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]
    image = np.zeros((size[1], size[0]), dtype=bool)
    image[rows, columns] = (values >= 0.5).numpy()
    return image


def _window(ends: Tensor, length: int) -> tuple[slice, Tensor]:
    """Along one axis: the pixels about a box, and where their middles lie in it, from -1 to 1."""
    low, high = ends
    first, last = max(int(low.floor()) - 1, 0), min(int(high.ceil()) + 1, length)
    middles = torch.arange(first, last, dtype=torch.float32) + 0.5
    return slice(first, last), (middles - low) / (high - low) * 2 - 1


def encoded(mask: np.ndarray) -> dict[str, Any]:
    """A mask (H, W) as pycocotools encodes it, with text for counts."""
    code = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": code["size"], "counts": code["counts"].decode("ascii")}


def decoded(code: dict[str, Any]) -> np.ndarray:
    """A run-length code, compressed or not, as a bitmap (H, W) uint8."""
    if isinstance(code["counts"], list):
        code = coco_mask.frPyObjects(code, *code["size"])
    return coco_mask.decode(code)
