"""Accuracy of the ImageNet classifier that a file brings with its network, on a folder of some of its classes.

`python tools/classifier_accuracy.py FILE --classifier _fc --data FOLDER`: FOLDER has a folder of images for each class,
named by its WordNet id, and all 1,000 classes may be answered. The features and the pixels are those of every
evaluation; the classifier's tensors are FILE's own, `_fc.weight` and `_fc.bias`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

import moco_eval as me
from moco_eval.encoders.containers import find_tensors
from moco_eval.errors import InputError
from moco_eval.untrusted.read import read

# the ten of imagenette, by their places among ImageNet's 1,000
INDICES = {
    **{"n01440764": 0, "n02102040": 217, "n02979186": 482, "n03000684": 491, "n03028079": 497},
    **{"n03394916": 566, "n03417042": 569, "n03425413": 571, "n03445777": 574, "n03888257": 701},
}


def classifier(file: Path, name: str) -> torch.nn.Linear:
    """The linear layer of that name.

    Raises:
        InputError: the file has none.
    """
    tensors = find_tensors(file, read(file)).named
    if f"{name}.weight" not in tensors:
        raise InputError(f"{file} has no classifier {name!r}; name the layer whose weight is (classes, features)")
    weight = tensors[f"{name}.weight"].float()
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": tensors[f"{name}.bias"].float()})
    return layer


@torch.no_grad()
def right_answers(file: Path, name: str, folder: Path) -> tuple[int, int]:
    """Images whose most likely class is theirs, and all images.

    Args:
        folder: with `train` and `val`; the second is judged.
    """
    _, images = me.images("imagefolder", folder)
    features, _ = me.features(me.load(str(file)), images, device="cpu")
    answers = classifier(file, name)(torch.from_numpy(features)).argmax(1).numpy()
    expected = np.array([INDICES[images.classes[label]] for label in images.labels])
    return int((answers == expected).sum()), len(expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--classifier", default="fc", help="the classifier's name in the file")
    parser.add_argument("--data", type=Path, required=True, help="a folder with train and val")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args()
    right, images = right_answers(given.file, given.classifier, given.data)
    print(f"{right} of {images} right ({100 * right / images:.2f} %)")
    if given.json:
        given.json.write_text(json.dumps({"right": right, "images": images}))


if __name__ == "__main__":
    main()
