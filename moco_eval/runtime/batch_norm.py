"""Batch normalisation in groups of one process, or with the statistics of all processes."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moco_eval.runtime.collectives import all_sum
from moco_eval.runtime.rank import world_size


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation in groups, as if each were on its own GPU: group j is the j-th of equal parts of the batch.

    Running statistics are the mean over groups of each group's moving average; the affine part is shared;
    in evaluation it is ordinary batch normalisation, with the same state-dict keys. `split_batch_norm` puts samples
    into groups.
    Source: facebookresearch/moco, CIFAR-10 demo notebook, SplitBatchNorm.
    """

    def __init__(self, num_features: int, groups: int):
        super().__init__(num_features)
        self.groups = groups

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to the same shape. Raises ValueError where N does not divide into the groups."""
        if not self.training:
            return super().forward(input)
        _require_groups(len(input), self.groups)
        if torch.compiler.is_compiling():
            return self._arithmetic(input)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        means, variances = (statistic.repeat(self.groups, 1) for statistic in (self.running_mean, self.running_var))
        affine = self.weight, self.bias, True, self.momentum, self.eps
        parts = zip(input.chunk(self.groups), means, variances)
        output = torch.cat([nn.functional.batch_norm(part, mean, var, *affine) for part, mean, var in parts])
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0))
        return output

    def _arithmetic(self, input: torch.Tensor) -> torch.Tensor:
        """The same in plain arithmetic, which a compiler fuses."""
        N, C, H, W = input.shape
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        rows = input.permute(0, 2, 3, 1).reshape(self.groups, -1, C).float()
        var, mean = torch.var_mean(rows, dim=1, correction=0)  # (groups, C)
        count = rows.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(mean.mean(0), self.momentum)
            self.running_var.lerp_(var.mean(0) * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        output = rows * scale[:, None] + (self.bias - mean * scale)[:, None]
        return output.to(input.dtype).view(N, H, W, C).permute(0, 3, 1, 2)


def split_batch_norm(net: nn.Module, groups: int) -> nn.Module:
    """Every BatchNorm2d in groups, of which sample i belongs to group i % groups, as in the CIFAR-10 demo.

    In training the batch is sorted by group on its way into `net` and back on its way out, so that each group's
    activations lie together in memory.
    """
    net.register_forward_pre_hook(lambda net, inputs: _by_group(inputs[0], groups) if net.training else inputs[0])
    net.register_forward_hook(lambda net, _, output: _by_sample(output, groups) if net.training else output)
    return replace_batch_norm(net, lambda features: SplitBatchNorm2d(features, groups))


def _by_group(rows: torch.Tensor, groups: int) -> torch.Tensor:
    """Rows 0, groups, 2 groups, ... first, then 1, groups + 1, ...; (N, ...)."""
    _require_groups(len(rows), groups)
    return rows.unflatten(0, (-1, groups)).transpose(0, 1).flatten(0, 1)


def _by_sample(rows: torch.Tensor, groups: int) -> torch.Tensor:
    """Undoes `_by_group`."""
    return rows.unflatten(0, (groups, -1)).transpose(0, 1).flatten(0, 1)


def _require_groups(N: int, groups: int) -> None:
    if N % groups:
        raise ValueError(f"a batch of {N} does not divide into {groups} batch-norm groups")


class _AllSum(torch.autograd.Function):
    """The sum over ranks; what their losses ask of it is summed too."""

    @staticmethod
    def forward(ctx, values: torch.Tensor) -> torch.Tensor:
        return all_sum(values.clone())

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return all_sum(gradient.clone())


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with the statistics of all ranks' batches, for gloo; torch's own needs a GPU.

    Plain: the mean, then the mean square distance from it, over all ranks' pixels; their shares may differ in size.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to the same shape; N may be 0 on some ranks."""
        return super().forward(input) if not self.training or world_size() == 1 else _synchronised(self, input)


