"""Loader processes: started where there is room for them, waited for with an ear for signals, ended with the reason."""

import mmap
import multiprocessing.queues
import os
import re
import signal
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from moco_eval.errors import InputError, RunFailed
from moco_eval.runtime.console import warn
from moco_eval.runtime.stop import reading, stop_waiting

SHARED_MEMORY = Path("/dev/shm")  # where torch puts what loader processes send
PREFETCH = 4  # batches that a loader process keeps ready
POLL = 1.0  # seconds between two looks for a signal
LONGEST_TMPDIR = 75  # bytes: the processes' sockets lie below it, and their paths may have 107
LOST = re.compile(r"DataLoader worker \(pid\(?s?\)? ?([\d, ]+)\)(?: is killed by signal: ([\w ]+))?")
REASONS = (
    (
        r"No space left on device|out of shared memory|shared memory|Bus error",
        "{shm} has no room for the batches that loader processes send; make it larger (docker run --shm-size=8g, or "
        "--ipc=host), or take --workers 0",
    ),
    (
        r"AF_UNIX path too long",
        "the path of TMPDIR is too long for the sockets of loader processes; set TMPDIR=/tmp, or take --workers 0",
    ),
    (
        r"Too many open files|ancdata",
        "too few open files are allowed for what loader processes send (ulimit -n says {files}); raise it, for example "
        "ulimit -n 4096, or take --workers 0",
    ),
)


class Reason:
    """Why a loader process could not send a batch, for the process that waits for it: memory that both see."""

    SIZE = 1024

    def __init__(self) -> None:
        self.page = mmap.mmap(-1, self.SIZE)

    def __reduce__(self) -> tuple:
        return Reason, ()  # a process that is no fork has its own, and says nothing

    def write(self, message: str) -> None:
        data = message.encode("utf-8", "backslashreplace")[: self.SIZE - 1]
        self.page[: len(data)] = data

    def read(self) -> str:
        return self.page[:].rstrip(b"\0").decode("utf-8", "replace")


class Start:
    """What a loader process does first."""

    def __init__(self, reason: Reason) -> None:
        self.reason = reason

    def __call__(self, _worker: int) -> None:
        """Leave signals to the process that trains, and end with the reason where a batch cannot be sent.

        multiprocessing only prints that, and whoever waits for the batch waits for ever.
        """
        outlive_signals()

        def failed(error: Exception, _batch: Any) -> None:
            self.reason.write(" ".join(f"{type(error).__name__}: {error}".split()))
            os._exit(0)  # a failure would be raised in the middle of a training step; its absence is noticed

        multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(failed)  # type: ignore[attr-defined]


def outlive_signals() -> None:
    """A loader process goes on whoever signals it but its parent, which can then end its step and save.

    It is no longer of the group to which torchrun and Ctrl-C send signals, and ignores those that a scheduler sends to
    every process; SIGTERM from its own parent ends it even while it waits for its storage.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None and hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_asked_by, args=(parent.pid,), daemon=True).start()


def _end_when_asked_by(parent: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


class Loaded:
    """The batches of a data set, from workers that live as long as the iteration. Iterating raises:

    RunFailed: a worker died, or cannot send its batches; the message says why.
    Interrupted: asked to stop by a signal while no batch came.
    """

    def __init__(
        self, dataset: Any, batches: Any, workers: int, *, batch_bytes: int = 0, ready: int = PREFETCH, **more: Any
    ):
        """
        Args:
            batches: lists of what the data set takes.
            batch_bytes: of the largest batch; 0 where nobody knows.
            ready: batches that each worker keeps, where there is room.
            more: for the DataLoader.
        Raises:
            RunFailed: there is no room for what the workers send.
        """
        self.reason = Reason()
        if workers:
            require_short_temporary_folder()
            more |= {"worker_init_fn": Start(self.reason), "timeout": POLL}
            more |= {"prefetch_factor": prefetch(workers, batch_bytes, ready)}
        self.loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers, **more)

    def __iter__(self) -> Iterator[Any]:
        return self._from_workers() if self.loader.num_workers else self._from_here()

    def _from_here(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while True:
            with reading():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _from_workers(self) -> Iterator[Any]:
        batches = None
        try:
            batches = iter(self.loader)
            while (batch := self._next(batches)) is not None:
                yield batch
        except GeneratorExit:
            raise  # no more is wanted
        except BaseException as error:
            for process in getattr(batches, "_workers", ()):  # one that waits for its storage would be waited for
                process.terminate()
            reason = self.reason.read()
            message = explanation(str(error), reason) if isinstance(error, RuntimeError | OSError | EOFError) else None
            if message is None:
                raise
            raise RunFailed(message) from None

    @staticmethod
    def _next(batches: Iterator[Any]) -> Any:
        """The next batch, or None at the end."""
        while True:
            try:
                return next(batches, None)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise
            stop_waiting()


class _Refusals:
    """Hands on an unreadable image as a value: raised in a worker, it would bring that worker's traceback."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except InputError as error:
            return error


