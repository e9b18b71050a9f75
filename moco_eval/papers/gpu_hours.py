"""What a step costs in hours of a named GPU, from published figures; nothing is timed, and torch is not needed.

The figures are of MoCo's pretraining of a ResNet-50 and of detectron2's detectors. A backward pass is counted as two
forward ones, so that a forward is a quarter of MoCo's step: query forward and backward, key forward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from moco_eval.classification.protocols import load_config
from moco_eval.config import load as configs
from moco_eval.config.detection import DetectConfig
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.papers.steps import ChainStep
from moco_eval.papers.tables import Row, Table

GPU = "V100"
GPUS = 8  # of each figure
IMAGENET = 1_281_167  # training images of the published epochs
# Hours of 200 epochs on ImageNet, by loss mechanism: arXiv:2003.04297v1, Table 3
PRETRAINING = {"moco": 53.0, "end_to_end": 65.0}
# Seconds of an iteration of 16 images, by model and whether it has masks: detectron2's MODEL_ZOO.md (COCO, 1x)
DETECTION = {
    ("r50_c4", False): 0.551,
    ("r50_dc5", False): 0.380,
    ("r50_fpn", False): 0.210,
    ("r50_c4", True): 0.584,
    ("r50_fpn", True): 0.261,
}
FORWARD = PRETRAINING["moco"] * GPUS / (200 * IMAGENET) / 4  # GPU-hours of an image through a ResNet-50 at 224 pixels


@dataclass(frozen=True)
class GpuHours:
    """Hours of one GPU of that name."""

    hours: float
    gpu: str = GPU

    @property
    def phrase(self) -> str:
        return f"about {amount(self.hours)} of a {self.gpu}" if self.hours else "under a minute"


def amount(hours: float) -> str:
    """GPU-hours in words."""
    if hours < 0.1:
        return f"{60 * hours:.1f} GPU-minutes"
    return f"{hours:,.1f} GPU-hours" if hours < 10 else f"{hours:,.0f} GPU-hours"


def costs(steps: Sequence[ChainStep], table: Table) -> list[GpuHours | None]:
    """Of each step, all trials together; None where no figure is of such a network or such data."""
    rows = {row.label: row for row in table.rows}
    return [_cost(step, rows[step.cells[0][0]]) for step in steps]


def _cost(step: ChainStep, row: Row) -> GpuHours | None:
    if step.kind == "convert":
        return GpuHours(0.0)
    if step.kind == "pretrain":
        assert row.recipe
        return _pretraining(row.recipe.resolved(), step.dataset)
    trials = int(next((value for name, value in pairwise(step.arguments) if name == "--trials"), "1"))
    if step.arguments[0] == "detect":
        return _detection(configs.load(step.name, "detect", DetectConfig), trials)
    if step.arguments[0] == "segment":
        return None  # no figure was published
    return _classification(step, row, trials)


def _pretraining(recipe: PretrainConfig, dataset: str) -> GpuHours | None:
    hours, images = PRETRAINING.get(recipe.mechanism), images_of(dataset, "train")
    if hours is None or not images or recipe.arch != "resnet50" or recipe.views.size != 224:
        return None
    views = 2 if recipe.symmetric else 1
    return GpuHours(GPUS * hours * views * recipe.schedule.epochs / 200 * images / IMAGENET)


def _detection(recipe: DetectConfig, trials: int) -> GpuHours | None:
    seconds = DETECTION.get((recipe.model, recipe.masks))
    if seconds is None or recipe.keypoints or recipe.input.min_size_test != 800:
        return None
    return GpuHours(trials * GPUS * seconds * recipe.schedule.iterations * recipe.batch_size / 16 / 3600)


def _classification(step: ChainStep, row: Row, trials: int) -> GpuHours | None:
    train, test = images_of(step.dataset, "train"), images_of(step.dataset, "test")
    if not (train and test) or not _is_resnet50_at_224(step, row):
        return None
    forward, trained, extracted = passes(step.arguments[0], load_config(step.name, step.arguments[0]), train, test)
    return GpuHours(FORWARD * (trials * (forward + 3 * trained) + extracted))


def _is_resnet50_at_224(step: ChainStep, row: Row) -> bool:
    kind, _, rest = step.arguments[1].partition(":")
    if step.dataset in ("cifar10", "cifar100", "stl10", "digits"):
        return False
    if kind in ("random", "torchvision"):
        return rest.split(":")[0] == "resnet50"
    if kind == "zoo":
        from moco_eval.encoders import zoo

        return zoo.entry(rest).recipe.arch == "resnet50"
    return (
        row.recipe is not None and row.recipe.resolved().arch == "resnet50" and row.recipe.resolved().views.size == 224
    )


def passes(kind: str, config: Any, train: int, test: int) -> tuple[float, float, float]:
    """Images of a trial forward, and forward and backward; and those extracted once for all trials.

    The same as each protocol's own `passes`, which stands beside code that needs torch.
    """
    epochs = config.schedule.epochs if hasattr(config, "schedule") else 0
    if kind == "finetune":
        return test * max(1, epochs // config.test_every), train * epochs, 0
    if kind == "linear" and not hasattr(config, "crops"):
        return train * epochs + test, 0, 0
    return 0, 0, train * (1 + getattr(config, "crops", 0)) + test


def images_of(dataset: str, split: str) -> int:
    """How many a published data set has; 0 where there is no such number."""
    from moco_eval.data.catalogue import OFFICIAL

    names = {"train": ("train", "trainval"), "test": ("test", "val")}[split]
    return next((OFFICIAL[dataset, name] for name in names if (dataset, name) in OFFICIAL), 0)
