"""Batch normalisation in groups of one process, or with the statistics of all processes."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from moco_eval.runtime import all_sum, world_size


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
