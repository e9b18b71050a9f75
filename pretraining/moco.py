"""Momentum Contrast (He et al. 2020, arXiv:1911.05722; Chen et al. 2020, arXiv:2003.04297), in the paper's order.

N is the batch of one process, R the number of processes, C the feature dimension, K the queue length.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from pretraining.shuffle_bn import Pixels, encode_shuffled, unit
from pretraining.views import Batch


def info_nce(
    q: torch.Tensor, k: torch.Tensor, queue: torch.Tensor, temperature: float, own: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Classify each query as its own key among K + 1 candidates; the answer is column 0.

    Args:
        q: queries, (N, C), unit rows.
        k: the positive key of each query, (N, C), unit rows; no gradient in MoCo.
        queue: negative keys, (C, K), unit columns; no gradient in MoCo.
        temperature: tau > 0, no unit (v1 0.07, v2 0.2).
        own: (N,), the column of `queue` that is a query's own key and no negative of its; None where none is.
    Returns:
        Mean loss in nats (log of the candidates when all keys look alike) and the logits, (N, K + 1).
    Raises:
        ValueError: q, k and queue disagree on N or C.
    Source: He et al. 2020, arXiv:1911.05722, Eqn. (1).
    """
    if q.shape != k.shape or q.shape[1] != queue.shape[0]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and queue {tuple(queue.shape)} disagree")
    with torch.autocast(q.device.type, enabled=False):
        positive = (q * k).sum(dim=1, keepdim=True)  # (N, 1)
        negatives = q @ queue  # (N, K)
        if own is not None:
            negatives = negatives.scatter(1, own[:, None], -math.inf)
        logits = torch.cat([positive, negatives], dim=1) / temperature
        answers = torch.zeros(len(q), dtype=torch.long, device=q.device)
        return cross_entropy(logits, answers), logits


@dataclass
class Step:
    """What a forward pass gives: the loss (nats), pretext accuracy (0..1), spread of q, what the dictionary takes in.

    `feature_std`: mean over dimensions of the standard deviation of sqrt(C) q; about 1 when spread, 0 when collapsed.
    `keys`: of all ranks, in rank order. `index`: the images they belong to, where the dictionary asks.
    """

    loss: torch.Tensor
    accuracy: torch.Tensor
    feature_std: torch.Tensor
    keys: torch.Tensor
    index: torch.Tensor | None = None


def measured(
    q: torch.Tensor, loss: torch.Tensor, logits: torch.Tensor, keys: torch.Tensor, index: torch.Tensor | None = None
) -> Step:
    """A step with its pretext accuracy and the spread of q."""
    with torch.no_grad():
        accuracy, spread = (logits.argmax(dim=1) == 0).float().mean(), q.std(dim=0).mean() * math.sqrt(q.shape[1])
    return Step(loss, accuracy, spread, keys, index)


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
        pixels: what is done to a batch of views after it has been exchanged between processes.
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
        pixels: Pixels = nn.Identity(),  # noqa: B008
    ):
        super().__init__()
        self.encoder_q, self.encoder_k = encoder_q, encoder_k
        self.momentum, self.temperature = momentum, temperature
        self.symmetric, self.permute_keys, self.pixels = symmetric, permute_keys, pixels
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.encoder_k.requires_grad_(False)
        self.register_buffer("queue", normalize(torch.randn(dim, queue_size), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, batch: Batch, generator: torch.Generator) -> Step:
        """The loss of Algorithm 1; `move_encoder_k` comes before it, `push` after the optimiser's step.

        Args:
            batch: two views of each image, (N, 3, H, W), this process's share.
            generator: draws the order of the keys; in the same state on every rank.
        """
        step = self.contrast(batch.view_q, batch.view_k, generator)
        if not self.symmetric:
            return step
        other = self.contrast(batch.view_k, batch.view_q, generator)
        return Step(
            loss=step.loss + other.loss,
            accuracy=(step.accuracy + other.accuracy) / 2,
            feature_std=(step.feature_std + other.feature_std) / 2,
            keys=torch.cat([other.keys, step.keys]),
        )

    def contrast(self, view_q: torch.Tensor, view_k: torch.Tensor, generator: torch.Generator) -> Step:
        """One direction of the loss."""
        q = unit(self.encoder_q(self.pixels(view_q)))  # (N, C)
        with torch.no_grad():
            k, keys = encode_shuffled(self.encoder_k, view_k, self.pixels, generator if self.permute_keys else None)
        loss, logits = info_nce(q, k, self.queue, self.temperature)
        return measured(q, loss, logits, keys)

    @torch.no_grad()
    def move_encoder_k(self) -> None:
        """Every parameter of encoder_k towards encoder_q; BN statistics are encoder_k's own. Eqn. (2)."""
        keys, queries = list(self.encoder_k.parameters()), list(self.encoder_q.parameters())
        torch._foreach_mul_(keys, self.momentum)
        torch._foreach_add_(keys, queries, alpha=1 - self.momentum)

    @torch.no_grad()
    def push(self, step: Step) -> None:
        """Replace the oldest keys; called after backward, so a batch never meets its own keys as negatives.

        `step.keys`: (R N, C), or twice that when symmetric; at most K. Wraps round at the end.
        """
        K, keys = self.queue.shape[1], step.keys
        places = (self.queue_ptr + torch.arange(len(keys), device=self.queue.device)) % K
        self.queue[:, places] = keys.T.to(self.queue.dtype)
        self.queue_ptr[0] = (self.queue_ptr[0] + len(keys)) % K
