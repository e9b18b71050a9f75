"""Whether this process is a command of ours, or a guest in somebody's program, where it must surprise nobody.

A command takes the signals, shows its progress and writes its command line into records; a guest does none of these.
"""

import contextlib
import subprocess
from collections.abc import Iterator

_line: str | None = None


@contextlib.contextmanager
def running(typed: str) -> Iterator[None]:
    """Within, this process is a command; `typed` is what one types to run it."""
    global _line
    before, _line = _line, typed
    try:
        yield
    finally:
        _line = before


def line() -> str | None:
    """The command line of this process; None in a library."""
    return _line


def is_command() -> bool:
    """Whether the process is ours."""
    return _line is not None


def exit_code(process: subprocess.Popen) -> int:
    """Of a process, once it has ended.

    A wait without end would keep a signal that another thread of ours receives until it is over.
    """
    while True:
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            continue
