"""The pretraining loop: views in, checkpoints out; interrupted at any step, it goes on from the last checkpoint."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import save_image

from moco_eval import config as configs
from moco_eval import files, knn
from moco_eval.config import KnnMonitor, PretrainConfig, Schedule
from moco_eval.data.images import ImageSet, open_images
from moco_eval.data.loader import Batches, draw_seed, loader
from moco_eval.encoders.build import architecture
from moco_eval.errors import InputError, Interrupted, RunFailed
from moco_eval.results import open_run
from moco_eval.runtime import Stop, all_sum, autocast, broadcast_, is_main, log, parallel, progress, warn, world_size
from pretraining import checkpoint
from pretraining.bn import same_on_all_ranks
from pretraining.moco import MoCo, build_moco, chance_loss
from pretraining.views import TwoViews, preprocessing

# what a paper's table varies; all other differences from the protocol's config are deviations
FREE_KEYS = (
    "arch",
    "queue_size",
    "momentum",
    "symmetric",
    "schedule.epochs",
    "schedule.milestones",
    "bn",
    "bn_groups",
)


@dataclass
class Plan:
    """A run that was checked and can start: everything resolved, nothing written yet."""

    config: PretrainConfig
    images: ImageSet
    data: Path | None
    bn: str
    steps_per_epoch: int
    deviations: list[str]

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.config.schedule.epochs

    @property
    def chance(self) -> float:
        return chance_loss(self.config.queue_size, self.config.symmetric)

    @property
    def queue_full_step(self) -> int:
        pushed = self.config.batch_size * (2 if self.config.symmetric else 1)
        return math.ceil(self.config.queue_size / pushed)

    def describe(self) -> str:
        """What will run, in a few lines."""
        config = self.config
        return "\n".join(
            [
                f"{config.protocol}: {config.arch}, K {config.queue_size}, m {config.momentum}, "
                f"tau {config.temperature}",
                f"data: {self.images.name}, {len(self.images)} images, {config.schedule.epochs} epochs of "
                f"{self.steps_per_epoch} steps, batch {config.batch_size}, lr {config.optimizer.lr:g}",
                f"bn: {self.bn}"
                + (f" in {config.bn_groups} groups" if self.bn == "split" else "")
                + ("" if config.bn_permute and self.bn != "none" else ", keys not permuted"),
                f"chance level of the loss: {self.chance:.4f}; the queue is filled after {self.queue_full_step} steps",
                *(f"differs from {config.protocol}: {words}" for words in self.deviations),
            ]
        )


def plan(config: PretrainConfig, dataset: str, data: Path | None, processes: int) -> Plan:
    """Check that a run can start.

    Raises:
        InputError: data that is not there, fewer images than a batch, a batch that the processes or BN groups
            cannot share equally.
    """
    architecture(config.arch)
    images = open_images(dataset, data, "train")
    bn = config.bn if config.bn != "auto" else ("shuffle" if processes > 1 else "split")
    batch = config.batch_size
    if len(images) < batch:
        raise InputError(
            f"{dataset} has {len(images)} images, less than one batch of {batch}; "
            f"take --batch-size {len(images)} or less"
        )
    if batch % processes:
        raise InputError(f"batch_size {batch} does not divide among {processes} processes")
    if bn == "split" and (batch // processes) % config.bn_groups:
        raise InputError(
            f"a batch of {batch // processes} per process does not divide into {config.bn_groups} BN groups; "
            "change batch_size or --set bn_groups=..."
        )
    if bn == "shuffle" and processes == 1:
        warn("bn: shuffle on one process protects nothing: queries and keys share their statistics; take bn: split")
    differ = configs.differences(config, _canonical(config), FREE_KEYS)
    return Plan(config, images, data, bn, len(images) // batch, differ)


CANONICAL = {
    "pretrain/moco-v1@1": "moco_v1_r50",
    "pretrain/moco-v2@1": "moco_v2_r50",
    "pretrain/cifar10-demo@1": "cifar10",
}


def _canonical(config: PretrainConfig) -> PretrainConfig:
    if config.protocol not in CANONICAL:
        raise InputError(f"unknown protocol {config.protocol!r}.{configs.did_you_mean(config.protocol, CANONICAL)}")
    return configs.load(CANONICAL[config.protocol], "pretrain", PretrainConfig)


def learning_rate(schedule: Schedule, lr: float, epoch: int) -> float:
    """The rate of an epoch, counted from 0. Source: facebookresearch/moco, main_moco.py and the CIFAR-10 demo."""
    if schedule.kind == "step":
        return lr * schedule.gamma ** sum(epoch >= milestone for milestone in schedule.milestones)
    return lr * 0.5 * (1 + math.cos(math.pi * (epoch + schedule.count_from) / schedule.epochs))


def pretrain(run: Plan, output: Path, device: torch.device) -> Path:
    """Train to the end, or go on where an earlier call stopped.

    Returns:
        The last checkpoint.
    Raises:
        InputError: the output folder holds another run.
        RunFailed: the loss is not finite, or too many images cannot be read.
        Interrupted: asked to stop by a signal; the state is saved.
    """
    config = run.config
    open_run(output, _resolved(run))
    torch.manual_seed(config.seed)  # the same weights and queue on every rank
    trainer = Trainer(run, output, build_moco(config, run.bn).to(device), device)
    trainer.restore()
    if is_main():
        _draw_views(run, output / "views.png")
    try:
        trainer.train()
    finally:
        trainer.metrics.close()
    return trainer.checkpoints / "last.pth"


def _resolved(run: Plan) -> dict[str, Any]:
    return {
        "command": "pretrain",
        "dataset": run.images.record(),
        "processes": world_size(),
        "bn": run.bn,
        "config": run.config.model_dump(mode="json"),
    }


def _optimizer(model: MoCo, config: PretrainConfig) -> torch.optim.SGD:
    """SGD on all parameters, batch norm and bias included; encoder_k's have no gradient and stay out of it."""
    settings = config.optimizer
    return torch.optim.SGD(
        model.parameters(), settings.lr, momentum=settings.sgd_momentum, weight_decay=settings.weight_decay
    )


