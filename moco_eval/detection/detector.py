"""The detector that needs no detectron2, and is detectron2's in every number.

docs/detection.md says in what torchvision's own detectors differ; detector_names.py has detectron2's names.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from moco_eval.config.detection import DetectConfig
from moco_eval.data.loader import swap_colours
from moco_eval.detection.backbones import (
    C4,
    STRIDES,
    DilatedC5,
    Pyramid,
    hold_still_what_no_map_needs,
    pyramid_stages,
    takes_any_size,
)
from moco_eval.detection.plain_transformer import POSITIONS, SimplePyramid, obstacle
from moco_eval.detection.proposals import ProposalNetwork, Size
from moco_eval.detection.regions import RegionHeads
from moco_eval.encoders.architectures import ARCHITECTURES
from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.network import Network, has_tokens
from moco_eval.errors import InputError
from moco_eval.preprocessing import Preprocessing
from moco_eval.runtime import console
from moco_eval.runtime.seeds import seed_of


class Detector(nn.Module):
    """Faster R-CNN on C4, dilated C5, a pyramid or a ViT's simple pyramid, with masks or keypoints if so asked.

    In training: 8-bit RGB images (3, H, W) of any size and their targets (boxes (N, 4), labels (N,) from 1; `masks`,
    `keypoints`) to losses by detectron2's names. In evaluation: images to dicts of boxes, scores and labels (and masks
    (N, M, M) as probabilities, keypoints (N, K, 3)), in the images' pixels.
    Source: arXiv:1911.05722, appendix A.3, and the released detection code.
    """

    def __init__(self, encoder: Encoder, classes: int, recipe: DetectConfig, keypoints: int = 0):
        super().__init__()
        self.backbone = _backbone(encoder, recipe)
        convolutions = 2 if recipe.model == "vitdet" else 1
        self.rpn = ProposalNetwork(
            self.backbone.channels, self.backbone.strides, recipe.anchors, recipe.rpn, convolutions
        )
        layer4 = copy.deepcopy(encoder.backbone.layer4) if isinstance(self.backbone, C4) else None
        self.heads = RegionHeads(self.backbone, layer4, classes, recipe, keypoints)
        self.requires_grad_(True)
        if isinstance(self.backbone.body, Network):
            hold_still_what_no_map_needs(self.backbone)
        pixels = encoder.preprocessing or Preprocessing()
        mean, std = (torch.tensor([255 * value for value in values])[:, None, None] for values in pixels.rgb())
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.swap = pixels.channels != "RGB"

    def forward(self, images: list[Tensor], targets: list[dict[str, Any]] | None = None):
        batch, sizes = self.batch(images)
        maps = self.backbone(batch)
        proposals, proposal_losses = self.rpn(maps, sizes, targets)
        detections, losses = self.heads(maps, proposals, sizes, targets)
        return losses | proposal_losses if self.training else detections

    def batch(self, images: list[Tensor]) -> tuple[Tensor, list[Size]]:
        """Normalise, then pad with zeros to the largest of the batch, or on to the backbone's multiple or square."""
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        multiple, square = self.backbone.multiple, self.backbone.square
        height, width = (-(-max(*sides, square) // multiple) * multiple for sides in zip(*sizes))
        batch = self.mean.new_zeros((len(images), 3, height, width))
        for place, image in zip(batch, images):
            place[:, : image.shape[1], : image.shape[2]] = (image.to(batch) - self.mean) / self.std
        return swap_colours(batch) if self.swap else batch, sizes

    def encoder_tensors(self) -> dict[str, Tensor]:
        """The detector's copy of the encoder's backbone, by the encoder's names."""
        body = self.backbone.body
        ours = (body.backbone if isinstance(body, Network) else body).state_dict()
        if isinstance(self.backbone, SimplePyramid):
            ours = {name: tensor for name, tensor in ours.items() if not name.endswith(POSITIONS)}
        if isinstance(self.backbone, C4):
            ours |= {f"layer4.{name}": tensor for name, tensor in self.heads.box_head.layer4.state_dict().items()}
        return ours


def _backbone(encoder: Encoder, recipe: DetectConfig) -> C4 | DilatedC5 | Pyramid | SimplePyramid:
    if recipe.model == "vitdet":
        return SimplePyramid(encoder, recipe)
    kinds: dict[str, type[C4] | type[DilatedC5] | type[Pyramid]]
    kinds = {"r50_c4": C4, "r50_dc5": DilatedC5, "r50_fpn": Pyramid}
    return kinds[recipe.model](encoder)


def check_architecture(encoder: Encoder, model: str = "r50_c4") -> None:
    """Raises InputError where the recipe's model takes no such network, with a recipe that does."""
    arch = ARCHITECTURES.get(encoder.arch)
    if arch is None:
        if why := _other_obstacle(encoder, model):
            raise InputError(f"detect by model {model} {why}; {_way_out(encoder)}")
        return
    if model == "vitdet":
        raise InputError(
            f"detect by model vitdet needs a plain ViT, and {encoder.arch} is a ResNet; take --recipe r50_c4_24k or "
            "coco_r50_fpn_1x"
        )
    if arch.cifar_stem:
        raise InputError(
            f"detect cannot take {encoder.arch}: its CIFAR stem leaves layer3 at stride 4, C4 is "
            f"defined at 16; take {encoder.arch.partition('_cifar')[0]}"
        )


def _other_obstacle(encoder: Encoder, model: str) -> str | None:
    """Why a model cannot be made of a network that is no ResNet of ours; None where it can."""
    if model == "vitdet":
        why = obstacle(encoder)
        return f"needs a plain ViT, and {encoder.arch!r} {why}" if why else None
    if model != "r50_fpn":
        return f"needs a ResNet, and {encoder.arch!r} is none of ours"
    stages = pyramid_stages(encoder.network)
    if len(stages) < len(STRIDES):
        strides = sorted({stage.stride for stage in encoder.network.stages})
        have = f"has {', '.join(map(str, strides))}" if strides else "says of none"
        return f"needs maps of strides 4, 8, 16 and 32, and {encoder.arch!r} {have}"
    if not takes_any_size(encoder.network):
        return f"needs a network for images of any size, and {encoder.arch!r} takes {encoder.network.size} pixels only"
    return None


def _way_out(encoder: Encoder) -> str:
    """Which recipe would take the encoder."""
    network = encoder.network
    if network.stages and has_tokens(network.backbone) and obstacle(encoder) is None:
        return "take --recipe coco_vitdet_b or voc_own_vitdet_b_24k"
    if len(pyramid_stages(network)) == len(STRIDES) and takes_any_size(network):
        return "take --recipe coco_r50_fpn_1x, whose pyramid takes any network with these strides"
    return (
        "take a ResNet such as resnet50, a network of any size with strides 4 to 32 (--recipe coco_r50_fpn_1x), or a "
        "plain ViT with patches of 16 (--recipe coco_vitdet_b)"
    )


def build_detector(encoder: Encoder, classes: int, recipe: DetectConfig, keypoints: int = 0) -> Detector:
    """The detector with every backbone tensor of the encoder, bit for bit; the rest is drawn by the seed."""
    torch.manual_seed(seed_of(recipe.seed, 0))
    model = Detector(encoder, classes, recipe, keypoints)
    ours, theirs = model.encoder_tensors(), encoder.backbone.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].cpu(), tensor.cpu()) for name, tensor in theirs.items())
    console.log(f"detector: {len(ours)} of {len(theirs)} backbone tensors of {encoder.source}, bit for bit")
    return model
