"""Small LVIS and Cityscapes folders, made up; their official counts are set to what they hold."""

import json

import numpy as np
from PIL import Image

from moco_eval.data.boxes import cityscapes, lvis

SIDE = 64
CATEGORIES = [
    {"id": 3, "name": "bow_(weapon)", "frequency": "r"},
    {"id": 1, "name": "cup", "frequency": "f"},
    {"id": 2, "name": "sink", "frequency": "c"},
]


def picture(path, seed=0, size=(SIDE, SIDE)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def lvis_image(number, place, **more):
    """`place`: train2017/1.jpg."""
    image = {"id": number, "coco_url": f"http://images.cocodataset.org/{place}", "width": SIDE, "height": SIDE}
    return image | {"neg_category_ids": [], "not_exhaustive_category_ids": []} | more


def lvis_object(number, image, category, x=4, y=6, side=20):
    corners = [x, y, x + side, y, x + side, y + side, x, y + side]
    box = {"bbox": [x, y, side, side], "area": side * side, "segmentation": [corners]}
    return {"id": number, "image_id": image, "category_id": category, **box}


def write_lvis(root, monkeypatch, version="v1", train=None, test=None):
    """Four training and two test images; the second of these lies in train2017."""
    monkeypatch.setattr(lvis, "CLASSES", {version: len(CATEGORIES)})
    monkeypatch.setattr(lvis, "IMAGES", {(version, "train"): 4, (version, "val"): 2})
    places = {"train": [f"train2017/{n}.jpg" for n in range(1, 5)], "val": ["val2017/5.jpg", "train2017/6.jpg"]}
    objects = {
        "train": [(1, 1), (1, 2), (2, 1), (3, 1), (4, 3)],
        "val": [(5, 1), (6, 3)],
    }
    for split, more in (("train", train), ("val", test)):
        first = 1 if split == "train" else 5
        images = [lvis_image(first + n, place) for n, place in enumerate(places[split])]
        values = {
            "images": images,
            "annotations": [lvis_object(n, *pair, x=4 + 2 * n) for n, pair in enumerate(objects[split], start=1)],
            "categories": CATEGORIES,
        }
        if more:
            more(values)
        (root / "lvis").mkdir(parents=True, exist_ok=True)
        (root / "lvis" / f"lvis_{version}_{split}.json").write_text(json.dumps(values))
        for n, place in enumerate(places[split]):
            picture(root / "coco" / place, first + n)
    return root


def write_cityscapes(root, monkeypatch, train=3, test=2, size=(96, 64)):
    """Each image has a car, a person, a group of bicycles and unlabelled ground."""
    monkeypatch.setattr(cityscapes, "OFFICIAL", {"train": train, "val": test})
    for split, count in (("train", train), ("val", test)):
        for number in range(count):
            name = f"aachen_{number:06}_000019"
            picture(root / "leftImg8bit" / split / "aachen" / f"{name}_leftImg8bit.png", number, size)
            ids = np.full((size[1], size[0]), 7)
            ids[:8] = 0
            ids[10:40, 5 + number : 35 + number] = 26000
            ids[20:60, 50:62] = 24003
            ids[44:60, 64:96] = 33
            ids[62:64, 0:4] = 29001
            folder = root / "gtFine" / split / "aachen"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(ids.astype(np.uint16)).save(folder / f"{name}_gtFine_instanceIds.png")
    return root
