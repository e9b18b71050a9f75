"""Several protocols on one extraction: what goes through the network, what is refused first, what the table says."""

import json
import os
import re
import signal
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import error_line, in_process, moco_eval

from moco_eval.classification import forecast, suite
from moco_eval.classification.protocols import USUAL_TASKS, by_name, tasks
from moco_eval.classification.task import Task
from moco_eval.config import load as configs
from moco_eval.config.classification import QuickConfig
from moco_eval.data import in_memory
from moco_eval.data.catalogue import open_images, preprocessing_for
from moco_eval.encoders import load as loading
from moco_eval.errors import InputError
from moco_eval.features import cache as feature_cache
from moco_eval.features.cache import open_folder
from moco_eval.features.extract import extract
from moco_eval.features.stages import Several

ENCODER = "random:resnet18_quarter"
ON_DIGITS = (ENCODER, "--dataset", "digits", "--workers", "0", "--device", "cpu")
TRAIN, TEST = 240, 60
DIGITS = in_memory.digits
CROPS = configs.load("quick", "linear", QuickConfig).crops  # epochs of them
CPU = torch.device("cpu")


SHORT = {
    "logistic": "protocol: logistic/lbfgs@1\npath: {low: 0.1, high: 10.0, count: 3}\n",
    "svm": "protocol: svm/voc07@1\ncosts: [0.1, 1.0]\n",
}


@cache
def few_digits(split: str):
    images, count = DIGITS(split), TRAIN if split == "train" else TEST
    return replace(images, pixels=images.pixels[:count], labels=images.labels[:count], fingerprint=f"few {split}")


@pytest.fixture(autouse=True)
def _small(monkeypatch, tmp_path_factory):
    """A part of the digits and short paths over C, small enough for whole commands, in one process."""
    folder, find = tmp_path_factory.mktemp("configs"), configs.find
    for kind, text in SHORT.items():
        (folder / f"{kind}.yaml").write_text(text)
    short = {"lbfgs": folder / "logistic.yaml", "voc07": folder / "svm.yaml"}
    monkeypatch.setattr(configs, "find", lambda name, kind: short.get(name) or find(name, kind))
    monkeypatch.setattr("moco_eval.data.in_memory.digits", few_digits)
    monkeypatch.setattr("joblib.cpu_count", lambda: 1)


@pytest.fixture
def passed(monkeypatch) -> list[int]:
    """How many images each forward pass of the backbone took."""
    counts: list[int] = []
    real = loading.load

    def counting(*given):
        encoder = real(*given)
        encoder.backbone.register_forward_pre_hook(lambda _net, inputs: counts.append(len(inputs[0])))
        return encoder

    monkeypatch.setattr(loading, "load", counting)
    return counts


def records(folder: Path) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/result.json")}


def test_each_image_passes_once_for_each_kind_of_crop(capfd, monkeypatch, in_tmp, passed):
    """All tasks together; again, nothing; another feature of the same run says so before anything is extracted."""
    names = "knn,grid,linear/quick@1,lbfgs,voc07"
    out, _ = in_process(capfd, monkeypatch, "suite", *ON_DIGITS, "--tasks", names, "--output", "all")
    assert sum(passed) == TEST + TRAIN + CROPS * TRAIN  # clean test, clean train, epochs of crops
    found = records(in_tmp / "all")
    assert sorted(found) == ["knn-grid", "knn-instdisc", "linear-quick", "logistic-lbfgs", "svm-voc07"]
    for record in found.values():
        line = next(line for line in out.splitlines() if line.strip().startswith(record["protocol"]))
        assert f" {next(iter(record['metrics'].values())):.2f} " in line
    assert f"extraction: {TEST + (1 + CROPS) * TRAIN:,} images and crops" in out

    passed.clear()
    again, err = in_process(capfd, monkeypatch, "suite", *ON_DIGITS, "--tasks", names, "--output", "all")
    assert not passed and err.count("already done") == 5 and "extraction: nothing was missing" in again
    assert [line for line in again.splitlines() if "%" in line] == [line for line in out.splitlines() if "%" in line]
    refused = error_line(
        capfd, monkeypatch, "suite", *ON_DIGITS, "--output", "all", "--feature", "layer3", "--cache", "other"
    )
    assert "holds another run" in refused and not passed and not (in_tmp / "other").exists()


