"""Linear classification on features extracted once: the recipe of `linear/moco-lincls@1` on a few epochs of crops.

The classifier and its schedule are those of main_lincls.py; the crops are not drawn anew in each of its hundred epochs:
it meets `crops` epochs of them and the clean crop in turn. docs/protocols/linear.md has the measured gap.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from moco_eval.classification.linear import Classifier, check_moved, snapshot
from moco_eval.classification.probe import Probe
from moco_eval.classification.task import Code, Outcome, Passes, Task
from moco_eval.config.classification import QuickConfig
from moco_eval.data.loader import Batches
from moco_eval.features.cache import Features, Source
from moco_eval.features.extract import Crops
from moco_eval.runtime.console import progress
from moco_eval.runtime.device import require_finite, to_device
from moco_eval.runtime.rank import is_main


def crops(config: QuickConfig) -> list[Crops]:
    """The epochs of training crops that a classifier meets beside the clean crop."""
    return [Crops(config.augmentation, config.seed, epoch) for epoch in range(config.crops)]


def sources(task: Task, config: QuickConfig) -> list[Source]:
    """See `task.Code`."""
    features = [task.source(task.test, config)]
    for images in map(task.training_images, task.seeds(config) if task.labels_per_class else [config.seed]):
        features += [task.source(images, config, kind) for kind in (None, *crops(config))]
    return features


def passes(config: QuickConfig, train: int, test: int) -> Passes:
    """Every training image once for each kind of crop."""
    return Passes(extracted=train * (1 + config.crops) + test)


def run_trial(task: Task, config: QuickConfig, seed: int, _state: Path | None, device: torch.device) -> Outcome | None:
    """Extract what is missing, train one classifier on it, score the test images; None on ranks but the first.

    The crops belong to the config's seed, so that trials share them; the classifier's start and order to the trial's.
    """
    images = task.training_images(seed)
    test, others = task.features(task.test, config, device), task.further_features(config, device)
    parts = [task.features(images, config, device, kind) for kind in (None, *crops(config))]
    if not is_main():
        return None
    classifier = Classifier(
        test.shape[1], len(task.train.classes), config.optimizer, config.schedule, seed, device, alone=True
    )
    start = snapshot(classifier.layer)
    train(classifier, parts, torch.as_tensor(images.labels), config, seed, device)
    check_moved(start, classifier.layer)
    further = {split: classifier.scores(features) for split, features in others.items()}
    return Outcome(classifier.scores(test), len(images) * len(parts) + len(test), further=further)


def train(
    classifier: Classifier,
    parts: list[Features],
    labels: torch.Tensor,
    config: QuickConfig,
    seed: int,
    device: torch.device,
) -> None:
    """Train on features: epoch after epoch the next of `parts`, in an order drawn from the seed.

    Args:
        parts: features of the same images, once for each kind of crop.
        labels: (N,), of those images.
    Raises:
        RunFailed: the loss is not finite.
    """
    epochs, labels = config.schedule.epochs, to_device(labels, device)
    batches = Batches(len(labels), config.batch_size, seed, range(1), shuffle=True, drop_last=False)
    held = on_device(parts, device)
    with progress("classifier", epochs, len(labels)) as advance:
        for epoch in range(epochs):
            features, order = held(epoch % len(parts)), to_device(torch.from_numpy(batches.order(epoch)), device)
            losses = []
            for rows in order.split(config.batch_size):
                losses.append(classifier.step(features[rows], labels[rows], epoch, len(rows)))
            require_finite(torch.stack(losses).mean().item(), f"epoch {epoch}", "a smaller --set optimizer.lr may help")
            advance()


def on_device(parts: list[Features], device: torch.device) -> Callable[[int], torch.Tensor]:
    """What gives the n-th of those features on a device: all are held there where they fit in half of what is free (in
    4 GB of a machine's memory), else one at a time.
    """
    size = sum(array.nbytes for part in parts for array in part.parts)
    at_once = len(parts) if size <= _room(device) else 1
    return lru_cache(at_once)(lambda n: to_device(parts[n].stored(), device))


def _room(device: torch.device) -> float:
    """Bytes of features that are held at once."""
    return torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else 4e9


def memory(config: QuickConfig, probe: Probe) -> float:
    """The features of every kind of crop, or of one where they are too many; see `task.Code`."""
    one = probe.train * probe.dim * (2 if config.precision == "bf16" else 4)
    every = (1 + config.crops) * one
    return every if every <= _room(probe.device) else one


def own_work(config: QuickConfig, probe: Probe) -> tuple[float, str]:
    """The steps of SGD on one classifier; see `task.Code`."""
    steps = -(-probe.train // config.batch_size)
    features, labels = probe.rows(probe.train).to(probe.device), probe.labels()
    settings = (config.optimizer, config.schedule)
    classifier = Classifier(probe.dim, probe.classes, *settings, seed=0, device=probe.device, alone=True)
    batch = probe.train // steps

    def piece(count: int) -> None:
        for _ in range(count):
            rows = torch.randint(len(features), (batch,), device=probe.device)
            classifier.step(features[rows], labels[rows], 0, batch)

    epochs = config.schedule.epochs
    return probe.scaled(piece, epochs * steps, probe.seconds), f"{epochs} epochs of SGD"


CODE = Code(run_trial, passes, sources=sources, own_work=own_work, memory=memory)
