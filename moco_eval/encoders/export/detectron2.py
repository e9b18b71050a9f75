"""detectron2's names for a ResNet, and the configuration under which it builds the same network.

Source: facebookresearch/moco@132aea9, detection/ (the converter and its configurations); facebookresearch/detectron2
@02b5c4e, modeling/backbone/resnet.py. Nothing here imports detectron2.
"""

from pathlib import Path
from typing import Any

import yaml
from torchvision.models.resnet import BasicBlock

from moco_eval.encoders.architectures import Architecture, architecture
from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.layout import Rules, rename
from moco_eval.encoders.layouts import DETECTRON2
from moco_eval.preprocessing import Preprocessing

TO_DETECTRON2: Rules = (
    (r"^(?!layer)", "stem."),
    (r"layer([1-4])", lambda match: f"res{int(match[1]) + 1}"),
    (r"bn([1-3])", r"conv\1.norm"),
    (r"downsample\.0", "shortcut"),
    (r"downsample\.1", "shortcut.norm"),
)
DEPTHS = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
_HEADER = """\
# A ResNet's weights in detectron2, as the MoCo papers fine-tune it: every layer and every batch norm is trained.
# Yours to set: MODEL.ROI_HEADS.NUM_CLASSES, DATASETS, and the schedule. Batch and rate are those of 8 GPUs.
"""
_EXTRA_NORM = """\
# In your training script, before the model is built:
#     import moco_eval.detection.extra_norm    # registers Res5ROIHeadsExtraNorm
"""


def to_detectron2(name: str) -> str:
    """'layer1.0.bn3.weight' to 'res2.0.conv3.norm.weight'; what is in no layer goes to the stem."""
    return rename(name, TO_DETECTRON2)


def from_detectron2(name: str) -> str:
    """The way back."""
    return rename(name, DETECTRON2)


def settings_of(encoder: Encoder, weights: Path) -> tuple[dict[str, Any] | None, str]:
    """The configuration that takes the weights; where detectron2 cannot build the network, None and why.

    A bottleneck ResNet is set up as the papers' C4 with the extra norm after res5; a ResNet-18 or 34 with an FPN,
    because detectron2's C4 head has bottlenecks and would leave layer4 out.
    """
    arch = architecture(encoder.arch)
    if not isinstance(arch, Architecture):
        return None, f"it builds ResNets here, and {encoder.arch} is none of them"
    if arch.channels != 3:
        return None, "its stem takes photographs of 3 channels"
    depth = DEPTHS.get(arch.layers)
    basic = arch.block is BasicBlock
    if depth is None or arch.cifar_stem or (basic and arch.width != 1):
        return None, f"detectron2's own builder makes no {encoder.arch}; the weights are there for one of yours"
    pixels = encoder.preprocessing or Preprocessing()
    scale = 255 / pixels.range
    model = {
        "META_ARCHITECTURE": "GeneralizedRCNN",
        "WEIGHTS": str(weights.absolute()),
        "PIXEL_MEAN": [round(scale * value, 3) for value in pixels.mean],
        "PIXEL_STD": [round(scale * value, 3) for value in pixels.std],
        "BACKBONE": {"FREEZE_AT": 0},
        "RESNETS": _resnet(arch, 34 if basic and depth == 50 else depth),
    }
    settings = {
        "VERSION": 2,
        "MODEL": _merged(model, _FPN if basic else _C4),
        "INPUT": {"FORMAT": pixels.channels},
        "TEST": {"PRECISE_BN": {"ENABLED": True}},
        "SOLVER": {"IMS_PER_BATCH": 16, "BASE_LR": 0.02},
    }
    return settings, ""


def _resnet(arch: Architecture, depth: int) -> dict[str, Any]:
    return {
        "DEPTH": depth,
        "STEM_OUT_CHANNELS": int(64 * arch.width),
        "RES2_OUT_CHANNELS": int(64 * arch.width) * arch.block.expansion,
        "NUM_GROUPS": arch.groups,
        "WIDTH_PER_GROUP": int(arch.group_width * arch.width),
        "STRIDE_IN_1X1": arch.stride_in_1x1,
        "NORM": "naiveSyncBN",
    }


_C4: dict[str, Any] = {
    "RPN": {"PRE_NMS_TOPK_TEST": 6000, "POST_NMS_TOPK_TEST": 1000},
    "ROI_HEADS": {"NAME": "Res5ROIHeadsExtraNorm"},
}
_LEVELS = [f"p{i}" for i in range(2, 7)]
_FPN: dict[str, Any] = {
    "BACKBONE": {"NAME": "build_resnet_fpn_backbone"},
    "RESNETS": {"OUT_FEATURES": [f"res{i}" for i in range(2, 6)]},
    "FPN": {"IN_FEATURES": [f"res{i}" for i in range(2, 6)], "NORM": "naiveSyncBN"},
    "ANCHOR_GENERATOR": {"SIZES": [[32], [64], [128], [256], [512]]},
    "RPN": {"IN_FEATURES": _LEVELS, "PRE_NMS_TOPK_TRAIN": 2000, "PRE_NMS_TOPK_TEST": 1000, "POST_NMS_TOPK_TRAIN": 1000},
    "ROI_HEADS": {"NAME": "StandardROIHeads", "IN_FEATURES": _LEVELS[:-1]},
    "ROI_BOX_HEAD": {"NAME": "FastRCNNConvFCHead", "NUM_FC": 2, "POOLER_RESOLUTION": 7},
}


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Both, section by section."""
    both = {name: {**first.get(name, {}), **values} for name, values in second.items()}
    return {**first, **both}


def yaml_of(settings: dict[str, Any]) -> str:
    """The configuration file."""
    extra = settings["MODEL"]["ROI_HEADS"]["NAME"] == _C4["ROI_HEADS"]["NAME"]
    return _HEADER + (_EXTRA_NORM if extra else "") + yaml.safe_dump(settings, sort_keys=False, default_flow_style=None)
