"""The exact nearest neighbours of many queries in a large bank, in blocks of both, within a bound of memory.

A block of bank rows is read, prepared and moved to the device once; every block of queries meets it in one matrix
product, and what may be among a query's k nearest joins its running best. Long rows are never sorted: the columns of a
product fall into chunks whose maxima take one pass, and only chunks whose maximum beats the query's k-th best so far
are looked into. That loses nothing: a row that belongs to the k best makes its chunk's maximum beat the k-th best, and
the k best rows lie in at most k chunks, those with the largest maxima.
"""

import math
from dataclasses import dataclass
from math import isqrt
from typing import Any, Literal, Protocol

import numpy as np
import torch

from moco_eval.data.loader import share
from moco_eval.errors import InputError, RunFailed
from moco_eval.features.extract import in_order
from moco_eval.runtime.collectives import gather
from moco_eval.runtime.device import autocast, to_device
from moco_eval.runtime.rank import world_size

Distance = Literal["cosine", "euclidean"]

MEMORY = 1e9  # bytes of working blocks on a CPU
AT_ONCE = {"cpu": 512, "cuda": 4096, "mps": 4096}  # queries in one product at most; more gains nothing
LINE = 64  # floats
MERGED = 4096  # queries whose neighbours of all ranks are merged at once
CLOSE = 1e-2  # squared distances below this share of the squared norms are taken again, by difference


