"""Two gloo processes train one detector: shared statistics, shares of batches and test images, resuming.

One launch serves every test.
"""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from commands import moco_eval
from ranks import run_ranks
from test_detection import CPU, TINY, encoder, recipe
from torch import nn

from moco_eval.config.detection import Scenes
from moco_eval.data.loader import share
from moco_eval.detection import fine_tune, inputs
from moco_eval.detection.detect import detect
from moco_eval.detection.detector import build_detector
from moco_eval.detection.task import DetectionTask, open_digits
from moco_eval.errors import Interrupted
from moco_eval.results.record import Cost
from moco_eval.runtime import collectives, rank, stop
from moco_eval.runtime.batch_norm import NaiveSyncBatchNorm2d, SyncBatchNorm2d, share_statistics

SMALL = (*TINY, "scenes.test=3", "batch_size=4", "checkpoints.every=1")
LOCAL = ("bn=local", "precise_bn=0")  # each rank's running statistics are its own
KINDS = {"sync": SyncBatchNorm2d, "local": nn.BatchNorm2d}
SIZES = (5, 3)  # each rank's images have another size


def images(side: int = 4, seed: int = 3) -> torch.Tensor:
    return torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1


def norm(make=nn.BatchNorm2d) -> nn.BatchNorm2d:
    """With a scale and a shift that are not 1 and 0."""
    layer = make(3).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.5, 2.0]))
        layer.bias.copy_(torch.tensor([0.1, -0.2, 0.3]))
    return layer


def through(layer: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, gradients and running statistics of this rank's batch."""
    batch = batch.clone().requires_grad_()
    output = layer(batch)
    (output * batch.detach().sin()).sum().backward()
    affine = collectives.all_sum(torch.stack([layer.weight.grad, layer.bias.grad]))
    moments = torch.stack([layer.running_mean, layer.running_var])
    return {"output": output.detach(), "gradient": batch.grad, "affine": affine, "moments": moments}


class OneNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3).double()

    def forward(self, images, targets):
        return self.bn(torch.stack(images))


def precise(bn: str) -> torch.Tensor:
    """Precise statistics of a BN over two batches of both ranks."""
    model = share_statistics(OneNorm(), bn)
    stream = iter([(list(share(images(seed=seed))), [{}] * 2) for seed in (1, 2)])
    fine_tune.precise_bn(model, stream, recipe("digits_r50_c4", "precise_bn=2"), CPU, stop.Stop())
    return torch.stack([model.bn.running_mean, model.bn.running_var])


def one_step(folder, bn: str, accumulate: int) -> tuple[dict[str, float], torch.Tensor]:
    """Losses and weights after one step of SGD; on one process too."""
    r = recipe("digits_r50_c4", *SMALL, f"bn={bn}", f"accumulate={accumulate}")
    data = open_digits(folder / "scenes", Scenes(train=4, test=3))
    place = rank.rank(), rank.world_size()
    batch = next(inputs.training_batches(inputs.trainable(data.train), r, 0, 1, *place))
    model = share_statistics(build_detector(encoder(), 10, r), r.bn)
    losses = fine_tune.Trainer(model, r, folder / f"step_{bn}", CPU, Cost("cpu")).step(batch, 0)
    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    return {name: value.item() for name, value in losses.items()}, weights


def one_without_objects(folder) -> tuple[dict[str, float], bool]:
    """Two steps with masks on a pyramid, the second rank's image without an object; whether the weights agree."""
    few = ("batch_size=2", "roi.batch_per_image=8", "rpn.pre_nms_train=20", "rpn.post_nms_train=10")
    r = recipe("coco_r50_fpn_1x", *few)
    model = share_statistics(build_detector(encoder(), 2, r), r.bn)
    trainer = fine_tune.Trainer(model, r, folder / "masks", CPU, Cost("cpu"))
    picture = torch.randint(0, 255, (3, 64, 64 + 32 * rank.rank()), dtype=torch.uint8)
    objects = 1 - rank.rank()
    boxes, labels = torch.tensor([[10.0, 10, 60, 60]])[:objects], torch.ones(objects, dtype=torch.long)
    masks = [[np.array([10.0, 10, 60, 10, 60, 60])]][:objects]
    batch = [picture], [{"boxes": boxes, "labels": labels, "masks": masks}]
    losses = [trainer.step(batch, iteration) for iteration in range(2)][-1]
    return {name: value.item() for name, value in losses.items()}, collectives.same_on_all_ranks(*model.parameters())


