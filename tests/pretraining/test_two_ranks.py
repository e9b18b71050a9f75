"""Two gloo processes: shuffling BN, the queue, the batches. One launch serves every test."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tars import write_shards

from moco_eval.config import load as configs
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.data.catalogue import open_images
from moco_eval.data.loader import Batches, loader, share
from moco_eval.errors import InputError, Interrupted
from moco_eval.features.extract import extract
from moco_eval.preprocessing import Preprocessing
from moco_eval.runtime.batch_norm import SyncBatchNorm2d
from moco_eval.runtime.collectives import all_sum, broadcast_, gather, same_on_all_ranks
from moco_eval.runtime.rank import rank, world_size
from pretraining import moco, shuffle_bn
from pretraining.mechanisms import build
from pretraining.plan import Plan, plan
from pretraining.shuffle_bn import encode_shuffled, permutation, shuffle
from pretraining.train import Trainer, pretrain
from pretraining.views import two_views

BATCH = 16
CPU = torch.device("cpu")


def config(*settings: str) -> PretrainConfig:
    base = ["arch=resnet18_quarter", "knn=null", "batch_size=32", "queue_size=64", "log_every=5"]
    return configs.load("digits", "pretrain", PretrainConfig, [*base, *settings])


def images(seed: int = 5) -> torch.Tensor:
    return torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def flatten(batch: torch.Tensor) -> torch.Tensor:
    return batch.flatten(1)[:, :7]


def without_bn(permute: bool) -> torch.Tensor:
    """Keys of a network that has no batch norm."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 8))
    order = torch.Generator().manual_seed(1) if permute else None
    return encode_shuffled(net, share(images()), torch.nn.Identity(), order)[1].detach()


def keys_of(permute: bool, kind: str) -> torch.Tensor:
    """Keys of a network with batch norm, in float."""
    torch.manual_seed(0)
    net = build(plan(config("bn_groups=2", f"bn={kind}"), "digits", None, 2)).encoder_k
    order = torch.Generator().manual_seed(1) if permute else None
    with torch.no_grad():
        return encode_shuffled(net, share(images()), torch.nn.Identity(), order)[1]


def with_affine(layer: torch.nn.BatchNorm2d) -> torch.nn.BatchNorm2d:
    """With a scale and a shift that are not 1 and 0."""
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.5, 2.0]))
        layer.bias.copy_(torch.tensor([0.1, -0.2, 0.3]))
    return layer


def synchronised() -> tuple[torch.Tensor, ...]:
    """Output, gradients and running statistics of synchronised BN for this rank's half of a batch."""
    layer = with_affine(SyncBatchNorm2d(3).double())
    half = share(images().double()).clone().requires_grad_()
    output = layer(half)
    (output * half.detach().sin() / world_size()).sum().backward()
    affine = torch.stack([layer.weight.grad, layer.bias.grad])
    return output.detach(), half.grad, layer.running_mean, layer.running_var, all_sum(affine)


def stopped_at(step: int) -> Plan:
    settings = ("schedule.epochs=1", "symmetric=false", "views.size=32", "workers=0", f"max_steps={step}")
    return plan(config(*settings), "digits", None, world_size())


def trained_queue(folder) -> tuple[torch.Tensor, torch.Tensor]:
    """Twenty steps of training: this rank's queue in memory, and the keys it encoded itself in the last two."""
    own: list[torch.Tensor] = []

    def watched(*arguments):
        k, keys = encode_shuffled(*arguments)
        own.append(k)
        return k, keys

    moco.encode_shuffled = watched
    trainer = Trainer(stopped_at(20), folder / "run", CPU)
    trainer.restore()
    with pytest.raises(Interrupted):
        trainer.train()
    moco.encode_shuffled = encode_shuffled
    return trainer.model.queue.clone(), torch.stack(own[-2:])


def stopped_and_resumed(folder) -> None:
    """The same twenty steps, stopped between two lines of metrics."""
    for step in (7, 20):
        with pytest.raises(Interrupted, match=f"saved at step {step} of 40"):
            pretrain(stopped_at(step), folder / "parts", CPU)


