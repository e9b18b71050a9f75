"""fp16 with its loss scale, the gradient of a ViT's first layer, and the alarms that go by them."""

import json
import math
from functools import partial

import pytest
import torch
from commands import error_line, in_process
from test_moco_v3 import CPU, SETTINGS, model_of, of_case, planned
from torch.nn.functional import normalize

from moco_eval.config import load as configs
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.errors import Interrupted, RunFailed
from pretraining import signs
from pretraining.alarms import LEAP, PATIENCE, alarms
from pretraining.mechanisms import optimizer_for
from pretraining.moco_v3 import MoCoV3, ctr
from pretraining.plan import plan
from pretraining.record import Measurements
from pretraining.train import Trainer, algorithm_1, pretrain
from pretraining.views import Batch

LARGE = 2.0**30  # a loss scale at which gradients overflow
SHORT = ["schedule.epochs=2", "schedule.warmup_epochs=1", "batch_size=512", "queue_size=512", "log_every=1"]
VIT = ["arch=vit_narrow_12h_patch8_32", "optimizer={kind: adamw, lr: 0.01, weight_decay: 0.1}", *SHORT]


def batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    return Batch(*(torch.randn(8, 3, 32, 32, generator=generator) for _ in range(2)), torch.arange(8))


def steps_of(model: MoCoV3, case: str, scaler: torch.amp.GradScaler) -> torch.optim.Optimizer:
    """Three steps."""
    optimizer = optimizer_for(model, of_case(case), CPU)
    for number in range(3):
        algorithm_1(model, model, optimizer, [batch(number)], torch.Generator(), scaler)
    return optimizer


# The scale


@pytest.mark.parametrize("case", SETTINGS)
def test_a_scale_that_does_not_overflow_changes_no_bit(case):
    models = model_of(case).float(), model_of(case).float()
    for model, enabled in zip(models, (True, False)):
        steps_of(model, case, torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled))
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name


