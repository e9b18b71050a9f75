"""Weighted k-nearest-neighbour classification on frozen features.

Source: Wu et al. 2018 (InstDisc), arXiv:1805.01978, Sec. 3.4; facebookresearch/moco, CIFAR-10 demo notebook.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize

from moco_eval import config as configs
from moco_eval import files
from moco_eval.config import KnnConfig
from moco_eval.data.images import (
    ImageSet,
    departures,
    preprocessing_departures,
    preprocessing_for,
    require_single_label,
)
from moco_eval.encoders.encoder import Encoder, Preprocessing
from moco_eval.errors import InputError
from moco_eval.features import extract, network
from moco_eval.metrics import accuracy
from moco_eval.results import Cost, Result, deviations, finished, open_run
from moco_eval.runtime import is_main, log
from moco_eval.statistics import intervals


@dataclass
class Neighbours:
    """The k nearest of each query by cosine similarity, nearest first: both (queries, k)."""

    similarity: torch.Tensor
    index: torch.Tensor


def nearest(queries: torch.Tensor, bank: torch.Tensor, k: int, block: int | None = None) -> Neighbours:
    """Find them, `block` queries at a time; by default as many as keep the similarities under half a gigabyte.

    Args:
        queries: (Q, D); bank: (B, D). Normalised here.
    Raises:
        InputError: the bank holds fewer than k.
    """
    require_enough(k, len(bank))
    bank = normalize(bank, dim=1)
    block = block or max(1, 2**27 // len(bank))
    parts = [torch.topk(normalize(rows, dim=1) @ bank.T, k, dim=1) for rows in queries.split(block)]
    return Neighbours(torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts]))


def require_enough(k: int, images: int) -> None:
    """Raises InputError where the bank holds fewer than k."""
    if k > images:
        raise InputError(f"k {k} is more than the {images} images of the bank; take --set k={images} or less")


def vote(neighbours: Neighbours, labels: torch.Tensor, classes: int, temperature: float) -> torch.Tensor:
    """Class scores, (queries, classes): each neighbour adds exp(similarity / temperature) to its own class.

    Args:
        labels: class of each image in the bank, (B,).
    """
    weights = ((neighbours.similarity - 1) / temperature).exp()  # a common factor, against overflow
    scores = weights.new_zeros((len(weights), classes))
    return scores.scatter_add_(1, labels[neighbours.index], weights)


def monitor(
    net: nn.Module,
    train: ImageSet,
    test: ImageSet,
    preprocessing: Preprocessing,
    device: torch.device,
    *,
    k: int,
    temperature: float,
    workers: int,
) -> float:
    """Top-1 in percent of the kNN monitor during pretraining: bank of clean training images; puts `net` back.

    An unreadable image is named and counts as a grey one: a monitor must not end a run, least of all on one rank.
    """
    assert train.labels is not None and test.labels is not None
    training = net.training
    net.eval()
    bank, queries = (
        extract(net, images, preprocessing, device, workers=workers, title="kNN", tolerant=True)
        for images in (train, test)
    )
    net.train(training)
    scores = vote(
        nearest(queries.to(device), bank.to(device), min(k, len(bank))),
        torch.as_tensor(train.labels, device=device),
        len(train.classes),
        temperature,
    )
    return accuracy(scores.cpu(), torch.as_tensor(test.labels))


def evaluate(
    encoder: Encoder, train: ImageSet, test: ImageSet, config: KnnConfig, output: Path, device: torch.device
) -> dict:
    """Run the protocol into a run directory; returns the result record."""
    network(encoder, config.feature)  # an encoder without that feature is refused before anything is written
    require_single_label(test)
    require_enough(config.k, len(train))
    preprocessing = preprocessing_for(train.name, encoder.preprocessing)
    resolved = {
        "command": "knn",
        "dataset": {"train": train.record(), "test": test.record()},
        "encoder": encoder.identity(),
        "config": config.model_dump(mode="json"),
    }
    if open_run(output, resolved) and (record := finished(output)):
        log(f"already done: {output}")
        return record
    assert train.labels is not None and test.labels is not None
    cost = Cost(str(device), images=len(train) + len(test))
    with cost.clock():
        neighbours, scores = _classify(encoder, train, test, config, device)
    labels = torch.as_tensor(test.labels)
    metrics = {"top1": accuracy(scores, labels)} | (
        {"top5": accuracy(scores, labels, 5)} if len(train.classes) > 5 else {}
    )
    predictions = scores.argmax(dim=1)
    if is_main():
        kept = {"prediction": predictions, "label": labels, "scores": scores, "neighbour": neighbours.index[:, :10]}
        with files.atomic(output / "predictions.npz") as path:
            np.savez(path, **kept)
        _draw_neighbours(train, test, neighbours, output / "neighbours.png")
    canonical = configs.load(config.protocol.split("/")[1].split("@")[0], "knn", KnnConfig)
    result = Result(
        protocol=config.protocol,
        dataset=test.record() | train.regime(),
        encoder=encoder,
        trials=[{"seed": config.seed, "metrics": metrics}],
        over="head",
        selection="none: nothing is trained or chosen",
        cost=cost,
        interval=intervals(list(metrics), test.labels, scores=scores.numpy()[None]),
        extra={"preprocessing": preprocessing.to_dict()},
        deviations=deviations(config, canonical, ("batch_size",))
        + departures(train, test)
        + preprocessing_departures(train.name, preprocessing),
    )
    return result.write(output)


def _classify(
    encoder: Encoder, train: ImageSet, test: ImageSet, config: KnnConfig, device: torch.device
) -> tuple[Neighbours, torch.Tensor]:
    net = network(encoder, config.feature).to(device).eval()
    preprocessing = preprocessing_for(train.name, encoder.preprocessing)
    bank, queries = (
        extract(
            net,
            images,
            preprocessing,
            device,
            batch_size=config.batch_size,
            workers=config.workers,
            precision=config.precision,
            title=f"{images.split} features",
        )
        for images in (train, test)
    )
    neighbours = nearest(queries.to(device), bank.to(device), config.k)
    labels = torch.as_tensor(train.labels, device=device)
    scores = vote(neighbours, labels, len(train.classes), config.temperature)
    return Neighbours(neighbours.similarity.cpu(), neighbours.index.cpu()), scores.cpu()


def _draw_neighbours(train: ImageSet, test: ImageSet, found: Neighbours, path: Path, rows: int = 8) -> None:
    """A picture: each row a test image and its five nearest training images, at 64 pixels."""
    from PIL import Image

    shown = np.linspace(0, len(test) - 1, min(rows, len(test))).astype(int)
    width = min(5, found.index.shape[1])
    sheet = Image.new("RGB", (64 * (width + 1) + 16, 64 * len(shown)), "white")
    for y, query in enumerate(shown):
        sheet.paste(test.image(int(query)).resize((64, 64)), (0, 64 * y))
        for x in range(width):
            neighbour = train.image(int(found.index[query, x]))
            sheet.paste(neighbour.resize((64, 64)), (64 * (x + 1) + 16, 64 * y))
    with files.atomic(path) as temporary:
        sheet.save(temporary)
