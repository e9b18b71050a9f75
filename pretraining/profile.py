"""Where the time of a pretraining step goes; nothing is kept."""

import itertools
import math
import os
import time
from pathlib import Path

import torch

from moco_eval.errors import InputError
from moco_eval.runtime.collectives import all_sum, gather
from moco_eval.runtime.device import to_device, wait_for
from moco_eval.runtime.rank import world_size
from pretraining.bottleneck import Parts, launch_seconds, seconds, worker_seconds
from pretraining.plan import Plan
from pretraining.shuffle_bn import permutation, shuffle
from pretraining.train import Trainer
from pretraining.views import Batch


def profile(run: Plan, device: torch.device, steps: int) -> Parts:
    """Run some steps as training would, then their parts alone; the same on every rank, each with its own times.

    Raises:
        InputError: the schedule has too few steps.
    """
    warm = max(3, steps // 10)
    if steps + warm > run.steps:
        raise InputError(
            f"--profile {steps} runs {steps + warm} steps ({warm} to warm up), the schedule has {run.steps}; "
            f"take fewer, or --set schedule.epochs={math.ceil((steps + warm) / run.steps_per_epoch)}"
        )
    trainer = Trainer(run, Path(os.devnull), device)
    batch, loop, waiting = _loop(trainer, warm, steps)
    feed, images = trainer.feed, len(batch.index)
    items = [(0, index) for index in range(images)]
    worker, decoding = (0.0, 0.0) if feed.in_memory else worker_seconds(feed.views, items)
    views = torch.stack([batch.view_q, batch.view_k]).cpu()
    pinned = views.pin_memory() if device.type == "cuda" else views
    train, augment = (lambda: trainer.train_step(batch)), feed.device_part(items)
    return Parts(
        device=_name(device),
        images=images,
        steps=steps,
        loop=loop,
        waiting=waiting,
        training=seconds(train, device),
        augmentation=seconds(augment, device),
        launching=launch_seconds(train, device) + launch_seconds(augment, device),
        copies=0.0 if feed.in_memory else seconds(lambda: to_device(pinned, device), device),
        collectives=seconds(lambda: exchange(trainer, batch), device) if world_size() > 1 else 0.0,
        worker=worker / images,
        decoding=decoding / images,
        workers=run.config.workers,
    )


def _loop(trainer: Trainer, warm: int, steps: int) -> tuple[Batch, float, float]:
    """The real loop, after `warm` steps that do not count: its last batch, seconds of a step, of them waiting."""
    batches = trainer.batches()
    for batch in itertools.islice(batches, warm):
        trainer.train_step(batch)
    wait_for(trainer.device)
    trainer.measured.restart()
    started = time.perf_counter()
    for batch in itertools.islice(batches, steps):
        trainer.train_step(batch)
    wait_for(trainer.device)
    loop, waiting = (time.perf_counter() - started) / steps, trainer.measured.waiting.take()() / steps
    batches.close()
    return batch, loop, waiting


def exchange(trainer: Trainer, batch: Batch) -> None:
    """What the processes send each other in a step: images and keys, in both directions of the loss; gradients."""
    order, _ = permutation(len(batch.index) * world_size(), torch.Generator())
    for _ in range(1 + trainer.config.symmetric):
        if trainer.run.shuffles:
            shuffle(batch.view_k, order)
        gather(torch.zeros(len(batch.index), trainer.config.dim, device=trainer.device))
    all_sum(torch.cat([weight.grad.flatten() for weight in trainer.model.parameters() if weight.grad is not None]))


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "the CPU" if device.type == "cpu" else device.type
