"""Detection scenes drawn from scikit-learn's real handwritten digits, written in VOC and in COCO format.

Training scenes hold digits of the first 1,297 images only, test scenes of the last 500 only: the split of the
classification digits.
"""

import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from moco_eval.data.boxes.segmentation import runs_of
from moco_eval.errors import InputError
from moco_eval.runtime.files import disk_errors_named, read_json, write_json, write_text

CANVAS = 128
SIDE = (20, 40)  # pixels a digit's 8x8 image is enlarged to
COUNT = (2, 6)
DIGITS = tuple("0123456789")
TRAIN_DIGITS = 1297
INK = 64 / 255  # of full ink, from where on a pixel belongs to its digit
SPLITS = {"train": "train2017", "test": "val2017"}  # their names in COCO format


class Scene(NamedTuple):
    """A canvas, (128, 128) uint8; of each object (x0, y0, x1, y1) and its digit; and its ink within that box, bool."""

    canvas: np.ndarray
    objects: list[tuple[tuple[int, int, int, int], int]]
    inks: list[np.ndarray]


def write_scenes(folder: Path, seed: int = 0, train: int = 200, test: int = 60) -> Path:
    """Draw the scenes and write folder/voc and folder/coco; the same arguments give the same bytes.

    Args:
        folder: made at once under its final name; if it already holds these scenes it is left as it is.
        seed: of places, sizes, brightness and noise.
        train, test: number of scenes.
    Returns:
        The folder.
    Raises:
        InputError: the folder holds something else, or cannot be written.
    """
    wanted = {"scenes": "digits@2", "seed": seed, "train": train, "test": test}
    if _stated(folder) == wanted | {"scenes": "digits@1"}:  # the same images and boxes, without masks
        for split, scenes in draw_scenes(seed, train, test).items():
            _write_annotations(folder / "coco", SPLITS[split], scenes)
        write_json(folder / "scenes.json", wanted)
        return folder

    def write(place: Path) -> None:
        for split, scenes in draw_scenes(seed, train, test).items():
            _write_voc(place / "voc", split, scenes)
            _write_coco(place / "coco", SPLITS[split], scenes)

    return written_once(folder, wanted, write)


def written_once(folder: Path, wanted: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """A folder of scenes, written where it is not there, made at once under its final name.

    Args:
        wanted: what its scenes.json says of the scenes.
        write: fills a new folder.
    Raises:
        InputError: the folder holds something else, or cannot be written.
    """
    if folder.is_dir() and any(folder.iterdir()):
        if _stated(folder) == wanted:
            return folder
        raise InputError(f"{folder} holds something other than the digit scenes {wanted}; choose another --data")
    try:
        temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
        temporary.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}; choose another folder") from None
    try:
        with disk_errors_named(folder):
            write(temporary)
            (temporary / "scenes.json").write_text(json.dumps(wanted) + "\n", encoding="utf-8")
            try:
                temporary.replace(folder)
            except OSError:
                if _stated(folder) != wanted:  # else another process has drawn the same meanwhile
                    raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _stated(folder: Path) -> Any:
    """What a folder's scenes.json says; None where there is none."""
    return read_json(folder / "scenes.json") if (folder / "scenes.json").is_file() else None


