"""What limits a training loop: its parts timed one by one, and what that means in words."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moco_eval.data.augment.two_views import TwoViews
from moco_eval.runtime.device import wait_for

NOTICED = 0.1  # share of a step's time that is worth a word
LAUNCH_BOUND = 0.8  # share of the device's time at which its work ends as soon as it is launched


def seconds(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Median time of one call, the device's work included, after one call that does not count."""
    taken = []
    for _ in range(repeats + 1):
        wait_for(device)
        started = time.perf_counter()
        run()
        wait_for(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def launch_seconds(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Median time until one call has given a GPU its work; 0 on a CPU, which does the work itself."""
    if device.type != "cuda":
        return 0.0
    taken = []
    for _ in range(repeats):
        wait_for(device)
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    wait_for(device)
    return statistics.median(taken)


def worker_seconds(views: TwoViews, items: list[tuple[int, int]]) -> tuple[float, float]:
    """Seconds that a loader process takes for a batch, and for decoding it; on one thread, as it has."""
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        decoding = seconds(lambda: [views.decoded(index) for _, index in items], cpu, 2)
        return seconds(lambda: views.__getitems__(items), cpu, 2), decoding
    finally:
        torch.set_num_threads(threads)


@dataclass
class Parts:
    """Seconds of one process, per step where not said otherwise.

    Attributes:
        device: in words.
        images: of a step.
        steps: how many were timed.
        loop: a step of the real loop.
        waiting: for the next batch, within it.
        training: a step with its batch in place, collectives included.
        augmentation: what the training device does to make the views.
        launching: the host's part of both, until a GPU has been given their work; 0 on a CPU.
        copies: of a batch to the device.
        collectives: exchanges between processes by themselves; in the loop some hide behind the backward pass.
        worker: per image, in one loader process alone; 0 where there is none.
        decoding: per image, within that.
        workers: loader processes.
    """

    device: str
    images: int
    steps: int
    loop: float
    waiting: float
    training: float
    augmentation: float
    launching: float
    copies: float
    collectives: float
    worker: float
    decoding: float
    workers: int

    @property
    def busy(self) -> float:
        """Seconds that the training device works on a step, were it never to wait."""
        return self.training + self.augmentation

    @property
    def cores(self) -> int:
        """Loader processes that keep up with the training device."""
        return math.ceil(self.images / self.busy * self.worker)

    def report(self) -> str:
        """A table of the parts, what limits, and the way out."""
        rows = [
            ("a step of the loop", self.loop),
            ("  waiting for the next batch", self.waiting),
            ("training, batch in place", self.training),
            ("augmentation on the training device", self.augmentation),
            ("launching of both, by the host", self.launching),
            ("copies to it (beside the step before)", self.copies),
            ("collectives, by themselves", self.collectives),
        ]
        lines = [f"{self.steps} steps of {self.images} images on {self.device}"]
        lines += [f"{name:<40} {1000 * value:>9.1f} ms {100 * value / self.loop:>6.1f} %" for name, value in rows]
        lines += [f"{'per image, one loader process':<40} {1000 * self.worker:>9.2f} ms"] if self.worker else []
        lines += [f"{'  of that, decoding':<40} {1000 * self.decoding:>9.2f} ms"] if self.decoding else []
        return "\n".join([*lines, "", *self.advice()])

    def advice(self) -> list[str]:
        """What limits and what to change, a sentence a line."""
        rate, most = self.images / self.loop, self.images / self.busy
        sentences = [f"{rate:.0f} images/s; the training device alone would take {most:.0f}."]
        if self.worker:
            sentences.append(
                f"One core makes views of {1 / self.worker:.0f} images/s, so this device needs {self.cores} "
                f"loader processes; there are {self.workers}."
            )
        if self.loop < self.busy * (1 + NOTICED):
            return [*sentences, *self._busy()]
        if self.worker and self.waiting > NOTICED * self.loop:
            return [*sentences, *self._starved()]
        return [*sentences, "The loop takes longer than its parts: other programs share this machine, or steps differ."]

    def _starved(self) -> list[str]:
        share = self.decoding / self.worker
        work = f"decoding ({100 * share:.0f} % of it)" if share > 0.5 else "cutting and augmenting"
        if self.workers < self.cores:
            return [
                f"The loader is the bottleneck, mostly {work}: the device waits. Take --workers {self.cores} if "
                "there are as many cores; photos stored at 256 to 400 pixels on their shorter side decode faster."
            ]
        return [
            f"The loader is the bottleneck although {self.workers} processes should be enough: the cores are shared, "
            "or the disk is slower than they are. Tar shards (--dataset webdataset) read better than single files."
        ]

    def _busy(self) -> list[str]:
        sentences = []
        if self.augmentation > NOTICED * self.busy:
            sentences.append(f"Augmentation takes {100 * self.augmentation / self.busy:.0f} % of the device's time.")
        if self.collectives > NOTICED * self.busy:
            sentences.append(
                f"Exchanges between processes would take {100 * self.collectives / self.busy:.0f} % if nothing hid "
                "them: fewer, larger processes or a faster network."
            )
        if self.launching > LAUNCH_BOUND * self.busy:
            return [
                *sentences,
                f"Launching is the bottleneck: the host takes {1000 * self.launching:.1f} ms to give the device "
                f"what it does in {1000 * self.busy:.1f} ms. compile=true launches less; a larger --batch-size does "
                "more each time.",
            ]
        return [
            *sentences,
            "The model is the bottleneck: its arithmetic. --precision bf16 and compile=true are the ways to less.",
        ]
