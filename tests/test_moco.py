"""The contrastive core, against closed forms and naive loops."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from moco_eval import config as configs
from moco_eval.config import PretrainConfig
from pretraining.bn import SplitBatchNorm2d, permutation, shuffle
from pretraining.moco import MoCo, build_moco, chance_loss, info_nce


def tiny(**settings) -> MoCo:
    torch.manual_seed(0)
    encoder = lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 8, bias=False))  # noqa: E731
    values = {"dim": 8, "queue_size": 16, "momentum": 0.9, "temperature": 0.2} | settings
    return MoCo(encoder(), encoder(), **values).double()


def views(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))


def test_loss_is_log_of_candidates_when_all_keys_look_alike():
    q = normalize(torch.ones(5, 3), dim=1)
    loss, logits = info_nce(q, q, q[:1].T.repeat(1, 7), temperature=0.07)
    assert loss.item() == pytest.approx(math.log(8), abs=1e-6)
    assert logits.shape == (5, 8)
    assert chance_loss(7, symmetric=False) == pytest.approx(math.log(8))
    assert chance_loss(65536, symmetric=True) == pytest.approx(2 * 11.0904, abs=1e-3)


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
    model(*views(), torch.Generator()).loss.backward()
    assert all(parameter.grad is None for parameter in model.encoder_k.parameters())
    assert model.queue.grad is None


def test_encoder_k_moves_before_it_encodes():
    model = tiny()
    with torch.no_grad():
        model.encoder_q[1].weight.normal_(generator=torch.Generator().manual_seed(9))
    expected = 0.9 * model.encoder_k[1].weight + 0.1 * model.encoder_q[1].weight
    view_q, view_k = views()
    keys = model(view_q, view_k, torch.Generator()).keys
    assert torch.allclose(model.encoder_k[1].weight, expected, atol=1e-15)
    assert torch.allclose(keys, normalize(view_k.flatten(1) @ expected.T, dim=1), atol=1e-12)


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
    model(view_q, view_k + 5, torch.Generator())
    assert model.encoder_k[0].running_mean.mean() > 0.3 > model.encoder_q[0].running_mean.mean()


def test_queue_wraps_round_and_moves_its_pointer():
    model = tiny(queue_size=10)
    first, second = (torch.full((6, 8), float(value), dtype=torch.float64) for value in (1, 2))
    model.push(first)
    model.push(second)
    assert model.queue_ptr.item() == 2
    assert model.queue[0].tolist() == [2, 2, 1, 1, 1, 1, 2, 2, 2, 2]


def test_a_batch_never_meets_its_own_keys():
    model = tiny()
    before = model.queue.clone()
    step = model(*views(), torch.Generator())
    assert torch.equal(model.queue, before)
    model.push(step.keys)
    assert torch.equal(model.queue[:, :4], step.keys.T)
    assert torch.equal(model.queue[:, 4:], before[:, 4:])


def test_symmetric_loss_is_the_sum_of_both_directions_and_pushes_both():
    view_q, view_k = views()
    both = tiny(symmetric=True)(view_q, view_k, torch.Generator())
    forth, back = (tiny()(*pair, torch.Generator()) for pair in ((view_q, view_k), (view_k, view_q)))
    assert both.loss.item() == pytest.approx(forth.loss.item() + back.loss.item(), abs=1e-12)
    assert torch.allclose(both.keys, torch.cat([back.keys, forth.keys]), atol=1e-12)


def test_shuffle_and_unshuffle_is_the_identity():
    rows = torch.arange(24.0).view(12, 2)
    forth, back = permutation(12, torch.Generator().manual_seed(3))
    assert not torch.equal(shuffle(rows, forth), rows)
    assert torch.equal(shuffle(shuffle(rows, forth), back), rows)


def test_split_bn_is_one_bn_per_strided_group():
    torch.manual_seed(0)
    split, images = SplitBatchNorm2d(5, groups=4), torch.randn(12, 5, 3, 2) * 3 + 1
    nn.init.normal_(split.weight)
    output = split(images)
    for group in range(4):
        own = nn.BatchNorm2d(5)
        own.load_state_dict({**own.state_dict(), "weight": split.weight, "bias": split.bias})
        assert torch.allclose(output[group::4], own(images[group::4]), atol=1e-5)
    means = torch.stack([0.1 * images[group::4].mean((0, 2, 3)) for group in range(4)]).mean(0)
    assert torch.allclose(split.running_mean, means, atol=1e-6)
    assert split.num_batches_tracked.item() == 0
    assert set(split.state_dict()) == set(nn.BatchNorm2d(5).state_dict())


def test_split_bn_takes_channels_last_and_refuses_what_does_not_divide():
    split, images = SplitBatchNorm2d(4, groups=2), torch.randn(6, 4, 5, 5)
    plain = split(images)
    assert torch.allclose(split(images.to(memory_format=torch.channels_last)), plain, atol=1e-6)
    with pytest.raises(ValueError, match="7 does not divide into 2"):
        split(torch.randn(7, 4, 5, 5))


def test_split_bn_in_evaluation_is_ordinary():
    split, plain = SplitBatchNorm2d(4, groups=2), nn.BatchNorm2d(4)
    split(torch.randn(6, 4, 5, 5))
    plain.load_state_dict(split.state_dict())
    images = torch.randn(3, 4, 5, 5)
    assert torch.equal(split.eval()(images), plain.eval()(images))


def config(**values) -> PretrainConfig:
    settings = [f"{key}={value}" for key, value in values.items()]
    return configs.load("digits", "pretrain", PretrainConfig, ["arch=resnet18_quarter", *settings])


def keys_with(permute: bool, bn: str) -> torch.Tensor:
    torch.manual_seed(0)
    model = build_moco(config(), bn)
    model.permute_keys = permute
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    return model.encode_keys(images, torch.Generator().manual_seed(1))[1]


def test_shuffling_changes_keys_where_bn_has_groups_and_only_there():
    assert not torch.allclose(keys_with(True, "split"), keys_with(False, "split"), atol=1e-4)
    assert torch.allclose(keys_with(True, "none"), keys_with(False, "none"), atol=1e-5)
    view = views()[0]
    shuffled, plain = (tiny(permute_keys=permute).encode_keys(view, torch.Generator())[0] for permute in (True, False))
    assert torch.allclose(shuffled, plain, atol=1e-12)


def test_without_bn_groups_or_asked_not_to_keys_stay_in_place():
    assert build_moco(config(), "split").permute_keys and build_moco(config(), "shuffle").permute_keys
    assert not build_moco(config(), "none").permute_keys
    assert not build_moco(config(bn_permute="false"), "split").permute_keys


def test_heads_have_the_official_keys():
    v1, v2 = (build_moco(config(head=head, dim=64), "none").state_dict() for head in ("linear", "mlp"))
    assert v1["encoder_q.fc.weight"].shape == (64, 128) and "encoder_q.fc.0.weight" not in v1
    assert v2["encoder_q.fc.0.weight"].shape == (128, 128) and v2["encoder_q.fc.2.weight"].shape == (64, 128)
    assert v1["queue"].shape == (64, 1024) and v1["queue_ptr"].shape == (1,)
    assert torch.allclose(v1["queue"].norm(dim=0), torch.ones(1024), atol=1e-5)


def test_twenty_steps_against_algorithm_1_in_plain_loops():
    """From the same weights and batches, in float64: losses and weights agree."""
    model = tiny(queue_size=12)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    w_q, w_k = (model.state_dict()[f"encoder_{x}.1.weight"].clone() for x in "qk")
    queue, pointer, velocity = [column.clone() for column in model.queue.T], 0, torch.zeros_like(w_q)
    for step in range(20):
        view_q, view_k = views(step)
        w_k = 0.9 * w_k + (1 - 0.9) * w_q
        leaf = w_q.clone().requires_grad_()
        losses, keys = [], []
        for x_q, x_k in zip(view_q.flatten(1), view_k.flatten(1)):
            q, k = leaf @ x_q, w_k @ x_k
            q, k = q / q.norm(), k / k.norm()
            logits = torch.stack([q @ k, *(q @ negative for negative in queue)]) / 0.2
            losses.append(cross_entropy(logits[None], torch.zeros(1, dtype=torch.long)))
            keys.append(k)
        naive = sum(losses) / len(losses)
        naive.backward()
        velocity = 0.9 * velocity + leaf.grad + 1e-3 * w_q
        w_q = w_q - 0.1 * velocity
        for k in keys:
            queue[pointer], pointer = k, (pointer + 1) % 12

        done = model(view_q, view_k, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        done.loss.backward()
        optimizer.step()
        model.push(done.keys)
        assert done.loss.item() == pytest.approx(naive.item(), abs=1e-10)
    assert torch.allclose(model.encoder_q[1].weight, w_q, atol=1e-10)
    assert torch.allclose(model.encoder_k[1].weight, w_k, atol=1e-10)
