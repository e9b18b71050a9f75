"""The two mechanisms that the paper holds MoCo against (Figure 2 a and b), on the same loss and pretext task.

Neither was ever released; what the paper leaves open is said here and in docs/protocols/pretrain.md. Also `build`,
which makes the mechanism of a config, and `optimizer_for`, which makes its optimiser.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.functional import normalize

from moco_eval.config.pretrain import PretrainConfig
from moco_eval.data.loader import Normalise
from moco_eval.encoders.architectures import build_resnet
from moco_eval.runtime.batch_norm import split_batch_norm, sync_batch_norm
from moco_eval.runtime.collectives import gather, gather_with_gradient
from moco_eval.runtime.console import warn
from moco_eval.runtime.device import compile_, to_device
from moco_eval.runtime.rank import rank, world_size
from pretraining.lars import Lars
from pretraining.moco import MoCo, Step, info_nce, measured
from pretraining.moco_v3 import MoCoV3, build_v3
from pretraining.plan import Plan
from pretraining.shuffle_bn import Pixels, encode_shuffled, unit
from pretraining.views import Batch, preprocessing


class MemoryBank(nn.Module):
    """One encoder, one view a step, and a slot for each image of the data set (Figure 2b).

    The image's own slot is the positive. The K negatives are drawn once for the whole batch ("the dictionary for
    each mini-batch"), with replacement as InstDisc draws them, from the slots of images outside the batch: an
    image's own slot is never among its negatives. A slot moves towards its image's new feature with momentum 0.5
    and is normalised again (Wu et al. 2018, arXiv:1805.01978). Source: arXiv:1911.05722, Sec. 3.2.

    Args:
        encoder: image batch to (N, C).
        images: how many images there are; their indices must mean the same image in every epoch.
        dim: C.
        queue_size: K.
        temperature: tau of Eqn. (1).
        pixels: as in MoCo.
        momentum: of a slot.
    """

    bank: torch.Tensor

    def __init__(
        self,
        encoder: nn.Module,
        *,
        images: int,
        dim: int,
        queue_size: int,
        temperature: float,
        pixels: Pixels = nn.Identity(),  # noqa: B008
        momentum: float = 0.5,
    ):
        super().__init__()
        self.encoder_q = encoder
        self.queue_size, self.temperature, self.momentum, self.pixels = queue_size, temperature, momentum, pixels
        self.register_buffer("bank", normalize(torch.randn(images, dim), dim=1))

    def forward(self, batch: Batch, generator: torch.Generator) -> Step:
        """The loss of this process's share of the batch; `generator` draws the negatives, the same on every rank."""
        q = unit(self.encoder_q(self.pixels(batch.view_q)))  # (N, C)
        own = to_device(batch.index, q.device)  # (N,)
        index = gather(own)  # (R N,)
        drawn = draw_outside(index, len(self.bank), self.queue_size, generator)
        loss, logits = info_nce(q, self.bank[own], self.bank[drawn].T, self.temperature)
        return measured(q, loss, logits, gather(q.detach()), index)

    def move_encoder_k(self) -> None:
        """There is no key encoder."""

    @torch.no_grad()
    def push(self, step: Step) -> None:
        """Move the slots of the batch; the same on every rank. After backward."""
        old = self.bank[step.index]
        self.bank[step.index] = normalize(self.momentum * old + (1 - self.momentum) * step.keys.to(old.dtype), dim=1)


