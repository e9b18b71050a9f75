"""LARS as MoCo v3 trains its ResNets: trust ratios for matrices and kernels alone, momentum after the ratio.

timm's Lars is not it: it divides by |g| + wd |w| instead of |g + wd w|, and scales vectors with the rest.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

TRUST = 0.001


class Lars(torch.optim.Optimizer):
    """Layer-wise rates: g = g + wd w, then 0.001 |w| / |g| g; mu = momentum mu + g; w = w - lr mu.

    Vectors and scalars (biases, scales of norms) take their gradient as it is, at the full rate and without decay. The
    ratio is 1 where a weight or its gradient is 0.
    Source: You et al. 2017, arXiv:1708.03888; facebookresearch/moco-v3@c349e6e: moco/optimizer.py, what it computes.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """One step of every parameter that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    buffer = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                    buffer.mul_(group["momentum"]).add_(trusted(weight, group["weight_decay"]))
                    weight.sub_(buffer, alpha=group["lr"])


def trusted(weight: torch.Tensor, weight_decay: float) -> torch.Tensor:
    """The gradient with its decay and its trust ratio; a vector's as it is."""
    gradient = weight.grad
    assert gradient is not None
    if weight.ndim <= 1:
        return gradient
    gradient = gradient.add(weight, alpha=weight_decay)
    size, slope = weight.norm(), gradient.norm()
    ratio = torch.where((size > 0) & (slope > 0), TRUST * size / slope, 1.0)
    return gradient * ratio
