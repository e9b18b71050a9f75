"""For your own detectron2 training script: importing this registers `Res5ROIHeadsExtraNorm`.

The papers' C4 detector has one more batch norm behind res5, before the mean over places: its features, trained
without labels, have another scale than a supervised network's. The norm starts at scale 1 and shift 0.
Source: He et al. 2020, arXiv:1911.05722, appendix A.3; facebookresearch/moco@132aea9, detection/train_net.py.
"""

from typing import Any

from detectron2.layers import get_norm
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads

CHANNELS_OF_RES2 = 8  # res5 has eight times the channels of res2


class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """detectron2's C4 head with a norm (MODEL.RESNETS.NORM) as the last part of res5, `roi_heads.res5.norm`."""

    @classmethod
    def from_config(cls, cfg: Any, input_shape: Any) -> dict[str, Any]:
        parts = super().from_config(cfg, input_shape)
        channels = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS * CHANNELS_OF_RES2
        parts["res5"].add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
        return parts


if "Res5ROIHeadsExtraNorm" not in ROI_HEADS_REGISTRY:
    ROI_HEADS_REGISTRY.register(Res5ROIHeadsExtraNorm)
