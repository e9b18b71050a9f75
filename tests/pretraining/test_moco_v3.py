"""MoCo v3 against a plain re-statement: naive loops, float64, two ranks; and its parts against their formulas."""

import math

import pytest
import timm.optim
import torch
from commands import ROOT
from ranks import run_ranks
from torch import nn
from torch.nn import functional

from moco_eval.config import load as configs
from moco_eval.config.batch import rescaled
from moco_eval.config.learning_rate import momentum_of_step, rate_in_pretraining
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.encoders.architectures import build_backbone
from moco_eval.encoders.load import load
from moco_eval.errors import InputError, RunFailed
from moco_eval.runtime.collectives import parallel
from moco_eval.runtime.rank import rank
from pretraining.alarms import CHANCE, PATIENCE, alarms
from pretraining.lars import Lars
from pretraining.mechanisms import build, optimizer_for
from pretraining.moco import Step
from pretraining.moco_v3 import MoCoV3, build_v3, ctr
from pretraining.plan import Plan, plan
from pretraining.shuffle_bn import unit
from pretraining.train import Trainer, algorithm_1, pretrain
from pretraining.views import Batch
from pretraining.vit import build_vit, positions

RANKS, N, STEPS, WARMUP, EPOCHS, PER_EPOCH = 2, 4, 20, 2, 5, 4
CPU = torch.device("cpu")
VIT = ["arch=vit_narrow_12h_patch8_32", "optimizer={kind: adamw, lr: 0.01, weight_decay: 0.1}"]
SETTINGS = {
    "resnet": ["arch=resnet18_quarter", "temperature=1", "optimizer={kind: lars, lr: 0.05, weight_decay: 1.0e-4}"],
    "vit": VIT,
}
SMALL = ["freeze_patches=false", "views.size=32", "hidden_dim=16", "dim=8", "knn=null", "momentum=0.9"]


def config(*settings: str) -> PretrainConfig:
    return configs.load("digits_v3", "pretrain", PretrainConfig, [*SMALL, *settings])


def of_case(case: str) -> PretrainConfig:
    frozen = [f"freeze_patches={'true' if case == 'vit' else 'false'}"]
    schedule = [f"schedule.epochs={EPOCHS}", f"schedule.warmup_epochs={WARMUP}"]
    return config(*SETTINGS[case], *frozen, *schedule, "batch_size=8", "queue_size=8")


def planned(*settings: str) -> Plan:
    return plan(config(*settings), "digits", None, 1)


def model_of(case: str, bn: str = "sync") -> MoCoV3:
    """Without training what the loss does not depend on, whose gradient is rounding alone, which Adam scales up."""
    torch.manual_seed(0)
    model = build_v3(of_case(case), bn, nn.Identity()).double()
    for name, weight in model.named_parameters():
        if name.endswith(("qkv.bias", "encoder.norm.bias")):  # biases of keys; what the head's batch norm takes away
            weight.requires_grad_(False)
    return model


