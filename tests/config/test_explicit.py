"""What --set names is what runs, whatever --batch-size rescales; doubtful combinations are warned of."""

import pytest
from commands import in_process

DETECT = ["detect", "random:resnet18_quarter", "--dataset", "digits", "--engine", "torchvision", "--dry-run"]


def test_an_explicit_schedule_wins_over_the_rescaling(in_tmp, capfd, monkeypatch):
    given = ["--batch-size", "2", "--set", "schedule.iterations=7", "--set", "optimizer.lr=0.5"]
    out, err = in_process(
        capfd, monkeypatch, *DETECT, *given, "--set", "schedule.warmup=3", "--set", "schedule.steps=[5]"
    )
    assert "schedule: 7 iterations of 2 images, lr 0.5, steps [5], warm-up 3" in out
    assert "all else as set" in err


def test_what_is_not_set_follows_the_batch(in_tmp, capfd, monkeypatch):
    out, err = in_process(capfd, monkeypatch, *DETECT, "--batch-size", "2", "--set", "optimizer.lr=0.5")
    assert ", lr 0.5," in out and "iterations instead of" in err and "lr 0" not in err


EPOCHS = {
    "pretrain": ["pretrain", "digits", "--dataset", "digits"],
    "linear": ["linear", "random:resnet18_quarter", "--dataset", "digits", "--protocol", "moco-lincls"],
    "finetune": ["finetune", "random:resnet18_quarter", "--dataset", "digits", "--protocol", "lightly"],
}


@pytest.mark.parametrize("command", EPOCHS)
def test_an_explicit_rate_wins_wherever_a_batch_rescales_it(command, in_tmp, capfd, monkeypatch):
    words = [*EPOCHS[command], "--dry-run"]
    out, err = in_process(capfd, monkeypatch, *words, "--batch-size", "128", "--set", "optimizer.lr=0.5")
    assert "lr 0.5," in out or "lr: 0.5\n" in out
    assert "--batch-size 128 instead of" in err and "all else as set" in err and "lr 0.5 instead" not in err
    _, err = in_process(capfd, monkeypatch, *words, "--set", "batch_size=128")
    assert "warning: batch_size 128 with lr" in err and "--batch-size 128 rescales it" in err


def test_explicit_rates_of_a_sweep_win(in_tmp, capfd, monkeypatch):
    words = ["linear", "random:resnet18_quarter", "--dataset", "digits", "--protocol", "sweep", "--dry-run"]
    given = ["--batch-size", "128", "--set", "learning_rates=[0.5]"]
    out, err = in_process(capfd, monkeypatch, *words, *given)
    assert "learning_rates:\n- 0.5\n" in out and "all else as set" in err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["schedule.iterations=3", "schedule.steps=[]"], "is longer than the 3 iterations: the rate never reaches"),
        (["batch_size=2"], "which belongs to batches of"),
    ],
)
def test_doubtful_schedules_are_warned_of(settings, words, in_tmp, capfd, monkeypatch):
    _, err = in_process(capfd, monkeypatch, *DETECT, *(word for one in settings for word in ("--set", one)))
    assert words in err
