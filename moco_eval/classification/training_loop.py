"""The supervised training loop of the evaluations: crops of labelled images, an epoch at a time, resumable anywhere."""

import copy
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from moco_eval.config.base import Augmentation
from moco_eval.data.image_set import ImageSet
from moco_eval.data.loader import Batches, Examples, Normalise, crop_cut, loader
from moco_eval.data.training_cut import Cut
from moco_eval.errors import Interrupted
from moco_eval.preprocessing import Preprocessing
from moco_eval.runtime import files
from moco_eval.runtime.collectives import all_sum
from moco_eval.runtime.console import progress, warn
from moco_eval.runtime.device import require_finite, to_device
from moco_eval.runtime.rank import is_main, world_size
from moco_eval.runtime.stop import Stop


class Epochs(Protocol):
    """What the loop reads of a schedule; the rates are the learner's."""

    epochs: int


class LoopSettings(Protocol):
    """What the loop reads of a config."""

    batch_size: int
    workers: int

    @property
    def augmentation(self) -> Augmentation: ...

    @property
    def schedule(self) -> Epochs: ...


class Learner(Protocol):
    """What is trained."""

    def train_step(self, views: torch.Tensor, labels: torch.Tensor, epoch: int, batch: int) -> torch.Tensor:
        """One step on this process's share of a batch of `batch` images; returns the share's part of the mean loss."""

    def end_epoch(self, epoch: int) -> None:
        """Called by every process after each epoch, before the state is kept."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Loop:
    """Train a learner on crops of a set of images; each draw comes from (seed, epoch, image).

    Attributes:
        state: where its state is kept after each epoch, and where it is stopped; None keeps none.
        batches: of all epochs; None is each image once per epoch, the last batch perhaps smaller.
        cut: what becomes of an image; None is crop, flip and normalise.
        losses: of the epoch under way, (steps,), this process's shares.
    """

    def __init__(
        self,
        learner: Learner,
        images: ImageSet,
        config: LoopSettings,
        preprocessing: Preprocessing,
        seed: int,
        state: Path | None,
        device: torch.device,
        batches: Batches | None = None,
        cut: Cut | None = None,
    ):
        self.learner, self.images, self.config, self.seed = learner, images, config, seed
        self.preprocessing, self.state, self.device = preprocessing, state, device
        self.batches = batches or Batches(
            len(images), config.batch_size, seed, range(config.schedule.epochs), shuffle=True, drop_last=False
        )
        shape = config.augmentation
        self.cut = cut or Cut(crop_cut(preprocessing, shape.crop_scale, shape.flip), Normalise(preprocessing))
        self.losses: list[torch.Tensor] = []
        self.began, self.earlier, self.done = time.perf_counter(), 0.0, 0

    def run(self, title: str, way_out: str = "a smaller --set optimizer.lr may help") -> float:
        """Train to the end of the schedule; returns the seconds of earlier sessions.

        Args:
            way_out: what may help where the loss is not finite.

        Raises:
            RunFailed: the loss is not finite.
            Interrupted: stopped by a signal; its state is kept.
        """
        epochs, done, self.way_out = self.config.schedule.epochs, self._restore(), way_out
        first_epoch, first_step = divmod(done, self.batches.steps_per_epoch)
        batches = replace(self.batches, epochs=range(first_epoch, epochs), first_step=first_step)
        size, floats = self.preprocessing.size, self.cut.floats
        examples = Examples(self.images, self.cut.in_workers, self.seed, size=size, floats=floats)
        total, self.done = epochs * batches.steps_per_epoch, done
        with Stop() as stop, progress(title, total, self.config.batch_size, done) as advance:
            for views, labels, _ in self._loaded(examples, batches):
                epoch, step = divmod(done, batches.steps_per_epoch)
                mine, batch = batches.mine(step), batches.size(step)
                views, labels = (to_device(part[:mine], self.device) for part in (views, labels))
                self.losses.append(self.learner.train_step(self.cut.on_device(views), labels, epoch, batch))
                self.done = done = done + 1
                advance()
                self._after_step(done, total, batches.steps_per_epoch, stop)
        return self.earlier

    def _loaded(self, examples: Examples, batches: Batches) -> Iterator[Any]:
        """Batches as they come; where none comes and a signal does, the state is kept. Raises Interrupted."""
        try:
            yield from loader(examples, batches, self.config.workers, self.device)
        except Interrupted as no_data:
            if world_size() == 1 and self.losses:
                require_finite(torch.stack(self.losses).mean().item(), f"step {self.done}", self.way_out)
                self._save(self.done)
            raise Interrupted(f"step {self.done} is reached; {no_data}") from None

    def _after_step(self, done: int, total: int, per_epoch: int, stop: Stop) -> None:
        """At the end of each epoch check the loss and keep the state; stop where asked to."""
        epoch_ends = done % per_epoch == 0
        requested = stop.look(done, due=False)[0] or (epoch_ends and stop.requested())
        if not epoch_ends and not requested:
            return
        loss = all_sum(torch.stack(self.losses).mean()).item() / world_size()
        self.losses = []
        require_finite(loss, f"epoch {(done - 1) // per_epoch}", self.way_out)
        if epoch_ends:
            self.learner.end_epoch((done - 1) // per_epoch)
        self._save(done)
        if requested:
            stop.check(f"step {done} of {total} is saved: run the same command to go on")

    def _save(self, done: int) -> None:
        if self.state is not None and is_main():
            state = {"step": done, "seconds": self.earlier + time.perf_counter() - self.began}
            with files.atomic(self.state) as path:
                torch.save(state | {"learner": self.learner.state_dict()}, path)

    def _restore(self) -> int:
        if self.state is None or not self.state.is_file():
            return 0
        fresh = copy.deepcopy(self.learner.state_dict())
        try:
            state = torch.load(self.state, map_location=self.device, weights_only=True)
            self.learner.load_state_dict(state["learner"])
        except Exception as error:  # whatever a damaged file makes torch raise
            warn(f"{self.state} cannot be resumed from ({str(error).splitlines()[0]}); this trial starts again")
            self.learner.load_state_dict(fresh)  # it may have taken a part
            return 0
        self.earlier = float(state["seconds"])
        return int(state["step"])
