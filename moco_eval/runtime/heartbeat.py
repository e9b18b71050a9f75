"""A command's signs of life: a thread that looks whether too long nothing was said. Light: it waits for the console."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator

EVERY = 1.0  # seconds between two looks


@contextlib.contextmanager
def signs_of_life() -> Iterator[None]:
    """Within, `console.beat` is called again and again, once something has imported the console."""
    over, since = threading.Event(), time.monotonic()
    if console := sys.modules.get("moco_eval.runtime.console"):
        console.begin()

    def watch() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})  # for the main thread
        while not over.wait(EVERY):
            beat = getattr(sys.modules.get("moco_eval.runtime.console"), "beat", None)
            if beat:
                beat(since)

    thread = threading.Thread(target=watch, name="signs of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
