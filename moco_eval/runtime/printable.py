"""Text that a terminal shows as it is, and commands that a shell reads as they are meant, whatever names hold."""

import codecs
import contextlib
import io
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from typing import Any

# What moves the cursor, colours, renames the window, clears the screen, or turns the order of letters; lone halves of
# surrogate pairs are bytes that are no UTF-8. Tab and newline stay.
CONTROLS = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but for tab and newline, delete, C1
    "\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff"  # bidirectional and invisible ones
    "\u2028\u2029\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f"
)
CONTROL = re.compile(f"[{CONTROLS}]")


def printable(text: str) -> str:
    """The text with control characters as backslashes: ESC becomes \\x1b. Lines and tabs stay."""
    return text if text.isascii() and text.isprintable() else CONTROL.sub(_escaped, text)


def one_line(text: str) -> str:
    """The same on one line: a newline becomes \\n, a tab \\t."""
    return printable(text).replace("\n", r"\n").replace("\t", r"\t")


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def shell_join(words: Iterable[str]) -> str:
    """A command line for a POSIX shell. Printed, it holds no control character, and no byte that is no UTF-8."""
    return " ".join(map(shell_quoted, words))


def shell_quoted(word: str) -> str:
    """One word for a POSIX shell; control characters in it are made by its printf."""
    parts = re.split(f"([{CONTROLS}]+)", word)
    quoted = [_by_printf(part) if number % 2 else shlex.quote(part) for number, part in enumerate(parts) if part]
    return "".join(quoted) or "''"


def _by_printf(controls: str) -> str:
    octal = "".join(f"\\{byte:03o}" for byte in controls.encode("utf-8", "surrogateescape"))
    return f"\"$(printf '{octal}')\""


class PrintableStream(io.TextIOWrapper):
    """A standard stream of a command: whatever is written to it holds no control characters.

    rich, which draws bars, finds the stream itself under `rich_proxied_file`; its words are made printable before.
    """

    def __init__(self, stream: io.TextIOWrapper):
        encoding = "utf-8" if codecs.lookup(stream.encoding).name == "ascii" else stream.encoding  # as click has it
        super().__init__(
            stream.buffer,
            encoding,
            "backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        self.rich_proxied_file: Any = stream

    def write(self, text: str) -> int:
        super().write(printable(text))
        return len(text)


@contextlib.contextmanager
def printable_streams() -> Iterator[None]:
    """Within, stdout and stderr take no control characters."""
    before = sys.stdout, sys.stderr
    wrapped = [PrintableStream(stream) if isinstance(stream, io.TextIOWrapper) else stream for stream in before]
    sys.stdout, sys.stderr = wrapped
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in wrapped:
            if isinstance(stream, PrintableStream):
                with contextlib.suppress(BrokenPipeError):  # whoever read it has gone
                    stream.detach()
