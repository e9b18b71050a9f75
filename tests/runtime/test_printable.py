"""What we print is text: no control character reaches a terminal, and a shell reads a command as it is meant."""

import io
import subprocess
import sys

import pytest
from commands import in_process

from moco_eval.runtime import console
from moco_eval.runtime.printable import one_line, printable, printable_streams, shell_join

HOSTILE = "a\x1b]0;title\x07b\x1b[31mc\x9b2Jd\re\u202ef\u2066g\udcff"


def test_control_characters_are_shown_as_backslashes():
    assert printable(HOSTILE) == r"a\x1b]0;title\x07b\x1b[31mc\x9b2Jd\re\u202ef\u2066g\udcff"
    assert printable("ü → ± 日本\t\n") == "ü → ± 日本\t\n" and one_line("a\nb\tc") == r"a\nb\tc"


WORDS = [
    "a b",
    "$(touch X)",
    "`id`",
    "it's",
    'say "x"',
    "two\nlines",
    "-n",
    "",
    "*",
    "~",
    "\\",
    "%s%n",
    HOSTILE,
    "end\n",
]


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_a_shell_reads_the_words_as_they_are(shell, tmp_path):
    line = shell_join([sys.executable, "-c", "import os, sys; print(ascii(sys.argv[1:]))", *WORDS])
    assert printable(line) == line
    done = subprocess.run([shell, "-c", line], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == ascii(WORDS) + "\n" and not list(tmp_path.iterdir())


def test_plain_words_stay_plain():
    assert shell_join(["moco-eval", "knn", "x.pth", "--set", "a=1 b"]) == "moco-eval knn x.pth --set 'a=1 b'"


def test_standard_streams_of_a_command_take_no_control_characters(capfd, monkeypatch):
    _, err = in_process(capfd, monkeypatch, "report", HOSTILE, code=2)
    assert err.count("\n") == 1 and printable(err) == err and r"a\x1b]0;title\x07b" in err
    with printable_streams():
        print(HOSTILE)
        print(HOSTILE, file=sys.stderr)
    assert capfd.readouterr() == (f"{printable(HOSTILE)}\n",) * 2


def test_the_name_of_a_folder_in_every_output(in_tmp, capfd, monkeypatch, quick_probe):
    runs = in_tmp / "x\x1b[31m\n\u202e$(id)"
    runs.mkdir()
    for form in ("text", "markdown", "csv", "latex", "html"):
        out, err = in_process(capfd, monkeypatch, "table", "digits", "--runs", runs, "--format", form)
        assert printable(out + err) == out + err and "x" in out


def test_warnings_and_bars_are_text(capfd):
    console.warn(f"{HOSTILE}\nError: no")
    with console.progress(HOSTILE, 2) as advance:
        advance(note=HOSTILE)
    err = capfd.readouterr().err
    assert printable(err) == err and err.count("\n") == 1
    console.tell("runs/:x: [red]")
    assert capfd.readouterr().err == "runs/:x: [red]\n"


def test_bars_are_drawn_on_a_terminal_all_the_same(monkeypatch):
    """rich writes its own control characters to the stream behind ours, also while it stands in for stderr."""
    behind = io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(sys, "stderr", behind)
    monkeypatch.setattr(console.console, "_force_terminal", True)
    with printable_streams(), console.progress("\x1b]0;title", 2) as advance:
        advance(note="[red]note")
        print("\x1b[31mred", file=sys.stderr)
    behind.flush()
    drawn = behind.buffer.getvalue().decode()
    assert "\x1b[" in drawn and "\x1b]0;" not in drawn and r"\x1b]0;title" in drawn and "[red]note" in drawn
