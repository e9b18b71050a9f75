"""Whether this process is a command of ours, and how much it says, or a guest in somebody's program.

A command takes the signals, shows its progress and writes its command line into records; a guest does none of these and
surprises nobody.
"""

import contextlib
import subprocess
from collections.abc import Iterator

QUIET, USUAL, VERBOSE = "quiet", "usual", "verbose"
_line: str | None = None
_voice = USUAL


@contextlib.contextmanager
def running(typed: str) -> Iterator[None]:
    """Within, this process is a command; `typed` is what one types to run it."""
    global _line, _voice
    before, _line, _voice = (_line, _voice), typed, USUAL
    try:
        yield
    finally:
        _line, _voice = before


def speak(voice: str) -> None:
    """How much this command says: QUIET is warnings and results alone, VERBOSE what libraries say, too."""
    global _voice
    _voice = voice


def voice() -> str:
    """See `speak`."""
    return _voice


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
