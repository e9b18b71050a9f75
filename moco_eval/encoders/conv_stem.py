"""MoCo v3's patches from a stem of convolutions, which timm does not have."""

from itertools import pairwise

from torch import Tensor, nn

PATCH = 16  # pixels: four convolutions of stride 2


class ConvStem(nn.Module):
    """3x3 convolutions of stride 2 with batch norms and ReLUs, D/8 to D channels wide, then a 1x1 convolution.

    Takes the place of timm's PatchEmbed: (N, C, H, W) to tokens (N, HW/256, D).

    Source: Xiao et al. 2021, arXiv:2106.14881; facebookresearch/moco-v3@c349e6e: vits.py, class ConvStem.
    """

    def __init__(self, img_size: int = 224, patch_size: int = PATCH, in_chans: int = 3, embed_dim: int = 768, **_):
        super().__init__()
        assert patch_size == PATCH and img_size % PATCH == 0 and embed_dim % 8 == 0
        side = img_size // PATCH
        self.img_size, self.patch_size, self.grid_size = (img_size, img_size), (PATCH, PATCH), (side, side)
        self.num_patches = side * side
        widths = [in_chans, *(embed_dim // share for share in (8, 4, 2, 1))]
        layers: list[nn.Module] = []
        for width, wider in pairwise(widths):
            layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(wider)]
            layers.append(nn.ReLU(inplace=True))
        self.proj = nn.Sequential(*layers, nn.Conv2d(embed_dim, embed_dim, 1))

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != self.img_size:
            raise ValueError(f"images of {tuple(images.shape[-2:])} pixels; the network takes {self.img_size}")
        return self.proj(images).flatten(2).transpose(1, 2)