class Rows(Protocol):
    """(N, D) float32 rows: a tensor, or what reads them from a disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> torch.Tensor: ...


@dataclass
class Neighbours:
    """The k nearest of each query, nearest first: both (queries, k).

    `similarity` is the cosine similarity, or minus the Euclidean distance: larger is nearer. Of equally near rows the
    one with the smaller index comes first; where the k-th and the next are equal, which of them stays is not promised.
    """

    similarity: torch.Tensor
    index: torch.Tensor
    distance: Distance = "cosine"


@dataclass(frozen=True)
class Blocks:
    """How many bank rows and queries meet at once, and into how many columns a chunk gathers."""

    bank: int
    queries: int
    chunk: int


def blocks(memory: float, bank: int, queries: int, dim: int, k: int, at_once: int) -> Blocks:
    """The largest blocks that keep what is held at once under `memory` bytes; one row and one query at least.

    Half goes to bank rows, as read and as prepared; half to a block of queries, its products with them, the chunks'
    maxima and the candidates.
    """
    rows = int(max(1, min(bank, memory / 2 // (8 * dim), memory / 2 // (8 * at_once))))
    chunk = max(1, isqrt(rows // k))
    each = _of_a_query(rows, chunk, dim, k)
    return Blocks(rows, int(max(1, min(queries, at_once, memory / 2 // each))), chunk)


def _of_a_query(rows: int, chunk: int, dim: int, k: int) -> int:
    """Bytes of one query, its products with so many bank rows, the chunks' maxima and the candidates."""
    candidates = k + chunk * min(k, -(-rows // chunk))
    return 8 * dim + 4 * (rows + 2 * LINE) + 10 * (rows // chunk) + 48 * candidates


def held(bank: int, queries: int, dim: int, k: int, device: torch.device, memory: float | None = None) -> float:
    """Bytes that `nearest` holds at once beside queries and bank, its result included; arguments as there."""
    cut = blocks(memory or _default_memory(device), bank, queries, dim, k, AT_ONCE[device.type])
    return 8 * dim * cut.bank + cut.queries * _of_a_query(cut.bank, cut.chunk, dim, k) + 12 * queries * k


def aligned(cut: Blocks, device: torch.device) -> torch.Tensor:
    """Room for one block of products, at least (queries, bank).

    Every row begins a cache line, and rows lie an odd number of LINE apart, so that they do not compete for the same
    places of the cache: products are up to half as fast again.
    """
    return torch.empty(cut.queries, LINE * (-(-cut.bank // LINE) | 1), device=device)


def nearest(
    queries: Rows,
    bank: Rows,
    k: int,
    *,
    distance: Distance = "cosine",
    own: torch.Tensor | None = None,
    memory: float | None = None,
    device: torch.device | None = None,
) -> Neighbours:
    """The k bank rows nearest to each query, exact up to the rounding of float32 products.

    Args:
        queries: (Q, D); bank: (B, D). Normalised here for cosine; for Euclidean distances shifted by a common centre,
            against cancellation, and the smallest distances are taken once more by difference.
        own: (Q,), the place in the bank of each query that is itself in there and must not be found. Rows that only
            look like it count.
        memory: bytes of blocks held at once, beside queries, bank and result (12 bytes per query and neighbour); by
            default 1 GB on a CPU, a quarter of what is free on a GPU.
        device: where to compute, and where the result lies; by default the CPU, or the bank's where it is a tensor.
    Raises:
        InputError: the bank holds fewer than k rows, beside the query's own.
    """
    require_enough(k, len(bank) - (own is not None))
    if device is None:
        device = bank.device if isinstance(bank, torch.Tensor) else torch.device("cpu")
    search = _Search(queries, bank, k, distance, own, memory or _default_memory(device), device)
    with torch.no_grad(), autocast(device, "fp32"):
        for start in range(0, len(bank) if len(queries) else 0, search.blocks.bank):
            search.meet(start)
        return search.neighbours()


def nearest_by_ranks(
    queries: Rows, bank: Rows, k: int, *, own: torch.Tensor | None = None, **options: Any
) -> Neighbours:
    """`nearest`, each rank searching for its contiguous share of the queries; every rank returns all. Collective."""
    if world_size() == 1:
        return nearest(queries, bank, k, own=own, **options)
    mine = share(np.arange(len(queries)))
    here = slice(int(mine[0]), int(mine[-1]) + 1) if len(mine) else slice(0, 0)
    part = nearest(queries[here], bank, k, own=None if own is None else own[here], **options)
    similarity, index = (in_order(rows, len(queries)) for rows in (part.similarity, part.index))
    return Neighbours(similarity, index, part.distance)


def nearest_in_shares(
    queries: torch.Tensor, bank: torch.Tensor, index: torch.Tensor, k: int, *, device: torch.device
) -> Neighbours:
    """The k nearest by cosine similarity in a bank that is spread over ranks; every rank returns all. Collective.

    Args:
        queries: (Q, D), the same on every rank.
        bank: this rank's rows, (B, D), and `index`, (B,), where they stand in the whole bank.
        k: at most the rows of all ranks.
    """
    if world_size() == 1:
        return nearest(queries, bank, k, device=device)
    similarity = torch.full((len(queries), k), -torch.inf, device=device)
    place = torch.full((len(queries), k), -1, device=device)
    if most := min(k, len(bank)):
        here = nearest(queries, bank, most, device=device)
        similarity[:, :most], place[:, :most] = here.similarity, to_device(index, device)[here.index]
    merged = [_best(*pair) for pair in zip(similarity.split(MERGED), place.split(MERGED), strict=True)]
    return Neighbours(torch.cat([similarity for similarity, _ in merged]), torch.cat([place for _, place in merged]))


def _best(similarity: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of all ranks, from this rank's, all (Q, k); of equals the smaller index first. Collective."""
    k = index.shape[1]
    similarity, index = (
        gather(part).unflatten(0, (world_size(), -1)).transpose(0, 1).flatten(1) for part in (similarity, index)
    )
    index, order = index.sort(dim=1)
    similarity, order = similarity.gather(1, order).sort(dim=1, descending=True, stable=True)
    return similarity[:, :k], index.gather(1, order)[:, :k]


def require_enough(k: int, images: int) -> None:
    """Raises InputError where the bank holds fewer than k."""
    if k > images:
        raise InputError(f"k {k} is more than the {images} images of the bank; take --set k={images} or less")


def _default_memory(device: torch.device) -> float:
    return torch.cuda.mem_get_info(device)[0] / 4 if device.type == "cuda" else MEMORY


class _Search:
    """The running best of every query, as scores: the cosine similarity, or q·b - |b|²/2, larger where b is nearer."""

    def __init__(
        self,
        queries: Rows,
        bank: Rows,
        k: int,
        distance: Distance,
        own: torch.Tensor | None,
        memory: float,
        device: torch.device,
    ):
        self.queries, self.bank, self.distance, self.memory, self.device = queries, bank, distance, memory, device
        self.own = None if own is None else own.to(device)
        dim = bank[:1].shape[1]
        self.blocks = blocks(memory, len(bank), len(queries), dim, k, AT_ONCE[device.type])
        self.unit, self.centre = 1.0, None
        if distance == "euclidean":
            first = bank[: self.blocks.bank]
            self.unit = unit_of(first)
            self.centre = (first if self.unit == 1 else first * self.unit).mean(dim=0).to(device)
        self.room = {
            "bank": torch.empty(self.blocks.bank, dim, device=device),
            "queries": torch.empty(self.blocks.queries, dim, device=device),
            "products": aligned(self.blocks, device),
        }
        self.best = torch.full((len(queries), k), -torch.inf, device=device)
        self.index = torch.full((len(queries), k), -1, device=device)

    def prepared(self, rows: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
        """Rows as their products need them: unit length, or less the centre; in memory that is used again."""
        rows, room = rows.to(self.device, torch.float32), room[: len(rows)]
        if self.centre is not None:
            return torch.sub(rows if self.unit == 1 else rows * self.unit, self.centre, out=room)
        return unit_rows(rows, room)

    def meet(self, start: int) -> None:
        """Every query meets the bank's block that begins at `start`."""
        rows = self.prepared(self.bank[start : start + self.blocks.bank], self.room["bank"])
        half = None if self.centre is None else -_squares(rows).squeeze(1) / 2
        for first in range(0, len(self.queries), self.blocks.queries):
            here = slice(first, first + self.blocks.queries)
            queries = self.prepared(self.queries[here], self.room["queries"])
            scores = self.room["products"][: len(queries), : len(rows)]
            if half is None:
                torch.mm(queries, rows.T, out=scores)
            else:
                torch.addmm(half, queries, rows.T, out=scores)
            if self.own is not None:
                _forbid(scores, self.own[here] - start)
            _merge(self.best[here], self.index[here], scores, start, self.blocks.chunk)

    def neighbours(self) -> Neighbours:
        """The best of all blocks in order."""
        assert (self.index >= 0).all()  # finite features always fill the k places
        similarity = self.best if self.centre is None else -self._distances(self.centre)
        index, order = self.index.sort(dim=1)
        similarity, by_similarity = similarity.gather(1, order).sort(dim=1, descending=True, stable=True)
        return Neighbours(similarity, index.gather(1, by_similarity), self.distance)

    def _distances(self, centre: torch.Tensor) -> torch.Tensor:
        """Euclidean distances from scores; the smallest, which cancellation would spoil, once more by difference."""
        distances = torch.empty_like(self.best)
        for first in range(0, len(self.best), self.blocks.queries):
            here = slice(first, first + self.blocks.queries)
            norms = _squares(self.prepared(self.queries[here], self.room["queries"]))
            squares = norms - 2 * self.best[here]
            query, place = (squares < CLOSE * (2 * norms)).nonzero(as_tuple=True)
            squares[query, place] = self._by_difference(query + first, self.index[here][query, place], len(centre))
            distances[here] = squares.clamp_(min=0).sqrt_()
        return distances if self.unit == 1 else distances.div_(self.unit)

    def _by_difference(self, query: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
        """|q - b|² of pairs, as many at once as memory allows."""
        at_once = max(1, int(self.memory // (24 * dim)))
        parts = [torch.empty(0, device=self.device)]
        for queries, others in zip(query.split(at_once), index.split(at_once)):
            sides = (self.queries, queries), (self.bank, others)
            pair = (rows[of.cpu().numpy()].to(self.device) for rows, of in sides)
            parts.append(torch.sub(*pair).mul_(self.unit).square_().sum(dim=1))
        return torch.cat(parts)


def _squares(rows: torch.Tensor) -> torch.Tensor:
    """Each row's square, (N, 1). Raises RunFailed where that is beyond float32."""
    squares = rows.square().sum(dim=1, keepdim=True)
    if not squares.isfinite().all():
        raise RunFailed(
            "features differ by more than float32 can square, so they have no Euclidean distances; are the BN "
            "statistics damaged? Cosine similarities can still be computed: --set distance=[cosine]"
        )
    return squares


LARGE, SMALL = 2.0**40, 2.0**-40  # beyond them squares would overflow, or fade from float32


def unit_rows(rows: torch.Tensor, room: torch.Tensor | None = None) -> torch.Tensor:
    """Rows of length 1, (N, D) float32, a row of zeros as it is; written to `room` where it is given.

    Rows whose squares float32 does not hold are brought to its middle by a power of two first.
    """
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    odd = ((lengths < 1e-12) | (lengths > 1e18))[:, 0].nonzero()[:, 0]  # not finite: above, too
    if len(odd):
        _, exponents = torch.frexp(rows[odd].abs().amax(dim=1, keepdim=True))
        rows = rows.index_copy(0, odd, torch.ldexp(rows[odd], -exponents))
        lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return torch.div(rows, lengths.clamp_min(1e-12), out=room)


def unit_of(rows: torch.Tensor) -> float:
    """The power of two by which rows are multiplied before their differences are squared; 1 in all usual cases."""
    largest = float(rows.abs().max())
    return 1.0 if SMALL < largest < LARGE or not largest else 2.0 ** -math.frexp(largest)[1]


def _forbid(scores: torch.Tensor, columns: torch.Tensor) -> None:
    """No row finds its own column, where that is among these; scores (Q, B), columns (Q,)."""
    rows = ((columns >= 0) & (columns < scores.shape[1])).nonzero()[:, 0]
    scores[rows, columns[rows]] = -torch.inf


def _merge(best: torch.Tensor, index: torch.Tensor, scores: torch.Tensor, start: int, chunk: int) -> None:
    """Let new scores join the running best, in place.

    Args:
        best, index: (Q, k), in no order.
        scores: (Q, B), of the bank rows from `start` on; those that no whole chunk holds are candidates themselves.
    """
    k, width = best.shape[1], scores.shape[1] // chunk
    kth = best.amin(dim=1, keepdim=True)
    maxima = scores[:, : width * chunk].unflatten(1, (chunk, width)).amax(dim=1)  # chunk c: columns c, c + width, ...
    hopeful = (maxima > kth).sum(dim=1)
    rest = scores[:, width * chunk :]
    rows = ((hopeful > 0) | (rest > kth).any(dim=1)).nonzero()[:, 0]
    if not len(rows):
        return
    if 2 * len(rows) > len(best):
        rows = torch.arange(len(best), device=best.device)  # all of them: a gather is quicker than an index
    chunks = maxima[rows].topk(min(k, int(hopeful.max())), dim=1, sorted=False).indices
    within = torch.arange(chunk, device=scores.device) * width
    columns = (chunks[:, None, :] + within[:, None]).flatten(1)  # (rows, candidates)
    tail = torch.arange(width * chunk, scores.shape[1], device=scores.device).expand(len(rows), -1)
    columns = torch.cat([columns, tail], dim=1)
    candidate_scores = scores.gather(1, columns) if len(rows) == len(scores) else scores[rows[:, None], columns]
    candidates = torch.cat([best[rows], candidate_scores], dim=1)
    top = candidates.topk(k, dim=1, sorted=False)
    best[rows] = top.values
    index[rows] = torch.cat([index[rows], columns + start], dim=1).gather(1, top.indices)
