"""One command at a time in a folder, by a lock that ends with its process, however that ends."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moco_eval.errors import InputError
from moco_eval.runtime import command
from moco_eval.runtime.console import warn

NAME = ".lock"
SHOWN = 300  # bytes of what the holder says of itself
_held: set[int] = set()  # descriptors


def _forget() -> None:
    """A forked process (a loader worker) closes its copies: with them it would hold the lock after its parent."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if it is not there; no other process, and no other thread of this one, may then.

    The kernel holds the lock for the process, so that a killed one leaves none behind. The file `.lock`, which says who
    holds it, goes at the end; one that is left over locks nothing.

    Raises:
        InputError: another holds it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(folder)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}; choose another --output") from None
    try:
        yield
    finally:
        (folder / NAME).unlink(missing_ok=True)  # before it is free: whoever waits for this file sees that it has gone
        _held.discard(descriptor)
        os.close(descriptor)


def _locked(folder: Path) -> int:
    """The descriptor of the folder's lock, which is ours."""
    while True:
        descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        _held.add(descriptor)
        try:
            _lock(descriptor, folder)
            if _is_named(descriptor, folder / NAME):
                os.truncate(descriptor, 0)
                os.write(descriptor, _ourselves().encode("utf-8", "surrogateescape"))
                return descriptor
        except BaseException:
            _held.discard(descriptor)
            os.close(descriptor)
            raise
        _held.discard(descriptor)  # its holder has just removed it: once more, with the file that is there now
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    """Raises InputError where another has it; a file system without locks only makes us warn."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the latter from NFS, where it becomes a lock of another kind
        raise InputError(f"--output {folder} is in use by {_holder(descriptor)}; {_way_out()}") from None
    except OSError as error:
        warn(
            f"the file system of {folder} has no locks ({error.strerror}): a second command there would not be "
            "noticed, so do not start one"
        )


def _way_out() -> str:
    """What to do instead; several tasks of one srun are most likely meant to be one run."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks == "1" or os.environ.get("RANK"):
        return "wait until that ends, or choose another --output"
    return (
        f"srun has started {tasks} separate commands: take --ntasks-per-node=1 and --nproc N, or torchrun "
        "as in tools/pretrain.sbatch; or give each its own --output"
    )


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether the file is still the one that its name stands for."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def _ourselves() -> str:
    line = command.line()
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    who = f"process {os.getpid()} on {socket.gethostname()}, since {since}"
    return f"another command ({who}): {line}" if line else f"a Python program ({who})"


def _holder(descriptor: int) -> str:
    """What the holder says of itself, on one line."""
    text = os.pread(descriptor, SHOWN, 0).decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else " " for letter in text).strip() or "another command"