def global_batch(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(RANKS * N, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(2)]


# Our side, in two processes


def train(case: str) -> dict:
    """Twenty steps of one rank: its losses, and everything the model holds at the end."""
    settings, model = of_case(case), model_of(case)
    ddp, optimizer = parallel(model), optimizer_for(model, settings, CPU)
    losses = []
    for number in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate_in_pretraining(
            settings.schedule, settings.optimizer.lr, number, PER_EPOCH
        )
        model.momentum = momentum_of_step(settings.momentum, number, EPOCHS * PER_EPOCH)
        mine = slice(rank() * N, (rank() + 1) * N)
        batch = Batch(*(view[mine] for view in global_batch(number)), torch.arange(N))
        losses += [step.loss.item() for step in algorithm_1(model, ddp, optimizer, [batch], torch.Generator())]
    return {"losses": losses, "state": dict(model.state_dict())}


def overflow_on_rank_1() -> dict:
    """Whether a weight stays where it was, and the loss scale, after a gradient has overflowed on one rank."""
    model, scaler = model_of("vit").float(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    ddp, optimizer = parallel(model), optimizer_for(model, of_case("vit"), CPU)
    weight = model.predictor[0].weight
    before = weight.detach().clone()
    weight.register_hook(lambda gradient: gradient * (math.inf if rank() == 1 else 1))
    views = (view[rank() * N : (rank() + 1) * N].float() for view in global_batch(0))
    algorithm_1(model, ddp, optimizer, [Batch(*views, torch.arange(N))], torch.Generator(), scaler)
    return {"stays": torch.equal(weight, before), "scale": scaler.get_scale()}


def both_ranks() -> dict:
    return {**{case: train(case) for case in SETTINGS}, "overflow": overflow_on_rank_1()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return run_ranks(both_ranks, tmp_path_factory.mktemp("v3"))


# The naive side: one process, the whole batch, the loss image by image, the optimisers as formulas


def naive_ctr(q: torch.Tensor, k: torch.Tensor, tau: float) -> torch.Tensor:
    """The mean over all ranks' queries; an image's own key is the positive, all others of the other view are not."""
    terms = []
    for i, query in enumerate(q):
        scores = [torch.dot(query / query.norm(), key / key.norm()) / tau for key in k]
        terms.append(torch.log(sum(torch.exp(score) for score in scores)) - scores[i])
    return 2 * tau * sum(terms) / len(terms)


class Naive:
    def __init__(self, case: str):
        self.case, self.model, self.state = case, model_of(case, "none"), {}
        self.lr, self.decay = of_case(case).optimizer.lr, of_case(case).optimizer.weight_decay

    def step(self, t: int) -> float:
        model, x = self.model, global_batch(t)
        tau = of_case(self.case).temperature
        epoch = t // PER_EPOCH + t % PER_EPOCH / PER_EPOCH
        cosine = 0.5 * (1 + math.cos(math.pi * (epoch - WARMUP) / (EPOCHS - WARMUP)))
        lr = self.lr * (epoch / WARMUP if epoch < WARMUP else cosine)
        m = 1 - 0.5 * (1 + math.cos(math.pi * epoch / EPOCHS)) * (1 - 0.9)
        q = [model.predictor(model.base_encoder(view)) for view in x]
        with torch.no_grad():
            for key, query in zip(model.momentum_encoder.parameters(), model.base_encoder.parameters()):
                key.copy_(m * key + (1 - m) * query)
            k = [model.momentum_encoder(view) for view in x]
        loss = naive_ctr(q[0], k[1], tau) + naive_ctr(q[1], k[0], tau)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.grad is not None:
                    (self.lars if self.case == "resnet" else self.adamw)(name, weight, lr, t + 1)
        return loss.item()

    def lars(self, name: str, weight: torch.Tensor, lr: float, step: int) -> None:
        g = weight.grad
        if weight.ndim > 1:
            g = g + self.decay * weight
            size, slope = weight.square().sum().sqrt().item(), g.square().sum().sqrt().item()
            g = g * (0.001 * size / slope if size and slope else 1)
        self.state[name] = 0.9 * self.state.get(name, 0) + g
        weight -= lr * self.state[name]

    def adamw(self, name: str, weight: torch.Tensor, lr: float, step: int) -> None:
        first, second = self.state.get(name, (0, 0))
        first, second = 0.9 * first + 0.1 * weight.grad, 0.999 * second + 0.001 * weight.grad**2
        self.state[name] = first, second
        weight *= 1 - lr * self.decay
        weight -= lr * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)


@pytest.mark.parametrize("case", SETTINGS)
def test_twenty_steps_of_two_ranks_against_a_restatement_in_loops(ranks, case):
    naive = Naive(case)
    start = {name: value.clone() for name, value in naive.model.state_dict().items()}
    for number in range(STEPS):
        expected = naive.step(number)
        assert sum(each[case]["losses"][number] for each in ranks) / RANKS == pytest.approx(expected, abs=1e-10)
    for each in ranks:
        for name, value in naive.model.state_dict().items():
            assert torch.allclose(each[case]["state"][name], value, atol=1e-10, rtol=0), name
    counts = [name for name in start if name.endswith("num_batches_tracked")]
    assert counts and all(each[case]["state"][name] == 2 * STEPS for each in ranks for name in counts)
    moved = [name for name, value in naive.model.state_dict().items() if not torch.equal(value, start[name])]
    assert any(name.startswith("momentum_encoder") for name in moved)
    still = ("base_encoder.pos_embed", "base_encoder.patch_embed.proj.weight")
    assert not set(still) & set(moved)


def test_an_overflow_on_one_rank_skips_the_step_on_both(ranks):
    assert [each["overflow"] for each in ranks] == [{"stays": True, "scale": 512.0}] * 2


# The loss


def test_a_query_s_negatives_are_the_other_view_s_keys_alone():
    q, k = (functional.normalize(torch.randn(5, 3, dtype=torch.float64), dim=1) for _ in range(2))
    loss, right = ctr(q, k, 0.2)
    assert loss.item() == pytest.approx(naive_ctr(q, k, 0.2).item(), abs=1e-12)
    assert 0 <= right <= 1 and ctr(q, q, 0.2)[1] == 1
    alike = functional.normalize(torch.ones(5, 3), dim=1)
    assert ctr(alike, alike, 0.2)[0].item() == pytest.approx(0.4 * math.log(5), abs=1e-6)


def test_a_step_is_both_directions_in_closed_form():
    """Features that are given: each query of the first view finds its key, one of the two of the second does not."""
    first, second = torch.eye(2), torch.tensor([[3.0, 0.0], [2.0, 1.0]])
    model = MoCoV3(*(nn.Identity() for _ in range(3)), momentum=0.9, temperature=0.5)
    step = model(Batch(first, second, torch.arange(2)), torch.Generator())
    assert step.loss.item() == pytest.approx((naive_ctr(first, second, 0.5) + naive_ctr(second, first, 0.5)).item())
    assert step.accuracy == 0.75
    assert step.feature_std.item() == pytest.approx(1)  # sqrt(2) times that of 0 and 1
    assert torch.equal(step.keys, functional.normalize(second, dim=1))


@pytest.mark.parametrize(("name", "chance"), [("moco_v3_r50", 33.27), ("moco_v3_vit_base", 6.654)])
def test_chance_is_4_tau_log_n(name, chance):
    settings = configs.load(name, "pretrain", PretrainConfig)
    assert 4 * settings.temperature * math.log(settings.batch_size) == pytest.approx(chance, abs=0.01)
    ours = planned(f"temperature={settings.temperature}", "arch=resnet18_quarter")
    assert ours.chance == pytest.approx(4 * settings.temperature * math.log(64))
    assert f"chance level of the loss: {ours.chance:.4f}" in ours.describe()


def test_features_of_half_precision_become_unit_rows_of_fp32():
    rows = unit(torch.randn(4, 8, dtype=torch.bfloat16))
    assert rows.dtype == torch.float32 and torch.allclose(rows.norm(dim=1), torch.ones(4), atol=1e-6)
    assert unit(torch.randn(4, 8, dtype=torch.float64)).dtype == torch.float64


# The schedules


def test_rate_and_momentum_of_the_published_recipe():
    """Steps 0, 1, end of warm-up and last, of 312 steps an epoch."""
    run = configs.load("moco_v3_r50", "pretrain", PretrainConfig)
    rate = lambda step: rate_in_pretraining(run.schedule, run.optimizer.lr, step, 312)  # noqa: E731
    assert run.optimizer.lr == pytest.approx(0.6 * 4096 / 256)
    assert [rate(0), rate(3120)] == [0, 9.6] and rate(1) == pytest.approx(9.6 / 3120)
    assert rate(31199) == pytest.approx(9.6 * 0.5 * (1 - math.cos(math.pi / 28080)), rel=1e-6)
    m = [momentum_of_step(run.momentum, step, 31200) for step in (0, 1, 15600, 31199)]
    assert m[0] == 0.99 and 0.99 < m[1] < 0.9900001 and m[2] == pytest.approx(0.995) and 1 - 1e-9 < m[3] < 1
    vit = configs.load("moco_v3_vit_base", "pretrain", PretrainConfig)
    assert vit.optimizer.lr == pytest.approx(1.5e-4 * 4096 / 256)
    assert rate_in_pretraining(vit.schedule, 1.0, 40 * 312, 312) == 1.0


@pytest.mark.parametrize("name", ["moco_v3_r50", "moco_v3_vit_small", "moco_v3_vit_base"])
def test_published_heads_are_4096_wide_and_their_features_256(name):
    run = configs.load(name, "pretrain", PretrainConfig)
    assert (run.hidden_dim, run.dim, run.momentum_schedule) == (4096, 256, "cosine")


# LARS


def one_step(optimizer: type, weight: torch.Tensor, gradient: torch.Tensor, **settings) -> torch.Tensor:
    weight = nn.Parameter(weight.clone())
    weight.grad = gradient.clone()
    optimizer([weight], lr=1.0, momentum=0.9, weight_decay=0.1, **settings).step()
    return weight.detach()


def test_lars_is_the_specification_s_and_timm_s_is_not():
    weight, gradient = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    decayed = gradient + 0.1 * weight
    expected = weight - 0.001 * weight.norm() / decayed.norm() * decayed
    assert torch.allclose(one_step(Lars, weight, gradient), expected, atol=1e-14)
    assert not torch.allclose(one_step(timm.optim.Lars, weight, gradient, trust_coeff=0.001), expected, atol=1e-6)
    assert torch.equal(one_step(Lars, weight[0], gradient[0]), weight[0] - gradient[0])  # no decay, no ratio
    assert torch.equal(one_step(Lars, torch.zeros(2, 2), torch.ones(2, 2)), -torch.ones(2, 2))  # ratio 1
    ones = torch.ones(2, 2, dtype=torch.float64)
    assert torch.equal(one_step(Lars, ones, -0.1 * ones), ones)  # decay and gradient are each other's opposite


# ViTs


def test_positions_have_the_row_in_the_first_half_sines_first():
    dim, table = 8, positions(2, 3, 8)[0]
    assert table.shape == (7, dim) and not table[0].any()
    for row in range(2):
        for column in range(3):
            waves = [
                function(place / 10000 ** (j / 2)) for place in (row, column) for function in (math.sin, math.cos)
                for j in range(2)
            ]  # fmt: skip
            assert table[1 + row * 3 + column].tolist() == pytest.approx(waves, abs=1e-7)


def test_weights_start_within_their_bounds():
    torch.manual_seed(0)
    net = build_vit("vit_small_12h_patch16_224", freeze_patches=True)
    D = 384
    bounds = {
        "blocks.0.attn.qkv": 6 / (2 * D),
        "blocks.0.attn.proj": 6 / (2 * D),
        "blocks.3.mlp.fc1": 6 / (5 * D),
        "patch_embed.proj": 6 / (3 * 16**2 + D),
    }
    for name, square in bounds.items():
        layer, bound = net.get_submodule(name), math.sqrt(square)
        assert 0.99 * bound < layer.weight.abs().max() <= bound, name
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02), name
        assert not layer.bias.any(), name
    assert net.cls_token.std() < 1e-5 and torch.equal(net.pos_embed, positions(14, 14, D))
    frozen = {name for name, weight in net.named_parameters() if not weight.requires_grad}
    assert frozen == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert build_vit("vit_narrow_patch8_32", freeze_patches=False).patch_embed.proj.weight.requires_grad
    assert {block.attn.num_heads for block in net.blocks} == {12} and len(net.blocks) == 12


def test_a_stem_of_convolutions_keeps_torch_s_initialisation_and_is_trained():
    torch.manual_seed(0)
    net = build_vit("vit_conv_small", freeze_patches=True)
    kernels = [tuple(layer.weight.shape) for layer in net.patch_embed.proj if isinstance(layer, nn.Conv2d)]
    assert kernels == [(48, 3, 3, 3), (96, 48, 3, 3), (192, 96, 3, 3), (384, 192, 3, 3), (384, 384, 1, 1)]
    assert len(net.blocks) == 11 and all(weight.requires_grad for weight in net.patch_embed.parameters())
    assert net.patch_embed.proj[12].bias is not None and net.patch_embed.proj[0].bias is None
    assert net.patch_embed.proj[0].weight.abs().max() <= 1 / math.sqrt(27)  # torch's own


# Heads


def test_one_file_holds_the_idea():
    assert len((ROOT / "pretraining" / "moco_v3.py").read_text().splitlines()) < 200


def test_heads_have_the_published_layers():
    def shapes(head: nn.Module) -> list:
        kinds = {nn.Linear: lambda x: (x.in_features, x.out_features, x.bias is None)}
        kinds[nn.BatchNorm1d] = lambda x: (x.num_features, x.affine)
        return [kinds.get(type(layer), lambda x: "relu")(layer) for layer in head]

    vit, resnet = (model_of(case, "none") for case in ("vit", "resnet"))
    bare = build_v3(config(*VIT, "head_bn=false"), "sync", nn.Identity())
    assert shapes(bare.base_encoder.head) == [(48, 16, True), "relu", (16, 16, True), "relu", (16, 8, True)]
    assert shapes(bare.predictor) == [(8, 16, True), "relu", (16, 8, True)]
    norm, last = (16, True), (8, False)
    assert shapes(resnet.base_encoder.fc) == [(128, 16, True), norm, "relu", (16, 8, True), last]
    assert shapes(resnet.predictor) == [(8, 16, True), norm, "relu", (16, 8, True)]
    assert shapes(vit.base_encoder.head) == [
        *[(48, 16, True), norm, "relu"],
        *[(16, 16, True), norm, "relu"],
        *[(16, 8, True), last],
    ]
    assert shapes(vit.predictor) == [(8, 16, True), norm, "relu", (16, 8, True), last]
    assert not any(block.bn2.weight.any() for block in resnet.base_encoder.layer1)


@pytest.mark.parametrize("case", SETTINGS)
def test_the_momentum_encoder_starts_as_the_base_encoder(case):
    model = build_v3(of_case(case), "sync", nn.Identity())
    start, momentum = model.base_encoder.state_dict(), model.momentum_encoder.state_dict()
    assert start.keys() == momentum.keys() and all(torch.equal(start[name], momentum[name]) for name in start)
    assert not any(weight.requires_grad for weight in model.momentum_encoder.parameters())


@pytest.mark.parametrize("arch", ["resnet18_quarter", "resnet50_quarter"])
def test_the_blocks_of_a_resnet_start_as_the_identity(arch):
    """The last norm of each starts at 0, the second of two or the third of three, and no other."""
    net = build_v3(config(f"arch={arch}"), "none", nn.Identity()).base_encoder
    for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
        features = torch.rand(2, layer[1].conv1.in_channels, 4, 4)
        assert torch.equal(layer[1](features), features)
    zeros = [name for name, weight in net.named_parameters() if name.endswith("weight") and not weight.any()]
    last = "bn2" if arch == "resnet18_quarter" else "bn3"
    assert zeros and all(name.endswith(f"{last}.weight") for name in zeros)


# The paper's own variations, Sec. 6.2 and Figure 3


def test_without_a_predictor_a_query_is_the_projected_feature():
    model = build_v3(config(*VIT, "predictor=false"), "none", nn.Identity())
    images = torch.randn(4, 3, 32, 32)
    assert not list(model.predictor.parameters())
    assert torch.equal(model.queries(images), functional.normalize(model.base_encoder(images), dim=1))


def test_positions_are_fixed_learned_or_none():
    fixed, learned, none = (
        build_vit(VIT[0].removeprefix("arch="), True, kind) for kind in ("sincos", "learned", "none")
    )
    assert fixed.pos_embed.shape == learned.pos_embed.shape == none.pos_embed.shape
    assert not fixed.pos_embed.requires_grad and not none.pos_embed.requires_grad and learned.pos_embed.requires_grad
    assert fixed.pos_embed.any() and not none.pos_embed.any()
    assert learned.pos_embed.std().item() == pytest.approx(0.02, rel=0.2)  # timm's


def test_lamb_gives_every_parameter_its_trust_ratio_and_bounds_no_gradient():
    settings = config(*VIT, "optimizer={kind: lamb, lr: 0.5, weight_decay: 0.1}")
    model = build_v3(settings, "none", nn.Identity()).double()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, 100.0) if weight.requires_grad else None
    optimizer_for(model, settings, CPU).step()
    for name, weight in model.named_parameters():
        w = before[name]
        update = 100 / (100 + 1e-6) + 0.1 * w  # both moments are without bias at the first step
        ratio = w.norm() / update.norm() if w.any() else 1.0
        expected = w - 0.5 * ratio * update if weight.requires_grad else w
        assert torch.allclose(weight, expected, atol=1e-12, rtol=0), name


