"""Fine-tuning end to end: the backbone and a new linear layer trained together, batch norm included.

Each trial trains a copy that starts as the encoder's own weights, bit for bit; the encoder itself stays as it is. The
last epoch is reported; the best on the test images stands beside it under that name.
Source: OpenSelfSup@1db69ec and lightly@e8d317f; see docs/protocols/finetune.md.
"""

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import skip_init

from moco_eval.classification.task import Code, Outcome, Passes, Task
from moco_eval.classification.training_loop import Loop
from moco_eval.config.classification import FinetuneConfig
from moco_eval.config.learning_rate import rate_of_step
from moco_eval.data.image_set import ImageSet
from moco_eval.encoders.encoder import Encoder
from moco_eval.errors import InputError, RunFailed
from moco_eval.features.extract import extract
from moco_eval.results.metrics import accuracy
from moco_eval.runtime.batch_norm import split_batch_norm, sync_batch_norm
from moco_eval.runtime.collectives import broadcast_, parallel
from moco_eval.runtime.console import warn
from moco_eval.runtime.device import autocast, convolutions, place
from moco_eval.runtime.rank import world_size


def check(task: Task, config: FinetuneConfig) -> None:
    """Raises InputError where there is nothing to train, or too little to train it on."""
    require_trainable(task.encoder)
    steps_per_epoch(len(task.training_images(config.seed)), config)