def seen_in_shards(folder) -> list[str]:
    """The images of tar shards whose views this rank's loader process makes in an epoch."""
    run = plan(config("views.size=32"), "webdataset", folder, world_size())
    batches = Batches(len(run.images), 6, 0, range(1), True, drop_last=True, shards=run.images.shards)
    views = two_views(run.images, run.config)
    seen = [index for batch in loader(views, batches, 1, CPU) for index in batch[1].tolist()]
    return [run.images.name_of(index) for index in seen]


def of_channels_last() -> dict[str, torch.Tensor]:
    """Collectives of images whose memory does not lie as their rows do."""
    pixels = images().to(memory_format=torch.channels_last)
    mine = share(pixels)
    forth, _ = permutation(BATCH, torch.Generator().manual_seed(3))
    from_rank_0, total = (mine.clone(memory_format=torch.channels_last) for _ in range(2))
    return {
        "shuffled": shuffle(mine, forth),
        "gathered": gather(mine),
        "from_rank_0": broadcast_(from_rank_0),
        "total": all_sum(total),
    }


def copies_of_a_shuffle() -> int:
    """How many tensors the host sends to the device to encode keys in shuffled groups."""
    copies = []

    def counted(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        copies.append(tensor)
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle_bn, "to_device", counted)
        without_bn(True)
    return len(copies)


def both_ranks(folder) -> dict:
    """Everything the tests below look at, as one rank sees it."""
    rows = torch.arange(12)[:, None] * torch.ones(1, 2)
    forth, back = permutation(12, torch.Generator().manual_seed(3))
    mine = share(rows)
    batches = Batches(101, 32, 0, range(2), shuffle=True, drop_last=True)

    few = open_images("digits", None, "test")
    held, pushed = trained_queue(folder)
    stopped_and_resumed(folder)
    return {
        "shuffled": shuffle(mine, forth),
        "restored": shuffle(shuffle(mine, forth), back),
        "indices": [index for batch in batches for index in batch],
        "in_shards": seen_in_shards(folder / "shards"),
        "channels_last": of_channels_last(),
        "copies": copies_of_a_shuffle(),
        "keys": keys_of(True, "shuffle"),
        "keys_unshuffled": keys_of(False, "shuffle"),
        "synchronised": synchronised(),
        "same": same_on_all_ranks(torch.ones(3)),
        "different": same_on_all_ranks(torch.full((3,), float(rank()))),
        "features": extract(flatten, few, Preprocessing(32, 32), CPU, batch_size=33),
        "odd": extract(flatten, few.few_labels(1, 0), Preprocessing(32, 32), CPU, batch_size=9),
        "queue": held,
        "pushed": pushed,
        "without_bn": without_bn(True),
        "without_bn_unshuffled": without_bn(False),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict]:
    write_shards(folder / "shards")
    return run_ranks(both_ranks, folder, folder)


def test_batches_are_disjoint_and_complete(ranks):
    alone = [index for batch in Batches(101, 32, 0, range(2), shuffle=True, drop_last=True) for index in batch]
    seen = [set(map(tuple, rank["indices"])) for rank in ranks]
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == set(alone)


def test_images_of_shards_are_shared_between_ranks_each_once(ranks):
    seen = [set(rank["in_shards"]) for rank in ranks]
    assert [len(rank["in_shards"]) for rank in ranks] == [18, 18] and len(seen[0] | seen[1]) == 36


def test_shuffled_rows_cross_ranks_and_come_back(ranks):
    forth, _ = permutation(12, torch.Generator().manual_seed(3))
    assert torch.cat([rank["shuffled"] for rank in ranks])[:, 0].tolist() == forth.tolist()
    assert (ranks[0]["shuffled"][:, 0] >= 6).any() and (ranks[1]["shuffled"][:, 0] < 6).any()
    assert torch.cat([rank["restored"] for rank in ranks])[:, 0].tolist() == list(range(12))


def test_a_shuffle_asks_for_one_copy_to_the_device_whatever_the_number_of_ranks(ranks):
    """The rows that leave, the places of those that come, and the way back, together."""
    assert [rank["copies"] for rank in ranks] == [1, 1]


def test_images_whose_channels_lie_last_in_memory_cross_ranks_whole(ranks):
    """Sent as they lie, their pixels would arrive scrambled."""
    pixels, half = images(), BATCH // 2
    forth, _ = permutation(BATCH, torch.Generator().manual_seed(3))
    for number, each in enumerate(ranks):
        crossed = each["channels_last"]
        assert torch.equal(crossed["shuffled"], pixels[forth][number * half :][:half])
        assert torch.equal(crossed["gathered"], pixels)
        assert torch.equal(crossed["from_rank_0"], pixels[:half])
        assert torch.equal(crossed["total"], pixels[:half] + pixels[half:])