def whole(folder, *settings: str) -> dict:
    config = recipe("digits_r50_c4", *SMALL, *settings)
    task = DetectionTask(encoder(), config, "digits", folder.parent / "scenes", engine="torchvision")
    return detect(task, folder, CPU)


def interrupted(folder) -> str:
    """Only the second rank is asked to stop."""
    step = fine_tune.Trainer.step

    def step_and_signal(self, batch, iteration):
        if iteration == 1 and rank.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, iteration)

    fine_tune.Trainer.step = step_and_signal
    try:
        whole(folder)
    except Interrupted as error:
        return str(error)
    finally:
        fine_tune.Trainer.step = step
    return "not stopped"


def both_ranks(folder) -> dict:
    """Everything the tests below look at, as one rank sees it."""
    torch.manual_seed(rank.rank())
    naive = share_statistics(nn.Sequential(norm()), "naive_sync")[0]
    model = build_detector(encoder(), 10, recipe())
    names = list(model.state_dict())
    return {
        "equal": through(naive, share(images())),
        "unequal": through(norm(NaiveSyncBatchNorm2d), images(SIZES[rank.rank()])),
        "precise": {bn: precise(bn) for bn in ("naive_sync", "sync", "local")},
        "converted": [isinstance(naive, NaiveSyncBatchNorm2d)]
        + [type(share_statistics(nn.Sequential(norm()), bn)[0]) is kind for bn, kind in KINDS.items()],
        "same_names": list(share_statistics(model, "naive_sync").state_dict()) == names,
        "step": one_step(folder, "local", 1),
        "step_in_parts": one_step(folder, "local", 2),
        "naive_step": one_step(folder, "naive_sync", 1)[1],
        "one_without_objects": one_without_objects(folder),
        "record": whole(folder / "run"),
        "local": whole(folder / "local", *LOCAL)["metrics"],
        "interrupted": interrupted(folder / "stopped"),
        "resumed": whole(folder / "stopped")["metrics"],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict]:
    return run_ranks(both_ranks, folder, folder)


def state(run) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints/last.pth", weights_only=True)["model"]


def test_naive_sync_is_bn_of_the_whole_batch_where_the_shares_are_equal(ranks):
    expected = through(norm(), images())
    for part in ("output", "gradient"):
        assert torch.allclose(torch.cat([each["equal"][part] for each in ranks]), expected[part], atol=1e-12)
    unbiased = torch.tensor([[1.0], [0.1 / (0.1 * 64 / 63)]])  # the running variance takes the biased one
    started = torch.tensor([[0.0], [0.9]])
    moments = started + (expected["moments"] - started) * unbiased
    for each in ranks:
        assert torch.allclose(each["equal"]["affine"], expected["affine"], atol=1e-12)
        assert torch.allclose(each["equal"]["moments"], moments, atol=1e-12)
        assert each["converted"] == [True] * 3 and each["same_names"]


def test_naive_sync_counts_each_rank_the_same_however_large_its_images(ranks):
    own = [images(side) for side in SIZES]
    mean = sum(one.mean((0, 2, 3)) for one in own) / 2
    var = sum(one.square().mean((0, 2, 3)) for one in own) / 2 - mean.square()
    layer = norm()
    for each, one in zip(ranks, own):
        scale = (layer.weight / (var + layer.eps).sqrt()).view(-1, 1, 1)
        expected = (one - mean.view(-1, 1, 1)) * scale + layer.bias.view(-1, 1, 1)
        assert torch.allclose(each["unequal"]["output"], expected.detach(), atol=1e-12)
        moments = torch.stack([0.1 * mean, 0.9 + 0.1 * var])
        assert torch.allclose(each["unequal"]["moments"], moments, atol=1e-12)


def test_gradients_of_naive_sync_pass_through_the_exchange(ranks):
    """The same loss as a function of both ranks' images, by autograd on one process."""
    own = [images(side).requires_grad_() for side in SIZES]
    mean = sum(one.mean((0, 2, 3)) for one in own) / 2
    var = sum(one.square().mean((0, 2, 3)) for one in own) / 2 - mean.square()
    layer = norm()
    scale = (layer.weight / (var + layer.eps).sqrt()).view(-1, 1, 1)
    outputs = [(one - mean.view(-1, 1, 1)) * scale + layer.bias.view(-1, 1, 1) for one in own]
    sum((output * one.detach().sin()).sum() for output, one in zip(outputs, own)).backward()
    for each, one in zip(ranks, own):
        assert torch.allclose(each["unequal"]["gradient"], one.grad, atol=1e-12)
        assert torch.allclose(each["unequal"]["affine"], torch.stack([layer.weight.grad, layer.bias.grad]), atol=1e-12)


