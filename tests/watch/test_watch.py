"""`watch` on folders in which files are written, half written, overwritten, deleted; the suite itself is pretended."""

import json
import shutil
from pathlib import Path

import pytest
from commands import error_line

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
    points = [Point("epoch_2.pth", 20, {}), Point("last.pth", 30, {}), Point("epoch_9.pth", 10, {})]
    curve = curve_of(points)
    assert curve.unit == "checkpoint" and [point.written for _, point in curve.points] == [10, 20, 30]