def test_shuffling_changes_the_keys_where_there_is_bn(ranks):
    assert not torch.allclose(ranks[0]["keys"], ranks[0]["keys_unshuffled"], atol=1e-4)


def test_keys_equal_one_process_with_split_bn_under_the_same_permutation(ranks):
    """Two processes' BN groups are halves of the permuted batch; split BN's are its even and odd rows."""
    torch.manual_seed(0)
    model = build(plan(config("bn_groups=2", "bn=split"), "digits", None, 1))
    forth, _ = permutation(BATCH, torch.Generator().manual_seed(1))
    interleaved = torch.stack([forth[: BATCH // 2], forth[BATCH // 2 :]], dim=1).flatten()
    with torch.no_grad():
        encoded = torch.nn.functional.normalize(model.encoder_k(images()[interleaved]), dim=1)
    expected = encoded[torch.argsort(interleaved)]
    for each in ranks:
        assert torch.allclose(each["keys"], expected, atol=1e-5)


def test_without_bn_shuffling_changes_nothing(ranks):
    for each in ranks:
        assert torch.allclose(each["without_bn"], each["without_bn_unshuffled"], atol=1e-6)


def test_synchronised_bn_is_bn_of_the_whole_batch(ranks):
    layer, whole = with_affine(torch.nn.BatchNorm2d(3).double()), images().double().requires_grad_()
    output = layer(whole)
    (output * whole.detach().sin() / 2).sum().backward()
    expected = (output.detach(), whole.grad)
    for part in range(2):
        got = torch.cat([each["synchronised"][part] for each in ranks])
        assert torch.allclose(got, expected[part], atol=1e-12)
    for each in ranks:
        assert torch.allclose(each["synchronised"][2], layer.running_mean, atol=1e-12)
        assert torch.allclose(each["synchronised"][3], layer.running_var, atol=1e-12)
        assert torch.allclose(each["synchronised"][4], torch.stack([layer.weight.grad, layer.bias.grad]), atol=1e-12)


def test_after_twenty_steps_the_queue_is_the_same_and_holds_both_ranks_keys_in_rank_order(ranks):
    assert torch.equal(ranks[0]["queue"], ranks[1]["queue"])
    # K 64 holds the last two steps of 32 keys; step 20 ends at the queue's end
    expected = torch.cat([torch.cat([each["pushed"][step] for each in ranks]) for step in range(2)])
    assert torch.allclose(ranks[0]["queue"].T, expected, atol=1e-6)
    assert ranks[0]["same"] and not ranks[0]["different"]


def test_features_of_two_processes_are_those_of_one(ranks):
    alone = extract(flatten, open_images("digits", None, "test"), Preprocessing(32, 32), CPU)
    for each in ranks:
        assert np.array_equal(each["features"].numpy(), alone.numpy())
        assert len(each["odd"]) == 10  # a last batch of one image, fewer than there are ranks


def last(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.pth", weights_only=True)


def metrics(run: Path) -> list[dict]:
    """Without what a clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line.keys() - {"images_per_second", "data_wait"}} for line in lines]


def test_stopped_and_resumed_two_processes_end_the_same(ranks, folder):
    whole, parts = last(folder / "run"), last(folder / "parts")
    assert whole["step"] == parts["step"] == 20
    assert all(torch.equal(tensor, parts["state_dict"][name]) for name, tensor in whole["state_dict"].items())
    for number, values in whole["optimizer"]["state"].items():
        assert torch.equal(values["momentum_buffer"], parts["optimizer"]["state"][number]["momentum_buffer"])
    assert metrics(folder / "run") == metrics(folder / "parts") and len(metrics(folder / "run")) == 5


def test_several_processes_are_on_record(ranks, folder):
    ours = last(folder / "run")["pretraining"]
    assert (ours["bn"], ours["processes"]) == ("shuffle", 2)


def test_another_number_of_processes_is_refused_with_the_reason(ranks, folder):
    with pytest.raises(InputError, match=r"processes is 2 there and 1 now \(the BN groups"):
        pretrain(stopped_at(20), folder / "parts", CPU)
