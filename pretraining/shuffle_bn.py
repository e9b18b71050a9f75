"""Batch normalisation that does not leak which key belongs to which query."""

from collections.abc import Callable

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
        return rows[to_device(order, rows.device)]
    wanted = order.view(ranks, N)
    owner = wanted // N
    sent = [wanted[to][owner[to] == rank()] - rank() * N for to in range(ranks)]
    received_from = owner[rank()]
    counts = torch.bincount(received_from, minlength=ranks).tolist()
    place = torch.argsort(received_from, stable=True)
    lengths = [len(part) for part in sent]
    leaving, place = to_device(torch.cat([*sent, place]), rows.device).split(N)
    parts = exchange(list(rows[leaving].split(lengths)), counts)
    result = torch.empty_like(rows)
    result[place] = parts
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
    forth, back = permutation(N * world_size(), generator)
    k = unit(encoder_k(pixels(shuffle(view_k, forth))))
    keys = collect(k)[to_device(back, k.device)]
    return keys[rank() * N : (rank() + 1) * N], keys
