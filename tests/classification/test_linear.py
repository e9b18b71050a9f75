"""Linear classification: the official loop, the frozen check, resuming."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import own_network
import pytest
import torch
from ranks import run_ranks
from torch import nn

import moco_eval as me
from moco_eval.classification import linear, recording
from moco_eval.classification.judge import judge
from moco_eval.classification.task import Outcome, Task
from moco_eval.classification.training_loop import Loop
from moco_eval.config import load as configs
from moco_eval.config.classification import LinearConfig
from moco_eval.config.learning_rate import learning_rate
from moco_eval.data.catalogue import open_images
from moco_eval.data.loader import Batches, Examples, crop_transform
from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.load import load
from moco_eval.errors import InputError, Interrupted, RunFailed
from moco_eval.preprocessing import Preprocessing

CPU = torch.device("cpu")
SETTINGS = [
    "schedule.epochs=3",
    "schedule.milestones=[2]",
    "batch_size=64",
    "workers=0",
    "augmentation.crop_scale=[0.6,1]",
]


class TinyNet(nn.Module):
    """A convolution and a batch norm, pooled: enough to be frozen."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 5, stride=4), nn.BatchNorm2d(6)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x))).mean((2, 3))


def tiny_encoder() -> Encoder:
    torch.manual_seed(0)
    size = Preprocessing(32, 32, (0.3,) * 3, (0.3,) * 3)
    return Encoder("tiny", "tiny", "tiny", TinyNet(), 6, None, "test", "0" * 64, 9, preprocessing=size, wrapped=True)


def task(whole: bool = False, **rest) -> Task:
    train, test = (open_images("digits", None, split) for split in ("train", "test"))
    if not whole:
        train, test = train.take(np.arange(400)), test.take(np.arange(100))
    return Task(rest.pop("encoder", None) or tiny_encoder(), train, test, **rest)


def recipe(*settings: str) -> LinearConfig:
    return configs.load("moco-lincls", "linear", LinearConfig, [*SETTINGS, "optimizer.lr=1.0", *settings])


def test_the_protocol_is_as_published():
    config = configs.load("moco-lincls", "linear", LinearConfig)
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.sgd_momentum) == (30, 0, 0.9)
    assert (config.batch_size, config.schedule.epochs, config.schedule.milestones) == (256, 100, (60, 80))
    rates = [learning_rate(config.schedule, 30, epoch) for epoch in (0, 59, 60, 79, 80, 99)]
    assert rates == pytest.approx([30, 30, 3, 3, 0.3, 0.3])


def learner(work: Task, config: LinearConfig) -> linear.OnCrops:
    test = work.features(work.test, config, CPU)
    classifier = linear.Classifier(6, 10, config.optimizer, config.schedule, 0, CPU)
    backbone = linear.freeze(work.encoder.backbone)
    return linear.OnCrops(classifier, backbone, test, torch.as_tensor(work.test.labels), "fp32", CPU)


def test_step_by_step_against_the_official_loop_restated(tmp_path):
    """The same weights, batches and start, 21 steps: the same losses and classifier, the backbone untouched."""
    work, config = task(), recipe()
    probe, losses = learner(work, config), []
    step = probe.train_step
    probe.train_step = lambda *given: losses.append(step(*given)) or losses[-1]
    reference = nn.Linear(6, 10)
    reference.load_state_dict(probe.classifier.layer.state_dict())
    backbone = tiny_encoder().backbone.eval()
    sgd = torch.optim.SGD(reference.parameters(), 1.0, momentum=0.9, weight_decay=0)
    crops = Examples(work.train, crop_transform(work.encoder.preprocessing, (0.6, 1.0), True), 0)
    theirs = []
    for row in Batches(len(work.train), 64, 0, range(3), shuffle=True, drop_last=False):
        sgd.param_groups[0]["lr"] = 1.0 if row[0][0] < 2 else 0.1
        images, labels, _ = zip(*(crops[item] for item in row))
        with torch.no_grad():
            features = backbone(torch.stack(images))
        loss = nn.CrossEntropyLoss()(reference(features), torch.tensor(labels))
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        theirs.append(loss.detach())
    Loop(probe, work.train, config, work.preprocessing, 0, tmp_path / "state.pth", CPU).run("linear")
    assert len(losses) == 21 and torch.allclose(torch.stack(losses), torch.stack(theirs), rtol=0, atol=1e-6)
    layer = probe.classifier.layer
    assert torch.allclose(layer.weight, reference.weight, atol=1e-6)
    assert torch.allclose(layer.bias, reference.bias, atol=1e-6)
    before, after = backbone.state_dict(), probe.backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_backbone_is_bit_identical_and_the_head_moved(tmp_path):
    work = task(whole=True, encoder=replace(load("random:resnet18_quarter"), preprocessing=Preprocessing(32, 32)))
    before = linear.snapshot(work.encoder.backbone)
    record = judge(work, recipe(), tmp_path, CPU)
    assert all(torch.equal(before[name], tensor) for name, tensor in work.encoder.backbone.state_dict().items())
    assert record["metrics"]["top1"] > 20  # chance is 10
    assert record["selection"] == "last-epoch" and record["over"] == "head"
    assert "optimizer.lr 1.0 instead of 30.0" in record["deviations"]
    assert record == json.loads((tmp_path / "result.json").read_text())


