"""What a step shows besides its loss: how large a ViT's first gradient is, and how the loss scale of fp16 moves."""

import torch
from torch import nn

from moco_eval.encoders.architectures import VisionTransformer, architecture
from pretraining.mechanisms import Mechanism
from pretraining.plan import Plan

GRADIENT, SCALE, SKIPPED = "first_layer_gradient", "loss_scale", "skipped_steps"


def names(run: Plan) -> list[str]:
    """Of a run's signs, in order; none in most runs."""
    return [*([GRADIENT] if is_vit(run) else []), *([SCALE, SKIPPED] if run.config.precision == "fp16" else [])]


def is_vit(run: Plan) -> bool:
    """Whether a vision transformer is trained."""
    return run.config.mechanism == "moco_v3" and isinstance(architecture(run.config.arch), VisionTransformer)


def of_line(names: list[str], values: torch.Tensor) -> dict[str, float]:
    """Of the steps of a line of metrics, (R, steps, signs): the largest gradient, the last scale, the steps skipped.

    A gradient that overflowed has no size, and a line of such steps alone has none.
    """
    columns = dict(zip(names, values[0].double().unbind(dim=1)))  # the same on every rank
    line = {}
    if GRADIENT in columns and len(sizes := columns[GRADIENT][columns[GRADIENT].isfinite()]):
        line[GRADIENT] = sizes.max().item()
    if SCALE in columns:
        line |= {SCALE: columns[SCALE][-1].item(), SKIPPED: columns[SKIPPED].sum().item()}
    return line


class Signs:
    """The signs of each step; they stay on the device, which nothing waits for."""

    def __init__(self, run: Plan, model: Mechanism, scaler: torch.amp.GradScaler, device: torch.device):
        self.first = first_layer(model.encoder_q) if is_vit(run) else None
        self.scaler, self.one = scaler, torch.ones((), device=device)
        self.before = self.one

    def before_step(self) -> None:
        """Note the loss scale."""
        self.before = self.scaler.scale(self.one)

    def after_step(self) -> list[torch.Tensor]:
        """As `names` has them; the gradient's norm, the scale that holds now, 1 where the step was skipped."""
        signs = [] if self.first is None else [_norm(self.first)]
        if self.scaler.is_enabled():
            scale = self.scaler.scale(self.one)
            signs += [scale, (scale < self.before).float()]  # the scale falls where a gradient has overflowed
        return signs


def first_layer(vit: nn.Module) -> nn.Parameter:
    """Weights of the first layer that is trained: the projection of patches, or of the first block where it is frozen.

    The paper sees the gradient leap there first (arXiv:2104.02057, Sec. 4.2, Figure 4).
    """
    layers = [*vit.get_submodule("patch_embed").parameters(), *vit.get_submodule("blocks").parameters()]
    return next(weight for weight in layers if weight.requires_grad and weight.ndim > 1)


def _norm(weight: nn.Parameter) -> torch.Tensor:
    assert weight.grad is not None
    return weight.grad.norm()