class Trainer:
    """The state of a run between two steps, and the loop over them."""

    def __init__(self, run: Plan, output: Path, model: MoCo, device: torch.device):
        self.run, self.output, self.model, self.device = run, output, model, device
        self.checkpoints = output / "checkpoints"
        self.optimizer = _optimizer(model, run.config)
        self.ddp = parallel(model)
        self.test = _monitor_images(run)
        self.step = 0
        self.window: list[torch.Tensor] = []  # loss, accuracy, spread of each step since the last log line
        self.substituted: set[int] = set()
        self.waited = 0.0

    def restore(self) -> None:
        """From last.pth where there is one; otherwise note the start and keep the untrained network."""
        if (self.checkpoints / "last.pth").is_file():
            position, window = checkpoint.load(self.checkpoints, self.model, self.optimizer)
            self.step, self.window = position["step"], list(window.to(self.device))
            log(f"resuming at step {self.step} of {self.run.steps}")
        broadcast_(self.model.queue)
        self.metrics = Metrics(self.output, self.step)
        if self.step == 0:
            self.metrics.write(
                {
                    "step": 0,
                    "epoch": 0,
                    "chance": self.run.chance,
                    "queue_full_step": self.run.queue_full_step,
                }
            )
            self.save()

    def train(self) -> None:
        """All remaining steps, with a checkpoint and the kNN monitor at the end of each epoch."""
        config, per_epoch = self.run.config, self.run.steps_per_epoch
        started = time.perf_counter()
        with (
            Stop() as stop,
            progress("pretrain", self.run.steps, config.batch_size, done=self.step) as advance,
        ):
            for view_q, view_k in self.batches():
                self.train_step(view_q, view_k)
                advance()
                if self.step % config.log_every == 0 or self.step % per_epoch == 0:
                    line = self.log_step(time.perf_counter() - started)
                    started = time.perf_counter()
                    advance(
                        0,
                        note=f"epoch {line['epoch']:.1f} loss {line['loss']:.3f} (chance {self.run.chance:.2f})",
                    )
                if self.step % per_epoch == 0:
                    self.end_epoch()
                    started = time.perf_counter()
                if stop.requested():
                    self.stop(stop)

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This process's views of each remaining step, on the device; time spent waiting for them is noted."""
        config = self.run.config
        epoch, first_step = divmod(self.step, self.run.steps_per_epoch)
        batches = Batches(
            images=len(self.run.images),
            batch_size=config.batch_size,
            seed=config.seed,
            epochs=range(epoch, config.schedule.epochs),
            shuffle=True,
            drop_last=True,
            first_step=first_step,
        )
        views = TwoViews(self.run.images, config.views, config.seed)
        asked = time.perf_counter()
        for view_q, view_k, index, substitute in loader(views, batches, config.workers, self.device):
            self.waited += time.perf_counter() - asked
            self.count_substitutes(index[substitute >= 0].tolist())
            yield view_q.to(self.device, non_blocking=True), view_k.to(self.device, non_blocking=True)
            asked = time.perf_counter()

    def train_step(self, view_q: torch.Tensor, view_k: torch.Tensor) -> None:
        """Algorithm 1 on one batch."""
        config = self.run.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config.schedule, config.optimizer.lr, self.step // self.run.steps_per_epoch)
        order = torch.Generator().manual_seed(draw_seed(config.seed, self.step, 0) >> 1)
        with autocast(self.device, config.precision):
            done = self.ddp(view_q, view_k, order)
        self.optimizer.zero_grad(set_to_none=True)
        done.loss.backward()
        self.optimizer.step()
        self.model.push(done.keys)
        self.step += 1
        self.window.append(torch.stack([done.loss.detach().float(), done.accuracy, done.feature_std.float()]))

    def log_step(self, seconds: float) -> dict[str, Any]:
        """One line of metrics: the window averaged over its steps and all ranks."""
        values = self.finite_window()
        loss, accuracy, feature_std = values.mean(dim=0).tolist()
        line = {
            "step": self.step,
            "epoch": self.step / self.run.steps_per_epoch,
            "loss": loss,
            "accuracy": 100 * accuracy,
            "feature_std": feature_std,
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": len(values) * self.run.config.batch_size / seconds,
            "data_wait": self.waited / seconds,
        }
        self.metrics.write(line)
        self.window, self.waited = [], 0.0
        return line

    def finite_window(self) -> torch.Tensor:
        """The window over all ranks, (steps, 3). Raises RunFailed where a loss in it is not finite."""
        values = all_sum(torch.stack(self.window)) / world_size()
        broken = (~values[:, 0].isfinite()).nonzero().flatten()
        if len(broken):
            step = self.step - len(values) + int(broken[0]) + 1
            raise RunFailed(
                f"the loss is {values[broken[0], 0].item()} in epoch {(step - 1) // self.run.steps_per_epoch}, "
                f"step {step}; "
                f"the last good checkpoint is {self.checkpoints / 'last.pth'} (step {self.saved}); a smaller "
                "optimizer.lr may help"
            )
        return values

    def end_epoch(self) -> None:
        """The kNN monitor, when its turn has come, and the checkpoint."""
        monitor, epoch = self.run.config.knn, self.step // self.run.steps_per_epoch
        if monitor and self.test and (epoch % monitor.every == 0 or epoch == self.run.config.schedule.epochs):
            for buffer in self.model.encoder_q.buffers():
                broadcast_(buffer)  # rank 0's BN statistics are those that are saved
            top1 = self.knn(monitor, self.test)
            self.metrics.write({"step": self.step, "epoch": epoch, "knn_top1": top1})
            log(f"epoch {epoch}: kNN {top1:.2f} % ({monitor.feature} feature, k {monitor.k})")
        self.save()

    def knn(self, monitor: KnnMonitor, test: ImageSet) -> float:
        """Top-1 of the query encoder, with or without its head."""
        encoder, head = self.model.encoder_q, self.model.encoder_q.fc
        if monitor.feature == "pooled":
            encoder.fc = torch.nn.Identity()
        expects = preprocessing(self.run.config.views)
        try:
            return knn.monitor(
                encoder,
                self.run.images,
                test,
                expects,
                self.device,
                k=monitor.k,
                temperature=monitor.temperature,
                workers=self.run.config.workers,
            )
        finally:
            encoder.fc = head

    def save(self) -> None:
        """Rank 0's state, once all ranks are shown to hold the same queue."""
        assert same_on_all_ranks(self.model.queue, self.model.queue_ptr), "the ranks' queues differ"
        self.saved = self.step
        if is_main():
            epoch, step_in_epoch = divmod(self.step, self.run.steps_per_epoch)
            position = {"step": self.step, "epoch": epoch, "step_in_epoch": step_in_epoch}
            checkpoint.save(self.checkpoints, self.model, self.optimizer, position, self.window, self.about())
            checkpoint.prune(self.checkpoints, self.run.config.checkpoints)

    def about(self) -> dict[str, Any]:
        """What travels with the weights."""
        config = self.run.config.model_dump(mode="json")
        return {
            "arch": self.run.config.arch,
            "config": config,
            "preprocessing": json.loads(json.dumps(asdict(preprocessing(self.run.config.views)))),
            "pretraining": {
                "protocol": self.run.config.protocol,
                "dataset": self.run.images.record(),
                "bn": self.run.bn,
                "processes": world_size(),
                "deviations": self.run.deviations,
                "config": config,
            },
        }

    def stop(self, stop: Stop) -> None:
        """Save where we are and end."""
        if self.window:
            self.finite_window()
        if self.step != self.saved:
            self.save()
        raise Interrupted(
            f"stopped by {stop.name()}; saved at step {self.step} of {self.run.steps}: run the same command to go on"
        )

    def count_substitutes(self, bad: list[int]) -> None:
        """Name each unreadable image once. Raises RunFailed above the limit."""
        for index in set(bad) - self.substituted:
            warn(f"unreadable image, another takes its place: {self.run.images.files[index]}")
        self.substituted |= set(bad)
        limit = self.run.config.bad_images
        if len(self.substituted) > limit:
            raise RunFailed(f"more than {limit} images cannot be read (the limit is bad_images); mend the data")


