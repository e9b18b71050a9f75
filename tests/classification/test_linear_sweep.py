"""Many heads at once against torch's own SGD one by one; what is chosen, and what it is chosen on."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import nn

from moco_eval.classification import linear, linear_sweep
from moco_eval.classification.judge import judge
from moco_eval.classification.linear_sweep import Heads, normalise
from moco_eval.classification.task import Task
from moco_eval.classification.training_loop import Loop
from moco_eval.config import load as configs
from moco_eval.config.classification import QuickConfig, SweepConfig
from moco_eval.data.catalogue import open_images
from moco_eval.data.label_subsets import held_out
from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.load import load
from moco_eval.errors import InputError, Interrupted, RunFailed
from moco_eval.features.extract import Crops, extract
from moco_eval.preprocessing import Preprocessing
from moco_eval.results.metrics import accuracy

CPU = torch.device("cpu")
GRID = [(0.1, 0.0), (3.0, 1e-3), (0.01, 0.1)]
FAST = ("schedule.epochs=3", "batch_size=64", "workers=0", "augmentation.crop_scale=[0.6,1]")


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(96, 12, generator=generator), torch.randint(0, 5, (96,), generator=generator)


def task(encoder: Encoder | None = None, **rest) -> Task:
    train, test = (open_images("digits", None, split) for split in ("train", "test"))
    small = replace(load("random:resnet18_quarter"), preprocessing=Preprocessing(32, 32))
    return Task(encoder or small, train.take(np.arange(400)), test.take(np.arange(100)), **rest)


def recipe(*settings: str) -> SweepConfig:
    return configs.load("sweep", "linear", SweepConfig, [*FAST, "learning_rates=[0.01,1,30]", *settings])


@pytest.mark.parametrize("norm", [False, True])
def test_each_head_is_torchs_sgd(norm, data):
    features, labels = data
    heads = Heads(0, 12, 5, GRID, 0.9, norm, 7, CPU)
    for row, (lr, decay) in enumerate(GRID):
        layer = linear.new_classifier(12, 5, 7)
        net = nn.Sequential(nn.BatchNorm1d(12, eps=1e-6, affine=False), layer) if norm else layer
        sgd = torch.optim.SGD(layer.parameters(), lr, momentum=0.9, weight_decay=decay)
        theirs, ours = [], []
        group = Heads(0, 12, 5, GRID, 0.9, norm, 7, CPU)
        for step in range(12):
            rows, factor = slice(8 * step, 8 * step + 8), 1.0 if step < 6 else 0.1
            sgd.param_groups[0]["lr"] = lr * factor
            loss = nn.functional.cross_entropy(net.train()(features[rows]), labels[rows])
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            theirs.append(loss.detach())
            ours.append(group.step(features[rows], labels[rows], factor, 8)[row])
        assert torch.allclose(torch.stack(ours), torch.stack(theirs), rtol=1e-5, atol=1e-6)
        assert torch.allclose(group.weight[row], layer.weight, rtol=1e-5, atol=1e-6)
        assert torch.allclose(group.scores(features, row), net.eval()(features).detach(), rtol=1e-4, atol=1e-5)
    assert heads.weight.shape == (3, 5, 12) and torch.equal(heads.weight[0], heads.weight[2])


def test_a_head_that_diverges_leaves_the_others_alone(data):
    features, labels = data
    together = Heads(0, 12, 5, [(0.1, 0.0), (1e30, 1e10)], 0.9, False, 0, CPU)
    alone = Heads(0, 12, 5, [(0.1, 0.0)], 0.9, False, 0, CPU)
    for step in range(12):
        rows = slice(8 * step, 8 * step + 8)
        together.step(features[rows], labels[rows], 1.0, 8)
        alone.step(features[rows], labels[rows], 1.0, 8)
    assert not together.is_finite(1) and together.is_finite(0)
    assert torch.allclose(together.weight[0], alone.weight[0], atol=1e-6)


def test_parameter_free_batch_norm_is_torchs(data):
    features, _ = data
    ours, theirs = (nn.BatchNorm1d(12, eps=1e-6, affine=False) for _ in range(2))
    for at in range(0, 96, 32):
        found = normalise(features[at : at + 32], ours, 32)
        assert torch.allclose(found, theirs(features[at : at + 32]), atol=1e-5)
    assert torch.allclose(ours.running_mean, theirs.running_mean, atol=1e-6)
    assert torch.allclose(ours.running_var, theirs.running_var, atol=1e-6)


def test_the_head_is_chosen_on_held_out_images_and_tested_once(tmp_path, monkeypatch):
    tested, scores = [], linear_sweep.Head.scores

    def noted(self, features):
        tested.append(len(features))
        return scores(self, features)

    monkeypatch.setattr(linear_sweep.Head, "scores", noted)
    work, config = task(load("random:resnet18_quarter")), recipe()
    record = judge(work, config, tmp_path, CPU)
    [trial] = record["trials"]
    assert tested == [40] * 12 + [100]  # every head on the held-out images, one on the test images
    assert trial["held_out_images"] == 40 and len(trial["heads"]) == 12
    best = max(head["held_out_top1"] for head in trial["heads"])
    first = next(head for head in trial["heads"] if head["held_out_top1"] == best)
    assert trial["chosen"] == first and record["selection"] == "held-out training images"
    assert record["protocol"] == "linear/sweep@1" and record["metrics"]["top1"] > 40  # chance is 10
    assert record == json.loads((tmp_path / "result.json").read_text())


def test_no_held_out_image_is_trained_on(monkeypatch, tmp_path):
    work, config, trained = task(), recipe(), []
    kept, held = held_out(work.train.labels, 0.1, 0)
    assert not set(kept) & set(held) and len(kept) + len(held) == 400
    monkeypatch.setattr(linear_sweep, "Loop", lambda *given: trained.append(given[1].rows) or Loop(*given))
    judge(work, config, tmp_path, CPU)
    assert len(trained) == 1 and np.array_equal(trained[0], kept)


def test_all_heads_lost_is_a_failure(tmp_path):
    with pytest.raises(RunFailed, match=r"the loss is .* smaller --set learning_rates"):
        judge(task(), recipe("learning_rates=[1e38]"), tmp_path, CPU)


def test_one_label_per_class_leaves_none_to_choose_by(tmp_path):
    with pytest.raises(InputError, match="none can be held out to choose a head"):
        judge(task(labels_per_class=1), recipe(), tmp_path, CPU)


def test_a_choice_at_the_edge_of_the_grid_is_said(tmp_path, capfd):
    judge(task(), recipe("learning_rates=[1e-6,1e-5]"), tmp_path, CPU)
    assert "is at the edge of the grid" in " ".join(capfd.readouterr().err.split())


def test_several_features_in_one_sweep(tmp_path):
    record = judge(task(), recipe("features=[layer3,pooled]"), tmp_path, CPU)
    assert {head["feature"] for head in record["trials"][0]["heads"]} == {"layer3", "pooled"}
    with pytest.raises(InputError, match="not a stage of resnet18_quarter"):
        judge(task(), recipe("features=[blocks.1]"), tmp_path / "other", CPU)


def test_interrupted_it_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    whole = judge(task(), recipe(), tmp_path / "whole", CPU)
    step, count = linear_sweep.Sweep.train_step, []

    def stops(self, *given):
        count.append(1)
        if len(count) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *given)

    monkeypatch.setattr(linear_sweep.Sweep, "train_step", stops)
    with pytest.raises(Interrupted, match="step 9 of 18 is saved"):
        judge(task(), recipe(), tmp_path / "parts", CPU)
    parts = judge(task(), recipe(), tmp_path / "parts", CPU)
    assert len(count) == 18 and parts["trials"] == whole["trials"]


def on_ranks(folder) -> dict:
    features = torch.randn(90, 12, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 5, (90,), generator=torch.Generator().manual_seed(1))
    group = Heads(0, 12, 5, GRID, 0.9, True, 7, CPU)
    mine = slice(0, 4) if torch.distributed.get_rank() == 0 else slice(4, 9)
    for step in range(10):
        rows = torch.arange(9 * step, 9 * step + 9)[mine]
        group.step(features[rows], labels[rows], 1.0, 9)
    top1 = judge(task(cache=folder / "cache"), recipe(), folder / "run", CPU)["metrics"]["top1"]
    return {"weight": group.weight, "var": group.norm.running_var, "top1": top1}


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    features = torch.randn(90, 12, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 5, (90,), generator=torch.Generator().manual_seed(1))
    group = Heads(0, 12, 5, GRID, 0.9, True, 7, CPU)
    for step in range(10):
        group.step(features[9 * step : 9 * step + 9], labels[9 * step : 9 * step + 9], 1.0, 9)
    alone = judge(task(), recipe(), tmp_path / "alone", CPU)
    for rank in run_ranks(on_ranks, tmp_path, tmp_path):
        assert torch.allclose(rank["weight"], group.weight, rtol=1e-4, atol=1e-5)
        assert torch.allclose(rank["var"], group.norm.running_var, atol=1e-5)
        assert rank["top1"] == pytest.approx(alone["metrics"]["top1"], abs=2.01)  # two images in 100


# Quick


QUICK = ("schedule.kind=step", "schedule.milestones=[2]", "optimizer.lr=1", "crops=2")


def quick_recipe(*settings: str) -> QuickConfig:
    return configs.load("quick", "linear", QuickConfig, [*FAST, *QUICK, *settings])


def test_quick_is_the_official_loop_on_features_in_turn(tmp_path):
    """Three epochs: the clean crop, the first epoch of crops, the second; torch's SGD on features by hand."""
    work, config = task(), quick_recipe()
    judge(work, config, tmp_path, CPU)
    net, size = work.encoder.backbone.eval(), work.preprocessing
    parts = [extract(net, work.train, size, CPU)]
    parts += [extract(net, work.train, size, CPU, crops=Crops(config.augmentation, 0, epoch)) for epoch in (0, 1)]
    layer, labels = linear.new_classifier(128, 10, 0), torch.as_tensor(work.train.labels)
    sgd = torch.optim.SGD(layer.parameters(), 1.0, momentum=0.9)
    for epoch, features in enumerate(parts):
        sgd.param_groups[0]["lr"] = 1.0 if epoch < 2 else 0.1
        for rows in torch.from_numpy(np.random.default_rng((0, epoch)).permutation(400)).split(64):
            loss = nn.functional.cross_entropy(layer(features[rows]), labels[rows])
            sgd.zero_grad()
            loss.backward()
            sgd.step()
    scores = layer(extract(net, work.test, size, CPU)).detach()
    kept = np.load(tmp_path / "predictions.npz")
    assert np.allclose(kept["scores"][0], scores, atol=1e-3)
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["metrics"]["top1"] == accuracy(scores, torch.as_tensor(work.test.labels))
    assert record["cost"]["images"] == 3 * 400 + 100


def test_quick_trials_share_their_features(tmp_path):
    record = judge(task(cache=tmp_path / "cache", trials=2), quick_recipe(), tmp_path / "run", CPU)
    assert len(list((tmp_path / "cache").iterdir())) == 4  # test, clean, two epochs of crops
    assert [trial["seed"] for trial in record["trials"]] == [0, 1] and record["over"] == "head"


def test_quick_on_few_labels_looks_at_those_alone(tmp_path):
    work = task(cache=tmp_path / "cache", labels_per_class=3)
    record = judge(work, quick_recipe(), tmp_path / "run", CPU)
    assert record["cost"]["images"] == 3 * 30 + 100 and record["over"] == "labels"
