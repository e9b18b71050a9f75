"""Which engine trains and runs the detector: detectron2 where it is installed, else torchvision's blocks."""

import importlib
import importlib.util
import warnings
from pathlib import Path

import torch
from torchvision.models.resnet import BasicBlock

from moco_eval.config.detection import DetectConfig
from moco_eval.data.boxes.samples import DetectionData
from moco_eval.detection import torchvision_engine
from moco_eval.detection.average_precision import Detections
from moco_eval.encoders.architectures import resnet
from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.export.detectron2 import settings_of
from moco_eval.errors import InputError, message_of
from moco_eval.results.record import Cost
from moco_eval.runtime.console import log


def choose(engine: str, encoder: Encoder, recipe: DetectConfig) -> str:
    """The engine that `--engine` means here: 'torchvision' or 'detectron2'.

    Raises:
        InputError: detectron2 is asked for and not installed, or cannot do what the recipe says.
    """
    if engine == "torchvision":
        return engine
    why = _obstacle(encoder, recipe)
    if engine == "detectron2" and why:
        raise InputError(f"--engine detectron2: {why}; or take --engine torchvision, which computes the same")
    chosen = "torchvision" if why else "detectron2"
    log(f"engine: {chosen}{f' ({why})' if why else ''}")
    return chosen


def _obstacle(encoder: Encoder, recipe: DetectConfig) -> str | None:
    """Why detectron2 cannot do it here; None where it can."""
    if importlib.util.find_spec("detectron2") is None:
        return (
            "detectron2 is not installed; it is built from its source, https://github.com/facebookresearch/detectron2"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what torch has deprecated since
            importlib.import_module("detectron2.modeling")
    except Exception as error:  # a build for another torch or Python fails in its own ways
        return f"detectron2 is installed and does not import ({' '.join(message_of(error).split())[:200]})"
    settings, why = settings_of(encoder, Path("weights"))
    if settings is None:
        return why
    if recipe.optimizer.kind != "sgd" or recipe.input.jitter:
        return "it trains by SGD on images of a drawn shorter side, and the recipe asks for AdamW or large-scale jitter"
    if recipe.model != "r50_fpn" and resnet(encoder.arch).block is BasicBlock:
        return f"detectron2 builds {encoder.arch} with an FPN only"
    if recipe.accumulate > 1:
        return "detectron2 takes a batch in one part and the recipe says accumulate"
    return None


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
    if engine == "detectron2":
        from moco_eval.detection import detectron2_engine

        return detectron2_engine.fine_tune_and_detect(encoder, data, recipe, output, device, cost)
    return torchvision_engine.fine_tune_and_detect(encoder, data, recipe, output, device, cost)
