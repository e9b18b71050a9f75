"""A run directory: one command at a time, held until the end whatever the end is; and a record that is its own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from commands import environment, error_line, in_process, moco_eval, start

import moco_eval as me
from moco_eval.errors import InputError
from moco_eval.results.run_directory import open_run
from moco_eval.runtime import files, lock

HOLD = """
import multiprocessing, sys, time
from pathlib import Path
from moco_eval.runtime.lock import alone

def fork():
    print("held", flush=True)  # by now it has closed its copies
    time.sleep(60)

with alone(Path(sys.argv[1])):
    multiprocessing.get_context("fork").Process(target=fork).start()
    time.sleep(60)
"""
KNN = ["knn", "pixels", "--dataset", "digits", "--protocol", "digits"]


def holding(folder: Path) -> subprocess.Popen:
    """A process, with a fork of its own, that holds a folder."""
    command = [sys.executable, "-c", HOLD, folder]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment(), text=True, start_new_session=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen) -> None:
    """And of its fork."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def holder(tmp_path_factory):
    """The process id, and a folder that it holds."""
    folder = tmp_path_factory.mktemp("held") / "run"
    process = holding(folder)
    yield process.pid, folder
    end(process)


def test_a_held_folder_is_refused_and_the_holder_named(holder):
    pid, folder = holder
    refused = pytest.raises(InputError, match=rf"run is in use by a Python program \(process {pid} on .*wait")
    with refused, lock.alone(folder):
        pass


def test_a_kill_leaves_no_lock_behind_though_a_fork_lives_on(tmp_path):
    process = holding(tmp_path / "run")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / "run" / lock.NAME).is_file()
    with lock.alone(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / "run" / lock.NAME).read_text()
    assert not list((tmp_path / "run").iterdir())
    end(process)


def test_tasks_of_one_srun_are_told_how_to_be_one_run(holder, monkeypatch):
    _, folder = holder
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    refused = pytest.raises(InputError, match=r"srun has started 8 separate commands: take .*--nproc N")
    with refused, lock.alone(folder):
        pass


@pytest.mark.parametrize("kind", ["knn", "pretrain", "detect", "suite"])
def test_every_command_refuses_a_folder_that_another_works_in(kind, holder, tmp_path, capfd, monkeypatch):
    pid, folder = holder
    commands = {
        "knn": KNN,
        "pretrain": ["pretrain", "digits", "--dataset", "digits"],
        "detect": ["detect", "random:resnet18_quarter", "--dataset", "digits", "--engine", "torchvision"],
        "suite": ["suite", "pixels", "--dataset", "digits", "--tasks", "knn", "--cache", tmp_path / "cache"],
    }
    before = set(folder.iterdir())
    words = error_line(capfd, monkeypatch, *commands[kind], "--output", folder)
    assert f"run is in use by a Python program (process {pid} on" in words
    assert set(folder.iterdir()) == before


def test_two_threads_of_one_process(tmp_path):
    """The second of two judgements into one folder is refused; the first is what is kept."""
    train, test = me.images("digits")
    encoder, refusals, inside = me.load("pixels"), [], threading.Event()

    def second() -> None:
        inside.wait(60)
        try:
            me.judge(encoder, train, test, "knn/digits", output=tmp_path / "run", k=3)
        except ValueError as error:
            refusals.append(str(error))

    thread = threading.Thread(target=second)
    thread.start()
    with lock.alone(tmp_path / "run"):
        inside.set()
        thread.join()
    assert re.match(r"output .*run is in use by (a Python program|another command) \(process \d+", refusals[0])
    assert not list((tmp_path / "run").iterdir())


