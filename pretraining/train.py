"""The pretraining loop: views in, checkpoints out; interrupted at any step, it goes on from the last checkpoint."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moco_eval.config import PretrainConfig
from moco_eval.data.loader import Batches, draw_seed, loader
from moco_eval.errors import Interrupted, RunFailed
from moco_eval.results import open_run
from moco_eval.runtime import (
    Stop,
    all_sum,
    autocast,
    barrier,
    broadcast_,
    is_main,
    log,
    parallel,
    progress,
    tell,
    world_size,
)
from moco_eval.schedule import learning_rate
from pretraining import checkpoint
from pretraining.bn import same_on_all_ranks
from pretraining.moco import MoCo, build_moco
from pretraining.monitor import Monitor
from pretraining.plan import Plan
from pretraining.record import Metrics, draw_views
from pretraining.views import TwoViews


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
        draw_views(run, output / "views.png")
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
        self.monitor = Monitor(run)
        self.step = 0
        self.window: list[torch.Tensor] = []  # loss, accuracy, spread of each step since the last log line
        self.substituted: set[int] = set()
        self.waited = 0.0

    def restore(self) -> None:
        """From last.pth where there is one; otherwise note the start and keep the untrained network."""
        if checkpoint.there(self.checkpoints):
            position, window = checkpoint.load(self.checkpoints, self.model, self.optimizer)
            self.step, self.window = position["step"], list(window.to(self.device))
            log(f"resuming at step {self.step} of {self.run.steps}")
        broadcast_(self.model.queue)
        self.saved = self.step
        self.metrics = Metrics(self.output, self.step, self.device)
        if self.step == 0:
            start = {"chance": self.run.chance, "queue_full_step": self.run.queue_full_step}
            self.metrics.write({"step": 0, "epoch": 0, **start})
            self.save()
        self.judge()

    def train(self) -> None:
        """All remaining steps."""
        self.started = time.perf_counter()
        with Stop() as stop, progress("pretrain", self.run.steps, self.run.config.batch_size, self.step) as advance:
            self.stop_if_asked(stop)
            for view_q, view_k in self.batches():
                self.train_step(view_q, view_k)
                advance(1, self.after_step())
                self.stop_if_asked(stop)

    def after_step(self) -> str | None:
        """Log and save where it is due; a note for the progress bar."""
        note, epoch_ends = None, self.step % self.run.steps_per_epoch == 0
        if epoch_ends or self.step % self.run.config.log_every == 0:
            line = self.log_step()
            note = f"epoch {line['epoch']:.1f} loss {line['loss']:.3f} (chance {self.run.chance:.2f})"
        if epoch_ends:
            self.end_epoch()
            self.started = time.perf_counter()
        return note

    def stop_if_asked(self, stop: Stop) -> None:
        """By a signal, which several ranks look for only where they log, or by max_steps. Raises Interrupted."""
        config, where = self.run.config, f"step {self.step} of {self.run.steps}"
        every = 1 if world_size() == 1 else config.log_every
        if self.step % every == 0 and stop.requested():
            self.save_unless_done()
            stop.check(f"saved at {where}: run the same command to go on")
        if config.max_steps is not None and config.max_steps <= self.step < self.run.steps:
            self.save_unless_done()
            raise Interrupted(f"max_steps reached and saved at {where}; without max_steps it goes on")

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

    def log_step(self) -> dict[str, Any]:
        """One line of metrics: the window averaged over its steps and all ranks."""
        self.limit_substitutes()
        values, now = self.finite_window(), time.perf_counter()
        seconds = now - self.started
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
        self.window, self.waited, self.started = [], 0.0, now
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
        """The checkpoint, and the kNN monitor when its turn has come."""
        self.save()
        self.judge()

    def judge(self) -> None:
        """The kNN monitor, when its turn has come and it has not run yet."""
        epoch, rest = divmod(self.step, self.run.steps_per_epoch)
        if rest or not self.monitor.due(epoch) or self.metrics.has("knn_top1", self.step):
            return
        top1 = self.monitor(self.model.encoder_q, self.device)
        self.metrics.write({"step": self.step, "epoch": epoch, "knn_top1": top1})
        log(f"epoch {epoch}: kNN {top1:.2f} %")

    def save(self) -> None:
        """Rank 0's state, once all ranks are shown to hold the same queue."""
        assert same_on_all_ranks(self.model.queue, self.model.queue_ptr), "the ranks' queues differ"
        self.saved = self.step
        if is_main():
            epoch, step_in_epoch = divmod(self.step, self.run.steps_per_epoch)
            position = {"step": self.step, "epoch": epoch, "step_in_epoch": step_in_epoch}
            checkpoint.save(self.checkpoints, self.model, self.optimizer, position, self.window, self.run.about())
            checkpoint.prune(self.checkpoints, self.run.config.checkpoints)
        barrier()

    def save_unless_done(self) -> None:
        """A checkpoint in the middle of an epoch."""
        if self.window:
            self.window = list(self.finite_window())  # the mean over ranks: what every rank will find on resuming
        if self.step != self.saved:
            self.save()

    def count_substitutes(self, bad: list[int]) -> None:
        """Name each unreadable image once, from the rank that met it."""
        for index in set(bad) - self.substituted:
            tell(f"warning: unreadable image, another takes its place: {self.run.images.files[index]}")
        self.substituted |= set(bad)

    def limit_substitutes(self) -> None:
        """Raises RunFailed where all ranks together met more unreadable images than bad_images allows."""
        limit, count = self.run.config.bad_images, torch.tensor(float(len(self.substituted)), device=self.device)
        if all_sum(count).item() > limit:
            raise RunFailed(f"more than {limit} images cannot be read (the limit is bad_images); mend the data")
