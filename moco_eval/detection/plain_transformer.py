"""ViTDet: a plain vision transformer as a detector's backbone, and the simple feature pyramid of its last map.

The encoder's ViT keeps all its tensors. Its blocks attend inside windows, but for four that see the whole image; each
attention learns relative positions, which start at zero; class token and final norm take no part.
Source: Li et al. 2022, arXiv:2203.16527; facebookresearch/detectron2@02b5c4e2, modeling/backbone/vit.py and projects/
ViTDet; read, not copied.
"""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import StochasticDepth

from moco_eval.config.detection import DetectConfig
from moco_eval.encoders.architectures import architecture
from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.network import Network, network_of

WINDOW = 14  # tokens along one side
PATCH = 16
POSITIONS = ("rel_pos_h", "rel_pos_w")  # what an attention has beside the encoder's tensors


class SimplePyramid(nn.Module):
    """The maps p2 to p5, each made of the ViT's last map alone, and p6, every other place of p5."""

    strides = (4, 8, 16, 32, 64)
    multiple = 32
    channels = 256

    def __init__(self, encoder: Encoder, recipe: DetectConfig):
        super().__init__()
        self.square = recipe.input.max_size
        self.body = _with_positions(encoder, -(-self.square // self.multiple) * self.multiple // PATCH)
        self.whole = _whole(len(self.body.backbone.blocks))
        _drop_paths(self.body.backbone.blocks, recipe.drop_path)
        width = encoder.feature_dim
        self.levels = nn.ModuleList(
            _level(layers, channels, self.channels)
            for layers, channels in (_up(width), _twice(width), _same(width), _half(width))
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        last = self.last_map(images)
        maps = [level(last) for level in self.levels]
        return [*maps, maps[-1][:, :, ::2, ::2]]

    def last_map(self, images: Tensor) -> Tensor:
        """(N, C, H / 16, W / 16), not normalised."""
        vit: Any = self.body.backbone
        x = vit.patch_embed.norm(vit.patch_embed.proj(images).permute(0, 2, 3, 1))
        x = vit.norm_pre(x + _positions(vit, x.shape[1:3]))
        for number, block in enumerate(vit.blocks):
            side = 0 if number in self.whole else WINDOW
            x = x + block.drop_path1(block.ls1(_attend(block.attn, block.norm1(x), side)))
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return x.permute(0, 3, 1, 2)


def obstacle(encoder: Encoder) -> str | None:
    """Why the encoder is no plain ViT that this takes; None where it is one."""
    from timm.layers import Attention
    from timm.models.vision_transformer import Block, VisionTransformer

    vit: Any = encoder.backbone
    if not isinstance(vit, VisionTransformer):
        return "is no plain ViT"
    if not encoder.network.stages:
        return "is somebody's own module, of which no stages are known"
    plain = all(type(block) is Block and type(block.attn) is Attention and not block.attn.gate for block in vit.blocks)
    if not plain or hasattr(vit.patch_embed, "backbone"):
        return "has other parts than a plain ViT's"
    if vit.pos_embed is None:
        return "has no position embedding to be resized to the image"
    stride = encoder.network.stages[-1].stride
    if stride != PATCH:
        return f"has patches of {stride} pixels, and the strides 4 to 32 need {PATCH}"
    return None


# The transformer


def _with_positions(encoder: Encoder, side: int) -> Network:
    """A copy of the ViT whose every attention has relative positions, of a window or of `side` tokens, all zero."""
    network = network_of(copy.deepcopy(encoder.backbone), architecture(encoder.arch))
    blocks: Any = network.backbone.blocks
    whole = _whole(len(blocks))
    for number, block in enumerate(blocks):
        reach = side if number in whole else WINDOW
        for name in POSITIONS:
            block.attn.register_parameter(name, nn.Parameter(torch.zeros(2 * reach - 1, block.attn.head_dim)))
    return network


def _whole(depth: int) -> set[int]:
    """The blocks that see the whole image: the last of each quarter, 2, 5, 8 and 11 of twelve."""
    return {-(-depth * quarter // 4) - 1 for quarter in (1, 2, 3, 4)}


def _drop_paths(blocks: Any, rate: float) -> None:
    """Each image skips a block with a probability that rises from 0 to `rate`."""
    for block, share in zip(blocks, torch.linspace(0, rate, len(blocks)).tolist()):
        block.drop_path1 = block.drop_path2 = StochasticDepth(share, "row") if share else nn.Identity()


def _positions(vit: Any, size: tuple[int, int]) -> Tensor:
    """The patches' position embedding, resized bicubically to a map of that height and width, (1, H, W, C)."""
    height, width = vit.patch_embed.grid_size
    patches = vit.pos_embed[:, -height * width :].unflatten(1, (height, width))
    if (height, width) == tuple(size):
        return patches
    resized = F.interpolate(patches.permute(0, 3, 1, 2), size=tuple(size), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1)


def _attend(attention: Any, x: Tensor, side: int) -> Tensor:
    """Attention over the tokens (N, H, W, C) of windows of `side` tokens, or of the whole map where it is 0."""
    if side == 0:
        return _attention(attention, x)
    N, H, W, C = x.shape
    x = F.pad(x, (0, 0, 0, -W % side, 0, -H % side))
    rows, columns = x.shape[1] // side, x.shape[2] // side
    windows = x.view(N, rows, side, columns, side, C).transpose(2, 3).reshape(-1, side, side, C)
    windows = _attention(attention, windows)
    x = windows.view(N, rows, columns, side, side, -1).transpose(2, 3).reshape(N, rows * side, columns * side, -1)
    return x[:, :H, :W]


def _attention(attention: Any, x: Tensor) -> Tensor:
    """Multi-head attention among tokens (N, H, W, C), each logit with its relative row's and column's share."""
    N, H, W, _ = x.shape
    parts = attention.qkv(x).view(N, H * W, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = attention.q_norm(parts[0]), attention.k_norm(parts[1]), parts[2]
    places = q.unflatten(2, (H, W))
    rows = torch.einsum("nahwc,hkc->nahwk", places, _relative(attention.rel_pos_h, H))
    columns = torch.einsum("nahwc,wkc->nahwk", places, _relative(attention.rel_pos_w, W))
    bias = (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=attention.scale)
    x = attention.norm(x.transpose(1, 2).reshape(N, H, W, -1))
    return attention.proj(x)


def _relative(positions: Tensor, length: int) -> Tensor:
    """Of query i and key j of `length` the embedding of i - j, (length, length, C), resized linearly where it must."""
    if len(positions) != 2 * length - 1:
        positions = F.interpolate(positions.T[None], size=2 * length - 1, mode="linear")[0].T
    places = torch.arange(length, device=positions.device)
    return positions[places[:, None] - places[None, :] + length - 1]


# The pyramid


def _up(width: int) -> tuple[list[nn.Module], int]:
    """Four times as large."""
    first, second = nn.ConvTranspose2d(width, width // 2, 2, 2), nn.ConvTranspose2d(width // 2, width // 4, 2, 2)
    return [first, LayerNorm2d(width // 2, eps=1e-6), nn.GELU(), second], width // 4


def _twice(width: int) -> tuple[list[nn.Module], int]:
    return [nn.ConvTranspose2d(width, width // 2, 2, 2)], width // 2


def _same(width: int) -> tuple[list[nn.Module], int]:
    return [], width


def _half(width: int) -> tuple[list[nn.Module], int]:
    return [nn.MaxPool2d(2, 2)], width


def _level(layers: list[nn.Module], width: int, channels: int) -> nn.Sequential:
    """What resizes the map, then a 1x1 and a 3x3 convolution, each with a layer norm."""
    return nn.Sequential(*layers, convolution(width, channels, 1), convolution(channels, channels, 3))


def convolution(channels: int, to: int, side: int) -> nn.Sequential:
    """A convolution and a layer norm over the channels of each place, as PyTorch draws them."""
    return nn.Sequential(
        OrderedDict(conv=nn.Conv2d(channels, to, side, padding=side // 2, bias=False), norm=LayerNorm2d(to, eps=1e-6))
    )
