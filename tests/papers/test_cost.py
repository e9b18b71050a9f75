"""What a step is predicted to cost; pieces of work are closed forms, timing is of small networks."""

import json
import time
from pathlib import Path

import pytest
import torch
import yaml
from test_papers import cifar_record

from moco_eval.classification.protocols import PROTOCOLS, load_config
from moco_eval.config import load as configs
from moco_eval.config.detection import DetectConfig
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.encoders.architectures import architecture
from moco_eval.papers import cost, gpu_hours, tables, todo
from moco_eval.papers import steps as chain
from moco_eval.results.environment import hardware
from moco_eval.runtime.text import duration

CPU = torch.device("cpu")
DIGITS = """
id: digits
paper: ours
table: none
caption: none
source: none
reference: []
columns:
  knn: {title: kNN, metric: top1, protocol: knn/instdisc@1, dataset: digits, config: digits}
  linear: {title: linear, metric: top1, protocol: linear/moco-lincls@1, dataset: digits, config: digits, trials: 3}
  quick: {title: quick, metric: top1, protocol: linear/quick@1, dataset: digits, config: quick}
  finetune: {title: tuned, metric: top1, protocol: finetune/openselfsup-1percent@1, dataset: digits, config: digits}
  AP: {title: AP, metric: AP, protocol: detect/digits-r50-c4@1, dataset: digits, trials: 2}
rows:
- label: pretrained
  published: {knn: 1.0, linear: 1.0, quick: 1.0, finetune: 1.0}
  states: {arch: resnet18_quarter, data: digits, epochs: 3, batch: 64, K: 1024, m: 0.995, tau: 0.2}
  recipe: {config: digits, dataset: digits, set: {schedule.epochs: 3}}
- label: random
  published: {AP: 1.0}
  match: {weights: random, arch: resnet50_quarter}
"""
TRAIN, TEST = 1297, 500  # digits


@pytest.fixture
def table():
    return tables.Table.model_validate(yaml.safe_load(DIGITS))


@pytest.fixture
def steps(table):
    return {
        step.arguments[0] if step.kind != "evaluate" else step.cells[0][1]: step
        for step in chain.steps(table, table.rows, chain.Places(Path("none")))
    }


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOCO_EVAL_CACHE", str(tmp_path))
    return tmp_path / "costs.json"


def pieces(steps, table, name):
    """Kind of network and images of each piece of a step."""
    step = steps[name]
    row = next(row for row in table.rows if row.label == step.cells[0][0])
    return [(probe.kind, probe.arch, images) for probe, images in cost.work(step, row)]


# Durations


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.24, "0.2 s"),
        (40, "40 s"),
        (99.4, "99 s"),
        (720, "12 min"),
        (3 * 3600, "3.0 h"),
        (71 * 3600, "71.0 h"),
        (53 * 86400, "53 days"),
        (261 * 86400, "261 days"),
        (25_000 * 86400, "68 years"),
    ],
)
def test_durations_in_the_unit_that_fits(seconds, text):
    assert duration(seconds) == text


def test_what_a_cost_says():
    assert cost.Cost(10_800.0, "timed").phrase == "about 3.0 h"
    assert cost.Cost(10_800.0, "runs/a").phrase == "about 3.0 h, as in runs/a"
    assert cost.Cost(30.0, "small").phrase == "under a minute"


# How many images go through what


def test_a_pretraining_is_its_epochs_twice_if_symmetric_and_the_monitor(steps, table):
    views = 2 * 3 * TRAIN  # symmetric
    monitor = TRAIN + TEST  # every 2 epochs of 3
    arch = "resnet18_quarter"
    assert pieces(steps, table, "pretrain") == [("train", arch, views), ("forward", arch, views + monitor)]


@pytest.mark.parametrize(
    ("mechanism", "train", "forward"), [("moco", 1, 1), ("memory_bank", 1, 0), ("end_to_end", 2, 0)]
)
def test_only_moco_encodes_keys_without_gradient(mechanism, train, forward, steps):
    recipe = configs.load("moco_v1_r50", "pretrain", PretrainConfig)
    recipe = recipe.model_copy(update={"mechanism": mechanism, "knn": None})
    images = {probe.kind: count for probe, count in cost._pretraining(steps["pretrain"], recipe)}
    assert images["train"] == train * TRAIN * 200 and images.get("forward", 0) == forward * TRAIN * 200


