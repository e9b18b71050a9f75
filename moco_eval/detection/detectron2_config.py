"""A recipe as a detectron2 configuration, and the parts that detectron2 itself does not have.

Source: facebookresearch/detectron2@02b5c4e, configs/; facebookresearch/moco@132aea9, detection/configs/;
He et al. 2020, arXiv:1911.05722, appendix (dilated C5).
"""

from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from torch import Tensor, nn

import moco_eval.detection.extra_norm  # noqa: F401 (registers the head)
from moco_eval.config.detection import DetectConfig
from moco_eval.detection.backbones import DilatedC5
from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.export.detectron2 import settings_of

NORMS = {"naive_sync": "naiveSyncBN", "sync": "SyncBN", "local": "BN"}
REDUCED_C5 = "build_reduced_c5_backbone"
LEVELS = [f"p{level}" for level in range(2, 7)]
STAGES = [f"res{stage}" for stage in range(2, 6)]


class ReducedC5(Backbone):
    """A ResNet's res5 (dilated by RESNETS.RES5_DILATION), and a 3x3 convolution with norm to 512 channels after it."""

    def __init__(self, cfg: CfgNode, input_shape: ShapeSpec):
        super().__init__()
        self.bottom_up = build_resnet_backbone(cfg, input_shape)
        self.shape = self.bottom_up.output_shape()["res5"]
        norm = get_norm(cfg.MODEL.RESNETS.NORM, DilatedC5.channels)
        self.reduce = Conv2d(self.shape.channels, DilatedC5.channels, 3, padding=1, bias=False, norm=norm)
        nn.init.kaiming_uniform_(self.reduce.weight, a=1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"c5": self.reduce(self.bottom_up(images)["res5"])}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"c5": ShapeSpec(channels=DilatedC5.channels, stride=self.shape.stride)}


if REDUCED_C5 not in BACKBONE_REGISTRY:
    BACKBONE_REGISTRY._do_register(REDUCED_C5, ReducedC5)


def config_of(recipe: DetectConfig, encoder: Encoder, classes: int, keypoints: int = 0, device: str = "cpu") -> CfgNode:
    """The configuration of a recipe on an encoder's network and pixels; its data sets and weights are left empty.

    Args:
        classes, keypoints: how many the data have.
    """
    settings, why = settings_of(encoder, Path("weights.pkl"))
    assert settings, why
    cfg = get_cfg()
    network = {name: settings["MODEL"][name] for name in ("PIXEL_MEAN", "PIXEL_STD", "RESNETS", "META_ARCHITECTURE")}
    for part in (
        {"MODEL": network},
        _model(recipe, classes, keypoints),
        _BACKBONES[recipe.model](recipe),
        _run(recipe),
    ):
        cfg.merge_from_other_cfg(CfgNode(part))
    cfg.INPUT.FORMAT = settings["INPUT"]["FORMAT"]
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = device, ""
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), ()
    return cfg


def _model(recipe: DetectConfig, classes: int, keypoints: int) -> dict[str, Any]:
    """What detectors of every kind have in common."""
    rpn, roi = recipe.rpn, recipe.roi
    model: dict[str, Any] = {
        "MASK_ON": recipe.masks,
        "KEYPOINT_ON": recipe.keypoints,
        "BACKBONE": {"FREEZE_AT": 0},
        "RESNETS": {"NORM": NORMS[recipe.bn]},
        "ANCHOR_GENERATOR": {"ASPECT_RATIOS": [list(recipe.anchors.ratios)]},
        "RPN": {
            "PRE_NMS_TOPK_TRAIN": rpn.pre_nms_train,
            "POST_NMS_TOPK_TRAIN": rpn.post_nms_train,
            "PRE_NMS_TOPK_TEST": rpn.pre_nms_test,
            "POST_NMS_TOPK_TEST": rpn.post_nms_test,
            "NMS_THRESH": rpn.nms,
            "IOU_THRESHOLDS": [rpn.background_iou, rpn.foreground_iou],
            "BATCH_SIZE_PER_IMAGE": rpn.batch_per_image,
            "POSITIVE_FRACTION": rpn.positive_fraction,
        },
        "ROI_HEADS": {
            "NUM_CLASSES": classes,
            "BATCH_SIZE_PER_IMAGE": roi.batch_per_image,
            "POSITIVE_FRACTION": roi.positive_fraction,
            "IOU_THRESHOLDS": [roi.foreground_iou],
            "SCORE_THRESH_TEST": recipe.test.score,
            "NMS_THRESH_TEST": recipe.test.nms,
        },
        "ROI_BOX_HEAD": {"POOLER_RESOLUTION": roi.pool_size, "SMOOTH_L1_BETA": roi.box_beta},
        "ROI_MASK_HEAD": {"POOLER_RESOLUTION": roi.mask_pool_size},
        "ROI_KEYPOINT_HEAD": {"POOLER_RESOLUTION": roi.mask_pool_size},
    }
    if recipe.keypoints:
        model["ROI_KEYPOINT_HEAD"]["NUM_KEYPOINTS"] = keypoints
    return {"VERSION": 2, "MODEL": model}


