"""One battery over every row of the table of protocols."""

import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from commands import in_process

from moco_eval.classification import forecast, suite
from moco_eval.classification.judge import canonical, check, judge_in_memory, prepared, resolved
from moco_eval.classification.protocols import (
    PROTOCOLS,
    by_name,
    feature_override,
    followed_by,
    kinds,
    load_config,
    tasks,
)
from moco_eval.classification.task import Code, Task
from moco_eval.config import load as configs
from moco_eval.config.base import Run
from moco_eval.config.deviations import differences
from moco_eval.data.catalogue import open_images
from moco_eval.encoders.load import load
from moco_eval.errors import InputError

CPU = torch.device("cpu")
NAMES = [row.protocol for row in PROTOCOLS]
# of a protocol with many images, epochs or settings, what is enough for sixty images
SMALL = {
    "mixup.groups": [1],
    "batch_size": [16],
    "workers": [0],
    "k": [5, [1, 5]],
    "schedule.warmup_epochs": [0],
    "schedule.epochs": [1],
    "drop_path": [0],  # what needs a transformer
    "optimizer.layer_decay": [1],
    "pooling": ["null"],
    "crops": [1],
    "path.count": [2],
    "costs": [[0.1, 1.0]],
    "shots": [[1]],
    "samples": [2],
    "drop_last": [False],
    "learning_rates": [[0.1, 1.0]],
    "features": [["pooled"]],
}


@pytest.fixture(scope="module")
def task() -> Task:
    """Six images of each digit, and forty to test on; those of several classes are the same, one class each."""
    train, test = (open_images("digits", None, split) for split in ("train", "test"))
    encoder = load("random:resnet18_quarter")
    with torch.random.fork_rng():
        head = torch.nn.Linear(encoder.feature_dim, 16)
    return Task(replace(encoder, head=head), train.few_labels(6, 0), test.take(np.arange(40)))


@pytest.fixture(autouse=True)
def one_process(monkeypatch) -> None:
    """joblib's processes take seconds to start."""
    monkeypatch.setattr("joblib.cpu_count", lambda: 1)


def small(protocol: str):
    """The shipped config of a protocol with the first value that fits of every key of SMALL that it has."""
    row = by_name(protocol)
    overrides: list[str] = []
    for key, values in SMALL.items():
        for value in values:
            try:
                load_config(row.name.name, row.name.kind, [*overrides, f"{key}={value}"])
            except InputError:
                continue
            overrides.append(f"{key}={value}")
            break
    return load_config(row.name.name, row.name.kind, overrides)


@pytest.mark.parametrize("protocol", NAMES)
def test_a_row_has_all_that_it_needs(protocol):
    row = by_name(protocol)
    code = row.code()
    assert str(row.name) == protocol and isinstance(code, Code) and issubclass(row.model, Run)
    assert row.title.endswith(".") and row.selection and row.over in ("head", "labels", "finetune")
    config = load_config(row.name.name, row.name.kind)
    assert config.protocol == protocol and followed_by(row.name.name, row.name.kind) is row
    assert list(inspect.signature(code.run_trial).parameters)[:3] == ["task", "config", "seed"]
    assert not row.short or (code.sources and code.own_work and code.memory)  # what a suite takes
    passes = code.passes(config, 1000, 100)
    assert passes.trained + passes.forward + passes.extracted >= 1000
    assert set(row.free) <= set(row.model.model_fields)


def test_names_are_told_apart():
    assert len(set(NAMES)) == len(NAMES)
    shorts = [name for row in PROTOCOLS for name in row.short]
    assert len(set(shorts)) == len(shorts)
    assert [row for rows in kinds().values() for row in rows] == sorted(
        PROTOCOLS, key=lambda row: list(kinds()).index(row.name.kind)
    )


@pytest.mark.parametrize("protocol", NAMES)
def test_a_protocol_does_not_deviate_from_itself(protocol, task):
    row = by_name(protocol)
    shipped = canonical(row, task)
    assert differences(load_config(row.name.name, row.name.kind), shipped, row.free) == []
    changed = shipped.model_copy(update={"batch_size": shipped.batch_size + 1, "precision": "bf16", "workers": 1})
    assert any("precision bf16" in deviation for deviation in differences(changed, shipped, row.free))


