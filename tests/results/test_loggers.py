"""Loggers beside a run's own files: each figure is sent once, whatever stops the run or the logger."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import error_line, in_process

from moco_eval.config import load as configs
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.errors import InputError, Interrupted, RunFailed
from moco_eval.results import loggers
from moco_eval.results.loggers import STATE, Remote, figures_of, send_result
from moco_eval.runtime.rank import is_main
from moco_eval.watch.curve import Point, curve_of
from moco_eval.watch.watch import _send
from pretraining.plan import Plan, plan
from pretraining.train import Trainer, pretrain

CPU = torch.device("cpu")
FAST = ["arch=resnet18_quarter", "views.size=32", "workers=0", "symmetric=false", "queue_size=64", "log_every=1"]
SHORT = [*FAST, "batch_size=16", "bn_groups=2", "schedule.epochs=2", "knn=null"]
RECORD = {
    "protocol": "knn/instdisc@1",
    "metrics": {"top1": 75.0, "top5": 90.0},
    "std": {"top1": 1.5},
    "interval": {"top1": [70.0, 80.0]},
    "dataset": {"name": "digits", "classes": 10},
    "encoder": {"path": "a.pth", "sha256": "0" * 64},
    "deviations": ["k 20 instead of 200"],
    "trials": [{"seed": 0}, {"seed": 1}],
}
# What a run of ours ends with
FIGURES = {
    "knn/instdisc@1/top1": 75.0,
    "knn/instdisc@1/top1_std": 1.5,
    "knn/instdisc@1/top1_low": 70.0,
    "knn/instdisc@1/top1_high": 80.0,
    "knn/instdisc@1/top5": 90.0,
}


class Fake:
    """In the place of a service: its runs, by name, with all that was sent to each."""

    def __init__(self, monkeypatch):
        self.runs: dict[str, list[tuple[int, dict]]] = {}
        self.ends: list = []
        self.settings: dict = {}
        self.breaks_at: int | None = None
        monkeypatch.setattr(loggers, "_opened", self.open)

    def open(self, name, output, kind, settings, run):
        self.run = run or f"run-{len(self.runs)}"
        self.runs.setdefault(self.run, [])
        self.settings = settings
        return self

    def send(self, step, values):
        if step == self.breaks_at:
            raise OSError("the network\nis gone")
        self.runs[self.run].append((step, dict(values)))

    def close(self, ended):
        self.ends.append(ended)


@pytest.fixture
def fake(monkeypatch) -> Fake:
    return Fake(monkeypatch)


def planned(*settings: str) -> Plan:
    config = configs.load("digits", "pretrain", PretrainConfig, [*SHORT, *settings])
    return plan(config, "digits", None, 1, limit=64)  # four steps an epoch


def trained(output: Path, *settings: str) -> dict:
    return torch.load(pretrain(planned(*settings), output, CPU, ["mlflow"]), weights_only=True)["state_dict"]


def interrupted(output: Path, at: int, *settings: str) -> None:
    with pytest.raises(Interrupted):
        trained(output, f"max_steps={at}", *settings)


def written(output: Path) -> list[tuple[int, dict]]:
    """The figures of metrics.jsonl."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    aside = ("step", "epoch", "alarms")
    return [(row["step"], {name: row[name] for name in row if name not in aside}) for row in rows]


def untimed(sent: list[tuple[int, dict]]) -> list[tuple[int, dict]]:
    """Without what differs from run to run."""
    timing = ("images_per_second", "data_wait")
    return [(step, {name: values[name] for name in values if name not in timing}) for step, values in sent]


def test_a_resumed_run_goes_on_in_the_same_run_and_sends_each_step_once(fake, tmp_path):
    monitor = "knn={every: 2, k: 5}"
    interrupted(tmp_path, 3, monitor)
    trained(tmp_path, monitor)
    (sent,) = fake.runs.values()
    assert sent == written(tmp_path)
    assert [step for step, values in sent if "loss" in values] == list(range(1, 9))
    assert 8 in [step for step, values in sent if "knn_top1" in values]
    assert fake.ends == [Interrupted, None]
    assert fake.settings["config"]["queue_size"] == 64


def test_steps_that_are_done_again_after_a_kill_are_not_sent_again(fake, tmp_path, monkeypatch):
    """Killed at step 7, where the last checkpoint is of step 4; all is as in an uninterrupted run without a logger."""
    step = Trainer.train_step

    def killed(self, batch):
        step(self, batch)
        if self.step == 7:
            raise MemoryError

    monkeypatch.setattr(Trainer, "train_step", killed)
    with pytest.raises(MemoryError):
        trained(tmp_path / "killed")
    monkeypatch.setattr(Trainer, "train_step", step)
    logged = trained(tmp_path / "killed")
    plain = torch.load(pretrain(planned(), tmp_path / "plain", CPU), weights_only=True)["state_dict"]
    (sent,) = fake.runs.values()
    expected = untimed(written(tmp_path / "plain"))
    assert untimed(sent) == expected == untimed(written(tmp_path / "killed")) and fake.ends == [MemoryError, None]
    assert all(torch.equal(logged[name], plain[name]) for name in plain)
    assert not (tmp_path / "plain" / STATE).exists()