def test_finished_tasks_need_no_features(capfd, monkeypatch, in_tmp, passed):
    in_process(capfd, monkeypatch, "suite", *ON_DIGITS, "--tasks", "knn", "--output", "one")
    passed.clear()
    out, _ = in_process(
        capfd, monkeypatch, "suite", *ON_DIGITS, "--tasks", "knn", "--output", "one", "--cache", "elsewhere"
    )
    assert not passed and "knn/instdisc@1" in out and not (in_tmp / "elsewhere").exists()


def test_the_numbers_are_those_of_the_commands_of_their_own(capfd, monkeypatch, in_tmp):
    """With --batch-size, which is the extraction's alone, and --seed, which is everybody's."""
    options = ("--seed", "3", "--trials", "2", "--labels", "6-per-class")
    in_process(
        capfd, monkeypatch, "suite", *ON_DIGITS, *options, "--tasks", "quick,logistic", "--batch-size", "64",
        "--output", "suite",
    )  # fmt: skip
    found = records(in_tmp / "suite")
    for name, command in (("linear-quick", ("linear", "--protocol", "quick")), ("logistic-lbfgs", ("logistic",))):
        own = (*command, *ON_DIGITS, *options, "--output", name, "--cache", f"cache of {name}")
        in_process(capfd, monkeypatch, *own)
        alone = json.loads((in_tmp / name / "result.json").read_text())
        for key in ("metrics", "std", "interval", "deviations", "over", "dataset", "selection"):
            assert found[name][key] == alone[key], key
        kept, wanted = (np.load(folder / name / "predictions.npz") for folder in (in_tmp / "suite", in_tmp))
        assert np.array_equal(kept["prediction"], wanted["prediction"])


