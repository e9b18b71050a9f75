#!/usr/bin/env python3
"""A training step of MoCo: the published one, ours, lightly's, in one run, with the batch in place on the device.

python tools/benchmark_pretrain.py cifar10                    # ResNet-18, 32 pixels, batch 512, K 4096
python tools/benchmark_pretrain.py moco_v2_r50 --device cuda  # ResNet-50, 224 pixels, batch 256, K 65536

- published: facebookresearch/moco as its authors ran it: channels first, eager, the queue cloned, fp32 with TF32 in
  convolutions where a GPU has it (PyTorch's default). The CIFAR-10 demo's is that with split BN.
- published fp32: the same without TF32 (a GPU's row).
- ours: what `moco-eval pretrain` does, in fp32, and on a GPU in tf32 and bf16; there channels last and compiled.
- ours graphs: the same with compile=reduce-overhead (a GPU's row).
- ours augmented: the same as ours with the recipe's photometric steps on the device.
- lightly: its MoCo with the same network, queue and optimiser, where it is installed; on a GPU with PyTorch's default,
  TF32 in convolutions, and under bf16.

Beside images per second and their ratio to the first row: milliseconds of a step on a GPU's host, until its last kernel
is launched (where a step reads a value, its wait is in it), and of the kernels themselves; on a CPU, where the two are
one, of the wall clock and of all cores together. Peak memory of a GPU. The arithmetic of convolutions and matrix
products as a share of the rate of a large matrix product measured here in the same precision. The bytes that layers
must read and write as a share of the rate of a large copy measured here (of_copy_rate); and the step's whole traffic as
estimated (TRAFFIC) against that rate: 1 is the bandwidth's limit (of_bandwidth).
"""

import copy
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

import click
import torch
from race import Run, race, report
from torch import nn
from torch.nn.functional import batch_norm, cross_entropy, normalize
from torch.utils.flop_counter import FlopCounterMode

from moco_eval.config import load as configs
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.data.loader import Normalise
from moco_eval.runtime.batch_norm import replace_batch_norm
from moco_eval.runtime.device import choose_device, exact_arithmetic, wait_for
from pretraining.bottleneck import seconds
from pretraining.mechanisms import build_encoder
from pretraining.plan import Plan, plan
from pretraining.train import Trainer
from pretraining.views import Batch, preprocessing

# Bytes that a whole step moves at least, and its batch: 24 and 2.6 ms at the 4.8 TB/s of an H200. An estimate.
TRAFFIC = {"moco_v2_r50": (114e9, 256), "moco_v1_r50": (114e9, 256), "cifar10": (2.6e-3 * 4.8e12, 512)}


class PublishedSplitBatchNorm(nn.BatchNorm2d):
    """Split BN as the CIFAR-10 demo has it: sample i in group i % groups, the groups as channels of their own."""

    def __init__(self, num_features: int, groups: int):
        super().__init__(num_features)
        self.groups = groups

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        N, C, H, W = input.shape
        mean, var = self.running_mean.repeat(self.groups), self.running_var.repeat(self.groups)
        affine = self.weight.repeat(self.groups), self.bias.repeat(self.groups), True, self.momentum, self.eps
        output = batch_norm(input.view(-1, C * self.groups, H, W), mean, var, *affine).view(N, C, H, W)
        self.running_mean.copy_(mean.view(self.groups, C).mean(0))
        self.running_var.copy_(var.view(self.groups, C).mean(0))
        return output


class Published(nn.Module):
    """MoCo on one GPU as published (moco/builder.py; the CIFAR-10 demo), restated: float views in, logits out."""

    def __init__(self, config: PretrainConfig, bn: str):
        super().__init__()
        self.encoder_q = build_encoder(config, "none")
        if bn == "split":
            replace_batch_norm(self.encoder_q, lambda features: PublishedSplitBatchNorm(features, config.bn_groups))
        self.encoder_k = copy.deepcopy(self.encoder_q)
        for parameter in self.encoder_k.parameters():
            parameter.requires_grad = False
        self.register_buffer("queue", normalize(torch.randn(config.dim, config.queue_size), dim=0))
        self.K, self.m, self.tau, self.pointer = config.queue_size, config.momentum, config.temperature, 0

    def forward(self, view_q: torch.Tensor, view_k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q = normalize(self.encoder_q(view_q), dim=1)
        with torch.no_grad():
            for ours, theirs in zip(self.encoder_k.parameters(), self.encoder_q.parameters()):
                ours.data = ours.data * self.m + theirs.data * (1.0 - self.m)
            order = torch.randperm(len(view_k), device=view_k.device)
            k = normalize(self.encoder_k(view_k[order]), dim=1)[torch.argsort(order)]
        positive = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
        negative = torch.einsum("nc,ck->nk", q, self.queue.clone().detach())
        logits = torch.cat([positive, negative], dim=1) / self.tau
        self.queue[:, self.pointer : self.pointer + len(k)] = k.T
        self.pointer = (self.pointer + len(k)) % self.K
        return logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device)


def published(run: Plan, batch: Batch, device: torch.device, tf32: bool) -> Run:
    model = Published(run.config, run.bn).to(device)
    sgd = run.config.optimizer
    optimizer = torch.optim.SGD(model.parameters(), sgd.lr, sgd.sgd_momentum, weight_decay=sgd.weight_decay)
    as_float = Normalise(preprocessing(run.config.views))
    view_q, view_k = as_float(batch.view_q), as_float(batch.view_k)  # its loader's work

    def step() -> None:
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = tf32, True
        logits, answers = model(view_q, view_k)
        loss = cross_entropy(logits, answers)
        loss.item(), (logits.detach().argmax(1) == 0).float().mean().item()  # its meters read both at every step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def ours(run: Plan, batch: Batch, device: torch.device, augmented: bool = False) -> Run:
    trainer = Trainer(run, Path(os.devnull), device)
    two_views, index = trainer.feed.views, batch.index.cpu().numpy()
    views, numbers = torch.stack([batch.view_q, batch.view_k]), two_views.numbers(0 * index, index)

    def step() -> None:
        torch.backends.cudnn.benchmark = True  # as training sets it
        with exact_arithmetic():  # as training does; other contestants turn TF32 on
            if augmented:
                trainer.train_step(Batch(*two_views.finish(views, numbers, trainer.feed.fuse), batch.index))
            else:
                trainer.train_step(batch)
            if trainer.step % 10 == 0:
                trainer.measured.line(trainer.step, 0.0)

    return step


def lightly(run: Plan, batch: Batch, device: torch.device, bf16: bool) -> Run:
    """lightly's modules put together as its MoCo example does."""
    from lightly.loss import NTXentLoss
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    encoder = build_encoder(run.config, run.bn).to(device)
    momentum_encoder = copy.deepcopy(encoder)
    deactivate_requires_grad(momentum_encoder)
    loss_of = NTXentLoss(run.config.temperature, memory_bank_size=(run.config.queue_size, run.config.dim)).to(device)
    sgd = run.config.optimizer
    optimizer = torch.optim.SGD(encoder.parameters(), sgd.lr, sgd.sgd_momentum, weight_decay=sgd.weight_decay)
    as_float = Normalise(preprocessing(run.config.views))
    view_q, view_k = as_float(batch.view_q), as_float(batch.view_k)

    def step() -> None:
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = True, False  # PyTorch's defaults
        update_momentum(encoder, momentum_encoder, run.config.momentum)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            q = encoder(view_q)
            with torch.no_grad():
                order = torch.randperm(len(view_k), device=device)
                k = momentum_encoder(view_k[order])[torch.argsort(order)]
            loss = loss_of(q, k)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


@dataclass
class Row:
    """A contestant: what makes its step, and the precision whose matrix rate it is held against."""

    make: Callable[[], Run]
    precision: str


def rows(
    recipe: str, batch_size: int | None, device: torch.device, only: tuple[str, ...]
) -> tuple[dict[str, Row], int]:
    """The contestants by name, and the images of a step."""
    on_gpu = device.type == "cuda"
    precisions = ("fp32", "tf32", "bf16") if on_gpu else ("fp32",)
    run = resolved(recipe, batch_size, device, "fp32")
    batch = pictures(run, device)
    default = "tf32" if on_gpu else "fp32"
    contestants = {"published": Row(lambda: published(run, batch, device, True), default)}
    if on_gpu:
        contestants["published fp32"] = Row(lambda: published(run, batch, device, False), "fp32")
    for precision in precisions:
        mine = resolved(recipe, batch_size, device, precision)
        contestants[f"ours {precision}"] = Row(lambda mine=mine: ours(mine, batch, device), precision)
        if on_gpu:
            graphs = resolved(recipe, batch_size, device, precision, "reduce-overhead")
            contestants[f"ours {precision} graphs"] = Row(lambda mine=graphs: ours(mine, batch, device), precision)
        contestants[f"ours {precision} augmented"] = Row(lambda mine=mine: ours(mine, batch, device, True), precision)
    for precision in (default, "bf16") if on_gpu else (default,):
        contestants[f"lightly {precision}"] = Row(
            lambda bf16=precision == "bf16": lightly(run, batch, device, bf16), precision
        )
    missing = not installed("lightly")
    if missing:
        print("lightly is not installed: its rows are left out", file=sys.stderr)
    chosen = {name: row for name, row in contestants.items() if not (missing and name.startswith("lightly"))}
    return {name: row for name, row in chosen.items() if not only or name in only}, len(batch.index)


def installed(package: str) -> bool:
    try:
        __import__(package)
    except ImportError:
        return False
    return True


def resolved(recipe: str, batch_size: int | None, device: torch.device, precision: str, compiled: str = "auto") -> Plan:
    """The recipe for one process; the built-in digits stand in for its data, which is not looked at."""
    settings = [f"precision={precision}", f"compile={compiled}", *([f"batch_size={batch_size}"] if batch_size else [])]
    return resolved_at(configs.load(recipe, "pretrain", PretrainConfig, settings), device)


def resolved_at(config: PretrainConfig, device: torch.device) -> Plan:
    """A config for one process."""
    return plan(config.model_copy(update={"knn": None}), "digits", None, 1, device)


def pictures(run: Plan, device: torch.device) -> Batch:
    """Noise of the recipe's shape; the arithmetic does not depend on it."""
    shape = (run.config.batch_size, 3, run.config.views.size, run.config.views.size)
    views = [torch.randint(0, 256, shape, dtype=torch.uint8, device=device) for _ in range(2)]
    return Batch(*views, torch.arange(shape[0], device=device))