def test_precise_bn_is_over_all_processes_images(ranks):
    together = torch.cat([images(seed=seed) for seed in (1, 2)]).transpose(0, 1).flatten(1)
    expected = torch.stack([together.mean(1), together.var(1, unbiased=False)])
    for each in ranks:
        for bn, found in each["precise"].items():
            assert torch.allclose(found, expected, atol=1e-12), bn
        assert torch.equal(each["precise"]["naive_sync"], ranks[0]["precise"]["naive_sync"])


def test_a_step_of_two_processes_is_that_of_one_in_two_parts(ranks, folder, tmp_path):
    """Without shared statistics a part's place in the batch is all that tells the processes' parts apart."""
    for name, parts in (("step", 2), ("step_in_parts", 4)):
        shutil.copytree(folder / "scenes", tmp_path / name / "scenes")
        losses, weights = one_step(tmp_path / name, "local", parts)
        for each in ranks:
            assert each[name][0] == pytest.approx(losses, rel=1e-5)
            assert torch.allclose(each[name][1], weights, atol=1e-6)
    assert torch.equal(ranks[0]["naive_step"], ranks[1]["naive_step"])
    assert not torch.allclose(ranks[0]["naive_step"], ranks[0]["step"][1], atol=1e-4)


def test_a_process_without_objects_neither_stops_nor_leaves_the_others(ranks):
    (losses, same), (others, _) = (each["one_without_objects"] for each in ranks)
    assert same and losses == others and losses["loss_mask"] > 0


@pytest.mark.parametrize("run, settings", [("run", ()), ("local", LOCAL)])
def test_detections_of_two_processes_are_those_of_one_with_the_same_weights(ranks, folder, run, settings):
    alone = folder / f"{run}-alone"
    (alone / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "checkpoints/last.pth"):
        shutil.copy(folder / run / name, alone / name)
    record = whole(alone, *settings)
    assert record["processes"] == 1 and ranks[0]["record"]["processes"] == ranks[1]["record"]["processes"] == 2
    ours, theirs = (json.loads((one / "detections.json").read_text()) for one in (folder / run, alone))
    assert ours == theirs and len(ours["images"]) == 3
    assert any(image["boxes"] for image in ours["images"])


def test_two_processes_go_on_bit_for_bit_when_one_was_asked_to_stop(ranks, folder):
    assert all("iteration 2 of 3 is saved" in each["interrupted"] for each in ranks)
    one, two = state(folder / "run"), state(folder / "stopped")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert ranks[0]["resumed"] == ranks[0]["record"]["metrics"]
    assert (folder / "run/metrics.jsonl").read_text() == (folder / "stopped/metrics.jsonl").read_text()


def both_norms(_folder) -> dict:
    """Ours and detectron2's on this rank's images."""
    from detectron2.layers.batch_norm import NaiveSyncBatchNorm

    batch = images(SIZES[rank.rank()])
    return {"ours": through(norm(NaiveSyncBatchNorm2d), batch), "theirs": through(norm(NaiveSyncBatchNorm), batch)}


@pytest.mark.detectron2
def test_naive_sync_is_detectron2s(tmp_path):
    pytest.importorskip("detectron2")
    for each in run_ranks(both_norms, tmp_path, tmp_path):
        for part, found in each["ours"].items():
            assert torch.allclose(found, each["theirs"][part], atol=1e-12), part


@pytest.mark.slow
def test_the_command_in_two_processes(tmp_path):
    settings = [part for one in SMALL for part in ("--set", one)]
    command = ("detect", "random:resnet18_quarter", "--dataset", "digits", "--engine", "torchvision", *settings)
    out, _ = moco_eval(*command, "--nproc", "2", "--output", "run", cwd=tmp_path)
    assert out.count("all classes") == 1
    assert json.loads((tmp_path / "run/result.json").read_text())["processes"] == 2
    _, err = moco_eval(*command, "--nproc", "3", "--output", "other", cwd=tmp_path, code=2)
    assert err.count("Error:") == 1 and "does not divide into 3 processes" in err
    assert not (tmp_path / "other").exists()