def test_one_footnote_for_what_several_protocols_deviate_in(capfd, monkeypatch, in_tmp):
    out, _ = in_process(
        capfd, monkeypatch, "suite", *ON_DIGITS, "--tasks", "grid,quick", "--labels", "6-per-class", "--trials", "3"
    )
    notes = [line for line in out.splitlines() if line.startswith("[")]
    assert len(notes) == 3 and notes[2] == "[3] not comparable with published numbers: 6 labels per class"
    rows = [line for line in out.splitlines() if "/" in line and "[1] [2] [3]" in line and "±" in line]
    assert len(rows) == 2 and all("(3 label draws)" in row for row in rows)
    assert [path.name for path in (in_tmp / "runs").glob("suite-*")] == [
        next((in_tmp / "runs").glob("suite-random-resnet18_quarter-*-digits-6-per-class")).name
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tasks", "kn"), "'kn' does not work on extracted features. Did you mean 'knn'?"),
        (("--tasks", "knn,quick,"), "'' does not work on extracted features"),
        (("--tasks", "linear/moco-lincls@1"), "does not work on extracted features"),
        (("--tasks", "knn,knn/instdisc@1"), "names knn/instdisc@1 twice"),
        (("--tasks", "logistic", "--labels", "1-per-class"), "logistic/lbfgs@1: every class has only one training"),
        (("--tasks", "quick", "--labels", "500-per-class"), "linear/quick@1: --labels 500-per-class: class"),
        (("--tasks", "low-shot", "--trials", "2"), "svm/voc07-low-shot@1: low-shot draws its own labels"),
        (("--tasks", "low-shot"), "svm/voc07-low-shot@1: 32 low-shot images per class"),
        (("--tasks", "quick", "--feature", "layer9"), "'layer9' is not a stage of resnet18_quarter"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is(arguments, words, capfd, monkeypatch, in_tmp, passed):
    refused = error_line(capfd, monkeypatch, "suite", *ON_DIGITS, *arguments)
    assert words in refused and not passed and list(in_tmp.iterdir()) == []


def several_labels() -> tuple:
    train, test = (open_images("digits", None, split) for split in ("train", "test"))
    return tuple(
        replace(one, labels=np.eye(10, dtype=np.int8)[one.labels] | np.eye(10, dtype=np.int8)[0])
        for one in (train, test)
    )


def test_several_labels_an_image_are_for_svms(tmp_path):
    train, test = several_labels()
    assert tasks(USUAL_TASKS[test.multi_label]) == [by_name("svm/voc07@1")]
    usual = [row.protocol for row in tasks(USUAL_TASKS[False])]
    assert usual == ["knn/instdisc@1", "linear/quick@1", "logistic/lbfgs@1"]
    task = Task(loading.load(ENCODER), train, test, cache=tmp_path)
    for name in ("quick", "grid", "logistic"):
        [protocol] = tasks(name)
        with pytest.raises(InputError, match=f"{protocol.protocol}: digits has images of several classes"):
            suite.able(suite.items(task, [protocol], tmp_path))


def test_no_class_may_be_in_every_image(tmp_path):
    train, test = several_labels()
    task = Task(loading.load(ENCODER), train, test, cache=tmp_path)
    with pytest.raises(InputError, match="svm/voc07@1: class 0 is in 240 of 240 training images"):
        suite.able(suite.items(task, [by_name("svm/voc07@1")], tmp_path))


def test_a_dry_run_says_what_is_needed_and_writes_nothing(capfd, monkeypatch, in_tmp):
    monkeypatch.setattr("moco_eval.classification.forecast.PART", 0.3)
    monkeypatch.setattr("moco_eval.classification.forecast.LEAST", 0.1)
    out, _ = in_process(capfd, monkeypatch, "suite", *ON_DIGITS, "--tasks", "grid,quick,logistic,svm", "--dry-run")
    assert list(in_tmp.iterdir()) == []
    lines = [line.split() for line in out.splitlines()]
    assert lines[5:] and ["test,", "clean", "crop", "every", "task", "60", "0", "0.0", "MB"] in [x[:9] for x in lines]
    assert ["train,", "crops", "of", "epoch", "1", "linear/quick@1", "240", "0", "0.1", "MB"] in [x[:10] for x in lines]
    assert (
        sum(line[:1] == ["train,"] for line in lines) == 1 + CROPS and "in all about" in out and "a prediction" in out
    )
    memory = re.search(r"in all about [\d.]+ minutes and ([\d.]+) GB: a prediction", out)
    assert memory and 0.1 < float(memory[1]) < 50  # this process is in it

    in_process(capfd, monkeypatch, "features", *ON_DIGITS, "--split", "train")
    in_process(capfd, monkeypatch, "suite", *ON_DIGITS, "--tasks", "grid")
    before = sorted(in_tmp.rglob("*"))
    out, _ = in_process(capfd, monkeypatch, "suite", *ON_DIGITS, "--tasks", "grid,quick", "--dry-run")
    assert sorted(in_tmp.rglob("*")) == before
    lines = [line.split() for line in out.splitlines()]
    assert ["train,", "clean", "crop", "linear/quick@1", "240", "240", "0.0", "MB", "0", "s"] in lines
    assert ["test,", "clean", "crop", "linear/quick@1", "60", "60", "0.0", "MB", "0", "s"] in lines
    assert "already done: runs/suite-" in out and " of training crops" in out and "of clean crops" not in out


def test_memory_is_what_the_batch_grows_to():
    assert forecast.grown([(1, 100.0)], 64) == 100
    assert forecast.grown([(1, 100.0), (4, 106.0), (16, 130.0)], 64) == 130 + 48 * 2
    assert forecast.grown([(1, 100.0), (4, 106.0), (16, 130.0)], 8) == 130  # never less than was taken


def test_memory_is_the_larger_of_extraction_and_protocols(monkeypatch, tmp_path):
    """Of protocols the one that holds most, beside the process as it was before."""
    task = Task(loading.load(ENCODER), few_digits("train"), few_digits("test"), cache=tmp_path)
    chosen = suite.items(task, [by_name("knn/grid@1"), by_name("svm/voc07@1")], tmp_path)
    monkeypatch.setattr(forecast, "_peak", lambda device: 10.0)
    monkeypatch.setattr(forecast, "rate", lambda *_: (1.0, 400.0))
    held = iter([100.0, 300.0, 500.0, 100.0])
    monkeypatch.setattr(forecast, "own_work", lambda item, *_: forecast.Own(item.protocol, 1.0, "", next(held)))
    needs = suite.needs(chosen, tmp_path)
    assert forecast.forecast(chosen, needs, CPU).memory == 400
    assert forecast.forecast(chosen, needs, CPU).memory == 510


def test_a_dry_run_of_low_shot_and_of_bf16(capfd, monkeypatch, in_tmp):
    monkeypatch.setattr("moco_eval.classification.forecast.PART", 0.3)
    monkeypatch.setattr(
        "moco_eval.classification.suite.able", lambda items: (items, [])
    )  # the few digits are too few for 96 shots
    names = ("--tasks", "low-shot,knn", "--precision", "bf16")
    out, _ = in_process(capfd, monkeypatch, "suite", *ON_DIGITS, *names, "--dry-run")
    assert "8 numbers of shots, 5 trials" in out and "bf16" in out and list(in_tmp.iterdir()) == []


# moco-eval features


def test_features_are_listed_and_read_back(capfd, monkeypatch, in_tmp, passed):
    out, _ = in_process(capfd, monkeypatch, "features", *ON_DIGITS, "--crops", CROPS, "--cache", "kept")
    lines = [line.split("  ") for line in out.splitlines()]
    assert [line[:4] for line in lines] == [
        ["train", "clean", "240 x 128", "float32"],
        *(["train", f"crops-{epoch}", "240 x 128", "float32"] for epoch in range(CROPS)),
        ["test", "clean", "60 x 128", "float32"],
    ]
    assert sum(passed) == (1 + CROPS) * TRAIN + TEST
    moved = in_tmp / "moved"
    Path(lines[-1][4]).rename(moved)
    test = open_images("digits", None, "test")
    direct = extract(loading.load(ENCODER).backbone.eval(), test, preprocessing_for("digits", None), CPU)
    assert torch.allclose(open_folder(moved).tensor(), direct, atol=1e-5)

    passed.clear()  # what was moved is extracted again, and quick finds its crops
    in_process(capfd, monkeypatch, "suite", *ON_DIGITS, "--tasks", "quick", "--cache", "kept")
    assert sum(passed) == TEST


def test_a_folder_of_features_is_verified(capfd, monkeypatch, in_tmp):
    out, _ = in_process(capfd, monkeypatch, "features", *ON_DIGITS, "--split", "test", "--precision", "bf16")
    folder = Path(out.split()[-1])
    assert "bfloat16" in out and open_folder(folder).shape == (TEST, 128)
    [shard] = folder.glob("*.npy")
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputError, match="is damaged"):
        open_folder(folder)
    shard.unlink()
    with pytest.raises(InputError, match="holds features of 0 of 60 images"):
        open_folder(folder)
    with pytest.raises(InputError, match=r"key\.json does not exist"):
        open_folder(in_tmp)
    refused = error_line(capfd, monkeypatch, "features", *ON_DIGITS, "--split", "test", "--crops", "1")
    assert "--crops are of training images" in refused


def interrupt_after(calls: int, monkeypatch) -> None:
    real, done = Several.forward, []

    def forward(self, images):
        done.append(1)
        if len(done) == calls:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, images)

    monkeypatch.setattr(Several, "forward", forward)


