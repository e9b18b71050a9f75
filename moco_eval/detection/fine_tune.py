"""Fine-tuning on the torchvision engine: SGD, precise BN at the end, exact resume."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from moco_eval import files, runtime
from moco_eval.data.boxes import DetectionData
from moco_eval.detection import inputs
from moco_eval.detection.detector import Detector
from moco_eval.detection.inputs import seed_of
from moco_eval.detection.recipe import DetectConfig, learning_rate
from moco_eval.errors import InputError
from moco_eval.results import Cost

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


def optimizer_for(model: nn.Module, recipe: DetectConfig) -> torch.optim.SGD:
    """SGD with momentum; the weights and biases of norms are not decayed."""
    norms = {id(p) for module in model.modules() if isinstance(module, NORMS) for p in module.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in norms]},
        {"params": [p for p in model.parameters() if id(p) in norms], "weight_decay": 0.0},
    ]
    sgd = recipe.optimizer
    return torch.optim.SGD(groups, lr=sgd.lr, momentum=sgd.sgd_momentum, weight_decay=sgd.weight_decay)


def train(
    model: Detector,
    data: DetectionData,
    recipe: DetectConfig,
    output: Path,
    device: torch.device,
    cost: Cost,
    stop: runtime.Stop,
) -> None:
    samples = inputs.trainable(data.train)
    if recipe.data.shuffle_labels:
        samples = inputs.shuffle_labels(samples, recipe.seed)
    optimizer = optimizer_for(model, recipe)
    start, total = _load(output, model, optimizer, cost), recipe.schedule.iterations
    metrics = output / "metrics.jsonl"
    files.cut_lines(metrics, lambda line: line["iteration"] <= start)
    model.train()
    stream = inputs.training_batches(samples, recipe, start, total + recipe.precise_bn)
    with runtime.progress("detect", total, recipe.batch_size, done=start) as advance:
        for iteration in range(start, total):
            with cost.clock():
                losses = _step(model, optimizer, next(stream), recipe, iteration, device)
            cost.images += recipe.batch_size
            done = iteration + 1
            advance(note=f"loss {losses['loss']:.3f}")
            if done % recipe.log_every == 0 or done == total:
                line = {"iteration": done, "lr": learning_rate(recipe, iteration), **losses}
                files.append_line(metrics, line)
            asked = stop.signal is not None
            if asked or done % recipe.checkpoints.every == 0 or done == total:
                _save(output, model, optimizer, done, cost)
            stop.check(f"iteration {done} of {total} is saved; run the same command again to go on")
    with cost.clock():
        _precise_bn(model, stream, recipe, device, stop)


def _step(
    model: Detector,
    optimizer: torch.optim.Optimizer,
    batch: inputs.Batch,
    recipe: DetectConfig,
    iteration: int,
    device: torch.device,
) -> dict[str, float]:
    """One iteration; the anchors and regions it samples hang on the seed and the iteration."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe, iteration)
    torch.manual_seed(seed_of(recipe.seed, iteration + 1))
    with runtime.autocast(device, recipe.precision):
        losses = model(*_to(batch, device))
    loss = sum(losses.values())
    values = {"loss": loss.item()} | {name: value.item() for name, value in losses.items()}
    runtime.require_finite(values["loss"], f"iteration {iteration + 1}", "take a smaller optimizer.lr")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return values


def _to(batch: inputs.Batch, device: torch.device) -> inputs.Batch:
    images, targets = batch
    return (
        [image.to(device, non_blocking=True) for image in images],
        [{name: value.to(device, non_blocking=True) for name, value in target.items()} for target in targets],
    )


@torch.no_grad()
def _precise_bn(
    model: Detector,
    stream: Iterator[inputs.Batch],
    recipe: DetectConfig,
    device: torch.device,
    stop: runtime.Stop,
) -> None:
    """Replace each BN's running statistics by those over the next `precise_bn` training batches.

    Mean of the batches' means; variance of all their elements together, from the mean of second moments.
    """
    if recipe.precise_bn == 0:
        return
    norms = [module for module in model.modules() if isinstance(module, NORMS)]
    sums = [(torch.zeros_like(norm.running_mean), torch.zeros_like(norm.running_var)) for norm in norms]
    counts = [0] * len(norms)
    momenta = [norm.momentum for norm in norms]
    hooks = [norm.register_forward_pre_hook(_counter(counts, place)) for place, norm in enumerate(norms)]
    for norm in norms:
        norm.momentum = 1.0  # the running statistics become the batch's own
    for number in range(recipe.precise_bn):
        stop.check("the trained detector is saved; run the same command again to go on")
        torch.manual_seed(seed_of(recipe.seed, recipe.schedule.iterations + number + 1))
        with runtime.autocast(device, recipe.precision):
            model(*_to(next(stream), device))
        for norm, count, (mean, square) in zip(norms, counts, sums):
            mean += norm.running_mean / recipe.precise_bn
            biased = norm.running_var * ((count - 1) / count)
            square += (biased + norm.running_mean**2) / recipe.precise_bn
    for norm, momentum, hook, (mean, square) in zip(norms, momenta, hooks, sums):
        hook.remove()
        norm.momentum = momentum
        norm.running_mean.copy_(mean)
        norm.running_var.copy_((square - mean**2).clamp_min(0))


def _counter(counts: list[int], place: int):
    def count(_module: nn.Module, arguments: tuple[Tensor]) -> None:
        counts[place] = arguments[0].numel() // arguments[0].shape[1]

    return count


# State


def _save(output: Path, model: nn.Module, optimizer: torch.optim.Optimizer, iteration: int, cost: Cost) -> None:
    state = {
        "format": "moco-eval/detect@1",
        "iteration": iteration,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "seconds": cost.seconds,
        "images": cost.images,
    }
    with files.atomic(output / "checkpoints" / "last.pth") as temporary:
        torch.save(state, temporary)


def _load(output: Path, model: nn.Module, optimizer: torch.optim.Optimizer, cost: Cost) -> int:
    """The iterations already done: those of checkpoints/last.pth, or none."""
    path = output / "checkpoints" / "last.pth"
    if not path.is_file():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is not readable ({reason}); delete it to start this run again") from None
    cost.seconds, cost.images = state["seconds"], state["images"]
    runtime.log(f"going on from iteration {state['iteration']} of {path}")
    return state["iteration"]
