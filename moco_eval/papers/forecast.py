"""What a run would take on this machine, time and memory, from seconds of small timed pieces of its own work.

Nothing is written and nothing comes from a cache. Loading images is left out; encoder, recipe and data are the run's.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from moco_eval.data.boxes.samples import image_size
from moco_eval.data.boxes.scenes import CANVAS, DIGITS
from moco_eval.data.masks.scenes import CLASSES
from moco_eval.detection.task import DetectionTask
from moco_eval.papers import cost
from moco_eval.results.environment import peak_memory_mb
from moco_eval.runtime.text import duration
from moco_eval.segmentation.inputs import fitted
from moco_eval.segmentation.task import SegmentationTask

PIECE = 1.0  # seconds at most of a timed piece: a dry run is short


@dataclass(frozen=True)
class Part:
    """A part of a run's work.

    Attributes:
        images: that go through it in the whole run.
        batch: images at once, in one process.
    """

    pieces: cost.Pieces
    images: float
    batch: int


@dataclass(frozen=True)
class Forecast:
    """What a run takes.

    Attributes:
        seconds: None where a step does not fit into memory.
        memory: bytes of one process.
        took: seconds of the probe.
    """

    seconds: float | None
    memory: float
    took: float
    device: torch.device
    processes: int

    @property
    def phrase(self) -> str:
        where = f"{self.device}, {torch.get_num_threads()} threads" if self.device.type == "cpu" else str(self.device)
        if self.seconds is None:
            return f"in all: not even a part of an image fits into the memory of {where}"
        each = f" in each of {self.processes} processes" if self.processes > 1 else ""
        return (
            f"in all about {duration(self.seconds)} and {self.memory / 1e9:.1f} GB{each}: a prediction, from a probe "
            f"of {self.took:.0f} s on {where}; loading images is not in it"
        )


def forecast(
    parts: Iterable[Part], device: torch.device, processes: int, seconds: float = 0.0, memory: float = 0.0
) -> Forecast:
    """Time and weigh the parts, in turn.

    Args:
        seconds, memory: known beside the parts; bytes of one process.
    """
    began, most = time.perf_counter(), 0.0
    for part in parts:
        each, weight = probed(part, device)
        if each is None:
            return Forecast(None, 0.0, time.perf_counter() - began, device, processes)
        seconds, most = seconds + each * part.images, max(most, weight)
    at_once = processes if device.type == "cuda" else 1  # processes share a CPU
    return Forecast(seconds / at_once, memory + most, time.perf_counter() - began, device, processes)


def probed(part: Part, device: torch.device) -> tuple[float | None, float]:
    """Seconds of an image, None where memory is too small; and bytes of a batch, from how they grow with its images."""
    each, peaks = list[float](), [(0.0, peak_memory_mb(device.type))]
    for images, seconds in cost.timed(part.pieces, device, PIECE):
        each.append(seconds)
        peaks.append((images, peak_memory_mb(device.type)))
    (few, less), (many, peak) = peaks[-2:] if len(peaks) > 2 else [peaks[-1], peaks[-1]]
    growth = max(0.0, peak - less) / (many - few) if many > few else 0.0
    return each[-1] if each else None, 1e6 * (peak + growth * max(0.0, part.batch - many))


def of_detection(task: DetectionTask, processes: int, device: torch.device) -> Forecast:
    """All trials: iterations, precise BN as a third of as many, and the test images."""
    recipe, data = task.config, task.limited(task.at_hand) if task.at_hand else None
    batch = recipe.batch_size // recipe.accumulate // processes
    classes = len(data.classes) if data else len(DIGITS)
    trained = (recipe.schedule.iterations + recipe.precise_bn / 3) * recipe.batch_size
    parts = [
        Part(cost.detector_pieces(task.encoder, recipe, classes, training, at_once, device), task.trials * images, size)
        for training, at_once, images, size in (
            (True, min(batch, cost.CPU_BATCH), trained, batch),
            (False, 1, _test_images(task, data), 1),
        )
    ]
    return forecast(parts, device, processes)


def of_segmentation(task: SegmentationTask, processes: int, device: torch.device) -> Forecast:
    """All trials: the crops of all iterations, and as many as cover the test images."""
    recipe, data = task.config, task.limited(task.at_hand) if task.at_hand else None
    batch = recipe.batch_size // processes
    classes = len(data.classes) if data else len(CLASSES)
    size = image_size(data.test[0].image) if data else (CANVAS, CANVAS)
    crops = _test_images(task, data) * cost.crops_of(fitted(size, recipe.test.fit), recipe)
    parts = [
        Part(
            cost.segmenter_pieces(task.encoder, recipe, classes, training, at_once, device), task.trials * images, most
        )
        for training, at_once, images, most in (
            (True, min(batch, cost.CPU_BATCH), recipe.schedule.iterations * recipe.batch_size, batch),
            (False, 1, crops, 1),
        )
    ]
    return forecast(parts, device, processes)


def _test_images(task: DetectionTask | SegmentationTask, data: object) -> int:
    if data:
        return len(data.test)  # type: ignore[attr-defined]
    assert task.scenes
    return min(task.scenes.test, task.limit or task.scenes.test)
