"""Regular files only, and of a size."""

import os
import re
import socket

import pytest
from commands import ROOT

from moco_eval import limits
from moco_eval.errors import InputError


def test_the_table_in_the_docs_is_the_table_of_the_code():
    text = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| ([\d,]+) (.+?) \|$", text, flags=re.M)
    said = {name: limits.Limit(int(most.replace(",", "")), unit, of) for name, of, most, unit in rows}
    assert said == limits.LIMITS


def test_what_is_no_regular_file_is_never_opened(tmp_path, monkeypatch):
    pipe, door, link = tmp_path / "pipe", tmp_path / "door", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(tmp_path)  # the path of a socket must be short
        listening.bind("door")
        for path, kind in ((pipe, "a named pipe"), (door, "a socket"), (link, "a device"), (tmp_path, "a folder")):
            with pytest.raises(InputError, match=rf"{path} is {kind}, not a regular file"):
                limits.read_bytes(path, "yaml")


def test_a_file_of_exactly_the_limit_is_read_and_one_byte_more_is_not(tmp_path, monkeypatch):
    monkeypatch.setitem(limits.LIMITS, "yaml", limits.Limit(10, "bytes", "YAML file"))
    path = tmp_path / "a.yaml"
    path.write_bytes(b"0123456789")
    assert limits.read_bytes(path, "yaml") == b"0123456789"
    path.write_bytes(b"0123456789a")
    with pytest.raises(InputError, match=r"a.yaml has 11 bytes, and 10 are the most .*MOCO_EVAL_LIMITS=N"):
        limits.read_bytes(path, "yaml")
    monkeypatch.setenv("MOCO_EVAL_LIMITS", "1.1")
    assert limits.read_bytes(path, "yaml") == b"0123456789a"


def test_a_file_that_says_it_is_empty_is_read_no_further_than_the_limit(monkeypatch):
    """As those of /proc do."""
    whole = limits.read_bytes("/proc/self/status", "yaml")
    assert whole.startswith(b"Name:")
    monkeypatch.setitem(limits.LIMITS, "yaml", limits.Limit(10, "bytes", "YAML file"))
    with pytest.raises(InputError, match="has 11 bytes"):
        limits.read_bytes("/proc/self/status", "yaml")


@pytest.mark.parametrize("text", ["x", "0.5", "nan", "inf", ""])
def test_a_factor_that_is_no_number_of_at_least_one_is_refused(text, monkeypatch):
    monkeypatch.setenv("MOCO_EVAL_LIMITS", text)
    with pytest.raises(InputError, match=r"MOCO_EVAL_LIMITS is .* must be a number of at least 1"):
        limits.factor()
