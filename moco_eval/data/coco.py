"""COCO format: annotations/instances_<split>.json, images in <split>/ or images/, any categories."""

import json
import os
from pathlib import Path
from typing import Any

from moco_eval.data.boxes import (
    DetectionData,
    Objects,
    Sample,
    fingerprint,
    image_size,
    make_sample,
    refuse_twice,
)
from moco_eval.errors import InputError

OFFICIAL = {"train2017": 118287, "val2017": 5000}
SLACK = 1.0  # pixels; COCO's own boxes reach past their image by rounding


def read_coco_folder(
    root: Path, train_split: str | None, test_split: str | None, clip: bool = False, name: str = "coco-folder"
) -> DetectionData:
    """Any data in COCO format; the classes are the training json's categories in the order of their ids.

    Args:
        root: holds annotations/instances_<split>.json, and the images in <split>/ or images/.
        train_split, test_split: by default train2017 and val2017.
        clip: cut boxes to their image and pass over unknown classes, which are refused otherwise.
        name: the dataset's name in the record.
    Raises:
        InputError: what is missing, damaged or contradictory, with its file.
    """
    train_split, test_split = train_split or "train2017", test_split or "val2017"
    train_json, test_json = _load(root, train_split), _load(root, test_split)
    categories = {item["id"]: item["name"] for item in sorted(train_json["categories"], key=lambda item: item["id"])}
    if not categories:
        raise InputError(f"{_path(root, train_split)} has no categories")
    train, _ = _read(root, train_json, train_split, categories, clip)
    test, kept = _read(root, test_json, test_split, categories, clip)
    files = [sample.path for sample in train + test] + [_path(root, train_split), _path(root, test_split)]
    return DetectionData(
        name=name,
        classes=tuple(categories.values()),
        train=train,
        test=test,
        train_split=train_split,
        test_split=test_split,
        fingerprint=fingerprint(root, files),
        coco={"images": test_json["images"], "annotations": kept, "categories": train_json["categories"]},
        category_ids=tuple(categories),
    )


def read_coco(root: Path) -> DetectionData:
    """The official COCO, train2017 to val2017, its counts checked; boxes that reach outside are cut."""
    for split, count in OFFICIAL.items():
        found = len(_load(root, split)["images"])
        if found != count:
            raise InputError(
                f"{_path(root, split)} lists {found} images and the official split {count}; "
                f"for other data take --dataset coco-folder --data {root}"
            )
    return read_coco_folder(root, None, None, clip=True, name="coco")


def _path(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}.json"


def _load(root: Path, split: str) -> dict[str, Any]:
    path = _path(root, split)
    if not path.is_file():
        there = sorted(p.stem.removeprefix("instances_") for p in (root / "annotations").glob("instances_*.json"))
        raise InputError(
            f"{path} does not exist; COCO format is annotations/instances_<split>.json below --data"
            + (f", the splits there are {', '.join(there)}" if there else "")
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        for key in ("images", "annotations", "categories"):
            refuse_twice((item["id"] for item in values[key]), f"{path}, ids of {key}")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from None
    except (KeyError, TypeError):
        raise InputError(
            f"{path} is no COCO annotation file: it needs images, annotations and categories, with ids"
        ) from None
    if not values["images"]:
        raise InputError(f"{path} lists no images")
    return values


def _read(
    root: Path, values: dict[str, Any], split: str, categories: dict[int, str], clip: bool
) -> tuple[list[Sample], list[dict[str, Any]]]:
    """The samples of a split, and its annotations that were kept, as pycocotools takes them."""
    path = _path(root, split)
    objects = Objects(split, tuple(categories.values()), clip)
    names = {item["id"]: item.get("name") for item in values["categories"]}
    images = _images(root, values["images"], split)
    rows: dict[Any, list] = {image_id: [] for image_id in images}
    kept = []
    for item in values["annotations"]:
        where = f"{path} annotation {item['id']}"
        try:
            image_id, category, (x, y, width, height) = (
                item["image_id"],
                item["category_id"],
                map(float, item["bbox"]),
            )
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{where}: it needs image_id, category_id and bbox with four numbers") from None
        if image_id not in images:
            raise InputError(f"{where}: its image {image_id!r} is not among the images")
        label = objects.label(str(names.get(category, category)), where)
        corners = objects.box((x, y, x + width, y + height), images[image_id][1], SLACK, where)
        if label is None or corners is None:
            continue
        crowd = bool(item.get("iscrowd", 0))
        rows[image_id].append((corners, label, False, crowd))
        kept.append(_for_pycocotools(item, corners, list(categories)[label], crowd))
    objects.report()
    return [make_sample(image_id, *images[image_id], rows[image_id]) for image_id in images], kept


def _for_pycocotools(item: dict[str, Any], corners: tuple[float, ...], category: int, crowd: bool) -> dict[str, Any]:
    x0, y0, x1, y1 = corners
    box = [x0, y0, x1 - x0, y1 - y0]
    return {
        "id": item["id"],
        "image_id": item["image_id"],
        "category_id": category,
        "bbox": box,
        "area": item.get("area", box[2] * box[3]),
        "iscrowd": int(crowd),
    }


def _images(root: Path, items: list[dict[str, Any]], split: str) -> dict[Any, tuple[Path, tuple[int, int]]]:
    """Path and size of each image id; each file is there, is an image and has the size that the json says."""
    folder = root / split if (root / split).is_dir() else root / "images"
    if not folder.is_dir():
        raise InputError(f"neither {root / split} nor {folder} exists; the images of {split} belong there")
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    missing = [item.get("file_name") for item in items if not _is_there(folder, there, item.get("file_name"))]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(items)} images of {_path(root, split)} are not in {folder}: {missing[0]}"
        )
    images = {}
    for item in items:
        path = folder / item["file_name"]
        size = image_size(path)
        told = (item.get("width", size[0]), item.get("height", size[1]))
        if told != size:
            raise InputError(
                f"{_path(root, split)} says {told[0]}x{told[1]} for {path} of {size[0]}x{size[1]} pixels "
                "(after EXIF rotation); correct the one that is wrong"
            )
        images[item["id"]] = (path, size)
    return images


def _is_there(folder: Path, there: set[str], name: object) -> bool:
    if not isinstance(name, str):
        return False
    return name in there or (os.sep in name and (folder / name).is_file())