def test_variations_are_trained_stopped_resumed_and_read(tmp_path):
    settings = [*VIT, "optimizer={kind: lamb, lr: 0.01, weight_decay: 0.001}", "positions=learned", "head_bn=false"]
    settings += ["predictor=false", "schedule.epochs=1", "schedule.warmup_epochs=0", "batch_size=512", "queue_size=512"]
    whole = pretrain(planned(*settings), tmp_path / "whole", CPU)
    with pytest.raises(Exception, match="saved at step 1 of 2"):
        pretrain(planned(*settings, "max_steps=1"), tmp_path / "parts", CPU)
    parts = pretrain(planned(*settings), tmp_path / "parts", CPU)
    one, other = (torch.load(path, weights_only=True)["state_dict"] for path in (whole, parts))
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
    start = torch.load(tmp_path / "whole" / "checkpoints" / "epoch_0000.pth", weights_only=True)["state_dict"]
    assert not torch.equal(one["module.base_encoder.pos_embed"], start["module.base_encoder.pos_embed"])
    assert torch.equal(load(str(whole)).backbone.pos_embed, one["module.base_encoder.pos_embed"])
    assert {"predictor False instead of True", "head_bn False instead of True"} <= set(planned(*settings).deviations)


# Through the trainer


def linear_script_keys(state: dict, head: str) -> dict:
    """What the official linear script takes: the base encoder without its head, and the prefix cut off."""
    prefix = "module.base_encoder."
    return {
        name.removeprefix(prefix): value
        for name, value in state.items()
        if name.startswith(prefix) and not name.startswith(prefix + head)
    }


