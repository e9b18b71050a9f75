"""Linear classification on frozen features, as facebookresearch/moco's main_lincls.py does it.

Everything but one linear layer is frozen, batch norm included: the network stays in evaluation mode while the
classifier trains, and afterwards every tensor of the backbone is compared bit for bit. The last epoch is reported.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from moco_eval import config as configs
from moco_eval import files
from moco_eval.config import LinearConfig
from moco_eval.data.images import ImageSet, departures, preprocessing_departures, preprocessing_for
from moco_eval.data.loader import Batches, Examples, crop_transform, loader
from moco_eval.encoders.encoder import Encoder
from moco_eval.errors import RunFailed
from moco_eval.features import extract, network
from moco_eval.knn import accuracy
from moco_eval.results import Cost, Result, deviations, finished, open_run
from moco_eval.runtime import (
    Stop,
    all_sum,
    autocast,
    barrier,
    is_main,
    log,
    parallel,
    progress,
    require_finite,
    warn,
    world_size,
)
from moco_eval.schedule import learning_rate
from moco_eval.statistics import bootstrap_interval


@dataclass(frozen=True)
class Task:
    """What one linear evaluation is about; `labels_per_class` draws a new subset for each trial."""

    encoder: Encoder
    train: ImageSet
    test: ImageSet
    config: LinearConfig
    feature: str = "pooled"
    labels_per_class: int | None = None
    trials: int = 1


def evaluate(task: Task, output: Path, device: torch.device) -> dict[str, Any]:
    """Run all trials into a run directory; finished trials are not repeated.

    Returns:
        The result record.
    Raises:
        InputError: the output holds another run, or an image cannot be read.
        RunFailed: the loss is not finite, or something but the classifier moved.
        Interrupted: stopped by a signal; run again to go on.
    """
    network(task.encoder, task.feature)  # an encoder without that feature is refused before anything is written
    if open_run(output, _resolved(task)) and (record := finished(output)):
        log(f"already done: {output}")
        return record
    cost, preprocessing = Cost(str(device)), preprocessing_for(task.train.name, task.encoder.preprocessing)
    trials = [_trial(task, index, output, device, cost) for index in range(task.trials)]
    labels = torch.as_tensor(task.test.labels)
    scores = [torch.from_numpy(trial["scores"]) for trial in trials]
    if is_main():
        with files.atomic(output / "predictions.npz") as path:
            np.savez(path, prediction=[s.argmax(1) for s in scores], label=labels, scores=scores[0])
    few = {"labels_per_class": task.labels_per_class} if task.labels_per_class else {}
    canonical = configs.load("moco-lincls", "linear", LinearConfig)
    result = Result(
        protocol=task.config.protocol,
        dataset=task.test.record() | few,
        encoder=task.encoder,
        trials=[{"seed": trial["seed"], "metrics": trial["metrics"]} for trial in trials],
        over="head",
        selection="last-epoch",
        cost=cost,
        interval={"top1": bootstrap_interval(np.stack([(one.argmax(1) == labels).numpy() for one in scores]))},
        extra={"preprocessing": preprocessing.to_dict()},
        deviations=deviations(task.config, canonical)
        + departures(task.train, task.test)
        + preprocessing_departures(task.train.name, preprocessing)
        + ([f"{task.labels_per_class} labels per class"] if task.labels_per_class else [])
        + ([f"{task.feature} feature instead of pooled"] if task.feature != "pooled" else []),
    )
    return result.write(output)


def _resolved(task: Task) -> dict[str, Any]:
    return {
        "command": "linear",
        "dataset": {"train": task.train.record(), "test": task.test.record()},
        "encoder": task.encoder.identity() | {"feature": task.feature},
        "labels_per_class": task.labels_per_class,
        "trials": task.trials,
        "config": task.config.model_dump(mode="json"),
    }


def _trial(task: Task, index: int, output: Path, device: torch.device, cost: Cost) -> dict[str, Any]:
    """One classifier with its own seed: trained, proven, tested; kept in trial_N.npz."""
    seed, done = task.config.seed + index, output / f"trial_{index}.npz"
    if not done.is_file():
        images = task.train.few_labels(task.labels_per_class, seed) if task.labels_per_class else task.train
        training = Training(task, images, seed, output / f"trial_{index}.pth", device)
        scores = training.run().numpy()
        seconds = training.earlier + time.perf_counter() - training.began
        count = len(images) * task.config.schedule.epochs + len(task.test)
        if is_main():
            with files.atomic(done) as path:
                np.savez(path, scores=scores, seconds=seconds, images=count)
            training.state.unlink(missing_ok=True)
        barrier()
    with np.load(done, allow_pickle=False) as kept:
        scores = kept["scores"]
        cost.seconds += float(kept["seconds"])
        cost.images += int(kept["images"])
    labels = torch.as_tensor(task.test.labels)
    tops = {"top1": 1} | ({"top5": 5} if len(task.test.classes) > 5 else {})
    metrics = {name: accuracy(torch.from_numpy(scores), labels, top) for name, top in tops.items()}
    return {"seed": seed, "metrics": metrics, "scores": scores}


class Training:
    """One classifier on one frozen network.

    Args:
        images: the training images of this trial.
        seed: of the classifier's initial weights and of order and crops.
        state: where its state is kept after each epoch, for resuming.
    """

    def __init__(self, task: Task, images: ImageSet, seed: int, state: Path, device: torch.device):
        self.task, self.images, self.seed, self.state, self.device = task, images, seed, state, device
        self.config = task.config
        self.preprocessing = preprocessing_for(task.train.name, task.encoder.preprocessing)
        self.backbone = freeze(network(task.encoder, task.feature).to(device))
        self.before = snapshot(self.backbone)
        self.classifier = new_classifier(self._feature_dim(), len(task.train.classes), seed).to(device)
        self.start = snapshot(self.classifier)
        self.losses: list[torch.Tensor] = []
        self.began, self.earlier = time.perf_counter(), 0.0
        self.ddp = parallel(self.classifier)
        settings = self.config.optimizer
        self.optimizer = torch.optim.SGD(
            self.classifier.parameters(),
            settings.lr,
            momentum=settings.sgd_momentum,
            weight_decay=settings.weight_decay,
        )

    def _feature_dim(self) -> int:
        with torch.no_grad():
            probe = torch.zeros(1, 3, self.preprocessing.size, self.preprocessing.size, device=self.device)
            return self.backbone(probe).flatten(1).shape[1]

    def run(self) -> torch.Tensor:
        """Train, check that only the classifier moved, and score the test images: (images, classes)."""
        epochs, done = self.config.schedule.epochs, self._restore()
        batches = Batches(
            len(self.images), self.config.batch_size, self.seed, range(epochs), shuffle=True, drop_last=False
        )
        first_epoch, first_step = divmod(done, batches.steps_per_epoch)
        batches = replace(batches, epochs=range(first_epoch, epochs), first_step=first_step)
        augmentation = self.config.augmentation
        crops = crop_transform(self.preprocessing, augmentation.crop_scale, augmentation.flip)
        examples = Examples(self.images, crops, self.seed)
        total = epochs * batches.steps_per_epoch
        with Stop() as stop, progress("linear", total, self.config.batch_size, done) as advance:
            for views, labels, _ in loader(examples, batches, self.config.workers, self.device):
                epoch, step = divmod(done, batches.steps_per_epoch)
                mine = batches.mine(step)
                self.train_step(views[:mine].to(self.device), labels[:mine].to(self.device), epoch, batches.size(step))
                done += 1
                advance()
                self.after_step(done, total, batches.steps_per_epoch, stop)
        check_frozen(self.before, self.backbone)
        check_moved(self.start, self.classifier)
        return self.score()

    def train_step(self, views: torch.Tensor, labels: torch.Tensor, epoch: int, batch: int) -> None:
        """One SGD step of the classifier on this process's share of a batch of `batch` images."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.schedule, self.config.optimizer.lr, epoch)
        with torch.no_grad(), autocast(self.device, self.config.precision):
            features = self.backbone(views).flatten(1)
        # the mean over the whole batch, also where the ranks' shares differ: DDP divides by their number
        loss = cross_entropy(self.ddp(features.float()), labels, reduction="sum") * world_size() / batch
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.detach())

    def after_step(self, done: int, total: int, per_epoch: int, stop: Stop) -> None:
        """At the end of each epoch check the loss and keep the state; stop where asked to."""
        epoch_ends = done % per_epoch == 0
        asked = (world_size() == 1 or done % 50 == 0 or epoch_ends) and done < total and stop.requested()
        if not epoch_ends and not asked:
            return
        loss = all_sum(torch.stack(self.losses).mean()).item() / world_size()
        self.losses = []
        require_finite(loss, f"epoch {(done - 1) // per_epoch}", "a smaller --set optimizer.lr may help")
        self._save(done)
        if asked:
            stop.check(f"step {done} of {total} is saved: run the same command to go on")

    @torch.no_grad()
    def score(self) -> torch.Tensor:
        """Class scores of the clean test images, on the CPU."""
        features = extract(
            self.backbone,
            self.task.test,
            self.preprocessing,
            self.device,
            batch_size=self.config.batch_size,
            workers=self.config.workers,
            precision=self.config.precision,
            title="test",
        )
        return self.classifier.cpu()(features)

    def _save(self, done: int) -> None:
        if is_main():
            state = {"step": done, "classifier": self.classifier.state_dict(), "optimizer": self.optimizer.state_dict()}
            with files.atomic(self.state) as path:
                torch.save(state | {"seconds": self.earlier + time.perf_counter() - self.began}, path)

    def _restore(self) -> int:
        if not self.state.is_file():
            return 0
        try:
            state = torch.load(self.state, map_location=self.device, weights_only=True)
            self.classifier.load_state_dict(state["classifier"])
            self.optimizer.load_state_dict(state["optimizer"])
        except Exception as error:  # whatever a damaged file makes torch raise
            warn(f"{self.state} cannot be resumed from ({str(error).splitlines()[0]}); this trial starts again")
            return 0
        self.earlier = float(state["seconds"])
        return int(state["step"])


def freeze(net: nn.Module) -> nn.Module:
    """No gradients, and evaluation mode: batch norm uses its running statistics and leaves them alone."""
    return net.requires_grad_(False).eval()


def new_classifier(feature_dim: int, classes: int, seed: int) -> nn.Linear:
    """A linear layer with weights from N(0, 0.01) and bias 0. Source: main_lincls.py."""
    layer = nn.Linear(feature_dim, classes)
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