def test_a_logger_that_fails_is_named_once_and_sent_the_rest_next_time(fake, tmp_path, capfd):
    fake.breaks_at = 2
    interrupted(tmp_path, 6)
    err = capfd.readouterr().err
    assert err.count("mlflow fails (the network): nothing more goes there; the run itself goes on") == 1
    assert [step for step, values in written(tmp_path) if "loss" in values][-1] == 6
    fake.breaks_at = None
    trained(tmp_path)
    (sent,) = fake.runs.values()
    assert sorted(sent, key=lambda row: row[0]) == sorted(written(tmp_path), key=lambda row: row[0])


def test_a_logger_that_comes_late_is_sent_the_whole_curve(fake, tmp_path):
    with pytest.raises(Interrupted):
        pretrain(planned("max_steps=5"), tmp_path, CPU)
    trained(tmp_path)
    (sent,) = fake.runs.values()
    assert sent == written(tmp_path)


def test_a_run_that_fails_says_so_to_its_loggers(fake, tmp_path):
    with pytest.raises(RunFailed):
        trained(tmp_path, "optimizer.lr=1e30")
    assert fake.ends == [RunFailed]


def test_other_processes_than_the_first_log_nothing(fake, tmp_path, monkeypatch):
    from pretraining.record import Metrics

    assert is_main()
    for name in ("moco_eval.runtime.collectives.is_main", "pretraining.record.is_main"):
        monkeypatch.setattr(name, lambda: False)
    metrics = Metrics(planned(), tmp_path, 0, CPU, ["wandb", "mlflow"])
    metrics.write({"step": 1, "epoch": 0, "knn_top1": 3.0})
    assert fake.runs == {} and metrics.loggers == [] and list(tmp_path.iterdir()) == []


def test_a_result_is_sent_once_with_what_it_is_of(fake, tmp_path):
    for _ in range(2):
        send_result(RECORD, tmp_path, ["wandb", "mlflow", "wandb"])
    assert list(fake.runs.values()) == [[(0, FIGURES)]] * 2
    assert figures_of(RECORD) == FIGURES
    assert fake.settings["encoder"]["sha256"] == "0" * 64 and fake.settings["seeds"] == [0, 1]
    state = json.loads((tmp_path / STATE).read_text())
    assert state == {name: {"run": f"run-{i}", "sent": {"result": 0}} for i, name in enumerate(("wandb", "mlflow"))}


def test_a_result_that_cannot_be_sent_is_there_and_sent_by_the_next_call(fake, tmp_path, capfd):
    fake.breaks_at = 0
    send_result(RECORD, tmp_path, ["wandb"])
    assert "wandb fails (the network)" in capfd.readouterr().err
    fake.breaks_at = None
    send_result(RECORD, tmp_path, ["wandb"])
    assert fake.runs == {"run-0": [(0, FIGURES)]}


def test_a_watched_curve_is_sent_point_by_point_in_any_order(fake, tmp_path):
    points = [Point(f"epoch_{n:04d}.pth", when, {"knn/instdisc@1": RECORD}) for when, n in enumerate((20, 10, 30))]
    services = loggers.remotes(["mlflow"], tmp_path, "watch", {})
    for count in (1, 2, 3, 3):
        _send(curve_of(points[:count]), services)
    (sent,) = fake.runs.values()
    figures = {"watch/knn/instdisc@1/top1": 75.0, "watch/knn/instdisc@1/top5": 90.0}
    assert sent == [(20, figures), (10, figures), (30, figures)]


@pytest.mark.parametrize("state", ["[]", '{"wandb": {}}', '{"wandb": {"run": 3, "sent": {}}}', '{"wandb": 1'])
def test_a_damaged_memory_is_refused(fake, tmp_path, state):
    (tmp_path / STATE).write_text(state)
    with pytest.raises(InputError, match=STATE):
        Remote("wandb", tmp_path, "pretrain", {})


def test_what_is_not_installed_or_too_old_is_refused_before_anything_is_done(tmp_path, capfd, monkeypatch):
    def version(package):
        if package == "wandb":
            raise loggers.metadata.PackageNotFoundError
        return "2.9"

    monkeypatch.setattr(loggers.metadata, "version", version)
    given = ["digits", "--dataset", "digits", "--output", tmp_path / "run", "--log"]
    line = error_line(capfd, monkeypatch, "pretrain", *given, "wandb")
    assert line == 'Error: --log wandb needs the package wandb: pip install -U "moco-eval[wandb]"'
    line = error_line(capfd, monkeypatch, "knn", "random:resnet18", *given[1:], "mlflow")
    assert "--log mlflow needs mlflow-skinny 3.0 or newer, and 2.9 is there: pip install" in line
    assert not (tmp_path / "run").exists()