@pytest.mark.parametrize("protocol", NAMES)
def test_it_judges_in_memory_and_repeats_itself(protocol, task, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = small(protocol)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, second = (judge_in_memory(task, config, CPU) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert list(tmp_path.iterdir()) == []
    assert first.record["protocol"] == protocol and first.record["metrics"] == second.record["metrics"]
    assert all(math.isfinite(value) and 0 <= value <= 100 for value in first.record["metrics"].values())
    assert first.arrays["scores"].shape[-2:] == (40, 10) and np.array_equal(
        first.arrays["scores"], second.arrays["scores"]
    )
    assert first.resolved["command"] == by_name(protocol).name.kind
    assert len(first.record["trials"]) == prepared(task, config).trials


@pytest.mark.parametrize("protocol", NAMES)
def test_its_sources_are_what_its_trials_take(protocol, task, monkeypatch):
    """No trial asks for a feature that the suite has not extracted, and the suite extracts none in vain."""
    sources = by_name(protocol).code().sources
    if sources is None:
        return
    config = small(protocol)
    work, asked = prepared(task, config), []
    real = Task.several
    monkeypatch.setattr(
        Task, "several", lambda self, wanted, device: asked.extend(wanted) or real(self, wanted, device)
    )
    by_name(protocol).code().run_trial(work, config, config.seed, None, CPU)
    assert {str(source.key()) for source in asked} == {str(source.key()) for source in sources(work, config)}


@pytest.mark.parametrize("protocol", [row.protocol for row in PROTOCOLS if row.short])
def test_the_suite_and_its_forecast_know_it(protocol, task, tmp_path, monkeypatch):
    monkeypatch.setattr(forecast, "PART", 0.05)
    row = by_name(protocol)
    assert tasks(row.short[0]) == tasks(protocol) == [row]
    item = suite.Item(protocol, small(protocol), task, tmp_path / "run")
    work = forecast.own_work(item, 16, CPU, 0.05)
    assert work.protocol == protocol and work.seconds > 0 and work.basis and 0 < work.memory < 2e9


@pytest.mark.parametrize("protocol", ["knn/instdisc@1", "svm/voc07-low-shot@1"])
def test_the_suite_gives_what_the_protocol_gives(protocol, task, tmp_path):
    """Low-shot makes trials of its samples, once."""
    item = suite.Item(protocol, small(protocol), task, tmp_path / "run")
    suite.able([item])
    (record,), _ = suite.run([item], tmp_path / "cache", CPU)
    assert record["metrics"] == judge_in_memory(task, item.config, CPU).record["metrics"]


def test_the_command_line_shows_every_row(capfd, monkeypatch):
    for kind, rows in kinds().items():
        out, _ = in_process(capfd, monkeypatch, kind, "--help")
        words = " ".join(out.split())
        for row in rows:
            assert row.name.name in words
            assert row is rows[0] or f"{row.protocol}: {row.title}" in words
    assert "knn/grid@1 (grid)" in " ".join(in_process(capfd, monkeypatch, "suite", "--help")[0].split())


@pytest.mark.parametrize(
    ("protocol", "words"),
    [("knn/instdis@1", "Did you mean 'knn/instdisc@1'"), ("linear/quick@10", "no protocol 'linear/quick@10'")],
)
def test_another_name_is_refused(protocol, words):
    with pytest.raises(InputError, match=words):
        by_name(protocol)


def test_a_config_of_another_kind_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("protocol: linear/quick@1\nbatch_size: 8\n")
    with pytest.raises(InputError, match=r"'linear/quick@1' of .*mine\.yaml is none that moco-eval knn runs"):
        load_config(str(tmp_path / "mine.yaml"), "knn")


def test_the_feature_goes_where_the_config_says_it():
    assert feature_override(by_name("knn/instdisc@1").model, "layer3") == ["feature=layer3"]
    assert feature_override(by_name("linear/sweep@1").model, "layer3") == ["features=[layer3]"]
    assert feature_override(by_name("logistic/lbfgs@1").model, "layer3") == []
    assert feature_override(by_name("knn/instdisc@1").model, None) == []


def test_settings_become_overrides():
    assert configs.as_overrides({"batch_size": 8, "schedule": {"epochs": 2}, "costs": (0.1, 1e-05)}) == [
        "batch_size=8",
        "schedule.epochs=2",
        "costs=[0.1, 1.0e-05]",
    ]
    with pytest.raises(InputError, match=r"batch_size is <object object at .*of type object"):
        configs.as_overrides({"batch_size": object()})


def test_what_is_checked_is_what_is_judged(task):
    """`check` refuses before anything runs and sees the prepared task."""
    config = small("svm/voc07-low-shot@1")
    work = prepared(task, config)
    check(work, config)
    assert work.trials == config.samples == 2 and resolved(work, config)["trials"] == 2
