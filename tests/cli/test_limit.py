"""`--limit N`: a small try on at most so many images of each split, which the record calls a deviation."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import in_process

from moco_eval.data.boxes.samples import spread
from moco_eval.data.catalogue import open_images

ONE_STEP = ["schedule.iterations=1", "schedule.steps=[]", "schedule.warmup=0", "batch_size=1"]
SETTINGS = {
    "knn": ["k=5"],
    "linear": ["schedule.epochs=1", "schedule.milestones=[]", "crops=0"],
    "detect": [*ONE_STEP, "precise_bn=1", "scenes={train: 8, test: 6}"],
    "segment": [*ONE_STEP, "scenes={train: 8, test: 6}"],
}


@pytest.mark.parametrize("command", ["knn", pytest.param("detect", marks=pytest.mark.slow), "segment"])
def test_an_evaluation_of_a_few_images_says_so(command, in_tmp, capfd, monkeypatch):
    settings = [word for one in SETTINGS[command] for word in ("--set", one)]
    more = ["--dataset", "digits", "--limit", "20" if command == "knn" else "5", "--output", "run", "--workers", "0"]
    in_process(capfd, monkeypatch, command, "random:resnet18_quarter", *more, *settings)
    record = json.loads(Path("run/result.json").read_text())
    assert record["dataset"]["images"] == int(more[3])
    assert any(f"{more[3]} images" in deviation for deviation in record["deviations"]), record["deviations"]


def test_a_pretraining_of_a_few_images_ends_well_and_says_so(in_tmp, capfd, monkeypatch):
    settings = ["schedule.epochs=1", "queue_size=64", "knn=null", "batch_size=32"]
    words = [word for one in settings for word in ("--set", one)]
    _, err = in_process(capfd, monkeypatch, "pretrain", "digits", "--dataset", "digits", "--limit", "64", *words)
    assert "digits train: 64 images, evenly spread" in err


def test_the_images_are_spread_over_the_classes():
    few = open_images("digits", None, "train").limited(50)
    counts = np.bincount(few.labels, minlength=10)
    assert len(few) == 50 and counts.min() >= 4
    whole = open_images("digits", None, "test")
    assert whole.limited(None) is whole and whole.limited(10_000) is whole
    assert spread(list(range(10)), 4) == [0, 3, 6, 9] and spread([1, 2], 9) == [1, 2]


TRIES = {
    "detect": ["random:resnet18_quarter", "--dataset", "digits", "--engine", "torchvision"],
    "segment": ["random:resnet18_quarter", "--dataset", "digits"],
    "linear": ["random:resnet18_quarter", "--dataset", "digits", "--protocol", "moco-lincls"],
    "finetune": ["random:resnet18_quarter", "--dataset", "digits", "--protocol", "lightly"],
    "pretrain": ["moco_v2_r50", "--dataset", "digits"],
}


@pytest.mark.parametrize("command", TRIES)
def test_a_try_is_small_and_what_is_set_counts_more(command, in_tmp, capfd, monkeypatch):
    out, _ = in_process(capfd, monkeypatch, command, *TRIES[command], "--try", "--dry-run")
    wanted = {
        "detect": ("20 iterations of 2 images", "precise_bn 2 instead of", "at most 16 images of each split"),
        "segment": ("20 iterations of 2 images", "at most 16 images of each split"),
        "linear": ("epochs: 2", "batch_size: 32", "200 training and 200 test images"),
        "finetune": ("epochs: 2", "batch_size: 32", "200 training and 200 test images"),
        "pretrain": ("2 epochs", "K 128", "views.size 96 instead of 224", "200 images, evenly spread"),
    }
    assert all(words in out for words in wanted[command]), out
    key = "schedule.iterations" if command in ("detect", "segment") else "schedule.epochs"
    more, _ = in_process(capfd, monkeypatch, command, *TRIES[command], "--try", "--dry-run", "--set", f"{key}=3")
    assert ("3 iterations" if "iterations" in key else "3 epochs" if command == "pretrain" else "epochs: 3") in more


@pytest.mark.slow
@pytest.mark.parametrize("command", TRIES)
def test_a_try_runs_to_its_end_and_lists_what_it_changed(command, in_tmp, capfd, monkeypatch):
    words = ["digits", *TRIES[command][1:]] if command == "pretrain" else TRIES[command]
    _, err = in_process(capfd, monkeypatch, command, *words, "--try", "--output", "run", "--workers", "0")
    if command == "pretrain":
        assert Path("run/checkpoints/last.pth").is_file() and "digits train: 200 images, evenly spread" in err
        return
    deviations = json.loads(Path("run/result.json").read_text())["deviations"]
    key = "schedule.iterations" if command in ("detect", "segment") else "schedule.epochs"
    assert any(one.startswith(key) for one in deviations), deviations
    assert any("16 images" in one or "200 images" in one for one in deviations), deviations
