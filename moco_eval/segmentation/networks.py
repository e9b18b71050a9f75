"""What makes scores of pixels: FCN-16s and mmsegmentation's FCN on a ResNet, and linear heads on any frozen encoder.

Source: He et al. 2020, arXiv:1911.05722, Section 4.2.2 (FCN-16s); mmsegmentation 0.x, FCNHead and ResNet, read, not
copied; Oquab et al. 2023, arXiv:2304.07193 (linear).
"""

import copy
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import ResNet

from moco_eval.config.segmentation import SegmentConfig
from moco_eval.data.loader import swap_colours
from moco_eval.data.masks.samples import IGNORED
from moco_eval.encoders.architectures import ARCHITECTURES
from moco_eval.encoders.dilation import dilate, refine
from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.network import Network, has_tokens
from moco_eval.errors import InputError
from moco_eval.preprocessing import Preprocessing
from moco_eval.runtime import collectives, console, rank
from moco_eval.runtime.seeds import seed_of

PARTS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
STRIDE = 16  # of FCN-16s, whose images have 16 k + 1 pixels along a side


# Bodies


class Resnet(nn.Module):
    """The encoder's ResNet, to be trained; images (N, 3, H, W) to the maps of layer3 and layer4.

    Args:
        dilations: of layer3 and layer4, each for its first block and for the others; None leaves a stage as it is.
    """

    def __init__(self, encoder: Encoder, dilations: tuple[tuple[int, int] | None, tuple[int, int] | None]):
        super().__init__()
        self.body = nn.Sequential(OrderedDict((name, copy.deepcopy(getattr(encoder.backbone, name))) for name in PARTS))
        self.body.requires_grad_(True)
        for stage, dilation in zip((self.body.layer3, self.body.layer4), dilations):
            if dilation:
                first, others = dilation
                dilate(stage, others, first)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps, x = [], images
        for name, part in self.body.named_children():
            x = part(x)
            if name in ("layer3", "layer4"):
                maps.append(x)
        return maps


