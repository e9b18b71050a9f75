"""metrics.jsonl of a fine-tuning: every `every`-th iteration's losses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moco_eval.runtime import collectives, files, rank
from moco_eval.runtime.device import require_finite, to_host


class LossLog:
    """The losses of an iteration after the other.

    A GPU's losses are read an iteration later, so that it never waits for the host.
    """

    def __init__(self, path: Path, done: int, total: int, every: int, rate: Callable[[int], float]):
        """
        Args:
            path: metrics.jsonl, cut back to the iterations that are done.
            done, total: iterations.
            every: how many from one line to the next; the last has one too.
            rate: the learning rate of an iteration, from 0.
        """
        self.path, self.total, self.every, self.rate = path, total, every, rate
        self.coming: tuple[int, list[str], Any] | None = None
        self.note: str | None = None
        collectives.found_by_main(lambda: files.cut_lines(path, "iteration", done))

    def add(self, iteration: int, losses: dict[str, Tensor]) -> str | None:
        """Take an iteration's losses; returns what to say of the newest that were read."""
        self.settle()
        values = torch.stack(list(losses.values()))
        self.coming = iteration, list(losses), to_host(values)
        if values.device.type != "cuda":
            self.settle()
        return self.note

    def settle(self) -> None:
        """Read what is on its way, and write it where it is due. Raises RunFailed where it is not finite."""
        if self.coming is None:
            return
        (iteration, names, arrived), self.coming = self.coming, None
        losses, done = dict(zip(names, arrived().tolist())), iteration + 1
        require_finite(losses["loss"], f"iteration {done}", "take a smaller optimizer.lr")
        self.note = f"loss {losses['loss']:.3f}"
        if rank.is_main() and (done % self.every == 0 or done == self.total):
            files.append_line(self.path, {"iteration": done, "lr": self.rate(iteration), **losses})
