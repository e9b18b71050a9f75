"""Vision transformers as MoCo v3 starts them: timm's networks with fixed positions and weights of their own."""

import math
from typing import Any

import torch
from torch import nn

from moco_eval.encoders.architectures import VisionTransformer, architecture, build_transformer
from moco_eval.encoders.conv_stem import ConvStem

FREQUENCIES = 10000.0


def build_vit(name: str, freeze_patches: bool, places: str = "sincos") -> Any:
    """A ViT with MoCo v3's initialisation and no head.

    Positions are fixed; the linear layers are Xavier's, queries, keys and values each on its own; biases are 0. A stem
    of convolutions keeps torch's own.

    Args:
        freeze_patches: the random projection of patches is not trained.
        places: sincos; or, as in Sec. 6.2, learned from timm's random ones, or none, which are zeros that stay.
    Source: arXiv:2104.02057, Sec. 4; facebookresearch/moco-v3@c349e6e: vits.py, what it computes.
    """
    arch, net = architecture(name), build_transformer(name)
    assert isinstance(arch, VisionTransformer)
    if places != "learned":
        side = arch.size // arch.patch
        fixed = positions(side, side, arch.dim) * (places == "sincos")
        net.pos_embed = nn.Parameter(fixed, requires_grad=False)
    for layer, module in net.named_modules():
        if isinstance(module, nn.Linear):
            xavier(module.weight, parts=3 if layer.endswith("qkv") else 1)
            nn.init.zeros_(module.bias)
    nn.init.normal_(net.cls_token, std=1e-6)
    patches = net.patch_embed
    if not isinstance(patches, ConvStem):
        xavier(patches.proj.weight.data.flatten(1))
        nn.init.zeros_(patches.proj.bias)
        patches.proj.requires_grad_(not freeze_patches)
    return net


def xavier(weight: torch.Tensor, parts: int = 1) -> None:
    """Uniform in plus or minus sqrt(6 / (in + out)), in place; `parts` matrices stand in one, (parts * out, in)."""
    bound = math.sqrt(6 / (weight.shape[0] // parts + weight.shape[1]))
    nn.init.uniform_(weight, -bound, bound)


def positions(height: int, width: int, dim: int) -> torch.Tensor:
    """Sines and cosines of where a patch lies: its row in the first half, its column in the second.

    Each half is D/4 sines, then D/4 cosines, of frequencies 10000^(-j / (D/4)). The class token's place is zeros.

    Returns:
        (1, 1 + height * width, dim), patches row by row.
    """
    assert dim % 4 == 0
    rates = FREQUENCIES ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [place.flatten()[:, None] * rates for place in (rows, columns)]
    patches = torch.cat([wave for each in angles for wave in (each.sin(), each.cos())], dim=1)
    return torch.cat([torch.zeros(1, dim), patches.float()])[None]
