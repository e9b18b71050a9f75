"""The engine that installs with pip: Faster R-CNN C4 of torchvision's blocks, by detectron2's definitions.

Where torchvision's blocks differ from detectron2's C4 model they are overridden here: anchors (unrounded,
sizes first, fixed stride), RoIAlign (aligned, adaptive sampling), L1 box losses and their normalisers,
initialisation, no padding beyond the batch, no decay of norms; resizing is in inputs.py. docs/detection.md
lists them all.
"""

import copy
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import roi_align

from moco_eval import files, runtime
from moco_eval.data.boxes import DetectionData
from moco_eval.data.loader import swap_colours
from moco_eval.detection import inputs
from moco_eval.detection.average_precision import Detections
from moco_eval.detection.recipe import DetectConfig, learning_rate
from moco_eval.encoders.build import ARCHITECTURES
from moco_eval.encoders.encoder import Encoder, Preprocessing
from moco_eval.errors import InputError
from moco_eval.results import Cost

STRIDE = 16  # of layer3, on which C4 works
STAGES = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


def fine_tune_and_detect(
    encoder: Encoder,
    data: DetectionData,
    recipe: DetectConfig,
    output: Path,
    device: torch.device,
    cost: Cost,
) -> list[Detections]:
    """Train the detector from the encoder, or go on from the last checkpoint, and run it on the test split.

    Args:
        output: run directory; holds checkpoints/last.pth and metrics.jsonl.
        cost: seconds and images are added to it.
    Returns:
        One entry per test image, in their order, in pixels of the image on disk.
    Raises:
        InputError: an architecture without stride 16 at layer3, or an unreadable image.
        RunFailed: a loss that is not finite, with its iteration.
        Interrupted: stopped by a signal, with the state saved.
    """
    model = build_detector(encoder, len(data.classes), recipe).to(device)
    with runtime.Stop() as stop:
        _train(model, data, recipe, output, device, cost, stop)
        with cost.clock():
            return _detect(model, data, recipe, device, stop)


# The model


