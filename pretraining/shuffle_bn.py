"""Batch normalisation that does not leak which key belongs to which query."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import normalize

from moco_eval.runtime.collectives import exchange, gather
from moco_eval.runtime.device import to_device
from moco_eval.runtime.rank import rank, world_size

Pixels = Callable[[torch.Tensor], torch.Tensor]  # what travels between processes to what an encoder takes


def permutation(size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A random order of `size` rows and the order that undoes it, each (size,); the same on every rank."""
    forth = torch.randperm(size, generator=generator)
    return forth, torch.argsort(forth)


class Route(NamedTuple):
    """Where this rank's rows go in a new order of the global batch, and how keys come back; on the rows' device.

    Attributes:
        sent: this rank's rows in the order in which they leave, those for rank 0 first, (N,).
        sizes: how many leave for each rank; `counts`: how many come from each.
        place: where each row that comes belongs, (N,).
        back: the order that undoes it all, (R N,).
    """

    sent: torch.Tensor
    sizes: list[int]
    counts: list[int]
    place: torch.Tensor
    back: torch.Tensor


def route(order: torch.Tensor, back: torch.Tensor, device: torch.device) -> Route:
    """The route of an order of the global batch, (R N,), the same on every rank, in one copy to the device.

    Args:
        back: the order that undoes it; empty where nothing comes back.
    """
    ranks, N = world_size(), len(order) // world_size()
    wanted = order.view(ranks, N)
    owner = wanted // N
    mine = owner == rank()
    received_from = owner[rank()]
    place = torch.argsort(received_from, stable=True)
    there = to_device(torch.cat([wanted[mine] - rank() * N, place, back]), device)
    counts = torch.bincount(received_from, minlength=ranks).tolist()
    return Route(there[:N], mine.sum(dim=1).tolist(), counts, there[N : 2 * N], there[2 * N :])


def shuffle(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """This rank's rows of the global batch in a new order: row i of the result is global row `order[i]`.

    Args:
        rows: this rank's share of the global batch, (N, ...); shares are equal and lie in rank order.
        order: a permutation of the global batch, (R N,), the same on every rank.
    Returns:
        (N, ...): the rank's share of the permuted batch.
    """
    return travelled(rows, route(order, order[:0], rows.device))


def travelled(rows: torch.Tensor, way: Route) -> torch.Tensor:
    """`shuffle` by a route that is there.

    Only the rows a rank needs travel to it, so with R ranks each receives (R - 1)/R of one share, not all of them.
    Source: He et al. 2020, arXiv:1911.05722, Sec. 3.3 (shuffling BN); the exchange is ours.
    """
    if world_size() == 1:
        return rows[way.sent]
    received = exchange(rows[way.sent], way.sizes, way.counts)
    result = torch.empty_like(rows)
    result[way.place] = received
    return result


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
    way = route(*permutation(N * world_size(), generator), view_k.device)
    k = unit(encoder_k(pixels(travelled(view_k, way))))
    keys = collect(k)[way.back]
    return keys[rank() * N : (rank() + 1) * N], keys
