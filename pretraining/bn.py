"""Batch normalisation that does not leak which key belongs to which query."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import normalize

from moco_eval.batch_norm import replace_batch_norm
from moco_eval.runtime import gather, rank, world_size

Pixels = Callable[[torch.Tensor], torch.Tensor]  # what travels between processes to what an encoder takes


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation in groups, as if each were on its own GPU: group j is every sample with index % groups == j.

    Running statistics are the mean over groups of each group's moving average; the affine part is shared;
    in evaluation it is ordinary batch normalisation, with the same state-dict keys.
    Source: facebookresearch/moco, CIFAR-10 demo notebook, SplitBatchNorm.
    """

    def __init__(self, num_features: int, groups: int):
        super().__init__(num_features)
        self.groups = groups

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to the same shape. Raises ValueError where N does not divide into the groups."""
        if not self.training:
            return super().forward(input)
        N, C, H, W = input.shape
        if N % self.groups:
            raise ValueError(f"a batch of {N} does not divide into {self.groups} batch-norm groups")
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        if torch.compiler.is_compiling() and not input.is_contiguous():
            return self._channels_last(input)
        grouped = input.reshape(N // self.groups, self.groups * C, H, W)
        mean, var = self.running_mean.repeat(self.groups), self.running_var.repeat(self.groups)
        output = nn.functional.batch_norm(
            grouped,
            mean,
            var,
            self.weight.repeat(self.groups),
            self.bias.repeat(self.groups),
            training=True,
            momentum=self.momentum,
            eps=self.eps,
        )
        self.running_mean.copy_(mean.view(self.groups, C).mean(0))
        self.running_var.copy_(var.view(self.groups, C).mean(0))
        return output.reshape(N, C, H, W)

    def _channels_last(self, input: torch.Tensor) -> torch.Tensor:
        """The same in plain arithmetic, which a compiler fuses; as channels, groups would have to be copied."""
        N, C, H, W = input.shape
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        rows = input.permute(0, 2, 3, 1).reshape(N // self.groups, self.groups, H * W, C).float()
        var, mean = torch.var_mean(rows, dim=(0, 2), correction=0)  # (groups, C)
        count = N // self.groups * H * W
        with torch.no_grad():
            self.running_mean.lerp_(mean.mean(0), self.momentum)
            self.running_var.lerp_(var.mean(0) * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        output = rows * scale[:, None] + (self.bias - mean * scale)[:, None]
        return output.to(input.dtype).view(N, H, W, C).permute(0, 3, 1, 2)


def split_batch_norm(net: nn.Module, groups: int) -> nn.Module:
    """Every BatchNorm2d in groups."""
    return replace_batch_norm(net, lambda features: SplitBatchNorm2d(features, groups))


def permutation(size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A random order of `size` rows and the order that undoes it, each (size,); the same on every rank."""
    forth = torch.randperm(size, generator=generator)
    return forth, torch.argsort(forth)


def shuffle(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """This rank's rows of the global batch in a new order: row i of the result is global row `order[i]`.

    Only the rows a rank needs travel to it, so with R ranks each receives (R - 1)/R of one share, not all of them.

    Args:
        rows: this rank's share of the global batch, (N, ...); shares are equal and lie in rank order.
        order: a permutation of the global batch, (R N,), the same on every rank.
    Returns:
        (N, ...): the rank's share of the permuted batch.
    Source: He et al. 2020, arXiv:1911.05722, Sec. 3.3 (shuffling BN); the exchange is ours.
    """
    ranks, N = world_size(), len(rows)
    if ranks == 1:
        return rows[order.to(rows.device)]
    wanted = order.view(ranks, N)
    owner = wanted // N
    sent = [wanted[to][owner[to] == rank()] - rank() * N for to in range(ranks)]
    received_from = owner[rank()]
    parts = _exchange([rows[part.to(rows.device)] for part in sent], torch.bincount(received_from, minlength=ranks))
    place = torch.argsort(received_from, stable=True)
    result = torch.empty_like(rows)
    result[place.to(rows.device)] = parts
    return result


def _exchange(parts: list[torch.Tensor], counts: torch.Tensor) -> torch.Tensor:
    """Send part r to rank r; return what the others sent here, in rank order."""
    incoming = torch.empty((int(counts.sum()), *parts[0].shape[1:]), dtype=parts[0].dtype, device=parts[0].device)
    dist.all_to_all_single(
        incoming,
        torch.cat(parts),
        output_split_sizes=counts.tolist(),
        input_split_sizes=[len(part) for part in parts],
    )
    return incoming


def unit(features: torch.Tensor) -> torch.Tensor:
    """Rows of length one, in fp32 or the input's own higher precision."""
    return normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)


def encode_shuffled(
    encoder_k: nn.Module,
    view_k: torch.Tensor,
    pixels: Pixels,
    generator: torch.Generator | None,
    collect: Callable[[torch.Tensor], torch.Tensor] = gather,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of this process's images, encoded in other BN groups than their queries. Sec. 3.3.

    Args:
        encoder_k: images to (N, C).
        view_k: (N, 3, H, W), as it travels.
        pixels: makes of it what the encoder takes, after the exchange.
        generator: draws the order, in the same state on every rank; None keeps the keys in place.
        collect: brings all ranks' keys together, (N, C) to (R N, C).
    Returns:
        This process's keys, (N, C), and those of all processes in rank order, (R N, C): one gather serves both
        the way back from the shuffle and the dictionary.
    """
    N = len(view_k)
    if generator is None:
        k = unit(encoder_k(pixels(view_k)))
        return k, collect(k)
    forth, back = permutation(N * world_size(), generator)
    k = unit(encoder_k(pixels(shuffle(view_k, forth))))
    keys = collect(k)[back.to(k.device)]
    return keys[rank() * N : (rank() + 1) * N], keys
