"""Images per second of one core, two views of each, from JPEG files: the official recipe against ours.

python tools/benchmark_loader.py FOLDER [--recipe moco_v2] [--repeats 5] [--json FILE]

FOLDER holds full-size photos. Every row is run in each repeat, so a drift of the machine's speed meets all alike; a
ratio is the median over repeats of a row's rate over the first row's in the same repeat.

- official: PIL decoding, the published transforms twice, to normalised float32 (main_moco.py's loader).
- device: what a worker does with views.backend: device; the rest is done on the training device.
- cpu: the same and the rest on this core, to finished uint8 views.
- decode: the fastest decoding that gives PIL's pixels, nothing else.
- lightly: lightly's MoCo v2 transform, where that is installed (moco_v2 only).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

import click
import torch
from race import Run, race, report
from torchvision import transforms

from moco_eval.data.augment.decode import photo
from moco_eval.data.augment.two_views import TwoViews
from moco_eval.data.catalogue import open_images
from moco_eval.data.image_set import ImageSet
from pretraining.views import RECIPES

BATCH = 32


def contestants(images: ImageSet, name: str) -> dict[str, Run]:
    """Each goes once over all images."""
    recipe = RECIPES[name]
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    published = transforms.Compose([recipe.reference(224), transforms.ToTensor(), normalise])
    every = range(len(images))
    batches = [[(0, i) for i in every[start : start + BATCH]] for start in every[::BATCH]]
    ours = {
        "device": TwoViews(images, recipe, 224, 0, finished=False),
        "cpu": TwoViews(images, recipe, 224, 0),
    }
    return {
        "official": lambda: [(published(image), published(image)) for image in map(images.image, every)],
        **{row: lambda views=views: [views.__getitems__(batch) for batch in batches] for row, views in ours.items()},
        "decode": lambda: [photo(images, i) for i in every],
        **(lightly(images) if name == "moco_v2" else {}),
    }


def lightly(images: ImageSet) -> dict[str, Run]:
    """lightly's transform for MoCo v2, where it is installed."""
    try:
        from lightly.transforms import MoCoV2Transform
    except ImportError:
        return {}
    transform = MoCoV2Transform(input_size=224)
    return {"lightly": lambda: [transform(images.image(i)) for i in range(len(images))]}


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--recipe", type=click.Choice(["moco_v1", "moco_v2"]), default="moco_v2", show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(folder: Path, recipe: str, repeats: int, json_file: Path | None) -> None:
    """Images per second of one core, two views of each, from the photos in FOLDER."""
    torch.set_num_threads(1)
    images = open_images("flat", folder, "train")
    result = race(contestants(images, recipe), len(images), repeats)
    report(f"{recipe}, two views of each of {len(images)} photos, one core", result, json_file)


if __name__ == "__main__":
    main()
