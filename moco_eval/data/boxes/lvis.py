"""LVIS v0.5 and v1: COCO's images, more than a thousand classes, and for each image the classes that were looked for.

Source: Gupta et al. 2019, arXiv:1908.03195; lvis-dataset/lvis-api and detectron2's data/datasets/lvis.py; read, not
copied.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from moco_eval.data.boxes.coco import File, load, names, opened, uncollected
from moco_eval.data.boxes.samples import DetectionData, Findings
from moco_eval.errors import InputError

CLASSES = {"v0.5": 1230, "v1": 1203}
IMAGES = {("v1", "train"): 100_170, ("v1", "val"): 19_809}  # of v0.5 no source says them to the image
FREQUENCIES = ("r", "c", "f")  # rare, common, frequent: in 1 to 10, in up to 100, in more training images
LISTS = ("neg_category_ids", "not_exhaustive_category_ids")


def read_lvis(root: Path, version: str, findings: Findings | None = None) -> DetectionData:
    """LVIS train to val, in either version; boxes that reach outside are cut, as COCO's.

    Args:
        root: holds lvis_<version>_train.json and lvis_<version>_val.json, there, in lvis/ or in annotations/; and
            COCO's train2017/ and val2017/, there or in coco/.
        version: v0.5 or v1.
        findings: where `datasets check` collects all that is wrong.
    Raises:
        InputError: what is missing, damaged or contradictory, with its file.
    """
    findings = findings or Findings()
    with uncollected():
        train, test = (_file(root, version, split, findings) for split in ("train", "val"))
        data = opened(root, train, test, True, f"lvis-{version}", False, findings)
    assert data.coco is not None
    of = {item["id"]: item["frequency"] for item in train.values["categories"]}
    categories = [item | {"frequency": of[item["id"]]} for item in data.coco["categories"]]
    return replace(data, coco=data.coco | {"categories": categories}, federated=True)


def _file(root: Path, version: str, split: str, findings: Findings) -> File:
    path, images = _path(root, f"lvis_{version}_{split}.json"), _images(root)
    values = load(path, split, findings)
    _check_counts(path, version, split, values)
    _check_frequencies(path, values["categories"])
    known = {item["id"] for item in values["categories"]}
    listed = [_image(path, item, known) for item in values["images"]]
    return File(path, split, values | {"images": listed}, names(path, split, values, findings), images)


def _path(root: Path, name: str) -> Path:
    places = [root / folder / name for folder in ("", "lvis", "annotations")]
    for path in places:
        if path.is_file():
            return path
    raise InputError(
        f"{places[0]} does not exist, nor is it in lvis/ or annotations/ there; it is given out at "
        "https://www.lvisdataset.org/dataset"
    )


def _images(root: Path) -> Path:
    """The folder of COCO's train2017/ and val2017/; both hold training images of LVIS v1's val."""
    for folder in (root, root / "coco"):
        if (folder / "val2017").is_dir():
            return folder
    raise InputError(f"neither {root / 'val2017'} nor {root / 'coco' / 'val2017'} exists; LVIS is on COCO's images")


def _check_counts(path: Path, version: str, split: str, values: dict[str, Any]) -> None:
    """Raises InputError where a file has other numbers of classes or images than the official one."""
    official = {"categories": CLASSES[version], "images": IMAGES.get((version, split))}
    for key, count in official.items():
        if count and len(values[key]) != count:
            raise InputError(
                f"{path} lists {len(values[key]):,} {key} and LVIS {version} {split} has {count:,}; fetch it again, or "
                "take --dataset coco-folder for other data"
            )


def _check_frequencies(path: Path, categories: list[dict[str, Any]]) -> None:
    for item in categories:
        if item.get("frequency") not in FREQUENCIES:
            raise InputError(
                f"{path} category {item['id']}: its frequency is {item.get('frequency')!r} and must be r, c or f; "
                "fetch the file again"
            )


def _image(path: Path, item: dict[str, Any], known: set[int]) -> dict[str, Any]:
    """An image of the file, checked, with the place of its file in COCO: train2017/000000391895.jpg.

    Its `coco_url` says the place. v1 has no `file_name`, and that of v0.5 is COCO's of 2014.
    """
    for name in LISTS:
        ids = item.get(name)
        if not isinstance(ids, list) or not all(type(number) is int and number in known for number in ids):
            raise InputError(f"{path} image {item['id']}: its {name} is no list of categories; fetch the file again")
    parts = str(item.get("coco_url")).split("/")
    if len(parts) < 2 or parts[-2] not in ("train2017", "val2017"):
        raise InputError(
            f"{path} image {item['id']}: its coco_url {str(item.get('coco_url'))[:80]!r} names no image of train2017 "
            "or val2017; fetch the file again"
        )
    return item | {"file_name": "/".join(parts[-2:])}
