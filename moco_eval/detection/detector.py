"""The detector that needs no detectron2, and is detectron2's in every number.

docs/detection.md says in what torchvision's own detectors differ; detector_names.py has detectron2's names.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from moco_eval.config.detection import DetectConfig
from moco_eval.data.loader import swap_colours
from moco_eval.detection.backbones import BACKBONES, C4
from moco_eval.detection.proposals import ProposalNetwork, Size
from moco_eval.detection.regions import RegionHeads
from moco_eval.encoders.architectures import ARCHITECTURES
from moco_eval.encoders.encoder import Encoder
from moco_eval.errors import InputError
from moco_eval.preprocessing import Preprocessing
from moco_eval.runtime import console
from moco_eval.runtime.seeds import seed_of


class Detector(nn.Module):
    """Faster R-CNN on C4, dilated C5 or a pyramid, with masks or keypoints where the recipe asks for them.

    In training: 8-bit RGB images (3, H, W) of any size and their targets (boxes (N, 4), labels (N,) from 1; `masks`,
    `keypoints`) to losses by detectron2's names. In evaluation: images to dicts of boxes, scores and labels (and masks
    (N, M, M) as probabilities, keypoints (N, K, 3)), in the images' pixels.
    Source: arXiv:1911.05722, appendix A.3, and the released detection code.
    """

    def __init__(self, encoder: Encoder, classes: int, recipe: DetectConfig, keypoints: int = 0):
        super().__init__()
        self.backbone = BACKBONES[recipe.model](encoder)
        self.rpn = ProposalNetwork(self.backbone.channels, self.backbone.strides, recipe.anchors, recipe.rpn)
        layer4 = copy.deepcopy(encoder.backbone.layer4) if isinstance(self.backbone, C4) else None
        self.heads = RegionHeads(self.backbone, layer4, classes, recipe, keypoints)
        self.requires_grad_(True)
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
        """Normalise, then pad with zeros to the largest of the batch, or on to the multiple that the backbone needs."""
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        multiple = self.backbone.multiple
        height, width = (-(-max(sides) // multiple) * multiple for sides in zip(*sizes))
        batch = self.mean.new_zeros((len(images), 3, height, width))
        for place, image in zip(batch, images):
            place[:, : image.shape[1], : image.shape[2]] = (image.to(batch) - self.mean) / self.std
        return swap_colours(batch) if self.swap else batch, sizes

    def encoder_tensors(self) -> dict[str, Tensor]:
        """The detector's copy of the encoder's backbone, by the encoder's names."""
        ours = self.backbone.body.state_dict()
        if isinstance(self.backbone, C4):
            ours |= {f"layer4.{name}": tensor for name, tensor in self.heads.box_head.layer4.state_dict().items()}
        return ours


def check_architecture(encoder: Encoder) -> None:
    """Raises InputError where the encoder is no ResNet with stride 16 at layer3."""
    arch = ARCHITECTURES.get(encoder.arch)
    if arch is None:
        raise InputError(f"detect needs a ResNet and {encoder.arch!r} is none; take one of {', '.join(ARCHITECTURES)}")
    if arch.cifar_stem:
        raise InputError(
            f"detect cannot take {encoder.arch}: its CIFAR stem leaves layer3 at stride 4, C4 is "
            f"defined at 16; take {encoder.arch.partition('_cifar')[0]}"
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
