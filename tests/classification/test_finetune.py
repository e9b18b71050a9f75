"""Fine-tuning: the published recipes, the plain loop restated, resuming, several processes, what may move."""

import copy
import json
import math
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from commands import error_line, in_process
from ranks import run_ranks
from torch import nn

from moco_eval.classification import finetune
from moco_eval.classification.judge import judge
from moco_eval.classification.protocols import ONE_PERCENT, TEN_PERCENT, by_name
from moco_eval.classification.task import Outcome, Task
from moco_eval.classification.training_loop import Loop
from moco_eval.config import load as configs
from moco_eval.config.classification import FinetuneConfig
from moco_eval.config.learning_rate import rate_of_step
from moco_eval.data.catalogue import open_images
from moco_eval.data.label_subsets import is_published
from moco_eval.data.loader import Batches, Examples, crop_transform
from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.load import load
from moco_eval.errors import InputError, Interrupted, RunFailed
from moco_eval.preprocessing import Preprocessing

CPU = torch.device("cpu")
SETTINGS = [
    "schedule.epochs=3",
    "schedule.milestones=[1,2]",
    "batch_size=20",
    "workers=0",
    "augmentation.crop_scale=[0.6,1]",
    "test_every=1",
]
PER_CLASS = 9  # 90 images: five batches an epoch, the last of ten


