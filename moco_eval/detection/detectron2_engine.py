"""The engine that is detectron2: its model, loader, augmentations, SGD and trainer, on our data and from our encoder.

Nothing here is bit for bit repeatable after an interruption: the loader's order starts anew, from another seed.
"""

import contextlib
import io
import logging
import re
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, build_detection_train_loader
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.engine.hooks import PreciseBN
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import BoxMode, Instances
from detectron2.utils.env import seed_all_rng
from torch import nn
from torch.utils.data import get_worker_info

from moco_eval import limits
from moco_eval.config.detection import DetectConfig
from moco_eval.data.boxes.samples import DetectionData, Sample
from moco_eval.data.pixels import SIXTEEN_BITS, open_image, reason_of
from moco_eval.data.workers import outlive_signals
from moco_eval.detection import inputs
from moco_eval.detection.average_precision import Detections, gather
from moco_eval.detection.detectron2_config import config_of
from moco_eval.detection.masks import decoded, encoded
from moco_eval.detection.recipe import learning_rate
from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.export.detectron2 import to_detectron2
from moco_eval.errors import InputError, RunFailed
from moco_eval.results import training_state
from moco_eval.results.record import Cost
from moco_eval.runtime import collectives, console, files, rank
from moco_eval.runtime.device import autocast
from moco_eval.runtime.seeds import seed_of
from moco_eval.runtime.stop import Stop

RESNET = re.compile(r"(backbone\.(bottom_up\.)?(stem|res\d)|roi_heads\.res5\.\d)\.")


def fine_tune_and_detect(
    encoder: Encoder,
    data: DetectionData,
    recipe: DetectConfig,
    output: Path,
    device: torch.device,
    cost: Cost,
) -> list[Detections]:
    """Train detectron2's model from the encoder, or go on from the last checkpoint, and run it on the test split.

    See `torchvision_engine.fine_tune_and_detect`: the same arguments, results and errors.
    """
    if recipe.bn == "sync" and rank.world_size() > 1 and device.type == "cpu":
        raise InputError("detectron2 has bn sync on GPUs only; take --set bn=naive_sync, or --engine torchvision")
    cfg = config_of(recipe, encoder, len(data.classes), len(data.keypoints), str(device))
    with _quiet(), Stop() as stop:
        seed_all_rng(seed_of(recipe.seed, 0))
        model = build_detector(cfg, encoder)
        _train(model, cfg, data, recipe, output, device, cost, stop)
        with cost.clock():
            return detect(model, cfg, data, recipe, device, stop)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """detectron2's own log and warnings are kept off stderr; what matters of them comes as an error."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "torch.fx")]
    before = [(logger, logger.level) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in before:
            logger.setLevel(level)


# The model


def build_detector(cfg: CfgNode, encoder: Encoder) -> nn.Module:
    """detectron2's model with every backbone tensor of the encoder, bit for bit; the rest as detectron2 draws it."""
    model = build_model(cfg)
    given = {_place(cfg, name): tensor for name, tensor in encoder.backbone.state_dict().items()}
    ours = model.state_dict()
    missing = sorted(given.keys() - ours.keys())
    assert not missing, f"detectron2's model has no place for {missing[:3]}"
    model.load_state_dict(given, strict=False)
    ours = model.state_dict()
    assert all(torch.equal(ours[name].cpu(), tensor.cpu()) for name, tensor in given.items())
    left = [name for name in ours if RESNET.match(name) and name not in given]
    assert not left, f"the encoder has nothing for {left[:3]}"
    console.log(f"detector: {len(given)} of {len(given)} backbone tensors of {encoder.source}, bit for bit")
    return model


def _place(cfg: CfgNode, name: str) -> str:
    """Where detectron2's detector has an encoder's tensor."""
    name = to_detectron2(name)
    if cfg.MODEL.BACKBONE.NAME != "build_resnet_backbone":
        return f"backbone.bottom_up.{name}"
    return f"roi_heads.{name}" if name.startswith("res5.") else f"backbone.{name}"


# Data