def rows(dataset: Any, keys: Iterable[list], workers: int) -> Iterator[Any]:
    """Of each list of keys a tuple of lists, one for each value that the data set gives for a key.

    Raises:
        InputError: what the data set raises of a key; and see `Loaded`.
    """
    for batch in Loaded(_Refusals(dataset), keys, workers, ready=2, collate_fn=list):
        for row in batch:
            if isinstance(row, InputError):
                raise row
        yield tuple(list(column) for column in zip(*batch))


def explanation(error: str, reason: str = "") -> str | None:
    """What ended loader processes, on one line; None where an error is about something else.

    Args:
        error: what torch says.
        reason: what a worker has said of itself.
    """
    lost = LOST.search(error)
    if not (lost or reason or re.search(r"ancdata|Too many open files|torch_\S+>|shared memory", error)):
        return None
    files = os.sysconf("SC_OPEN_MAX")
    for pattern, message in REASONS:
        if re.search(pattern, f"{reason} {error}"):
            return message.format(shm=SHARED_MEMORY, files=files)
    if reason:
        return f"a loader process could not send its batch ({reason}); --workers 0 works without them"
    assert lost
    how = f"was ended by signal {lost[2].strip()!r}" if lost[2] else "has ended"
    return (
        f"a loader process (pid {lost[1]}) {how}, perhaps for lack of memory; run the same command to go on, with "
        "fewer --workers if it happens again"
    )


def require_short_temporary_folder() -> None:
    """Raises RunFailed where the sockets of loader processes would have too long a path."""
    folder = tempfile.gettempdir()
    if (length := len(os.fsencode(folder))) > LONGEST_TMPDIR:
        raise RunFailed(
            f"TMPDIR {folder} has {length} characters, too many for the sockets of loader processes (at most "
            f"{LONGEST_TMPDIR}); set TMPDIR=/tmp, or take --workers 0"
        )


def prefetch(workers: int, batch_bytes: int, wanted: int = PREFETCH) -> int:
    """How many batches each worker may keep ready in shared memory: as many as wanted, or fewer where it is small.

    Raises:
        RunFailed: not even one of each worker has room.
    """
    if not batch_bytes or not SHARED_MEMORY.is_dir():
        return wanted
    room = os.statvfs(SHARED_MEMORY)
    free = room.f_bavail * room.f_frsize
    processes = workers * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    ready = free // (processes * batch_bytes)
    way_out = "make it larger (docker run --shm-size=8g, or --ipc=host)"
    if ready < 1:
        raise RunFailed(
            f"{SHARED_MEMORY} has {free / 1e6:.0f} MB free, and {processes} loader processes send batches of "
            f"{batch_bytes / 1e6:.0f} MB through it; {way_out}, or take fewer --workers, or --workers 0"
        )
    if ready < wanted:
        warn(
            f"{SHARED_MEMORY} has {free / 1e6:.0f} MB free: each loader process keeps {ready} batches of "
            f"{batch_bytes / 1e6:.0f} MB ready instead of {wanted}; {way_out}"
        )
    return min(wanted, int(ready))
