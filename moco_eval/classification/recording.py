"""What a run directory keeps of an evaluation beside its record: predictions, a sample of features and their health."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from moco_eval.classification.task import Task
from moco_eval.features import health, sample
from moco_eval.features.cache import rows_of
from moco_eval.features.extract import Crops
from moco_eval.runtime import files
from moco_eval.runtime.collectives import found_by_main

HEALTH_IMAGES, ALIGNED_IMAGES = 2000, 256  # at most: test images that health is measured on; images cropped twice
HEALTH_NUMBERS = 2**25  # of their features at most: raw pixels may have 150,000 dimensions


def write_predictions(output: Path, arrays: dict[str, np.ndarray]) -> None:
    """predictions.npz."""
    with files.atomic(output / "predictions.npz") as temporary:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]


def look_at_features(task: Task, config: Any, output: Path, device: torch.device) -> dict[str, Any]:
    """Write sample.npz, and say how healthy the features of test images are. The first process looks for all.

    The trials have left those features in the cache; without one, so few images pass once more.
    """
    return found_by_main(lambda: _look_at_features(task, config, output, device))


def _look_at_features(task: Task, config: Any, output: Path, device: torch.device) -> dict[str, Any]:
    dimensions = task.encoder.feature_dim or 3 * task.preprocessing.size**2  # of raw pixels
    rows = sample.evenly(len(task.test), min(HEALTH_IMAGES, HEALTH_NUMBERS // dimensions))
    features = rows_of(task.source(task.test, config), task.cache, rows, device).numpy()
    shown = sample.evenly(len(rows), sample.IMAGES)
    components = sample.principal_components(features[shown])
    assert task.test.labels is not None
    labels = task.test.labels[rows[shown]]
    sample.write(output / sample.NAME, sample.Sample(rows[shown], labels, task.test.classes, *components))
    healthy = health.describe(features, _two_crops(task, config, device))
    augmentation = getattr(config, "augmentation", None)
    healthy["crops"] = augmentation.model_dump(mode="json") if augmentation else None
    return healthy


def _two_crops(task: Task, config: Any, device: torch.device) -> tuple[np.ndarray, np.ndarray] | None:
    """Features of two training crops of some training images, where the protocol has such crops."""
    if (augmentation := getattr(config, "augmentation", None)) is None:
        return None
    images = task.training_images(config.seed)
    rows = sample.evenly(len(images), ALIGNED_IMAGES)
    first, second = (task.source(images, config, Crops(augmentation, config.seed, epoch)) for epoch in (0, 1))
    return (
        rows_of(first, task.cache, rows, device).numpy(),
        rows_of(second, task.cache, rows, device).numpy(),
    )
