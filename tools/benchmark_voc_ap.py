#!/usr/bin/env python3
"""VOC average precision: ours and detectron2's evaluator on the same drawn detections, in one run.

Both start from detections in memory and annotations that are already read (reading them takes both the same), and
end with AP, AP50 and AP75 by the 11-point rule, rounded as detectron2 does. Each figure is the median over repeats;
the ratio is detectron2's time over ours. Without detectron2 ours is timed alone.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

import numpy as np

from moco_eval.data.boxes.samples import Sample
from moco_eval.data.boxes.voc import VOC_CLASSES
from moco_eval.detection.average_precision import Detections, voc_ap

SIDE = 500  # pixels of an image


def draw(images: int, detections: int, seed: int) -> tuple[list[Sample], list[Detections]]:
    """Images with one to six objects; a third of the detections lie near one, the others anywhere."""
    random = np.random.default_rng(seed)
    truth, detected = [], []
    for number in range(images):
        count = int(random.integers(1, 7))
        boxes, labels = _boxes(random, count).round(), random.integers(0, len(VOC_CLASSES), count)
        difficult = random.random(count) < 0.1
        truth.append(Sample(str(number), Path(), (SIDE, SIDE), boxes, labels, difficult, np.zeros(count, bool)))
        guesses, classes = _boxes(random, detections), random.integers(0, len(VOC_CLASSES), detections)
        near, which = random.random(detections) < 1 / 3, random.integers(0, count, detections)
        guesses[near] = boxes[which[near]] + random.normal(0, 12, (int(near.sum()), 4))
        guesses[:, 2:] = np.maximum(guesses[:, 2:], guesses[:, :2] + 1)
        classes[near] = labels[which[near]]
        scores = -np.sort(-random.uniform(0.05, 1, detections)).astype(np.float32)
        detected.append(Detections(guesses.astype(np.float32).astype(float), scores.astype(float), classes))
    return truth, detected


def _boxes(random: np.random.Generator, count: int) -> np.ndarray:
    corners = random.uniform(0, SIDE - 220, (count, 2))
    return np.concatenate((corners, corners + random.uniform(20, 200, (count, 2))), axis=1)


def prepare_theirs(folder: Path, truth: list[Sample], detected: list[Detections]) -> Callable[[], dict[str, float]]:
    """detectron2's evaluator over the same detections, its annotations written and read beforehand."""
    import torch
    from detectron2.data import MetadataCatalog
    from detectron2.evaluation import pascal_voc_evaluation
    from detectron2.structures import Boxes, Instances

    (folder / "Annotations").mkdir()
    (folder / "ImageSets/Main").mkdir(parents=True)
    (folder / "ImageSets/Main/test.txt").write_text("".join(f"{sample.image_id}\n" for sample in truth))
    outputs = []
    for sample, detections in zip(truth, detected):
        (folder / "Annotations" / f"{sample.image_id}.xml").write_text(_xml(sample))
        pascal_voc_evaluation.parse_rec(str(folder / "Annotations" / f"{sample.image_id}.xml"))
        instances = Instances((SIDE, SIDE))
        instances.pred_boxes = Boxes(torch.tensor(detections.boxes, dtype=torch.float32))
        instances.scores = torch.tensor(detections.scores, dtype=torch.float32)
        instances.pred_classes = torch.tensor(detections.labels)
        outputs.append({"instances": instances})
    about = {"dirname": str(folder), "split": "test", "year": 2007, "thing_classes": list(VOC_CLASSES)}
    MetadataCatalog.get("benchmark").set(**about)

    def judge() -> dict[str, float]:
        evaluator = pascal_voc_evaluation.PascalVOCDetectionEvaluator("benchmark")
        evaluator.reset()
        evaluator.process([{"image_id": sample.image_id} for sample in truth], outputs)
        return {name: float(value) for name, value in evaluator.evaluate()["bbox"].items()}

    return judge


def _xml(sample: Sample) -> str:
    items = []
    for box, label, difficult in zip(sample.boxes.astype(int).tolist(), sample.labels, sample.difficult):
        corners = zip(("xmin", "ymin", "xmax", "ymax"), (box[0] + 1, box[1] + 1, box[2], box[3]))
        inner = "".join(f"<{name}>{value}</{name}>" for name, value in corners)
        items.append(
            f"<object><name>{VOC_CLASSES[label]}</name><pose>Left</pose><truncated>0</truncated>"
            f"<difficult>{int(difficult)}</difficult><bndbox>{inner}</bndbox></object>"
        )
    return f"<annotation>{''.join(items)}</annotation>"


def timed(judge: Callable[[], dict[str, float]], repeats: int) -> tuple[float, dict[str, float]]:
    """Median seconds, and what came out."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        metrics = judge()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100, help="per image")
    parser.add_argument("--repeats", type=int, default=5, help="of ours")
    parser.add_argument("--their-repeats", type=int, default=1, help="of detectron2's")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    truth, detected = draw(arguments.images, arguments.detections, seed=0)
    result: dict = {"images": arguments.images, "detections": arguments.detections, "seconds": {}, "ratio": {}}
    ours, metrics = timed(lambda: voc_ap(truth, detected, VOC_CLASSES, rounded=True)[0], arguments.repeats)
    result["seconds"]["ours"], result["metrics"] = ours, metrics
    print(f"ours        {ours:8.2f} s  AP {metrics['AP']:.4f}  AP50 {metrics['AP50']:.4f}  AP75 {metrics['AP75']:.4f}")
    if find_spec("detectron2"):
        with tempfile.TemporaryDirectory() as folder:
            judge = prepare_theirs(Path(folder), truth, detected)
            theirs, reference = timed(judge, arguments.their_repeats)
        result["seconds"]["detectron2"], result["ratio"]["detectron2"] = theirs, theirs / ours
        result["largest_difference"] = max(abs(reference[name] - metrics[name]) for name in reference)
        print(
            f"detectron2  {theirs:8.2f} s  AP {reference['AP']:.4f}  AP50 {reference['AP50']:.4f}  "
            f"AP75 {reference['AP75']:.4f}"
        )
        print(f"{theirs / ours:.0f} times as fast; largest difference {result['largest_difference']:.1e} points")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
