"""A whole detector under detectron2's names, and the way back: nothing but names differs, no tensor is changed.

Source: facebookresearch/detectron2@02b5c4e, modeling/. Nothing here imports detectron2.
"""

import re

from torch import Tensor

from moco_eval.encoders.export.detectron2 import from_detectron2, to_detectron2
from moco_eval.errors import InputError

_BODY, _LAYER4, _BOTTOM_UP, _RES5 = "backbone.body.", "heads.box_head.layer4.", "backbone.bottom_up.", "roi_heads.res5."
_PYRAMID = {"lateral": "fpn_lateral", "output": "fpn_output"}
_PREFIXES = {
    "backbone.reduce.norm.": "backbone.reduce.norm.",
    "backbone.reduce.conv.": "backbone.reduce.",
    "rpn.conv.": "proposal_generator.rpn_head.conv.",
    "rpn.logits.": "proposal_generator.rpn_head.objectness_logits.",
    "rpn.deltas.": "proposal_generator.rpn_head.anchor_deltas.",
    "heads.box_head.norm.": "roi_heads.res5.norm.",
    "heads.box_head.": "roi_heads.box_head.",
    "heads.class_logits.": "roi_heads.box_predictor.cls_score.",
    "heads.box_deltas.": "roi_heads.box_predictor.bbox_pred.",
    "heads.mask_head.": "roi_heads.mask_head.",
    "heads.keypoint_head.": "roi_heads.keypoint_head.",
}


def detector_to_detectron2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A `Detector`'s state dict as that of detectron2's model."""
    body = "backbone." if any(name.startswith(_LAYER4) for name in state) else _BOTTOM_UP
    return {_to(name, body): tensor for name, tensor in state.items()}


def detector_from_detectron2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A detectron2 model's state dict as that of a `Detector`.

    Raises:
        InputError: a tensor that no `Detector` has.
    """
    return {_from(name): tensor for name, tensor in state.items()}


def _to(name: str, body: str) -> str:
    if name.startswith(_BODY):
        return body + to_detectron2(name.removeprefix(_BODY))
    if name.startswith(_LAYER4):
        return "roi_heads." + to_detectron2(name.removeprefix("heads.box_head."))
    if match := re.fullmatch(r"backbone\.(lateral|output)\.(\d)\.(conv\.|norm\.)(\w+)", name):
        kind, level, part, last = match.groups()
        return f"backbone.{_PYRAMID[kind]}{int(level) + 2}.{part.removeprefix('conv.')}{last}"
    theirs = _renamed(name, _PREFIXES)
    assert theirs is not None, name
    return theirs


def _from(name: str) -> str:
    if re.match(r"roi_heads\.res5\.\d", name):
        return "heads.box_head." + from_detectron2(name.removeprefix("roi_heads."))
    if match := re.fullmatch(r"backbone\.(fpn_lateral|fpn_output)(\d)\.(norm\.)?(\w+)", name):
        kind, level, norm, last = match.groups()
        return f"backbone.{kind.removeprefix('fpn_')}.{int(level) - 2}.{norm or 'conv.'}{last}"
    if re.match(r"backbone\.(bottom_up\.)?(stem|res[2-5])\.", name):
        return _BODY + from_detectron2(name.removeprefix("backbone.").removeprefix("bottom_up."))
    ours = _renamed(name, {theirs: ours for ours, theirs in _PREFIXES.items()})
    if ours is None:
        raise InputError(f"the detector's tensor {name!r} has no place in ours; is this a Faster or Mask R-CNN?")
    return ours


def _renamed(name: str, prefixes: dict[str, str]) -> str | None:
    """With the first prefix that fits exchanged; None where none does."""
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return None
