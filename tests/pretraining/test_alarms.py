"""Alarms in words: each sounds when it should and is silent when it should be."""

import json

import pytest
import torch
from test_resume import SETTINGS

from moco_eval.config import load as configs
from moco_eval.config.pretrain import PretrainConfig
from pretraining.alarms import PATIENCE, alarms
from pretraining.plan import Plan, plan
from pretraining.train import pretrain


def planned(processes: int = 1, **values) -> Plan:
    settings = [f"{key}={value}" for key, value in ({"symmetric": "false"} | values).items()]
    return plan(configs.load("digits", "pretrain", PretrainConfig, settings), "digits", None, processes)


def lines(first_step: int = 100, **values) -> list[dict]:
    healthy = {"loss": 4.0, "accuracy": 30.0, "feature_std": 0.8}
    return [{"step": first_step + 10 * i, **healthy, **values} for i in range(PATIENCE)]


def test_a_healthy_run_is_silent():
    assert alarms(planned(), lines(), [30.0, 40.0]) == {}


def test_loss_at_chance_after_the_queue_has_filled():
    run = planned(queue_size=1024)
    assert run.chance == pytest.approx(6.932, abs=1e-3) and run.full_step == 16
    words = alarms(run, lines(loss=6.925), [])["chance"]
    assert "loss at chance after the queue has filled: 6.925 nats, chance 6.932" in words
    assert alarms(run, lines(first_step=10, loss=6.925), []) == {}  # the queue was not full yet
    assert alarms(run, lines(loss=6.925)[1:], []) == {}  # not long enough
    assert alarms(run, lines(loss=6.90), []) == {}  # slowly learning


def test_symmetric_and_end_to_end_are_held_against_their_own_chance():
    both = planned(symmetric="true", queue_size=1024)
    assert "chance" in alarms(both, lines(loss=13.84), []) and "chance" not in alarms(both, lines(loss=13.80), [])
    ours = planned(mechanism="end_to_end", queue_size=64)
    assert "chance" in alarms(ours, lines(loss=4.15), []) and "chance" not in alarms(ours, lines(loss=4.10), [])


def test_collapse_says_what_moves_too_fast():
    words = alarms(planned(momentum=0), lines(feature_std=0.01), [])["collapse"]
    assert words.startswith("features collapsed: the queries' spread is 0.010")
    assert "momentum 0 moves the keys too fast; the paper takes 0.999" in words
    assert "a smaller optimizer.lr" in alarms(planned(), lines(feature_std=0.01), [])["collapse"]


@pytest.mark.parametrize(
    ("processes", "settings", "way_out"),
    [
        (1, {"bn": "none"}, "take bn: split with bn_permute: true"),
        (1, {"bn_permute": "false"}, "take bn: split with bn_permute: true"),
        (2, {"bn_permute": "false"}, "take bn: shuffle with bn_permute: true"),
        (2, {"bn": "shuffle"}, "bn: shuffle with bn_permute: true is on: look at the views"),
    ],
)
def test_a_leak_names_the_mode_that_works_here(processes, settings, way_out):
    """The curve of the paper's Figure A.1: accuracy to 99.9 %, kNN from 28.5 down."""
    run, leaking = planned(processes, **settings), lines(accuracy=99.95)
    words = alarms(run, leaking, [17.8, 25.9, 28.5, 27.3])["leak"]
    assert "pretext accuracy over 99.9 % while kNN falls (28.5 to 27.3)" in words and words.endswith(way_out)
    assert alarms(run, leaking, [17.8, 25.9, 28.5]) == {}  # still rising
    assert alarms(run, lines(accuracy=97.0), [28.5, 27.3]) == {}


def test_an_alarm_is_said_once_and_written_down_at_each_line(tmp_path, capfd):
    """Without momentum the keys follow the queries at once, and the small recipe collapses."""
    settings = ["momentum=0", "optimizer.lr=0.06", "checkpoints.steps=null", "log_every=2", "schedule.epochs=3"]
    recipe = configs.load("digits", "pretrain", PretrainConfig, [*SETTINGS, *settings])
    pretrain(plan(recipe, "digits", None, 1), tmp_path / "run", torch.device("cpu"))
    err = capfd.readouterr().err
    assert err.count("loss at chance after the queue has filled") == 1
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    sounding = [line["step"] for line in metrics if "chance" in line.get("alarms", [])]
    assert len(sounding) > 5
