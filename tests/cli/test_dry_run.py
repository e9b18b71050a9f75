"""`--dry-run` keeps its word: whatever the run would refuse is refused there, and nothing is written."""

import re
from pathlib import Path

import pytest
import torch
from commands import error_line, in_process

from moco_eval.config import load as configs
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.papers import cost, forecast
from moco_eval.runtime.text import duration

real_probed = forecast.probed

KNN = ["knn", "pixels", "--dataset", "digits", "--protocol", "digits", "--workers", "0"]
DETECT = ["detect", "random:resnet18_quarter", "--dataset", "digits", "--engine", "torchvision"]
SEGMENT = ["segment", "random:resnet18_quarter", "--dataset", "digits"]
PRETRAIN = ["pretrain", "digits", "--dataset", "digits"]
COMMANDS = {"knn": KNN, "detect": DETECT, "segment": SEGMENT, "pretrain": PRETRAIN}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_holds_another_run_is_refused(command, in_tmp, capfd, monkeypatch):
    Path("other").mkdir()
    (Path("other") / "config.yaml").write_text("command: retrieve\n")
    (Path("other") / "metrics.jsonl").write_text("{}\n")
    line = error_line(capfd, monkeypatch, *COMMANDS[command], "--output", "other", "--dry-run")
    assert "holds another run" in line


# Time and memory

SMALLEST = {
    "detect": [*DETECT, "--set", "input={min_size_train: [64], min_size_test: 64, max_size: 96}"],
    "segment": [*SEGMENT, "--set", "views.crop=33"],
    "pretrain": [*PRETRAIN, "--set", "knn=null"],
}
COST = re.compile(r"in all about (\S+ \w+) and ([\d.]+) GB: a prediction, from a probe of .* s on cpu, .* threads")


@pytest.mark.probe
@pytest.mark.parametrize("command", SMALLEST)
def test_a_plan_ends_with_time_and_memory(command, in_tmp, capfd, monkeypatch):
    monkeypatch.setattr(forecast, "PIECE", 0.01)
    out, _ = in_process(capfd, monkeypatch, *SMALLEST[command], "--workers", "0", "--device", "cpu", "--dry-run")
    _, memory = COST.match(out.splitlines()[-1]).groups()
    assert 0.1 < float(memory) < 50  # this process is in it
    assert not list(in_tmp.iterdir())


def test_what_is_set_counts(in_tmp, capfd, monkeypatch):
    """Each image through each piece takes 0.01 s here."""

    def predicted(command, *more):
        settings = [word for one in more for word in ("--set", one)]
        out, _ = in_process(capfd, monkeypatch, *COMMANDS[command], *settings, "--device", "cpu", "--dry-run")
        return COST.match(out.splitlines()[-1])[1]

    few = ("schedule.iterations=500", "batch_size=4", "scenes={train: 8, test: 6}")
    assert predicted("detect", *few, "precise_bn=0") == duration((500 * 4 + 6) / 100)
    assert predicted("segment", *few, "views.crop=512", "test.window=null") in ("20 s", "21 s")
    once = predicted("pretrain", "schedule.epochs=30", "knn=null")
    images = 1297 * 30 * (2 if configs.load("digits", "pretrain", PretrainConfig).symmetric else 1)
    assert once == duration(2 * images / 100)


def test_what_is_refused_is_not_timed(in_tmp, capfd, monkeypatch):
    monkeypatch.setattr(forecast, "probed", lambda *_: pytest.fail("this machine was timed"))
    for command in (DETECT, SEGMENT, PRETRAIN):
        error_line(capfd, monkeypatch, *command, "--device", "cuda:9", "--dry-run")


def test_memory_grows_with_the_batch(monkeypatch):
    peaks = iter([100.0, 110.0, 130.0])
    monkeypatch.setattr(forecast, "peak_memory_mb", lambda _: next(peaks))
    monkeypatch.setattr(cost, "timed", lambda *_: iter([(1.0, 2.0), (2.0, 0.5)]))
    part = forecast.Part(iter([]), 10, batch=8)
    assert real_probed(part, torch.device("cpu")) == (0.5, 1e6 * (130 + 6 * 20))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--set", "k=2000"], "k 2000 is more than the 1297 images of the bank"),
        (["--device", "cuda:9"], "--device cuda:9"),
        (["--labels", "500-per-class"], "--labels 500-per-class: class"),
    ],
)
def test_a_knn_that_cannot_be_is_refused(more, words, in_tmp, capfd, monkeypatch):
    arguments = KNN if "--labels" not in more else ["linear", *KNN[1:4], "--protocol", "quick"]
    assert words in error_line(capfd, monkeypatch, *arguments, *more, "--dry-run")
    assert not list(in_tmp.iterdir())


def test_a_suite_takes_the_bank_for_k_and_leaves_out_what_cannot_be(in_tmp, capfd, monkeypatch):
    few = ["--dataset", "digits", "--labels", "3-per-class", "--workers", "0", "--output", "out"]
    out, err = in_process(capfd, monkeypatch, "suite", "pixels", *few, "--tasks", "knn,low-shot")
    assert "k 30 instead of 200" in out and "left out: svm/voc07-low-shot@1: " in out
    assert "warning: left out: svm/voc07-low-shot@1: " in err
    assert [path.parent.name for path in Path("out").rglob("result.json")] == ["knn-instdisc"]
    assert "svm/voc07-low-shot@1: " in error_line(
        capfd, monkeypatch, "suite", "pixels", *few[:-1], "none", "--tasks", "low-shot"
    )