class TinyNet(nn.Module):
    """Two convolutions with batch norm, pooled."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 5, stride=4), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu().mean((2, 3))


def tiny_encoder() -> Encoder:
    torch.manual_seed(0)
    size = Preprocessing(32, 32, (0.3,) * 3, (0.3,) * 3)
    net = TinyNet().requires_grad_(False).eval()  # as a protocol on frozen features leaves it
    return Encoder("tiny", "tiny", "tiny", net, 8, None, "test", "0" * 64, 14, preprocessing=size, wrapped=True)


def task(**rest) -> Task:
    train, test = (open_images("digits", None, split) for split in ("train", "test"))
    test = test.take(range(100))
    given = {"encoder": tiny_encoder(), "labels_per_class": PER_CLASS} | rest
    return Task(train=train, test=test, **given)


def recipe(*settings: str, name: str = "openselfsup-1percent") -> FinetuneConfig:
    return configs.load(name, "finetune", FinetuneConfig, [*SETTINGS, *settings])


def bits(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# As published


@pytest.mark.parametrize(
    ("name", "decay", "v1", "v2"),
    [
        ("openselfsup-1percent", 5e-4, (33.15, 61.30), (39.07, 68.31)),
        ("openselfsup-10percent", 1e-4, (60.08, 84.02), (61.80, 85.11)),
    ],
)
def test_openselfsup_is_as_published(name, decay, v1, v2):
    """configs/benchmarks/semi_classification/*/r50_lr0_01_head100.py and docs/MODEL_ZOO.md at 1db69ec."""
    config = configs.load(name, "finetune", FinetuneConfig)
    assert (config.optimizer.lr, config.optimizer.sgd_momentum, config.optimizer.weight_decay) == (0.01, 0.9, decay)
    assert (config.batch_size, config.head_lr, config.bn_groups, config.drop_last) == (256, 100, 1, False)
    rates = [rate_of_step(config.schedule, 0.01, 51 * epoch + 50, 51) for epoch in (0, 11, 12, 15, 16, 19)]
    assert rates == pytest.approx([0.01, 0.01, 0.002, 0.002, 0.0004, 0.0004])
    assert [(one.metrics["top1"], one.metrics["top5"]) for one in config.expect] == [v1, v2]
    assert configs.load(name, "finetune", FinetuneConfig, ["optimizer.lr=0.1"]).expect is None
    assert is_published(by_name(f"finetune/{name}@1").subset)


def test_lightly_is_as_published():
    """benchmarks/imagenet/resnet50/finetune_eval.py and CosineWarmupScheduler at e8d317f."""
    config = configs.load("lightly", "finetune", FinetuneConfig)
    assert (config.optimizer.lr, config.optimizer.sgd_momentum, config.optimizer.weight_decay) == (0.05, 0.9, 0)
    assert (config.batch_size, config.head_lr, config.bn_groups, config.drop_last) == (256, 1, 2, True)
    total = 30 * 5004
    rates = [rate_of_step(config.schedule, 0.05, step, 5004) for step in (0, 5003, 5004, (total - 2) // 2, total - 1)]
    assert rates[0] == 0.05 and rates[1] > rates[2]  # it falls inside an epoch
    assert rates[3:] == pytest.approx([0.05 * (0.001 + 0.999 / 2), 0.05 * 0.001], rel=1e-4)


@pytest.mark.parametrize("kind", ["normal", "deit", "near_zero", "uniform"])
def test_the_new_layer_starts_as_published(kind):
    """OpenSelfSup's N(0, 0.01), DeiT's N(0, 0.02), MAE's and iBOT's N(0, 2e-5), and torch's own."""
    layer, again = (finetune.new_head(2000, 50, kind, seed=0) for _ in range(2))
    assert torch.equal(layer.weight, again.weight) and torch.equal(layer.bias, again.bias)
    assert not torch.equal(layer.weight, finetune.new_head(2000, 50, kind, seed=1).weight)
    if kind != "uniform":
        published = {"normal": 0.01, "deit": 0.02, "near_zero": 2e-5}[kind]
        assert layer.weight.std().item() == pytest.approx(published, rel=0.02) and not layer.bias.any()
    else:
        assert layer.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 2000), rel=0.02)
        assert layer.weight.abs().max() <= 1 / math.sqrt(2000) and layer.bias.any()


# Step by step


def watched(learner: finetune.EndToEnd) -> list[torch.Tensor]:
    """The losses of its steps, as they come."""
    losses, step = [], learner.train_step
    learner.train_step = lambda *given: losses.append(step(*given)) or losses[-1]
    return losses


def test_step_by_step_against_the_recipe_restated(tmp_path):
    """Same weights and batches: the same losses and weights as torch's SGD with a rate of its own for the head."""
    work, config = task(), recipe()
    images = work.training_images(0)
    learner = finetune.EndToEnd(work, config, finetune.epoch_batches(90, config, 0).steps_per_epoch, 0, CPU)
    backbone, head = copy.deepcopy(work.encoder.backbone), copy.deepcopy(learner.net.head)
    backbone.requires_grad_(True).train()
    groups = [{"params": backbone.parameters(), "lr": 0.01}, {"params": head.parameters(), "lr": 1.0}]
    sgd = torch.optim.SGD(groups, 0.01, momentum=0.9, weight_decay=5e-4)
    falls = torch.optim.lr_scheduler.MultiStepLR(sgd, [1, 2], gamma=0.2)
    crops = Examples(images, crop_transform(work.preprocessing, (0.6, 1.0), True), 0)
    theirs, epoch = [], 0
    for row in Batches(90, 20, 0, range(3), shuffle=True, drop_last=False):
        if row[0][0] > epoch:
            falls.step()
            epoch += 1
        views, labels, _ = zip(*(crops[item] for item in row), strict=True)
        loss = nn.CrossEntropyLoss()(head(backbone(torch.stack(views))), torch.tensor(labels))
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        theirs.append(loss.detach())
    losses = watched(learner)
    Loop(learner, images, config, work.preprocessing, 0, tmp_path / "state.pth", CPU).run("finetune")
    assert len(losses) == 15 and torch.allclose(torch.stack(losses), torch.stack(theirs), rtol=0, atol=1e-6)
    for ours, plain in ((learner.net.backbone, backbone), (learner.net.head, head)):
        for name, tensor in plain.state_dict().items():
            assert torch.allclose(ours.state_dict()[name], tensor, atol=1e-5), name


def test_the_heads_rate_is_a_hundred_times_the_backbones():
    work, config = task(), recipe()
    learner = finetune.EndToEnd(work, config, 5, 0, CPU)
    rates = []
    for _ in range(11):
        learner.train_step(torch.randn(4, 3, 32, 32), torch.arange(4), 0, 4)
        rates.append([group["lr"] for group in learner.optimizer.param_groups])
    assert [rates[step] for step in (0, 5, 10)] == [pytest.approx([0.01 * fall, 1.0 * fall]) for fall in (1, 0.2, 0.04)]
    sizes = [len(group["params"]) for group in learner.optimizer.param_groups]
    assert sizes == [len(list(work.encoder.backbone.parameters())), 2]
    assert all(group["weight_decay"] == 5e-4 for group in learner.optimizer.param_groups)


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [20, 20, 20, 20, 10]), (True, [20, 20, 20, 20])])
def test_the_last_images_of_an_epoch(drop_last, sizes, tmp_path, monkeypatch):
    seen, step = [], finetune.EndToEnd.train_step
    monkeypatch.setattr(finetune.EndToEnd, "train_step", lambda *given: seen.append(given[4]) or step(*given))
    judge(task(), recipe(f"drop_last={str(drop_last).lower()}"), tmp_path, CPU)
    assert seen == 3 * sizes


def test_two_groups_of_one_process_are_two_gpus_batch_norm():
    """bn_groups 2: each half of a batch is normalised by itself, and the running mean is the mean of theirs."""
    encoder, config = tiny_encoder(), recipe("bn_groups=2", "drop_last=true")
    net = finetune.new_classifier(encoder, 10, config, 0).backbone
    images = torch.randn(8, 3, 32, 32)
    halves = [copy.deepcopy(encoder.backbone).train() for _ in range(2)]
    apart = [half(images[start::2]) for start, half in enumerate(halves)]
    assert torch.allclose(net(images), torch.stack(apart, dim=1).flatten(0, 1), atol=1e-6)
    mean = (halves[0].bn1.running_mean + halves[1].bn1.running_mean) / 2
    assert torch.allclose(net.bn1.running_mean, mean, atol=1e-6)


# What moves


def test_the_encoder_stays_and_each_trial_starts_from_it(tmp_path, monkeypatch):
    work, made, make = task(trials=2), [], finetune.new_classifier

    def noted(*given):
        net = make(*given)
        made.append((net, bits(net.backbone)))
        return net

    monkeypatch.setattr(finetune, "new_classifier", noted)
    before = bits(work.encoder.backbone)
    record = judge(work, recipe(), tmp_path, CPU)
    assert same(before, bits(work.encoder.backbone)) and not work.encoder.backbone.training
    for net, start in made:
        assert same(before, start)
        after = bits(net.backbone)
        assert not any(torch.equal(before[name], after[name]) for name in before)
    assert not same(*(bits(net) for net, _ in made))
    assert record["over"] == "labels" and record["selection"] == "last-epoch"
    assert [trial["seed"] for trial in record["trials"]] == [0, 1]
    assert record == json.loads((tmp_path / "result.json").read_text())


def test_all_labels_vary_over_finetune(tmp_path):
    work = task(labels_per_class=None)
    work = replace(work, train=work.train.take(range(400)))
    record = judge(work, recipe("optimizer.lr=0.1", "head_lr=2"), tmp_path, CPU)
    assert record["over"] == "finetune"
    assert record["metrics"]["top1"] > 20  # chance is 10
    assert record["trials"][0]["best_on_test"]["of"] == 3


@pytest.mark.parametrize(
    ("protocol", "subset", "few", "words"),
    [
        ("openselfsup-1percent", ONE_PERCENT, None, []),
        ("openselfsup-1percent", TEN_PERCENT, None, ["labels of ImageNet 10 %"]),
        ("openselfsup-10percent", None, None, ["all labels"]),
        ("openselfsup-10percent", None, 10, ["10 labels per class"]),
        ("lightly", None, None, []),
        ("lightly", None, 10, ["10 labels per class"]),
        ("lightly", ONE_PERCENT, None, ["labels of ImageNet 1 % (SimCLR's list)"]),
    ],
)
def test_other_labels_than_the_protocols_are_a_deviation(protocol, subset, few, words, tmp_path, monkeypatch):
    work = task(labels_per_class=few)
    work = replace(work, train=replace(work.train, subset=subset))
    scores = torch.zeros(len(work.test), 10)
    monkeypatch.setattr(finetune, "CODE", replace(finetune.CODE, run_trial=lambda *_: Outcome(scores, 1)))
    config = configs.load(protocol, "finetune", FinetuneConfig, ["batch_size=50"])
    record = judge(work, config, tmp_path, CPU)
    told = [deviation for deviation in record["deviations"] if "label" in deviation]
    assert len(told) == len(words)
    for deviation, start in zip(told, words, strict=True):
        assert deviation.startswith(start) and ("instead of ImageNet 1" in deviation) == (protocol != "lightly")


def test_a_backbone_that_does_not_move_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: None)
    with pytest.raises(RunFailed, match="none of the backbone's 7 weights moved"):
        judge(task(), recipe(), tmp_path, CPU)
    assert not (tmp_path / "result.json").exists()


def test_batch_norm_left_in_evaluation_is_caught(tmp_path, monkeypatch):
    step = finetune.EndToEnd.train_step
    monkeypatch.setattr(finetune.EndToEnd, "train_step", lambda self, *given: self.net.eval() and step(self, *given))
    with pytest.raises(RunFailed, match="none of the backbone's 2 running statistics moved"):
        judge(task(), recipe(), tmp_path, CPU)


def test_a_weight_that_alone_does_not_move_is_told(capfd):
    before = TinyNet()
    after = copy.deepcopy(before)
    with torch.no_grad():
        for name, tensor in after.state_dict().items():
            if name != "conv2.weight":
                tensor.add_(1)
    finetune.check_moved(before, after)
    assert "1 of the backbone's 7 weights did not move, first 'conv2.weight'" in capfd.readouterr().err


# Reporting


def test_the_best_on_test_stands_beside_the_last_epoch(tmp_path):
    record = judge(task(), recipe(), tmp_path, CPU)
    [trial] = record["trials"]
    best = trial["best_on_test"]
    assert best["top1"] >= trial["metrics"]["top1"] == record["metrics"]["top1"]
    assert 1 <= best["epoch"] <= 3 and best["of"] == 3
    scores = np.load(tmp_path / "predictions.npz")
    assert 100 * (scores["prediction"][0] == scores["label"]).mean() == pytest.approx(record["metrics"]["top1"])


def test_looking_at_the_test_images_changes_nothing(tmp_path):
    often, once = (judge(task(), recipe(f"test_every={n}"), tmp_path / str(n), CPU) for n in (1, 3))
    assert often["metrics"] == once["metrics"]
    assert "best_on_test" not in once["trials"][0]
    scores = [np.load(tmp_path / n / "predictions.npz")["scores"] for n in ("1", "3")]
    assert np.array_equal(*scores)
    assert not any("test_every" in words for words in once["deviations"])


# Stopping and failing


@pytest.mark.parametrize("steps", [7, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 5, 15))])
def test_interrupted_it_goes_on_and_ends_the_same(steps, tmp_path, monkeypatch):
    whole = judge(task(), recipe(), tmp_path / "whole", CPU)
    step, count = finetune.EndToEnd.train_step, []

    def stops(self, *given):
        loss = step(self, *given)
        count.append(1)
        if len(count) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(finetune.EndToEnd, "train_step", stops)
    with pytest.raises(Interrupted, match=f"step {steps} of 15 is saved"):
        judge(task(), recipe(), tmp_path / "parts", CPU)
    parts = judge(task(), recipe(), tmp_path / "parts", CPU)
    assert len(count) == 15
    assert parts["trials"] == whole["trials"]
    scores = [np.load(tmp_path / name / "predictions.npz")["scores"] for name in ("whole", "parts")]
    assert np.array_equal(*scores)


def test_a_damaged_state_leaves_nothing_behind(tmp_path, capfd):
    """Its network can be read and its optimizer cannot: the trial starts again, from the encoder's weights."""
    work, config, state = task(), recipe(), tmp_path / "state.pth"
    whole = finetune.run_trial(work, config, 0, state, CPU)
    kept = torch.load(state, weights_only=True)
    kept["learner"]["optimizer"]["param_groups"].pop()
    torch.save(kept | {"step": 5}, state)
    again = finetune.run_trial(work, config, 0, state, CPU)
    assert "this trial starts again" in capfd.readouterr().err
    assert torch.equal(whole.scores, again.scores) and whole.notes == again.notes


def test_a_loss_that_is_not_finite_stops_it(tmp_path):
    with pytest.raises(RunFailed, match=r"the loss is .* at epoch 0"):
        judge(task(), recipe("optimizer.lr=1e30"), tmp_path, CPU)
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    ("settings", "rest", "words"),
    [
        (["batch_size=89"], {}, "last batch of 90 training images in batches of 89 is a single image"),
        (
            ["batch_size=2", "bn_groups=2", "drop_last=true"],
            {},
            "each batch or its part in batch norm of 90 .* single image, .* take another --batch-size$",
        ),
        (
            ["batch_size=100", "drop_last=true"],
            {},
            "90 training images do not fill one batch of 100; take --batch-size 90",
        ),
        ([], {"encoder": "pixels"}, "pixels has no weights to fine-tune"),
    ],
)
def test_what_cannot_be_trained_is_refused(settings, rest, words, tmp_path):
    given = {"encoder": load(rest["encoder"])} if rest else {}
    with pytest.raises(InputError, match=words):
        judge(task(**given), recipe(*settings), tmp_path, CPU)


@pytest.mark.parametrize("settings", [["bn_groups=3", "drop_last=true"], ["bn_groups=2"]])
def test_groups_that_do_not_divide_are_refused(settings):
    with pytest.raises(InputError, match=r"bn_groups . needs a batch_size that it divides, not 20, and drop_last true"):
        recipe(*settings)


# Several processes


def on_ranks(folder) -> dict:
    record = judge(task(), recipe("batch_size=23"), folder / "run", CPU)
    grouped = recipe("batch_size=20", "bn_groups=2", "drop_last=true")
    groups = judge(task(), grouped, folder / "groups", CPU)
    with pytest.raises(InputError, match="bn_groups 3 cannot be divided among 2 processes"):
        finetune.normalised(TinyNet(), 3)
    return {"run": record["metrics"]["top1"], "groups": groups["metrics"]["top1"]}


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """Uneven shares (23 images, the last batch 21), batch norm over both: the scores of one process, nearly."""
    judge(task(), recipe("batch_size=23"), tmp_path / "alone", CPU)
    run_ranks(on_ranks, tmp_path, tmp_path)
    alone, both = (np.load(tmp_path / name / "predictions.npz")["scores"] for name in ("alone", "run"))
    assert np.allclose(alone, both, atol=1e-4)


# The command


@pytest.mark.slow
def test_the_command_on_digits(capfd, monkeypatch, tmp_path):
    arguments = ("finetune", "random:resnet18_quarter", "--dataset", "digits", "--protocol", "digits_few")
    arguments += ("--labels", "10-per-class", "--trials", "2", "--device", "cpu")
    out, _ = in_process(capfd, monkeypatch, *arguments, "--output", tmp_path)
    assert "finetune/openselfsup-1percent@1 digits top1" in out and "(2 label draws)" in out
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["dataset"]["labels_per_class"] == 10 and record["over"] == "labels"
    assert "head_lr 10.0 instead of 100.0" in record["deviations"]
    assert record["metrics"]["top1"] > 40  # chance is 10


def test_a_protocol_that_is_not_there_is_named(capfd, monkeypatch):
    line = error_line(
        capfd, monkeypatch, "finetune", "random:resnet18", "--dataset", "digits", "--protocol", "lightlyy"
    )
    assert "Did you mean 'lightly'" in line
