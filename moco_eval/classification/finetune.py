"""Fine-tuning end to end: the backbone and a new linear layer trained together, batch norm included.

Each trial trains a copy that starts as the encoder's own weights, bit for bit; the encoder itself stays as it is. The
last epoch is reported; the best on the test images stands beside it under that name. What the recipes of ViTs do to the
copy and its parameters is in `transformer_tuning`.
Source: OpenSelfSup@1db69ec, lightly@e8d317f, deit@7e160fe, mae@efb2a80, ibot@da316d8; see docs/protocols/finetune.md.
"""

import copy
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import skip_init

from moco_eval.classification.task import Code, Outcome, Passes, Task
from moco_eval.classification.training_loop import Loop
from moco_eval.classification.transformer_tuning import adamw, adapted, require_adaptable
from moco_eval.config.classification import FinetuneConfig
from moco_eval.config.learning_rate import rate_of_step
from moco_eval.data.image_set import ImageSet
from moco_eval.data.loader import Batches, draw_seed
from moco_eval.data.training_cut import training_cut
from moco_eval.encoders.encoder import Encoder
from moco_eval.errors import InputError, RunFailed
from moco_eval.features.extract import extract
from moco_eval.results.metrics import accuracy
from moco_eval.runtime.batch_norm import split_batch_norm, sync_batch_norm
from moco_eval.runtime.collectives import broadcast_, parallel
from moco_eval.runtime.console import warn
from moco_eval.runtime.device import autocast, convolutions, place, seeded_generators, seeded_host
from moco_eval.runtime.rank import rank, world_size

# standard deviations of a new layer's weights
HEADS = {"normal": 0.01, "deit": 0.02, "near_zero": 2e-5}
# the shipped configs of a protocol that has others for some data sets
BY_DATA = {"mocov3-transfer": {"cifar100": "-cifar100", "flowers102": "-flowers", "pets": "-pets"}}


def recipe_for(name: str, task: Task) -> str:
    """The shipped config of a protocol for a data set: MoCo v3's transfer has settings of its own for three of four."""
    plain = name.removeprefix("finetune/")
    return plain + BY_DATA.get(plain, {}).get(task.train.name, "")


def prepare(task: Task, config: FinetuneConfig) -> Task:
    """The task with the protocol's own interpolation of test images, where it has one."""
    return replace(task, interpolation=config.test_interpolation)


def check(task: Task, config: FinetuneConfig) -> None:
    """Raises InputError where there is nothing to train, too little to train it on, or no transformer to adapt."""
    require_trainable(task.encoder)
    require_adaptable(task.encoder, config)
    epoch_batches(len(task.training_images(config.seed)), config, config.seed)
    training_cut(task.preprocessing, config.augmentation)