@contextlib.contextmanager
def _registered(data: DetectionData, samples: list[Sample], cfg: CfgNode) -> Iterator[CfgNode]:
    """The training images under a name of their own in detectron2's catalogue; yields the configuration with it."""
    name = f"moco_eval_{uuid.uuid4().hex}"
    bitmaps = any(isinstance(mask, dict) for sample in samples for mask in sample.masks)
    cfg = cfg.clone()
    cfg.DATASETS.TRAIN, cfg.INPUT.MASK_FORMAT = (name,), "bitmask" if bitmaps else "polygon"
    DatasetCatalog.register(name, lambda: [_record(number, sample, cfg) for number, sample in enumerate(samples)])
    meta = MetadataCatalog.get(name)
    meta.thing_classes = list(data.classes)
    if data.keypoints:
        meta.keypoint_names = list(data.keypoints)
        meta.keypoint_flip_map = [(data.keypoints[a], data.keypoints[b]) for a, b in data.keypoint_pairs]
    try:
        yield cfg
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def _record(number: int, sample: Sample, cfg: CfgNode) -> dict[str, Any]:
    """An image as detectron2's loaders describe it."""
    annotations: list[dict[str, Any]] = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label, "iscrowd": 0}
        for box, label in zip(sample.boxes.tolist(), sample.labels.tolist())
    ]
    if cfg.MODEL.MASK_ON:
        for annotation, mask in zip(annotations, sample.masks):
            annotation["segmentation"] = encoded(decoded(mask)) if isinstance(mask, dict) else mask
    if cfg.MODEL.KEYPOINT_ON and sample.keypoints is not None:
        for annotation, points in zip(annotations, sample.keypoints):
            annotation["keypoints"] = points.flatten().tolist()
    return _image(number, sample) | {"annotations": annotations}


def _image(number: int, sample: Sample) -> dict[str, Any]:
    width, height = sample.size
    return {"file_name": str(sample.path), "image_id": number, "width": width, "height": height}


class _Mapper(DatasetMapper):
    """detectron2's reading of an image, with its refusals in our words and the file's name."""

    outlives_signals = False

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        if get_worker_info() and not self.outlives_signals:
            outlive_signals()
            self.outlives_signals = True
        path = record["file_name"]
        try:
            with limits.open_unbuffered(path, "image") as file, open_image(io.BufferedReader(file), path) as image:
                deep = image.mode.startswith("I") and (image.mode != "I" or image.format in SIXTEEN_BITS)
            if not deep:
                return super().__call__(record)
        except InputError:
            raise
        except Exception as error:  # whatever a damaged file makes its decoder raise
            raise InputError(
                f"detectron2 cannot read {path}: {reason_of(error)}; replace it, or take it out of its split"
            ) from None
        raise InputError(f"{path} has 16-bit greys, which detectron2 cuts off at 255; take --engine torchvision")


def _loader(cfg: CfgNode, recipe: DetectConfig) -> Any:
    """detectron2's endless batches, with its resize and flip."""
    resize = T.ResizeShortestEdge(recipe.input.min_size_train, recipe.input.max_size, "choice")
    flip = [T.RandomFlip(recipe.input.flip)] if recipe.input.flip else []
    return build_detection_train_loader(cfg, mapper=_Mapper(cfg, True, augmentations=[resize, *flip]))


# Training


class _Trainer(SimpleTrainer):
    """detectron2's loop, in the recipe's precision, its seconds counted."""

    def __init__(self, model: nn.Module, loader: Any, optimizer: Any, recipe: DetectConfig, cost: Cost, device: Any):
        super().__init__(model, loader, optimizer)
        self.recipe, self.cost, self.on = recipe, cost, device

    def run_step(self) -> None:
        # Not detectron2's scheduler: it squeezes a warm-up that is longer than the schedule into it.
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.iter)
        try:
            with self.cost.clock(), autocast(self.on, self.recipe.precision):
                super().run_step()
        except FloatingPointError as error:
            reason = str(error).splitlines()[0].rstrip(".!")
            raise RunFailed(f"iteration {self.iter + 1}: {reason}; take a smaller optimizer.lr") from None
        self.cost.images += self.recipe.batch_size


class _Housekeeping(HookBase):
    """After each step: our metrics.jsonl and checkpoint, and the wish to stop."""

    def __init__(self, sgd: "_Optimisation", path: Path, recipe: DetectConfig, stop: Stop, advance: Any):
        self.sgd, self.path, self.recipe, self.stop, self.advance = sgd, path, recipe, stop, advance

    def after_step(self) -> None:
        recipe, done = self.recipe, self.trainer.iter + 1
        if rank.is_main():  # where detectron2 gathers the losses
            self._log(done)
        asked, _ = self.stop.look(done, False)
        if asked or done % recipe.checkpoints.every == 0 or done == recipe.schedule.iterations:
            self.sgd.save(done)
        if asked:
            total = recipe.schedule.iterations
            self.stop.check(f"iteration {done} of {total} is saved; run the same command to go on")

    def _log(self, done: int) -> None:
        values = {name: value for name, (value, _) in self.trainer.storage.latest().items() if "loss" in name}
        loss = values.pop("total_loss")
        self.advance(note=f"loss {loss:.3f}")
        if done % self.recipe.log_every == 0 or done == self.recipe.schedule.iterations:
            line = {"iteration": done, "lr": self.sgd.optimizer.param_groups[0]["lr"], "loss": loss, **values}
            files.append_line(self.path, line)


