"""MoCo v3 (Chen, Xie, He 2021, arXiv:2104.02057), Algorithm 1: no queue; the keys are the other view's, of all ranks.

N is the batch of one process, R the number of processes, C the feature dimension.
"""

import math
from itertools import pairwise

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from moco_eval.config.pretrain import PretrainConfig
from moco_eval.encoders.architectures import VisionTransformer, architecture, build_resnet
from moco_eval.runtime.batch_norm import sync_batch_norm
from moco_eval.runtime.collectives import gather
from moco_eval.runtime.rank import rank
from pretraining.in_parts import in_parts
from pretraining.moco import Step
from pretraining.shuffle_bn import Pixels, unit
from pretraining.views import Batch
from pretraining.vit import build_vit


def ctr(q: torch.Tensor, keys: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One direction of the loss: each query finds its own key among those of the whole batch.

    Args:
        q: queries, (N, C), unit rows.
        keys: of all ranks in rank order, (R N, C), unit rows, no gradient.
        temperature: tau > 0, no unit (ResNet 1, ViT 0.2).
    Returns:
        2 tau times the mean loss in nats (2 tau log(R N) when all keys look alike), and the share of queries that find
        their key, 0..1. Logits are fp32 or the features' own higher precision, also under autocast.
    Source: arXiv:2104.02057, Algorithm 1, function ctr.
    """
    with torch.autocast(q.device.type, enabled=False):
        logits = q @ keys.T / temperature  # (N, R N)
        answers = rank() * len(q) + torch.arange(len(q), device=q.device)
        loss = 2 * temperature * cross_entropy(logits, answers)
    return loss, (logits.detach().argmax(dim=1) == answers).float().mean()


class MoCoV3(nn.Module):
    """Base encoder, momentum encoder and predictor; state-dict keys as in facebookresearch/moco-v3.

    Args:
        base_encoder, momentum_encoder: two networks of one shape with their projectors, image batch to (N, C).
        predictor: (N, C) to (N, C), for queries alone; the identity where there is none.
        momentum: m, of the coming step.
        temperature: tau.
        pixels: what is done to a batch of views on the device.
        parts: in which a batch passes the backbones, one after the other; the loss is that of the whole batch.
    """

    def __init__(
        self,
        base_encoder: nn.Module,
        momentum_encoder: nn.Module,
        predictor: nn.Module,
        *,
        momentum: float,
        temperature: float,
        pixels: Pixels = nn.Identity(),  # noqa: B008
        parts: int = 1,
    ):
        super().__init__()
        self.base_encoder, self.momentum_encoder, self.predictor = base_encoder, momentum_encoder, predictor
        self.momentum, self.temperature, self.pixels, self.parts = momentum, temperature, pixels, parts
        self.momentum_encoder.load_state_dict(self.base_encoder.state_dict())
        self.momentum_encoder.requires_grad_(False)

    @property
    def encoder_q(self) -> nn.Module:
        """The encoder that is evaluated."""
        return self.base_encoder

    def forward(self, batch: Batch, generator: torch.Generator) -> Step:
        """The loss of Algorithm 1, both directions; `move_encoder_k` comes before it.

        Each view is a pass of its own, and so has batch statistics of its own, those of all ranks.

        Args:
            batch: two views of each image, (N, 3, H, W), this process's share.
            generator: not used; there is nothing to draw.
        """
        x1, x2 = batch.view_q, batch.view_k
        q1, q2 = self.queries(x1), self.queries(x2)  # (N, C) each
        k1, k2 = self.keys(x1), self.keys(x2)  # (R N, C) each
        (loss1, right1), (loss2, right2) = ctr(q1, k2, self.temperature), ctr(q2, k1, self.temperature)
        spread = q1.detach().std(dim=0).mean() * math.sqrt(q1.shape[1])
        return Step(loss1 + loss2, (right1 + right2) / 2, spread, k2)

    def queries(self, images: torch.Tensor) -> torch.Tensor:
        """Predicted features of a view, (N, C), unit rows."""
        return unit(self.predictor(self.encode(self.base_encoder, images)))

    @torch.no_grad()
    def keys(self, images: torch.Tensor) -> torch.Tensor:
        """Features of a view by the momentum encoder, of all ranks in rank order, (R N, C), unit rows."""
        return gather(unit(self.encode(self.momentum_encoder, images)))

    def encode(self, encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """Projected features of a view, (N, C)."""
        if self.parts > 1:
            return in_parts(encoder, images, self.pixels, self.parts)
        return encoder(self.pixels(images))

    @torch.no_grad()
    def move_encoder_k(self) -> None:
        """Every parameter of the momentum encoder towards the base encoder, with the weights from before the step.

        BN statistics are its own; the predictor has no counterpart.
        """
        keys, queries = list(self.momentum_encoder.parameters()), list(self.base_encoder.parameters())
        torch._foreach_mul_(keys, self.momentum)
        torch._foreach_add_(keys, queries, alpha=1 - self.momentum)

    def push(self, step: Step) -> None:
        """The next batch brings its own keys."""


def build_v3(config: PretrainConfig, bn: str, pixels: Pixels) -> MoCoV3:
    """The model of a config, with MoCo v3's heads and initialisation."""
    assert config.hidden_dim is not None
    nets = [build_encoder_v3(config, bn) for _ in range(2)]
    # a ViT's predictor ends with a batch norm, a ResNet's does not
    last = isinstance(architecture(config.arch), VisionTransformer)
    widths = [config.dim, config.hidden_dim, config.dim]
    predictor = mlp(widths, config.head_bn, last_bn=last) if config.predictor else nn.Identity()
    return MoCoV3(
        nets[0],
        nets[1],
        synchronised(predictor, bn),
        momentum=config.momentum,
        temperature=config.temperature,
        pixels=pixels,
        parts=config.accumulate,
    )


def build_encoder_v3(config: PretrainConfig, bn: str) -> nn.Module:
    """A ResNet whose `fc`, or a ViT whose `head` is the projector: two layers there, three here."""
    assert config.hidden_dim is not None
    hidden, dim = config.hidden_dim, config.dim
    if isinstance(architecture(config.arch), VisionTransformer):
        net = build_vit(config.arch, freeze_patches=config.freeze_patches, places=config.positions)
        net.head = mlp([net.num_features, hidden, hidden, dim], config.head_bn, last_bn=True)
    else:
        net = build_resnet(config.arch, num_classes=dim)
        for module in net.modules():
            last = getattr(module, "bn3", getattr(module, "bn2", None))
            if last is not None:
                nn.init.zeros_(last.weight)  # each block starts as the identity
        net.fc = mlp([net.fc.in_features, hidden, dim], config.head_bn, last_bn=True)
    return synchronised(net, bn)


def mlp(widths: list[int], bn: bool, last_bn: bool) -> nn.Sequential:
    """Linear layers without bias, a batch norm and ReLU after each but the last; at the end a norm without affine part.

    Without `bn` there is no norm at all, and still no bias.
    Source: arXiv:2104.02057, Sec. 4, "MLP heads"; Sec. 6.2, "BN in MLP heads".
    """
    layers: list[nn.Module] = []
    for number, (width, wider) in enumerate(pairwise(widths), start=2):
        layers.append(nn.Linear(width, wider, bias=False))
        if number < len(widths):
            layers += [*([nn.BatchNorm1d(wider)] if bn else []), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, *([nn.BatchNorm1d(widths[-1], affine=False)] if bn and last_bn else []))


def synchronised(net: nn.Module, bn: str) -> nn.Module:
    """With the batch statistics of all ranks where `bn` is sync."""
    return sync_batch_norm(net) if bn == "sync" else net
