"""The pretraining loop: views in, checkpoints out; interrupted at any step, it goes on from the last checkpoint."""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moco_eval.config.learning_rate import momentum_of_step, rate_in_pretraining
from moco_eval.data.loader import draw_seed
from moco_eval.errors import Interrupted, RunFailed, memory_of
from moco_eval.results.loggers import closed_after
from moco_eval.results.run_directory import open_run
from moco_eval.runtime.collectives import barrier, broadcast_, parallel, same_on_all_ranks
from moco_eval.runtime.console import log, progress
from moco_eval.runtime.device import autocast, deterministic, require_finite_weights
from moco_eval.runtime.rank import is_main, world_size
from moco_eval.runtime.stop import Stop
from pretraining import checkpoint
from pretraining.feed import Feed
from pretraining.mechanisms import Mechanism, build, optimizer_for, prepare, settle
from pretraining.moco import Step
from pretraining.monitor import Monitor
from pretraining.plan import Plan, smaller_step
from pretraining.record import Measurements, Metrics
from pretraining.signs import Signs
from pretraining.views import Batch, two_views


def pretrain(run: Plan, output: Path, device: torch.device, logs: Sequence[str] = ()) -> Path:
    """Train to the end, or go on where an earlier call stopped.

    Args:
        logs: where the curves go beside TensorBoard: wandb, mlflow.
    Returns:
        The last checkpoint.
    Raises:
        InputError: the output folder holds another run, another command works there, or one of `logs` cannot be opened.
        RunFailed: the loss is not finite, a step does not fit into memory, or too many images cannot be read.
        Interrupted: asked to stop by a signal; the state is saved.
    """
    with open_run(output, run.resolved()):
        trainer = Trainer(run, output, device, logs)
        trainer.restore()
        with closed_after(trainer.metrics.loggers):
            if is_main():
                two_views(run.images, run.config).draw(output / "views.png")
            try:
                trainer.train()
            except RunFailed as error:
                last = trainer.checkpoints / "last.pth"
                raise RunFailed(f"{error}; the last good checkpoint is {last} (step {trainer.saved})") from None
            except torch.OutOfMemoryError as error:
                raise RunFailed(
                    f"a step does not fit into the memory of {device} ({memory_of(error)}); take "
                    f"{smaller_step(run.config)} in another --output, or more GPUs"
                ) from None
    return trainer.checkpoints / "last.pth"


UNSCALED = torch.amp.GradScaler("cpu", enabled=False)


def algorithm_1(
    model: Mechanism,
    ddp: nn.Module,
    optimizer: torch.optim.Optimizer,
    parts: list[Batch],
    order: torch.Generator,
    scaler: torch.amp.GradScaler = UNSCALED,
) -> list[Step]:
    """One training step of Algorithm 1; gradients are accumulated where the batch comes in several parts.

    Under fp16 `scaler` makes the loss large enough for its gradients; where one of them overflows, the weights stay.
    """
    optimizer.zero_grad(set_to_none=True)
    model.move_encoder_k()  # Eqn. (2), before the keys are encoded
    steps = []
    for part in parts:
        with nullcontext() if part is parts[-1] or ddp is model else ddp.no_sync():
            step = ddp(part, order)
            with torch.autocast(step.loss.device.type, enabled=False):
                scaler.scale(step.loss / len(parts)).backward()
        steps.append(step)
    scaler.unscale_(optimizer)  # gradients are themselves again, for whoever looks at them
    scaler.step(optimizer)
    scaler.update()
    for step in steps:
        model.push(step)  # last: a batch never meets its own keys
    return steps


