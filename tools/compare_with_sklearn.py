"""Our kNN and logistic regression against scikit-learn's, on the same features of real images.

python tools/compare_with_sklearn.py FOLDER CHECKPOINT [--dataset cifar10] [--train 5000] [--test 2000] [--json FILE]

- logistic: the loss at the optimum of each (relative difference; aim 1e-4) and the accuracy on the test images (aim 0.1
  points), at the C that scikit-learn reaches within 10,000 iterations.
- kNN: class predicted by our search and vote and by scikit-learn's brute-force neighbours (cosine) and the same vote,
  k 200 (or a tenth of the images), temperature 0.07. Images whose k-th and next neighbour differ by less than 1e-6 in
  similarity, or whose two best classes differ by less than 1e-6 of the vote, are counted apart.
"""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

import click
import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors

from benchmark_linear import some  # isort: skip
from moco_eval.classification.knn import vote
from moco_eval.classification.logistic import Fit, SolverSettings, fit_sklearn, fit_torch, loss, scores
from moco_eval.classification.neighbours import Neighbours, nearest
from moco_eval.data.catalogue import open_splits, preprocessing_for
from moco_eval.encoders.load import load
from moco_eval.features.extract import extract
from moco_eval.results.environment import environment
from moco_eval.results.metrics import accuracy
from moco_eval.runtime.files import write_json

COSTS = (0.001, 0.01, 0.1, 1.0)
TIE = 1e-6


def compare_logistic(train: torch.Tensor, y: np.ndarray, test: torch.Tensor, labels: torch.Tensor, C: float) -> dict:
    """Loss, accuracy, iterations and seconds of both solvers at one C."""
    rows: dict[str, Any] = {"C": C}
    settings, features = SolverSettings(max_iterations=10_000), train.double().numpy()
    solvers = {
        "sklearn": lambda: fit_sklearn(features, y, C, settings=settings),
        "ours": lambda: fit_torch(train.double(), y, C, torch.device("cpu"), settings=settings),
    }
    for name, solve in solvers.items():
        began = time.perf_counter()
        fit: Fit = solve()
        took = time.perf_counter() - began
        top1 = accuracy(scores(test.double(), fit), labels)
        result = {"loss": loss(train.double(), y, fit), "top1": top1, "iterations": fit.iterations}
        rows[name] = result | {"seconds": took, "converged": fit.converged}
    ours, theirs = rows["ours"], rows["sklearn"]
    rows["relative_loss_difference"] = abs(ours["loss"] - theirs["loss"]) / theirs["loss"]
    rows["top1_difference"] = abs(ours["top1"] - theirs["top1"])
    return rows


def compare_knn(bank: torch.Tensor, y: torch.Tensor, queries: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Predictions of both searches, and how many differ without a tie."""
    k, classes = min(200, len(bank) // 10), int(y.max()) + 1
    more = NearestNeighbors(n_neighbors=k + 1, algorithm="brute", metric="cosine").fit(bank.double().numpy())
    distance, index = more.kneighbors(queries.double().numpy())
    similarity = torch.from_numpy(1 - distance)
    theirs = vote(Neighbours(similarity[:, :k], torch.from_numpy(index[:, :k])), y, classes, 0.07)
    ours = vote(nearest(queries, bank, k), y, classes, 0.07)
    best = theirs.topk(2, dim=1).values
    tied = (similarity[:, k - 1] - similarity[:, k] < TIE) | (best[:, 0] - best[:, 1] < TIE * best[:, 0])
    differ = ours.argmax(1) != theirs.argmax(1)
    return {
        "k": k,
        "queries": len(queries),
        "tied": int(tied.sum()),
        "different": int(differ.sum()),
        "different_without_a_tie": int((differ & ~tied).sum()),
        "top1": {"ours": accuracy(ours, labels), "sklearn": accuracy(theirs, labels)},
    }


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("checkpoint")
@click.option("--dataset", default="cifar10", show_default=True)
@click.option("--train", default=5000, show_default=True)
@click.option("--test", default=2000, show_default=True)
@click.option("--workers", default=0, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(
    folder: Path, checkpoint: str, dataset: str, train: int, test: int, workers: int, json_file: Path | None
) -> None:
    """Compare, and exit with 1 where an aim is missed."""
    encoder, splits = load(checkpoint), open_splits(dataset, folder)
    kept = [some(split, count) for split, count in zip(splits, (train, test))]
    size, cpu = preprocessing_for(dataset, encoder.preprocessing), torch.device("cpu")
    bank, queries = (extract(encoder.backbone.eval(), split, size, cpu, workers=workers) for split in kept)
    y, labels = (torch.as_tensor(split.labels) for split in kept)
    rows = [compare_logistic(bank, y.numpy(), queries, labels, C) for C in COSTS]
    neighbours = compare_knn(bank, y, queries, labels)
    for row in rows:
        ours, theirs = row["ours"], row["sklearn"]
        click.echo(
            f"logistic, C {row['C']:g}: loss {theirs['loss']:.7f} and {ours['loss']:.7f} (relative difference "
            f"{row['relative_loss_difference']:.1e}), top-1 {theirs['top1']:.2f} and {ours['top1']:.2f}; "
            f"{theirs['iterations']} and {ours['iterations']} iterations, {theirs['seconds']:.1f} and "
            f"{ours['seconds']:.1f} s (scikit-learn and ours)"
        )
    click.echo(f"kNN: {neighbours}")
    missed = any(row["relative_loss_difference"] > 1e-4 or row["top1_difference"] > 0.1 for row in rows)
    missed |= neighbours["different_without_a_tie"] > 0
    if json_file is not None:
        result = {"encoder": encoder.source, "images": [len(bank), len(queries)], "environment": environment()}
        write_json(json_file, result | {"logistic": rows, "knn": neighbours})
    raise SystemExit(int(missed))


if __name__ == "__main__":
    main()
