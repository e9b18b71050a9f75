"""The search for neighbours: against float64 loops and scikit-learn, in every blocking, within its memory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch.nn.functional import normalize

from moco_eval.classification.knn import vote
from moco_eval.classification.neighbours import (
    Neighbours,
    blocks,
    held,
    nearest,
    nearest_by_ranks,
    nearest_in_shares,
)
from moco_eval.data.loader import share
from moco_eval.errors import InputError, RunFailed

from ranks import run_ranks  # isort: skip

DISTANCES = ("cosine", "euclidean")
MEMORIES = (1, 3e3, 2e4, 2e5, 3e6, 1e9)  # bytes: from one row and query at a time to everything at once


def drawn(rows: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Clustered rows, not of unit length."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(8, dim, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(rows, dim, generator=generator)
    return 3 * centres[torch.randint(8, (rows,), generator=generator)] + noise


def similarities(queries: torch.Tensor, bank: torch.Tensor, distance: str) -> torch.Tensor:
    """(Q, B) float64, query by query: what `Neighbours.similarity` means."""
    rows, bank = [], bank.double()
    for q in queries.double():
        rows.append(bank @ q / (q.norm() * bank.norm(dim=1)) if distance == "cosine" else -(q - bank).norm(dim=1))
    return torch.stack(rows)


def require_nearest(found: Neighbours, every: torch.Tensor, tolerance: float = 2e-6) -> None:
    """The k best of `every`, in order, each of them where the index says; ties within `tolerance` are alike."""
    k = found.index.shape[1]
    best = every.sort(dim=1, descending=True).values[:, :k]
    assert torch.allclose(found.similarity.double(), best, rtol=1e-5, atol=tolerance)
    assert torch.allclose(every.gather(1, found.index), best, rtol=0, atol=tolerance)
    assert all(len(set(row)) == k for row in found.index.tolist())
    assert (found.similarity.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(("rows", "queries", "k"), [(157, 41, 10), (40, 13, 40), (203, 5, 1), (101, 1, 100)])
def test_every_blocking_gives_the_neighbours_of_a_float64_loop(distance, rows, queries, k):
    bank, asked = drawn(rows, 12), drawn(queries, 12, seed=1)
    every = similarities(asked, bank, distance)
    for memory in MEMORIES:
        found = nearest(asked, bank, k, distance=distance, memory=memory)
        require_nearest(found, every, 2e-6 if distance == "cosine" else 1e-5)


def test_memories_of_these_tests_range_from_one_at_a_time_to_all_at_once():
    cut = [blocks(memory, 157, 41, 12, 10, 512) for memory in MEMORIES]
    assert (cut[0].bank, cut[0].queries) == (1, 1) and (cut[-1].bank, cut[-1].queries) == (157, 41)
    assert any(1 < some.bank < 157 and 157 % some.bank for some in cut)
    assert any(some.chunk > 1 and 157 % some.chunk for some in cut)


def test_chunks_that_do_not_divide_lose_nothing():
    """The best row of the bank in turn at every place, also in the rest that no whole chunk holds."""
    bank = torch.eye(24, 5)
    assert 23 % blocks(1e9, 23, 1, 5, 1, 512).chunk
    for place in range(23):
        some = 0.01 * drawn(23, 5)
        some[place] = torch.tensor([5.0, 4, 3, 2, 1])
        found = nearest(some[place : place + 1], some, 1, distance="euclidean")
        assert found.index.item() == place and found.similarity.item() == 0
    assert nearest(bank[:1], bank, 1).index.item() == 0


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_row_is_never_its_own_neighbour_but_its_double_is(distance):
    bank = drawn(60, 8)
    bank[40:50] = bank[:10]
    own = torch.randperm(60, generator=torch.Generator().manual_seed(3))[:33]
    every = similarities(bank[own], bank, distance)
    every[torch.arange(33), own] = -torch.inf
    for memory in MEMORIES:
        found = nearest(bank[own], bank, 59, distance=distance, own=own, memory=memory)
        assert not (found.index == own[:, None]).any()
        require_nearest(found, every, 1e-5)
        for query, first in enumerate(own.tolist()):
            if first < 10:
                assert found.index[query, 0] == first + 40
    with pytest.raises(InputError, match="k 60 is more than the 59 images"):
        nearest(bank[own], bank, 60, distance=distance, own=own)


def test_euclidean_distances_of_close_rows_do_not_cancel():
    """Rows far from the origin and near each other: |q|² + |b|² - 2qb alone would leave nothing in float32."""
    spread = 1e-3 * drawn(50, 16)
    bank = 100 + spread
    queries = bank[:20] + 1e-4 * drawn(20, 16, seed=2)
    found = nearest(queries, bank, 5, distance="euclidean")
    every = similarities(queries, bank, "euclidean")
    exact = every.gather(1, found.index)
    assert torch.allclose(found.similarity.double(), exact, rtol=1e-5, atol=0)
    assert torch.equal(found.index, every.topk(5, dim=1).indices)
    plain = queries.square().sum(1)[:, None] + bank.square().sum(1) - 2 * queries @ bank.T
    assert not torch.allclose(plain.clamp(min=0).sqrt().double(), -every, rtol=0.1, atol=0)
    assert (nearest(bank, bank, 1, distance="euclidean").similarity == 0).all()


# Against scikit-learn


def naive_predictions(similarity: np.ndarray, index: np.ndarray, labels: np.ndarray, temperature: float) -> np.ndarray:
    """The class with most votes, by a loop."""
    votes = np.zeros((len(index), labels.max() + 1))
    for query in range(len(index)):
        for s, j in zip(similarity[query], index[query]):
            votes[query, labels[j]] += np.exp(s / temperature)
    return votes.argmax(axis=1)


@pytest.mark.parametrize("k", [1, 10, 200])
def test_predictions_are_those_of_scikit_learns_neighbours(k):
    """Identical but for queries whose k-th and next similarity are tied within 1e-6; doubled rows make some."""
    bank, queries = drawn(2000, 24), drawn(700, 24, seed=1)
    bank[1000:1050] = 2 * bank[:50]
    labels = torch.randint(0, 8, (2000,), generator=torch.Generator().manual_seed(5))
    theirs = NearestNeighbors(n_neighbors=k + 1, algorithm="brute", metric="cosine").fit(bank.double().numpy())
    distance, index = theirs.kneighbors(queries.double().numpy())
    tied = distance[:, k] - distance[:, k - 1] < 1e-6
    expected = naive_predictions(1 - distance[:, :k], index[:, :k], labels.numpy(), 0.07)
    ours = vote(nearest(queries, bank, k, memory=2e6), labels, 8, 0.07).argmax(dim=1).numpy()
    assert 0 < tied.sum() < 70  # ties do occur, and excuse few
    assert np.array_equal(ours[~tied], expected[~tied])
    more = nearest(queries, bank, k + 1)
    other = vote(Neighbours(more.similarity[:, 1:], more.index[:, 1:]), labels, 8, 0.07).argmax(dim=1).numpy()
    assert not np.array_equal(other[~tied], expected[~tied])  # one wrong neighbour would be noticed


@pytest.mark.parametrize("metric", DISTANCES)
def test_neighbours_are_scikit_learns(metric):
    bank, queries = drawn(500, 16), drawn(90, 16, seed=1)
    theirs = NearestNeighbors(n_neighbors=10, algorithm="brute", metric=metric).fit(bank.double()).kneighbors(queries)
    ours = nearest(queries, bank, 10, distance=metric)
    assert np.array_equal(ours.index.numpy(), theirs[1])
    similarity = 1 - theirs[0] if metric == "cosine" else -theirs[0]
    assert np.allclose(ours.similarity.numpy(), similarity, atol=2e-6, rtol=1e-5)


# Memory


class Recorded:
    """Rows that note which slices are asked for."""

    def __init__(self, rows: torch.Tensor):
        self.rows, self.asked = rows, list[slice]()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows):
        if isinstance(rows, slice):
            self.asked.append(rows)
        return self.rows[rows]


@pytest.mark.parametrize("distance", DISTANCES)
def test_bank_rows_are_read_once_and_in_blocks(distance):
    bank, queries = Recorded(drawn(1000, 16)), Recorded(drawn(300, 16, seed=1))
    found = nearest(queries, bank, 7, distance=distance, memory=1e5)
    assert torch.equal(found.index, nearest(queries.rows, bank.rows, 7, distance=distance, memory=1e5).index)
    cut = blocks(1e5, 1000, 300, 16, 7, 512)
    read = [s for s in bank.asked if s.stop > 1]
    read = read[1:] if distance == "euclidean" else read  # the centre is that of the first block
    assert [s.start for s in read] == list(range(0, 1000, cut.bank))
    assert len(read) > 5 and all(s.stop - s.start == cut.bank for s in read)
    assert 1 < cut.queries < 300 and {s.stop - s.start for s in queries.asked} == {cut.queries}


BOUNDED = """
import resource, sys, torch
from moco_eval.classification.neighbours import nearest
torch.set_num_threads(1)