def passes(config: FinetuneConfig, train: int, test: int) -> Passes:
    """Crops of every epoch, forward and backward, and the test images as often as they are looked at."""
    epochs = config.schedule.epochs
    return Passes(trained=train * epochs, forward=test * max(1, epochs // config.test_every))


def run_trial(task: Task, config: FinetuneConfig, seed: int, state: Path | None, device: torch.device) -> Outcome:
    """Fine-tune one copy of the encoder, check that it moved, and score the test images."""
    images = task.training_images(seed)
    learner = EndToEnd(task, config, steps_per_epoch(len(images), config), seed, device)
    loop = Loop(learner, images, config, task.preprocessing, seed, state, device, config.drop_last)
    earlier = loop.run("finetune")
    check_moved(task.encoder.backbone, learner.net.backbone)
    scores = learner.scores(task.test)
    learner.note(config.schedule.epochs, scores)
    seen = config.schedule.epochs * len(images) + len(learner.tested) * len(task.test)
    further = {part.split: learner.scores(part) for test in task.further for part in test.parts}
    return Outcome(scores, seen, learner.notes(), earlier, further=further)


class Classifier(nn.Module):
    """A backbone and a linear layer on its pooled feature: (N, 3, H, W) to class scores (N, classes)."""

    def __init__(self, backbone: nn.Module, head: nn.Linear):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(images).flatten(1))


class EndToEnd:
    """A copy of the encoder with a new linear layer, and the SGD of both; a `training_loop.Learner`.

    Attributes:
        done: steps taken, over all epochs.
        tested: top-1 on the test images after some epochs, {"epoch", "top1"}.
    """

    def __init__(self, task: Task, config: FinetuneConfig, per_epoch: int, seed: int, device: torch.device):
        self.task, self.config, self.per_epoch, self.device = task, config, per_epoch, device
        self.net = place(new_classifier(task.encoder, len(task.train.classes), config, seed), device)
        self.ddp = parallel(self.net)
        settings = config.optimizer
        self.optimizer = torch.optim.SGD(
            [{"params": part.parameters()} for part in (self.net.backbone, self.net.head)],
            settings.lr,
            momentum=settings.sgd_momentum,
            weight_decay=settings.weight_decay,
        )
        self.done = 0
        self.tested: list[dict[str, float]] = []

    def train_step(self, views: torch.Tensor, labels: torch.Tensor, _epoch: int, batch: int) -> torch.Tensor:
        """See `training_loop.Learner`."""
        rate = rate_of_step(self.config.schedule, self.config.optimizer.lr, self.done, self.per_epoch)
        for group, multiple in zip(self.optimizer.param_groups, (1, self.config.head_lr), strict=True):
            group["lr"] = rate * multiple
        with autocast(self.device, self.config.precision):
            scores = self.ddp(views)
        # the mean over the whole batch, also where the ranks' shares differ: DDP divides by their number
        loss = cross_entropy(scores.float(), labels, reduction="sum") * world_size() / batch
        self.optimizer.zero_grad(set_to_none=True)
        with convolutions(self.device, self.config.precision):
            loss.backward()
        self.optimizer.step()
        self.done += 1
        return loss.detach()

    def end_epoch(self, epoch: int) -> None:
        """Look at the test images after each `test_every` epochs; at the last one the trial does so itself."""
        epochs = epoch + 1
        if epochs % self.config.test_every == 0 and epochs < self.config.schedule.epochs:
            self.note(epochs, self.scores(self.task.test))

    def scores(self, images: ImageSet) -> torch.Tensor:
        """Class scores of clean test images, (images, classes), on the CPU, of every process alike."""
        for buffer in self.net.buffers():
            broadcast_(buffer)  # the first process's running statistics, where each takes its own
        scores = extract(
            self.net.eval(),
            images,
            self.task.preprocessing,
            self.device,
            batch_size=self.config.batch_size,
            workers=self.config.workers,
            precision=self.config.precision,
            title="test",
        )
        self.net.train()
        return scores

    def note(self, epochs: int, scores: torch.Tensor) -> None:
        """Note the accuracy after so many epochs."""
        self.tested.append({"top1": accuracy(scores, torch.as_tensor(self.task.test.labels)), "epoch": epochs})

    def notes(self) -> dict[str, Any]:
        """For the record: which of the epochs that were tested was best on the test images, where there are several."""
        if len(self.tested) < 2:
            return {}
        return {"best_on_test": max(self.tested, key=lambda test: test["top1"]) | {"of": len(self.tested)}}

    def state_dict(self) -> dict[str, Any]:
        """For resuming."""
        state = {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}
        return state | {"done": self.done, "tested": self.tested}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self.tested = int(state["done"]), list(state["tested"])


def new_classifier(encoder: Encoder, classes: int, config: FinetuneConfig, seed: int) -> Classifier:
    """A copy of the encoder's backbone, checked bit for bit, with a new linear layer; in training mode."""
    backbone = normalised(copy.deepcopy(encoder.backbone).requires_grad_(True), config.bn_groups)
    if different := differing(encoder.backbone, backbone):
        raise RunFailed(f"the copy is not the encoder: {len(different)} tensors differ, first {different[0]!r}")
    return Classifier(backbone, new_head(encoder.feature_dim, classes, config.head_init, seed)).train()


def new_head(feature_dim: int, classes: int, kind: str, seed: int) -> nn.Linear:
    """A linear layer: weights N(0, 0.01) and bias 0 (`normal`), or torch's own, both U(-1/sqrt(D), 1/sqrt(D))."""
    layer, generator = skip_init(nn.Linear, feature_dim, classes), torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(feature_dim)
    with torch.no_grad():
        if kind == "normal":
            layer.weight.normal_(0, 0.01, generator=generator)
            layer.bias.zero_()
        else:
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.uniform_(-bound, bound, generator=generator)
    return layer


def normalised(net: nn.Module, groups: int) -> nn.Module:
    """Batch norm over each of `groups` equal parts of a batch, over however many processes.

    Raises:
        InputError: processes that do not make up whole groups.
    """
    processes = world_size()
    if groups == 1:
        return sync_batch_norm(net) if processes > 1 else net
    if groups % processes:
        raise InputError(
            f"bn_groups {groups} are not made up by {processes} processes; take a number of processes that divides "
            f"them, or --set bn_groups={processes}"
        )
    return split_batch_norm(net, groups // processes) if groups > processes else net


def require_trainable(encoder: Encoder) -> None:
    """Raises InputError for an encoder that has nothing to fine-tune."""
    if not any(True for _ in encoder.backbone.parameters()):
        raise InputError(f"{encoder.source} has no weights to fine-tune; its features can be judged by linear or knn")


def steps_per_epoch(images: int, config: FinetuneConfig) -> int:
    """Raises InputError where an epoch has no batch, or a last batch of one image, over which there is no variance."""
    whole, rest = divmod(images, config.batch_size)
    if config.drop_last and not whole:
        raise InputError(
            f"{images} training images make no batch of {config.batch_size}; take --batch-size {images} or smaller"
        )
    alone = rest == 1 and not config.drop_last
    if alone or config.batch_size == config.bn_groups:
        where = "the last batch" if alone else "each batch or its part in batch norm"
        raise InputError(
            f"{where} of {images} training images in batches of {config.batch_size} is a single image, which "
            f"batch norm cannot train on; take another --batch-size{', or --set drop_last=true' * alone}"
        )
    return whole + bool(rest and not config.drop_last)


def differing(before: nn.Module, after: nn.Module) -> list[str]:
    """Names of the parameters and buffers that are not bit for bit alike."""
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() == new.keys()
    return [name for name in old if not torch.equal(old[name].to(new[name].device), new[name])]


def check_moved(before: nn.Module, after: nn.Module) -> None:
    """Raises RunFailed where the backbone's weights or its running statistics are all as they were."""
    moved = set(differing(before, after))
    weights = {name for name, _ in before.named_parameters()}
    statistics = {name for name, _ in before.named_buffers() if name.endswith("running_mean")}
    for kind, names in (("weights", weights), ("running statistics", statistics)):
        if names and not names & moved:
            raise RunFailed(f"none of the backbone's {len(names)} {kind} moved; is optimizer.lr far too small?")
    if still := sorted(weights - moved):
        warn(f"{len(still)} of the backbone's {len(weights)} weights did not move, first {still[0]!r}")


CODE = Code(run_trial, passes, check=check)