@pytest.fixture(scope="module", params=["resnet", "vit"])
def trained(request, tmp_path_factory):
    """Six steps without a stop, and the same stopped and resumed."""
    more = ["schedule.epochs=2", "schedule.warmup_epochs=1", "batch_size=512", "queue_size=512", "log_every=1"]
    settings = [*SETTINGS[request.param], *more]
    folder = tmp_path_factory.mktemp(request.param)
    last = pretrain(planned(*settings), folder / "whole", CPU)
    for step in (1, 3):
        with pytest.raises(Exception, match=f"saved at step {step} of 4"):
            pretrain(planned(*settings, f"max_steps={step}"), folder / "parts", CPU)
    pretrain(planned(*settings), folder / "parts", CPU)
    return request.param, last, folder / "parts" / "checkpoints" / "last.pth"


def test_stopped_and_resumed_it_ends_the_same(trained):
    _, whole, parts = (torch.load(path, weights_only=True) if path != trained[0] else path for path in trained)
    assert whole["step"] == parts["step"] == 4
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][name]), name
    for number, values in whole["optimizer"]["state"].items():
        for name, value in values.items():
            assert torch.equal(value, parts["optimizer"]["state"][number][name]), name


def test_the_trainer_takes_the_rate_and_the_momentum_of_each_step(tmp_path, monkeypatch):
    """Two epochs of two steps; the first is the warm-up."""
    seen, zero = [], torch.zeros(())

    def noted(model, ddp, optimizer, *rest):
        seen.append((optimizer.param_groups[0]["lr"], model.momentum))
        return [Step(zero, zero, zero, zero)]

    monkeypatch.setattr("pretraining.train.algorithm_1", noted)
    more = ["schedule.epochs=2", "schedule.warmup_epochs=1", "batch_size=512", "queue_size=512"]
    trainer = Trainer(planned(*SETTINGS["resnet"], *more), tmp_path, CPU)
    nothing = Batch(*[torch.empty(0)] * 3)
    for _ in range(4):
        trainer.train_step(nothing)
    rates, momenta = zip(*seen)
    assert rates == pytest.approx([0, 0.025, 0.05, 0.025])
    assert momenta == pytest.approx([1 - 0.1 * (1 + math.cos(math.pi * number / 4)) / 2 for number in range(4)])