def _c4(recipe: DetectConfig) -> dict[str, Any]:
    heads = {"ROI_HEADS": {"NAME": "Res5ROIHeadsExtraNorm"}}
    return {"MODEL": {"ANCHOR_GENERATOR": {"SIZES": [list(recipe.anchors.sizes)]}, **heads}}


def _dc5(recipe: DetectConfig) -> dict[str, Any]:
    model = {
        "BACKBONE": {"NAME": REDUCED_C5},
        "RESNETS": {"OUT_FEATURES": ["res5"], "RES5_DILATION": 2},
        "ANCHOR_GENERATOR": {"SIZES": [list(recipe.anchors.sizes)]},
        "RPN": {"IN_FEATURES": ["c5"]},
        "ROI_HEADS": {"IN_FEATURES": ["c5"]},
    }
    return _with_layers(model)


def _fpn(recipe: DetectConfig) -> dict[str, Any]:
    model = {
        "BACKBONE": {"NAME": "build_resnet_fpn_backbone"},
        "RESNETS": {"OUT_FEATURES": STAGES},
        "FPN": {"IN_FEATURES": STAGES, "NORM": NORMS[recipe.bn]},
        "ANCHOR_GENERATOR": {"SIZES": [[size] for size in recipe.anchors.sizes]},
        "RPN": {"IN_FEATURES": LEVELS},
        "ROI_HEADS": {"IN_FEATURES": LEVELS[:-1]},
    }
    return _with_layers(model)


def _with_layers(model: dict[str, Any]) -> dict[str, Any]:
    """Two hidden layers for the boxes, four convolutions for the masks."""
    heads = {"ROI_HEADS": {**model["ROI_HEADS"], "NAME": "StandardROIHeads"}}
    box, mask = {"NAME": "FastRCNNConvFCHead", "NUM_FC": 2}, {"NAME": "MaskRCNNConvUpsampleHead", "NUM_CONV": 4}
    return {"MODEL": {**model, **heads, "ROI_BOX_HEAD": box, "ROI_MASK_HEAD": mask}}


_BACKBONES = {"r50_c4": _c4, "r50_dc5": _dc5, "r50_fpn": _fpn}


def _run(recipe: DetectConfig) -> dict[str, Any]:
    """Images, SGD and its schedule, and what comes after it."""
    schedule, sgd, images, threshold = recipe.schedule, recipe.optimizer, recipe.input, recipe.data.repeat_threshold
    return {
        "INPUT": {
            "MIN_SIZE_TRAIN": tuple(images.min_size_train),
            "MAX_SIZE_TRAIN": images.max_size,
            "MIN_SIZE_TEST": images.min_size_test,
            "MAX_SIZE_TEST": images.max_size,
            "RANDOM_FLIP": "horizontal" if images.flip else "none",
        },
        "DATALOADER": {
            "ASPECT_RATIO_GROUPING": images.aspect_grouping,
            "NUM_WORKERS": recipe.workers,
            "SAMPLER_TRAIN": "RepeatFactorTrainingSampler" if threshold else "TrainingSampler",
            "REPEAT_THRESHOLD": threshold,
        },
        "SOLVER": {
            "IMS_PER_BATCH": recipe.batch_size,
            "BASE_LR": sgd.lr,
            "MOMENTUM": sgd.sgd_momentum,
            "WEIGHT_DECAY": sgd.weight_decay,
            "WEIGHT_DECAY_NORM": 0.0,
            "STEPS": tuple(schedule.steps),
            "GAMMA": schedule.gamma,
            "MAX_ITER": schedule.iterations,
            "WARMUP_ITERS": schedule.warmup,
            "WARMUP_FACTOR": schedule.warmup_factor,
        },
        "TEST": {
            "DETECTIONS_PER_IMAGE": recipe.test.detections,
            "PRECISE_BN": {"ENABLED": recipe.precise_bn > 0, "NUM_ITER": max(recipe.precise_bn, 1)},
        },
        "SEED": recipe.seed,
    }
