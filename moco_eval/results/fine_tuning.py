"""Training by iterations that goes on where it was stopped: the loop, its checkpoints and its losses."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moco_eval.errors import Interrupted
from moco_eval.results import training_state
from moco_eval.results.loss_log import LossLog
from moco_eval.results.record import Cost
from moco_eval.runtime import collectives, console, rank
from moco_eval.runtime.stop import Stop


class FineTuning:
    """A network, its optimizer and how far they have come: one process's part of them.

    Attributes:
        done: iterations so far; `finished`: with what follows the last of them behind it.
        ddp: the network with gradients averaged over the processes.
    """

    def __init__(
        self,
        command: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        recipe: Any,
        rate: Callable[[Any, int], float],
        output: Path,
        device: torch.device,
        cost: Cost,
    ):
        """
        Args:
            command: detect or segment.
            recipe: with schedule.iterations, batch_size, checkpoints.every and log_every.
            rate: the learning rate of the recipe in an iteration, from 0.
            output: run directory; checkpoints/last.pth is taken up where it is there.
        """
        self.command, self.model, self.optimizer, self.recipe = command, model, optimizer, recipe
        self.device, self.cost = device, cost
        self.state = output / "checkpoints" / "last.pth"
        self.done, self.finished = training_state.load(self.state, model, optimizer, cost)
        self.ddp = collectives.parallel(model)
        total = recipe.schedule.iterations
        self.losses = LossLog(output / "metrics.jsonl", self.done, total, recipe.log_every, partial(rate, recipe))

    def train(self, stream: Iterator[Any], stop: Stop) -> None:
        """All remaining iterations. Raises RunFailed and Interrupted."""
        recipe, total = self.recipe, self.recipe.schedule.iterations
        with console.progress(self.command, total, recipe.batch_size, done=self.done) as advance:
            while self.done < total:
                with self.cost.clock():
                    values = self.step(self.coming(stream), self.done)
                    note = self.losses.add(self.done, values)
                self.cost.images += recipe.batch_size
                self.done += 1
                advance(note=note)
                asked, _ = stop.look(self.done, False)
                if asked or self.done % recipe.checkpoints.every == 0 or self.done == total:
                    self.save()
                if asked:
                    stop.check(f"iteration {self.done} of {total} is saved; run the same command to go on")

    def coming(self, stream: Iterator[Any]) -> Any:
        """The next batch; where none comes and a signal does, the state is kept. Raises Interrupted."""
        try:
            return next(stream)
        except Interrupted as no_data:
            if rank.world_size() == 1:
                self.save()
            raise Interrupted(f"iteration {self.done} is reached; {no_data}") from None

    def step(self, batch: Any, iteration: int) -> dict[str, Tensor]:
        """One iteration on this process's images; returns the losses, means over the processes."""
        raise NotImplementedError

    def save(self, finished: bool = False) -> None:
        """Write last.pth, from the first process, once the losses and weights are known to be finite."""
        self.losses.settle()
        training_state.save(
            self.state, self.model, self.optimizer, self.done, finished, self.cost, command=self.command
        )