class Drawn:  # 60,000 rows that nobody holds: 61 MB; all products would be 120 MB
    def __init__(self, rows): self.rows = rows
    def __len__(self): return self.rows
    def __getitem__(self, rows):
        start, stop, _ = rows.indices(self.rows)
        return torch.rand(stop - start, 256, generator=torch.Generator().manual_seed(start))

def peak(): return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nearest(Drawn(50), Drawn(1000), 10)  # the libraries' own memory
before = peak()
nearest(Drawn(500), Drawn(60_000), 50, memory=float(sys.argv[1]))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts kilobytes on Linux")
@pytest.mark.slow
def test_working_memory_is_bounded():
    root = Path(__file__).resolve().parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", BOUNDED, "16e6"], cwd=root, capture_output=True, text=True, check=True, timeout=120
    )
    result = 500 * 50 * 12  # score and index; more of them while they are put in order
    assert int(ran.stdout) < 16e6 + 4 * result + 8e6  # 8 MB for the allocator and BLAS


@pytest.mark.parametrize("memory", MEMORIES[2:])
def test_what_is_held_is_within_the_bound_and_no_more_than_all_at_once(memory):
    cpu, result = torch.device("cpu"), 12 * 500 * 50
    most = held(4000, 500, 64, 50, cpu, memory)
    assert result < most <= memory + result
    assert held(4000, 500, 64, 50, cpu) == held(4000, 500, 64, 50, cpu, 1e9) < 4e7  # all at once


