"""Many linear classifiers trained side by side in one pass over the data, chosen on held-out images, tested once.

Source: Oquab et al. 2023 (DINOv2), arXiv:2304.07193, Sec. 7.1 and dinov2/eval/linear.py, for the grid in one pass; He
et al. 2022 (MAE), arXiv:2111.06377, App. A.1, for batch norm without parameters before the classifier.
"""

from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from moco_eval.classification.linear import check_frozen, freeze, new_classifier, passes, snapshot
from moco_eval.classification.task import Code, Outcome, Task
from moco_eval.classification.training_loop import Loop
from moco_eval.config.classification import SweepConfig
from moco_eval.config.learning_rate import learning_rate
from moco_eval.data.image_set import ImageSet
from moco_eval.data.label_subsets import held_out
from moco_eval.errors import InputError, RunFailed
from moco_eval.features.cache import Features
from moco_eval.features.stages import Several, placed
from moco_eval.results.metrics import accuracy
from moco_eval.runtime.collectives import all_sum
from moco_eval.runtime.console import log, warn
from moco_eval.runtime.device import autocast


def check(task: Task, config: SweepConfig) -> None:
    """Raises InputError for a feature that the encoder does not have."""
    Several(task.encoder, config.features)


def run_trial(task: Task, config: SweepConfig, seed: int, state: Path | None, device: torch.device) -> Outcome:
    """Train all heads, choose one on the held-out images, and score the test images with it."""
    images = task.training_images(seed)
    assert images.labels is not None
    kept, held = (images.take(rows) for rows in held_out(images.labels, config.held_out, seed))
    if not len(held):
        raise InputError(
            "every class has only one training image, so none can be held out to choose a head; take more --labels"
        )
    held_features, test_features = (_clean(task, part, config, device) for part in (held, task.test))
    backbone = freeze(placed(Several(task.encoder, config.features), task.encoder, device))
    before = snapshot(backbone)
    dims = [features.shape[1] for features in held_features]
    sweep = Sweep(backbone, config, dims, len(task.train.classes), seed, device)
    earlier = Loop(sweep, kept, config, task.preprocessing, seed, state, device).run(
        "sweep", "take smaller --set learning_rates=[...]"
    )
    check_frozen(before, backbone)
    notes, best = choose(sweep, held_features, torch.as_tensor(held.labels), config)
    scores = best.scores(test_features[best.feature])
    others = task.further_features(config, device, config.features[best.feature])
    count = len(kept) * config.schedule.epochs + len(held) + len(task.test)
    further = {split: best.scores(features) for split, features in others.items()}
    return Outcome(scores, count, notes, earlier, further=further)


def _clean(task: Task, images: ImageSet, config: SweepConfig, device: torch.device) -> list[Features]:
    return task.several([task.source(images, config, feature=feature) for feature in config.features], device)


class Head(NamedTuple):
    """One classifier of a sweep: its place in its group, and what it was trained with."""

    group: "Heads"
    row: int

    @property
    def feature(self) -> int:
        return self.group.feature

    def settings(self, features: tuple[str, ...]) -> dict[str, Any]:
        """For the record."""
        lr, weight_decay = self.group.grid[self.row]
        names = {"feature": features[self.feature], "batch_norm": self.group.norm is not None}
        return names | {"lr": lr, "weight_decay": weight_decay}

    def scores(self, features: Features) -> torch.Tensor:
        """Class scores, (images, classes), on the CPU."""
        blocks = (features[at : at + 8192] for at in range(0, len(features), 8192))
        return torch.cat([self.group.scores(block, self.row) for block in blocks])


def choose(
    sweep: "Sweep", held: list[Features], labels: torch.Tensor, config: SweepConfig
) -> tuple[dict[str, Any], Head]:
    """The head with the best top-1 on the held-out images, the first of equals; and notes about all of them.

    Raises:
        RunFailed: no head has finite weights.
    """
    heads = [Head(group, row) for group in sweep.groups for row in range(len(group.grid))]
    alive = [head for head in heads if head.group.is_finite(head.row)]
    if not alive:
        raise RunFailed(f"all {len(heads)} heads diverged; take smaller --set learning_rates=[...]")
    right = [accuracy(head.scores(held[head.feature]), labels) for head in alive]
    best = alive[int(np.argmax(right))]
    table = [head.settings(config.features) | {"held_out_top1": top1} for head, top1 in zip(alive, right)]
    chosen = table[alive.index(best)]
    lost = f", {len(heads) - len(alive)} diverged" if len(alive) < len(heads) else ""
    log(f"sweep: {len(heads)} heads{lost}; chosen on {len(labels)} held-out images: {chosen}")
    if chosen["lr"] in (min(config.learning_rates), max(config.learning_rates)) and len(config.learning_rates) > 1:
        warn(f"the chosen learning rate {chosen['lr']:g} is at the edge of the grid; widen --set learning_rates=[...]")
    return {"chosen": chosen, "held_out_images": len(labels), "heads": table}, best