class Trainer:
    """The state of a run between two steps, and the loop over them."""

    def __init__(self, run: Plan, output: Path, device: torch.device, logs: Sequence[str] = ()):
        self.run, self.config, self.output, self.device, self.logs = run, run.config, output, device, logs
        self.checkpoints = output / "checkpoints"
        deterministic(self.config.deterministic)
        torch.manual_seed(self.config.seed)  # the same weights and dictionary on every rank
        self.model = prepare(build(run), run, device)
        self.optimizer = optimizer_for(self.model, self.config, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.config.precision == "fp16")
        self.signs = Signs(run, self.model, self.scaler, device)
        self.ddp = parallel(self.model)
        settle(self.ddp, run, device)
        self.monitor, self.measured = Monitor(run), Measurements(run, device)
        self.feed = Feed(run, device, self.measured.waiting.images_there)
        self.step = self.saved = 0
        self.coming_line: Callable[[], dict[str, Any]] | None = None

    def restore(self) -> None:
        """From last.pth where there is one; otherwise note the start and keep the untrained network."""
        if checkpoint.there(self.checkpoints):
            self.step, rows, unreadable = checkpoint.load(self.checkpoints, self.model, self.optimizer, self.scaler)
            self.measured.restore(rows.to(self.device), unreadable)
            log(f"resuming at step {self.step} of {self.run.steps}")
        for tensor in self.model.buffers(recurse=False):
            broadcast_(tensor)  # the dictionary; from here on every rank changes it alike
        self.metrics = Metrics(self.run, self.output, self.step, self.device, self.logs)
        if self.step == 0:
            start = {"chance": self.run.chance, "queue_full_step": self.run.full_step}
            self.metrics.write({"step": 0, "epoch": 0, **start})
            self.save()
        self.saved, self.saved_at = self.step, time.monotonic()
        self.judge()

    def train(self) -> None:
        """All remaining steps."""
        self.measured.restart()
        with Stop() as stop, progress("pretrain", self.run.steps, self.config.batch_size, self.step) as advance:
            self.pause_if_asked(stop)
            for batch in self.batches():
                self.train_step(batch)
                advance(1, self.after_step())
                self.pause_if_asked(stop)
                self.judge()

    def train_step(self, batch: Batch) -> None:
        """One step, at its learning rate and momentum and with its own order of keys."""
        at = self.config.schedule, self.config.optimizer.lr, self.step, self.run.steps_per_epoch
        for group in self.optimizer.param_groups:
            group["lr"] = rate_in_pretraining(*at)
        if self.config.momentum_schedule == "cosine":
            self.model.momentum = momentum_of_step(self.config.momentum, self.step, self.run.steps)
        order = torch.Generator().manual_seed(draw_seed(self.config.seed, self.step, 0) >> 1)
        parts = batch.parts(self.run.parts)
        if self.config.compile == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()  # the step before is pushed: its outputs may be overwritten
        self.signs.before_step()
        with autocast(self.device, self.config.precision):
            steps = algorithm_1(self.model, self.ddp, self.optimizer, parts, order, self.scaler)
        self.measured.add(steps, self.signs.after_step())
        self.step += 1

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.step // self.run.steps_per_epoch

    def batches(self) -> Generator[Batch, None, None]:
        """This process's views of each remaining step, on the device; time spent waiting for them is noted."""
        waiting = self.measured.waiting
        waiting.begin()
        try:
            for batch, unreadable in self.feed(self.step):
                waiting.batch_there()
                self.measured.note_unreadable(unreadable)
                yield batch
                waiting.begin()
        except Interrupted as no_data:
            if world_size() == 1:
                self.save()
            raise Interrupted(f"saved at step {self.saved} of {self.run.steps}; {no_data}") from None

    def after_step(self) -> str | None:
        """Log, save and judge where it is due; a note for the progress bar. Lines are read a step after their last."""
        note = self.write_line()
        epoch_ends = self.step % self.run.steps_per_epoch == 0
        if epoch_ends or self.step % self.config.log_every == 0:
            self.coming_line = self.measured.line(self.step, self.optimizer.param_groups[0]["lr"])
        if epoch_ends:
            note = self.write_line()
            self.save()
        return note

    def write_line(self) -> str | None:
        """The line of metrics that is on its way, where there is one."""
        if self.coming_line is None:
            return None
        line, self.coming_line = self.coming_line(), None
        self.metrics.write(line)
        return f"epoch {line['epoch']:.1f} loss {line['loss']:.3f} (chance {self.run.chance:.2f})"

    def pause_if_asked(self, stop: Stop) -> None:
        """Save inside an epoch where it is due; stop where a signal or max_steps says so. Raises Interrupted."""
        keep, last = self.config.checkpoints, self.config.max_steps
        signalled, late = stop.look(self.step, time.monotonic() - self.saved_at > 60 * keep.minutes)
        reached = last is not None and last <= self.step < self.run.steps
        if signalled or late or reached or (keep.steps and self.step % keep.steps == 0):
            self.save()
        where = f"saved at step {self.step} of {self.run.steps}"
        if signalled:
            stop.check(f"{where}: run the same command to go on")
        if reached:
            raise Interrupted(f"max_steps reached and {where}; run it without max_steps to go on")

    def save(self) -> None:
        """Rank 0's state, once all ranks are shown to hold the same dictionary and a finite loss."""
        if self.step == self.saved > 0:
            return
        assert same_on_all_ranks(*self.model.buffers(recurse=False)), "the ranks' dictionaries differ"
        self.write_line()
        rows, unreadable = self.measured.together(self.step), self.measured.unreadable
        require_finite_weights(self.model, self.step)
        if is_main():
            self.metrics.flush()
            state = self.model, self.optimizer, self.scaler
            checkpoint.save(self.checkpoints, self.run, *state, self.step, rows, unreadable)
            checkpoint.prune(self.checkpoints, self.config.checkpoints)
        barrier()
        self.saved, self.saved_at = self.step, time.monotonic()

    def judge(self) -> None:
        """The kNN monitor, when its turn has come and it has not run yet."""
        rest = self.step % self.run.steps_per_epoch
        if rest or not self.monitor.due(self.epoch) or self.metrics.has("knn_top1", self.step):
            return
        top1 = self.monitor(self.model.encoder_q, self.device)
        self.metrics.write({"step": self.step, "epoch": self.epoch, "knn_top1": top1})
        log(f"epoch {self.epoch}: kNN {top1:.2f} %")
        self.measured.restart()
