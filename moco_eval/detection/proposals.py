"""The region proposal network: torchvision's, by detectron2's definitions.

Overridden: anchors (unrounded, sizes first, fixed stride), L1 box losses and their normalisers.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from moco_eval.detection.recipe import DetectConfig

STRIDE = 16  # of layer3, on which C4 works


class _Anchors(AnchorGenerator):
    """Unrounded anchors, sizes before ratios, on a fixed stride."""

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device=None):
        sizes = torch.as_tensor(scales, dtype=dtype, device=device)[:, None]
        heights = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[None, :]
        width, height = (sizes / heights).flatten(), (sizes * heights).flatten()
        return torch.stack((-width, -height, width, height), dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        stride = torch.tensor(STRIDE, device=feature_maps[0].device)
        grids = [list(feature.shape[-2:]) for feature in feature_maps]
        anchors = torch.cat(self.grid_anchors(grids, [[stride, stride]] * len(grids)))
        return [anchors] * len(image_list.image_sizes)


class _ProposalHead(RPNHead):
    """Its scores and box deltas in fp32 whatever the precision: bf16 places a box to three digits only."""

    def forward(self, x):
        logits, deltas = super().forward(x)
        return [level.float() for level in logits], [level.float() for level in deltas]


class _ProposalNetwork(RegionProposalNetwork):
    """L1 instead of smooth L1; both losses over the number of anchors asked for, not of those found."""

    def compute_loss(self, objectness, pred_bbox_deltas, labels, regression_targets):
        sampled = self.fg_bg_sampler(labels)
        positive, negative = (torch.where(torch.cat(masks))[0] for masks in sampled)
        chosen = torch.cat((positive, negative))
        asked = self.fg_bg_sampler.batch_size_per_image * len(labels)
        wanted = torch.cat(regression_targets)[positive]
        box_loss = F.l1_loss(pred_bbox_deltas[positive], wanted, reduction="sum") / asked
        objectness_loss = F.binary_cross_entropy_with_logits(
            objectness.flatten()[chosen], torch.cat(labels)[chosen], reduction="sum"
        )
        return objectness_loss / asked, box_loss


def proposal_network(channels: int, recipe: DetectConfig) -> RegionProposalNetwork:
    rpn, anchors = recipe.rpn, recipe.anchors
    return _ProposalNetwork(
        _Anchors((anchors.sizes,), (anchors.ratios,)),
        _ProposalHead(channels, len(anchors.sizes) * len(anchors.ratios)),
        fg_iou_thresh=rpn.foreground_iou,
        bg_iou_thresh=rpn.background_iou,
        batch_size_per_image=rpn.batch_per_image,
        positive_fraction=rpn.positive_fraction,
        pre_nms_top_n={"training": rpn.pre_nms_train, "testing": rpn.pre_nms_test},
        post_nms_top_n={"training": rpn.post_nms_train, "testing": rpn.post_nms_test},
        nms_thresh=rpn.nms,
    )
