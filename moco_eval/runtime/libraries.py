"""What libraries say: not shown to the user of a command, but kept in the run's log; shown too where it is verbose."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

from moco_eval.runtime import command


@contextlib.contextmanager
def kept_quiet() -> Iterator[None]:
    """Within, Python's warnings and logging reach no terminal, unless the command is verbose or TORCH_LOGS asks.

    Logging is taken where records go to handlers: torch gives its loggers handlers of their own when it is imported.
    """
    before = warnings.showwarning, logging.Logger.callHandlers
    warnings.showwarning = _show  # type: ignore[assignment]
    if not os.environ.get("TORCH_LOGS"):
        logging.Logger.callHandlers = _log  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        warnings.showwarning, logging.Logger.callHandlers = before  # type: ignore[method-assign]


@contextlib.contextmanager
def silenced(*names: str) -> Iterator[None]:
    """Within, the loggers of these libraries say nothing of their attempts: what stopped one is said once, by us."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before):
            logger.setLevel(level)


def _log(_logger: logging.Logger, record: logging.LogRecord) -> None:
    if record.levelno >= logging.WARNING:
        _say(f"{record.name}: {record.getMessage()}")


def _show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
    _say(f"{category.__name__}: {message} ({filename}:{lineno})")


def _say(words: str) -> None:
    from moco_eval.runtime import console

    if command.voice() == command.VERBOSE:
        console.log(f"library: {words}")
    else:
        console.note(f"library: {words}")