def passes(config: FinetuneConfig, train: int, test: int) -> Passes:
    """Crops of every epoch, forward and backward, and the test images as often as they are looked at."""
    epochs = config.schedule.epochs
    return Passes(trained=train * epochs, forward=test * max(1, epochs // config.test_every))


def run_trial(task: Task, config: FinetuneConfig, seed: int, state: Path | None, device: torch.device) -> Outcome:
    """Fine-tune one copy of the encoder, check that it moved, and score the test images."""
    images = task.training_images(seed)
    batches, cut = epoch_batches(len(images), config, seed), training_cut(task.preprocessing, config.augmentation)
    learner = EndToEnd(task, config, batches.steps_per_epoch, seed, device)
    loop = Loop(learner, images, config, task.preprocessing, seed, state, device, batches, cut)
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
    """A copy of the encoder with a new linear layer, and the optimizer of both; a `training_loop.Learner`.

    Attributes:
        done: steps taken, over all epochs.
        tested: top-1 on the test images after some epochs, {"epoch", "top1"}.
        multiples: of the learning rate, by parameter group.
    """

    def __init__(self, task: Task, config: FinetuneConfig, per_epoch: int, seed: int, device: torch.device):
        self.task, self.config, self.per_epoch, self.device, self.seed = task, config, per_epoch, device, seed
        if config.mixup:
            require_whole_groups("mixup.groups", config.mixup.groups)
        self.net = place(new_classifier(task.encoder, len(task.train.classes), config, seed), device)
        self.ddp = parallel(self.net)
        self.optimizer, self.multiples = new_optimizer(self.net, config)
        self.done = 0
        self.tested: list[dict[str, float]] = []

    def train_step(self, views: torch.Tensor, labels: torch.Tensor, _epoch: int, batch: int) -> torch.Tensor:
        """See `training_loop.Learner`."""
        rate = rate_of_step(self.config.schedule, self.config.optimizer.lr, self.done, self.per_epoch)
        for group, multiple in zip(self.optimizer.param_groups, self.multiples, strict=True):
            group["lr"] = rate * multiple
        smoothing = self.config.smoothing
        if self.config.mixup:
            views, labels = self.mixed(views, labels)
            smoothing = 0.0  # it is in the mixed labels
        with autocast(self.device, self.config.precision), self._draws_of_paths():
            scores = self.ddp(views)
        # the mean over the whole batch, also where the ranks' shares differ: DDP divides by their number
        loss = cross_entropy(scores.float(), labels, reduction="sum", label_smoothing=smoothing)
        loss = loss * world_size() / batch
        self.optimizer.zero_grad(set_to_none=True)
        with convolutions(self.device, self.config.precision):
            loss.backward()
        self.optimizer.step()
        self.done += 1
        return loss.detach()

    def mixed(self, views: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pairs of this process's images mixed, each group of the batch with a draw of its own.

        Args:
            views: (n, C, H, W), which are mixed in place.
            labels: (n,).
        Returns:
            The views, and their labels' shares, (n, classes), each row of sum 1.
        """
        assert self.config.mixup
        mine = self.config.mixup.groups // world_size()
        parts = zip(views.chunk(mine), labels.chunk(mine), strict=True)
        shares = []
        for group, (images, classes) in enumerate(parts, start=rank() * mine):
            with seeded_host(draw_seed(self.seed, self.done, group)):
                shares.append(self.mixing(images, classes)[1])
        return views, torch.cat(shares)

    @cached_property
    def mixing(self) -> Any:
        """timm's mixup and cutmix, whose labels are smoothed."""
        from timm.data import Mixup

        settings = self.config.mixup
        assert settings
        classes = len(self.task.train.classes)
        return Mixup(settings.alpha, settings.cutmix, label_smoothing=self.config.smoothing, num_classes=classes)

    def _draws_of_paths(self) -> Any:
        """The draws of drop-path follow from the seed, the step and the process, so that a resumed run repeats them."""
        if not self.config.drop_path:
            return nullcontext()
        return seeded_generators(draw_seed(self.seed, self.done, rank()), self.device)

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
    head = new_head(encoder.feature_dim, classes, config.head_init, seed)
    return Classifier(adapted(backbone, config), head).train()


def new_optimizer(net: Classifier, config: FinetuneConfig) -> tuple[torch.optim.Optimizer, list[float]]:
    """SGD or AdamW of backbone and head, and the multiple of the learning rate of each of its parameter groups."""
    settings = config.optimizer
    if settings.kind == "adamw":
        return adamw(net, settings)
    sgd = torch.optim.SGD(
        [{"params": part.parameters()} for part in (net.backbone, net.head)],
        settings.lr,
        momentum=settings.sgd_momentum,
        weight_decay=settings.weight_decay,
    )
    return sgd, [1, config.head_lr]


def new_head(feature_dim: int, classes: int, kind: str, seed: int) -> nn.Linear:
    """A linear layer: normal weights (see HEADS) and bias 0, or torch's own, both U(-1/sqrt(D), 1/sqrt(D))."""
    layer, generator = skip_init(nn.Linear, feature_dim, classes), torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(feature_dim)
    with torch.no_grad():
        if kind in HEADS:
            layer.weight.normal_(0, HEADS[kind], generator=generator)
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
    require_whole_groups("bn_groups", groups)
    return split_batch_norm(net, groups // processes) if groups > processes else net


def require_whole_groups(key: str, groups: int) -> None:
    """Raises InputError for processes that do not make up whole groups of a batch."""
    if groups % (processes := world_size()):
        fewer = next(n for n in range(processes, 0, -1) if groups % n == 0)
        raise InputError(
            f"{key} {groups} cannot be divided among {processes} processes; take a number of processes that "
            f"divides it, such as {fewer}"
        )


def require_trainable(encoder: Encoder) -> None:
    """Raises InputError for an encoder that has nothing to fine-tune."""
    if not any(True for _ in encoder.backbone.parameters()):
        raise InputError(f"{encoder.source} has no weights to fine-tune; its features can be judged by linear or knn")


def epoch_batches(images: int, config: FinetuneConfig, seed: int) -> Batches:
    """The batches of all epochs.

    Raises:
        InputError: an epoch has no batch, or a last batch of one image, over which there is no variance.
    """
    epochs, groups = range(config.schedule.epochs), config.mixup.groups if config.mixup else 1
    batches = Batches(images, config.batch_size, seed, epochs, shuffle=True, drop_last=config.drop_last)
    batches = replace(batches, repeats=config.repeated_augmentation, groups=groups)
    whole, rest = divmod(batches.shown, config.batch_size)
    if config.drop_last and not whole:
        raise InputError(
            f"{images} training images do not fill one batch of {config.batch_size}; take --batch-size "
            f"{batches.shown} or smaller"
        )
    alone = rest == 1 and not config.drop_last
    if alone or config.batch_size == config.bn_groups:
        where = "the last batch" if alone else "each batch or its part in batch norm"
        raise InputError(
            f"{where} of {images} training images in batches of {config.batch_size} is a single image, which "
            f"batch norm cannot train on; take another --batch-size{', or --set drop_last=true' * alone}"
        )
    return batches


def differing(before: nn.Module, after: nn.Module) -> list[str]:
    """Names of the parameters and buffers that both have and that are not bit for bit alike."""
    old, new = before.state_dict(), after.state_dict()
    shared = [name for name in old if name in new]
    return [name for name in shared if not torch.equal(old[name].to(new[name].device), new[name])]


def check_moved(before: nn.Module, after: nn.Module) -> None:
    """Raises RunFailed where the backbone's weights or its running statistics are all as they were."""
    moved, there = set(differing(before, after)), after.state_dict().keys()
    weights = {name for name, _ in before.named_parameters()} & there
    statistics = {name for name, _ in before.named_buffers() if name.endswith("running_mean")}
    for kind, names in (("weights", weights), ("running statistics", statistics)):
        if names and not names & moved:
            raise RunFailed(f"none of the backbone's {len(names)} {kind} moved; is optimizer.lr far too small?")
    if still := sorted(weights - moved):
        warn(f"{len(still)} of the backbone's {len(weights)} weights did not move, first {still[0]!r}")


CODE = Code(run_trial, passes, prepare, check, shipped=recipe_for)
