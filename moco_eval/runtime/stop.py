"""Interruption: a signal becomes a flag that long work looks at between steps."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.distributed as dist

from moco_eval.errors import Interrupted
from moco_eval.runtime.collectives import all_sum
from moco_eval.runtime.command import is_command
from moco_eval.runtime.rank import is_main, world_size


class Stop:
    """Turns SIGINT, SIGTERM and SIGUSR1 into a flag that long work looks at between steps.

    A second SIGINT ends the process at once. Every rank must agree before it stops: `requested` is collective.
    In a library signals are the host's: nothing is asked to stop, and what is kept between steps is kept.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    EVERY = 2.0  # seconds between two looks of several ranks
    PATIENCE = 3.0  # seconds after a signal in which a batch may still come
    inside: ClassVar[list["Stop"]] = []  # of this process, the innermost last

    def __init__(self) -> None:
        self.signal: int | None = None
        self.since = 0.0
        self.reads = False
        self._looked: tuple[int, float] | None = None
        self._next = 0

    def __enter__(self) -> "Stop":
        ours = is_command() and threading.current_thread() is threading.main_thread()
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS if ours}
        if ours:
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._late)
            self.inside.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self in self.inside:
            self.inside.remove(self)

    def _note(self, number: int, _frame: object) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal, self.since = number, self.since or time.monotonic()
        if self.reads:
            signal.setitimer(signal.ITIMER_REAL, self.PATIENCE)

    def _late(self, _number: int, _frame: object) -> None:
        if self.reads:
            raise _TooLate

    def look(self, step: int, due: bool) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and whether rank 0's clock says that something is due.

        Called by every rank after every step. Several ranks look together every EVERY seconds, by rank 0's pace.
        """
        if world_size() == 1:
            return self.signal is not None, due
        if step < self._next:
            return False, False
        now = time.monotonic()
        before, at = self._looked or (step, now)
        steps = max(1, self.EVERY * (step - before) // max(now - at, 1e-3))
        first = torch.tensor([float(due), float(steps)]) * is_main()
        agreed = all_sum(first.cuda() if dist.get_backend() == "nccl" else first).tolist()
        self._looked, self._next = (step, now), step + int(agreed[1])
        return self.requested(), bool(agreed[0])

    def requested(self) -> bool:
        """Whether any rank was asked to stop."""
        if world_size() == 1:
            return self.signal is not None
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return bool(all_sum(torch.tensor([float(self.signal is not None)], device=device)).item())

    def check(self, saved: str) -> None:
        """Raises Interrupted on every rank where any was asked to stop; `saved` says what is safe. Collective."""
        if self.requested():
            name = "another process" if self.signal is None else signal.Signals(self.signal).name
            raise Interrupted(f"stopped by {name}; {saved}")


class _TooLate(KeyboardInterrupt):
    """The read that was under way when a signal came has not ended; no handler of errors may take it for one."""


def stop_waiting() -> None:
    """Called now and then while nothing comes: raises Interrupted where this process was asked to stop a while ago.

    Not collective: whoever waits reaches no step at which the ranks could agree.
    """
    stop = Stop.inside[-1] if Stop.inside else None
    if stop and stop.signal is not None and time.monotonic() - stop.since > stop.PATIENCE:
        raise Interrupted(_no_data(stop.signal))


def _no_data(number: int) -> str:
    name = signal.Signals(number).name
    return f"stopped by {name} while no data came (does the storage answer?): run the same command to go on"


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Within, this process reads data itself: a signal ends the read if it does not end soon. Raises Interrupted."""
    stop = Stop.inside[-1] if Stop.inside else None
    if stop is None:
        yield
        return
    stop.reads = True
    if stop.signal is not None:
        signal.setitimer(signal.ITIMER_REAL, stop.PATIENCE)
    try:
        yield
    except _TooLate:
        assert stop.signal is not None
        raise Interrupted(_no_data(stop.signal)) from None
    finally:
        stop.reads = False
        if stop.signal is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)  # a late alarm would find nobody who expects it
