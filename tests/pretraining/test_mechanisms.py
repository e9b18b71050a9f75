"""Every mechanism against a plain re-statement of Algorithm 1: naive loops, float64, two simulated ranks."""

import math

import pytest
import torch
from ranks import run_ranks
from torch import nn

from moco_eval.runtime.collectives import gather_with_gradient, parallel
from moco_eval.runtime.rank import rank
from pretraining.mechanisms import EndToEnd, MemoryBank, draw_outside
from pretraining.moco import MoCo
from pretraining.moco_v3 import MoCoV3, synchronised
from pretraining.train import algorithm_1
from pretraining.views import Batch

RANKS, N, C, K, IMAGES, STEPS = 2, 4, 6, 24, 40, 20
TAU, M, LR, BETA, DECAY, EPS = 0.2, 0.9, 0.05, 0.9, 1e-3, 1e-5
CASES = ("v1", "v2", "symmetric", "memory_bank", "end_to_end", "v3")


NAMES = dict.fromkeys(CASES, ("encoder_q", "encoder_k")) | {"v3": ("base_encoder", "momentum_encoder")}


def network(head: str) -> nn.Module:
    """A layer, batch norm, and the head of MoCo v1 or v2."""
    body = [nn.Flatten(), nn.Linear(12, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU()]
    return nn.Sequential(*body, *([nn.Linear(8, 8), nn.ReLU()] if head == "v2" else []), nn.Linear(8, C))


def model_of(case: str) -> nn.Module:
    torch.manual_seed(0)
    nets = [network(case) for _ in range(2)]
    if case == "v3":
        shared = [synchronised(net, "sync") for net in (*nets, nn.Sequential(nn.Linear(C, C, bias=False)))]
        return MoCoV3(*shared, momentum=M, temperature=TAU).double()
    if case == "memory_bank":
        return MemoryBank(nets[0], images=IMAGES, dim=C, queue_size=K, temperature=TAU).double()
    if case == "end_to_end":
        return EndToEnd(*nets, temperature=TAU).double()
    return MoCo(*nets, dim=C, queue_size=K, momentum=M, temperature=TAU, symmetric=case == "symmetric").double()


def global_batch(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two views of RANKS * N images, and which images they are."""
    generator = torch.Generator().manual_seed(100 + step)
    views = [torch.randn(RANKS * N, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2)]
    return views[0], views[1], torch.randperm(IMAGES, generator=generator)[: RANKS * N]


# The naive side


def encode(weights: dict[str, torch.Tensor], images: list[torch.Tensor]) -> list[torch.Tensor]:
    """Unit features of the images of one BN group."""
    hidden = [weights["1.weight"] @ image.flatten() for image in images]
    mean = sum(hidden) / len(hidden)
    var = sum((h - mean) ** 2 for h in hidden) / len(hidden)
    features = []
    for h in hidden:
        h = (h - mean) / torch.sqrt(var + EPS) * weights["2.weight"] + weights["2.bias"]
        for layer in (4, 6):
            if f"{layer}.weight" in weights:
                h = weights[f"{layer}.weight"] @ torch.clamp(h, min=0) + weights[f"{layer}.bias"]
        features.append(h / h.norm())
    return features


def encode_in_groups(weights, images, order) -> list[torch.Tensor]:
    """Rank r encodes the images order[rN] to order[(r + 1)N - 1] together; features come back in place."""
    features: list = [None] * len(images)
    for r in range(RANKS):
        places = order[r * N : (r + 1) * N]
        for place, feature in zip(places, encode(weights, [images[place] for place in places])):
            features[place] = feature
    return features


def cross_entropy_of(q, positive, negatives) -> torch.Tensor:
    scores = [torch.dot(q, positive) / TAU] + [torch.dot(q, negative) / TAU for negative in negatives]
    return torch.log(sum(torch.exp(score) for score in scores)) - scores[0]


class Naive:
    """Weights as dicts of tensors, the dictionary as a list of vectors, and nothing else."""

    def __init__(self, case: str):
        self.case, state = case, model_of(case).state_dict()
        learnt = [name for name in state if "running" not in name and "num" not in name]
        self.q, self.k = (
            {n.removeprefix(f"{net}."): state[n].clone() for n in learnt if n.startswith(net)} for net in NAMES[case]
        )
        if case == "v3":
            self.q["predictor"] = state["predictor.0.weight"].clone()
        self.velocity = {n: {name: torch.zeros_like(w) for name, w in self.q.items()} for n in "qk"}
        self.pointer = 0
        self.queue = [column.clone() for column in state["queue"].T] if "queue" in state else []
        self.bank = [slot.clone() for slot in state["bank"]] if "bank" in state else []

    def step(self, number: int) -> list[float]:
        """The loss of each rank; weights and dictionary move."""
        view_q, view_k, index = global_batch(number)
        generator = torch.Generator().manual_seed(number)
        if self.case in ("v1", "v2", "symmetric", "v3"):
            self.k = {name: M * self.k[name] + (1 - M) * self.q[name] for name in self.k}
        for weights in (self.q, self.k):
            for name in weights:
                weights[name] = weights[name].detach().requires_grad_()
        losses, keys = self.losses(view_q, view_k, index, generator)
        if self.case in ("symmetric", "v3"):
            others, other_keys = self.losses(view_k, view_q, index, generator)
            losses, keys = [a + b for a, b in zip(losses, others)], other_keys + keys
        (sum(losses) / RANKS).backward()
        self.descend()
        self.take_in([key.detach() for key in keys], index.tolist())
        return [loss.item() for loss in losses]

    def losses(self, view_q, view_k, index, generator):
        if self.case == "v3":
            return self.losses_v3(view_q, view_k)
        queries = encode_in_groups(self.q, list(view_q), list(range(RANKS * N)))
        if self.case == "memory_bank":
            others = [slot for image, slot in enumerate(self.bank) if image not in index.tolist()]
            drawn = [others[i] for i in torch.randint(len(others), (K,), generator=generator).tolist()]
            terms = [cross_entropy_of(q, self.bank[i], drawn) for q, i in zip(queries, index.tolist())]
            return self.by_rank(terms), queries
        order = torch.randperm(RANKS * N, generator=generator).tolist()
        keys = encode_in_groups(self.k, list(view_k), order)
        if self.case == "end_to_end":
            terms = [cross_entropy_of(q, keys[i], keys[:i] + keys[i + 1 :]) for i, q in enumerate(queries)]
        else:
            keys = [key.detach() for key in keys]
            terms = [cross_entropy_of(q, k, self.queue) for q, k in zip(queries, keys)]
        return self.by_rank(terms), keys

    def losses_v3(self, view_q, view_k):
        """One batch norm over all ranks; 2 tau times the loss of picking a query's key among the other view's."""
        projected = encode(self.q, list(view_q))
        queries = [self.q["predictor"] @ feature for feature in projected]
        queries = [query / query.norm() for query in queries]
        keys = [key.detach() for key in encode(self.k, list(view_k))]
        terms = [cross_entropy_of(q, keys[i], keys[:i] + keys[i + 1 :]) for i, q in enumerate(queries)]
        return [2 * TAU * loss for loss in self.by_rank(terms)], keys

    @staticmethod
    def by_rank(terms):
        return [sum(terms[r * N : (r + 1) * N]) / N for r in range(RANKS)]

    def descend(self) -> None:
        for which, weights in (("q", self.q), ("k", self.k)):
            if which == "k" and self.case != "end_to_end":
                continue
            for name, weight in weights.items():
                velocity = BETA * self.velocity[which][name] + weight.grad + DECAY * weight.detach()
                self.velocity[which][name] = velocity
                weights[name] = weight.detach() - LR * velocity

    def take_in(self, keys, index) -> None:
        if self.case == "memory_bank":
            for image, feature in zip(index, keys):
                slot = 0.5 * self.bank[image] + 0.5 * feature
                self.bank[image] = slot / slot.norm()
        elif self.case not in ("end_to_end", "v3"):
            for key in keys:
                self.queue[self.pointer] = key
                self.pointer = (self.pointer + 1) % K


# Our side, in two processes


def train(case: str, accumulate: int = 1) -> dict:
    """Twenty steps of one rank: its losses, and everything the model holds at the end."""
    model = model_of(case)
    ddp = parallel(model)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=BETA, weight_decay=DECAY)
    losses = []
    for number in range(STEPS):
        mine = slice(rank() * N, (rank() + 1) * N)
        batch = Batch(*(column[mine] for column in global_batch(number)))
        order = torch.Generator().manual_seed(number)
        steps = algorithm_1(model, ddp, optimizer, batch.parts(accumulate), order)
        losses.append(sum(step.loss.item() for step in steps) / len(steps))
    return {"losses": losses, "state": dict(model.state_dict())}


def gathered_gradient() -> torch.Tensor:
    """Each rank weighs the gathered rows by their place and by its own number; the gradient of this rank's rows."""
    rows = torch.ones(2, 3, requires_grad=True)
    (gather_with_gradient(rows) * torch.arange(4.0)[:, None] * (rank() + 1)).sum().backward()
    return rows.grad


def both_ranks() -> dict:
    done = {case: train(case) for case in CASES}
    return {**done, "in two parts": train("v1", accumulate=2), "gathered": gathered_gradient()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return run_ranks(both_ranks, tmp_path_factory.mktemp("mechanisms"))


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_of_two_ranks_against_algorithm_1_in_plain_loops(ranks, case):
    naive = Naive(case)
    for number in range(STEPS):
        expected = naive.step(number)
        for r in range(RANKS):
            assert ranks[r][case]["losses"][number] == pytest.approx(expected[r], abs=1e-10)
    for each in ranks:
        state = each[case]["state"]
        for prefix, weights in zip(NAMES[case], (naive.q, naive.k)):
            for name, weight in weights.items():
                place = f"{prefix}.{name}" if name != "predictor" else "predictor.0.weight"
                assert torch.allclose(state[place], weight, atol=1e-10), place
        if naive.queue:
            assert torch.allclose(state["queue"].T, torch.stack(naive.queue), atol=1e-10)
        if naive.bank:
            assert torch.allclose(state["bank"], torch.stack(naive.bank), atol=1e-10)


def test_the_mechanisms_are_not_the_same_thing(ranks):
    ends = [ranks[0][case]["losses"][-1] for case in CASES]
    assert len({round(end, 6) for end in ends}) == len(CASES)
    moved = ranks[0]["end_to_end"]["state"]
    assert not torch.allclose(moved["encoder_q.1.weight"], moved["encoder_k.1.weight"], atol=1e-4)


def test_two_parts_have_bn_groups_of_their_own_and_both_push_their_keys_alike_on_all_ranks(ranks):
    whole, parts = (ranks[0][name] for name in ("v1", "in two parts"))
    assert whole["losses"][0] != parts["losses"][0]  # other BN groups
    assert torch.equal(whole["state"]["queue_ptr"], parts["state"]["queue_ptr"])
    for name in parts["state"]:
        if "running" not in name:
            assert torch.equal(parts["state"][name], ranks[1]["in two parts"]["state"][name]), name


def test_accumulating_without_bn_is_one_batch():
    """Where no statistics are shared, two parts give the gradient, queue and weights of the whole."""
    ends = []
    for accumulate in (1, 2):
        torch.manual_seed(0)
        nets = [nn.Sequential(nn.Flatten(), nn.Linear(12, C)) for _ in range(2)]
        model = MoCo(*nets, dim=C, queue_size=K, momentum=M, temperature=TAU, permute_keys=False).double()
        optimizer = torch.optim.SGD(model.parameters(), LR, momentum=BETA)
        for number in range(5):
            batch = Batch(*global_batch(number))
            algorithm_1(model, model, optimizer, batch.parts(accumulate), torch.Generator())
        ends.append(model.state_dict())
    assert all(torch.allclose(ends[0][name], ends[1][name], atol=1e-12) for name in ends[0])


def test_the_gradient_of_gathered_rows_comes_from_every_rank(ranks):
    for number, each in enumerate(ranks):
        places = torch.tensor([[2.0 * number], [2.0 * number + 1]])
        assert torch.equal(each["gathered"], (3 * places).expand(2, 3))  # weighed once by 1, once by 2


# The memory bank


def test_negatives_are_drawn_evenly_from_the_images_outside_the_batch():
    batch = torch.tensor([7, 0, 3, 9])
    drawn = draw_outside(batch, 10, 60_000, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=10)
    assert counts[batch].tolist() == [0, 0, 0, 0]
    others = counts[[1, 2, 4, 5, 6, 8]].double() / 60_000
    assert torch.allclose(others, torch.full((6,), 1 / 6, dtype=torch.float64), atol=5 * math.sqrt(1 / 6 / 60_000))


def test_an_images_own_slot_is_its_positive_and_never_its_negative():
    """One image's slot is its own feature, all others point away: the loss is that of one perfect match."""
    model = model_of("memory_bank").eval()
    view, _, index = global_batch(0)
    with torch.no_grad():
        q = nn.functional.normalize(model.encoder_q(view), dim=1)
    model.bank = -q.mean(0).div(q.mean(0).norm()).repeat(IMAGES, 1)
    model.bank[index] = q
    step = model(Batch(view, view, index), torch.Generator().manual_seed(0))
    others = torch.exp(q @ -q.mean(0) / q.mean(0).norm() / TAU) * K
    expected = torch.log(math.exp(1 / TAU) + others) - 1 / TAU
    assert step.loss.item() == pytest.approx(expected.mean().item(), abs=1e-9)


def test_a_slot_moves_half_way_and_only_the_batch_s_slots_move():
    model = model_of("memory_bank")
    view, _, index = global_batch(0)
    before = model.bank.clone()
    step = model(Batch(view, view, index), torch.Generator())
    assert torch.equal(model.bank, before)  # not before the backward pass
    model.push(step)
    rest = [i for i in range(IMAGES) if i not in index.tolist()]
    assert torch.equal(model.bank[rest], before[rest])
    expected = nn.functional.normalize(before[index] + step.keys, dim=1)
    assert torch.allclose(model.bank[index], expected, atol=1e-12)


def test_state_has_the_official_names():
    tops = {case: {name.split(".")[0] for name in model_of(case).state_dict()} for case in CASES}
    assert tops["v2"] == {"encoder_q", "encoder_k", "queue", "queue_ptr"}
    assert tops["memory_bank"] == {"encoder_q", "bank"} and tops["end_to_end"] == {"encoder_q", "encoder_k"}
    assert tops["v3"] == {"base_encoder", "momentum_encoder", "predictor"}
