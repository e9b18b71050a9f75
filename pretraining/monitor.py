"""The kNN monitor: how well the query encoder classifies held-out images while it trains."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.functional import pad

from moco_eval.classification import knn
from moco_eval.data.catalogue import open_splits
from moco_eval.data.image_set import ImageSet, require_judgeable, require_single_label
from moco_eval.data.repeats import tell_repeats
from moco_eval.errors import InputError
from moco_eval.runtime.collectives import broadcast_
from moco_eval.runtime.console import log
from pretraining.in_parts import headless
from pretraining.plan import Plan
from pretraining.views import preprocessing


class Monitor:
    """The monitor of a config, where it wants one and the data has labels and a test split."""

    def __init__(self, run: Plan):
        self.run, self.settings = run, run.config.knn
        self.splits = self._splits()

    def _splits(self) -> tuple[ImageSet, ImageSet] | None:
        """Training and test images with labels."""
        images = self.run.images
        if self.settings is None or not images.classes:
            return None
        try:
            train, test = open_splits(self.run.dataset, self.run.data)
            require_single_label(test)
            require_judgeable(train, test)
        except InputError as error:
            log(f"no kNN monitor: {error}")
            return None
        tell_repeats(train, test)
        return (train if images.labels is None else images), test

    def due(self, epoch: int) -> bool:
        """Whether to run after this many epochs; always after the last."""
        if self.settings is None or self.splits is None or epoch == 0:
            return False
        return epoch % self.settings.every == 0 or epoch == self.run.config.schedule.epochs

    def __call__(self, encoder_q: nn.Module, device: torch.device) -> float:
        """Top-1 in percent, of the pooled feature or the head's output."""
        assert self.settings is not None and self.splits is not None
        for buffer in encoder_q.buffers():
            broadcast_(buffer)  # rank 0's BN statistics are those that are saved
        compiled = self.run.config.compile is True
        with (
            headless(encoder_q) if self.settings.feature == "pooled" else contextlib.nullcontext(),
            contextlib.nullcontext() if compiled else eager(),
        ):
            return knn.monitor(
                OfOneSize(encoder_q) if compiled else encoder_q,
                *self.splits,
                preprocessing(self.run.config.views, self.run.images),
                device,
                k=self.settings.k,
                temperature=self.settings.temperature,
                workers=self.run.config.workers,
                precision=self.run.config.precision,
            )


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Nothing runs compiled within: graphs of the monitor's large batches would hold their memory while training."""
    torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        torch.compiler.set_stance("default")


class OfOneSize(nn.Module):
    """A network in evaluation that sees batches of one size only, so that it is compiled once: rows of zeros are added.

    The size is that of the largest batch so far.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.size = net, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) to (N, D)."""
        rows = len(images)
        self.size = max(self.size, rows)
        return self.net(pad(images, (*[0] * 6, 0, self.size - rows)) if rows < self.size else images)[:rows]
