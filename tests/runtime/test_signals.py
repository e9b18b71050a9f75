"""A scheduler ends a job: every loop saves, whether the group is signalled or every process of it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, descendants, environment
from PIL import Image

pytestmark = pytest.mark.slow
ONE = ["--workers", "1"]
LOOPS = {
    "pretraining": [
        *("pretrain", "digits", "--dataset", "imagefolder", *ONE, "--batch-size", "16", "--set=arch=resnet18_quarter"),
        *("--set=views.size=32", "--set=queue_size=32", "--set=schedule.epochs=5000", "--set=checkpoints.steps=null"),
    ],
    "linear": [
        *("linear", "random:resnet18_quarter", "--dataset", "imagefolder", *ONE, "--batch-size", "16"),
        "--set=schedule.epochs=5000",
    ],
    "fine-tuning": [
        *("finetune", "random:resnet18_quarter", "--dataset", "imagefolder", "--protocol", "openselfsup-1percent"),
        *(*ONE, "--labels", "2-per-class", "--set=batch_size=4", "--set=schedule.epochs=5000"),
    ],
    "detection": [
        *("detect", "random:resnet18_quarter", "--dataset", "digits", "--recipe", "digits_r50_c4", *ONE),
        *("--engine", "torchvision", "--set=schedule.iterations=5000"),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An imagefolder of two classes."""
    root = tmp_path_factory.mktemp("photos")
    for split, label in ((split, label) for split in ("train", "val") for label in "ab"):
        (root / split / label).mkdir(parents=True)
        for number in range(16):
            Image.effect_noise((40, 40), 10 + number + 50 * (label == "b")).save(root / split / label / f"{number}.png")
    return root


def started(loop: str, output: Path, folder: Path, several: bool) -> subprocess.Popen:
    """The command in a session of its own, its loader processes at work."""
    data = [] if loop == "detection" else ["--data", folder]
    arguments = [*LOOPS[loop], *data, "--output", output, *(["--nproc", "2"] if several else [])]
    process = subprocess.Popen(
        [sys.executable, "-m", "moco_eval", *map(str, arguments)],
        env=environment(),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline, least = time.monotonic() + 120, 5 if several else 1  # two ranks, a loader process of each
    while process.poll() is None and len(loaders(process.pid)) < least and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2)
    return process


def loaders(pid: int) -> list[int]:
    return [each for each in descendants(pid) if Path(f"/proc/{each}/cmdline").read_bytes()]


@pytest.mark.parametrize("way", ["group", "every process"])
@pytest.mark.parametrize("several", [False, True], ids=["1 rank", "2 ranks"])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_saves_and_says_how_to_go_on(loop, several, way, folder, tmp_path):
    process = started(loop, tmp_path / "run", folder, several)
    if way == "group":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        for each in (process.pid, *descendants(process.pid)):
            os.kill(each, signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 3, err
    assert "run the same command to go on" in err and "Traceback" not in err, err
    if "while no data came" in err:
        return  # a machine so busy that a batch took longer than a loop waits for it after a signal
    assert "saved" in err, err
    kept = [path for path in (tmp_path / "run").rglob("*.pth") if not path.name.startswith(".")]
    assert kept, list((tmp_path / "run").rglob("*"))
