"""Seconds and memory of an exact nearest-neighbour search on a CPU: ours, a plain one, scikit-learn's, and the least.

python tools/benchmark_knn.py [--bank 200000] [--queries 5000] [--dim 2048] [--k 200] [--memory 1] [--json FILE]

Every run is a process of its own that reads the same file of drawn features, clustered and in the order of their
classes, as folders of images are; nothing is mapped into memory, so a process's peak is what it holds. All rows run in
each repeat, so a drift of the machine's speed meets all alike. A ratio is the median over repeats of a row's seconds
over the first row's in the same repeat; memory is the largest peak beyond that of the loaded libraries.

- products: the float32 matrix products alone, in blocks of queries and bank as ours, the results dropped.
- ours: moco_eval.classification.neighbours.nearest, cosine.
- mm and topk: both sides normalised whole, one torch.mm, one torch.topk.
- scikit-learn: NearestNeighbors, brute force, cosine.
"""

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.neighbors import NearestNeighbors
from torch.nn.functional import normalize

from moco_eval.classification.neighbours import AT_ONCE, aligned, blocks, nearest
from moco_eval.results.environment import environment
from moco_eval.runtime.files import write_json

CLASSES = 1000
PART = 4096  # rows drawn together


@dataclass(frozen=True)
class Stored:
    """(rows, dim) float32 features in a file, read where asked for."""

    path: Path
    rows: int
    dim: int

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, rows: slice) -> torch.Tensor:
        start, stop, _ = rows.indices(self.rows)
        count, offset = (stop - start) * self.dim, 4 * start * self.dim
        return torch.from_numpy(np.fromfile(self.path, np.float32, count, offset=offset).reshape(-1, self.dim))


@dataclass(frozen=True)
class Problem:
    queries: Stored
    bank: Stored
    k: int
    memory: float


def draw(path: Path, rows: int, dim: int, seed: int) -> Stored:
    """Write features: a class's centre and as much noise, cut off below zero as a ReLU does."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((CLASSES, dim), dtype=np.float32)
    classes = np.arange(rows) * CLASSES // rows
    with path.open("wb") as file:
        for start in range(0, rows, PART):
            some = centres[classes[start : start + PART]]
            np.maximum(some + generator.standard_normal(some.shape, dtype=np.float32), 0).tofile(file)
    return Stored(path, rows, dim)


def products(problem: Problem) -> None:
    queries, bank = problem.queries, problem.bank
    cut = blocks(problem.memory, len(bank), len(queries), bank.dim, problem.k, AT_ONCE["cpu"])
    room = aligned(cut, torch.device("cpu"))
    for start in range(0, len(bank), cut.bank):
        rows = bank[start : start + cut.bank]
        for first in range(0, len(queries), cut.queries):
            some = queries[first : first + cut.queries]
            torch.mm(some, rows.T, out=room[: len(some), : len(rows)])


def ours(problem: Problem) -> torch.Tensor:
    return nearest(problem.queries, problem.bank, problem.k, memory=problem.memory).similarity


def mm_and_topk(problem: Problem) -> torch.Tensor:
    bank = normalize(problem.bank[:], dim=1)
    return torch.topk(torch.mm(normalize(problem.queries[:], dim=1), bank.T), problem.k, dim=1).values


def scikit_learn(problem: Problem) -> torch.Tensor:
    search = NearestNeighbors(n_neighbors=problem.k, algorithm="brute", metric="cosine").fit(problem.bank[:].numpy())
    return 1 - torch.from_numpy(search.kneighbors(problem.queries[:].numpy())[0])


ROWS: dict[str, Callable[[Problem], torch.Tensor | None]] = {
    "products": products,
    "ours": ours,
    "mm and topk": mm_and_topk,
    "scikit-learn": scikit_learn,
}


def peak() -> float:
    """Of this process, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def measure(name: str, problem: Problem) -> tuple[float, float, torch.Tensor | None]:
    """Seconds, MB beyond the libraries, and the similarities found; runs in a process of its own."""
    before, started = peak(), time.perf_counter()
    similarity = ROWS[name](problem)
    return time.perf_counter() - started, peak() - before, similarity


def compare(problem: Problem, rows: list[str], repeats: int) -> dict[str, Any]:
    """Medians and ratios; `difference`: the largest between a row's similarities and ours."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    memory: dict[str, list[float]] = {name: [] for name in rows}
    similarity: dict[str, torch.Tensor | None] = {}
    for _ in range(repeats):
        for name in rows:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
                took, held, similarity[name] = fresh.submit(measure, name, problem).result()
            seconds[name].append(took)
            memory[name].append(held)
    reference = similarity.get("ours")
    ratios = {name: [mine / its for mine, its in zip(every, seconds[rows[0]])] for name, every in seconds.items()}
    return {
        "seconds": {name: statistics.median(every) for name, every in seconds.items()},
        "ratio": {name: statistics.median(every) for name, every in ratios.items()},
        "spread": {name: [min(every), max(every)] for name, every in ratios.items()},
        "memory_MB": {name: max(every) for name, every in memory.items()},
        "difference": {
            name: float((cosines - reference).abs().max())
            for name, cosines in similarity.items()
            if cosines is not None and reference is not None
        },
        "repeats": repeats,
        "environment": environment(),
    }


def report(title: str, result: dict[str, Any]) -> None:
    """The table to stdout."""
    table = Table(title=title, title_justify="left")
    for heading in ("", "seconds", "ratio", "smallest", "largest", "MB", "difference"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, seconds in result["seconds"].items():
        low, high = result["spread"][name]
        difference = f"{result['difference'][name]:.1e}" if name in result["difference"] else ""
        figures = (f"{seconds:.2f}", f"{result['ratio'][name]:.2f}", f"{low:.2f}", f"{high:.2f}")
        table.add_row(name, *figures, f"{result['memory_MB'][name]:.0f}", difference)
    Console(file=sys.stdout, width=110).print(table)


@click.command()
@click.option("--bank", type=click.IntRange(1), default=200_000, show_default=True)
@click.option("--queries", type=click.IntRange(1), default=5_000, show_default=True)
@click.option("--dim", type=click.IntRange(1), default=2048, show_default=True)
@click.option("--k", type=click.IntRange(1), default=200, show_default=True)
@click.option("--memory", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True, help="GB.")
@click.option("--rows", multiple=True, type=click.Choice(list(ROWS)), help="Only these; all by default.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(
    bank: int,
    queries: int,
    dim: int,
    k: int,
    memory: float,
    rows: tuple[str, ...],
    repeats: int,
    json_file: Path | None,
) -> None:
    """Seconds and memory of finding the k nearest of --queries features in a bank of --bank."""
    with tempfile.TemporaryDirectory() as folder:
        stored = [
            draw(Path(folder) / f"{name}.bin", count, dim, seed)
            for seed, (name, count) in enumerate((("bank", bank), ("queries", queries)), start=1)
        ]
        result = compare(Problem(stored[1], stored[0], k, 1e9 * memory), list(rows or ROWS), repeats)
    result |= {"bank": bank, "queries": queries, "dim": dim, "k": k, "memory_GB": memory}
    report(
        f"{k} nearest of {queries} queries in {bank} x {dim}, {memory:g} GB, {torch.get_num_threads()} threads", result
    )
    if json_file is not None:
        write_json(json_file, result)


if __name__ == "__main__":
    main()