class Frozen(nn.Module):
    """The encoder as it is; images (N, 3, H, W) to the map of its last stage, without gradient.

    Of a transformer these are its normalised patch tokens; its position embedding is resampled to the recipe's windows,
    filled up to whole patches on all sides.

    Args:
        side: pixels of the recipe's windows.
        output_stride: of the map of a ResNet, whose stages are dilated where it is smaller than theirs.
    """

    def __init__(self, encoder: Encoder, side: int, output_stride: int | None = None):
        super().__init__()
        network = encoder.network
        if output_stride is not None and isinstance(network.backbone, ResNet):
            network = _of_stride(network, output_stride)
        self.last = network.stages[-1]
        self.multiple = self.last.stride if has_tokens(network.backbone) else 1
        filled = -(-side // self.multiple) * self.multiple
        if network.size not in (None, filled):
            network = _of_another_size(encoder, network, filled)
        self.network = network.eval()

    def train(self, mode: bool = True) -> "Frozen":
        """Norms and dropout stay as in evaluation."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        height, width = (-(-side // self.multiple) * self.multiple - side for side in images.shape[2:])
        if height or width:
            images = F.pad(images, (width // 2, width - width // 2, height // 2, height - height // 2))
        return self.network.maps(images, [self.last.name])


def _of_stride(network: Network, stride: int) -> Network:
    """A copy of a ResNet's network with no map coarser than this."""
    backbone = copy.deepcopy(network.backbone)
    for stage in network.stages:
        if (times := stage.stride // stride) > 1:
            refine(backbone.get_submodule(stage.name), times)
    stages = tuple(replace(stage, stride=min(stage.stride, stride)) for stage in network.stages)
    return Network(backbone, stages, network.pooling, network.in_channels, network.size)


def _of_another_size(encoder: Encoder, network: Network, side: int) -> Network:
    """A copy that takes images of `side` pixels. Raises InputError where timm has no way to it."""
    backbone: Any = copy.deepcopy(network.backbone)
    if not hasattr(backbone, "set_input_size"):
        only = network.size or 0
        raise InputError(
            f"{encoder.source} takes images of {only} pixels only, and the recipe's have {side}; take "
            f"--set views.crop={only} --set test.window={only} --set test.stride={only * 2 // 3}"
        )
    backbone.set_input_size(img_size=(side, side))
    return Network(backbone, network.stages, network.pooling, network.in_channels, side)


# Heads: maps of a body to scores, (N, classes, h, w)


class Fcn16sHead(nn.Sequential):
    """Two 3x3 convolutions of 256 channels, dilation 6, with BN and ReLU; then 1x1 to the classes."""

    def __init__(self, channels: int, classes: int):
        super().__init__(_block(channels, 256, dilation=6), _block(256, 256, dilation=6), _classifier(256, classes))


class FcnHead(nn.Module):
    """mmsegmentation's FCNHead: two 3x3 convolutions of 512 channels, their input beside them in a third, 1x1."""

    def __init__(self, channels: int, classes: int, dropout: float):
        super().__init__()
        self.convolutions = nn.Sequential(_block(channels, 512), _block(512, 512))
        self.together = _block(channels + 512, 512)
        self.classifier = nn.Sequential(nn.Dropout2d(dropout), _classifier(512, classes))

    def forward(self, maps: Tensor) -> Tensor:
        return self.classifier(self.together(torch.cat((maps, self.convolutions(maps)), dim=1)))


def auxiliary_head(channels: int, classes: int, dropout: float) -> nn.Sequential:
    """mmsegmentation's on layer3: one 3x3 convolution of 256 channels, then 1x1."""
    return nn.Sequential(_block(channels, 256), nn.Dropout2d(dropout), _classifier(256, classes))


def linear_head(channels: int, classes: int, dropout: float) -> nn.Sequential:
    """DINOv2's: BN, then 1x1 to the classes."""
    layers = [nn.BatchNorm2d(channels), nn.Dropout2d(dropout), _classifier(channels, classes)]
    return nn.Sequential(*(layer for layer in layers if dropout or not isinstance(layer, nn.Dropout2d)))


def _block(channels: int, to: int, dilation: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels, to, 3, padding=dilation, dilation=dilation, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(OrderedDict(conv=convolution, norm=nn.BatchNorm2d(to), relu=nn.ReLU(inplace=True)))


def _classifier(channels: int, classes: int) -> nn.Conv2d:
    convolution = nn.Conv2d(channels, classes, 1)
    nn.init.normal_(convolution.weight, std=0.01)
    nn.init.zeros_(convolution.bias)
    return convolution


# The whole


class Segmenter(nn.Module):
    """A body with one head or several.

    In training: 8-bit RGB images (N, 3, H, W) and masks (N, H, W) to losses. `scores` is what it says of images.

    Attributes:
        chosen: the head that speaks, of those of a sweep.
    """

    chosen: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Encoder, classes: int, recipe: SegmentConfig):
        super().__init__()
        self.recipe = recipe
        body = body_of(encoder, recipe)
        # a frozen encoder is none of its modules: it is neither trained nor kept in last.pth
        self.outside = [body] if isinstance(body, Frozen) else []
        self.inside = body if isinstance(body, Resnet) else None
        channels = encoder.network.stages[-1].channels
        self.heads = nn.ModuleList(_heads(channels, classes, recipe))
        self.auxiliary = auxiliary_head(channels // 2, classes, recipe.dropout) if recipe.auxiliary else None
        pixels = encoder.preprocessing or Preprocessing()
        mean, std = (torch.tensor([255 * value for value in values])[:, None, None] for values in pixels.rgb())
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.register_buffer("chosen", torch.tensor(0))
        self.swap = pixels.channels != "RGB"

    @property
    def body(self) -> nn.Module:
        """What makes the maps: trained, or frozen."""
        return self.outside[0] if self.inside is None else self.inside

    def maps(self, images: Tensor) -> list[Tensor]:
        """Of 8-bit RGB images; with corners on corners they are filled up to 16 k + 1 pixels with the mean."""
        x = (images.to(self.mean) - self.mean) / self.std
        height, width = (self._missing(side) for side in x.shape[2:])
        x = F.pad(x, (0, width, 0, height)) if height or width else x
        return self.body(swap_colours(x) if self.swap else x)

    def _missing(self, side: int) -> int:
        return -(side - 1) % STRIDE if self.recipe.align_corners else 0

    def enlarged(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        """Scores (N, classes, h, w) of a map at the size of its images, bilinearly, in fp32."""
        full = [side + self._missing(side) for side in size]
        large = F.interpolate(scores.float(), full, mode="bilinear", align_corners=self.recipe.align_corners)
        return large[:, :, : size[0], : size[1]]

    def scores(self, images: Tensor, head: int) -> Tensor:
        """Of one head, (N, classes, H, W) fp32."""
        return self.enlarged(self.heads[head](self.maps(images)[-1]), (images.shape[2], images.shape[3]))

    def forward(self, images: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """Losses by name; their sum is what is trained on. Of several processes their mean is that of one."""
        maps, count = self.maps(images), self._pixels(masks)
        names = ["loss_seg"] if len(self.heads) == 1 else [f"loss_head_{number}" for number in range(len(self.heads))]
        losses = {name: self._loss(head(maps[-1]), masks, count) for name, head in zip(names, self.heads)}
        if self.auxiliary is not None:
            losses["loss_aux"] = self.recipe.auxiliary * self._loss(self.auxiliary(maps[0]), masks, count)
        return losses

    def _pixels(self, masks: Tensor) -> Tensor:
        """Pixels that the mean is over, as many as this process has on average."""
        if self.recipe.mean_over == "all":
            return torch.tensor(float(masks.numel()), device=masks.device)
        if rank.world_size() == 1:
            return (masks != IGNORED).sum().clamp_min(1).float()  # MPS has no float64
        count = collectives.all_sum((masks != IGNORED).sum(dtype=torch.float64))
        return (count / rank.world_size()).clamp_min(1.0).float()

    def _loss(self, scores: Tensor, masks: Tensor, count: Tensor) -> Tensor:
        """Of a sweep each head's large scores are computed again in the backward pass, and never kept side by side."""
        if len(self.heads) == 1:
            return self._cross_entropy(scores, masks, count)
        loss: Tensor = checkpoint(self._cross_entropy, scores, masks, count, use_reentrant=False)
        return loss

    def _cross_entropy(self, scores: Tensor, masks: Tensor, count: Tensor) -> Tensor:
        large = self.enlarged(scores, (masks.shape[1], masks.shape[2]))
        return F.cross_entropy(large, masks.long(), ignore_index=IGNORED, reduction="sum") / count


def _heads(channels: int, classes: int, recipe: SegmentConfig) -> list[nn.Module]:
    """One, or one for each pair of a sweep; those of a sweep begin alike."""
    if recipe.model == "fcn16s":
        return [Fcn16sHead(channels, classes)]
    if recipe.model == "fcn_d8":
        return [FcnHead(channels, classes, recipe.dropout)]
    head = linear_head(channels, classes, recipe.dropout)
    return [copy.deepcopy(head) for _ in sweep_of(recipe)]


def sweep_of(recipe: SegmentConfig) -> list[tuple[float, float]]:
    """Rate and decay of each head."""
    if recipe.sweep is None:
        return [(recipe.optimizer.lr, recipe.optimizer.weight_decay)]
    return [(lr, decay) for lr in recipe.sweep.lr for decay in recipe.sweep.weight_decay]


def body_of(encoder: Encoder, recipe: SegmentConfig) -> Resnet | Frozen:
    """What a recipe's heads stand on."""
    if recipe.model == "linear":
        return Frozen(encoder, recipe.test.window or recipe.views.crop, recipe.output_stride)
    return Resnet(encoder, (None, (2, 2)) if recipe.model == "fcn16s" else ((1, 2), (2, 4)))


def check_encoder(encoder: Encoder, recipe: SegmentConfig) -> None:
    """Raises InputError where the recipe's model does not stand on the encoder."""
    network = encoder.network
    if recipe.model != "linear":
        _require_resnet(encoder, recipe)
    elif not network.stages:
        raise InputError(
            f"{encoder.source} does not say where its maps are, so that no linear head stands on them; take an encoder "
            "of a known architecture"
        )
    elif network.size is not None and recipe.test.window != recipe.views.crop:
        raise InputError(
            f"{encoder.source} takes images of one size: views.crop {recipe.views.crop} and test.window "
            f"{recipe.test.window} must be the same; take --set test.window={recipe.views.crop} "
            f"--set test.stride={recipe.views.crop * 2 // 3}"
        )
    if recipe.model == "linear":
        Frozen(encoder, recipe.views.crop)


def _require_resnet(encoder: Encoder, recipe: SegmentConfig) -> None:
    arch = ARCHITECTURES.get(encoder.arch)
    if arch is None:
        raise InputError(
            f"model {recipe.model} needs a ResNet and {encoder.arch!r} is none; take --recipe linear, or one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    if arch.cifar_stem:
        raise InputError(
            f"model {recipe.model} cannot take {encoder.arch}: its CIFAR stem leaves layer3 at stride 4, where it is "
            f"defined at 16; take {encoder.arch.partition('_cifar')[0]}, or --recipe linear"
        )


def build_segmenter(encoder: Encoder, classes: int, recipe: SegmentConfig) -> Segmenter:
    """The network with every backbone tensor of the encoder; the heads are drawn by the seed."""
    torch.manual_seed(seed_of(recipe.seed, 0))
    model = Segmenter(encoder, classes, recipe)
    if model.inside is not None:
        ours, theirs = model.inside.body.state_dict(), encoder.backbone.state_dict()
        assert all(torch.equal(ours[name].cpu(), tensor.cpu()) for name, tensor in theirs.items())
        console.log(f"segmentation: {len(ours)} of {len(theirs)} backbone tensors of {encoder.source}, bit for bit")
    return model
