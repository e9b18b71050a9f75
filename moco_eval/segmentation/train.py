"""Training on masks: this process's share of each batch, exact resume; of a sweep the choice of its head."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from moco_eval.config.segmentation import SegmentConfig
from moco_eval.data.masks.samples import SegmentationData
from moco_eval.errors import InputError
from moco_eval.results.fine_tuning import FineTuning
from moco_eval.results.record import Cost
from moco_eval.runtime import collectives, console, rank
from moco_eval.runtime.device import autocast, convolutions, to_device
from moco_eval.runtime.seeds import seed_of
from moco_eval.runtime.stop import Stop
from moco_eval.segmentation import inputs
from moco_eval.segmentation.evaluate import counts_of_heads
from moco_eval.segmentation.networks import Segmenter, sweep_of
from moco_eval.segmentation.recipe import learning_rate
from moco_eval.segmentation.scores import metrics_of

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)  # and with them our own synchronised ones


def optimizer_for(model: Segmenter, recipe: SegmentConfig) -> torch.optim.Optimizer:
    """SGD or AdamW; each head of a sweep has its own decay, and its rate as `times` that of the recipe."""
    chosen = recipe.optimizer
    if recipe.sweep is None:
        groups = _groups(model, chosen.weight_decay, 1.0, chosen.decay_norms)
    else:
        groups = []
        for head, (lr, decay) in zip(model.heads, sweep_of(recipe)):
            groups += _groups(head, decay, lr / chosen.lr, chosen.decay_norms)
    if chosen.kind == "adamw":
        return torch.optim.AdamW(groups, lr=chosen.lr)
    return torch.optim.SGD(groups, lr=chosen.lr, momentum=chosen.sgd_momentum)


def _groups(model: nn.Module, decay: float, times: float, decay_norms: bool) -> list[dict]:
    norms = {id(p) for module in model.modules() if isinstance(module, NORMS) for p in module.parameters()}
    parts: tuple[list, list] = ([], [])
    for parameter in model.parameters():
        parts[id(parameter) in norms].append(parameter)
    decays = (decay, decay if decay_norms else 0.0)
    return [{"params": part, "weight_decay": value, "times": times} for part, value in zip(parts, decays) if part]


def train(
    model: Segmenter,
    data: SegmentationData,
    recipe: SegmentConfig,
    output: Path,
    device: torch.device,
    cost: Cost,
    stop: Stop,
) -> None:
    """Train to the end and choose among the heads, or go on from checkpoints/last.pth. Collective."""
    samples, chooses = inputs.held_out(data.train, recipe)
    if not samples:
        raise InputError(f"{data.name} has {len(data.train)} training image, of which a sweep holds one out; give more")
    if recipe.data.shuffle_masks:
        samples = inputs.shuffled_masks(samples, recipe.seed)
    trainer = Trainer(model, recipe, output, device, cost)
    if trainer.finished:
        return
    mean = model.mean.flatten().round().int().tolist()
    place = (rank.rank(), rank.world_size())
    model.train()
    trainer.train(inputs.training_batches(data, samples, recipe, trainer.done, mean, place), stop)
    for buffer in model.buffers():
        collectives.broadcast_(buffer)  # local BN: every process judges with the first one's statistics
    if chooses:
        with cost.clock():
            model.chosen.fill_(best_head(model, data, chooses, recipe, device, stop))
    trainer.save(finished=True)


def best_head(
    model: Segmenter, data: SegmentationData, samples: list, recipe: SegmentConfig, device: torch.device, stop: Stop
) -> int:
    """Of a sweep, the head with the highest mIoU on the images held out; of equals the first. Collective."""
    heads = range(len(model.heads))
    counts = counts_of_heads(model, data, samples, recipe, device, stop, list(heads)).sum(axis=1)
    scores = [metrics_of(counts[head])["mIoU"] if counts[head].any() else 0.0 for head in heads]
    best = int(np.argmax(scores))
    lr, decay = sweep_of(recipe)[best]
    console.log(
        f"head {best + 1} of {len(heads)} (lr {lr:g}, weight decay {decay:g}) has mIoU {scores[best]:.2f} on "
        f"{len(samples)} training images held out (the others {min(scores):.2f} to {max(scores):.2f})"
    )
    return best


class Trainer(FineTuning):
    """A segmentation and its optimizer; `finished`: with its head chosen."""

    def __init__(self, model: Segmenter, recipe: SegmentConfig, output: Path, device: torch.device, cost: Cost):
        super().__init__("segment", model, optimizer_for(model, recipe), recipe, learning_rate, output, device, cost)

    def step(self, batch: inputs.Batch, iteration: int) -> dict[str, Tensor]:
        """One iteration on this process's images; returns the losses, means over the processes.

        `loss` is the sum of the others, of a sweep their mean.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, iteration) * group["times"]
        self.optimizer.zero_grad()
        torch.manual_seed(seed_of(self.recipe.seed, iteration + 1, rank.rank()))  # dropout's
        images, masks = (to_device(tensor, self.device) for tensor in batch)
        with autocast(self.device, self.recipe.precision):
            losses = self.ddp(images, masks)
        with convolutions(self.device, self.recipe.precision):
            loss = torch.stack(list(losses.values())).sum()
            loss.backward()
        self.optimizer.step()
        mean = loss.detach() / len(self.model.heads)
        values = torch.stack([mean, *(value.detach() for value in losses.values())])
        return dict(zip(("loss", *losses), collectives.all_sum(values) / rank.world_size()))