def test_the_checkpoint_has_the_official_names_and_is_read_by_us_and_by_the_linear_script(trained):
    case, path, _ = trained
    state = torch.load(path, weights_only=True)
    assert {name.split(".")[1] for name in state["state_dict"]} == {"base_encoder", "momentum_encoder", "predictor"}
    head = "fc" if case == "resnet" else "head"
    linear = build_backbone(of_case(case).arch)
    missing, unexpected = linear.load_state_dict(linear_script_keys(state["state_dict"], head), strict=False)
    assert not missing and not unexpected
    ours = load(str(path))
    assert ours.arch == of_case(case).arch
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours.backbone(images), linear.eval()(images))
    assert ours.head is not None and ours.head(torch.zeros(2, ours.feature_dim)).shape == (2, 8)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["symmetric=false"], "mechanism moco_v3 sums the losses of both directions"),
        (["queue_size=63"], "queue_size 63 is not the dictionary of mechanism moco_v3"),
        (["accumulate=2", "queue_size=32"], "queue_size 32 is not the dictionary of mechanism moco_v3"),
        (["bn=split"], "bn split is for shuffled keys"),
        (["head=linear"], "head linear is not MoCo v3's"),
        (["hidden_dim=null"], "has a hidden layer in its projector"),
        (["optimizer.sgd_momentum=0.8"], "sgd_momentum 0.8 does not apply to optimizer.kind adamw"),
        (["schedule.warmup_epochs=20"], "warmup_epochs 20 leave nothing of 20 epochs"),
        (["schedule.per=epoch"], "warmup_epochs 2 rise step by step"),
        (["mechanism=moco"], "hidden_dim is only for mechanism moco_v3"),
        (["views.size=64"], "takes images of 32 pixels and views.size is 64"),
        (["arch=resnet18_quarter", "freeze_patches=true"], "resnet18_quarter has no patches"),
        (["arch=vit_conv_narrow_32", "freeze_patches=true"], "the stem of vit_conv_narrow_32 is trained"),
        (["arch=resnet18_quarter", "positions=none"], "resnet18_quarter has no patches to place"),
        (["arch=timm:resnet18"], "timm:resnet18 is not trained here"),
        (["arch=vit_small"], "unknown architecture 'vit_small'. Did you mean 'vit_small_12h_patch16_224'?"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(InputError) as refused:
        planned("arch=vit_narrow_patch8_32", *settings)
    assert words in str(refused.value)


def test_what_leaves_the_published_recipe_is_a_deviation():
    run = configs.load("moco_v3_r50", "pretrain", PretrainConfig)
    same = plan(run.model_copy(update={"batch_size": 512, "queue_size": 512}), "digits", None, 1)
    assert same.deviations == ["batch_size 512 instead of 4096"] and same.bn == "sync"
    settings = ["optimizer.lr=4.8", "optimizer.weight_decay=1.5e-6", "momentum=0.996"]
    assert deviations("moco_v3_r50", "schedule.epochs=300", "optimizer.lr=4.8") == []
    for epochs in (800, 1000):
        assert deviations("moco_v3_r50", f"schedule.epochs={epochs}", *settings) == []
    assert deviations("moco_v3_r50", "schedule.epochs=800", "optimizer.lr=4.8") == [
        "optimizer.weight_decay 1e-06 instead of 1.5e-06"
    ]


def deviations(name: str, *settings: str) -> list[str]:
    """Of a shipped recipe on the digits, but for the batch that they are too few for."""
    small = configs.load(name, "pretrain", PretrainConfig, [*settings, "batch_size=512", "queue_size=512"])
    told = plan(small, "digits", None, 1).deviations
    told.remove("batch_size 512 instead of 4096")
    return told


def test_the_recipe_of_another_kind_of_network_is_a_deviation():
    words = "arch vit_base_patch16_224 by the recipe of resnet50"
    assert deviations("moco_v3_r50", "arch=vit_base_patch16_224") == [words]
    other = deviations("moco_v3_vit_base", "arch=resnet50", "freeze_patches=false")
    assert other == ["freeze_patches False instead of True", "arch resnet50 by the recipe of vit_base_patch16_224"]


def test_a_conv_stem_that_is_trained_is_as_published():
    """Its official name for freezing patches, --stop-grad-conv1, does not touch it."""
    assert deviations("moco_v3_vit_base", "arch=vit_conv_base", "freeze_patches=false") == []
    assert deviations("moco_v3_vit_base", "freeze_patches=false") == ["freeze_patches False instead of True"]


def test_another_batch_carries_the_rate_and_the_keys_along():
    """0.6 and 1.5e-4 for each 256 images; a query's candidates are those of the batch."""
    for name, base in (("moco_v3_r50", 0.6), ("moco_v3_vit_base", 1.5e-4)):
        values = configs.load(name, "pretrain", PretrainConfig).model_dump()
        overrides, _ = rescaled(values, 1024)
        run = configs.load(name, "pretrain", PretrainConfig, overrides)
        assert (run.batch_size, run.queue_size, run.optimizer.lr) == (1024, 1024, pytest.approx(base * 4))


def test_keys_that_came_later_are_not_in_the_dump_of_a_config_of_before():
    before = configs.load("digits", "pretrain", PretrainConfig).model_dump(mode="json")
    assert not {"hidden_dim", "momentum_schedule", "freeze_patches"} & before.keys()
    assert before["optimizer"] == {"lr": 0.01, "sgd_momentum": 0.9, "weight_decay": 5e-4}
    assert "per" not in before["schedule"] and "crop_min" not in before["views"]
    ours = config().model_dump(mode="json")
    assert PretrainConfig.model_validate(ours) == config() and ours["optimizer"]["kind"] == "adamw"


def test_a_conv_stem_trains_and_is_read(tmp_path):
    settings = ["arch=vit_conv_narrow_32", "schedule.epochs=1", "schedule.warmup_epochs=0", "max_steps=null"]
    last = pretrain(planned(*settings, "batch_size=1024", "queue_size=1024"), tmp_path / "run", CPU)
    assert load(str(last)).arch.startswith("vit_conv_narrow")


def test_a_dip_of_knn_is_said_with_the_way_out():
    lines = [{"step": 100 + i, "loss": 2.0, "accuracy": 30.0, "feature_std": 0.8} for i in range(PATIENCE)]
    vit, resnet = planned("arch=vit_narrow_patch8_32"), planned("arch=resnet18_quarter")
    words = alarms(vit, lines, [60.0, 70.0, 67.0])["instability"]
    assert "kNN dips from 70.0 to 67.0 %" in words and "--set freeze_patches=true" in words
    frozen = planned("arch=vit_narrow_patch8_32", "freeze_patches=true")
    assert "freeze_patches" not in alarms(frozen, lines, [70.0, 67.0])["instability"]
    assert alarms(vit, lines, [60.0, 70.0, 69.0]) == {} == alarms(resnet, lines, [70.0, 60.0])
    assert "kNN dips from 70.0 to 67.9 %" in alarms(vit, lines, [70.0, 69.0, 67.9])["instability"]  # little by little


def test_alarms_go_by_moco_v3_s_own_chance():
    run = planned("arch=resnet18_quarter")
    line = {"accuracy": 2.0, "feature_std": 0.8}
    near = [{"step": 100 + i, "loss": run.chance - 0.001, **line} for i in range(PATIENCE)]
    assert alarms(run, near, [])["chance"].startswith(f"loss at chance: {run.chance - 0.001:.3f} nats")
    edge = CHANCE * 2 * 0.4  # of two losses that count 2 tau each
    below = lambda distance: alarms(run, [{**one, "loss": run.chance - distance} for one in near], [])  # noqa: E731
    assert "chance" in below(0.9 * edge) and below(1.1 * edge) == {}


def test_a_loss_at_chance_is_no_alarm_while_the_rate_is_still_small():
    """Of 20 steps an epoch and 10 epochs of warm-up, the first 20 steps have less than a tenth of the rate."""
    run = planned("arch=resnet18_quarter", "schedule.warmup_epochs=10")
    assert run.steps_per_epoch == 20
    line = {"loss": run.chance, "accuracy": 2.0, "feature_std": 0.8}
    for first, sounds in ((1, False), (20, False), (21, True)):
        lines = [{"step": first + i, **line} for i in range(PATIENCE)]
        assert ("chance" in alarms(run, lines, [])) == sounds, first
    collapsed = [{"step": 1 + i, **line, "feature_std": 0.01} for i in range(PATIENCE)]
    assert alarms(run, collapsed, []).keys() == {"collapse"}


FULL = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.15 GiB. See the documentation"


@pytest.mark.parametrize(
    ("settings", "way_out"),
    [(SETTINGS["vit"], "take --set accumulate=4 in"), (SETTINGS["resnet"], "take --batch-size 16 in")],
)
def test_a_step_that_does_not_fit_into_memory_says_what_to_set(settings, way_out, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr("pretraining.train.algorithm_1", full)
    with pytest.raises(RunFailed) as failed:
        pretrain(planned(*settings, "workers=0"), tmp_path / "run", CPU)
    words = "a step does not fit into the memory of cpu (CUDA out of memory. Tried to allocate 20.00 GiB); "
    assert str(failed.value) == f"{words}{way_out} another --output, or more GPUs"


def test_the_model_of_a_plan_is_moco_v3():
    assert isinstance(build(planned("arch=resnet18_quarter")), MoCoV3)
