"""Synchronised batch normalisation: the statistics of all ranks' batches."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from moco_eval.runtime import all_sum, world_size


class _AllMean(torch.autograd.Function):
    """The mean over ranks, whose gradient is the mean over ranks of theirs."""

    @staticmethod
    def forward(ctx, values: torch.Tensor) -> torch.Tensor:
        return all_sum(values.clone()) / world_size()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return all_sum(gradient.clone()) / world_size()


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with the statistics of all ranks' batches, for gloo; torch's own needs a GPU.

    Plain: the mean, then the mean square distance from it, each averaged over ranks, whose shares are equal.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to the same shape."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        mean = _AllMean.apply(x.mean((0, 2, 3)))
        centred = x - mean.view(1, -1, 1, 1)
        var = _AllMean.apply(centred.square().mean((0, 2, 3)))
        with torch.no_grad():
            count = x.numel() // len(mean) * world_size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(var + self.eps)
        return torch.addcmul(self.bias.view(1, -1, 1, 1), centred, scale.view(1, -1, 1, 1)).to(input.dtype)


def sync_batch_norm(net: nn.Module) -> nn.Module:
    """Replace every BatchNorm2d by a synchronised one: torch's own under nccl, the plain one elsewhere."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        return nn.SyncBatchNorm.convert_sync_batchnorm(net)
    return replace_batch_norm(net, lambda features: SyncBatchNorm2d(features))


def replace_batch_norm(net: nn.Module, make: Callable[[int], nn.BatchNorm2d]) -> nn.Module:
    """Replace every BatchNorm2d by `make(features)`; weights and buffers are carried over."""
    for name, child in net.named_children():
        if isinstance(child, nn.BatchNorm2d):
            other = make(child.num_features)
            other.load_state_dict(child.state_dict())
            setattr(net, name, other)
        else:
            replace_batch_norm(child, make)
    return net
