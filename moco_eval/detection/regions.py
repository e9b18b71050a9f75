"""What is said of each region: its class and its box, and where the recipe asks its mask or its keypoints.

Source: facebookresearch/detectron2@02b5c4e, modeling/roi_heads/ and poolers.py; for C4's extra norm, He et al. 2020,
arXiv:1911.05722, appendix A.3. Within this file classes count from 0 and the background comes last; targets and
detections count from 1.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, roi_align

from moco_eval.config.detection import DetectConfig
from moco_eval.detection.backbones import C4, DilatedC5, Pyramid
from moco_eval.detection.keypoints import KeypointHead, keypoint_loss, keypoints_of
from moco_eval.detection.masks import MaskHead, mask_loss, mask_targets, msra_fill
from moco_eval.detection.matching import clip, decode, encode, match, sample, solid
from moco_eval.detection.plain_transformer import SimplePyramid, convolution
from moco_eval.detection.proposals import Size

BOX_WEIGHTS = (10, 10, 5, 5)
HIDDEN = 1024  # of the fully connected box head
WHOLE, WHOLE_LEVEL = 224, 4  # a region of 224 x 224 pixels is looked at on p4


def pool(maps: Sequence[Tensor], strides: Sequence[int], boxes: list[Tensor], side: int) -> Tensor:
    """RoIAlign to (R, C, side, side), half a pixel aligned, as many samples as the region has pixels.

    On a pyramid (p2 to p5) each region is cut from the level that its size asks for.
    """
    numbered = torch.cat([F.pad(image, (1, 0), value=number) for number, image in enumerate(boxes)])
    if len(strides) == 1:
        return roi_align(maps[0], numbered, side, 1 / strides[0], sampling_ratio=0, aligned=True)
    levels = level_of(numbered[:, 1:], len(strides))
    pooled = maps[0].new_zeros((len(numbered), maps[0].shape[1], side, side))
    for level, (features, stride) in enumerate(zip(maps, strides)):
        here = torch.where(levels == level)[0]
        cut = roi_align(features, numbered[here], side, 1 / stride, sampling_ratio=0, aligned=True)
        pooled.index_put_((here,), cut)
    return pooled


def level_of(boxes: Tensor, levels: int) -> Tensor:
    """Which level of a pyramid that starts at p2 each box belongs to, (N,): Eqn. (1) of the FPN paper."""
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    level = torch.floor(WHOLE_LEVEL + torch.log2(side / WHOLE + 1e-8)) - 2
    return level.clamp(0, levels - 1).long()


@dataclass
class Regions:
    """The regions of an image that are trained on.

    Attributes:
        boxes: (R, 4), foreground first.
        labels: (R,), from 0; the background last.
        matched: which of the image's objects each answers for, (R,); no matter for the background.
    """

    boxes: Tensor
    labels: Tensor
    matched: Tensor


class RegionHeads(nn.Module):
    """Class, box, mask and keypoints of regions.

    C4 shares layer4 (and its norm) between boxes and masks, the boxes' vector being the mean over places. The others
    have a box head of two hidden layers, and pool anew for masks and keypoints. ViTDet's box head is of four
    convolutions and a hidden layer, and its convolutions, the masks' too, have layer norms.
    """

    def __init__(
        self,
        backbone: C4 | DilatedC5 | Pyramid | SimplePyramid,
        layer4: nn.Module | None,
        classes: int,
        recipe: DetectConfig,
        points: int,
    ):
        super().__init__()
        self.strides, self.classes = backbone.strides[:4], classes
        self.roi, self.test = recipe.roi, recipe.test
        self.shared, norm = layer4 is not None, recipe.model == "vitdet"
        if layer4 is not None:
            width = vector = 2 * backbone.channels
            self.box_head = nn.Sequential(OrderedDict(layer4=layer4, norm=nn.BatchNorm2d(width)))
        else:
            width, vector = backbone.channels, HIDDEN
            self.box_head = (_convolutions_first if norm else _hidden_layers)(width, self.roi.pool_size)
        self.class_logits = _drawn(nn.Linear(vector, classes + 1), 0.01)
        self.box_deltas = _drawn(nn.Linear(vector, 4 * classes), 0.001)
        self.mask_head = MaskHead(width, classes, 0 if self.shared else 4, norm=norm) if recipe.masks else None
        self.keypoint_head = KeypointHead(width, points) if recipe.keypoints else None

    def forward(
        self,
        maps: list[Tensor],
        proposals: list[Tensor],
        sizes: list[Size],
        targets: list[dict[str, Any]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """In training no detections and the losses; else the detections of each image and no losses."""
        if self.training:
            assert targets is not None
            regions = [self.sample(boxes, target) for boxes, target in zip(proposals, targets)]
            return [], self._losses(maps, regions, targets)
        _, logits, deltas = self.predict(maps, proposals)
        counts = [len(boxes) for boxes in proposals]
        images = zip(proposals, logits.softmax(dim=1).split(counts), deltas.split(counts), sizes)
        detections = [self._detect(*image) for image in images]
        return self._look_closer(maps, detections), {}

    @torch.no_grad()
    def sample(self, proposals: Tensor, target: dict[str, Any]) -> Regions:
        """Draw the regions of an image that are trained on; its objects' own boxes are among the proposals."""
        objects = target["boxes"]
        boxes = torch.cat((proposals, objects))
        matched, kind = match(objects, boxes, self.roi.foreground_iou, self.roi.foreground_iou)
        foreground, background = sample(kind, self.roi.batch_per_image, self.roi.positive_fraction)
        chosen = torch.cat((foreground, background))
        labels = torch.full_like(chosen, self.classes)
        labels[: len(foreground)] = target["labels"][matched[foreground]] - 1
        return Regions(boxes[chosen], labels, matched[chosen])

    def predict(self, maps: list[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Of regions: what the box head made of them, logits (R, classes + 1) and deltas (R, classes, 4) in fp32."""
        x = self.box_head(pool(maps, self.strides, boxes, self.roi.pool_size))
        vectors = x.mean(dim=(2, 3)) if self.shared else x
        return x, self.class_logits(vectors).float(), self.box_deltas(vectors).float().unflatten(1, (-1, 4))

    # Training

    def _losses(self, maps: list[Tensor], regions: list[Regions], targets: list[dict[str, Any]]) -> dict[str, Tensor]:
        x, logits, deltas = self.predict(maps, [image.boxes for image in regions])
        labels = torch.cat([image.labels for image in regions])
        objects = labels < self.classes
        losses = {"loss_cls": F.cross_entropy(logits, labels)}
        foreground = [_part(image, image.labels < self.classes) for image in regions]
        wanted = [
            encode(target["boxes"][image.matched], image.boxes, BOX_WEIGHTS)
            for image, target in zip(foreground, targets)
        ]
        places = F.smooth_l1_loss(
            deltas[objects, labels[objects]], torch.cat(wanted), reduction="sum", beta=self.roi.box_beta
        )
        losses["loss_box_reg"] = places / len(labels)
        if self.mask_head is not None:
            features = x[objects] if self.shared else self._pool_again(maps, [image.boxes for image in foreground])
            losses["loss_mask"] = _mask_loss(self.mask_head(features), foreground, targets)
        if self.keypoint_head is not None:
            boxes, points = _with_keypoints(foreground, targets)
            heat = self.keypoint_head(self._pool_again(maps, boxes))
            losses["loss_keypoint"] = keypoint_loss(heat, torch.cat(points), torch.cat(boxes))
        return losses

    def _pool_again(self, maps: list[Tensor], boxes: list[Tensor]) -> Tensor:
        return pool(maps, self.strides, boxes, self.roi.mask_pool_size)

    # Detection

    def _detect(self, proposals: Tensor, scores: Tensor, deltas: Tensor, size: Size) -> dict[str, Tensor]:
        """Boxes of an image by their class: those above the least score, after NMS class by class, the best of all."""
        region, label = torch.where(scores[:, :-1] > self.test.score)
        boxes, scores = decode(deltas[region, label], proposals[region], BOX_WEIGHTS), scores[region, label]
        finite = boxes.isfinite().all(dim=1)
        boxes, scores, label = clip(boxes[finite], size), scores[finite], label[finite]
        keep = batched_nms(boxes, scores, label, self.test.nms)[: self.test.detections]
        keep = keep[solid(boxes[keep])]
        return {"boxes": boxes[keep], "scores": scores[keep], "labels": label[keep] + 1}

    def _look_closer(self, maps: list[Tensor], detections: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Masks and keypoints of the detections, by their final boxes."""
        boxes = [image["boxes"] for image in detections]
        counts = [len(image) for image in boxes]
        if self.mask_head is not None:
            features = (
                self.box_head(pool(maps, self.strides, boxes, self.roi.pool_size))
                if self.shared
                else self._pool_again(maps, boxes)
            )
            logits = self.mask_head(features)
            labels = torch.cat([image["labels"] for image in detections]) - 1
            masks = logits[torch.arange(len(logits), device=logits.device), labels].sigmoid()
            detections = [image | {"masks": mask} for image, mask in zip(detections, masks.split(counts))]
        if self.keypoint_head is not None:
            points = keypoints_of(self.keypoint_head(self._pool_again(maps, boxes)), torch.cat(boxes))
            detections = [image | {"keypoints": part} for image, part in zip(detections, points.split(counts))]
        return detections


def _part(regions: Regions, chosen: Tensor) -> Regions:
    return Regions(regions.boxes[chosen], regions.labels[chosen], regions.matched[chosen])


def _mask_loss(logits: Tensor, foreground: list[Regions], targets: list[dict[str, Any]]) -> Tensor:
    wanted = [
        mask_targets([target["masks"][number] for number in image.matched.tolist()], image.boxes, logits.shape[-1])
        for image, target in zip(foreground, targets)
    ]
    return mask_loss(logits, torch.cat([image.labels for image in foreground]), torch.cat(wanted))


def _with_keypoints(foreground: list[Regions], targets: list[dict[str, Any]]) -> tuple[list[Tensor], list[Tensor]]:
    """The boxes of each image that hold a labelled keypoint of their object, and all keypoints of these objects."""
    boxes, points = [], []
    for image, target in zip(foreground, targets):
        keypoints = target["keypoints"][image.matched]
        seen = visible_inside(keypoints, image.boxes)
        boxes.append(image.boxes[seen])
        points.append(keypoints[seen])
    return boxes, points


def visible_inside(keypoints: Tensor, boxes: Tensor) -> Tensor:
    """Which boxes (R, 4) hold at least one labelled keypoint of theirs (R, K, 3), (R,)."""
    x, y, seen = keypoints.unbind(dim=2)
    left, top, right, bottom = boxes[:, :, None].unbind(dim=1)
    return ((x >= left) & (x <= right) & (y >= top) & (y <= bottom) & (seen >= 1)).any(dim=1)


def _hidden_layers(width: int, side: int) -> nn.Sequential:
    """Two hidden layers on regions of side x side, drawn as Caffe2's Xavier fill draws them."""
    first, second = nn.Linear(width * side**2, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
    for layer in (first, second):
        _xavier(layer)
    parts = OrderedDict(flatten=nn.Flatten(), fc1=first, relu1=nn.ReLU(), fc2=second, relu2=nn.ReLU())
    return nn.Sequential(parts)


def _convolutions_first(width: int, side: int) -> nn.Sequential:
    """Four 3x3 convolutions with layer norm, drawn as Caffe2's MSRA fill draws them, and one hidden layer."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for number in (1, 2, 3, 4):
        parts[f"conv{number}"], parts[f"conv_relu{number}"] = convolution(width, width, 3), nn.ReLU()
        msra_fill(parts[f"conv{number}"])
    hidden = nn.Linear(width * side**2, HIDDEN)
    _xavier(hidden)
    return nn.Sequential(parts | OrderedDict(flatten=nn.Flatten(), fc1=hidden, relu1=nn.ReLU()))


def _xavier(layer: nn.Linear) -> None:
    nn.init.kaiming_uniform_(layer.weight, a=1)
    nn.init.zeros_(layer.bias)


def _drawn(layer: nn.Linear, std: float) -> nn.Linear:
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer
