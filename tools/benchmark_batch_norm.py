#!/usr/bin/env python3
"""Split batch norm against ordinary batch norm, forward and backward, in one run: the two ways that training uses.

As training runs them, channels last: without a compiler (CPU), with one (GPU); `--device cuda` on a GPU.
Each figure is the median over repeats that alternate between the two; a ratio is split over ordinary.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

import torch
from torch import nn

from moco_eval.runtime.batch_norm import SplitBatchNorm2d
from moco_eval.runtime.device import exact_arithmetic

SHAPES = [(64, 64, 56, 56), (64, 256, 28, 28), (64, 512, 14, 14)]  # of a ResNet-50, for 64 images


def repeat(layer: nn.Module, images: torch.Tensor, gradient: torch.Tensor) -> Callable[[], float]:
    """Seconds of one forward and backward pass."""

    def once() -> float:
        images.grad = None
        started = time.perf_counter()
        layer(images).backward(gradient)
        if images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return once


def compare(shape: tuple[int, ...], compiled: bool, device: str, repeats: int) -> dict[str, float]:
    """Median milliseconds of both, alternating."""
    images = torch.randn(shape, device=device).to(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn_like(images)
    times: dict[str, list[float]] = {}
    layers = {"ordinary": nn.BatchNorm2d(shape[1]), "split": SplitBatchNorm2d(shape[1], 8)}
    passes = {}
    for name, layer in layers.items():
        torch.compiler.reset()
        net = nn.Sequential(layer).to(device)
        if compiled:
            net.compile()
        passes[name] = repeat(net, images, gradient)
        for _ in range(3):
            passes[name]()
    for _ in range(repeats):
        for name, once in passes.items():
            times.setdefault(name, []).append(1000 * once())
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result: dict = {"torch": torch.__version__, "device": arguments.device, "ms": {}, "ratio": {}}
    print(f"{'shape':<20} {'compiled':<9} {'ordinary ms':>12} {'split ms':>9} {'ratio':>6}")
    for compiled in (False, True):
        for shape in SHAPES:
            with exact_arithmetic():
                medians = compare(shape, compiled, arguments.device, arguments.repeats)
            ratio = medians["split"] / medians["ordinary"]
            name = f"{'compiled' if compiled else 'eager'}.{'x'.join(map(str, shape))}"
            result["ms"][name], result["ratio"][name] = medians, ratio
            figures = f"{medians['ordinary']:>12.1f} {medians['split']:>9.1f} {ratio:>6.2f}"
            print(f"{'x'.join(map(str, shape)):<20} {compiled!s:<9} {figures}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