# The services' own libraries, offline, read back by themselves


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """Nothing leaves this machine."""
    (tmp_path / "home").mkdir()
    variables = {
        "WANDB_MODE": "offline",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_PROJECT": "",
        "HOME": str(tmp_path / "home"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_EXPERIMENT_NAME": "",
        "DO_NOT_TRACK": "true",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return tmp_path


SETTINGS = [word for setting in SHORT for word in ("--set", setting)]
PRETRAIN = ["pretrain", "digits", "--dataset", "digits", "--limit", 64, "--device", "cpu", *SETTINGS]
KNN = ["knn", "run/checkpoints/last.pth", "--dataset", "digits", "--limit", 50, "--set", "k=5", "--device", "cpu"]


def commands(capfd, monkeypatch, logger: str) -> dict:
    """Eight steps, stopped after three; a kNN of them, twice. Returns the record."""
    in_process(capfd, monkeypatch, *PRETRAIN, "--output", "run", "--log", logger, "--set", "max_steps=3", code=3)
    in_process(capfd, monkeypatch, *PRETRAIN, "--output", "run", "--log", logger)
    for _ in range(2):
        in_process(capfd, monkeypatch, *KNN, "--workers", 0, "--output", "knn", "--log", logger)
    return json.loads(Path("knn/result.json").read_text())


def test_mlflow_reads_back_a_curve_and_a_result(offline, in_tmp, capfd, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    record = commands(capfd, monkeypatch, "mlflow")
    client = mlflow.MlflowClient()
    (experiment,) = [place for place in client.search_experiments() if place.name == "moco-eval"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert {name: run.info.status for name, run in runs.items()} == {"run": "FINISHED", "knn": "FINISHED"}
    names = {name for _, values in written(Path("run")) for name in values}
    for name in names:
        history = client.get_metric_history(runs["run"].info.run_id, name)
        expected = [(step, values[name]) for step, values in written(Path("run")) if name in values]
        assert sorted((point.step, point.value) for point in history) == expected
    assert {"loss", "chance"} <= names
    assert runs["run"].data.params["config.queue_size"] == "64"
    figures = {name.replace("@", ":"): value for name, value in figures_of(record).items()}
    assert runs["knn"].data.metrics == pytest.approx(figures)
    params = runs["knn"].data.params
    assert (params["protocol"], params["dataset.name"]) == (record["protocol"], "digits")
    assert params["encoder.sha256"] == record["encoder"]["sha256"]


def records(folder: Path) -> list[dict]:
    """Of an offline run of W&B, by its own reader."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    read = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in read.stdout.splitlines()]


def test_wandb_reads_back_a_curve_and_a_result(offline, in_tmp, capfd, monkeypatch):
    pytest.importorskip("wandb")
    record = commands(capfd, monkeypatch, "wandb")
    sessions = [records(folder) for folder in sorted(Path("run/wandb").glob("offline-run-*"))]
    heads = [row["run"] for session in sessions for row in session if row["type"] == "run"]
    assert len(heads) == 2 and {(head["run_id"], head["project"]) for head in heads} == {
        (heads[0]["run_id"], "moco-eval")
    }
    assert heads[0]["config"]["update"]["config"]["queue_size"] == 64
    rows = [row["history"]["item"] for session in sessions for row in session if row["type"] == "history"]
    assert [point(row) for row in rows] == written(Path("run"))
    (folder,) = Path("knn/wandb").glob("offline-run-*")
    session = records(folder)
    (result,) = [row["history"]["item"] for row in session if row["type"] == "history"]
    assert point(result) == (0, pytest.approx(figures_of(record)))
    (config,) = [row["run"]["config"]["update"] for row in session if row["type"] == "run"]
    assert config["encoder"]["sha256"] == record["encoder"]["sha256"]
    assert (config["protocol"], config["dataset"]["name"]) == (record["protocol"], "digits")


def point(row: dict) -> tuple[int, dict]:
    """The step and the figures of a row of W&B's, without its own."""
    return row["step"], {name: value for name, value in row.items() if name != "step" and not name.startswith("_")}


def test_wandb_without_a_login_is_refused_at_once(offline, in_tmp, capfd, monkeypatch):
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # which reads the variables once
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "")
    line = error_line(capfd, monkeypatch, *PRETRAIN, "--output", "run", "--log", "wandb")
    assert "--log wandb: nobody is logged in; run wandb login, or set WANDB_MODE=offline" in line
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert "WANDB_MODE is disabled" in error_line(capfd, monkeypatch, *PRETRAIN, "--output", "run", "--log", "wandb")
    assert not Path("run").exists()


def test_a_run_that_mlflow_has_lost_is_refused_with_the_way_out(offline, in_tmp):
    pytest.importorskip("mlflow")
    send_result(RECORD, in_tmp, ["mlflow"])
    (in_tmp / "mlflow.db").rename(in_tmp / "elsewhere.db")
    with pytest.raises(InputError, match=r"it began as \w+: go where that is, or take mlflow out of .*loggers.json"):
        Remote("mlflow", in_tmp, "pretrain", {})
