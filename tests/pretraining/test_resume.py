"""Killed, stopped, restarted: the end is the same to the bit, on one process and on several.

Stopped in one process: test_pretrain.py; in two: test_two_ranks.py.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import ROOT, descendants, environment, error_line, moco_eval, start
from PIL import Image

pytestmark = pytest.mark.slow
SETTINGS = [
    *("arch=resnet18_quarter", "views.size=32", "workers=0", "symmetric=false", "queue_size=200", "knn=null"),
    *("log_every=4", "checkpoints.steps=3", "schedule.epochs=2"),  # 40 steps
]
V3 = [
    *("views.size=32", "workers=0", "hidden_dim=32", "dim=16", "knn=null", "log_every=4", "checkpoints.steps=3"),
    *("schedule.epochs=2", "schedule.warmup_epochs=1"),
]
RECIPES = {  # what they are called with, and how many moments of a kill are drawn
    "v2": ("digits", SETTINGS, 10),
    "v3 ViT": ("digits_v3", [*V3, "arch=vit_narrow_12h_patch8_32"], 3),
    "v3 ResNet": (
        "digits_v3",
        [*V3, "arch=resnet18_quarter", "freeze_patches=false", "optimizer={kind: lars, lr: 1, weight_decay: 1.0e-6}"],
        3,
    ),
}
TIMINGS = {"images_per_second", "data_wait"}


def command(output: Path, *more: str, recipe: str = "v2") -> list:
    config, settings, _ = RECIPES[recipe]
    given = [f"--set={setting}" for setting in settings]
    return ["pretrain", config, "--dataset", "digits", "--output", output, *given, *more]


def end_of(output: Path) -> tuple[dict, list[dict]]:
    """The final checkpoint, and the metrics without what a clock says."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    state = torch.load(output / "checkpoints" / "last.pth", weights_only=True)
    return state, [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def assert_same_end(one: Path, other: Path) -> None:
    (state, lines), (expected, expected_lines) = end_of(one), end_of(other)
    assert state["step"] == expected["step"] == 40
    for name, tensor in expected["state_dict"].items():
        assert torch.equal(state["state_dict"][name], tensor), name
    for number, values in expected["optimizer"]["state"].items():
        for name, value in values.items():
            assert torch.equal(state["optimizer"]["state"][number][name], value), f"{number} {name}"
    assert lines == expected_lines


V2, *V3S = [[pytest.param((name, ranks), id=f"{name}, {ranks} ranks") for ranks in (1, 2)] for name in RECIPES]
EVERY_RECIPE = pytest.mark.parametrize("whole", [*V2, *V3S[0], *V3S[1]], indirect=True)


@pytest.fixture(scope="module", params=V2)
def whole(request, tmp_path_factory) -> tuple[list[str], Path, float, str]:
    """How to launch, an uninterrupted run, the seconds from its first checkpoint to its end, and its recipe."""
    recipe, ranks = request.param
    launch = ["--nproc", str(ranks)]
    output = tmp_path_factory.mktemp("whole") / "run"
    process = start(*command(output, *launch, recipe=recipe))
    wait_for(output / "checkpoints" / "last.pth", process)
    began = time.monotonic()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return launch, output, time.monotonic() - began, recipe


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)


