"""Linear classification on frozen features: one classifier, trained on crops as main_lincls.py of MoCo v1 and v3 does.

Everything but one linear layer is frozen, batch norm included: the network stays in evaluation mode while the
classifier trains, and afterwards every tensor of the backbone is compared bit for bit. The last epoch is reported; the
best on the test images stands beside it under that name.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import skip_init

from moco_eval.classification.task import Code, Outcome, Passes, Task
from moco_eval.classification.training_loop import Loop
from moco_eval.config.base import Schedule, Sgd
from moco_eval.config.classification import LinearConfig, SweepConfig
from moco_eval.config.learning_rate import learning_rate
from moco_eval.errors import RunFailed
from moco_eval.features.cache import Features
from moco_eval.features.stages import network, placed
from moco_eval.results.metrics import accuracy
from moco_eval.runtime.collectives import parallel
from moco_eval.runtime.device import autocast
from moco_eval.runtime.rank import world_size


def recipe_for(name: str, task: Task) -> str:
    """The shipped config of a protocol for an encoder: MoCo v3 has a learning rate of its own for ViTs."""
    return "mocov3_vit" if name.removeprefix("linear/") == "mocov3" and task.encoder.arch.startswith("vit") else name


def passes(config: LinearConfig | SweepConfig, train: int, test: int) -> Passes:
    """Crops of every epoch, and the test images."""
    return Passes(forward=train * config.schedule.epochs + test)


def run_trial(task: Task, config: LinearConfig, seed: int, state: Path | None, device: torch.device) -> Outcome:
    """Train one classifier, prove that it alone moved, and score the test images."""
    test, others = task.features(task.test, config, device), task.further_features(config, device)
    backbone = freeze(placed(network(task.encoder, task.feature), task.encoder, device))
    images = task.training_images(seed)
    classifier = Classifier(test.shape[1], len(task.train.classes), config.optimizer, config.schedule, seed, device)
    probe = OnCrops(classifier, backbone, test, torch.as_tensor(task.test.labels), config.precision, device)
    before, start = snapshot(backbone), snapshot(classifier.layer)
    loop = Loop(probe, images, config, task.preprocessing, seed, state, device)
    earlier = loop.run("linear")
    check_frozen(before, backbone)
    check_moved(start, classifier.layer)
    count = len(images) * config.schedule.epochs + len(task.test)
    further = {split: classifier.scores(features) for split, features in others.items()}
    return Outcome(classifier.scores(test), count, probe.notes(), earlier, further=further)


class Classifier:
    """A linear layer and its SGD, the loss averaged over all processes, or of one that works `alone`."""

    def __init__(
        self,
        feature_dim: int,
        classes: int,
        optimizer: Sgd,
        schedule: Schedule,
        seed: int,
        device: torch.device,
        alone: bool = False,
    ):
        self.layer = new_classifier(feature_dim, classes, seed).to(device)
        self.ddp, self.ranks = (self.layer, 1) if alone else (parallel(self.layer), world_size())
        self.lr, self.schedule, self.device = optimizer.lr, schedule, device
        self.optimizer = torch.optim.SGD(
            self.layer.parameters(),
            optimizer.lr,
            momentum=optimizer.sgd_momentum,
            weight_decay=optimizer.weight_decay,
        )

    def step(self, features: torch.Tensor, labels: torch.Tensor, epoch: int, batch: int) -> torch.Tensor:
        """One SGD step on this process's share of a batch of `batch` images; returns its part of the mean loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.schedule, self.lr, epoch)
        # the mean over the whole batch, also where the ranks' shares differ: DDP divides by their number
        loss = cross_entropy(self.ddp(features.float()), labels, reduction="sum") * self.ranks / batch
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def scores(self, features: Features) -> torch.Tensor:
        """Class scores, (images, classes), on the CPU; a block of images at a time."""
        blocks = (features[at : at + 8192] for at in range(0, len(features), 8192))
        return torch.cat([self.layer(block.to(self.device)).cpu() for block in blocks])


class OnCrops:
    """A classifier that learns from crops through the frozen network; a `training_loop.Learner`."""

    def __init__(
        self,
        classifier: Classifier,
        backbone: nn.Module,
        test: Features,
        test_labels: torch.Tensor,
        precision: str,
        device: torch.device,
    ):
        self.classifier, self.backbone, self.precision, self.device = classifier, backbone, precision, device
        self.test, self.test_labels = test, test_labels
        self.best: dict[str, float] = {"top1": -1.0, "epoch": 0}

    def train_step(self, views: torch.Tensor, labels: torch.Tensor, epoch: int, batch: int) -> torch.Tensor:
        """See `training_loop.Learner`."""
        with torch.no_grad(), autocast(self.device, self.precision):
            features = self.backbone(views).flatten(1)
        return self.classifier.step(features, labels, epoch, batch)

    def end_epoch(self, epoch: int) -> None:
        """Note the accuracy on the test images, as the official script does after each epoch."""
        top1 = accuracy(self.classifier.scores(self.test), self.test_labels)
        if top1 > self.best["top1"]:
            self.best = {"top1": top1, "epoch": epoch + 1}

    def notes(self) -> dict[str, Any]:
        """For the record."""
        return {"best_on_test": self.best}

    def state_dict(self) -> dict[str, Any]:
        """For resuming."""
        layer, optimizer = self.classifier.layer.state_dict(), self.classifier.optimizer.state_dict()
        return {"classifier": layer, "optimizer": optimizer, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self.classifier.layer.load_state_dict(state["classifier"])
        self.classifier.optimizer.load_state_dict(state["optimizer"])
        self.best = dict(state["best"])


def freeze(net: nn.Module) -> nn.Module:
    """No gradients, and evaluation mode: batch norm uses its running statistics and leaves them alone."""
    return net.requires_grad_(False).eval()


def new_classifier(feature_dim: int, classes: int, seed: int) -> nn.Linear:
    """A linear layer with weights from N(0, 0.01) and bias 0. Source: main_lincls.py."""
    layer = skip_init(nn.Linear, feature_dim, classes)  # draws nothing from the process's own generator
    with torch.no_grad():
        layer.weight.normal_(0, 0.01, generator=torch.Generator().manual_seed(seed))
        layer.bias.zero_()
    return layer


def snapshot(net: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter and buffer."""
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def check_frozen(before: dict[str, torch.Tensor], net: nn.Module) -> None:
    """Raises RunFailed where any tensor of the backbone, batch-norm statistics included, changed by a bit."""
    after = net.state_dict()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    if moved or before.keys() != after.keys():
        raise RunFailed(f"the frozen backbone changed: {len(moved)} of {len(before)} tensors, first {moved[:1]}")


def check_moved(before: dict[str, torch.Tensor], classifier: nn.Module) -> None:
    """Raises RunFailed where the classifier is as it started: nothing was learned."""
    if all(torch.equal(before[name], tensor) for name, tensor in classifier.state_dict().items()):
        raise RunFailed("the classifier did not move in training; is optimizer.lr far too small?")


CODE = Code(run_trial, passes, shipped=recipe_for)
