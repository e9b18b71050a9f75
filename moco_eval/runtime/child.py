"""A command of ours in a process of its own: signals are passed on to it, and it is waited for."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from moco_eval.runtime.command import exit_code

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def run(arguments: Sequence[str], keep: Sequence[int] = ()) -> tuple[int, bool]:
    """Run `moco-eval ARGUMENTS` to its end: its exit code, and whether we were told to stop.

    What it prints goes to stderr: stdout belongs to this command.

    Args:
        keep: file descriptors that the process inherits.
    """
    told: list[int] = []
    process: subprocess.Popen | None = None

    def pass_on(number: int, _frame: object) -> None:
        told.append(number)
        if process and not (number == signal.SIGINT and _is_typed()):
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        process = subprocess.Popen([sys.executable, "-m", "moco_eval", *arguments], stdout=2, pass_fds=keep)
        if told:  # before there was a process
            process.send_signal(told[0])
        return exit_code(process), bool(told)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_typed() -> bool:
    """Whether a SIGINT is a Ctrl-C in the terminal, which the process has got as well: a second would break it off."""
    try:
        with Path("/dev/tty").open() as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False
