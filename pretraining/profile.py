"""Where the time of a pretraining step goes; nothing is kept."""

import itertools
import os
import time
from pathlib import Path

import torch

from moco_eval.bottleneck import Parts, seconds, wait_for
from moco_eval.data.cut import photo
from moco_eval.runtime import all_sum, gather, to_device, world_size
from pretraining.bn import permutation, shuffle
from pretraining.plan import Plan
from pretraining.train import Trainer
from pretraining.views import Batch


def profile(run: Plan, device: torch.device, steps: int) -> Parts:
    """Run some steps as training would, then their parts alone; the same on every rank, each with its own times."""
    trainer = Trainer(run, Path(os.devnull), device)
    warm = max(3, steps // 10)
    steps = min(steps, run.steps - warm)
    batches = trainer.batches()
    for batch in itertools.islice(batches, warm):
        trainer.train_step(batch)
    wait_for(device)
    trainer.measured.restart()
    started = time.perf_counter()
    for batch in itertools.islice(batches, steps):
        trainer.train_step(batch)
    wait_for(device)
    loop, waiting = (time.perf_counter() - started) / steps, trainer.measured.waited / steps
    batches.close()

    feed, images = trainer.feed, len(batch.index)
    items = [(0, index) for index in range(images)]
    files = run.images.pixels is None or feed.views.reference
    return Parts(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU",
        images=images,
        steps=steps,
        loop=loop,
        waiting=waiting,
        training=seconds(lambda: trainer.train_step(batch), device),
        augmentation=seconds(feed.device_part(items), device),
        copies=seconds(lambda: to_device(batch.view_q.cpu(), device), device) * 2,
        collectives=seconds(lambda: exchange(trainer, batch), device) if world_size() > 1 else 0.0,
        worker=seconds(lambda: feed.views.__getitems__(items), device, 2) / images if files else 0.0,
        decoding=seconds(lambda: [photo(run.images, i) for _, i in items], device, 2) / images if files else 0.0,
        workers=run.config.workers,
    )


def exchange(trainer: Trainer, batch: Batch) -> None:
    """What the processes send each other in a step: images, keys, gradients."""
    order, _ = permutation(len(batch.index) * world_size(), torch.Generator())
    if trainer.run.shuffles:
        shuffle(batch.view_k, order)
    gather(torch.zeros(len(batch.index), trainer.config.dim, device=trainer.device))
    all_sum(torch.cat([weight.grad.flatten() for weight in trainer.model.parameters() if weight.grad is not None]))
