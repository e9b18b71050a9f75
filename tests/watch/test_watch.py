"""`watch` on folders in which files are written, half written, overwritten, deleted.

The suite itself is pretended, but for the slow tests of the whole.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import network
from commands import ROOT, environment, error_line, in_process, moco_eval, start
from pretend_slurm import run_jobs

from moco_eval.cli import watch as cli_watch
from moco_eval.cli.main import cli
from moco_eval.errors import InputError, Interrupted
from moco_eval.watch import checkpoints, watch
from moco_eval.watch.checkpoints import position
from moco_eval.watch.curve import Point, curve_of


@pytest.fixture
def trainer(tmp_path) -> Path:
    folder = tmp_path / "train"
    (folder / "checkpoints").mkdir(parents=True)
    return folder


class Suite:
    """In the place of `moco-eval suite`: writes a record whose top1 is the length of what it was given."""

    def __init__(self, monkeypatch):
        self.judged: list[str] = []
        self.code, self.told = 0, False
        monkeypatch.setattr(watch.child, "run", self.run)
        monkeypatch.setattr("moco_eval.watch.curve.run_files.read_record", self.record)

    def run(self, arguments):
        data = Path(arguments[1]).read_bytes()
        self.judged.append(data.decode())
        if data == b"half" or self.code:
            return self.code or 2, self.told
        place = Path(arguments[arguments.index("--output") + 1]) / "knn-instdisc"
        place.mkdir(parents=True)
        (place / "result.json").write_text(str(len(data)))
        return 0, False

    def record(self, place):
        top1 = float((place / "result.json").read_text())
        encoder = {"sha256": "0" * 64}
        return {"protocol": "knn/instdisc@1", "metrics": {"top1": top1}, "interval": {}, "encoder": encoder}


def watched(folder: Path, *arguments: str) -> watch.Watch:
    return watch.Watch(folder, folder / "watch", arguments, (), every=0.01)


def once(folder: Path) -> list[dict]:
    return watch.watch(watched(folder), once=True, patience=None).lines()


def test_every_checkpoint_is_judged_once_under_its_first_name(trainer, monkeypatch):
    suite = Suite(monkeypatch)
    for epoch in (10, 2, 1):
        (trainer / f"checkpoints/epoch_{epoch:04d}.pth").write_bytes(b"x" * epoch)
    shutil.copyfile(trainer / "checkpoints/epoch_0010.pth", trainer / "checkpoints/last.pth")
    lines = once(trainer)
    assert [(line["epoch"], line["metrics"]["top1"]) for line in lines] == [(1, 1.0), (2, 2.0), (10, 10.0)]
    assert once(trainer) == lines and len(suite.judged) == 3
    assert [json.loads(line) for line in (trainer / "watch/curve.jsonl").read_text().splitlines()] == lines
    assert not list((trainer / "watch/.snapshots").iterdir())


def test_what_is_half_written_waits_and_is_judged_when_it_is_whole(trainer, monkeypatch):
    suite, path = Suite(monkeypatch), trainer / "model_1.pth"
    path.write_bytes(b"half")
    assert once(trainer) == [] and suite.judged == ["half"]
    assert once(trainer) == [] and suite.judged == ["half"]  # refused once
    path.write_bytes(b"whole")
    assert [line["metrics"]["top1"] for line in once(trainer)] == [5.0]
    assert suite.judged == ["half", "whole"]


def test_a_file_that_grows_from_look_to_look_is_left_alone(trainer, monkeypatch):
    Suite(monkeypatch)
    look, path = watched(trainer), trainer / "a_1.pth"
    for size in (1, 2, 3):
        path.write_bytes(b"x" * size)
        assert look.whole() == []
    assert look.whole() == [path]


def test_a_file_that_vanishes_or_changes_under_the_copy_is_looked_at_again(trainer, monkeypatch):
    suite, look, path = Suite(monkeypatch), watched(trainer), trainer / "a_1.pth"
    path.write_bytes(b"abc")
    look.whole(), look.whole()
    path.unlink()
    assert look.judge(path) is None and suite.judged == []
    path.write_bytes(b"abcd")
    copied = checkpoints._copied

    def slow(source, copy):
        digest = copied(source, copy)
        source.write_bytes(b"abcde")
        return digest

    look.states = checkpoints.look(trainer, look.output)
    monkeypatch.setattr(checkpoints, "_copied", slow)
    assert look.judge(path) is None and suite.judged == []
    monkeypatch.setattr(checkpoints, "_copied", copied)
    assert [line["metrics"]["top1"] for line in once(trainer)] == [5.0]


def test_what_failed_is_tried_again_by_the_next_watch_and_not_by_this_one(trainer, monkeypatch):
    suite = Suite(monkeypatch)
    (trainer / "a_1.pth").write_bytes(b"1")
    suite.code = 1
    assert once(trainer) == [] and suite.judged == ["1"]
    suite.code = 0
    assert [line["metrics"]["top1"] for line in once(trainer)] == [1.0]


def test_a_damaged_memory_is_refused(trainer, monkeypatch):
    Suite(monkeypatch)
    once(trainer)
    for known in ("[]", '{"a": [1]}', '{"a": 3}'):
        (trainer / "watch/checkpoints.json").write_text(f'{{"arguments": "", "known": {known}}}')
        with pytest.raises(InputError, match="is damaged; remove it"):
            watched(trainer)


def test_suite_takes_every_option_that_is_handed_on(tmp_path):
    """And what moves a number is among those by which one watch is told from another."""
    options = {one for parameter in cli.commands["suite"].params for one in parameter.opts}
    words = {f"--{name.replace('_', '-')}" for name in (*cli_watch.HANDED_ON, *cli_watch.OF_MACHINE)}
    assert words | {"--tasks", "--pixels", "--output", "--cache"} <= options
    assert {"precision", "seed"} <= {*cli_watch.HANDED_ON}


def test_wrong_data_or_tasks_are_refused_before_any_checkpoint(trainer, capfd, monkeypatch):
    for words, message in (
        (("--dataset", "nosuch"), "nosuch"),
        (("--dataset", "digits", "--tasks", "nosuch"), "nosuch"),
    ):
        assert message in error_line(capfd, monkeypatch, "watch", trainer, *words)
    assert not (trainer / "watch").exists()


def test_a_deleted_checkpoint_stays_on_the_curve(trainer, monkeypatch):
    suite = Suite(monkeypatch)
    for step in (100, 200):
        (trainer / f"step={step}.ckpt").write_bytes(b"x" * step)
        lines = once(trainer)
        (trainer / f"step={step}.ckpt").unlink()
    assert [line["step"] for line in lines] == [100, 200] and len(suite.judged) == 2
    assert once(trainer) == lines


def test_stopped_it_goes_on_and_repeats_nothing(trainer, monkeypatch):
    suite = Suite(monkeypatch)
    (trainer / "a_1.pth").write_bytes(b"1")
    once(trainer)
    (trainer / "a_2.pth").write_bytes(b"22")
    suite.code, suite.told = 3, True
    with pytest.raises(Interrupted, match=r"stopped at a_2\.pth; run the same command to go on"):
        once(trainer)
    suite.code, suite.told = 0, False
    assert [line["metrics"]["top1"] for line in once(trainer)] == [1.0, 2.0]
    assert suite.judged == ["1", "22", "22"]


def test_other_arguments_are_another_watch(trainer, monkeypatch):
    Suite(monkeypatch)
    (trainer / "a_1.pth").write_bytes(b"1")
    watch.watch(watched(trainer, "--tasks", "knn"), once=True, patience=None)
    with pytest.raises(InputError, match="holds a watch with --tasks knn, and now it is --tasks quick; choose another"):
        watched(trainer, "--tasks", "quick")


def test_the_watch_ends_after_its_patience(trainer, monkeypatch):
    Suite(monkeypatch)
    assert watch.watch(watched(trainer), once=False, patience=0.05).points == ()


def test_no_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="is no folder; give the one in which checkpoints appear"):
        watched(tmp_path / "missing")


def test_only_what_may_be_a_checkpoint_is_looked_at(trainer):
    names = ("a.pth", "b.ckpt", "checkpoint-5/model.safetensors", "c.pth.tar", "d.txt", ".e.pth", "watch/f.pth")
    for name in (*names, "1/2/3/g.pt", "1/2/3/4/h.pt"):
        (trainer / name).parent.mkdir(parents=True, exist_ok=True)
        (trainer / name).write_bytes(b"x")
    (trainer / "empty.pth").touch()
    seen = {path.relative_to(trainer).as_posix() for path in checkpoints.look(trainer, trainer / "watch")}
    assert seen == {"a.pth", "b.ckpt", "checkpoint-5/model.safetensors", "c.pth.tar", "1/2/3/g.pt"}


def test_settings_files_go_with_the_copy(trainer):
    (trainer / "model.safetensors").write_bytes(b"x")
    (trainer / "config.json").write_text("{}")
    copy = checkpoints.snapshot(trainer / "model.safetensors", trainer, trainer / "watch")
    assert (copy.path.parent / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("checkpoints/epoch_0020.pth", ("epoch", 20)),
        ("epoch=3-step=1200.ckpt", ("step", 1200)),
        ("checkpoint_0199.pth.tar", ("number", 199)),
        ("checkpoint-500/model.safetensors", ("number", 500)),
        ("resnet50_ep12.pt", ("epoch", 12)),
        ("last.pth", None),
    ],
)
def test_where_a_name_puts_a_checkpoint(name, place):
    assert position(name) == place


def test_names_of_several_kinds_are_put_in_the_order_of_writing():
    points = [Point("epoch_2.pth", 20, {}), Point("last.pth", 30, RESULTS), Point("epoch_9.pth", 10, {})]
    curve = curve_of(points)
    assert curve.unit == "order" and [point.written for _, point in curve.points] == [10, 20, 30]
    assert [(line["order"], line["checkpoint"]) for line in curve.lines()] == [(3, "last.pth")]


RESULTS = {"knn/instdisc@1": {"metrics": {"top1": 1.0}, "interval": {}, "encoder": {"sha256": "0" * 64}}}


@pytest.mark.parametrize(
    ("points", "unit", "places"),
    [
        ({"epoch_0002.pth": {"epoch": 7}, "last.pth": {"epoch": 3, "step": 60}}, "epoch", [2, 3]),
        ({"epoch=1-step=50.ckpt": {}, "last.ckpt": {"step": 70, "epoch": 1}}, "step", [50, 70]),
        ({"checkpoint_0199.pth.tar": {"epoch": 200}, "last.pth": {"epoch": 201}}, "epoch", [200, 201]),
        ({"best.pth": {"step": 9}, "last.pth": {"step": 5}}, "step", [5, 9]),
        ({"model_1.pth": {}, "last.pth": {"epoch": 3}}, "order", [1, 2]),
    ],
)
def test_a_name_without_a_number_is_placed_by_what_stands_in_the_file(points, unit, places):
    curve = curve_of([Point(name, written, {}, stored) for written, (name, stored) in enumerate(points.items())])
    assert curve.unit == unit and [x for x, _ in curve.points] == places


@pytest.mark.parametrize(
    ("held", "stored"),
    [
        ({"epoch": 3, "state_dict": {}}, {"epoch": 3}),
        ({"epoch": 3, "global_step": 120, "iter": 7}, {"epoch": 3, "step": 120}),
        ({"meta": {"epoch": 4, "iter": 80}}, {"epoch": 4, "step": 80}),
        ({"epoch": True, "step": -1, "iteration": 1.5}, {}),
    ],
)
def test_the_step_and_epoch_in_a_checkpoint(held, stored, tmp_path):
    torch.save({"weight": torch.zeros(2), **held}, tmp_path / "a.pth")
    assert checkpoints.stored_position(tmp_path / "a.pth") == stored


def test_what_cannot_be_read_stores_no_place(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"half")
    assert checkpoints.stored_position(tmp_path / "a.pth") == {}


def test_one_file_that_is_overwritten_makes_a_curve(trainer, monkeypatch):
    suite = Suite(monkeypatch)
    monkeypatch.setattr(checkpoints, "stored_position", lambda path: {"epoch": path.stat().st_size})
    for size in (3, 1, 2):
        (trainer / "last.pth").write_bytes(b"x" * size)
        lines = once(trainer)
    assert [(line["epoch"], line["checkpoint"], line["metrics"]["top1"]) for line in lines] == [
        (1, "last.pth", 1.0), (2, "last.pth", 2.0), (3, "last.pth", 3.0),
    ]  # fmt: skip
    assert once(trainer) == lines and len(suite.judged) == 3


# SLURM


class Queue:
    """In the place of SLURM: jobs wait until they are run, by what `Suite` does."""

    def __init__(self, monkeypatch):
        self.jobs: dict[Path, watch.slurm.Job] = {}
        monkeypatch.setattr(watch.slurm, "check", lambda *_: None)
        monkeypatch.setattr(watch.slurm, "submit_one", self.submit)
        monkeypatch.setattr(watch.slurm, "states", lambda _: dict.fromkeys(self.jobs, "job 1, pending"))

    def submit(self, job, output, runs, given):
        self.jobs[output] = job
        return "1"

    def run(self, suite):
        for output, job in [*self.jobs.items()]:
            code, _ = suite.run(job.arguments)
            job.ended.parent.mkdir(exist_ok=True)
            job.ended.write_text(f"{code}\n")
            del self.jobs[output]


def submitted(folder: Path) -> list[dict]:
    look = watch.Watch(folder, folder / "watch", (), (), every=0.01, sbatch=())
    return watch.watch(look, once=True, patience=None).lines()


def test_as_jobs_it_is_the_same_curve_and_nothing_is_submitted_twice(trainer, monkeypatch):
    suite, queue = Suite(monkeypatch), Queue(monkeypatch)
    (trainer / "a_1.pth").write_bytes(b"1")
    assert submitted(trainer) == [] and suite.judged == [] and len(queue.jobs) == 1
    (trainer / "a_1.pth").unlink()  # its copy waits with the job
    (trainer / "a_2.pth").write_bytes(b"22")
    assert submitted(trainer) == [] and len(queue.jobs) == 2
    queue.run(suite)
    lines = submitted(trainer)
    assert [(line["number"], line["metrics"]["top1"]) for line in lines] == [(1, 1.0), (2, 2.0)]
    assert submitted(trainer) == lines == once(trainer) and suite.judged == ["1", "22"] and not queue.jobs
    assert not list((trainer / "watch/.snapshots").iterdir()) and not list((trainer / "watch/slurm").iterdir())


def test_a_job_that_fails_or_is_cancelled_is_submitted_again_by_the_next_watch(trainer, monkeypatch):
    suite, queue = Suite(monkeypatch), Queue(monkeypatch)
    (trainer / "a_1.pth").write_bytes(b"1")
    submitted(trainer)
    suite.code = 1
    queue.run(suite)
    assert submitted(trainer) == [] and not queue.jobs
    submitted(trainer)
    assert len(queue.jobs) == 1
    queue.jobs.clear()  # scancel
    look = watch.Watch(trainer, trainer / "watch", (), (), every=0.01, sbatch=())
    assert list(look.ended()) == [] and look.memory.waiting  # it may be about to tell
    assert list(look.ended()) == [] and not look.memory.waiting
    suite.code = 0
    submitted(trainer)
    queue.run(suite)
    assert [line["metrics"]["top1"] for line in submitted(trainer)] == [1.0]


def test_a_checkpoint_that_a_job_refuses_is_refused_once(trainer, monkeypatch):
    suite, queue = Suite(monkeypatch), Queue(monkeypatch)
    (trainer / "a_1.pth").write_bytes(b"half")
    submitted(trainer)
    queue.run(suite)
    assert submitted(trainer) == [] == submitted(trainer) and suite.judged == ["half"] and not queue.jobs


def test_options_of_sbatch_are_for_jobs(trainer, cluster, capfd, monkeypatch):
    asked = ("watch", trainer, "--dataset", "digits", "--sbatch")
    assert "--sbatch time=60 is for SLURM jobs; add --slurm" in error_line(capfd, monkeypatch, *asked, "time=60")
    line = error_line(capfd, monkeypatch, *asked, "nodes=2", "--slurm")
    assert "one task on one machine" in line


# The whole of it


@pytest.mark.slow
def test_a_job_judges_as_the_command_does(trainer, cluster, in_tmp, capfd, monkeypatch):
    torch.save({"epoch": 3, "state_dict": network(0).state_dict()}, trainer / "last.pth")
    words = ("watch", trainer, "--dataset", "digits", "--tasks", "knn", "--every", "0.2", "--once")
    _, err = in_process(capfd, monkeypatch, *words, "--slurm", "--sbatch", "partition=gpu")
    assert "last.pth is judged by job 1" in err and "#SBATCH --partition=gpu" in (cluster / "1.sh").read_text()
    run_jobs(cluster)
    in_process(capfd, monkeypatch, *words, "--slurm")
    (line,) = lines_of(trainer / "watch")
    assert line["epoch"] == 3 and line["metrics"] == by_hand(trainer / "last.pth", in_tmp / "hand")["knn/instdisc@1"]


def lines_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "curve.jsonl").read_text().splitlines()]


def by_hand(checkpoint: Path, output: Path) -> dict[str, dict]:
    """The metrics of each protocol by `moco-eval suite`."""
    words = ("--dataset", "digits", "--tasks", "knn", "--output", output, "--cache", output / "features")
    moco_eval("suite", checkpoint, *words)
    return {(one := json.loads(path.read_text()))["protocol"]: one["metrics"] for path in output.glob("*/result.json")}


@pytest.mark.slow
def test_beside_a_running_pretraining_it_is_killed_and_ends_with_the_numbers_of_the_command(tmp_path):
    """With a half-written, a deleted and an unreadable file in the same folder."""
    run = tmp_path / "run"
    small = ("--set", "schedule.epochs=4", "--set", "checkpoints.every=1")
    training = start("pretrain", "digits", "--dataset", "digits", "--output", run, *small)
    while not (run / "checkpoints").is_dir():
        assert training.poll() is None, training.communicate()[1]
        time.sleep(0.1)
    words = ("watch", run, "--dataset", "digits", "--tasks", "knn", "--every", "0.3")
    first = start(*words)
    while not (run / "watch/curve.jsonl").is_file():
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.1)
    kept = {path: path.stat().st_mtime_ns for path in (run / "watch").rglob("result.json")}
    first.kill()
    first.communicate()
    training.communicate()
    assert training.returncode == 0
    whole = (run / "checkpoints/last.pth").read_bytes()
    (run / "checkpoints/half_9.pth").write_bytes(whole[: len(whole) // 2])
    (run / "checkpoints/gone_9.pth").write_bytes(whole + b"x")
    (run / "checkpoints/gone_9.pth").unlink()
    _, err = moco_eval(*words, "--once")
    assert "half_9.pth was not judged" in err and err.count("was not judged") == 1
    lines = lines_of(run / "watch")
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3, 4] and kept
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for line in lines[1:3]:
        hand = by_hand(run / line["checkpoint"], tmp_path / f"hand{line['epoch']}")
        assert line["metrics"] == hand[line["protocol"]]
    moco_eval(*words, "--once")
    assert lines_of(run / "watch") == lines


@pytest.mark.slow
def test_another_program_that_overwrites_its_only_file_is_watched(tmp_path):
    """A plain loop that saves the state of its network: each version of the file is a point."""
    loop = """
