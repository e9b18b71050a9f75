"""`--dry-run` keeps its word: whatever the run would refuse is refused there, and nothing is written."""

from pathlib import Path

import pytest
from commands import error_line, in_process

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
