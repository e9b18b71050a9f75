import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from commands import environment, error_line, in_process, moco_eval
from pretend_slurm import run_jobs

from moco_eval.classification.protocols import followed_by
from moco_eval.cli import main
from moco_eval.config import load as configs
from moco_eval.config.detection import DetectConfig
from moco_eval.config.segmentation import SegmentConfig
from moco_eval.data import in_memory
from moco_eval.errors import InputError, Interrupted, RunFailed
from moco_eval.papers import reproduce, slurm, tables
from moco_eval.papers import steps as chain
from moco_eval.runtime import child, files
from pretraining.plan import plan as could_start

STATED = {"arch": "resnet18_quarter", "data": "digits", "epochs": 1, "batch": 64, "K": 1024, "m": 0.995, "tau": 0.2}
SMALL = {"schedule.epochs": 1, "views.size": 32, "checkpoints.steps": 1}


def knn_of(config_name="digits"):
    return {"title": "kNN", "metric": "top1", "protocol": "knn/instdisc@1", "dataset": "digits", "config": config_name}


def write_table(folder, **changes):
    """Two rows on the built-in digits, from nothing in seconds."""
    values = {
        "id": "mini",
        "paper": "none",
        "table": "none",
        "caption": "Two rows on built-in data.",
        "source": "ours",
        "reference": [],
        "columns": {"knn": knn_of()},
        "rows": [
            {
                "label": "MoCo, small",
                "published": {"knn": None},
                "recipe": {"config": "digits", "dataset": "digits", "set": SMALL},
                "states": STATED,
            },
            {
                "label": "random init, small",
                "published": {"knn": None},
                "match": {"weights": "random", "arch": "resnet18_quarter"},
            },
        ],
    } | changes
    path = folder / "mini.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def planned(path, *rows, runs="runs", records=(), **places):
    return reproduce.plan(str(path), rows, chain.Places(Path(runs), **places), records)


def record_of(step, row, **changes):
    """As an evaluation of the row's own encoder leaves it in the step's place; a fixture, not a measurement."""
    encoder = {"path": "random:resnet18_quarter", "origin": "random", "arch": "resnet18_quarter", "pretraining": None}
    if row.recipe:
        settings = row.recipe.resolved().model_dump(mode="json")
        about = {
            "protocol": settings["protocol"],
            "dataset": {"name": row.recipe.dataset},
            "bn": "split",
            "processes": 1,
        }
        about |= {"epochs": settings["schedule"]["epochs"], "config": settings}
        encoder = {"path": "last.pth", "origin": "moco-eval/1", "arch": settings["arch"], "pretraining": about}
    values = {"protocol": "knn/instdisc@1", "dataset": {"name": step.dataset}, "encoder": encoder}
    values |= {"metrics": {"top1": 1.0}, "trials": [{}], "deviations": ["k 20 instead of 200"], "run": str(step.output)}
    return values | changes


def metrics(runs):
    """Of every record below, by the folder's name."""
    return {path.parent.name: files.read_json(path)["metrics"] for path in Path(runs).rglob("result.json")}


# From nothing to the table


def start(*arguments):
    """`moco-eval ARGUMENTS` at the head of a process group of its own."""
    words = [sys.executable, "-m", "moco_eval", *map(str, arguments)]
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    )


def wait_until(true, process):
    until = time.monotonic() + 120
    while not true():
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.02)


def steps_of(path):
    """How many steps a checkpoint has behind it; 0 where there is none."""
    return torch.load(path, weights_only=False)["step"] if path.exists() else 0


def by_hand(capfd, monkeypatch, steps):
    """The same commands one by one, below the folder `whole`."""
    settings = ("--set", "schedule.epochs=1", "--set", "views.size=32", "--precision", "fp32", "--output", "whole/moco")
    in_process(capfd, monkeypatch, "pretrain", "digits", "--dataset", "digits", *settings)
    for step, checkpoint in zip(steps[1:], ("whole/moco/checkpoints/last.pth", "random:resnet18_quarter")):
        given = ("--dataset", "digits", "--protocol", "digits", "--output", Path("whole") / step.output.name)
        in_process(capfd, monkeypatch, "knn", checkpoint, *given)


