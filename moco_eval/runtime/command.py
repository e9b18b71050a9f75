"""Whether this process is a command of ours, or a guest in somebody's program, where it must surprise nobody.

A command takes the signals, shows its progress and writes its command line into records; a guest does none of these.
"""

_line: str | None = None


def begin(line: str) -> None:
    """This process is a command; `line` is what one types to run it."""
    global _line
    _line = line


def line() -> str | None:
    """The command line of this process; None in a library."""
    return _line


def is_command() -> bool:
    """Whether the process is ours."""
    return _line is not None