class SyncBatchNorm1d(nn.BatchNorm1d):
    """The same of vectors, (N, C)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) if not self.training or world_size() == 1 else _synchronised(self, input)


def _synchronised(norm: nn.BatchNorm1d | nn.BatchNorm2d, input: torch.Tensor) -> torch.Tensor:
    """(N, C, ...) normalised by the statistics of all ranks, which the running ones follow."""
    assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
    assert norm.num_batches_tracked is not None
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    across, shape = [0, *range(2, x.ndim)], (1, -1, *[1] * (x.ndim - 2))
    count = int(all_sum(torch.tensor(x.numel() // x.shape[1], device=x.device)))
    mean = _AllSum.apply(x.sum(across)) / count
    centred = x - mean.view(shape)
    var = _AllSum.apply(centred.square().sum(across)) / count
    with torch.no_grad():
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * count / (count - 1), norm.momentum)
        norm.num_batches_tracked += 1
    inverse = torch.rsqrt(var + norm.eps)
    if not norm.affine:
        return (centred * inverse.view(shape)).to(input.dtype)
    scale = norm.weight * inverse
    return torch.addcmul(norm.bias.view(shape), centred, scale.view(shape)).to(input.dtype)


class NaiveSyncBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with the mean of the ranks' own moments: each rank counts the same, however large its images.

    Running statistics follow the shared mean and the shared variance, the biased one. At world size 1 and in
    evaluation it is ordinary batch normalisation.
    Source: detectron2@02b5c4e2, layers/batch_norm.py, NaiveSyncBatchNorm; read, not copied.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to the same shape; N must not be 0."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        assert len(input), "a rank without images has no mean"
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        moments = torch.cat((x.mean((0, 2, 3)), x.square().mean((0, 2, 3))))
        mean, square = (_AllSum.apply(moments) / world_size()).chunk(2)
        var = (square - mean.square()).clamp_min(0)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        return torch.addcmul(shift.view(1, -1, 1, 1), x, scale.view(1, -1, 1, 1)).to(input.dtype)


def share_statistics(net: nn.Module, bn: str) -> nn.Module:
    """Let several processes share the statistics of every BatchNorm2d; the state dict stays as it is.

    Args:
        bn: naive_sync (each process counts the same), sync (each element does) or local (they are not shared). One
            process keeps its modules.
    """
    if world_size() == 1 or bn == "local":
        return net
    return sync_batch_norm(net) if bn == "sync" else replace_batch_norm(net, NaiveSyncBatchNorm2d)


def sync_batch_norm(net: nn.Module) -> nn.Module:
    """Replace every BatchNorm1d and 2d by a synchronised one: torch's own under nccl, the plain one elsewhere."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        return _activations_of_syncbn(nn.SyncBatchNorm.convert_sync_batchnorm(net))
    net = replace_batch_norm(net, lambda features: SyncBatchNorm2d(features))
    return replace_batch_norm(net, lambda features: SyncBatchNorm1d(features), nn.BatchNorm1d)


def replace_batch_norm(
    net: nn.Module,
    make: Callable[[int], nn.BatchNorm1d | nn.BatchNorm2d],
    kind: type[nn.BatchNorm1d | nn.BatchNorm2d] = nn.BatchNorm2d,
) -> nn.Module:
    """Replace every batch norm of a kind by `make(features)`; weights and buffers are carried over."""
    for name, child in net.named_children():
        if isinstance(child, kind):
            other = make(child.num_features).to(child.running_mean)
            if not child.affine:
                other.affine, other.weight, other.bias = False, None, None
            other.load_state_dict(child.state_dict())
            other.eps, other.momentum = child.eps, child.momentum
            setattr(net, name, _with_activation(other, child))
        else:
            replace_batch_norm(child, make, kind)
    return net


def _with_activation(norm: nn.Module, before: nn.Module) -> nn.Module:
    """The norm with what timm's BatchNormAct2d does behind its own arithmetic, a dropout and an activation."""
    if hasattr(before, "act"):
        norm.drop, norm.act = before.drop, before.act
        norm.register_forward_hook(_drop_and_act)
    return norm


def _activations_of_syncbn(net: nn.Module) -> nn.Module:
    """PyTorch's conversion keeps the activation as a part of the norm that nothing calls."""
    for module in net.modules():
        if isinstance(module, nn.SyncBatchNorm) and hasattr(module, "act"):
            module.register_forward_hook(_drop_and_act)
    return net


def _drop_and_act(norm: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return norm.act(norm.drop(output))