import sys, time, torch
from checkpoints import network
for epoch in range(1, 3):
    torch.save({"epoch": epoch, "model": network(epoch).state_dict()}, sys.argv[1])
    while epoch < 2 and not __import__("pathlib").Path(sys.argv[1] + ".next").exists():
        time.sleep(0.1)
"""
    (tmp_path / "train").mkdir()
    file = tmp_path / "train/last.pth"
    paths = {"PYTHONPATH": f"{environment()['PYTHONPATH']}{os.pathsep}{ROOT / 'tests'}"}
    trainer = subprocess.Popen([sys.executable, "-c", loop, str(file)], env=environment() | paths)
    while not file.is_file():
        assert trainer.poll() is None
        time.sleep(0.1)
    words = ("watch", tmp_path / "train", "--dataset", "digits", "--tasks", "knn", "--every", "0.3")
    watching = start(*words, "--patience", "0.5")
    while not (tmp_path / "train/watch/curve.jsonl").is_file():
        assert watching.poll() is None, watching.communicate()[1]
        time.sleep(0.1)
    file.with_name("last.pth.next").touch()
    assert trainer.wait() == 0
    watching.communicate(timeout=300)
    lines = lines_of(tmp_path / "train/watch")
    assert [(line["epoch"], line["checkpoint"]) for line in lines] == [(1, "last.pth"), (2, "last.pth")]
    assert lines[1]["metrics"] == by_hand(file, tmp_path / "hand")["knn/instdisc@1"]
