"""The memory that a dry run predicts for a pretraining: what is held, counted."""

import pytest
import torch

from moco_eval.config import load as configs
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.encoders.architectures import build_backbone
from pretraining import forecast
from pretraining.mechanisms import build, optimizer_for
from pretraining.plan import Plan, plan

V3 = ["views.size=32", "hidden_dim=16", "dim=8", "freeze_patches=false", "knn=null"]
VIT = ["arch=vit_narrow_12h_patch8_32", *V3]
RESNET = ["arch=resnet18_quarter", "optimizer={kind: lars, lr: 0.1}", *V3]
COUNTED = [
    ("digits", ["mechanism=memory_bank", "symmetric=false"], 1),
    ("digits", ["symmetric=false"], 1),
    ("digits", ["symmetric=true"], 2),
    ("digits", ["mechanism=end_to_end", "symmetric=false", "queue_size=64"], 2),
    ("digits_v3", RESNET, 2),
    ("digits_v3", VIT, 2),
    ("digits_v3", [*VIT, "optimizer={kind: lamb, lr: 0.1}", "positions=learned", "predictor=false"], 2),
    ("digits_v3", [*VIT, "accumulate=4"], 1),
]


def run_of(recipe: str, settings: list[str]) -> Plan:
    return plan(configs.load(recipe, "pretrain", PretrainConfig, settings), "digits", None, 1)


@pytest.mark.parametrize(("recipe", "settings", "passes"), COUNTED)
def test_the_views_that_wait_for_the_backward_pass(recipe, settings, passes, monkeypatch):
    parts = []
    monkeypatch.setattr(forecast, "_augmentation", lambda *_: 0.0)
    monkeypatch.setattr(forecast, "planned", lambda given, *_: parts.extend(given))
    run = run_of(recipe, settings)
    forecast.of_run(run, torch.device("cpu"))
    assert parts[0].batch == passes * run.config.batch_size // run.config.accumulate
    assert all(part.batch == run.config.batch_size // run.config.accumulate for part in parts[1:])


@pytest.mark.parametrize(("recipe", "settings", "_"), COUNTED)
def test_what_is_held_besides_the_probe_is_what_a_step_leaves_there(recipe, settings, _):
    """Weights, buffers, gradients and the optimiser's memory after a step, but for the probe's weights and gradient."""
    run = run_of(recipe, settings)
    model = build(run)
    optimizer = optimizer_for(model, run.config, torch.device("cpu"))
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    optimizer.step()
    held = [*model.parameters(), *model.buffers(), *(one.grad for one in model.parameters() if one.grad is not None)]
    held += [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    probe = 2 * sum(one.numel() for one in build_backbone(run.config.arch).parameters())
    assert forecast._beside(run) == 4 * (sum(one.numel() for one in held) - probe)
