"""Which engine trains and runs the detector: detectron2 where it is installed, else torchvision's blocks."""

from pathlib import Path

import torch

from moco_eval.data.boxes import DetectionData
from moco_eval.detection import torchvision_engine
from moco_eval.detection.average_precision import Detections
from moco_eval.detection.recipe import DetectConfig
from moco_eval.encoders.encoder import Encoder
from moco_eval.results import Cost


def choose(engine: str, encoder: Encoder, recipe: DetectConfig) -> str:
    """The engine that `--engine` means here: 'torchvision' or 'detectron2'.

    Raises:
        InputError: an engine that is not installed, or that cannot build the detector.
    """
    return "torchvision"


def fine_tune_and_detect(
    engine: str,
    encoder: Encoder,
    data: DetectionData,
    recipe: DetectConfig,
    output: Path,
    device: torch.device,
    cost: Cost,
) -> list[Detections]:
    """Train the detector from the encoder, or go on, and run it on the test split; one entry per test image.

    Args:
        output: run directory (of one trial); holds checkpoints/last.pth and metrics.jsonl.
        cost: seconds and images are added to it.
    Raises:
        InputError, RunFailed, Interrupted.
    """
    return torchvision_engine.fine_tune_and_detect(encoder, data, recipe, output, device, cost)
