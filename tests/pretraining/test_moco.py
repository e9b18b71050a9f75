"""The contrastive core, against closed forms and naive loops."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from moco_eval.config import load as configs
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.runtime.batch_norm import SplitBatchNorm2d, SyncBatchNorm2d, split_batch_norm, sync_batch_norm
from pretraining.mechanisms import build
from pretraining.moco import MoCo, Step, info_nce
from pretraining.plan import Plan, plan, shuffle_bytes
from pretraining.shuffle_bn import encode_shuffled, permutation, shuffle
from pretraining.train import algorithm_1
from pretraining.views import Batch


def tiny(**settings) -> MoCo:
    torch.manual_seed(0)
    encoder = lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 8, bias=False))  # noqa: E731
    values = {"dim": 8, "queue_size": 16, "momentum": 0.9, "temperature": 0.2} | settings
    return MoCo(encoder(), encoder(), **values).double()


def views(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))


def batch(seed: int = 1) -> Batch:
    return Batch(*views(seed), torch.arange(4))


def pushed(keys: torch.Tensor) -> Step:
    return Step(*[torch.zeros(())] * 3, keys)


def test_loss_is_log_of_candidates_when_all_keys_look_alike():
    q = normalize(torch.ones(5, 3), dim=1)
    loss, logits = info_nce(q, q, q[:1].T.repeat(1, 7), temperature=0.07)
    assert loss.item() == pytest.approx(math.log(8), abs=1e-6)
    assert logits.shape == (5, 8)


def test_chance_is_the_mechanism_s_own():
    assert planned(queue_size=65536).chance == pytest.approx(2 * 11.0904, abs=1e-3)  # the digits' is symmetric
    assert planned(queue_size=255, symmetric="false").chance == pytest.approx(math.log(256))
    bank = planned(mechanism="memory_bank", symmetric="false", queue_size=255)
    assert bank.chance == pytest.approx(math.log(256))
    both = planned(mechanism="end_to_end", symmetric="false", queue_size=64)
    assert both.chance == pytest.approx(math.log(64))


def test_own_column_is_no_negative():
    q, queue = normalize(torch.randn(3, 4), dim=1), normalize(torch.randn(4, 5), dim=0)
    own = torch.tensor([4, 0, 2])
    loss, logits = info_nce(q, queue.T[own], queue, 0.2, own)
    rows = [[i, *(c for c in range(5) if c != i)] for i in own.tolist()]
    naive = torch.stack([q[n] @ queue[:, row] / 0.2 for n, row in enumerate(rows)])
    assert loss.item() == pytest.approx(cross_entropy(naive, torch.zeros(3, dtype=torch.long)).item(), abs=1e-6)
    assert torch.isinf(logits[torch.arange(3), 1 + own]).all()


def test_loss_against_a_naive_loop():
    generator = torch.Generator().manual_seed(0)
    q, k = (normalize(torch.randn(6, 4, generator=generator, dtype=torch.float64), dim=1) for _ in range(2))
    queue = normalize(torch.randn(4, 10, generator=generator, dtype=torch.float64), dim=0)
    naive = 0.0
    for i in range(6):
        positive = math.exp((q[i] @ k[i]).item() / 0.1)
        negatives = sum(math.exp((q[i] @ queue[:, j]).item() / 0.1) for j in range(10))
        naive -= math.log(positive / (positive + negatives)) / 6
    assert info_nce(q, k, queue, 0.1)[0].item() == pytest.approx(naive, abs=1e-12)


@pytest.mark.parametrize("shapes", [((4, 8), (3, 8), (8, 5)), ((4, 8), (4, 8), (7, 5))])
def test_loss_refuses_shapes_that_disagree(shapes):
    with pytest.raises(ValueError, match="disagree"):
        info_nce(*(torch.zeros(shape) for shape in shapes), temperature=0.2)


def test_key_encoder_starts_equal_and_takes_no_gradient():
    model = tiny()
    for q, k in zip(model.encoder_q.parameters(), model.encoder_k.parameters()):
        assert torch.equal(q, k) and q.requires_grad and not k.requires_grad
    model(batch(), torch.Generator()).loss.backward()
    assert all(parameter.grad is None for parameter in model.encoder_k.parameters())
    assert model.queue.grad is None


def test_encoder_k_moves_by_equation_2():
    model = tiny()
    with torch.no_grad():
        model.encoder_q[1].weight.normal_(generator=torch.Generator().manual_seed(9))
    expected = 0.9 * model.encoder_k[1].weight + 0.1 * model.encoder_q[1].weight
    _, view_k = views()
    model.move_encoder_k()
    keys = model(batch(), torch.Generator()).keys
    assert torch.allclose(model.encoder_k[1].weight, expected, atol=1e-15)
    assert torch.allclose(keys, normalize(view_k.flatten(1) @ expected.T, dim=1), atol=1e-12)


def test_encoder_k_moves_before_it_encodes_and_before_encoder_q_is_trained():
    model = tiny()
    with torch.no_grad():
        model.encoder_q[1].weight.normal_(generator=torch.Generator().manual_seed(9))
    expected = 0.9 * model.encoder_k[1].weight + 0.1 * model.encoder_q[1].weight.detach()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    (step,) = algorithm_1(model, model, optimizer, [batch()], torch.Generator())
    assert torch.allclose(model.encoder_k[1].weight, expected, atol=1e-15)
    assert torch.allclose(step.keys, normalize(views()[1].flatten(1) @ expected.T, dim=1), atol=1e-12)


def test_bn_statistics_of_encoder_k_are_its_own():
    model = MoCo(
        nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()),
        nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()),
        dim=12,
        queue_size=8,
        momentum=0.5,
        temperature=0.2,
    )
    view_q, view_k = (view.float() for view in views())
    model(Batch(view_q, view_k + 5, torch.arange(4)), torch.Generator())
    assert model.encoder_k[0].running_mean.mean() > 0.3 > model.encoder_q[0].running_mean.mean()


def test_queue_wraps_round_and_moves_its_pointer():
    model = tiny(queue_size=10)
    first, second = (torch.full((6, 8), float(value), dtype=torch.float64) for value in (1, 2))
    model.push(pushed(first))
    model.push(pushed(second))
    assert model.queue_ptr.item() == 2
    assert model.queue[0].tolist() == [2, 2, 1, 1, 1, 1, 2, 2, 2, 2]


def test_a_batch_never_meets_its_own_keys():
    model = tiny()
    before = model.queue.clone()
    step = model(batch(), torch.Generator())
    assert torch.equal(model.queue, before)
    model.push(step)
    assert torch.equal(model.queue[:, :4], step.keys.T)
    assert torch.equal(model.queue[:, 4:], before[:, 4:])


def test_symmetric_loss_is_the_sum_of_both_directions_and_pushes_both():
    view_q, view_k = views()
    both = tiny(symmetric=True)(batch(), torch.Generator())
    pairs = (Batch(view_q, view_k, torch.arange(4)), Batch(view_k, view_q, torch.arange(4)))
    forth, back = (tiny()(pair, torch.Generator()) for pair in pairs)
    assert both.loss.item() == pytest.approx(forth.loss.item() + back.loss.item(), abs=1e-12)
    assert torch.allclose(both.keys, torch.cat([back.keys, forth.keys]), atol=1e-12)


def test_shuffle_and_unshuffle_is_the_identity():
    rows = torch.arange(24.0).view(12, 2)
    forth, back = permutation(12, torch.Generator().manual_seed(3))
    assert not torch.equal(shuffle(rows, forth), rows)
    assert torch.equal(shuffle(shuffle(rows, forth), back), rows)


def grouped(features: int, groups: int) -> nn.Module:
    """A network of one layer of split BN."""
    return split_batch_norm(nn.Sequential(nn.BatchNorm2d(features)), groups)


@pytest.mark.parametrize("convert", [sync_batch_norm, partial(split_batch_norm, groups=2)])
def test_a_replaced_norm_keeps_its_epsilon_and_momentum(convert):
    (norm,) = convert(nn.Sequential(nn.BatchNorm2d(3, eps=1e-2, momentum=0.3)))
    assert type(norm) is not nn.BatchNorm2d and (norm.eps, norm.momentum) == (1e-2, 0.3)


def test_split_bn_is_one_bn_per_strided_group():
    torch.manual_seed(0)
    net, images = grouped(5, 4), torch.randn(12, 5, 3, 2) * 3 + 1
    split = net[0]
    nn.init.normal_(split.weight)
    output = net(images)
    for group in range(4):
        own = nn.BatchNorm2d(5)
        own.load_state_dict({**own.state_dict(), "weight": split.weight, "bias": split.bias})
        assert torch.allclose(output[group::4], own(images[group::4]), atol=1e-5)
    means = torch.stack([0.1 * images[group::4].mean((0, 2, 3)) for group in range(4)]).mean(0)
    assert torch.allclose(split.running_mean, means, atol=1e-6)
    assert split.num_batches_tracked.item() == 0
    assert set(split.state_dict()) == set(nn.BatchNorm2d(5).state_dict())
    assert set(net.state_dict()) == set(nn.Sequential(nn.BatchNorm2d(5)).state_dict())


def test_samples_come_out_of_split_bn_where_they_went_in():
    """A network whose layers mix no samples gives each its own output, whatever the groups."""
    net, images = grouped(3, 4), torch.randn(8, 3, 2, 2)
    net[0] = nn.Flatten()
    assert torch.equal(net(images), images.flatten(1))
    assert torch.equal(net.eval()(images), images.flatten(1))


def test_split_bn_takes_channels_last_and_refuses_what_does_not_divide():
    net, images = grouped(4, 2), torch.randn(6, 4, 5, 5)
    last = images.to(memory_format=torch.channels_last)
    assert torch.allclose(net(last), net(images), atol=1e-6)
    assert net[0](last).is_contiguous(memory_format=torch.channels_last)
    for layer in (net, net[0]):
        with pytest.raises(ValueError, match="7 does not divide into 2"):
            layer(torch.randn(7, 4, 5, 5))


def test_split_bn_for_a_compiler_is_the_same():
    """The plain arithmetic, here run without one: output, gradients, running statistics."""
    torch.manual_seed(0)
    images = (torch.randn(12, 5, 3, 2) * 3 + 1).to(memory_format=torch.channels_last)
    ends = []
    for forward in (SplitBatchNorm2d.forward, SplitBatchNorm2d._arithmetic):
        layer, x = SplitBatchNorm2d(5, groups=4), images.clone().requires_grad_()
        layer.load_state_dict({**layer.state_dict(), "weight": torch.arange(1.0, 6), "bias": torch.arange(5.0)})
        output = forward(layer, x)
        (output * images.sin()).sum().backward()
        gradients = (x.grad, layer.weight.grad, layer.bias.grad)
        ends.append((output.detach(), *gradients, layer.running_mean, layer.running_var))
    for plain, fused in zip(*ends):
        assert torch.allclose(plain, fused, atol=1e-4)


def test_split_bn_in_evaluation_is_ordinary():
    split, plain = SplitBatchNorm2d(4, groups=2), nn.BatchNorm2d(4)
    split(torch.randn(6, 4, 5, 5))
    plain.load_state_dict(split.state_dict())
    images = torch.randn(3, 4, 5, 5)
    assert torch.equal(split.eval()(images), plain.eval()(images))


def config(**values) -> PretrainConfig:
    settings = [f"{key}={value}" for key, value in values.items()]
    return configs.load("digits", "pretrain", PretrainConfig, ["arch=resnet18_quarter", *settings])


def planned(processes: int = 1, **values) -> Plan:
    return plan(config(**values), "digits", None, processes)


def keys_with(permute: bool, bn: str) -> torch.Tensor:
    torch.manual_seed(0)
    model = build(planned(bn=bn))
    images = torch.randint(256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    order = torch.Generator().manual_seed(1) if permute else None
    return encode_shuffled(model.encoder_k, images, model.pixels, order)[1].detach()


def test_shuffling_changes_keys_where_bn_has_groups_and_only_there():
    assert not torch.allclose(keys_with(True, "split"), keys_with(False, "split"), atol=1e-4)
    assert torch.allclose(keys_with(True, "none"), keys_with(False, "none"), atol=1e-5)
    net, view = tiny().encoder_k, views()[0]
    shuffled, plain = (encode_shuffled(net, view, nn.Identity(), order)[0] for order in (torch.Generator(), None))
    assert torch.allclose(shuffled, plain, atol=1e-12)


def test_without_bn_groups_or_asked_not_to_keys_stay_in_place():
    assert build(planned(bn="split")).permute_keys and build(planned(2, bn="shuffle")).permute_keys
    assert not build(planned(bn="none")).permute_keys and not build(planned(bn="sync")).permute_keys
    assert not build(planned(bn_permute="false", bn="split")).permute_keys


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_shuffling_receives_at_most_one_part_in_processes_of_what_gathering_takes(processes):
    """Counted over 200 permutations: the worst rank of the worst permutation, and the mean that the plan states."""
    ours, official = shuffle_bytes(config(batch_size=256, symmetric="false"), processes)
    N = 256 // processes
    received = []
    for seed in range(200):
        forth, _ = permutation(256, torch.Generator().manual_seed(seed))
        owner = forth.view(processes, N) // N
        received += [(owner[rank] != rank).sum().item() * 3 * 64 * 64 for rank in range(processes)]
    assert official == (256 - N) * 3 * 64 * 64 * 4
    assert max(received) <= official / processes
    assert sum(received) / len(received) == pytest.approx(ours, rel=0.02)


def test_sync_bn_on_one_process_is_ordinary():
    sync, plain = SyncBatchNorm2d(4), nn.BatchNorm2d(4)
    images = torch.randn(6, 4, 5, 5)
    assert torch.equal(sync(images), plain(images)) and torch.equal(sync.running_var, plain.running_var)


def test_heads_have_the_official_keys():
    v1, v2 = (build(planned(head=head, dim=64, bn="none")).state_dict() for head in ("linear", "mlp"))
    assert v1["encoder_q.fc.weight"].shape == (64, 128) and "encoder_q.fc.0.weight" not in v1
    assert v2["encoder_q.fc.0.weight"].shape == (128, 128) and v2["encoder_q.fc.2.weight"].shape == (64, 128)
    assert v1["queue"].shape == (64, 1024) and v1["queue_ptr"].shape == (1,)
    assert torch.allclose(v1["queue"].norm(dim=0), torch.ones(1024), atol=1e-5)
