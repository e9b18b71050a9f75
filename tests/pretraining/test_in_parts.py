"""A batch of MoCo v3 encoded in parts: what it gives is the whole batch's, to the last digits; float64, two ranks."""

import copy

import pytest
import torch
from ranks import run_ranks
from test_moco_v3 import CPU, of_case, planned
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from moco_eval.errors import InputError
from moco_eval.runtime.collectives import parallel
from moco_eval.runtime.rank import rank, world_size
from pretraining.in_parts import in_parts
from pretraining.mechanisms import optimizer_for
from pretraining.moco_v3 import MoCoV3, build_v3
from pretraining.train import algorithm_1
from pretraining.views import Batch

STEPS, BATCH, PARTS = 5, 8, 4


def model_of(parts: int) -> MoCoV3:
    torch.manual_seed(0)
    return build_v3(of_case("vit").model_copy(update={"accumulate": parts}), "sync", nn.Identity()).double()


def share_of(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    views = [torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(2)]
    mine = slice(rank() * BATCH // world_size(), (rank() + 1) * BATCH // world_size())
    return Batch(*(view[mine] for view in views), torch.arange(BATCH)[mine])


def train(parts: int) -> dict:
    """Some steps of one rank: its losses, the gradients of the last step, and all that the model holds."""
    model = model_of(parts)
    ddp, optimizer, losses = parallel(model), optimizer_for(model, of_case("vit"), CPU), []
    optimizer.param_groups[0]["eps"] = 1e-4  # Adam would make large steps of what is rounding alone
    for number in range(STEPS):
        (step,) = algorithm_1(model, ddp, optimizer, [share_of(number)], torch.Generator())
        losses.append(step.loss.item())
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"losses": losses, "state": dict(model.state_dict()), "gradients": gradients}


def both_ranks() -> dict:
    return {str(parts): train(parts) for parts in (1, 2)}


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> dict:
    """By the number of ranks, then of parts."""
    return {1: {parts: train(parts) for parts in (1, PARTS)}} | {
        2 + number: {int(parts): end for parts, end in each.items()}
        for number, each in enumerate(run_ranks(both_ranks, tmp_path_factory.mktemp("in parts")))
    }


@pytest.mark.parametrize("who", [1, 2, 3], ids=["alone", "rank 0", "rank 1"])
def test_parts_give_the_losses_gradients_and_weights_of_the_whole_batch(ends, who):
    whole, parts = ends[who].values()
    assert parts["losses"] == pytest.approx(whole["losses"], abs=1e-10)
    assert whole["gradients"].keys() == parts["gradients"].keys()
    for kind in ("gradients", "state"):
        for name, value in whole[kind].items():
            assert torch.allclose(parts[kind][name], value, atol=1e-10, rtol=0), f"{kind} {name}"
    assert whole["losses"][0] != pytest.approx(whole["losses"][-1], abs=1e-3)


def test_the_head_s_statistics_are_the_whole_batch_s_and_move_twice_a_step(ends):
    counts = {
        name: value.item() for name, value in ends[1][PARTS]["state"].items() if name.endswith("num_batches_tracked")
    }
    assert counts and set(counts.values()) == {2 * STEPS}


def test_two_ranks_in_parts_are_one_process_with_the_whole_batch(ends):
    losses = [sum(each) / 2 for each in zip(ends[2][2]["losses"], ends[3][2]["losses"])]
    assert losses == pytest.approx(ends[1][1]["losses"], abs=1e-10)


def test_a_backbone_sees_one_part_at_a_time_and_keeps_nothing_of_it():
    seen, kept = {}, {}
    for parts in (1, 2, PARTS):
        model, seen[parts], kept[parts] = model_of(parts), [], []
        for net in (model.base_encoder, model.momentum_encoder):
            net.blocks[0].register_forward_hook(lambda _, __, output, to=seen[parts]: to.append(len(output)))
        tokens = 1 + model.base_encoder.patch_embed.num_patches
        pack = lambda tensor, to=kept[parts], tokens=tokens: (to.append(tokens in tensor.shape), tensor)[1]  # noqa: E731
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            model(share_of(0), torch.Generator()).loss.backward()
    assert seen.pop(1) == [BATCH] * 4
    assert seen == {parts: [BATCH // parts] * 6 * parts for parts in (2, PARTS)}  # queries twice, keys once; two views
    assert sum(kept[1]) > 20 and all(kept[parts] and not any(kept[parts]) for parts in (2, PARTS))


def test_random_numbers_of_a_part_are_the_same_in_both_passes():
    """With dropout the second pass must repeat the first: its gradient is that of one pass whose masks are known."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Dropout(0.5))
    net.fc = nn.Linear(8, 3)
    net.forward = lambda images, net=net: net.fc(net[2](net[1](net[0](images))))
    images, plain = torch.randn(BATCH, 3, 2, 2), copy.deepcopy(net)
    plain.forward = lambda images: plain.fc(torch.cat([plain[2](plain[1](plain[0](x))) for x in images.chunk(2)]))
    for run in (lambda: in_parts(net, images, nn.Identity(), 2), lambda: plain(images)):
        torch.manual_seed(1)
        run().square().sum().backward()
    assert torch.equal(net[1].weight.grad, plain[1].weight.grad) and net[1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("arch", ["resnet18_quarter", "vit_conv_narrow_32"])
def test_a_backbone_with_batch_norm_is_refused(arch):
    with pytest.raises(InputError, match=rf"accumulate 2 would give the batch norms of {arch} the statistics of a"):
        planned(f"arch={arch}", "accumulate=2")


def test_the_plan_says_what_the_parts_are_and_counts_them_as_no_deviation():
    run = planned("arch=vit_narrow_patch8_32", "accumulate=4")
    assert (run.parts, run.chance) == (1, planned("arch=vit_narrow_patch8_32").chance)
    assert "batch 64 in 4 parts" in run.describe() and not any("accumulate" in each for each in run.deviations)
    assert "the batch encoded in 4 parts, its loss and gradient those of the whole" in run.equivalences
    with pytest.raises(InputError, match="accumulate 3 does not divide batch_size 64"):
        planned("arch=vit_narrow_patch8_32", "accumulate=3")