class Sweep:
    """All heads of a sweep on one frozen network; a `training_loop.Learner`."""

    def __init__(
        self,
        backbone: nn.Module,
        config: SweepConfig,
        dims: list[int],
        classes: int,
        seed: int,
        device: torch.device,
    ):
        self.backbone, self.config, self.device = backbone, config, device
        grid = list(product(config.learning_rates, config.weight_decays))
        self.groups = [
            Heads(feature, dim, classes, grid, config.sgd_momentum, norm, seed, device)
            for (feature, dim), norm in product(enumerate(dims), config.batch_norm)
        ]

    def train_step(self, views: torch.Tensor, labels: torch.Tensor, epoch: int, batch: int) -> torch.Tensor:
        """See `training_loop.Learner`; the loss is that of the head that does best in this batch."""
        with torch.no_grad(), autocast(self.device, self.config.precision):
            features = [output.flatten(1).float() for output in self.backbone(views)]
        factor = learning_rate(self.config.schedule, 1.0, epoch)
        losses = [group.step(features[group.feature], labels, factor, batch) for group in self.groups]
        together = torch.cat(losses)
        finite = together.isfinite()
        return torch.where(finite.any(), together.where(finite, torch.inf).min(), together[0])

    def end_epoch(self, epoch: int) -> None:
        """Nothing is looked at before the end."""

    def state_dict(self) -> dict[str, Any]:
        """For resuming."""
        return {"groups": [group.state_dict() for group in self.groups]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        for group, kept in zip(self.groups, state["groups"]):
            group.load_state_dict(kept)


class Heads(nn.Module):
    """Classifiers on one feature, each with its own learning rate and weight decay: one product serves them all.

    Attributes:
        grid: (learning rate, weight decay) of each of the L heads.
        weight, bias: (L, C, D) and (L, C), all heads starting alike: N(0, 0.01) and 0.
        norm: batch norm without parameters, statistics over all processes; None where there is none.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(
        self,
        feature: int,
        dim: int,
        classes: int,
        grid: list[tuple[float, float]],
        momentum: float,
        norm: bool,
        seed: int,
        device: torch.device,
    ):
        super().__init__()
        self.feature, self.grid, self.momentum = feature, grid, momentum
        self.norm = nn.BatchNorm1d(dim, eps=1e-6, affine=False).to(device) if norm else None
        start = new_classifier(dim, classes, seed)
        for name, tensor in (("weight", start.weight), ("bias", start.bias)):
            tensor = tensor.detach().expand(len(grid), *tensor.shape).to(device).clone()
            self.register_buffer(name, tensor)
            self.register_buffer(f"{name}_momentum", torch.zeros_like(tensor))
        self.rates, self.decays = torch.tensor(grid, device=device).T.contiguous()

    @torch.no_grad()
    def step(self, features: torch.Tensor, labels: torch.Tensor, factor: float, batch: int) -> torch.Tensor:
        """One SGD step of every head on this process's share of a batch of `batch` images.

        Args:
            features: (N, D); labels: (N,).
            factor: of the schedule, on every learning rate.
        Returns:
            Each head's part of its mean loss, (L,).
        """
        if self.norm is not None:
            features = normalise(features, self.norm, batch)
        logits = self._logits(features)  # (N, L, C)
        losses = cross_entropy(logits.permute(0, 2, 1), labels[:, None].expand(-1, len(self.grid)), reduction="none")
        error = logits.softmax(2)
        answers = labels[:, None, None].expand(-1, len(self.grid), 1)
        error.scatter_add_(2, answers, error.new_full(answers.shape, -1.0))
        error /= batch
        # the gradient of the mean loss over the whole batch
        slope = all_sum((error.flatten(1).T @ features).view_as(self.weight))
        self._move("weight", slope, factor)
        self._move("bias", all_sum(error.sum(0)), factor)
        return losses.sum(0) / batch

    def _logits(self, features: torch.Tensor) -> torch.Tensor:
        flat = torch.addmm(self.bias.flatten(), features, self.weight.flatten(0, 1).T)
        return flat.view(len(features), *self.bias.shape)

    def _move(self, name: str, slope: torch.Tensor, factor: float) -> None:
        """torch.optim.SGD's step, each head with its own numbers."""
        tensor, momentum = getattr(self, name), getattr(self, f"{name}_momentum")
        shape = (-1, *[1] * (tensor.dim() - 1))
        momentum.mul_(self.momentum).add_(slope).add_(self.decays.view(shape) * tensor)
        tensor.sub_(momentum * (factor * self.rates).view(shape))

    @torch.no_grad()
    def scores(self, features: torch.Tensor, row: int) -> torch.Tensor:
        """Class scores by one head of features in evaluation, (N, D) to (N, C), on the CPU."""
        features = features.to(self.weight.device)
        if self.norm is not None:
            features = self.norm.eval()(features)
        return torch.addmm(self.bias[row], features, self.weight[row].T).cpu()

    def is_finite(self, row: int) -> bool:
        """Whether a head has not diverged."""
        return bool(self.weight[row].isfinite().all() and self.bias[row].isfinite().all())


def normalise(features: torch.Tensor, norm: nn.BatchNorm1d, batch: int) -> torch.Tensor:
    """Batch norm in training, its statistics those of the whole batch over all processes; no gradient is needed.

    Args:
        features: this process's share, (N, D), of `batch` rows.
    """
    assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
    mean = all_sum(features.sum(0)) / batch
    variance = all_sum(((features - mean) ** 2).sum(0)) / batch
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(variance * (batch / max(1, batch - 1)), norm.momentum)
    return (features - mean) / (variance + norm.eps).sqrt()


CODE = Code(run_trial, passes, check=check)