def kill_all(process: subprocess.Popen) -> None:
    for pid in [process.pid, *descendants(process.pid)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate(timeout=30)


def workers(process: subprocess.Popen) -> list[int]:
    """The training processes below a launcher, in the order of their ranks."""
    return [pid for pid in descendants(process.pid) if b"--output" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def killed_at(moment: float, launch: list[str], output: Path, recipe: str) -> None:
    """Kill a run, all its processes, `moment` seconds after its first checkpoint; then run it to its end."""
    process = start(*command(output, *launch, recipe=recipe))
    wait_for(output / "checkpoints" / "last.pth", process)
    time.sleep(moment)
    kill_all(process)
    moco_eval(*command(output, *launch, recipe=recipe))


@EVERY_RECIPE
def test_killed_in_the_middle_it_ends_the_same(whole, tmp_path):
    launch, expected, seconds, recipe = whole
    killed_at(seconds / 2, launch, tmp_path / "run", recipe)
    assert_same_end(tmp_path / "run", expected)


@EVERY_RECIPE
def test_killed_at_random_moments_it_ends_the_same(whole, tmp_path):
    launch, expected, seconds, recipe = whole
    draw = random.Random(0)
    for trial in range(RECIPES[recipe][2]):
        killed_at(draw.uniform(0, seconds), launch, tmp_path / str(trial), recipe)
        assert_same_end(tmp_path / str(trial), expected)


@EVERY_RECIPE
def test_stopped_between_two_log_lines_it_ends_the_same(whole, tmp_path):
    launch, expected, _, recipe = whole
    stop = "--set=max_steps=17", "--set=checkpoints.steps=null"
    moco_eval(*command(tmp_path / "run", *launch, *stop, recipe=recipe), code=3)
    moco_eval(*command(tmp_path / "run", *launch, recipe=recipe))
    assert_same_end(tmp_path / "run", expected)


def test_sigterm_saves_and_exits_3_within_ten_seconds(whole, tmp_path):
    launch, *_ = whole
    settings = ("--set=checkpoints.steps=null", "--set=schedule.epochs=500", "--set=workers=2")
    process = start(*command(tmp_path / "run", *launch, *settings))
    wait_for(tmp_path / "run" / "checkpoints" / "epoch_0001.pth", process)
    time.sleep(0.5)
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 3, err
    assert time.monotonic() - sent < 10
    assert "Traceback" not in err and "run the same command to go on" in err
    stopped = torch.load(tmp_path / "run" / "checkpoints" / "last.pth", weights_only=True)["step"]
    assert 20 < stopped < 10_000 and f"saved at step {stopped} of 10000" in err


def test_a_killed_worker_leads_to_a_restart_with_the_same_end(whole, tmp_path):
    launch, expected, *_ = whole
    if launch[-1] == "1":
        pytest.skip("one process has no other to restart it")
    process = start(*command(tmp_path / "run", *launch, "--max-restarts", "2"))
    wait_for(tmp_path / "run" / "checkpoints" / "last.pth", process)
    time.sleep(0.3)
    os.kill(workers(process)[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "resuming at step" in err
    assert_same_end(tmp_path / "run", expected)


def test_torchrun_restarts_a_killed_worker(whole, tmp_path):
    launch, expected, *_ = whole
    if launch[-1] == "1":
        pytest.skip("one process has no other to restart it")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    arguments = [*torchrun, "-m", "moco_eval", *map(str, command(tmp_path / "run"))]
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    process = subprocess.Popen(arguments, env=environment() | own_store, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "run" / "checkpoints" / "last.pth", process)
    time.sleep(0.3)
    os.kill(workers(process)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "resuming at step" in err and "restarted workers may wait" not in err
    assert_same_end(tmp_path / "run", expected)


def test_without_restarts_a_killed_worker_ends_the_run(tmp_path):
    process = start(*command(tmp_path / "run", "--nproc", "2"))
    wait_for(tmp_path / "run" / "checkpoints" / "last.pth", process)
    killed = workers(process)[1]
    os.kill(killed, signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    (line,) = [line for line in err.splitlines() if line.startswith("Error:")]
    assert f"process {killed} (rank 1) was ended by SIGKILL" in line and "run the same command to go on" in line


def test_a_killed_loader_process_ends_the_run_in_one_line(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(96):
        Image.effect_noise((40, 40), 10 + number).convert("RGB").save(photos / f"{number:03}.png")
    flat = ["pretrain", "digits", "--dataset", "flat", "--data", photos, "--output", tmp_path / "run"]
    settings = [f"--set={setting}" for setting in (*SETTINGS, "workers=2", "schedule.epochs=500")]
    process = start(*flat, *settings, "--batch-size", "16")
    wait_for(tmp_path / "run" / "checkpoints" / "last.pth", process)
    while not (loaders := descendants(process.pid)):
        time.sleep(0.05)
    os.kill(loaders[0], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("Error:")]
    assert f"a loader process (pid {loaders[0]})" in line and "run the same command to go on" in line


def test_two_torchrun_agents_meet_and_train_together(tmp_path):
    """Two nodes of one process each, on loopback: the same end as two processes of one node."""
    moco_eval(*command(tmp_path / "one node", "--nproc", "2"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-id=test"]
    agent += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"]
    arguments = [*agent, "-m", "moco_eval", *map(str, command(tmp_path / "two nodes"))]
    nodes = [
        subprocess.Popen(arguments, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(2)
    ]
    for node in nodes:
        out, _ = node.communicate(timeout=120)
        assert node.returncode == 0, out.decode()
    assert_same_end(tmp_path / "two nodes", tmp_path / "one node")


def test_the_slurm_script_saves_on_usr1_and_queues_itself_again(tmp_path):
    """Stand-ins for SLURM's commands: srun runs its arguments, scancel signals them, scontrol notes the asking."""
    stand_ins = {
        "srun": f'echo $$ > {tmp_path}/step; exec "$@"',
        "scancel": f"kill -TERM $(cat {tmp_path}/step)",
        "scontrol": f'[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> {tmp_path}/asked',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }
    for name, words in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{words}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2"}
    paths = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    arguments = command(tmp_path / "run", "--set=schedule.epochs=500", "--set=workers=2")[1:]
    script = ["bash", ROOT / "tools" / "pretrain.sbatch", *map(str, arguments)]
    process = subprocess.Popen(script, env=environment() | job | paths, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "run" / "checkpoints" / "epoch_0001.pth", process)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert "stopped by SIGTERM; saved at step" in err or "stopped by another process; saved at step" in err


def test_three_ranks_go_on_to_the_bit_too(tmp_path):
    """From three ranks on, a sum's last bit depends on the gradient bucket; see runtime.parallel."""
    settings = ["--nproc", "3", "--batch-size", "48"]
    moco_eval(*command(tmp_path / "whole", *settings, "--set=max_steps=40"), code=3)
    moco_eval(*command(tmp_path / "run", *settings, "--set=max_steps=17"), code=3)
    moco_eval(*command(tmp_path / "run", *settings, "--set=max_steps=40"), code=3)
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_several_processes_are_on_record(whole):
    launch, output, *_ = whole
    ours, number = end_of(output)[0]["pretraining"], int(launch[-1])
    assert (ours["bn"], ours["processes"]) == ({1: "split", 2: "shuffle"}[number], number)


def test_another_number_of_processes_is_refused_with_the_reason(whole, capfd, monkeypatch):
    launch, output, *_ = whole
    if launch[-1] == "2":
        words = error_line(capfd, monkeypatch, *command(output))
        assert "processes is 2 there and 1 now (the BN groups" in words


def test_a_damaged_line_of_metrics_stops_a_resumed_run_and_stays(tmp_path, capfd, monkeypatch):
    moco_eval(*command(tmp_path / "run", "--set=max_steps=20"), code=3)
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join((*lines[:3], b'{"step": 12, #' + lines[3], *lines[4:])))
    before = path.read_bytes()
    line = error_line(capfd, monkeypatch, *command(tmp_path / "run"))
    assert "metrics.jsonl line 4 is damaged: it is not JSON" in line and path.read_bytes() == before
