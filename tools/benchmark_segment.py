#!/usr/bin/env python3
"""A training step of `segment` beside the same network and step written plainly with torchvision, in one run.

Plain is torchvision's dilated ResNet with mmsegmentation's two heads, cross entropy at the crop's size and SGD, on
tensors that are there already; ours is the trainer with its loader, losses and checks. Each measurement is a process of
its own, so that its peak memory is its own; the two take turns. Figures are medians over repeats of the median step, on
a CPU in seconds of the process; the ratio is plain seconds over ours.

    python tools/benchmark_segment.py --crop 128 --batch-size 2
    python tools/benchmark_segment.py --crop 512 --batch-size 16 --device cuda --precision bf16 --iterations 40
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet50
from torchvision.models._utils import IntermediateLayerGetter

from moco_eval.config import load as configs
from moco_eval.config.segmentation import SegmentConfig
from moco_eval.data.masks.folder import read_mask_folder
from moco_eval.data.masks.scenes import write_mask_scenes
from moco_eval.encoders.load import load
from moco_eval.results.environment import hardware, peak_memory_mb
from moco_eval.results.record import Cost
from moco_eval.runtime.device import autocast, wait_for
from moco_eval.runtime.launch import processes
from moco_eval.segmentation import inputs
from moco_eval.segmentation.networks import FcnHead, auxiliary_head, build_segmenter
from moco_eval.segmentation.train import Trainer

WARM_UP = 2  # steps that are not counted
CLASSES = 11


def recipe_of(options: argparse.Namespace) -> SegmentConfig:
    """The FCN of mmselfsup at the size that was asked for."""
    wanted = {
        "views.crop": options.crop,
        "batch_size": options.batch_size,
        "precision": options.precision,
        "workers": 0,
    }
    wanted |= {"views.fit": "null", "views.scales": "[1, 1]", "views.distort": "false"}
    return configs.load("vocaug_fcn_20k", "segment", SegmentConfig, [f"{key}={value}" for key, value in wanted.items()])


def ours(options: argparse.Namespace, device: torch.device, folder: Path) -> Callable[[], object]:
    """A step of the trainer, its images read and cropped."""
    recipe = recipe_of(options)
    data = read_mask_folder(write_mask_scenes(folder / "scenes", train=32, test=2))
    model = build_segmenter(load("random:resnet50"), CLASSES, recipe).to(device).train()
    trainer = Trainer(model, recipe, folder / "run", device, Cost(options.device))
    stream = inputs.training_batches(data, data.train, recipe, 0, (0, 0, 0))
    return lambda: trainer.step(next(stream), 0)


def plain(options: argparse.Namespace, device: torch.device, _folder: Path) -> Callable[[], object]:
    """A step of plain code."""
    stages = {"layer3": "layer3", "layer4": "layer4"}
    body = IntermediateLayerGetter(resnet50(replace_stride_with_dilation=[False, True, True]), stages)
    head, auxiliary = FcnHead(2048, CLASSES, 0.1), auxiliary_head(1024, CLASSES, 0.1)
    model = nn.ModuleList([body, head, auxiliary]).to(device).train()
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    size = (options.crop, options.crop)
    images = torch.randn(options.batch_size, 3, *size, device=device)
    masks = torch.randint(0, CLASSES, (options.batch_size, *size), device=device)

    def step() -> float:
        sgd.zero_grad()
        with autocast(device, options.precision):
            maps = body(images)
            scores = [head(maps["layer4"]), auxiliary(maps["layer3"])]
        large = [F.interpolate(score.float(), size, mode="bilinear") for score in scores]
        loss = F.cross_entropy(large[0], masks) + 0.4 * F.cross_entropy(large[1], masks)
        loss.backward()
        sgd.step()
        return loss.item()

    return step


ROWS = {"plain": plain, "ours": ours}


def measure(row: str, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Seconds of a step (median) and peak memory in MB of one row, in this process."""
    seconds = []
    with processes(options.device) as device:
        step = ROWS[row](options, device, folder)
        for _ in range(WARM_UP + options.iterations):
            started = time.perf_counter() if options.device != "cpu" else time.process_time()
            step()
            wait_for(device)
            seconds.append((time.perf_counter() if options.device != "cpu" else time.process_time()) - started)
    return {"seconds": statistics.median(seconds[WARM_UP:]), "peak_memory_MB": peak_memory_mb(options.device)}


def in_a_process(row: str) -> dict[str, float]:
    """What `measure` says of a row, in a process of its own."""
    words = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--row", row]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{row} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(options.row, options, Path(folder))))
        return
    runs: dict[str, list[dict[str, float]]] = {row: [] for row in ROWS}
    for _ in range(options.repeats):
        for row in ROWS:
            runs[row].append(in_a_process(row))
    medians = {
        row: {key: statistics.median(run[key] for run in several) for key in several[0]}
        for row, several in runs.items()
    }
    for row, values in medians.items():
        print(f"{row:<6} {values['seconds']:8.3f} s a step   peak {values['peak_memory_MB']:,.0f} MB")
    ratio = medians["plain"]["seconds"] / medians["ours"]["seconds"]
    print(f"ratio  {ratio:8.2f}")
    if options.json:
        values = {"rows": medians, "ratio": {"ours": ratio}, "hardware": hardware(), "options": sys.argv[1:]}
        options.json.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
