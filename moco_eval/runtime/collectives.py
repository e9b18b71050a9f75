"""What processes tell each other. Collectives vanish at world size 1."""

import hashlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moco_eval.errors import InputError
from moco_eval.runtime.messages import packed, unpacked
from moco_eval.runtime.rank import is_main, rank, world_size


def parallel(module: torch.nn.Module) -> torch.nn.Module:
    """The module with gradients averaged over ranks; buffers stay each rank's own. Itself at world size 1."""
    if world_size() == 1:
        return module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a new name for broadcast_buffers since torch 2.14
        return torch.nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def in_order_of_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, which every collective sends through here: its memory must lie as its rows do.

    Collectives move memory, not rows: of channels-last images they would exchange pieces of other images.
    """
    assert tensor.is_contiguous(), f"a collective of {tuple(tensor.shape)} with strides {tensor.stride()}"
    return tensor


def broadcast_(tensor: torch.Tensor) -> torch.Tensor:
    """Rank 0's values in place, on every rank."""
    return _in_place(tensor, lambda rows: dist.broadcast(rows, src=0))


def _in_place(tensor: torch.Tensor, collective: Callable[[torch.Tensor], Any]) -> torch.Tensor:
    """The tensor after a collective that changes it; one that does not lie in order is copied forth and back."""
    if world_size() > 1:
        rows = tensor.contiguous()
        collective(in_order_of_rows(rows))
        if rows is not tensor:
            tensor.copy_(rows)
    return tensor


def from_main(values: list) -> list:
    """Rank 0's values, such as `messages.packed` takes, on every rank."""
    if world_size() == 1:
        return values
    message = _bytes_on_device(packed(values) if is_main() else b"")
    size = torch.tensor(len(message), device=message.device)
    dist.broadcast(size, src=0)
    message = message if is_main() else message.new_empty(int(size))
    dist.broadcast(message, src=0)
    return values if is_main() else unpacked(message.cpu().numpy().tobytes())


def found_by_main(look: Callable[[], Any]) -> Any:
    """What the first process finds, a plain value, on every process; its InputError is raised on all, and told once."""
    result, refusal = None, ""
    if is_main():
        try:
            result = look()
        except InputError as error:
            refusal = str(error)
    result, refusal = from_main([result, refusal])
    if refusal:
        refused = InputError(refusal)
        refused.told = not is_main()
        raise refused
    return result


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate every rank's tensor (equal shapes) along dimension 0, in rank order; no gradient."""
    if world_size() == 1:
        return tensor
    rows = tensor.contiguous()
    parts = [in_order_of_rows(torch.empty_like(rows)) for _ in range(world_size())]
    dist.all_gather(parts, in_order_of_rows(rows))
    return torch.cat(parts)


def exchange(rows: torch.Tensor, sizes: list[int], counts: list[int]) -> torch.Tensor:
    """Send each rank its rows; return what the others sent here, in rank order.

    Args:
        rows: (any number, ...), rank 0's first.
        sizes: how many each rank gets; `counts`: how many come from each.
    """
    sent = rows.contiguous()
    received = sent.new_empty((sum(counts), *sent.shape[1:]))
    dist.all_to_all_single(in_order_of_rows(received), in_order_of_rows(sent), counts, sizes)
    return received


class _Gather(torch.autograd.Function):
    """`gather` whose backward sums over ranks what each rank's loss asks of a key, as one process would."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor) -> torch.Tensor:
        return gather(rows)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = all_sum(gradient.clone(memory_format=torch.contiguous_format))
        N = len(gradient) // world_size()
        return gradient[rank() * N : (rank() + 1) * N]


def gather_with_gradient(rows: torch.Tensor) -> torch.Tensor:
    """Every rank's rows along dimension 0, in rank order; the gradient of each rank's loss comes back to its owner."""
    return rows if world_size() == 1 else _Gather.apply(rows)


def union(values: set) -> set:
    """The union over ranks, on every rank."""
    return set().union(*gather_values(values))


def gather_values(value: Any) -> list:
    """Every rank's value, such as `messages.packed` takes, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    message = _bytes_on_device(packed(value))
    sizes = gather(torch.tensor([len(message)], device=message.device)).tolist()
    padded = message.new_zeros(max(sizes))
    padded[: len(message)] = message
    rows = gather(padded[None]).cpu().numpy()
    return [unpacked(row[:size].tobytes()) for row, size in zip(rows, sizes)]


def _bytes_on_device(message: bytes) -> torch.Tensor:
    """Where collectives take it: on the GPU with NCCL."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return torch.from_numpy(np.frombuffer(message, np.uint8).copy()).to(device)


def same_on_all_ranks(*tensors: torch.Tensor) -> bool:
    """Whether every rank holds bit-identical tensors: their sha256, compared."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return len(union({digest.hexdigest()})) == 1


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, in place."""
    return _in_place(tensor, dist.all_reduce)
