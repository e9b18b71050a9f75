"""Fine-tuning on the torchvision engine: SGD or AdamW on this process's share of each batch, precise BN, exact resume.

Source: detectron2@02b5c4e2, engine/defaults.py and engine/hooks.py; fvcore 0.1.5, nn/precise_bn.py; read, not copied.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

from moco_eval.config.detection import DetectConfig
from moco_eval.data.boxes.samples import DetectionData
from moco_eval.detection import inputs
from moco_eval.detection.detector import Detector
from moco_eval.detection.recipe import learning_rate
from moco_eval.results.fine_tuning import FineTuning
from moco_eval.results.record import Cost
from moco_eval.runtime import collectives, console, rank
from moco_eval.runtime.batch_norm import NaiveSyncBatchNorm2d, SyncBatchNorm2d
from moco_eval.runtime.device import autocast, convolutions, to_device, with_float64
from moco_eval.runtime.seeds import seed_of
from moco_eval.runtime.stop import Stop

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)  # and with them our own synchronised ones
NORMS = (*BATCH_NORMS, nn.LayerNorm, nn.GroupNorm)


def optimizer_for(model: nn.Module, recipe: DetectConfig) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW; norms are not decayed, nor a ViT's position embedding.

    `lr_scale` of a group is its part of the learning rate.
    """
    settings, layers = recipe.optimizer, _layers(model, recipe)
    taken = {id(p) for group in layers for p in group["params"]}
    weights = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    norms = {id(p) for module in model.modules() if _is_undecayed(module) for p in module.parameters()}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in weights if id(p) not in norms]},
        {"params": [p for p in weights if id(p) in norms], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]] + layers
    if settings.kind == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.sgd_momentum, weight_decay=settings.weight_decay)


def _is_undecayed(module: nn.Module) -> bool:
    """Whether it is a norm, but for those of ViTDet's pyramid and heads: detectron2 decays its own layer norm."""
    return isinstance(module, NORMS) and not isinstance(module, LayerNorm2d)


def _layers(model: nn.Module, recipe: DetectConfig) -> list[dict[str, Any]]:
    """A ViT's own weights in groups by their layer, of which each has its part of the rate; nothing of other networks.

    Source: timm's param_groups_layer_decay, with detectron2's choice of what is decayed: biases too.
    """
    if recipe.model != "vitdet":
        return []
    from timm.optim._param_groups import param_groups_layer_decay

    vit: Any = model.backbone.body.backbone
    norms = [
        f"{name}.{part}"
        for name, module in vit.named_modules()
        if _is_undecayed(module)
        for part, _ in module.named_parameters(recurse=False)
    ]
    groups = param_groups_layer_decay(
        vit,
        weight_decay=recipe.optimizer.weight_decay,
        no_weight_decay_list=[*norms, "pos_embed"],
        weight_decay_exclude_1d=False,
        layer_decay=recipe.optimizer.layer_decay,
    )
    # timm gives the last block the whole rate, ViTDet the detector on it
    return [group | {"lr_scale": group["lr_scale"] * recipe.optimizer.layer_decay} for group in groups]


def train(
    model: Detector,
    data: DetectionData,
    recipe: DetectConfig,
    output: Path,
    device: torch.device,
    cost: Cost,
    stop: Stop,
) -> None:
    """Train to the end and estimate the BN statistics anew, or go on from checkpoints/last.pth. Collective."""
    torch.backends.cudnn.benchmark = False  # no two batches have the same size
    samples = inputs.trainable(data.train, recipe.masks, recipe.keypoints)
    if recipe.data.shuffle_labels:
        samples = inputs.shuffle_labels(samples, recipe.seed)
    trainer = Trainer(model, recipe, output, device, cost)
    if trainer.finished:
        return
    last = recipe.schedule.iterations + recipe.precise_bn
    place = (rank.rank(), rank.world_size())
    stream = inputs.training_batches(samples, recipe, trainer.done, last, *place, data.keypoint_pairs)
    model.train()
    trainer.train(stream, stop)
    with cost.clock():
        precise_bn(model, stream, recipe, device, stop)
    for buffer in model.buffers():
        collectives.broadcast_(buffer)  # local BN without precise statistics: every process judges with the first one's
    trainer.save(finished=True)


