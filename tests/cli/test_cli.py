"""The command line's contract: names, exit codes, one clear line for each mistake."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import environment, error_line, in_process, moco_eval

from moco_eval.classification import linear

COMMANDS = ["pretrain", "inspect", "convert", "knn", "linear", "detect"]
COMMANDS += ["suite", "features", "compare", "table", "report", "configs", "demo"]


def test_help_names_every_command_at_once():
    start = time.perf_counter()
    out, _ = moco_eval("--help")
    assert time.perf_counter() - start < 5  # a safeguard on a busy machine; docs/measurements.md has the figure
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    from click.testing import CliRunner

    from moco_eval.cli.main import cli

    done = CliRunner().invoke(cli, [command, "--help"])
    assert done.exit_code == 0 and "Usage:" in done.output


def test_configs_and_tables_are_listed_name_first(capfd, monkeypatch):
    configs = in_process(capfd, monkeypatch, "configs")[0].splitlines()
    assert "pretrain/moco_v2_r50" in configs and "linear/moco-lincls" in configs
    tables = [line.split()[0] for line in in_process(capfd, monkeypatch, "table", "--list")[0].splitlines()]
    assert {"cifar10-demo", "moco-v1-2b", "moco-v2-1"} <= set(tables)
    assert "temperature: 0.2" in in_process(capfd, monkeypatch, "configs", "show", "pretrain/moco_v2_r50")[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["linear", "random:resnet18"], "--dataset imagenet needs --data FOLDER"),
        (["knn", "random:resnet18", "--dataset", "cifar10"], "for example --dataset cifar10 --data"),
        (["detect", "random:resnet50"], "for example: moco-eval detect"),
        (["detect", "random:resnet50", "--dataset", "voc"], "needs"),
        (["linear", "nowhere.pth", "--dataset", "digits"], "nowhere.pth does not exist"),
        (["linear", "random:resnet19", "--dataset", "digits"], "Did you mean 'resnet18'"),
        (["linear", "random:resnet18", "--dataset", "digits", "--labels", "ten"], "is not N-per-class"),
        (
            ["linear", "random:resnet18", "--dataset", "digits", "--protocol", "moco-linclss"],
            "Did you mean 'moco-lincls'",
        ),
        (["knn", "random:resnet18", "--dataset", "digits", "--set", "kk=3"], "unknown key 'kk'"),
        (["knn", "random:resnet18_quarter", "--dataset", "digits", "--device", "cuda:9"], "--device cuda:9"),
        (
            ["knn", "random:resnet18_quarter", "--dataset", "digits", "--device", "cuda:0", "--nproc", "2"],
            "puts all 2 processes on one GPU; take --device cuda, and CUDA_VISIBLE_DEVICES",
        ),
        (["table", "moco-v1-2bb"], "Did you mean 'moco-v1-2b'"),
        (["table"], "moco-eval table --list"),
        (["report", "nowhere"], "nowhere"),
        (["configs", "show", "pretrain/cifar"], "Did you mean 'pretrain/cifar10'"),
    ],
)
def test_mistakes_are_one_line_with_the_way_out(arguments, words, in_tmp, capfd, monkeypatch):
    assert words in error_line(capfd, monkeypatch, *arguments)
    assert not list(in_tmp.iterdir())


def test_knn_as_a_user_runs_it(in_tmp, capfd, monkeypatch):
    arguments = ["knn", "pixels", "--dataset", "digits", "--protocol", "digits", "--workers", "0"]
    out, _ = in_process(capfd, monkeypatch, *arguments)
    assert out.startswith("knn/instdisc@1 digits top1 ")
    runs = list((in_tmp / "runs").glob("knn-*"))
    assert [run.name for run in runs] == ["knn-pixels-" + runs[0].name.split("-")[2] + "-digits-instdisc"]
    again, err = in_process(capfd, monkeypatch, *arguments)
    assert again == out and "already done" in err
    refused = error_line(capfd, monkeypatch, *arguments, "--set", "k=5")
    assert "holds another run: config.k is 20 there and 5 now" in refused


def test_an_unreadable_evaluation_image_ends_in_one_line(in_tmp, capfd, monkeypatch):
    from PIL import Image

    for split in ("train", "val"):
        for name in ("a", "b"):
            (in_tmp / "data" / split / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (40, 40), (i, 9, 9)).save(in_tmp / "data" / split / name / f"{i}.jpg")
    (in_tmp / "data" / "train" / "b" / "1.jpg").write_text("no image")
    for workers in ("0", "1"):
        arguments = ["knn", "random:resnet18_quarter", "--dataset", "imagefolder", "--data", "data", "--set", "k=2"]
        line = error_line(capfd, monkeypatch, *arguments, "--workers", workers, "--output", "out")
        assert line.startswith("Error: data/train/b/1.jpg is not an image")
    assert not (in_tmp / "out" / "result.json").exists()


@pytest.mark.slow
def test_an_unwritable_output_is_said(in_tmp, capfd, monkeypatch):
    Path("file").write_text("x")
    arguments = ["knn", "pixels", "--dataset", "digits", "--protocol", "digits", "--output"]
    assert "cannot write" in error_line(capfd, monkeypatch, *arguments, "/proc/run")
    line = error_line(capfd, monkeypatch, *arguments, "file")
    assert "is a file; give a folder" in line


def wait_for(condition, seconds: float = 60) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.1)


QUICK = ["linear", "pixels", "--dataset", "digits", "--protocol", "quick"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_the_command_is_exit_3(number, in_tmp, capfd, monkeypatch):
    """In work that keeps no state of its own: the classifier of `quick`."""
    monkeypatch.setattr(linear.Classifier, "step", lambda *_: os.kill(os.getpid(), number))
    settings = [word for one in ("crops=0", "schedule.epochs=2", "workers=0") for word in ("--set", one)]
    _, said = in_process(capfd, monkeypatch, *QUICK, *settings, code=3)
    assert "Traceback" not in said and "run the same command to go on" in said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_anywhere_is_exit_3_and_no_traceback(number, in_tmp):
    """In work that keeps no state of its own: the classifier of `quick`."""
    settings = [word for one in ("crops=0", "schedule.epochs=100000", "workers=0") for word in ("--set", one)]
    started = [sys.executable, "-m", "moco_eval", *QUICK, *settings]
    run = subprocess.Popen(started, stderr=subprocess.PIPE, text=True, env=environment())
    wait_for(lambda: any((in_tmp / "runs" / "features").rglob("000000-*.npy")))
    time.sleep(2)
    run.send_signal(number)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 3 and "Traceback" not in said and "run the same command to go on" in said


def test_a_full_memory_is_one_line_with_the_way_out(capfd, monkeypatch):
    """torch's error by its name, from wherever a command asks for too much."""

    class OutOfMemoryError(RuntimeError):
        pass

    def full(*_: object, **__: object) -> None:
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a capacity of 10.00 GiB")

    monkeypatch.setattr("click.Group.invoke", full)
    line = error_line(capfd, monkeypatch, "configs", code=1)
    assert "(CUDA out of memory. Tried to allocate 2.00 GiB); take a smaller --batch-size" in line