def test_an_interrupted_extraction_goes_on(capfd, monkeypatch, in_tmp, passed):
    monkeypatch.setattr(feature_cache, "SHARD", 100)
    command = ("features", *ON_DIGITS, "--batch-size", "100")
    with monkeypatch.context() as stopping:
        interrupt_after(2, stopping)
        line = error_line(capfd, monkeypatch, *command, code=3)
    assert "2 of 3 shards of train features, clean crop are kept: run the same command to go on" in line
    passed.clear()
    out, _ = in_process(capfd, monkeypatch, *command)
    assert sum(passed) == TRAIN - 200 + TEST and len(out.splitlines()) == 2


@pytest.mark.slow
def test_two_processes_print_one_table(in_tmp):
    out, _ = moco_eval("suite", *ON_DIGITS, "--tasks", "knn,quick", "--nproc", "2", "--output", "two")
    assert (
        out.count("knn/instdisc@1") == 1
        and out.count(f"extraction: {500 + 1297 * (1 + CROPS):,} images and crops") == 1
    )
    moco_eval("suite", *ON_DIGITS, "--tasks", "knn,quick", "--output", "one", "--cache", "other")
    one, two = records(in_tmp / "one"), records(in_tmp / "two")
    for name in one:  # features differ in their last bits
        assert two[name]["metrics"]["top1"] == pytest.approx(one[name]["metrics"]["top1"], abs=0.61)