def draw_scenes(
    seed: int, train: int, test: int, side: tuple[int, int] = SIDE, count: tuple[int, int] = COUNT
) -> dict[str, list[Scene]]:
    """The scenes of both splits; digits of `side` pixels, `count` on a scene, both the least and the most."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = digits.images, digits.target
    drawn = {}
    for stream, (split, scenes, pool) in enumerate(
        (("train", train, np.arange(TRAIN_DIGITS)), ("test", test, np.arange(TRAIN_DIGITS, len(images))))
    ):
        random = np.random.default_rng([seed, stream])
        drawn[split] = [_scene(random, images, labels, pool, side, count) for _ in range(scenes)]
    return drawn


def _scene(
    random: np.random.Generator,
    images: np.ndarray,
    labels: np.ndarray,
    pool: np.ndarray,
    side: tuple[int, int],
    count: tuple[int, int],
) -> Scene:
    canvas = np.full((CANVAS, CANVAS), random.uniform(30, 90))
    objects: list[tuple[tuple[int, int, int, int], int]] = []
    inks = []
    for index in random.choice(pool, size=random.integers(count[0], count[1] + 1), replace=False):
        ink = _enlarge(images[index], int(random.integers(side[0], side[1] + 1)))
        brightness = random.uniform(100, 165)
        height, width = ink.shape
        place = _free_place(random, width, height, [box for box, _ in objects])
        if place is None:
            continue
        x, y = place
        canvas[y : y + height, x : x + width] += ink * brightness
        objects.append(((x, y, x + width, y + height), int(labels[index])))
        inks.append(ink > INK)
    canvas += random.normal(0, 8, canvas.shape)
    return Scene(canvas.round().clip(0, 255).astype(np.uint8), objects, inks)


def _enlarge(image: np.ndarray, side: int) -> np.ndarray:
    """The digit in 0..1, enlarged to `side` pixels and cut to its ink."""
    big = np.asarray(
        Image.fromarray((image * (255 / 16)).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    )
    rows, columns = (np.flatnonzero((big > 64).any(axis=axis)) for axis in (1, 0))
    return big[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] / 255.0


def _free_place(
    random: np.random.Generator, width: int, height: int, taken: list[tuple[int, int, int, int]]
) -> tuple[int, int] | None:
    """A corner where the digit touches no other one; None after 50 tries."""
    for _ in range(50):
        x, y = int(random.integers(0, CANVAS - width + 1)), int(random.integers(0, CANVAS - height + 1))
        if all(x >= x1 or x + width <= x0 or y >= y1 or y + height <= y0 for x0, y0, x1, y1 in taken):
            return x, y
    return None


def _write_voc(root: Path, split: str, scenes: list[Scene]) -> None:
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / name).mkdir(parents=True, exist_ok=True)
    names = [f"{split}_{number:04d}" for number in range(len(scenes))]
    for name, (canvas, objects, _) in zip(names, scenes):
        Image.fromarray(canvas).convert("RGB").save(root / "JPEGImages" / f"{name}.png")
        items = "".join(
            f"<object><name>{digit}</name><difficult>0</difficult><bndbox><xmin>{x0 + 1}</xmin>"
            f"<ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for (x0, y0, x1, y1), digit in objects
        )
        size = f"<size><width>{CANVAS}</width><height>{CANVAS}</height><depth>3</depth></size>"
        text = f"<annotation><filename>{name}.png</filename>{size}{items}</annotation>\n"
        (root / "Annotations" / f"{name}.xml").write_text(text, encoding="utf-8")
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def _write_coco(root: Path, split: str, scenes: list[Scene]) -> None:
    (root / split).mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes, start=1):
        Image.fromarray(scene.canvas).convert("RGB").save(root / split / f"{number:06d}.png")
    _write_annotations(root, split, scenes)


def _write_annotations(root: Path, split: str, scenes: list[Scene]) -> None:
    images: list[dict] = []
    annotations: list[dict] = []
    for number, scene in enumerate(scenes, start=1):
        images.append({"id": number, "file_name": f"{number:06d}.png", "width": CANVAS, "height": CANVAS})
        for ((x0, y0, x1, y1), digit), ink in zip(scene.objects, scene.inks):
            mask = np.zeros((CANVAS, CANVAS), dtype=bool)
            mask[y0:y1, x0:x1] = ink
            item = {
                "image_id": number,
                "category_id": digit + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "segmentation": {"size": [CANVAS, CANVAS], "counts": runs_of(mask)},
                "area": int(ink.sum()),
                "iscrowd": 0,
            }
            annotations.append({"id": len(annotations) + 1, **item})
    categories = [{"id": number, "name": name} for number, name in enumerate(DIGITS, start=1)]
    values = {"images": images, "annotations": annotations, "categories": categories}
    write_text(root / "annotations" / f"instances_{split}.json", json.dumps(values) + "\n")
