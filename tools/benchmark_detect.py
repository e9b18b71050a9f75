#!/usr/bin/env python3
"""Fine-tuning on both engines: the same recipe, encoder and images, in one run.

Each measurement is a process of its own, so that its peak memory is its own; the engines take turns. An iteration is
loading, forward, backward and step. Figures are medians over repeats of the median iteration; the ratio is
detectron2's seconds over ours. Without detectron2 ours is timed alone. DATA is a folder in VOC format; without one the
built-in scenes are taken.

    python tools/benchmark_detect.py --recipe digits_r50_c4 --encoder random:resnet50_quarter
    python tools/benchmark_detect.py DATA --recipe r50_c4_24k --device cuda --set precision=bf16 --iterations 60
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

import torch

from moco_eval.config import load as configs
from moco_eval.config.detection import DetectConfig, Scenes
from moco_eval.config.load import dump
from moco_eval.data.boxes.samples import DetectionData
from moco_eval.data.boxes.voc import read_voc_folder
from moco_eval.detection import inputs
from moco_eval.detection.task import open_digits
from moco_eval.encoders.load import load
from moco_eval.results.environment import hardware, peak_memory_mb
from moco_eval.results.record import Cost
from moco_eval.runtime.device import wait_for
from moco_eval.runtime.launch import processes

WARM_UP = 2  # iterations that are not counted


def measure(engine: str, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Seconds per iteration (median) and peak memory in MB of one engine, in this process."""
    recipe = configs.load(options.recipe, "detect", DetectConfig, options.set)
    data = read_voc_folder(options.data, None, None, clip=True) if options.data else open_digits(folder, SCENES)
    seconds = []
    with processes(options.device) as device:
        step = (ours if engine == "torchvision" else theirs)(options, recipe, data, folder)
        for _ in range(WARM_UP + options.iterations):
            started = time.perf_counter()
            step()
            wait_for(device)
            seconds.append(time.perf_counter() - started)
    cpu = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    return {
        "seconds": statistics.median(seconds[WARM_UP:]),
        "peak_memory_MB": peak_memory_mb(options.device),
        "cpu_seconds": cpu,
    }


SCENES = Scenes(train=64, test=2)


def ours(options: argparse.Namespace, recipe: DetectConfig, data: DetectionData, folder: Path) -> Callable[[], Any]:
    """One iteration of the torchvision engine."""
    from moco_eval.detection.detector import build_detector
    from moco_eval.detection.fine_tune import Trainer
    from moco_eval.runtime.batch_norm import share_statistics

    device = torch.device(options.device)
    detector = build_detector(load(options.encoder), len(data.classes), recipe, len(data.keypoints))
    detector = share_statistics(detector, recipe.bn).to(device).train()
    trainer = Trainer(detector, recipe, folder / "run", device, Cost(options.device))
    samples = inputs.trainable(data.train, recipe.masks, recipe.keypoints)
    stream = inputs.training_batches(samples, recipe, 0, WARM_UP + options.iterations)
    return lambda: trainer.step(next(stream), 0)


def theirs(options: argparse.Namespace, recipe: DetectConfig, data: DetectionData, folder: Path) -> Callable[[], Any]:
    """One iteration of detectron2's trainer."""
    from detectron2.utils.events import EventStorage

    from moco_eval.detection import detectron2_engine as engine
    from moco_eval.detection.detectron2_config import config_of

    encoder = load(options.encoder)
    cfg = config_of(recipe, encoder, len(data.classes), len(data.keypoints), options.device)
    model = engine.build_detector(cfg, encoder).train()
    sgd = engine._Optimisation(model, cfg, folder / "run", Cost(options.device))
    samples = inputs.trainable(data.train, recipe.masks, recipe.keypoints)
    registered = engine._registered(data, samples, cfg)
    loader = engine._loader(registered.__enter__(), recipe)  # left registered until this process ends
    trainer = engine._Trainer(model, loader, sgd.optimizer, recipe, Cost(options.device), torch.device(options.device))
    trainer.storage, trainer.iter = EventStorage(0).__enter__(), 0
    return trainer.run_step


def in_a_process(engine: str, arguments: list[str]) -> dict[str, float]:
    """What `measure` says of an engine, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, *arguments, "--engine", engine], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{engine} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--recipe", default="digits_r50_c4")
    parser.add_argument("--encoder", default="random:resnet50_quarter")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(options.engine, options, Path(folder) / "scenes")))
        return
    recipe = configs.load(options.recipe, "detect", DetectConfig, options.set)
    engines = ("detectron2", "torchvision") if find_spec("detectron2") else ("torchvision",)
    runs: dict[str, list[dict[str, float]]] = {engine: [] for engine in engines}
    for _ in repeat(None, options.repeats):
        for engine in engines:
            runs[engine].append(in_a_process(engine, sys.argv[1:]))
    report(runs, recipe, options)


def report(runs: dict[str, list[dict[str, float]]], recipe: DetectConfig, options: argparse.Namespace) -> None:
    """A line for each engine, and the ratio pair by pair."""
    result: dict[str, Any] = {"recipe": dump(recipe), "encoder": options.encoder, "hardware": hardware(), "runs": runs}
    for engine, measured in runs.items():
        seconds = statistics.median(run["seconds"] for run in measured)
        hours = seconds * recipe.schedule.iterations / 3600
        memory = statistics.median(run["peak_memory_MB"] for run in measured)
        print(
            f"{engine:<12} {seconds:8.3f} s/iteration  {recipe.batch_size / seconds:8.1f} images/s  "
            f"{memory:8.0f} MB  {hours:8.2f} h for {recipe.schedule.iterations} iterations"
        )
    if "detectron2" in runs:
        pairs = [t["seconds"] / o["seconds"] for t, o in zip(runs["detectron2"], runs["torchvision"])]
        result["ratio"] = {"torchvision": statistics.median(pairs)}
        print(f"ours is {statistics.median(pairs):.2f} times as fast ({min(pairs):.2f} to {max(pairs):.2f})")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
