"""Thousands of damaged run files, with a seed: each is read, or refused in a line, soon and in little memory."""

import io
import json
import random
import resource
import signal
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from run_folders import write_run

from moco_eval.errors import InputError
from moco_eval.papers import match, tables
from moco_eval.report.board import write_board
from moco_eval.report.page import _contents
from moco_eval.report.runs import read_runs
from moco_eval.results import run_directory, run_files
from moco_eval.results.compare import compare
from moco_eval.results.result import Result
from moco_eval.runtime import files

pytestmark = pytest.mark.slow
SEED, COUNT, SECONDS, MEMORY = 25, 5000, 10, 2 << 30
VALUES = [
    None,
    True,
    [],
    {},
    "",
    "x",
    "\x1b[31m",
    "\ud800",
    0,
    -1,
    2**63,
    10**30,
    1e308,
    -0.0,
    [[]],
    {"a": {}},
    "9" * 99,
]


@contextmanager
def bounded() -> Iterator[None]:
    """Within, the process may have so much address space more than it has, and each call ends in so many seconds."""
    size = 1024 * int(Path("/proc/self/status").read_text().partition("VmSize:")[2].split()[0])
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, _too_long)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, before[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def flipped(data: bytes, draw: random.Random) -> bytes:
    """Some bytes changed, cut, doubled or replaced by what means something to a parser."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at, kind = draw.randrange(len(data) + 1), draw.randrange(5)
        if kind == 0 and at < len(data):
            data[at] = draw.randrange(256)
        elif kind == 1:
            del data[at : at + draw.randrange(20)]
        elif kind == 2:
            data[at:at] = draw.choice(
                (b"[", b"{", b"&a ", b"*a ", b"9" * 30, b"-", b"\n", b"\0", b'"', b": ", b"\xff", b"1e999")
            )
        elif kind == 3:
            data[at:at] = data[at : at + draw.randrange(200)]
        else:
            data = data[: max(1, at)] if draw.random() < 0.2 else data
    return bytes(data)


def changed(value: object, draw: random.Random) -> object:
    """A value with one part of it replaced, somewhere."""
    if isinstance(value, dict | list) and value and draw.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key, copy = draw.choice(list(keys)), value.copy()
        if isinstance(copy, dict) and draw.random() < 0.1:
            copy[draw.choice(("mAP_" + "9" * 3, "a.b", "", "name"))] = copy.pop(key)
        else:
            copy[key] = changed(value[key], draw)
        return copy
    return draw.choice(VALUES)


def records(folder: Path, draw: random.Random) -> bytes:
    text = (folder / "result.json").read_bytes()
    if draw.random() < 0.4:
        return flipped(text, draw)
    return json.dumps(changed(json.loads(text), draw)).encode("utf-8", "surrogatepass")


def configs(folder: Path, draw: random.Random) -> bytes:
    return flipped((folder / "config.yaml").read_bytes() + b"b: &b [&c d, *c]\na: &a {x: [1, 2], y: *b}\n", draw)


def metrics(folder: Path, draw: random.Random) -> bytes:
    lines = [json.dumps({"step": n, "epoch": 1 + n / 20, "loss": 3.5}).encode() + b"\n" for n in range(24)]
    if draw.random() < 0.5:
        number = draw.randrange(24)
        lines[number] = json.dumps(changed(json.loads(lines[number]), draw)).encode("utf-8", "surrogatepass") + b"\n"
        return b"".join(lines)
    return flipped(b"".join(lines), draw)


def predictions(folder: Path, draw: random.Random) -> bytes:
    data = (folder / "predictions.npz").read_bytes()
    if draw.random() < 0.5:
        return flipped(data, draw)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name in draw.choice(
            (("label", "prediction"), ("label", "scores"), ("label",), ("label", "label", "prediction"))
        ):
            kind = draw.choice(("<i8", "<i8", "<f4", "|u1", "<U3", "|O", "<u8", "<c16", "|b1", "<U0"))
            shape = draw.choice(((50,), (1, 50), (50, 10), (1, 50, 10), (), (0,), (-1, -50), (10**15,), (1,) * 40))
            header = io.BytesIO()
            about = {"descr": kind, "fortran_order": draw.random() < 0.2, "shape": shape}
            np.lib.format.write_array_header_1_0(header, about)
            body = bytes(
                draw.randrange(256) if draw.random() < 0.1 else 0 for _ in range(draw.choice((0, 50, 400, 4000)))
            )
            archive.writestr(f"{name}.npy", header.getvalue() + body)
    return out.getvalue()


def read_evaluation(folder: Path, good: Path) -> None:
    """All that the commands do with a record: table, report, the page of all runs, compare, reading it in Python."""
    records = run_directory.read(folder)
    match.compare(tables.load_table("digits"), records)
    _contents(read_runs([folder, good]))
    write_board(good.parent, good.parent / "page.html")
    str(compare(folder, good))
    str(Result.read(folder))
    files.write_json(good.parent / "again.json", run_files.read_record(folder))


def read_pretraining(folder: Path, _: Path) -> None:
    _contents(read_runs([folder]))
    files.cut_lines(folder / "metrics.jsonl", "step", 12)


KINDS: dict[str, tuple[str, Callable[[Path, random.Random], bytes], Callable[[Path, Path], None]]] = {
    "record": ("result.json", records, read_evaluation),
    "config": ("config.yaml", configs, read_evaluation),
    "metrics": ("metrics.jsonl", metrics, read_pretraining),
    "predictions": ("predictions.npz", predictions, read_evaluation),
}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused(kind, tmp_path, monkeypatch, capfd):
    name, damage, read = KINDS[kind]
    draw, good, folder = random.Random(SEED), write_run(tmp_path / "good"), write_run(tmp_path / "bad" / "run")
    if kind == "metrics":
        (folder / "result.json").unlink()
        (folder / "config.yaml").write_text("command: pretrain\n")
    monkeypatch.setattr("moco_eval.results.compare.RESAMPLES", 20)  # what is read is the point
    monkeypatch.setattr("moco_eval.report.paired.RESAMPLES", 20)
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    with bounded():
        for number in range(COUNT):
            data = damage(good, draw)
            (folder / name).write_bytes(data)
            signal.alarm(SECONDS)
            start = time.monotonic()
            try:
                read(folder, good)
                outcomes["read"] += 1
            except InputError as error:
                assert "\n" not in str(error), (number, data, str(error))
                outcomes["refused"] += 1
            except Exception as error:
                raise AssertionError(f"input {number} of seed {SEED}: {data!r}") from error
            slowest = max(slowest, time.monotonic() - start)
    print(kind, dict(outcomes), f"slowest {slowest:.2f} s")
    assert outcomes["refused"] > COUNT / 10 and outcomes["read"]