def draw_outside(batch: torch.Tensor, images: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Indices below `images`, uniform with replacement over those that are not in `batch`, (count,), on its device.

    `batch` holds each image once; sorting it, unlike counting what is distinct, waits for no device.
    """
    taken, places = batch.sort().values, torch.arange(len(batch), device=batch.device)
    among = to_device(torch.randint(images - len(batch), (count,), generator=generator), batch.device)
    return among + torch.searchsorted(taken - places, among, right=True)


class EndToEnd(nn.Module):
    """Both encoders trained by back-propagation; the dictionary is the batch's keys over all processes (Figure 2a).

    Two encoders with their own weights, equal at the start. Keys are encoded in shuffled BN groups (Sec. 3.3: "our
    method and its end-to-end ablation counterpart"). Each query meets K - 1 negatives, K the global batch.
    """

    def __init__(
        self,
        encoder_q: nn.Module,
        encoder_k: nn.Module,
        *,
        temperature: float,
        permute_keys: bool = True,
        pixels: Pixels = nn.Identity(),  # noqa: B008
    ):
        super().__init__()
        self.encoder_q, self.encoder_k = encoder_q, encoder_k
        self.temperature, self.permute_keys, self.pixels = temperature, permute_keys, pixels
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())

    def forward(self, batch: Batch, generator: torch.Generator) -> Step:
        """The loss of this process's queries against the keys of all."""
        q = unit(self.encoder_q(self.pixels(batch.view_q)))  # (N, C)
        order = generator if self.permute_keys else None
        k, keys = encode_shuffled(self.encoder_k, batch.view_k, self.pixels, order, gather_with_gradient)
        own = rank() * len(q) + torch.arange(len(q), device=q.device)
        loss, logits = info_nce(q, k, keys.T, self.temperature, own)
        return measured(q, loss, logits, keys.detach())

    def move_encoder_k(self) -> None:
        """encoder_k has its own gradient."""

    def push(self, step: Step) -> None:
        """The next batch brings its own keys."""


Mechanism = MoCo | MemoryBank | EndToEnd | MoCoV3


def build(run: Plan) -> Mechanism:
    """The mechanism of a plan, as torchvision initialises it; MoCo v3 in its own way."""
    config, pixels = run.config, Normalise(preprocessing(run.config.views, run.images))
    if config.mechanism == "moco_v3":
        return build_v3(config, run.bn, pixels)
    if config.mechanism == "memory_bank":
        return MemoryBank(
            build_encoder(config, run.bn),
            images=len(run.images),
            dim=config.dim,
            queue_size=config.queue_size,
            temperature=config.temperature,
            pixels=pixels,
        )
    encoders = build_encoder(config, run.bn), build_encoder(config, run.bn)
    if config.mechanism == "end_to_end":
        return EndToEnd(*encoders, temperature=config.temperature, permute_keys=run.shuffles, pixels=pixels)
    return MoCo(
        *encoders,
        dim=config.dim,
        queue_size=config.queue_size,
        momentum=config.momentum,
        temperature=config.temperature,
        symmetric=config.symmetric,
        permute_keys=run.shuffles,
        pixels=pixels,
    )


def build_encoder(config: PretrainConfig, bn: str) -> nn.Module:
    """A ResNet whose `fc` is the projection head: linear in v1; v2's MLP has a hidden layer as wide as its input."""
    encoder = build_resnet(config.arch, num_classes=config.dim)
    if config.head == "mlp":
        width = encoder.fc.in_features
        encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)
    if bn == "split":
        return split_batch_norm(encoder, config.bn_groups)
    return sync_batch_norm(encoder) if bn == "sync" else encoder


def optimizer_for(model: Mechanism, config: PretrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """One group of all parameters, BN and bias included; what has no gradient, as a key encoder, stays as it is."""
    settings = config.optimizer
    weights, decay, fused = model.parameters(), settings.weight_decay, device.type == "cuda"
    if settings.kind == "adamw":
        return torch.optim.AdamW(weights, settings.lr, weight_decay=decay, fused=fused)
    if settings.kind == "lamb":
        return lamb(weights, settings.lr, decay)
    if settings.kind == "lars":
        return Lars(weights, settings.lr, settings.sgd_momentum, decay)
    return torch.optim.SGD(weights, settings.lr, momentum=settings.sgd_momentum, weight_decay=decay, fused=fused)


def lamb(weights: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """timm's LAMB as the paper has it: a trust ratio for every parameter, and no bound on the gradient's norm.

    Source: You et al. 2020, arXiv:1904.00962, Algorithm 2.
    """
    from timm.optim import Lamb

    return Lamb(weights, lr, weight_decay=weight_decay, max_grad_norm=None, always_adapt=True)


def prepare(model: Mechanism, run: Plan, device: torch.device) -> Mechanism:
    """On the device, channels last but for MPS, compiled where the plan says so; names and values stay."""
    model.to(device)
    if device.type != "mps":
        model.to(memory_format=torch.channels_last)
    if run.config.compile:
        encoders = [net for name, net in model.named_children() if "encoder" in name]
        compile_(encoders, device, graphs=_may_record(run))
    return model


def _may_record(run: Plan) -> bool:
    """Whether the encoders may run as CUDA graphs: asked for, and nothing in them exchanges with other processes."""
    asked = run.config.compile == "reduce-overhead"
    if asked and run.bn == "sync" and world_size() > 1:
        warn("bn sync exchanges statistics inside the encoder, which no CUDA graph holds; continuing without graphs")
        return False
    if asked and run.config.mechanism == "moco_v3" and run.config.accumulate > 1:
        warn("accumulate encodes again in the backward pass, which no CUDA graph holds; going on without graphs")
        return False
    return asked


def settle(ddp: nn.Module, run: Plan, device: torch.device) -> None:
    """One pass that leaves nothing behind but DDP's buckets, which it builds anew after its first backward pass.

    From three ranks on the order of a sum, so its last bit, depends on the bucket: settled at each start, a resumed
    run adds as an uninterrupted one does. BN is in evaluation, and the gradients are dropped.
    """
    if world_size() < 3:
        return
    side, kind = run.config.views.size, torch.float32 if run.images.bands else torch.uint8
    view = torch.zeros(2, run.images.channels, side, side, dtype=kind, device=device)
    torch.compiler.set_stance("force_eager")
    ddp.eval()
    ddp(Batch(view, view, torch.zeros(2, dtype=torch.long, device=device)), torch.Generator()).loss.backward()
    ddp.train()
    torch.compiler.set_stance("default")
    ddp.zero_grad(set_to_none=True)