def test_a_backbone_left_in_train_mode_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(linear, "freeze", lambda net: net.requires_grad_(False).train())
    with pytest.raises(RunFailed, match=r"the frozen backbone changed: 3 of 7 tensors, first \['bn.running_mean'\]"):
        judge(task(), recipe(), tmp_path, CPU)
    assert not (tmp_path / "result.json").exists()


def test_a_head_that_does_not_move_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: None)
    with pytest.raises(RunFailed, match="did not move"):
        judge(task(), recipe(), tmp_path, CPU)


def test_the_classifier_starts_as_published():
    layer = linear.new_classifier(2000, 50, seed=0)
    assert layer.weight.std().item() == pytest.approx(0.01, rel=0.02) and not layer.bias.any()


def test_only_two_tensors_are_trained():
    probe = learner(task(), recipe())
    assert sum(len(group["params"]) for group in probe.classifier.optimizer.param_groups) == 2
    assert not any(parameter.requires_grad for parameter in probe.backbone.parameters())


def test_the_best_on_test_stands_beside_the_last_epoch(tmp_path):
    record = judge(task(), recipe(), tmp_path, CPU)
    [trial] = record["trials"]
    assert trial["best_on_test"]["top1"] >= trial["metrics"]["top1"] == record["metrics"]["top1"]
    assert 1 <= trial["best_on_test"]["epoch"] <= 3


def test_moco_v3_has_its_own_rate_for_a_vit():
    net, vit = (configs.load(name, "linear", LinearConfig) for name in ("mocov3", "mocov3_vit"))
    assert (net.optimizer.lr, vit.optimizer.lr, net.batch_size) == (0.4, 12, 1024)
    assert [learning_rate(net.schedule, 0.4, epoch) for epoch in (0, 45)] == pytest.approx([0.4, 0.2])
    assert linear.recipe_for("mocov3", task(encoder=load("random:vit_tiny_patch16_224"))) == "mocov3_vit"
    assert linear.recipe_for("mocov3", task()) == "mocov3"


def test_few_labels_are_drawn_anew_in_each_trial(tmp_path):
    record = judge(task(labels_per_class=10, trials=3), recipe(), tmp_path, CPU)
    assert [trial["seed"] for trial in record["trials"]] == [0, 1, 2]
    values = [trial["metrics"]["top1"] for trial in record["trials"]]
    assert record["metrics"]["top1"] == pytest.approx(np.mean(values))
    assert record["std"]["top1"] == pytest.approx(np.std(values, ddof=1))
    assert record["dataset"]["labels_per_class"] == 10
    assert "10 labels per class" in record["deviations"]


def test_interrupted_it_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    whole = judge(task(), recipe(), tmp_path / "whole", CPU)
    step, count = linear.OnCrops.train_step, []

    def stops(self, *arguments):
        count.append(1)
        if len(count) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    monkeypatch.setattr(linear.OnCrops, "train_step", stops)
    with pytest.raises(Interrupted, match="step 5 of 21 is saved"):
        judge(task(), recipe(), tmp_path / "parts", CPU)
    parts = judge(task(), recipe(), tmp_path / "parts", CPU)
    assert len(count) == 3 * 7
    assert parts["trials"] == whole["trials"]
    scores = [np.load(tmp_path / name / "predictions.npz")["scores"] for name in ("whole", "parts")]
    assert np.array_equal(*scores)