def _monitor_images(run: Plan) -> ImageSet | None:
    """The test images of the kNN monitor, where it is wanted and there are labels."""
    if run.config.knn is None or run.images.labels is None:
        return None
    try:
        return open_images(run.images.name, run.data, "test")
    except InputError as error:
        log(f"no kNN monitor: {error}")
        return None


class Metrics:
    """metrics.jsonl and TensorBoard, written by the first process; lines after `step` are cut off on resume."""

    def __init__(self, output: Path, step: int):
        self.path = output / "metrics.jsonl"
        if is_main():
            files.write_text(self.path, "".join(f"{json.dumps(line)}\n" for line in self._until(step)))
            self.board = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)

    def _until(self, step: int) -> Iterator[dict[str, Any]]:
        if step == 0 or not self.path.is_file():
            return
        for text in self.path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                return  # the line that was being written when the run was killed
            if line["step"] <= step:
                yield line

    def write(self, line: dict[str, Any]) -> None:
        if not is_main():
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for name in line.keys() - {"step", "epoch"}:
            self.board.add_scalar(name, line[name], line["step"])

    def close(self) -> None:
        if is_main():
            self.board.close()


def _draw_views(run: Plan, path: Path, pairs: int = 8) -> None:
    """A picture of what the network sees: view_q above view_k, one image a column."""
    views = TwoViews(run.images, run.config.views, run.config.seed)
    chosen = [views[0, index][:2] for index in range(0, len(views), max(1, len(views) // pairs))][:pairs]
    expects = preprocessing(run.config.views)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (expects.mean, expects.std))
    rows = torch.stack([pair[0] for pair in chosen] + [pair[1] for pair in chosen]) * std + mean
    with files.atomic(path) as temporary:
        save_image(rows.clamp(0, 1), temporary, nrow=len(chosen), padding=2, pad_value=1.0)
