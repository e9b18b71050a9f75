"""The engine that installs with pip."""

from pathlib import Path

import numpy as np
import torch

from moco_eval import runtime
from moco_eval.data.boxes import DetectionData
from moco_eval.detection import inputs
from moco_eval.detection.average_precision import Detections
from moco_eval.detection.detector import Detector, build_detector
from moco_eval.detection.fine_tune import train
from moco_eval.detection.recipe import DetectConfig
from moco_eval.encoders.encoder import Encoder
from moco_eval.results import Cost


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
    model = build_detector(encoder, len(data.classes), recipe, len(data.keypoints)).to(device)
    with runtime.Stop() as stop:
        train(model, data, recipe, output, device, cost, stop)
        with cost.clock():
            return _detect(model, data, recipe, device, stop)


@torch.no_grad()
def _detect(
    model: Detector, data: DetectionData, recipe: DetectConfig, device: torch.device, stop: runtime.Stop
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