class Trainer(FineTuning):
    """A detector and its optimizer; `finished`: with precise BN behind them."""

    def __init__(self, model: Detector, recipe: DetectConfig, output: Path, device: torch.device, cost: Cost):
        super().__init__("detect", model, optimizer_for(model, recipe), recipe, learning_rate, output, device, cost)

    def step(self, batch: inputs.Batch, iteration: int) -> dict[str, Tensor]:
        """One iteration on this process's images; returns the losses, means over the processes.

        The batch comes in `accumulate` parts. The anchors and regions that each part samples hang on the seed, the
        iteration and the part.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, iteration) * group.get("lr_scale", 1.0)
        self.optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        for part, more in parts(batch, self.recipe, iteration, self.device):
            with self.ddp.no_sync() if more and self.ddp is not self.model else nullcontext():
                with autocast(self.device, self.recipe.precision):
                    losses = self.ddp(*part)
                loss = sum(losses.values()) / self.recipe.accumulate
                with convolutions(self.device, self.recipe.precision):
                    loss.backward()
            for name, value in {"loss": loss * self.recipe.accumulate, **losses}.items():
                sums[name] = sums.get(name, 0) + value.detach()
        self.optimizer.step()
        together = collectives.all_sum(torch.stack(list(sums.values()))) / (rank.world_size() * self.recipe.accumulate)
        return dict(zip(sums, together))


def parts(
    batch: inputs.Batch, recipe: DetectConfig, iteration: int, device: torch.device
) -> Iterator[tuple[inputs.Batch, bool]]:
    """This process's images in `accumulate` parts on the device, each with its seed set, and whether more follow."""
    images, targets = batch
    size = len(images) // recipe.accumulate
    for number in range(recipe.accumulate):
        mine = slice(number * size, (number + 1) * size)
        torch.manual_seed(seed_of(recipe.seed, iteration + 1, rank.rank() * recipe.accumulate + number))
        yield _to((images[mine], targets[mine]), device), number + 1 < recipe.accumulate


def _to(batch: inputs.Batch, device: torch.device) -> inputs.Batch:
    """Images and targets on the device, without waiting; masks stay on the host, where they are drawn."""
    images, targets = batch
    return (
        [to_device(image, device) for image in images],
        [
            {name: to_device(value, device) if isinstance(value, Tensor) else value for name, value in target.items()}
            for target in targets
        ],
    )


@torch.no_grad()
def precise_bn(
    model: Detector, stream: Iterator[inputs.Batch], recipe: DetectConfig, device: torch.device, stop: Stop
) -> None:
    """Replace each BN's running statistics by those over the next `precise_bn` training batches of all processes.

    A batch counts by its elements; the variance is that of all elements together, from the mean of second moments.
    Collective. Source: fvcore 0.1.5, update_bn_stats, whose every process keeps the statistics of its own batches.
    """
    if recipe.precise_bn == 0:
        return
    trained = (module for module in model.modules() if all(p.requires_grad for p in module.parameters(recurse=False)))
    norms = [module for module in trained if isinstance(module, BATCH_NORMS)]  # not those behind the last map
    if not norms:
        console.log(f"precise_bn {recipe.precise_bn}: this detector has no batch norm, nothing is estimated anew")
        return
    wide = with_float64(device)
    sums = [torch.zeros(2, norm.num_features, dtype=torch.float64, device=wide) for norm in norms]
    counts, elements = [0] * len(norms), [0] * len(norms)
    momenta = [norm.momentum for norm in norms]
    hooks = [norm.register_forward_pre_hook(_counter(counts, place)) for place, norm in enumerate(norms)]
    for norm in norms:
        norm.momentum = 1.0  # the running statistics become the batch's own
    total = recipe.schedule.iterations
    for iteration in range(total, total + recipe.precise_bn):
        if stop.look(iteration, False)[0]:
            stop.check("the trained detector is saved; run the same command to go on")
        for part, _ in parts(next(stream), recipe, iteration, device):
            with autocast(device, recipe.precision):
                model(*part)
            for place, norm in enumerate(norms):
                elements[place] += counts[place]
                sums[place] += counts[place] * _moments(norm, counts[place])
    for norm, momentum, hook, moments, count in zip(norms, momenta, hooks, sums, elements):
        hook.remove()
        norm.momentum = momentum
        everywhere = collectives.all_sum(torch.tensor(count, dtype=torch.float64, device=wide))
        mean, square = collectives.all_sum(moments) / everywhere
        norm.running_mean.copy_(mean.float())
        norm.running_var.copy_((square - mean**2).clamp_min(0).float())


def _moments(norm: nn.Module, count: int) -> Tensor:
    """Mean and mean square of the batch just seen, (2, C), from running statistics that are this batch's own.

    Running variances are over one element less than there were, but for naive SyncBN's.
    """
    wide = with_float64(norm.running_mean.device)
    mean, var = norm.running_mean.to(wide).double(), norm.running_var.to(wide).double()
    if isinstance(norm, nn.SyncBatchNorm | SyncBatchNorm2d):
        count *= rank.world_size()
    biased = isinstance(norm, NaiveSyncBatchNorm2d) and rank.world_size() > 1
    return torch.stack((mean, (var if biased else var * (count - 1) / count) + mean**2))


def _counter(counts: list[int], place: int):
    def count(_module: nn.Module, arguments: tuple[Tensor]) -> None:
        counts[place] = arguments[0].numel() // arguments[0].shape[1]

    return count