@pytest.mark.parametrize("case", SETTINGS)
def test_a_step_that_overflows_is_skipped_and_only_the_momentum_encoder_moves(case):
    model, scaler = model_of(case).float(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = steps_of(model, case, scaler)
    before = {name: value.clone() for name, value in model.named_parameters()}
    state = [{name: value.clone() for name, value in each.items()} for each in optimizer.state.values()]
    weight = next(model.predictor.parameters())
    hook = weight.register_hook(lambda gradient: gradient * math.inf)
    algorithm_1(model, model, optimizer, [batch(3)], torch.Generator(), scaler)
    moved = {name: value for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith("momentum_encoder") for name in moved)
    for name, value in moved.items():
        query = before[name.replace("momentum_encoder", "base_encoder")]
        assert torch.allclose(value, model.momentum * before[name] + (1 - model.momentum) * query, atol=1e-6), name
    for each, values in zip(state, optimizer.state.values(), strict=True):
        assert all(torch.equal(values[name], value) for name, value in each.items())
    assert scaler.get_scale() == 512
    hook.remove()
    algorithm_1(model, model, optimizer, [batch(4)], torch.Generator(), scaler)
    assert not torch.equal(weight, before["predictor.0.weight"])


@pytest.mark.parametrize(("size", "scale", "skipped"), [(1, 1024, 0), (math.inf, 512, 1)])
def test_a_step_is_counted_as_skipped_only_where_its_gradient_overflows(size, scale, skipped):
    model, scaler = model_of("resnet").float(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    model.predictor[0].weight.register_hook(lambda gradient: gradient * size)
    seen = signs.Signs(planned("arch=resnet18_quarter"), model, scaler, CPU)
    optimizer = optimizer_for(model, of_case("resnet"), CPU)
    seen.before_step()
    algorithm_1(model, model, optimizer, [batch(0)], torch.Generator(), scaler)
    assert seen.after_step() == [scale, skipped]


def test_logits_are_fp32_also_under_fp16():
    q, k = (normalize(torch.randn(5, 16), dim=1) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.float16):
        loss, _ = ctr(q, k, 0.2)
        assert (q @ k.T).dtype == torch.float16
    assert loss.dtype == torch.float32 and torch.equal(loss, ctr(q, k, 0.2)[0])


# Through the trainer


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Four steps in fp16 without a stop, and the same stopped after the first and the third; the first overflows."""
    folder, settings = tmp_path_factory.mktemp("fp16"), [*VIT, "precision=fp16"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=LARGE))
        pretrain(planned(*settings), folder / "whole", CPU)
        for step in (1, 3):
            with pytest.raises(Interrupted, match=f"saved at step {step} of 4"):
                pretrain(planned(*settings, f"max_steps={step}"), folder / "parts", CPU)
        pretrain(planned(*settings), folder / "parts", CPU)
    return folder / "whole", folder / "parts"


def test_stopped_and_resumed_fp16_ends_the_same_with_its_scale(halves):
    whole, parts = (torch.load(run / "checkpoints" / "last.pth", weights_only=True) for run in halves)
    assert whole["scaler"] == parts["scaler"] and whole["scaler"]["scale"] < LARGE and whole["step"] == 4
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][name]), name
    for number, values in whole["optimizer"]["state"].items():
        assert all(torch.equal(value, parts["optimizer"]["state"][number][name]) for name, value in values.items())


def test_lines_of_fp16_hold_the_scale_and_the_steps_that_were_skipped(halves):
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in halves]
    scales, skipped = ([line[name] for line in lines[0] if "loss" in line] for name in (signs.SCALE, signs.SKIPPED))
    assert (scales[0], skipped[0]) == (LARGE / 2, 1) and scales[-1] == LARGE / 2 ** sum(skipped) and len(scales) == 4
    assert [line.get(signs.SCALE) for line in lines[0]] == [line.get(signs.SCALE) for line in lines[1]]
    last = torch.load(halves[0] / "checkpoints" / "last.pth", weights_only=True)
    assert last["scaler"]["scale"] == scales[-1]


@pytest.mark.parametrize(
    ("frozen", "layer"), [("false", "patch_embed.proj.weight"), ("true", "blocks.0.attn.qkv.weight")]
)
def test_a_line_holds_the_largest_gradient_of_the_first_trained_layer(frozen, layer, tmp_path):
    trainer = Trainer(planned(*VIT, f"freeze_patches={frozen}"), tmp_path, CPU)
    assert trainer.signs.first is trainer.model.base_encoder.get_parameter(layer)
    norms = []
    for views in list(trainer.batches())[:3]:
        trainer.train_step(views)
        norms.append(trainer.model.base_encoder.get_parameter(layer).grad.square().sum().sqrt().item())
    assert trainer.measured.line(3, 0.0)()[signs.GRADIENT] == pytest.approx(max(norms), rel=1e-5)


def test_only_what_has_signs_has_columns_for_them():
    names = {arch: signs.names(planned(f"arch={arch}")) for arch in ("vit_narrow_patch8_32", "resnet18_quarter")}
    assert names == {"vit_narrow_patch8_32": [signs.GRADIENT], "resnet18_quarter": []}
    half = planned("arch=resnet18_quarter", "precision=fp16")
    assert signs.names(half) == [signs.SCALE, signs.SKIPPED]


def test_a_line_leaves_out_gradients_that_overflowed():
    values = torch.tensor([[3.0, 1024, 0], [1.0, 1024, 0], [math.inf, 512, 1], [math.nan, 256, 1]])[None]
    names = [signs.GRADIENT, signs.SCALE, signs.SKIPPED]
    assert signs.of_line(names, values) == {signs.GRADIENT: 3, signs.SCALE: 256, signs.SKIPPED: 2}
    assert signs.of_line(names, values[:, 2:]) == {signs.SCALE: 256, signs.SKIPPED: 2}
    assert signs.of_line([], values[:, :, :0]) == {}


def test_a_window_of_before_goes_on_without_signs():
    run = planned("arch=vit_narrow_patch8_32")
    measured = Measurements(run, CPU)
    measured.restore(torch.ones(1, 2, 3), set())
    line = measured.line(2, 0.0)()
    assert line["loss"] == 1 and signs.GRADIENT not in line


# Alarms


def lines(**values: list[float]) -> list[dict]:
    healthy = {"loss": 2.0, "accuracy": 30.0, "feature_std": 0.8}
    rows = [dict(zip(values, each)) for each in zip(*values.values())]
    return [{"step": 100 + 10 * number, **healthy, **row} for number, row in enumerate(rows)]


def test_a_leap_of_the_first_gradient_is_said_with_the_way_out():
    run, frozen = planned("arch=vit_narrow_patch8_32"), planned("arch=vit_narrow_patch8_32", "freeze_patches=true")
    steady = [1.0, 1.2, 0.8, 1.0, 0.9, 1.1, 1.0, 1.3, 0.7]
    leap = lines(**{signs.GRADIENT: [*steady, 6.0]})  # over five times the median, under five times the largest
    words = alarms(run, leap, [])["leap"]
    assert "the gradient of the patch projection leaps to 6, 6 times its median" in words
    assert "Figure 4" in words and words.endswith(
        "take --set freeze_patches=true in a new run, or a smaller optimizer.lr"
    )
    assert "the gradient of the first block" in alarms(frozen, leap, [])["leap"]
    assert alarms(run, lines(**{signs.GRADIENT: [*steady, LEAP - 0.1]}), []) == {}
    assert alarms(run, lines(**{signs.GRADIENT: [12.0, *steady]}), []) == {}  # over
    assert alarms(run, leap[1:], []) == {}  # not long enough


def test_fp16_that_overflows_again_and_again_is_said():
    run = planned("arch=resnet18_quarter", "precision=fp16")
    often = lines(**{signs.SKIPPED: [10.0] * PATIENCE, signs.SCALE: [2.0**-number for number in range(PATIENCE)]})
    words = alarms(run, often, [])["overflow"]
    assert words.startswith("fp16 overflows: 90 of the last 90 steps were skipped, the loss scale is down to 0.00195")
    assert words.endswith("take --precision bf16 or fp32 in a new run")
    seldom = lines(**{signs.SKIPPED: [4.0] * PATIENCE, signs.SCALE: [1.0] * PATIENCE})
    assert alarms(run, seldom, []) == {}


# Settings


def test_fp16_is_moco_v3_s_own_arithmetic_and_a_deviation_elsewhere():
    published = configs.load(
        "moco_v3_r50", "pretrain", PretrainConfig, ["precision=fp16", "batch_size=512", "queue_size=512"]
    )
    assert plan(published, "digits", None, 1).deviations == ["batch_size 512 instead of 4096"]
    v2 = configs.load("digits", "pretrain", PretrainConfig, ["precision=fp16"])
    assert "precision fp16 instead of fp32" in plan(v2, "digits", None, 1).deviations


def test_pretrain_takes_fp16_and_evaluations_do_not(capfd, monkeypatch):
    digits = ("--dataset", "digits", "--precision", "fp16")
    out, _ = in_process(capfd, monkeypatch, "pretrain", "digits_v3", *digits, "--dry-run")
    assert ", fp16\n" in out
    assert "'fp16' is not one of 'fp32', 'tf32', 'bf16'" in error_line(
        capfd, monkeypatch, "knn", "random:resnet18", *digits
    )


def test_a_loss_that_is_not_finite_names_the_other_precisions():
    measured = Measurements(planned("arch=resnet18_quarter", "precision=fp16"), CPU)
    measured.rows = [torch.tensor([math.nan, 0, 0, 1, 0])]
    with pytest.raises(RunFailed, match=r"the loss is nan in .*, or bf16 or fp32 in a new run"):
        measured.line(1, 0.0)()
