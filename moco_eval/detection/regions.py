"""What is said of each region: its class and its box. torchvision's heads, by detectron2's definitions.

Overridden: RoIAlign (aligned, adaptive sampling), L1 box loss and its normaliser, initialisation.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import roi_align

from moco_eval.detection.proposals import STRIDE
from moco_eval.detection.recipe import DetectConfig


class _AlignedPool(nn.Module):
    """RoIAlign as detectron2's version 2: half a pixel offset, as many samples as the region has pixels."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        return roi_align(features["0"], boxes, self.size, 1 / STRIDE, sampling_ratio=0, aligned=True)


class _Heads(RoIHeads):
    """Classes and boxes of regions with an L1 box loss; class 0 is the background, inside the engine only."""

    def forward(self, features, proposals, image_shapes, targets=None):
        if self.training:
            proposals, _, labels, wanted = self.select_training_samples(proposals, targets)
        pooled = self.box_roi_pool(features, proposals, image_shapes)
        logits, deltas = (scores.float() for scores in self.box_predictor(self.box_head(pooled)))
        if not self.training:
            found = self.postprocess_detections(logits, deltas, proposals, image_shapes)
            return [dict(zip(("boxes", "scores", "labels"), image)) for image in zip(*found)], {}
        labels, wanted = torch.cat(labels), torch.cat(wanted)
        objects = torch.where(labels > 0)[0]
        ours = deltas.reshape(len(labels), -1, 4)[objects, labels[objects]]
        box_loss = F.l1_loss(ours, wanted[objects], reduction="sum") / labels.numel()
        return [], {"loss_classifier": F.cross_entropy(logits, labels), "loss_box_reg": box_loss}


def region_heads(layer4: nn.Module, channels: int, classes: int, recipe: DetectConfig) -> RoIHeads:
    parts = OrderedDict(
        layer4=layer4, norm=nn.BatchNorm2d(channels), mean=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten()
    )
    predictor = FastRCNNPredictor(channels, classes + 1)
    for layer, std in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    return _Heads(
        _AlignedPool(recipe.roi.pool_size),
        nn.Sequential(parts),
        predictor,
        fg_iou_thresh=recipe.roi.foreground_iou,
        bg_iou_thresh=recipe.roi.foreground_iou,
        batch_size_per_image=recipe.roi.batch_per_image,
        positive_fraction=recipe.roi.positive_fraction,
        bbox_reg_weights=None,
        score_thresh=recipe.test.score,
        nms_thresh=recipe.test.nms,
        detections_per_img=recipe.test.detections,
    )
