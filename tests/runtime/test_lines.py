"""metrics.jsonl of a resumed run: a damaged line loses nothing, an unfinished last one is dropped and said."""

import pytest

from moco_eval.errors import InputError
from moco_eval.runtime import files

LINES = [f'{{"step": {step}, "loss": 1.50, "note": "ü"}}\n'.encode() for step in range(24)]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(LINES))
    return path


def test_a_resumed_run_keeps_its_lines_to_the_byte(path):
    files.cut_lines(path, "step", 9)
    assert path.read_bytes() == b"".join(LINES[:10])


@pytest.mark.parametrize(
    ("damaged", "trouble"),
    [
        (b'{"step": 3, "loss": 1.5]\n', "it is not JSON"),
        (b'{"stap": 3, "loss": 1.5}\n', "it has no step"),
        (b'{"step": "3"}\n', "its step is no number"),
        (b'{"step": true}\n', "its step is no number"),
        (b'{"step": NaN}\n', "its step is no number"),
        (b'{"step": ' + b"9" * 400 + b"}\n", "its step is endless"),
        (b'{"step": ' + b"9" * 5000 + b"}\n", "it is not JSON"),
        (b"[" * 10_000 + b"\n", "it is not JSON"),
        (b"3\n", "it has no step"),
        (b"[3]\n", "it has no step"),
        (b"null\n", "it has no step"),
        (b'{"step": 3, "note": "\xc3"}\n', "it is not JSON"),
        (b"\n", "it is not JSON"),
        (b"\0\0\0\n", "it is not JSON"),
    ],
)
@pytest.mark.parametrize("place", [3, 23])
def test_a_damaged_line_is_refused_and_the_file_stays(damaged, trouble, place, path):
    whole = b"".join((*LINES[:place], damaged, *LINES[place + 1 :]))
    path.write_bytes(whole)
    for read in (lambda: files.cut_lines(path, "step", 9), lambda: files.read_lines(path, "step")):
        with pytest.raises(
            InputError, match=rf"metrics\.jsonl line {place + 1} is damaged: {trouble}\. .*move the file"
        ):
            read()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("last", [b'{"step": 24, "lo', b'{"step": 24, "note": "\xc3', b"\0\0\0", b'{"st": 24}', b"{"])
def test_an_unfinished_last_line_is_dropped_and_said(last, path, capfd):
    path.write_bytes(b"".join(LINES) + last)
    assert len(files.read_lines(path, "step")) == 24
    files.cut_lines(path, "step", 100)
    assert path.read_bytes() == b"".join(LINES)
    assert f"its last line was cut off in writing, and is left out: {len(last)} bytes" in capfd.readouterr().err


def test_a_last_line_that_lacks_its_newline_alone_stays(path, capfd):
    path.write_bytes(b"".join(LINES)[:-1])
    files.cut_lines(path, "step", 100)
    assert path.read_bytes() == b"".join(LINES) and not capfd.readouterr().err


def test_no_file_is_no_line(tmp_path):
    assert files.read_lines(tmp_path / "metrics.jsonl", "step") == []
    files.cut_lines(tmp_path / "metrics.jsonl", "step", 3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
