"""Batch normalisation that does not leak which key belongs to which query."""

import hashlib

import torch
import torch.distributed as dist
from torch import nn

from moco_eval.runtime import gather, rank, world_size


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


def split_batch_norm(net: nn.Module, groups: int) -> nn.Module:
    """Replace every BatchNorm2d of a freshly built network by one in groups; weights and buffers are carried over."""
    for name, child in net.named_children():
        if isinstance(child, nn.BatchNorm2d):
            grouped = SplitBatchNorm2d(child.num_features, groups)
            grouped.load_state_dict(child.state_dict())
            setattr(net, name, grouped)
        else:
            split_batch_norm(child, groups)
    return net


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


def same_on_all_ranks(*tensors: torch.Tensor) -> bool:
    """Whether every rank holds bit-identical tensors: their sha256, compared."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    number = int.from_bytes(digest.digest()[:7], "big")
    everyone = gather(torch.tensor([number], device=tensors[0].device))
    return bool((everyone == everyone[0]).all())
