"""A batch that does not fit on its device: its images pass the backbone in parts, and the head all together."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pretraining.shuffle_bn import Pixels


def in_parts(encoder: nn.Module, images: torch.Tensor, pixels: Pixels, parts: int) -> torch.Tensor:
    """What an encoder gives for a batch, (N, C), with memory for the activations of one part.

    Two passes: no activation of the backbone is kept in the first; the backward pass runs each part again, with the
    random numbers that it had, and takes its gradient. Exact where the backbone looks at each image alone, which no
    batch norm does. The head's batch norms see the whole batch, once.

    Args:
        encoder: a backbone whose head is `fc` or `head`.
        images: (N, 3, H, W), as they travel; `pixels` makes of them what the encoder takes.
        parts: how many, of equal size.
    Source: Chen et al. 2016, arXiv:1604.06174; for contrastive losses Gao et al. 2021, arXiv:2101.06983.
    """

    def features(part: torch.Tensor) -> torch.Tensor:
        with headless(encoder):
            return encoder(pixels(part))  # (N / parts, D)

    rows = [checkpoint(features, part, use_reentrant=False) for part in images.chunk(parts)]
    return getattr(encoder, place_of_head(encoder))(torch.cat(rows))


@contextmanager
def headless(encoder: nn.Module) -> Iterator[None]:
    """Within, the encoder gives its pooled features, (N, D)."""
    place = place_of_head(encoder)
    head = getattr(encoder, place)
    setattr(encoder, place, nn.Identity())
    try:
        yield
    finally:
        setattr(encoder, place, head)


def place_of_head(encoder: nn.Module) -> str:
    """Where its head is: `fc` of a ResNet, `head` of a ViT."""
    return "fc" if hasattr(encoder, "fc") else "head"