def require_nothing_left(capfd, monkeypatch, table, out):
    """Once more: the same table, and no file is touched."""
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*") if path.is_file()}
    again, err = in_process(capfd, monkeypatch, "reproduce", table)
    assert again == out and "step 1" not in err
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*") if path.is_file()} == before


def test_from_nothing_to_the_table(in_tmp, capfd, monkeypatch):
    """On few images, every step in this process; against the commands by hand."""
    few = {split: in_memory.digits(split) for split in ("train", "test")}
    few = {split: replace(one, pixels=one.pixels[:192], labels=one.labels[:192]) for split, one in few.items()}
    monkeypatch.setattr(in_memory, "digits", few.get)

    def in_this_process(words, _lock):
        with contextlib.redirect_stdout(sys.stderr):
            return main.cli.main(list(map(str, words)), standalone_mode=False) or 0, False

    monkeypatch.setattr(child, "run", in_this_process)
    table = write_table(in_tmp)
    steps = planned(table).left
    out, err = in_process(capfd, monkeypatch, "reproduce", table)
    assert len(steps) == 3 and "step 3 of 3" in err and out.count("kNN") == 1 and "\nstep" not in out
    by_hand(capfd, monkeypatch, steps)
    assert metrics("runs") == metrics("whole") and len(metrics("whole")) == 2
    require_nothing_left(capfd, monkeypatch, table, out)


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_to_the_same_numbers(in_tmp, capfd, monkeypatch):
    """SIGKILL of all its processes inside an epoch; against the commands by hand, never interrupted."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as this process and the one that is killed: threads move last bits
    table = write_table(in_tmp)
    steps = planned(table).steps
    folder, last = steps[0].output, steps[0].output / "checkpoints/last.pth"
    process = start("reproduce", table)
    wait_until(lambda: steps_of(last) >= 3, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (folder / "checkpoints/epoch_0001.pth").exists() and not metrics("runs")
    assert planned(table).left == steps and len(steps) == 3
    out, err = in_process(capfd, monkeypatch, "reproduce", table)
    assert 3 <= int(re.search(r"resuming at step (\d+) of 20", err)[1]) < 20 and "step 3 of 3" in err
    assert out.count("kNN") == 1 and "\nstep" not in out
    by_hand(capfd, monkeypatch, steps)
    assert metrics("runs") == metrics("whole") and len(metrics("whole")) == 2
    require_nothing_left(capfd, monkeypatch, table, out)


@pytest.mark.slow
def test_stopped_by_a_signal_it_goes_on_to_the_same_numbers(in_tmp):
    """SIGTERM to `reproduce` alone, which passes it on, waits, and says how to go on."""
    table = write_table(in_tmp)
    moco_eval("reproduce", table, "--rows", "moco", "--runs", "whole")
    last = planned(table, "moco", runs="cut").steps[0].output / "checkpoints/last.pth"
    process = start("reproduce", table, "--rows", "moco", "--runs", "cut")
    wait_until(last.exists, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3 and err.splitlines()[-1].endswith("run the same command to go on"), err
    out, _ = moco_eval("reproduce", table, "--rows", "moco", "--runs", "cut")
    assert metrics("cut") == metrics("whole") and len(metrics("whole")) == 1
    assert out.replace("cut/", "whole/") == moco_eval("reproduce", table, "--rows", "moco", "--runs", "whole")[0]


# Which rows, which data


def labels(*asked, table="moco-v1-2b"):
    rows, left_out = reproduce.choose(tables.load_table(table), asked)
    return [row.label for row in rows], left_out


def test_rows_by_their_labels_or_parts_of_them():
    assert labels("MoCo, IN-1M") == (["MoCo, IN-1M"], [])
    assert labels("RANDOM", "in-1m")[0] == ["random init", "supervised, IN-1M", "MoCo, IN-1M"]  # the table's order
    everything, left_out = labels()
    assert "MoCo, IG-1B" not in everything and left_out == [("MoCo, IG-1B", "data never public")]
    assert labels("moco") == (["MoCo, IN-1M"], [("MoCo, IG-1B", "data never public")])


def test_rows_that_are_refused():
    with pytest.raises(InputError, match=r"cannot be reproduced of moco-v1-2b: 'MoCo, IG-1B' \(data never public\)"):
        labels("IG-1B")
    with pytest.raises(InputError, match=r"has 'MoCo, IN-1N' in its label. Did you mean 'MoCo, IN-1M'\?"):
        labels("MoCo, IN-1N")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "reproduce needs an ID; for example: moco-eval reproduce cifar10-demo --data cifar10="),
        (["cifar10-dem"], "Did you mean 'cifar10-demo'?"),
        (["none.yaml"], "none.yaml does not exist"),
        (
            ["moco-v1-2b"],
            "moco-v1-2b needs the folder of voc and of imagenet; for example: moco-eval reproduce moco-v1-2b "
            "--data voc=/datasets/VOCdevkit --data imagenet=/datasets/imagenet",
        ),
        (["moco-v1-2b", "--data", "voc=here"], "needs the folder of imagenet; for example: moco-eval reproduce"),
        (["moco-v1-2b", "--rows", "random", "--data", "voc=here"], "voc: --data here does not exist"),
        (["cifar10-demo", "--data", "cifar10=."], "cifar10: "),
        (["cifar10-demo", "--data", "cifar=."], "no data set 'cifar'. Did you mean 'cifar10'"),
        (["digits", "--sbatch", "time=60"], "--sbatch time=60 is for SLURM jobs; add --slurm"),
    ],
)
def test_what_is_refused_before_anything_is_written(arguments, message, in_tmp, capfd, monkeypatch):
    assert message in error_line(capfd, monkeypatch, "reproduce", *arguments)
    assert not list(in_tmp.iterdir())


def test_a_plan_without_its_data_is_shown_before_it_is_refused(in_tmp, capfd, monkeypatch):
    monkeypatch.setattr("moco_eval.papers.cost.costs", lambda steps, *_: [None] * len(steps))
    out, err = in_process(
        capfd, monkeypatch, "reproduce", "moco-v1-2b", "--rows", "random", "--nproc", "2", "--dry-run", code=2
    )
    assert "data missing: voc" in out and "moco-eval detect random:resnet50" in out
    given = "moco-eval reproduce moco-v1-2b --rows random --nproc 2 --dry-run --data voc=/datasets/VOCdevkit"
    assert given in err and not list(in_tmp.iterdir())


def test_too_few_images_are_refused_before_anything_runs(in_tmp, capfd, monkeypatch):
    """As the pretraining itself would, had its turn come."""
    values = {"config": "digits", "dataset": "digits", "set": {"batch_size": 2048, "queue_size": 8192}}
    rows = [{"label": "large", "published": {"knn": None}, "recipe": values}]
    rows[0]["states"] = STATED | {"epochs": 20, "batch": 2048, "K": 8192}
    line = error_line(capfd, monkeypatch, "reproduce", write_table(in_tmp, rows=rows))
    assert "digits has 1297 images, less than one batch of 2048" in line
    assert [path.name for path in in_tmp.iterdir()] == ["mini.yaml"]


def test_the_environment_says_where_all_data_are(in_tmp, monkeypatch):
    monkeypatch.setenv("MOCO_EVAL_DATA", "/everything")
    with pytest.raises(InputError, match="cifar10: --data /everything does not exist"):
        reproduce.check(planned("cifar10-demo"), ["moco-eval", "reproduce"], could_start)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            {"protocol": "knn/instdis@1", "config": None},
            r"no protocol 'knn/instdis@1'. Did you mean 'knn/instdisc@1'\?",
        ),
        ({"protocol": "nearest/instdisc@1", "config": None}, "no protocol 'nearest/instdisc@1'"),
        ({"config": "grid"}, "column 'kNN' is of knn/instdisc@1 and its config grid of knn/grid@1"),
        ({"config": "digit"}, "no knn config named 'digit'. Did you mean 'digits'"),
    ],
)
def test_a_table_of_ones_own_with_a_column_that_is_nothing_of_ours(column, message, in_tmp):
    table = write_table(in_tmp, columns={"knn": knn_of() | column})
    with pytest.raises(InputError, match=message):
        planned(table)


def test_evaluations_are_in_the_published_arithmetic():
    """So that no option of theirs has to say it, on a GPU either."""
    names = [name for name, _ in tables.tables()]
    columns = [column for name in names for column in tables.load_table(name).columns.values() if column.protocol]
    judged = {(chain.command(column), column.config or chain.evaluation(column.protocol)) for column in columns}
    dense = {"detect": DetectConfig, "segment": SegmentConfig}
    models = [dense[kind] if kind in dense else followed_by(name, kind).model for kind, name in judged]
    loaded = [configs.load(name, kind, model) for (kind, name), model in zip(judged, models)]
    assert len(loaded) > 10 and {one.precision for one in loaded} == {"fp32"}


def test_the_table_of_the_page_is_one(in_tmp, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/reproduce.md").read_text()
    Path("mine.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    places = chain.Places(data={"imagefolder": Path("FOLDER")})
    table = tables.load_table("mine.yaml")
    assert [step.arguments[0] for step in chain.steps(table, table.rows, places)] == ["pretrain", "knn", "knn"]


# What is left


def states(plan, jobs=None):
    """Title and state of each step, as they are shown."""
    lines = reproduce.describe(plan, jobs or {}).splitlines()[3:]
    return [(line.split("  ")[0].strip(), line.split("  ")[-1].strip()) for line in lines if line.strip()]


def test_steps_are_left_begun_and_done(in_tmp):
    table = write_table(in_tmp)
    assert [state for _, state in states(planned(table))] == ["left", "left", "left"]
    pretrain, moco, random = planned(table).steps
    run = {"command": "pretrain", "dataset": {"name": "digits"}, "processes": 1, "bn": "split"}
    settings = pretrain.recipe.resolved().model_dump(mode="json") | {"precision": "fp32"}
    files.write_text(pretrain.output / "config.yaml", yaml.safe_dump(run | {"config": settings}))
    done = [record_of(random, tables.load_table(str(table)).rows[1])]
    assert [state for _, state in states(planned(table, records=done))] == ["begun", "left", "done"]
    assert planned(table, records=done).left == [pretrain, moco]
    for name in ("last.pth", "epoch_0001.pth"):
        files.write_text(pretrain.output / "checkpoints" / name, "")
    assert [state for _, state in states(planned(table, records=done))] == ["done", "left", "done"]
    other = yaml.safe_dump(run | {"config": settings | {"temperature": 0.5}})
    files.write_text(pretrain.output / "config.yaml", other)  # finished, but of another recipe
    assert planned(table, records=done).left == [pretrain, moco]


@pytest.mark.parametrize("change", [{"protocol": "knn/grid@1"}, {"dataset": {"name": "cifar10"}}, {"trials": []}])
def test_only_a_record_of_the_row_makes_a_step_done(in_tmp, change):
    table = write_table(in_tmp)
    step, (moco, random) = planned(table).steps[2], tables.load_table(str(table)).rows
    assert step not in planned(table, records=[record_of(step, random)]).left
    assert step in planned(table, records=[record_of(step, random, **change)]).left
    assert step in planned(table, records=[record_of(step, moco)]).left  # of another row's encoder


def test_an_encoder_is_not_trained_again_for_evaluations_that_are_done(in_tmp):
    table = write_table(in_tmp)
    moco = planned(table).steps[1]
    plan = planned(table, "MoCo", records=[record_of(moco, tables.load_table(str(table)).rows[0])])
    assert plan.left == [] and [state for _, state in states(plan)] == ["not needed", "done"]


def test_an_encoder_is_trained_for_a_detection_although_its_copy_is_there(in_tmp):
    table = tables.load_table("moco-v1-2b")
    places = chain.Places(data={"imagenet": Path("in"), "voc": Path("voc")})
    pretrain, convert, detect = steps = chain.steps(table, [table.rows[2]], places)
    files.write_text(convert.output, "")
    assert chain.left(steps, table, []) == [pretrain, detect]
    found = {"protocol": "detect/voc-r50-c4-24k@1", "metrics": dict.fromkeys(("AP", "AP50", "AP75"), 1.0)}
    assert chain.left(steps, table, [record_of(detect, table.rows[2], **found)]) == [pretrain, detect]  # one of five
    assert chain.left(steps, table, [record_of(detect, table.rows[2], **found, trials=[{}] * 5)]) == []


def test_a_pretraining_with_another_setting_is_not_taken_and_foreign_files_are_passed_over(tmp_path):
    recipe = tables.load_table("digits").rows[1].recipe
    run = {"command": "pretrain", "dataset": {"name": "digits"}, "processes": 1, "bn": "split"}
    settings = recipe.resolved().model_dump(mode="json") | {"precision": "fp32"}
    for name, change in (
        ("a", {"optimizer": settings["optimizer"] | {"lr": 1.0}}),
        ("b", {"precision": "bf16"}),
        ("d", {"precision": "tf32"}),
        ("c", {"workers": 3, "seed": 5}),
    ):
        files.write_text(tmp_path / name / "config.yaml", yaml.safe_dump(run | {"config": settings | change}))
        for file in ("last.pth", f"epoch_{recipe.resolved().schedule.epochs:04}.pth"):
            files.write_text(tmp_path / name / "checkpoints" / file, "")
    for name, text in (("0", "[not, ours]"), ("1", "{a: "), ("2", "config: 3\ncommand: pretrain")):
        files.write_text(tmp_path / name / "config.yaml", text)
        files.write_text(tmp_path / name / "checkpoints/x", "")
    assert chain.pretrained(recipe, tmp_path) == tmp_path / "c"


def test_features_are_kept_beside_the_runs(in_tmp):
    table = write_table(in_tmp)
    assert "--cache" not in planned(table).steps[1].arguments
    assert "--cache there/features" in planned(table, runs="there").steps[1].command


def test_a_dry_run_shows_the_commands_and_writes_nothing(in_tmp, capfd, monkeypatch):
    table = write_table(in_tmp)
    out, _ = in_process(capfd, monkeypatch, "reproduce", table, "--rows", "random", "--dry-run")
    assert "moco-eval knn random:resnet18_quarter --dataset digits" in out and "not known" in out
    assert "pretrain" not in out and [path.name for path in in_tmp.iterdir()] == ["mini.yaml"]


def test_a_dry_run_times_this_machine_only_when_asked(in_tmp, capfd, monkeypatch):
    words = ("reproduce", "moco-v1-2b", "--rows", "random", "--data", "voc=nowhere", "--dry-run")
    monkeypatch.setattr("moco_eval.papers.cost.measure", lambda *_: pytest.fail("this machine was timed"))
    out, err = in_process(capfd, monkeypatch, *words, code=2)  # the data are looked at behind the plan
    assert "GPU-hours of a V100" in out and "timing" not in err
    monkeypatch.setattr("moco_eval.papers.cost.measure", lambda *_: 3.6)
    out, err = in_process(capfd, monkeypatch, *words, "--here", code=2)
    assert "V100" not in out and "in all about" in out and "timing this machine once" in err


# One step after another


def pretend(folder, monkeypatch, script):
    """Steps run this shell script instead of Python; `$3` is the command."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def run_planned(table):
    plan = planned(table)
    with reproduce.alone(Path("runs")) as lock:
        reproduce.run(plan, {}, lock)


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("exit 2", InputError, "step 1 of 3 was refused, see above: moco-eval pretrain"),
        (
            "exit 1",
            RunFailed,
            r"step 1 of 3 failed \(exit code 1\): moco-eval pretrain .*; run the same",
        ),
        ("kill -9 $$", RunFailed, r"step 1 of 3 failed \(ended by SIGKILL\)"),
        ("exit 3", Interrupted, "stopped in step 1 of 3; run the same command to go on"),
        ('[ "$3" = pretrain ] || exit 1', RunFailed, "step 2 of 3 failed"),
    ],
)
def test_it_stops_at_the_first_step_that_does_not_end_well(script, error, message, in_tmp, monkeypatch):
    pretend(in_tmp, monkeypatch, f"echo $3 >> ran\n{script}")
    with pytest.raises(error, match=message):
        run_planned(write_table(in_tmp))
    assert len(Path("ran").read_text().split()) == (2 if "pretrain" in script else 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_reaches_the_step_which_is_waited_for(number, in_tmp, monkeypatch):
    name = signal.Signals(number).name.removeprefix("SIG")
    pretend(
        in_tmp,
        monkeypatch,
        f"trap 'sleep 0.2; echo {name} > saved; exit 3' {name}; : > up; while :; do :; done",
    )
    monkeypatch.setattr(child, "_is_typed", lambda: False)
    before = signal.getsignal(number)
    tell = f"while [ ! -e up ]; do sleep 0.02; done; kill -{name} {os.getpid()}"
    with subprocess.Popen(["sh", "-c", tell]), pytest.raises(Interrupted, match="step 1 of 3"):
        run_planned(write_table(in_tmp))
    assert Path("saved").read_text() == f"{name}\n" and signal.getsignal(number) is before


def test_a_second_signal_does_not_break_off_what_the_first_began():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        with pytest.raises(KeyboardInterrupt):
            main._interrupt()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_key_typed_in_the_terminal_is_not_passed_on(in_tmp, monkeypatch):
    """The terminal has sent it to the step as well; here nobody has, and the step goes on to its end."""
    pretend(in_tmp, monkeypatch, "touch up; sleep 0.5; touch ended")
    monkeypatch.setattr(child, "_is_typed", lambda: True)
    tell = f"while [ ! -e up ]; do sleep 0.02; done; kill -INT {os.getpid()}"
    with subprocess.Popen(["sh", "-c", tell]), pytest.raises(Interrupted):
        run_planned(write_table(in_tmp))
    assert Path("ended").exists()


def refused_as_another_is_at_work():
    with pytest.raises(InputError, match="another reproduce, or a step that it left running, is at work in runs"):
        run_planned("digits")


def test_two_at_once_are_refused_also_while_the_step_of_a_killed_one_runs(in_tmp, monkeypatch):
    pretend(in_tmp, monkeypatch, "touch ran")
    with reproduce.alone(Path("runs")) as lock:
        refused_as_another_is_at_work()
        step = subprocess.Popen(["sleep", "60"], pass_fds=[lock.fileno()])
    refused_as_another_is_at_work()
    assert not Path("ran").exists()
    step.kill()
    step.wait()
    run_planned("digits")
    assert Path("ran").exists()


def test_torchrun_is_refused(in_tmp, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="give it --nproc, not torchrun"), reproduce.alone(Path("runs")):
        pass


# SLURM


def test_steps_become_jobs_that_wait_for_each_other(cluster, in_tmp, capfd, monkeypatch):
    table = write_table(in_tmp)
    options = ("--sbatch", "partition=gpu", "--sbatch", "gpus-per-node=8", "--sbatch", "exclusive", "--nproc", 8)
    out, _ = in_process(capfd, monkeypatch, "reproduce", table, "--slurm", *options)
    assert "job 1: moco-eval pretrain digits" in out and "(after job 1)" in out and "job 3, pending" in out
    pretrain, moco, random = ((cluster / f"{number}.sh").read_text().splitlines() for number in (1, 2, 3))
    wanted = [
        "partition=gpu",
        "gpus-per-node=8",
        "exclusive",
        "requeue",
        "time=1-00:00:00",
        "job-name=moco-eval-pretrain",
    ]
    assert {f"#SBATCH --{option}" for option in wanted} <= set(pretrain)
    assert "#SBATCH --dependency=afterok:1" in moco and "#SBATCH --kill-on-invalid-dep=yes" in moco
    assert not [line for line in pretrain + random if "dependency" in line]
    assert not metrics("runs")


def test_running_it_again_submits_only_what_is_left_and_not_in_the_queue(cluster, in_tmp, capfd, monkeypatch):
    table = write_table(in_tmp)
    in_process(capfd, monkeypatch, "reproduce", table, "--slurm")
    out, _ = in_process(capfd, monkeypatch, "reproduce", table, "--slurm")
    assert (
        "moco-eval" not in out and "runs/slurm" in out and "job 2, pending" in out and not (cluster / "4.sh").exists()
    )
    assert "scancel the job" in error_line(capfd, monkeypatch, "reproduce", table)
    (cluster / "queue").write_text("1 RUNNING moco-eval-pretrain\n2 RUNNING another\n")  # others have failed
    out, _ = in_process(capfd, monkeypatch, "reproduce", table, "--slurm")
    assert "job 1, running" in out and "job 4: moco-eval knn" in out and "job 5: moco-eval knn" in out
    assert "(after job 1; job 2 has not done it)" in out
    assert "afterok:1" in (cluster / "4.sh").read_text()
    assert (cluster / "asked").read_text().splitlines()[-1].endswith("--jobs=1,4,5")


@pytest.mark.slow
def test_jobs_end_with_the_table(cluster, in_tmp, capfd, monkeypatch):
    table = write_table(in_tmp)
    in_process(capfd, monkeypatch, "reproduce", table, "--slurm")
    run_jobs(cluster)
    out, err = in_process(capfd, monkeypatch, "reproduce", table, "--slurm")
    assert out.count("(n=1)") == 2 and "step 1" not in err and len(metrics("runs")) == 2


def test_what_slurm_and_its_options_are_refused_for(cluster, in_tmp, capfd, monkeypatch):
    table = write_table(in_tmp)
    for option, words in (("dependency=singleton", "sets that itself"), ("nodes=2", "one task on one machine")):
        assert words in error_line(capfd, monkeypatch, "reproduce", table, "--slurm", "--sbatch", option)
    (cluster / "refuse").touch()
    line = error_line(capfd, monkeypatch, "reproduce", table, "--slurm", code=1)
    assert line.startswith("Error: sbatch refuses moco-eval pretrain") and line.endswith("specified: gpus")
    (in_tmp / "bin/srun").unlink()
    if shutil.which("srun") is None:
        assert "there is no srun here" in error_line(capfd, monkeypatch, "reproduce", table, "--slurm")


def test_without_submitit_it_says_how_to_get_it(in_tmp, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    table = write_table(in_tmp)
    assert "pip install 'moco-eval[slurm]'" in error_line(capfd, monkeypatch, "reproduce", table, "--slurm")


def test_a_job_runs_its_step_and_fails_with_it(in_tmp, monkeypatch):
    pretend(in_tmp, monkeypatch, 'echo "$@" > ran; exit $4')
    slurm.Job(["knn", "0"])()
    assert Path("ran").read_text() == "-m moco_eval knn 0\n"
    with pytest.raises(RuntimeError, match="exit code 2: moco-eval knn 2"):
        slurm.Job(["knn", "2"], Path("told"))()
    assert Path("told").read_text() == "2\n"


def test_a_job_whose_time_is_over_lets_its_step_save_and_goes_on_as_another(in_tmp, monkeypatch):
    """As submitit does it: `checkpoint` in a signal's handler, while the job waits for its step."""
    submitit = pytest.importorskip("submitit")
    script = "trap 'sleep 0.2; echo saved > saved; exit 3' TERM; kill -USR2 $$; : > up; while :; do :; done"
    pretend(in_tmp, monkeypatch, script)
    job, asked = slurm.Job(["pretrain"]), []

    def end_of_time(*_):
        asked.append(job.checkpoint())
        sys.exit(1)

    before = signal.signal(signal.SIGALRM, end_of_time)
    tell = f"while [ ! -e up ]; do sleep 0.02; done; kill -ALRM {os.getpid()}"
    try:
        with subprocess.Popen(["sh", "-c", tell]), pytest.raises(SystemExit):
            job()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert Path("saved").exists()  # and SIGUSR2, which SLURM sends to all, has not ended it
    assert isinstance(asked[0], submitit.helpers.DelayedSubmission) and asked[0].function.arguments == ("pretrain",)