class _Optimisation:
    """SGD as detectron2 builds it, and how far it is."""

    def __init__(self, model: nn.Module, cfg: CfgNode, output: Path, cost: Cost):
        self.model, self.cost, self.path = model, cost, output / "checkpoints" / "last.pth"
        self.optimizer = build_optimizer(cfg, model)
        self.done, self.finished = training_state.load(self.path, model, self.optimizer, cost)

    def save(self, done: int, finished: bool = False) -> None:
        training_state.save(self.path, self.model, self.optimizer, done, finished, self.cost)


def _train(
    model: nn.Module,
    cfg: CfgNode,
    data: DetectionData,
    recipe: DetectConfig,
    output: Path,
    device: torch.device,
    cost: Cost,
    stop: Stop,
) -> None:
    """Train to the end and estimate the BN statistics anew, or go on from checkpoints/last.pth. Collective."""
    samples = inputs.trainable(data.train, recipe.masks, recipe.keypoints)
    if recipe.data.shuffle_labels:
        samples = inputs.shuffle_labels(samples, recipe.seed)
    sgd, total, metrics = _Optimisation(model, cfg, output, cost), recipe.schedule.iterations, output / "metrics.jsonl"
    if sgd.finished:
        return
    collectives.found_by_main(lambda: files.cut_lines(metrics, "iteration", sgd.done))
    seed_all_rng(seed_of(recipe.seed, 1 + sgd.done, rank.rank()))
    model.train()
    with _registered(data, samples, cfg) as named, _refusals():
        if sgd.done < total:
            with console.progress("detect", total, recipe.batch_size, done=sgd.done) as advance:
                loader = _loader(named, recipe)
                trainer = _Trainer(collectives.parallel(model), loader, sgd.optimizer, recipe, cost, device)
                trainer.register_hooks([_Housekeeping(sgd, metrics, recipe, stop, advance)])
                trainer.train(sgd.done, total)
        with cost.clock():
            _precise_bn(model, named, recipe, device, stop)
    sgd.save(total, finished=True)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """An image that a worker refuses comes with that worker's traceback: only its last line is said."""
    try:
        yield
    except InputError as error:
        if "Traceback" not in str(error):
            raise
        last = str(error).strip().splitlines()[-1]
        raise InputError(last.partition("InputError: ")[2] or last) from None


def _precise_bn(model: nn.Module, cfg: CfgNode, recipe: DetectConfig, device: torch.device, stop: Stop) -> None:
    """detectron2's own, on a loader of its own that runs in this process, as its trainer does."""
    if recipe.precise_bn == 0:
        return
    cfg = cfg.clone()
    cfg.DATALOADER.NUM_WORKERS = 0

    def batches() -> Iterator[Any]:
        for number, batch in enumerate(_loader(cfg, recipe)):
            _look(stop, recipe.schedule.iterations + number)
            yield batch

    with autocast(device, recipe.precision):
        PreciseBN(0, model, batches(), recipe.precise_bn).update_stats()
    for buffer in model.buffers():
        collectives.broadcast_(buffer)


def _look(stop: Stop, step: int) -> None:
    """Raises Interrupted on every process where any was asked to stop. Collective."""
    if stop.look(step, False)[0]:
        stop.check("the trained detector is saved; run the same command to go on")


# Detection


@torch.no_grad()
def detect(
    model: nn.Module,
    cfg: CfgNode,
    data: DetectionData,
    recipe: DetectConfig,
    device: torch.device,
    stop: Stop | None = None,
) -> list[Detections]:
    """Run detectron2's model on the test images, each process on every world-th; all of it, on every process.

    Raises:
        InputError: an unreadable image.
    """
    model.eval()
    resize = T.ResizeShortestEdge([recipe.input.min_size_test] * 2, recipe.input.max_size, "choice")
    read = _Mapper(False, augmentations=[resize], image_format=cfg.INPUT.FORMAT)
    first, world = rank.rank(), rank.world_size()
    detections = []
    samples = data.test[first::world]
    for number, sample in enumerate(console.track(samples, "evaluate", len(samples), world)):
        if stop is not None and number < len(data.test) // world:  # as many as every process has
            _look(stop, recipe.schedule.iterations + recipe.precise_bn + number)
        image = read(_image(number, sample))
        with autocast(device, recipe.precision):
            (result,) = model([image])
        detections.append(_detections(result["instances"].to("cpu")))
    return gather(detections, len(data.test))


def _detections(instances: Instances) -> Detections:
    """What was found in an image; keypoints half a pixel less, as COCO counts them."""
    masks = keypoints = None
    if instances.has("pred_masks"):
        masks = [encoded(mask) for mask in instances.pred_masks.numpy().astype(np.uint8)]
    if instances.has("pred_keypoints"):
        points = instances.pred_keypoints.double()
        keypoints = torch.cat((points[..., :2] - 0.5, points[..., 2:]), dim=-1).numpy()
    boxes, scores = instances.pred_boxes.tensor.double().numpy(), instances.scores.double().numpy()
    return Detections(boxes, scores, instances.pred_classes.numpy(), masks, keypoints)