class _Anchors(AnchorGenerator):
    """Unrounded anchors, sizes before ratios, on a fixed stride."""

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device=None):
        sizes = torch.as_tensor(scales, dtype=dtype, device=device)[:, None]
        heights = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[None, :]
        width, height = (sizes / heights).flatten(), (sizes * heights).flatten()
        return torch.stack((-width, -height, width, height), dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        stride = torch.tensor(STRIDE, device=feature_maps[0].device)
        grids = [list(feature.shape[-2:]) for feature in feature_maps]
        anchors = torch.cat(self.grid_anchors(grids, [[stride, stride]] * len(grids)))
        return [anchors] * len(image_list.image_sizes)


class _ProposalHead(RPNHead):
    """Its scores and box deltas in fp32 whatever the precision: bf16 places a box to three digits only."""

    def forward(self, x):
        logits, deltas = super().forward(x)
        return [level.float() for level in logits], [level.float() for level in deltas]


class _ProposalNetwork(RegionProposalNetwork):
    """L1 instead of smooth L1; both losses over the number of anchors asked for, not of those found."""

    def compute_loss(self, objectness, pred_bbox_deltas, labels, regression_targets):
        sampled = self.fg_bg_sampler(labels)
        positive, negative = (torch.where(torch.cat(masks))[0] for masks in sampled)
        chosen = torch.cat((positive, negative))
        asked = self.fg_bg_sampler.batch_size_per_image * len(labels)
        wanted = torch.cat(regression_targets)[positive]
        box_loss = F.l1_loss(pred_bbox_deltas[positive], wanted, reduction="sum") / asked
        objectness_loss = F.binary_cross_entropy_with_logits(
            objectness.flatten()[chosen], torch.cat(labels)[chosen], reduction="sum"
        )
        return objectness_loss / asked, box_loss


class _AlignedPool(nn.Module):
    """RoIAlign as detectron2's version 2: half a pixel offset, as many samples as the region has pixels."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        return roi_align(features["0"], boxes, self.size, 1 / STRIDE, sampling_ratio=0, aligned=True)


class _Heads(RoIHeads):
    """Classes and boxes of regions with an L1 box loss; class 0 is the background, inside the engine only."""

    def forward(self, features, proposals, image_shapes, targets=None):
        if self.training:
            proposals, _, labels, wanted = self.select_training_samples(proposals, targets)
        pooled = self.box_roi_pool(features, proposals, image_shapes)
        logits, deltas = (scores.float() for scores in self.box_predictor(self.box_head(pooled)))
        if not self.training:
            found = self.postprocess_detections(logits, deltas, proposals, image_shapes)
            return [dict(zip(("boxes", "scores", "labels"), image)) for image in zip(*found)], {}
        labels, wanted = torch.cat(labels), torch.cat(wanted)
        objects = torch.where(labels > 0)[0]
        ours = deltas.reshape(len(labels), -1, 4)[objects, labels[objects]]
        box_loss = F.l1_loss(ours, wanted[objects], reduction="sum") / labels.numel()
        return [], {"loss_classifier": F.cross_entropy(logits, labels), "loss_box_reg": box_loss}


class FasterRCNN(nn.Module):
    """Faster R-CNN on layer3 (C4); layer4, an extra BN and the mean over places are the head of each region.

    In training: 8-bit RGB images (3, H, W) of any size and their targets (boxes (N, 4), labels (N,) from 1)
    to losses by name. In evaluation: images to dicts of boxes, scores and labels, in the images' pixels.
    Source: arXiv:1911.05722, appendix A.3, and the released detection code.
    """

    def __init__(self, encoder: Encoder, classes: int, recipe: DetectConfig):
        super().__init__()
        net = encoder.backbone
        self.backbone = nn.Sequential(OrderedDict((name, copy.deepcopy(getattr(net, name))) for name in STAGES))
        self.rpn = _proposal_network(encoder.feature_dim // 2, recipe)
        self.heads = _region_heads(copy.deepcopy(net.layer4), encoder.feature_dim, classes, recipe)
        self.requires_grad_(True)
        pixels = encoder.preprocessing or Preprocessing()
        mean, std = (255 * torch.tensor(values)[:, None, None] for values in pixels.rgb())
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.swap = pixels.channels != "RGB"

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None):
        batch = self._batch(images)
        features = {"0": self.backbone(batch.tensors)}
        proposals, proposal_losses = self.rpn(batch, features, targets)
        found, losses = self.heads(features, proposals, batch.image_sizes, targets)
        return losses | proposal_losses if self.training else found

    def _batch(self, images: list[Tensor]) -> ImageList:
        """Normalise, then pad with zeros to the largest of the batch."""
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        height, width = (max(sides) for sides in zip(*sizes))
        batch = self.mean.new_zeros((len(images), 3, height, width))
        for place, image in zip(batch, images):
            place[:, : image.shape[1], : image.shape[2]] = (image.to(batch) - self.mean) / self.std
        return ImageList(swap_colours(batch) if self.swap else batch, sizes)


def _proposal_network(channels: int, recipe: DetectConfig) -> RegionProposalNetwork:
    rpn, anchors = recipe.rpn, recipe.anchors
    return _ProposalNetwork(
        _Anchors((anchors.sizes,), (anchors.ratios,)),
        _ProposalHead(channels, len(anchors.sizes) * len(anchors.ratios)),
        fg_iou_thresh=rpn.foreground_iou,
        bg_iou_thresh=rpn.background_iou,
        batch_size_per_image=rpn.batch_per_image,
        positive_fraction=rpn.positive_fraction,
        pre_nms_top_n={"training": rpn.pre_nms_train, "testing": rpn.pre_nms_test},
        post_nms_top_n={"training": rpn.post_nms_train, "testing": rpn.post_nms_test},
        nms_thresh=rpn.nms,
    )


def _region_heads(layer4: nn.Module, channels: int, classes: int, recipe: DetectConfig) -> RoIHeads:
    parts = OrderedDict(
        layer4=layer4, norm=nn.BatchNorm2d(channels), mean=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten()
    )
    predictor = FastRCNNPredictor(channels, classes + 1)
    for layer, std in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    return _Heads(
        _AlignedPool(recipe.roi.pool_size),
        nn.Sequential(parts),
        predictor,
        fg_iou_thresh=recipe.roi.foreground_iou,
        bg_iou_thresh=recipe.roi.foreground_iou,
        batch_size_per_image=recipe.roi.batch_per_image,
        positive_fraction=recipe.roi.positive_fraction,
        bbox_reg_weights=None,
        score_thresh=recipe.test.score,
        nms_thresh=recipe.test.nms,
        detections_per_img=recipe.test.detections,
    )


def check_architecture(encoder: Encoder) -> None:
    """Raises InputError where the encoder is no ResNet with stride 16 at layer3."""
    arch = ARCHITECTURES.get(encoder.arch)
    if arch is None:
        raise InputError(f"detect needs a ResNet and {encoder.arch!r} is none; take one of {', '.join(ARCHITECTURES)}")
    if arch.cifar_stem:
        raise InputError(
            f"detect cannot take {encoder.arch}: its CIFAR stem leaves layer3 at stride 4, C4 is "
            f"defined at 16; take {encoder.arch.partition('_cifar')[0]}"
        )


def build_detector(encoder: Encoder, classes: int, recipe: DetectConfig) -> FasterRCNN:
    """The detector with every backbone tensor of the encoder, bit for bit; the rest is drawn by the seed."""
    torch.manual_seed(_seed(recipe.seed, 0))
    model = FasterRCNN(encoder, classes, recipe)
    ours = model.backbone.state_dict() | {f"layer4.{k}": v for k, v in model.heads.box_head.layer4.state_dict().items()}
    theirs = encoder.backbone.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].cpu(), tensor.cpu()) for name, tensor in theirs.items())
    runtime.log(f"detector: {len(ours)} of {len(theirs)} backbone tensors of {encoder.source}, bit for bit")
    return model


# Training


def optimizer_for(model: nn.Module, recipe: DetectConfig) -> torch.optim.SGD:
    """SGD with momentum; the weights and biases of norms are not decayed."""
    norms = {id(p) for module in model.modules() if isinstance(module, NORMS) for p in module.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in norms]},
        {"params": [p for p in model.parameters() if id(p) in norms], "weight_decay": 0.0},
    ]
    sgd = recipe.optimizer
    return torch.optim.SGD(groups, lr=sgd.lr, momentum=sgd.sgd_momentum, weight_decay=sgd.weight_decay)


def _train(
    model: FasterRCNN,
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
    model: FasterRCNN,
    optimizer: torch.optim.Optimizer,
    batch: inputs.Batch,
    recipe: DetectConfig,
    iteration: int,
    device: torch.device,
) -> dict[str, float]:
    """One iteration; the anchors and regions it samples hang on the seed and the iteration."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe, iteration)
    torch.manual_seed(_seed(recipe.seed, iteration + 1))
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


def _seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, 4, number]).generate_state(1)[0])


@torch.no_grad()
def _precise_bn(
    model: FasterRCNN,
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
        torch.manual_seed(_seed(recipe.seed, recipe.schedule.iterations + number + 1))
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


# Detection


@torch.no_grad()
def _detect(
    model: FasterRCNN, data: DetectionData, recipe: DetectConfig, device: torch.device, stop: runtime.Stop
) -> list[Detections]:
    """Run the detector on the test images, one by one, and scale its boxes to the images on disk."""
    model.eval()
    found = []
    for (pixels,), (size,) in runtime.track(inputs.images_to_detect(data.test, recipe), "evaluate", len(data.test)):
        stop.check("the trained detector is saved; run the same command again to go on")
        with runtime.autocast(device, recipe.precision):
            (result,) = model([pixels.to(device)])
        width, height = size
        boxes = result["boxes"].float().cpu().double().numpy()
        boxes *= np.tile((width / pixels.shape[2], height / pixels.shape[1]), 2)
        boxes = np.clip(boxes, 0, (width, height, width, height))
        found.append(Detections(boxes, result["scores"].cpu().double().numpy(), result["labels"].cpu().numpy() - 1))
    return found
