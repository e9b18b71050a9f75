"""Linear classification on frozen features, as facebookresearch/moco's main_lincls.py does it.

Everything but one linear layer is frozen, batch norm included: the network stays in evaluation mode while the
classifier trains, and afterwards every tensor of the backbone is compared bit for bit. The last epoch is reported.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from moco_eval import config as configs
from moco_eval import files
from moco_eval.config import LinearConfig
from moco_eval.data.images import ImageSet, preprocessing_for
from moco_eval.data.loader import Batches, Examples, crop_transform, loader
from moco_eval.encoders.encoder import Encoder
from moco_eval.errors import InputError, RunFailed
from moco_eval.features import extract, network
from moco_eval.knn import accuracy, precision_deviation
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
        InputError: the output holds another run, classes differ between the splits, an image cannot be read.
        RunFailed: the loss is not finite, or something but the classifier moved.
        Interrupted: stopped by a signal; run again to go on.
    """
    if task.train.classes != task.test.classes:
        raise InputError(f"train and test splits of {task.train.name} have different classes")
    if open_run(output, _resolved(task)) and (record := finished(output)):
        log(f"already done: {output}")
        return record
    cost = Cost(str(device))
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
        interval={"top1": bootstrap_interval((scores[0].argmax(1) == labels).numpy())},
        deviations=deviations(task.config, canonical)
        + precision_deviation(task.config.precision)
        + ([f"{task.labels_per_class} labels per class"] if task.labels_per_class else [])
        + ([f"{task.feature} feature instead of pooled"] if task.feature != "pooled" else []),
    )
    return result.write(output)


def _resolved(task: Task) -> dict[str, Any]:
    return {
        "command": "linear",
        "dataset": {"train": task.train.record(), "test": task.test.record()},
        "encoder": {"sha256": task.encoder.sha256, "arch": task.encoder.arch, "feature": task.feature},
        "labels_per_class": task.labels_per_class,
        "trials": task.trials,
        "config": task.config.model_dump(mode="json"),
    }


def _trial(task: Task, index: int, output: Path, device: torch.device, cost: Cost) -> dict[str, Any]:
    """One classifier with its own seed: trained, proven, tested; kept in trial_N.npz."""
    seed, done = task.config.seed + index, output / f"trial_{index}.npz"
    if done.is_file():
        with np.load(done, allow_pickle=False) as kept:
            scores = kept["scores"]
    else:
        images = task.train.few_labels(task.labels_per_class, seed) if task.labels_per_class else task.train
        with cost.clock():
            training = Training(task, images, seed, output / f"trial_{index}.pth", device)
            scores = training.run().numpy()
        cost.images += len(images) * task.config.schedule.epochs + len(task.test)
        if is_main():
            with files.atomic(done) as path:
                np.savez(path, scores=scores)
            training.state.unlink(missing_ok=True)
        barrier()
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
        epochs, first = self.config.schedule.epochs, self._restore()
        augmentation = self.config.augmentation
        crops = crop_transform(self.preprocessing, augmentation.crop_scale, augmentation.flip)
        batches = Batches(
            images=len(self.images),
            batch_size=self.config.batch_size,
            seed=self.seed,
            epochs=range(first, epochs),
            shuffle=True,
            drop_last=False,
        )
        examples = Examples(self.images, crops, self.seed)
        with Stop() as stop, progress("linear", len(batches), self.config.batch_size) as advance:
            for step, (views, labels, _) in enumerate(loader(examples, batches, self.config.workers, self.device)):
                past, within = divmod(step, batches.steps_per_epoch)
                self.train_step(views.to(self.device), labels.to(self.device), first + past, batches.size(within))
                advance()
                if within + 1 == batches.steps_per_epoch:
                    self.end_epoch(first + past + 1, stop)
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

    def end_epoch(self, done: int, stop: Stop) -> None:
        """Check the loss, keep the state, and stop here if asked to."""
        epochs, loss = (
            self.config.schedule.epochs,
            all_sum(torch.stack(self.losses).mean()).item() / world_size(),
        )
        self.losses = []
        require_finite(loss, f"epoch {done - 1}", "a smaller --set optimizer.lr may help")
        self._save(done)
        if done < epochs:
            stop.check(f"epoch {done} of {epochs} is saved: run the same command to go on")

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

    def _save(self, epochs_done: int) -> None:
        if is_main():
            with files.atomic(self.state) as path:
                state = {"epoch": epochs_done, "classifier": self.classifier.state_dict()}
                torch.save(state | {"optimizer": self.optimizer.state_dict()}, path)

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
        return int(state["epoch"])


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
