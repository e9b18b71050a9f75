"""The detector that needs no detectron2: Faster R-CNN of torchvision's blocks, by detectron2's definitions.

Where torchvision's blocks differ from detectron2's they are overridden, in proposals.py and regions.py; images are
padded no further than the batch. docs/detection.md lists every difference.
"""

import copy
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from moco_eval import runtime
from moco_eval.data.loader import swap_colours
from moco_eval.detection.inputs import seed_of
from moco_eval.detection.proposals import proposal_network
from moco_eval.detection.recipe import DetectConfig
from moco_eval.detection.regions import region_heads
from moco_eval.encoders.build import ARCHITECTURES
from moco_eval.encoders.encoder import Encoder, Preprocessing
from moco_eval.errors import InputError

STAGES = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")


class Detector(nn.Module):
    """Faster R-CNN on layer3 (C4); layer4, an extra BN and the mean over places are the head of each region.

    In training: 8-bit RGB images (3, H, W) of any size and their targets (boxes (N, 4), labels (N,) from 1)
    to losses by name. In evaluation: images to dicts of boxes, scores and labels, in the images' pixels.
    Source: arXiv:1911.05722, appendix A.3, and the released detection code.
    """

    def __init__(self, encoder: Encoder, classes: int, recipe: DetectConfig):
        super().__init__()
        net = encoder.backbone
        self.backbone = nn.Sequential(OrderedDict((name, copy.deepcopy(getattr(net, name))) for name in STAGES))
        self.rpn = proposal_network(encoder.feature_dim // 2, recipe)
        self.heads = region_heads(copy.deepcopy(net.layer4), encoder.feature_dim, classes, recipe)
        self.requires_grad_(True)
        pixels = encoder.preprocessing or Preprocessing()
        mean, std = (255 * torch.tensor(values)[:, None, None] for values in pixels.rgb())
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.swap = pixels.channels != "RGB"

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None):
        batch = self._batch(images)
        features = {"0": self.backbone(batch.tensors)}
        proposals, proposal_losses = self.rpn(batch, features, targets)
        found, losses = self.heads(features, proposals, batch.image_sizes, targets)
        return losses | proposal_losses if self.training else found

    def _batch(self, images: list[Tensor]) -> ImageList:
        """Normalise, then pad with zeros to the largest of the batch."""
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        height, width = (max(sides) for sides in zip(*sizes))
        batch = self.mean.new_zeros((len(images), 3, height, width))
        for place, image in zip(batch, images):
            place[:, : image.shape[1], : image.shape[2]] = (image.to(batch) - self.mean) / self.std
        return ImageList(swap_colours(batch) if self.swap else batch, sizes)


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


def build_detector(encoder: Encoder, classes: int, recipe: DetectConfig) -> Detector:
    """The detector with every backbone tensor of the encoder, bit for bit; the rest is drawn by the seed."""
    torch.manual_seed(seed_of(recipe.seed, 0))
    model = Detector(encoder, classes, recipe)
    ours = model.backbone.state_dict() | {f"layer4.{k}": v for k, v in model.heads.box_head.layer4.state_dict().items()}
    theirs = encoder.backbone.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].cpu(), tensor.cpu()) for name, tensor in theirs.items())
    runtime.log(f"detector: {len(ours)} of {len(theirs)} backbone tensors of {encoder.source}, bit for bit")
    return model