def test_a_loss_that_is_not_finite_stops_it(tmp_path):
    with pytest.raises(RunFailed, match=r"the loss is .* at epoch 0"):
        judge(task(), recipe("optimizer.lr=1e38"), tmp_path, CPU)


def on_ranks(folder) -> dict:
    return {"top1": judge(task(), recipe(), folder / "run", CPU)["metrics"]["top1"]}


@pytest.mark.slow
def test_two_processes_are_as_good_as_one(tmp_path):
    alone = judge(task(), recipe(), tmp_path / "alone", CPU)
    for rank in run_ranks(on_ranks, tmp_path, tmp_path):
        assert rank["top1"] == pytest.approx(alone["metrics"]["top1"], abs=1.01)  # one image in 100


@pytest.mark.slow
def test_a_damaged_trial_is_done_again(tmp_path, capfd):
    """Of two trials the first was kept, and its file has been cut since."""
    whole = judge(task(trials=2), recipe(), tmp_path / "whole", CPU)
    work, kept, calls = task(trials=2), tmp_path / "run" / "trial_0.npz", []
    real = linear.run_trial

    def second_fails(*given):
        calls.append(given[2])
        if len(calls) == 2:
            raise Interrupted("stopped")
        return real(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "CODE", replace(linear.CODE, run_trial=second_fails))
        with pytest.raises(Interrupted):
            judge(work, recipe(), tmp_path / "run", CPU)
    kept.write_bytes(kept.read_bytes()[:200])
    again = judge(work, recipe(), tmp_path / "run", CPU)
    assert "this trial is repeated" in " ".join(capfd.readouterr().err.split())
    assert again["trials"] == whole["trials"] and not kept.exists()


def test_a_record_that_is_none_of_ours_is_refused(tmp_path):
    judge(task(), recipe(), tmp_path, CPU)
    (tmp_path / "result.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="is not one of our result records"):
        judge(task(), recipe(), tmp_path, CPU)


def test_another_feature_is_a_deviation(tmp_path):
    record = judge(task(encoder=load("random:resnet18_quarter"), feature="layer3"), recipe(), tmp_path, CPU)
    assert "layer3 feature instead of pooled" in record["deviations"]


def test_a_vit_is_held_to_its_own_rate(tmp_path, monkeypatch):
    """MoCo v3's linear protocol on a ViT: its rate is no deviation, the ResNet's is."""
    outcome = Outcome(torch.eye(10), 1)
    monkeypatch.setattr(linear, "CODE", replace(linear.CODE, run_trial=lambda *_: outcome))
    monkeypatch.setattr(recording, "look_at_features", lambda *_: {})
    vit = load("random:vit_tiny_patch16_224")
    few = [open_images("digits", None, split).take(np.arange(10)) for split in ("train", "test")]
    said = []
    for name in ("mocov3_vit", "mocov3"):
        config = configs.load(name, "linear", LinearConfig)
        said.append(judge(Task(vit, *few), config, tmp_path / name, CPU)["deviations"])
    rate = "optimizer.lr 0.4 instead of 12.0"
    assert rate not in said[0] and rate in said[1]


IN_MEMORY = (("knn/digits", {}), ("logistic/digits", {"path": {"low": 1.0, "high": 1.0, "count": 1}}))


def judged_in_memory() -> dict:
    """By both protocols, in memory: the second leaves the work to the first process."""
    train, test = me.images("digits")
    few = train.take(np.arange(150)), test.take(np.arange(50))
    results = [me.judge(own_network.encoder(), *few, protocol, **settings) for protocol, settings in IN_MEMORY]
    return {"scores": [torch.from_numpy(one.scores.copy()) for one in results], "said": [str(one) for one in results]}


@pytest.mark.slow
def test_two_processes_have_the_same_result_in_memory(tmp_path):
    one, other = run_ranks(judged_in_memory, tmp_path)
    alone = judged_in_memory()
    assert one["said"] == other["said"] == alone["said"]
    for ours, theirs, single in zip(one["scores"], other["scores"], alone["scores"]):
        assert torch.equal(ours, theirs) and torch.allclose(ours, single, atol=1e-4)
