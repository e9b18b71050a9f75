"""The three ways a command ends other than well; the command line gives each its exit code."""


class InputError(ValueError):
    """What the user gave is wrong: the message says what happened, the value, the way out. Exit code 2.

    `told`: another process says it.
    """

    told = False


class RunFailed(RuntimeError):
    """The run itself failed (a loss that is not finite, too many unreadable images). Exit code 1."""


class Interrupted(Exception):
    """Stopped by Ctrl-C, SIGTERM or SIGUSR1 with its state saved; run again to go on. Exit code 3."""


def message_of(error: Exception) -> str:
    """What an error says; of one that a loader process sent along with its traceback, the last line."""
    text = str(error).strip()
    return text.splitlines()[-1].partition(": ")[2] if text.startswith("Caught ") else text


def memory_of(error: Exception) -> str:
    """What torch says of a device whose memory is full, without its long advice: that it is, and what was asked for."""
    return ". ".join(str(error).split(". ")[:2]).rstrip(".")
