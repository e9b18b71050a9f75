"""One reader for the files of a run, whoever wrote them: every command refuses a bad one in the same line."""

import subprocess
import sys

import numpy as np
import pytest
from commands import environment, error_line
from run_folders import ANSWERS, RECORDS, bomb, changed, write_run

from moco_eval import limits
from moco_eval.errors import InputError
from moco_eval.papers import steps
from moco_eval.report import confusion
from moco_eval.report.runs import read_runs
from moco_eval.results import run_directory
from moco_eval.results.compare import read_run
from moco_eval.results.result import Result
from moco_eval.untrusted import npz


def confusion_of(folder):
    return confusion.count(read_runs([folder])[0])


def refusal(read, folder) -> str:
    with pytest.raises(InputError) as error:
        read(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", RECORDS)
def test_a_bad_record_is_refused_alike_by_all_that_read_it(name, tmp_path):
    damage, words = RECORDS[name]
    folder = write_run(tmp_path / "run")
    damage(folder)
    readers = (run_directory.read, run_directory.finished, read_run, Result.read, lambda path: read_runs([path]))
    said = {refusal(read, folder) for read in readers}
    assert len(said) == 1 and words in said.pop()


@pytest.mark.parametrize("name", ANSWERS)
def test_bad_answers_are_refused_alike_by_all_that_read_them(name, tmp_path):
    damage, words = ANSWERS[name]
    folder = write_run(tmp_path / "run")
    damage(folder)
    said = {refusal(read, folder) for read in (read_run, Result.read, confusion_of)}
    assert len(said) == 1 and words in said.pop()


@pytest.mark.parametrize(
    "command",
    [["table", "digits", "--runs"], ["reproduce", "digits", "--dry-run", "--runs"], ["report"], ["compare", "."]],
)
def test_one_bad_run_among_others_is_named_by_every_command(command, in_tmp, capfd, monkeypatch):
    write_run(in_tmp / "runs" / "good")
    RECORDS["aliases of aliases"][0](write_run(in_tmp / "runs" / "bad"))
    place = "runs/bad" if command[0] == "compare" else "runs"
    arguments = [place if word == "." else word for word in command]
    line = error_line(capfd, monkeypatch, *arguments, place)
    assert line.startswith("Error: runs/bad/config.yaml has ") and "leave that run out" in line


def test_an_honest_run_is_read(tmp_path):
    folder = write_run(tmp_path / "run")
    assert run_directory.read(tmp_path)[0]["metrics"] == {"top1": 80.0}
    assert Result.read(folder).predictions.shape == (50,) and len(read_runs([folder])) == 1


def test_a_record_of_another_program_is_passed_over(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "result.json").write_text('{"accuracy": 3}')
    assert run_directory.read(tmp_path) == []


def test_a_config_of_another_program_beside_checkpoints_is_passed_over_and_named(tmp_path, capfd):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("model: !!python/name:os.system\n")
    assert steps._finished(tmp_path) == []
    assert "no pretraining of ours" in capfd.readouterr().err


def test_many_classes_take_no_square_of_memory(tmp_path):
    folder = write_run(tmp_path / "run")
    changed(dataset__classes=50_000)(folder)
    (true, _, often), classes = confusion.count(read_runs([folder])[0])
    assert classes == 50_000 and often.sum() == 50 and len(true) == 20


def test_an_array_is_as_packed_as_honest_ones_at_most(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")
    monkeypatch.setattr(npz, "PACKED", 1 << 20)
    bomb(1 << 20)(folder)
    assert "has 1,018 times its packed bytes, and 100 are the most" in refusal(read_run, folder)
    monkeypatch.setitem(limits.LIMITS, "array", limits.Limit(100, "bytes", "array of a run (unpacked)"))
    assert "label.npy in " in refusal(read_run, folder)


def test_an_array_that_says_it_is_packed_less_than_it_is(tmp_path):
    """The packed bytes that the list of contents claims are not more than there are."""
    folder = write_run(tmp_path / "run")
    bomb(1 << 16)(folder)
    data = bytearray((folder / "predictions.npz").read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 20 : at + 24] = (1 << 30).to_bytes(4, "little")
    (folder / "predictions.npz").write_bytes(data)
    assert "predictions.npz cannot be read (prediction.npy is cut off)" in refusal(read_run, folder)


def test_scores_of_honest_size_are_read_as_they_are(tmp_path):
    folder = write_run(tmp_path / "run")
    kept = npz.read(folder / "predictions.npz")
    np.savez(folder / "predictions.npz", **kept, scores=np.ones((1, 50, 10), np.float32))
    assert Result.read(folder).scores.shape == (50, 10)


@pytest.mark.slow
def test_reading_bad_runs_takes_no_memory(tmp_path):
    """All of them in one process, which may have 1 GB of address space more than it starts with."""
    bad = RECORDS | ANSWERS | {"much of nothing": (bomb(10**8), "")}
    for number, (damage, _) in enumerate(bad.values()):
        damage(write_run(tmp_path / f"{number:02}"))
    script = """
import re, resource, sys
from pathlib import Path
from moco_eval.errors import InputError
from moco_eval.results.result import Result

def kilobytes(what):
    return int(re.search(rf"{what}:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

resource.setrlimit(resource.RLIMIT_AS, (1024 * kilobytes("VmSize") + (1 << 30),) * 2)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
before = kilobytes("VmRSS")
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        Result.read(path)
    except InputError as error:
        pass
    else:
        print(path, "was read")
print("MB", (kilobytes("VmHWM") - before) // 1024)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True, timeout=60)
    first, size = done.stdout.split()[:2]
    assert (first, done.stderr) == ("MB", "") and int(size) < 300, done.stdout + done.stderr