def test_the_lock_is_held_from_the_first_byte_to_the_last(tmp_path):
    resolved = {"config": {"seed": 0}}
    refused = pytest.raises(InputError, match="is in use by")
    with open_run(tmp_path / "run", resolved), refused, open_run(tmp_path / "run", resolved):
        pass
    with open_run(tmp_path / "run", resolved) as is_there:
        assert not is_there  # config.yaml and environment.json alone are a run that did nothing yet


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capfd):
    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with lock.alone(tmp_path / "run"):
        pass
    assert "has no locks (No locks available)" in capfd.readouterr().err


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / lock.NAME).symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match="cannot write"), lock.alone(tmp_path / "run"):
        pass
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A finished kNN run of k 20."""
    folder = tmp_path_factory.mktemp("done") / "run"
    me.judge(me.load("pixels"), *me.images("digits"), "knn/digits", output=folder, cache=folder.parent / "cache")
    return folder


def test_a_finished_run_is_not_done_again(done, capfd, monkeypatch):
    result = (done / "result.json").read_bytes()
    _, err = in_process(capfd, monkeypatch, *KNN, "--output", done, "--cache", done.parent / "cache")
    assert "already done" in err and (done / "result.json").read_bytes() == result


@pytest.mark.parametrize(
    ("words", "place", "value"),
    [
        ("protocol", ("protocol",), "knn/other@1"),
        ("data set's fingerprint", ("dataset", "fingerprint"), "0" * 64),
        ("encoder's sha256", ("encoder", "sha256"), "0" * 64),
        ("seeds", ("trials", 0, "seed"), 5),
        ("settings", ("deviations",), ["k 3 instead of 20"]),
    ],
)
def test_a_record_of_another_run_is_refused(words, place, value, done, tmp_path, capfd, monkeypatch):
    shutil.copytree(done, tmp_path / "run")
    record = json.loads((done / "result.json").read_text())
    inner = record
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (tmp_path / "run" / "result.json").write_text(json.dumps(record))
    line = error_line(capfd, monkeypatch, *KNN, "--output", tmp_path / "run", "--cache", done.parent / "cache")
    assert f"result.json is of another run than config.yaml beside it: its {words} is" in line


@pytest.mark.slow
def test_two_at_once_leave_the_run_of_one(tmp_path):
    settings = ["--set", "schedule.epochs=60", "--set", "schedule.milestones=[20, 40]"]
    one = ["linear", "pixels", "--dataset", "digits", "--protocol", "quick", *settings, "--cache", tmp_path / "cache"]
    output = ["--output", tmp_path / "run"]
    processes = [start(*one, *output, "--set", f"optimizer.lr={rate}") for rate in (1, 3)]
    ends = [(process.communicate(timeout=200)[1], process.returncode) for process in processes]
    assert sorted(code for _, code in ends) == [0, 2]
    assert "is in use by another command (process" in next(err for err, code in ends if code == 2)
    rate = "1.0" if ends[0][1] == 0 else "3.0"
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert f"    lr: {rate}" in (tmp_path / "run" / "config.yaml").read_text()
    assert f"optimizer.lr {rate} instead of" in " ".join(record["deviations"])


def test_linked_folders_are_looked_into_once(tmp_path):
    """A run, a folder of runs, a link back up, one that leads nowhere; a run below both is there by its own path."""
    runs, elsewhere = tmp_path / "runs", tmp_path / "elsewhere"
    for folder in (runs / "own", elsewhere / "one", elsewhere / "several" / "two"):
        folder.mkdir(parents=True)
        (folder / "result.json").write_text("{}")
    for name, target in {
        "a": runs / "own",
        "linked": elsewhere / "one",
        "more": elsewhere / "several",
        "up": runs,
        "gone": tmp_path / "nothing",
    }.items():
        (runs / name).symlink_to(target)
    assert files.folders_with(runs, "result.json") == [runs / "linked", runs / "more" / "two", runs / "own"]
    assert files.folders_with(runs / "linked", "result.json") == [runs / "linked"]


def test_a_folder_whose_name_is_no_text(tmp_path, monkeypatch):
    """On a terminal that takes UTF-8 alone."""
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    output = os.fsdecode(os.fsencode(tmp_path) + b"/run\xff")
    out, _ = moco_eval(*KNN, "--output", output, "--dry-run")
    assert "run\\udcff" in out