def timed(row: Row, device: torch.device, steps: int) -> tuple[Run, dict[str, float]]:
    """Some steps, waited for; and the peak memory and the milliseconds of one."""
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    step = row.make()
    step(), step()
    wait_for(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step()
    figures = {"peak_GiB": (torch.cuda.max_memory_allocated(device) - before) / 2**30} if device.type == "cuda" else {}
    figures |= apart(step, device)

    def several() -> None:
        for _ in range(steps):
            step()
        wait_for(device)

    return several, figures


def apart(step: Run, device: torch.device) -> dict[str, float]:
    """Milliseconds of one step: of a GPU's host and of its kernels; of a CPU's clock and of its cores."""
    wait_for(device)
    wall, cores = time.perf_counter(), time.process_time()
    step()
    host, used = time.perf_counter() - wall, time.process_time() - cores
    if device.type != "cuda":
        return {"wall_ms": 1e3 * host, "cores_ms": 1e3 * used}
    wait_for(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        step()
        wait_for(device)
    kernels = sum(event.self_device_time_total for event in profiled.key_averages()) / 1e6
    return {"host_ms": 1e3 * host, "device_ms": 1e3 * kernels}


def work_of(run: Plan, batch: Batch, device: torch.device) -> dict[str, float]:
    """Floating-point operations of convolutions and matrix products in a step; bytes its layers read and write.

    Bytes: each layer's input and output once forward, in both encoders, and twice that backward in the query
    encoder, at 4 bytes a number.
    """
    moved = 0

    def count(_module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal moved
        moved += 4 * (inputs[0].numel() + output.numel())

    encoder = build_encoder(run.config, run.bn).to(device)
    for module in encoder.modules():
        if not list(module.children()):
            module.register_forward_hook(count)
    as_float = Normalise(preprocessing(run.config.views))
    with FlopCounterMode(display=False) as backward:
        encoder(as_float(batch.view_q)).sum().backward()
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        encoder(as_float(batch.view_k))
    logits = 2 * len(batch.index) * run.config.dim * run.config.queue_size * 2  # forward and towards q
    return {"flop": backward.get_total_flops() + forward.get_total_flops() + logits, "bytes": moved / 2 * 4}


def machine(device: torch.device, precisions: set[str]) -> dict[str, float]:
    """Measured here: floating-point operations a second of a large matrix product, bytes a second of a large copy."""
    size = 8192 if device.type == "cuda" else 2048
    rates = {}
    for precision in sorted(precisions):
        a, b = (torch.randn(size, size, device=device) for _ in range(2))
        if precision == "bf16":
            a, b = a.bfloat16(), b.bfloat16()
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        rates[precision] = 2 * size**3 / seconds(lambda a=a, b=b: a @ b, device)
    source = torch.empty(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    rates["copy"] = 2 * 4 * source.numel() / seconds(lambda: target.copy_(source), device)
    return rates


@click.command()
@click.argument("recipe", default="cifar10")
@click.option("--device", default="auto", show_default=True)
@click.option("--batch-size", type=click.IntRange(1), help="The recipe's own where not given.")
@click.option("--steps", type=click.IntRange(1), help="In a repeat; 10 on a GPU, else 1.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@click.option("--row", "only", multiple=True, help="Only these rows; may be repeated.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(
    recipe: str, device: str, batch_size: int | None, steps: int | None, repeats: int, only: tuple[str, ...], json_file
) -> None:
    """Images per second of a training step of RECIPE (moco_v2_r50, moco_v1_r50, cifar10), data in place."""
    where = choose_device(device)
    steps = steps or (10 if where.type == "cuda" else 1)
    contestants, images = rows(recipe, batch_size, where, only)
    about, runs = {}, {}
    for name, row in contestants.items():
        runs[name], about[name] = timed(row, where, steps)
    result = race(runs, images * steps, repeats, warm_up=0)
    run = resolved(recipe, batch_size, where, "fp32")
    work = work_of(run, pictures(run, where), where)
    rates = machine(where, {row.precision for row in contestants.values()})
    for name, row in contestants.items():
        in_a_second = result["per_second"][name] / images
        about[name]["of_matrix_rate"] = in_a_second * work["flop"] / rates[row.precision]
        about[name]["of_copy_rate"] = in_a_second * work["bytes"] / rates["copy"]
        if recipe in TRAFFIC:
            moved, of_images = TRAFFIC[recipe]
            about[name]["of_bandwidth"] = in_a_second * moved * images / of_images / rates["copy"]
    result |= {"about": about, "work": work, "machine": rates, "batch": images}
    kind = torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    report(f"{recipe}, batch {images}, {kind}, {steps} steps x {repeats}", result, json_file)
    for name, figures in about.items():
        print(f"{name:<20}", ", ".join(f"{key} {value:.3g}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
