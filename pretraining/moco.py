"""Momentum Contrast (He et al. 2020, arXiv:1911.05722; Chen et al. 2020, arXiv:2003.04297), in the paper's order.

N is the batch of one process, R the number of processes, C the feature dimension, K the queue length.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from moco_eval.config import PretrainConfig
from moco_eval.encoders.build import build_resnet
from moco_eval.runtime import gather, rank, world_size
from pretraining.bn import permutation, shuffle, split_batch_norm


def build_encoder(config: PretrainConfig, bn: str) -> nn.Module:
    """A ResNet whose `fc` is the projection head: linear in v1; v2's MLP has a hidden layer as wide as its input."""
    encoder = build_resnet(config.arch, num_classes=config.dim)
    if config.head == "mlp":
        width = encoder.fc.in_features
        encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)
    return split_batch_norm(encoder, config.bn_groups) if bn == "split" else encoder


def info_nce(
    q: torch.Tensor, k: torch.Tensor, queue: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Classify each query as its own key among K + 1 candidates; the answer is column 0.

    Args:
        q: queries, (N, C), unit rows.
        k: the positive key of each query, (N, C), unit rows, no gradient.
        queue: negative keys, (C, K), unit columns, no gradient.
        temperature: tau > 0, no unit (v1 0.07, v2 0.2).
    Returns:
        Mean loss in nats (log(K + 1) when all keys look alike) and the logits, (N, K + 1).
    Raises:
        ValueError: q, k and queue disagree on N or C.
    Source: He et al. 2020, arXiv:1911.05722, Eqn. (1).
    """
    if q.shape != k.shape or q.shape[1] != queue.shape[0]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and queue {tuple(queue.shape)} disagree")
    with torch.autocast(q.device.type, enabled=False):
        positive = (q * k).sum(dim=1, keepdim=True)  # (N, 1)
        negatives = q @ queue  # (N, K)
        logits = torch.cat([positive, negatives], dim=1) / temperature
        answers = torch.zeros(len(q), dtype=torch.long, device=q.device)
        return cross_entropy(logits, answers), logits


def chance_loss(queue_size: int, symmetric: bool) -> float:
    """The loss when all keys look alike, in nats: log(K + 1), twice that where both directions are summed."""
    return math.log(queue_size + 1) * (2 if symmetric else 1)


def unit(features: torch.Tensor) -> torch.Tensor:
    """Rows of length one, in fp32 or the input's own higher precision."""
    return normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)


@dataclass
class Step:
    """What a forward pass gives: the loss (nats), pretext accuracy (0..1), spread of q, keys of all ranks to push.

    `feature_std`: mean over dimensions of the standard deviation of sqrt(C) q; about 1 when spread, 0 when collapsed.
    """

    loss: torch.Tensor
    accuracy: torch.Tensor
    feature_std: torch.Tensor
    keys: torch.Tensor


class MoCo(nn.Module):
    """Query encoder, key encoder and queue; state-dict keys as in facebookresearch/moco.

    Args:
        encoder_q, encoder_k: two networks of one shape, image batch to (N, C).
        dim: C.
        queue_size: K.
        momentum: m of Eqn. (2).
        temperature: tau of Eqn. (1).
        symmetric: sum the loss of both directions and push both sets of keys (CIFAR-10 demo).
        permute_keys: shuffle the keys over BN groups (Sec. 3.3).
    """

    queue: torch.Tensor
    queue_ptr: torch.Tensor

    def __init__(
        self,
        encoder_q: nn.Module,
        encoder_k: nn.Module,
        *,
        dim: int,
        queue_size: int,
        momentum: float,
        temperature: float,
        symmetric: bool = False,
        permute_keys: bool = True,
    ):
        super().__init__()
        self.encoder_q, self.encoder_k = encoder_q, encoder_k
        self.momentum, self.temperature = momentum, temperature
        self.symmetric, self.permute_keys = symmetric, permute_keys
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.encoder_k.requires_grad_(False)
        self.register_buffer("queue", normalize(torch.randn(dim, queue_size), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, view_q: torch.Tensor, view_k: torch.Tensor, generator: torch.Generator) -> Step:
        """Algorithm 1 up to the loss; the caller goes backward, steps, and then pushes the keys.

        Args:
            view_q, view_k: two views of each image, (N, 3, H, W), this process's share of the batch.
            generator: draws the order of the keys; in the same state on every rank.
        """
        self.update_encoder_k()
        step = self.contrast(view_q, view_k, generator)
        if not self.symmetric:
            return step
        other = self.contrast(view_k, view_q, generator)
        return Step(
            loss=step.loss + other.loss,
            accuracy=(step.accuracy + other.accuracy) / 2,
            feature_std=(step.feature_std + other.feature_std) / 2,
            keys=torch.cat([other.keys, step.keys]),
        )

    def contrast(self, view_q: torch.Tensor, view_k: torch.Tensor, generator: torch.Generator) -> Step:
        """One direction of the loss."""
        q = unit(self.encoder_q(view_q))  # (N, C)
        k, keys = self.encode_keys(view_k, generator)
        loss, logits = info_nce(q, k, self.queue, self.temperature)
        with torch.no_grad():
            accuracy = (logits.argmax(dim=1) == 0).float().mean()
            spread = q.std(dim=0).mean() * math.sqrt(q.shape[1])
        return Step(loss, accuracy, spread, keys)

    @torch.no_grad()
    def update_encoder_k(self) -> None:
        """Move every parameter of encoder_k towards encoder_q; BN statistics are encoder_k's own. Eqn. (2)."""
        keys, queries = list(self.encoder_k.parameters()), list(self.encoder_q.parameters())
        torch._foreach_mul_(keys, self.momentum)
        torch._foreach_add_(keys, queries, alpha=1 - self.momentum)

    @torch.no_grad()
    def encode_keys(self, view_k: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys of this process's images, encoded in other BN groups than their queries. Sec. 3.3.

        Returns:
            This process's keys, (N, C), and those of all processes in rank order, (R N, C): one gather serves
            both the way back from the shuffle and the queue.
        """
        N = len(view_k)
        if not self.permute_keys:
            k = unit(self.encoder_k(view_k))
            return k, gather(k)
        forth, back = permutation(N * world_size(), generator)
        k = unit(self.encoder_k(shuffle(view_k, forth)))
        keys = gather(k)[back.to(k.device)]
        return keys[rank() * N : (rank() + 1) * N], keys

    @torch.no_grad()
    def push(self, keys: torch.Tensor) -> None:
        """Replace the oldest keys; called after backward, so a batch never meets its own keys as negatives.

        Args:
            keys: of all ranks, (R N, C), or twice that when symmetric; at most K. Wraps round at the end.
        """
        K = self.queue.shape[1]
        places = (self.queue_ptr + torch.arange(len(keys), device=self.queue.device)) % K
        self.queue[:, places] = keys.T.to(self.queue.dtype)
        self.queue_ptr[0] = (self.queue_ptr[0] + len(keys)) % K


def build_moco(config: PretrainConfig, bn: str) -> MoCo:
    """The model of a config, with `bn` resolved: shuffle, split or none. Initialisation is torchvision's."""
    return MoCo(
        build_encoder(config, bn),
        build_encoder(config, bn),
        dim=config.dim,
        queue_size=config.queue_size,
        momentum=config.momentum,
        temperature=config.temperature,
        symmetric=config.symmetric,
        permute_keys=config.bn_permute and bn != "none",
    )