# Several processes


def by_ranks(bank: torch.Tensor) -> dict:
    """The last rows of the bank, so and so many, leaving themselves out."""
    found = {}
    for queries in (1, 2, 7):
        own = torch.arange(len(bank))[-queries:]
        some = nearest_by_ranks(bank[own], bank, 4, own=own, distance="euclidean", memory=1e5)
        found |= {f"similarity {queries}": some.similarity, f"index {queries}": some.index}
    return found


@pytest.mark.slow
def test_two_processes_give_one_processs_answer(tmp_path):
    bank = drawn(90, 8)
    alone = by_ranks(bank)
    for rank in run_ranks(by_ranks, tmp_path, bank):
        for name, expected in alone.items():
            assert torch.allclose(rank[name], expected, atol=1e-6)
            assert rank[name].shape == expected.shape


def in_shares(bank: torch.Tensor) -> list[torch.Tensor]:
    """Of the whole bank, of one that gives some ranks fewer rows than k, and of one that gives some none."""
    neighbours = []
    for rows, k in ((90, 4), (7, 6), (2, 2)):
        mine = torch.tensor(share(list(range(rows))), dtype=torch.long)
        each = nearest_in_shares(bank[-5:], bank[mine], mine, k, device=torch.device("cpu"))
        neighbours += [each.similarity, each.index]
    return neighbours


def test_a_bank_that_is_spread_over_processes_gives_one_processs_neighbours(tmp_path):
    bank = drawn(90, 8)
    bank[80] = bank[88]  # equally near: the smaller index first, on whatever rank
    alone = in_shares(bank)
    for rank in run_ranks(in_shares, tmp_path, bank, ranks=3):
        for each, expected in zip(rank, alone, strict=True):
            assert torch.allclose(each, expected, atol=1e-6) and each.shape == expected.shape


@pytest.mark.parametrize("rest", [1, 5, 40])
def test_a_last_block_shorter_than_a_chunk(rest):
    """Its rows are candidates themselves, also where they are the best of all."""
    generator = torch.Generator().manual_seed(rest)
    bank, queries = torch.randn(4990 + rest, 8, generator=generator), torch.randn(20, 8, generator=generator)
    bank[-rest:] = queries[: min(rest, 20)].repeat(2, 1)[:rest]
    found = nearest(queries, bank, 2, memory=2 * 8 * 512 * 4990)
    wanted = (normalize(queries, dim=1) @ normalize(bank, dim=1).T).topk(2, dim=1)
    assert torch.allclose(found.similarity, wanted.values, atol=1e-6)
    assert (found.index[:1, 0] >= 4990).all()


@pytest.mark.parametrize("scale", [2.0**84, 2.0**-84, 2.0**120])
@pytest.mark.parametrize("distance", DISTANCES)
def test_features_of_any_size_have_their_neighbours(distance, scale):
    """Around 2e25 squares overflow float32, around 5e-26 they vanish: the neighbours are those of usual features."""
    bank, queries = drawn(300, 16), drawn(50, 16, seed=1)
    usual, other = (nearest(queries * by, bank * by, 7, distance=distance, memory=1e5) for by in (1.0, scale))
    assert torch.equal(usual.index, other.index)
    similarity = other.similarity if distance == "cosine" else other.similarity / scale
    assert torch.allclose(usual.similarity, similarity, rtol=1e-5)


def test_rows_of_very_different_lengths_and_zeros_too():
    bank = drawn(300, 16)
    scales = 2.0 ** torch.randint(-100, 100, (300, 1), generator=torch.Generator().manual_seed(0))
    queries = torch.cat([drawn(50, 16, seed=1), torch.zeros(1, 16)])
    usual, other = nearest(queries, bank, 7), nearest(queries, bank * scales, 7)
    assert torch.equal(usual.similarity, other.similarity) and torch.equal(usual.index[:50], other.index[:50])
    assert not other.similarity[50].any()


def test_distances_beyond_float32_are_refused():
    bank = drawn(300, 16)
    bank[299] *= 1e25
    with pytest.raises(RunFailed, match="than float32 can square"):
        nearest(bank[:5], bank, 7, distance="euclidean", memory=3e3)
