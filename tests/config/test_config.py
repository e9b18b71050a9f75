"""Configs: every shipped one loads; nothing wrong gets through."""

import pytest

from moco_eval.classification.protocols import followed_by, kinds
from moco_eval.config import deviations
from moco_eval.config import load as configs
from moco_eval.config.detection import DetectConfig
from moco_eval.config.learning_rate import learning_rate
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.errors import InputError
from pretraining.plan import plan

MODELS = {"pretrain": PretrainConfig}


@pytest.mark.parametrize("kind", [*MODELS, *kinds()])
def test_every_shipped_config_loads_and_is_named(kind):
    names = configs.shipped(kind)
    assert names
    for name in names:
        model = followed_by(name, kind).model if kind in kinds() else MODELS[kind]
        assert configs.load(name.split("/")[1], kind, model) == configs.load(name, kind, model)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr'.*Did you mean 'optimizer.lr'"),
        ("lr=1", "unknown key 'lr'.*Did you mean 'optimizer.lr'"),
        ("batch_size=many", "batch_size is 'many' in --set batch_size=many"),
        ("batch_size=0", "greater than 0"),
        ("batch_size=true", "a number is wanted, not true or false"),
        (
            "queue_size=256 ",
            "--set queue_size=256: queue_size 256 holds less than one step's 512 keys .batch 512.; take at least 512",
        ),
        ("temperature=.nan", "temperature"),
        ("schedule.milestones=[3]", "takes no milestones"),
        ("views=none", "views"),
        ("noequals", "is not key=value"),
    ],
)
def test_what_is_wrong_is_named(setting, words):
    with pytest.raises(InputError, match=words) as caught:
        configs.load("cifar10", "pretrain", PretrainConfig, [setting.strip()])
    assert "\n" not in str(caught.value)


def test_errors_in_a_file_name_its_line(tmp_path):
    text = (configs.folder() / "pretrain" / "moco_v2_r50.yaml").read_text()
    mine = tmp_path / "mine.yaml"
    mine.write_text(text.replace("lr: 0.03", "lrr: 0.03"))
    line = next(i for i, row in enumerate(text.splitlines(), 1) if "lr: 0.03" in row)
    with pytest.raises(InputError, match=rf"'optimizer.lrr' in mine.yaml line {line}. Did you mean 'optimizer.lr'"):
        configs.load(str(mine), "pretrain", PretrainConfig)
    mine.write_text(text + "arch: resnet18\n")
    with pytest.raises(InputError, match="'arch' appears twice"):
        configs.load(str(mine), "pretrain", PretrainConfig)
    mine.write_text("arch: [")
    with pytest.raises(InputError, match="is not YAML"):
        configs.load(str(mine), "pretrain", PretrainConfig)


def test_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'moco_v2_r50'"):
        configs.load("moco_v2_r51", "pretrain", PretrainConfig)


def test_published_recipes_are_as_published():
    v1, v2, cifar = (configs.load(n, "pretrain", PretrainConfig) for n in ("moco_v1_r50", "moco_v2_r50", "cifar10"))
    assert (v1.head, v1.temperature, v1.queue_size, v1.momentum, v1.dim) == ("linear", 0.07, 65536, 0.999, 128)
    assert (v2.head, v2.temperature, v2.views.recipe) == ("mlp", 0.2, "moco_v2")
    for one in (v1, v2):
        assert (one.optimizer.lr, one.optimizer.weight_decay, one.batch_size) == (0.03, 1e-4, 256)
    assert (cifar.temperature, cifar.momentum, cifar.queue_size, cifar.batch_size) == (0.1, 0.99, 4096, 512)
    assert (cifar.optimizer.lr, cifar.optimizer.weight_decay, cifar.bn_groups) == (0.06, 5e-4, 8)
    assert (cifar.knn.feature, cifar.knn.k, cifar.knn.temperature) == ("head", 200, 0.1)


CIFAR_STEPS = ["schedule.kind=step", "schedule.milestones=[120, 160]"]


