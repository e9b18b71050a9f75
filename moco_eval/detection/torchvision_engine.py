"""The engine that installs with pip."""

from itertools import zip_longest
from pathlib import Path

import torch

from moco_eval.config.detection import DetectConfig
from moco_eval.data.boxes.samples import DetectionData
from moco_eval.detection import inputs
from moco_eval.detection.average_precision import Detections, gather
from moco_eval.detection.detector import Detector, build_detector
from moco_eval.detection.fine_tune import train
from moco_eval.detection.masks import paste
from moco_eval.encoders.encoder import Encoder
from moco_eval.results.record import Cost
from moco_eval.runtime import console, rank
from moco_eval.runtime.batch_norm import share_statistics
from moco_eval.runtime.device import autocast, place, to_device
from moco_eval.runtime.stop import Stop


def fine_tune_and_detect(
    encoder: Encoder,
    data: DetectionData,
    recipe: DetectConfig,
    output: Path,
    device: torch.device,
    cost: Cost,
) -> list[Detections]:
    """Train the detector from the encoder, or go on from the last checkpoint, and run it on the test split.

    Collective: every process takes its share of each batch and of the test images.

    Args:
        output: run directory; holds checkpoints/last.pth and metrics.jsonl.
        cost: seconds and images are added to it.
    Returns:
        One entry per test image, in their order, in pixels of the image on disk; on every process.
    Raises:
        InputError: an architecture without stride 16 at layer3, or an unreadable image.
        RunFailed: a loss that is not finite, with its iteration.
        Interrupted: stopped by a signal, with the state saved.
    """
    model = build_detector(encoder, len(data.classes), recipe, len(data.keypoints))
    model = place(share_statistics(model, recipe.bn), device)
    with Stop() as stop:
        train(model, data, recipe, output, device, cost, stop)
        with cost.clock():
            return _detect(model, data, recipe, device, stop)


@torch.no_grad()
def _detect(
    model: Detector, data: DetectionData, recipe: DetectConfig, device: torch.device, stop: Stop
) -> list[Detections]:
    """Run the detector on the test images one by one, each process on every world-th of them."""
    model.eval()
    first, world = rank.rank(), rank.world_size()
    images = inputs.images_to_detect(data.test[first::world], recipe)
    rounds = range(-(-len(data.test) // world))
    before = recipe.schedule.iterations + recipe.precise_bn  # the steps that this Stop has seen
    detections = []
    for number, image in console.track(zip_longest(rounds, images), "evaluate", len(rounds), world):
        if stop.look(before + number, False)[0]:
            stop.check("the trained detector is saved; run the same command to go on")
        if image is not None:
            (pixels,), (size,) = image
            with autocast(device, recipe.precision):
                (result,) = model([to_device(pixels, device)])
            detections.append(on_disk(result, (pixels.shape[2], pixels.shape[1]), size))
    return gather(detections, len(data.test))


def on_disk(result: dict[str, torch.Tensor], resized: tuple[int, int], size: tuple[int, int]) -> Detections:
    """What the model found, in pixels of the image on disk; boxes that are cut to nothing go.

    Masks are pasted into that image; keypoints count whole pixels there, as COCO does, half a pixel less than boxes.

    Args:
        resized, size: width and height of the image that the model saw, and of the image on disk.
    """
    result = {name: values.cpu() for name, values in result.items()}
    scale = torch.tensor(size, dtype=torch.float64) / torch.tensor(resized)
    corners = (result["boxes"].unflatten(1, (2, 2)) * scale).clamp(min=torch.zeros(2), max=torch.tensor(size))
    kept = (corners[:, 1] > corners[:, 0]).all(dim=1)
    boxes, masks, keypoints = corners[kept].flatten(1), None, None
    if "masks" in result:
        masks = paste(result["masks"][kept], boxes, size)
    if "keypoints" in result:
        points = result["keypoints"][kept].double()
        keypoints = torch.cat((points[..., :2] * scale - 0.5, points[..., 2:]), dim=-1).numpy()
    scores, labels = result["scores"][kept].double().numpy(), result["labels"][kept].numpy() - 1
    return Detections(boxes.numpy(), scores, labels, masks, keypoints)