def test_a_batch_in_parts_is_encoded_once_more_in_moco_v3():
    recipe = configs.load("moco_v3_vit_small", "pretrain", PretrainConfig).model_copy(update={"knn": None})
    for accumulate, forward in ((1, 1), (8, 2)):
        parts = recipe.model_copy(update={"accumulate": accumulate})
        images, views = dict(cost.pretraining(parts, "imagenet", "fp32", 8)), 2 * 300 * 1_281_167
        assert {probe.kind: count / views for probe, count in images.items()} == {"train": 1, "forward": forward}
        assert {probe.batch for probe in images} == {512 // accumulate}


def test_what_each_protocol_looks_at(steps, table):
    arch = "resnet18_quarter"
    epochs = load_config("digits", "linear").schedule.epochs
    crops = load_config("quick", "linear").crops
    tuned = load_config("digits", "finetune")
    assert pieces(steps, table, "knn") == [("forward", arch, TRAIN + TEST)]
    assert pieces(steps, table, "linear") == [("forward", arch, 3 * (epochs * TRAIN + TEST))]  # three trials
    assert pieces(steps, table, "quick") == [("forward", arch, (1 + crops) * TRAIN + TEST)]
    looks = max(1, tuned.schedule.epochs // tuned.test_every)
    assert pieces(steps, table, "finetune") == [
        ("train", arch, tuned.schedule.epochs * TRAIN),
        ("forward", arch, looks * TEST),
    ]


def test_a_detection_is_its_iterations_and_the_test_images(steps, table):
    recipe = configs.load("digits_r50_c4", "detect", DetectConfig)
    train = 2 * (recipe.schedule.iterations + recipe.precise_bn / 3) * recipe.batch_size  # two trials
    assert pieces(steps, table, "AP") == [
        ("train", "resnet50_quarter", pytest.approx(train)),
        ("forward", "resnet50_quarter", 2 * recipe.scenes.test),
    ]


@pytest.mark.parametrize("name", [name for name, _ in tables.tables()])
@pytest.mark.parametrize("released", [False, True])
def test_every_step_of_every_table_has_a_cost(name, released, monkeypatch):
    monkeypatch.setattr(cost, "seconds_per_image", lambda probe, device: 0.01 if architecture(probe.arch) else None)
    table = tables.load_table(name)
    steps = chain.steps(table, table.rows, chain.Places(Path("none"), released=released))
    for step, found in zip(steps, cost.costs(steps, table, [])):
        assert found is not None and found.seconds > 0, step.command


def test_gpus_share_the_work_and_a_cpu_is_shared(steps, table, monkeypatch):
    monkeypatch.setattr(cost, "seconds_per_image", lambda probe, device: 0.01)
    places = chain.Places(Path("none"), processes=8)
    (step, *_) = chain.steps(table, table.rows[:1], places)
    alone, shared = (
        cost._cost(step, table.rows[0], table, [], torch.device(device)).seconds for device in ("cpu", "cuda")
    )
    assert alone == pytest.approx(8 * shared)


# Records that tell


def here(record, seconds, **changes):
    where = {"hardware": hardware(), "command": "moco-eval knn x", "time": "2026-01-01T00:00:00+0000"}
    return record | {"cost": {"seconds": seconds, "device": "cpu", "cached_images": 0}, "environment": where} | changes


def cifar_cost(records, label="asymmetric loss, 400 epochs"):
    table = tables.load_table("cifar10-demo")
    (row,) = [row for row in table.rows if row.label == label]
    step = chain.steps(table, [row], chain.Places(Path("none")))[1]
    return cost.measured(step, row, table, records, CPU)


def test_a_record_of_the_same_evaluation_on_this_machine_is_preferred():
    found = cifar_cost([here(cifar_record(), 120.0)])
    assert (found.seconds, found.basis) == (120.0, "runs/0")


@pytest.mark.parametrize(
    "changes",
    [
        {"protocol": "knn/instdisc@1"},
        {"dataset": {"name": "digits"}},
        {"dataset": {"name": "cifar10", "subset": "1 %"}},
        {"deviations": ["max_steps 2 instead of None"]},
        {"cost": {"seconds": 120.0, "device": "cuda", "cached_images": 0}},
        {"cost": {"seconds": 120.0, "device": "cpu", "cached_images": 60_000}},
        {"environment": {"hardware": {"machine": "another"}, "command": "moco-eval knn x"}},
        {"environment": {"hardware": hardware(), "command": "moco-eval knn x --nproc 4"}},
    ],
)
def test_another_record_tells_nothing(changes):
    assert cifar_cost([here(cifar_record(), 120.0, **changes)]) is None


# Timing


PROBE = cost.Probe("forward", "resnet18_quarter", 32, 4, "fp32")


def test_a_piece_is_timed_once(empty_cache, monkeypatch, capfd):
    first = cost.seconds_per_image(PROBE, CPU)
    assert first > 0 and f"timing this machine once: {PROBE.phrase}" in capfd.readouterr().err
    (key,) = json.loads(empty_cache.read_text())
    assert cost.machine() in key and torch.__version__ in key and PROBE.phrase in key
    monkeypatch.setattr(cost, "measure", lambda probe, device: pytest.fail("timed again"))
    assert cost.seconds_per_image(PROBE, CPU) == first
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(cost, "measure", lambda probe, device: 2.5)
    assert cost.timed_anew(PROBE, CPU) == cost.seconds_per_image(PROBE, CPU) == 2.5


@pytest.mark.parametrize("held", ["{", "[1, 2]", '{"a": "b"}', "\x00\xff"])
def test_a_damaged_file_is_made_anew(held, empty_cache, monkeypatch):
    empty_cache.write_text(held)
    monkeypatch.setattr(cost, "measure", lambda probe, device: 0.5)
    assert cost.seconds_per_image(PROBE, CPU) == 0.5
    assert list(json.loads(empty_cache.read_text()).values()) == [0.5]


def test_no_room_for_the_file_is_only_a_warning(tmp_path, monkeypatch, capfd):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOCO_EVAL_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(cost, "measure", lambda probe, device: 0.5)
    assert cost.seconds_per_image(PROBE, CPU) == 0.5
    assert "warning: the timing is not kept" in capfd.readouterr().err


def test_too_little_memory_leaves_the_cost_unknown(empty_cache, monkeypatch, steps, table):
    def no_memory(run, device, most):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(cost, "_fastest", no_memory)
    assert cost.seconds_per_image(PROBE, CPU) is None and not empty_cache.exists()
    assert cost.costs([steps["knn"]], table, []) == [None]


def test_the_first_run_of_all_does_not_count(monkeypatch):
    waits = [0.2]

    def pieces(probe, device):
        for _ in range(2):
            yield 1, lambda: time.sleep(waits.pop() if waits else 0.001)

    monkeypatch.setattr(cost, "encoder_pieces", pieces)
    monkeypatch.setattr(cost, "SECONDS", 0.1)
    assert cost.measure(PROBE, CPU) < 0.1


def test_batches_of_a_cpu_are_small_whatever_the_recipe(empty_cache, monkeypatch):
    seen = []
    monkeypatch.setattr(cost, "measure", lambda probe, device: seen.append(probe.batch) or 0.5)
    for batch in (8, 100, 256):
        cost.seconds_per_image(cost.Probe("train", "resnet50", 224, batch, "fp32"), CPU)
    assert seen == [8, cost.CPU_BATCH]


def test_timing_draws_nothing_from_the_users_generator():
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    cost.measure(PROBE, CPU)
    assert torch.equal(torch.rand(2), wanted)


@pytest.mark.parametrize("arch", ["resnet18_quarter_cifar", "vit_narrow_patch16_64"])
def test_training_takes_longer_than_a_forward_pass(arch):
    seconds = {
        kind: cost.measure(cost.Probe(kind, arch, 64 if "vit" in arch else 32, 8, "fp32"), CPU)
        for kind in ("train", "forward")
    }
    assert 1.2 * seconds["forward"] < seconds["train"]


def test_a_detectors_pieces_are_of_its_recipe():
    recipe = configs.load("digits_r50_c4", "detect", DetectConfig)
    quarter = cost._smaller(recipe, 0.25)
    assert quarter.roi.batch_per_image == recipe.roi.batch_per_image / 4
    assert quarter.rpn.post_nms_test == round(recipe.rpn.post_nms_test / 4)
    (image,), (target,) = cost._scene(recipe, 1.0, 1, 0, CPU)
    assert image.shape == (3, 120, 160) or image.shape == (3, 128, 160)  # max_size 160
    sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
    assert (sides > 0).all() and (target["boxes"] >= 0).all() and (target["boxes"][:, 2] <= image.shape[2]).all()


@pytest.mark.parametrize("kind", ["train", "forward"])
def test_a_detector_is_timed(kind):
    assert cost.measure(cost.Probe(kind, "resnet50_quarter", 0, 2, "fp32", "digits_r50_c4"), CPU) > 0


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["coco_r50_fpn_1x", "coco_keypoints_r50_fpn_2x"])
def test_detectors_with_masks_and_keypoints_are_timed(recipe):
    assert cost.measure(cost.Probe("train", "resnet50_quarter", 0, 1, "fp32", recipe), CPU) > 0


@pytest.mark.slow
def test_the_prediction_is_within_a_factor_of_three(steps, table, tmp_path, empty_cache):
    """A pretraining and a fine-tuned detector on built-in data, against what they really take in this process."""
    from moco_eval.detection.detect import detect
    from moco_eval.detection.task import DetectionTask
    from moco_eval.encoders.load import load
    from pretraining.plan import plan
    from pretraining.train import pretrain

    pretraining, detection = cost.costs([steps["pretrain"], steps["AP"]], table, [])
    began = time.perf_counter()
    recipe = table.rows[0].recipe.resolved().model_copy(update={"precision": "fp32"})
    pretrain(plan(recipe, "digits", None, 1), tmp_path / "pretrain", CPU)
    took = time.perf_counter() - began
    assert pretraining.seconds / 3 < took < pretraining.seconds * 3
    recipe = configs.load("digits_r50_c4", "detect", DetectConfig)
    record = detect(DetectionTask(load("random:resnet50_quarter"), recipe, "digits"), tmp_path / "detect", CPU)
    took = 2 * record["cost"]["seconds"]  # of two trials
    assert detection.seconds / 3 < took < detection.seconds * 3


# Published figures


def test_a_table_shows_published_gpu_hours_and_times_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(cost, "measure", lambda *_: pytest.fail("this machine was timed"))
    published = tables.load_table("moco-v2-1")
    left = todo.find(published, [], chain.Places(tmp_path))
    assert left.machine == "" and "timing" not in capfd.readouterr().err
    phrases = {step.arguments[:2]: each.phrase for step, each in left.steps if each}
    assert phrases["pretrain", "moco_v2_r50"].endswith("GPU-hours of a V100")
    hours = {step.kind: each.hours for step, each in left.steps if step.arguments[1] == "moco_v1_r50"}
    assert hours["pretrain"] == pytest.approx(8 * 53)  # as printed: eight GPUs for 53 hours
    assert left.total.endswith("GPU-hours of a V100")


def test_here_is_this_machine(table, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "seconds_per_image", lambda *_: 0.001)
    left = todo.find(table, [], chain.Places(tmp_path), here=True)
    assert left.machine == cost.machine() and all(isinstance(each, cost.Cost) for _, each in left.steps)


def test_what_no_figure_is_of_is_unknown(steps, table):
    assert gpu_hours.costs([steps["pretrain"], steps["knn"], steps["AP"]], table) == [None] * 3


@pytest.mark.parametrize("row", PROTOCOLS, ids=lambda row: row.protocol)
def test_images_are_counted_as_the_protocols_code_does(row):
    config, (train, test) = load_config(row.name.name, row.name.kind), (10_000, 100)
    theirs = row.code().passes(config, train, test)
    assert gpu_hours.passes(row.name.kind, config, train, test) == (theirs.forward, theirs.trained, theirs.extracted)