def test_learning_rates_at_the_epochs_that_tell_schedules_apart():
    v1, v2, cifar = (
        configs.load(n, "pretrain", PretrainConfig).schedule for n in ("moco_v1_r50", "moco_v2_r50", "cifar10")
    )
    step = [learning_rate(v1, 0.03, epoch) for epoch in (0, 119, 120, 159, 160, 199)]
    assert step == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003])
    assert learning_rate(v2, 0.03, 0) == 0.03
    assert learning_rate(v2, 0.03, 199) == pytest.approx(1.85e-6, rel=0.01)
    assert learning_rate(cifar, 0.06, 199) == 0
    assert learning_rate(cifar, 0.06, 0) < 0.06
    dropped = configs.load("cifar10", "pretrain", PretrainConfig, CIFAR_STEPS).schedule
    # the notebook's adjust_learning_rate, called with epochs from 1 on: a tenth where epoch >= milestone
    rates = [0.06 * 0.1 ** sum(epoch >= milestone for milestone in (120, 160)) for epoch in range(1, 201)]
    assert [learning_rate(dropped, 0.06, epoch) for epoch in range(200)] == pytest.approx(rates)


def test_deviations_are_the_differences_from_the_protocol():
    shipped = configs.load("moco_v2_r50", "pretrain", PretrainConfig)
    changed = configs.load("moco_v2_r50", "pretrain", PretrainConfig, ["optimizer.lr=1", "seed=3", "queue_size=4096"])
    assert deviations.differences(shipped, shipped) == []
    assert deviations.differences(changed, shipped, free=("queue_size",)) == ["optimizer.lr 1.0 instead of 0.03"]


@pytest.mark.parametrize(
    ("settings", "top1"),
    [
        ([], 60.8),
        (["seed=3", "workers=2", "knn.every=5", "checkpoints.last=3", "views.backend=reference"], 60.8),
        (["queue_size=256"], None),
        (["seed=3", "optimizer.lr=0.06"], None),
        (["schedule={kind: cosine, epochs: 200}"], None),
        (["queue_size=256", "expect={protocol: linear/moco-lincls@1, metrics: {top1: 54.7}, source: p.5}"], 54.7),
    ],
)
def test_a_published_number_stays_with_the_recipe_as_shipped(settings, top1):
    expect = configs.load("moco_v1_r50", "pretrain", PretrainConfig, settings).expect
    assert (expect and expect.metrics["top1"]) == top1


def test_part_of_an_expectation_is_not_mixed_with_the_shipped_one():
    with pytest.raises(InputError, match=r"expect.protocol"):
        configs.load("moco_v1_r50", "pretrain", PretrainConfig, ["queue_size=256", "expect.metrics={top1: 54.7}"])


def test_detection_recipes_lose_their_number_in_the_same_way(tmp_path):
    text = (configs.folder() / "detect" / "r50_c4_24k.yaml").read_text()
    number = "expect: {protocol: detect/voc-r50-c4-24k@1, metrics: {AP50: 81.5}, source: a table}\n"
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(line for line in text.splitlines() if not line.startswith("expect:")) + "\n" + number)
    assert configs.load(str(path), "detect", DetectConfig, ["seed=1"]).expect.metrics == {"AP50": 81.5}
    assert configs.load(str(path), "detect", DetectConfig, ["roi.batch_per_image=64"]).expect is None


@pytest.mark.parametrize(
    ("settings", "processes", "words"),
    [
        (["batch_size=2048", "queue_size=4096"], 1, "digits has 1297 images, less than one batch of 2048"),
        (["batch_size=50"], 1, "50 per process does not divide into 4 BN groups"),
        (["batch_size=50"], 3, "50 does not divide among 3 processes; take 2 of them, or a"),
        (["arch=resnet19"], 1, "unknown architecture 'resnet19'. Did you mean 'resnet18'"),
        (["arch=vit_base_patch16_224"], 1, "is a ViT, which MoCo v3 trains and mechanism moco does not; start"),
        (["protocol=pretrain/moco-v9@1"], 1, "unknown protocol"),
    ],
)
def test_impossible_runs_are_refused_before_they_start(settings, processes, words):
    config = configs.load("digits", "pretrain", PretrainConfig, settings)
    with pytest.raises(InputError, match=words):
        plan(config, "digits", None, processes)
