#!/usr/bin/env python3
"""The photometric steps of MoCo v2 on a batch of uint8 views, on one device: ours, kornia's, torchvision v2's.

python tools/benchmark_augment.py [--device cuda] [--batch-size 256] [--size 224] [--repeats 5] [--json FILE]

- ours: colour jitter with parameters and order per image, grey, PIL's blur, flip; fused: the steps compiled as one.
- torchvision v2: the same transforms on tensors, image after image, since a call draws once for all it is given.
- kornia: where it is installed; parameters per image, one order of the jitter for the whole batch, a true Gaussian.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

import click
import numpy as np
import torch
from race import Run, race, report
from torchvision.transforms import v2

from moco_eval.data.augment.steps import Fuse, fusing, unfused
from moco_eval.runtime.device import choose_device, exact_arithmetic, wait_for
from pretraining.views import RECIPES


def contestants(views: torch.Tensor) -> dict[str, Run]:
    recipe, device, size = RECIPES["moco_v2"], views.device, views.shape[-1]
    u = recipe.uniforms(0, np.zeros(len(views)), np.arange(len(views)), 0)

    def ours(fuse: Fuse) -> torch.Tensor:
        with exact_arithmetic():  # as training does
            return recipe.apply(views, u, size, 1, fuse)

    transform = v2.Compose(
        [
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=0.5),
            v2.RandomHorizontalFlip(),
        ]
    )
    runs: dict[str, Run] = {
        "torchvision v2": lambda: torch.stack([transform(view) for view in views]),
        "ours": lambda: ours(unfused),
    }
    if device.type == "cuda":
        fuse = fusing(device, True)
        runs["ours, fused"] = lambda: ours(fuse)
    return runs | kornia(views)


def kornia(views: torch.Tensor) -> dict[str, Run]:
    try:
        import kornia.augmentation as K
    except ImportError:
        return {}
    both = K.AugmentationSequential(
        K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((13, 13), (0.1, 2.0), p=0.5),
        K.RandomHorizontalFlip(),
        data_keys=["input"],
    )
    return {"kornia": lambda: both(views.float() / 255)}


@click.command()
@click.option("--device", default="auto", show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@click.option("--size", type=click.IntRange(8), default=224, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(device: str, batch_size: int, size: int, repeats: int, json_file: Path | None) -> None:
    """Views per second on one device; one thread on a CPU."""
    torch.set_num_threads(1)
    where = choose_device(device)
    views = torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8, device=where)

    def waited(run: Run) -> Run:
        return lambda: (run(), wait_for(where))

    result = race({name: waited(run) for name, run in contestants(views).items()}, batch_size, repeats, warm_up=2)
    report(f"photometric steps, {batch_size} views of {size} pixels, {where}", result, json_file, "views/s")


if __name__ == "__main__":
    main()
