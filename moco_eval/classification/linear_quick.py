"""Linear classification on features extracted once: the recipe of `linear/moco-lincls@1` on a few epochs of crops.

The classifier and its schedule are those of main_lincls.py; the crops are not drawn anew in each of its hundred epochs:
it meets `crops` epochs of them and the clean crop in turn. docs/protocols/linear.md has the measured gap.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from moco_eval.classification.judge import Outcome, Protocol, Task, judge
from moco_eval.classification.linear import Classifier, check_moved, snapshot
from moco_eval.config import load as configs
from moco_eval.config.classification import QuickConfig
from moco_eval.data.loader import Batches
from moco_eval.features.cache import Features
from moco_eval.features.extract import Crops
from moco_eval.runtime.console import progress
from moco_eval.runtime.device import require_finite, to_device
from moco_eval.runtime.rank import is_main


def evaluate(task: Task, config: QuickConfig, output: Path, device: torch.device) -> dict[str, Any]:
    """Run the protocol into a run directory; returns the result record. Raises as `classify.judge` does."""
    canonical = configs.load("quick", "linear", QuickConfig)
    protocol = Protocol("linear", config, canonical, over="head", selection="last-epoch")

    def trial(seed: int, _state: Path) -> Outcome | None:
        return run_trial(task, config, seed, device)

    return judge(task, protocol, output, device, trial)


def crops(config: QuickConfig) -> list[Crops]:
    """The epochs of training crops that a classifier meets beside the clean crop."""
    return [Crops(config.augmentation, config.seed, epoch) for epoch in range(config.crops)]


def run_trial(task: Task, config: QuickConfig, seed: int, device: torch.device) -> Outcome | None:
    """Extract what is missing, train one classifier on it, score the test images; None on ranks but the first.

    The crops belong to the config's seed, so that trials share them; the classifier's start and order to the trial's.
    """
    images = task.training_images(seed)
    test = task.features(task.test, config, device)
    parts = [task.features(images, config, device, one) for one in (None, *crops(config))]
    if not is_main():
        return None
    classifier = Classifier(
        test.shape[1], len(task.train.classes), config.optimizer, config.schedule, seed, device, alone=True
    )
    start = snapshot(classifier.layer)
    train(classifier, parts, torch.as_tensor(images.labels), config, seed, device)
    check_moved(start, classifier.layer)
    return Outcome(classifier.scores(test), len(images) * len(parts) + len(test))


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
    4 GB of a CPU's memory), else one at a time.
    """
    size = sum(array.nbytes for part in parts for array in part.parts)
    room = 4e9 if device.type == "cpu" else torch.cuda.mem_get_info(device)[0] / 2
    return lru_cache(len(parts) if size <= room else 1)(lambda n: to_device(parts[n].stored(), device))
