"""COCO format: annotations/instances_<split>.json, images in <split>/ or images/, any categories."""

import contextlib
import gc
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moco_eval import limits
from moco_eval.data.boxes.samples import (
    DetectionData,
    Findings,
    Objects,
    Sample,
    fingerprint,
    image_sizes,
    inside,
    make_sample,
    note_similar,
    one_line,
    refuse_fractions,
    require_counted,
    require_objects,
)
from moco_eval.data.boxes.segmentation import area_of, read_mask
from moco_eval.errors import InputError

OFFICIAL = {"train2017": 118287, "val2017": 5000}
SLACK = 1.0  # pixels; COCO's own boxes reach past their image by rounding
KEYS = ("images", "annotations", "categories")
SIDES = ("width", "height")
NUMBERS = frozenset((int, float))
LARGEST = 1e15  # a float still counts whole pixels


@dataclass(frozen=True)
class Categories:
    """The categories trained on: their ids in rising order, their names, and keypoints where they are asked for."""

    ids: tuple[int, ...]
    names: tuple[str, ...]
    keypoints: tuple[str, ...]


@dataclass(frozen=True)
class Annotated:
    """An object of a COCO file, checked; `keypoints`: (K, 3)."""

    image_id: Any
    label: int
    corners: tuple[float, ...]
    crowd: bool
    mask: Any
    keypoints: np.ndarray | None


def read_coco_folder(
    root: Path,
    train_split: str | None,
    test_split: str | None,
    clip: bool = False,
    name: str = "coco-folder",
    keypoints: bool = False,
    findings: Findings | None = None,
) -> DetectionData:
    """Any data in COCO format; the classes are the training json's categories in the order of their ids.

    Args:
        root: holds annotations/instances_<split>.json, and the images in <split>/ or images/.
        train_split, test_split: by default train2017 and val2017.
        clip: cut boxes to their image and pass over unknown classes, which are refused otherwise.
        name: the dataset's name in the record.
        keypoints: read annotations/person_keypoints_<split>.json, where it is there, and the keypoints.
        findings: where `datasets check` collects all that is wrong.
    Raises:
        InputError: what is missing, damaged or contradictory, with its file.
    """
    with uncollected():
        return _open(root, train_split, test_split, clip, name, keypoints, findings or Findings())


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without garbage collection: it would go over millions of numbers in no cycle, a third of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _open(
    root: Path,
    train_split: str | None,
    test_split: str | None,
    clip: bool,
    name: str,
    keypoints: bool,
    findings: Findings,
) -> DetectionData:
    train_split, test_split = train_split or "train2017", test_split or "val2017"
    paths = {split: _path(root, split, keypoints) for split in (train_split, test_split)}
    values = {split: load(path, split, findings) for split, path in paths.items()}
    if name == "coco":
        _check_counts(root, values, findings)
    train, test = (
        File(path, split, values[split], names(path, split, values[split], findings), _folder(root, split))
        for split, path in paths.items()
    )
    return opened(root, train, test, clip, name, keypoints, findings)


def opened(
    root: Path, train: "File", test: "File", clip: bool, name: str, keypoints: bool, findings: Findings
) -> DetectionData:
    """The data of two annotation files that were loaded; see `read_coco_folder`."""
    categories = _categories(train, test, keypoints, findings)
    objects = Objects(categories.names, clip, findings)
    trained, _ = _read(train, categories, objects, keep=False)
    tested, kept = _read(test, categories, objects, keep=True)
    if findings.refusal is None:
        require_objects(trained, train.split, train.path, findings)
        require_counted(tested, test.split, test.path, findings)
        refuse_fractions(trained, train.split, train.path, findings)
        refuse_fractions(tested, test.split, test.path, findings)
    findings.tell()
    listed = [{"id": key, "name": label} for key, label in zip(categories.ids, categories.names)]
    paths = [sample.path for sample in trained + tested] + [train.path, test.path]
    return DetectionData(
        name=name,
        classes=categories.names,
        train=trained,
        test=tested,
        train_split=train.split,
        test_split=test.split,
        fingerprint=fingerprint(root, paths),
        coco={"images": test.values["images"], "annotations": kept, "categories": listed},
        category_ids=categories.ids,
        keypoints=categories.keypoints,
        keypoint_pairs=mirrored(categories.keypoints),
    )


def read_coco(root: Path, keypoints: bool = False, findings: Findings | None = None) -> DetectionData:
    """The official COCO, train2017 to val2017, its counts checked; boxes that reach outside are cut.

    Args:
        root: holds annotations/, or is the folder that holds such a coco/.
    """
    if not (root / "annotations").is_dir() and (root / "coco" / "annotations").is_dir():
        root = root / "coco"
    return read_coco_folder(root, None, None, clip=True, name="coco", keypoints=keypoints, findings=findings)


def _check_counts(root: Path, values: dict[str, dict[str, Any]], findings: Findings) -> None:
    for split, count in OFFICIAL.items():
        if (listed := len(values[split]["images"])) != count:
            findings.begin(split)
            findings.refuse(
                "splits of another size than the official one",
                split,
                f"{root} {split} lists {listed} images and the official split {count}; "
                f"for other data take --dataset coco-folder --data {root}",
            )


# The file


def _path(root: Path, split: str, keypoints: bool) -> Path:
    """The annotation file of a split. Raises InputError where there is none."""
    folder = root / "annotations"
    path = folder / f"instances_{split}.json"
    people = folder / f"person_keypoints_{split}.json"
    if keypoints and people.exists():
        return people
    if not path.exists():
        there = sorted(p.stem.removeprefix("instances_") for p in folder.glob("instances_*.json"))
        raise InputError(
            f"{path} does not exist; COCO format is annotations/instances_<split>.json below --data"
            + (f", the splits there are {', '.join(there)}" if there else "")
        )
    return path


def load(path: Path, split: str, findings: Findings) -> dict[str, Any]:
    """The images, annotations and categories of a file, lists of objects with an id each."""
    findings.begin(split)
    values: dict[str, Any] = {key: [] for key in KEYS}
    with findings.catching("files that cannot be used", str(path)):
        values = _parse(path)
        if not values["images"]:
            raise InputError(f"{path} lists no images; export it again")
    for key in KEYS:
        findings.refuse_twice((item["id"] for item in values[key]), f"ids of {key}", str(path))
    return values


def _parse(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(limits.read_bytes(path, "coco"))
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON: {error}; fetch or export it again") from None
    except RecursionError:
        raise InputError(f"{path} is JSON nested too deeply for an annotation file; export it again") from None
    if not isinstance(values, dict) or not all(_have_ids(values.get(key), key) for key in KEYS):
        raise InputError(
            f"{path} is not a COCO annotation file: it needs lists of images, annotations and categories, with ids "
            "that are numbers of at most 15 digits; export it again"
        )
    return {key: values[key] for key in KEYS}


def _have_ids(items: object, key: str) -> bool:
    """Whether these are objects with an id each, of at most fifteen digits; an image's may also be text."""
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        return False
    ids = [item.get("id") for item in items]
    kinds = set(map(type, ids))
    if kinds <= {int}:
        return not ids or -LARGEST <= min(ids) <= max(ids) <= LARGEST
    return key != "categories" and kinds == {str}


@dataclass(frozen=True)
class File:
    """The annotation file of a split.

    `names`: of its categories, None for one without; `images`: the folder that their file names begin at.
    """

    path: Path
    split: str
    values: dict[str, Any]
    names: dict[int, str | None]
    images: Path


# Categories and keypoints


def names(path: Path, split: str, values: dict[str, Any], findings: Findings) -> dict[int, str | None]:
    """The names of a file's categories in the order of their ids; None for one that is refused."""
    findings.begin(split)
    labels: dict[int, str | None] = {}
    for item in sorted(values["categories"], key=lambda item: item["id"]):
        name = item.get("name")
        if not isinstance(name, str) or not name.strip() or one_line(name) != name:
            message = f"{path}: category {item['id']} has no name of one line; give it one"
            findings.refuse("categories without a name", str(item["id"]), message)
            name = None
        labels[item["id"]] = name
    return labels


def _categories(train: File, test: File, keypoints: bool, findings: Findings) -> Categories:
    """Those of the training file."""
    path = train.path
    findings.begin(train.split)
    names = {key: name for key, name in train.names.items() if name is not None}
    findings.refuse_twice(names.values(), "names of categories", str(path))
    note_similar(tuple(names.values()), findings)
    if not names:
        findings.refuse("files without categories", str(path), f"{path} has no categories; export it again")
    points: tuple[str, ...] = ()
    if keypoints:
        with findings.catching("files without keypoints", str(path)):
            points = _keypoint_names(train)
        with findings.catching("files with other keypoints", str(test.path)):
            _check_same_keypoints(test, points)
    return Categories(tuple(names), tuple(names.values()), points)


def _keypoint_lists(file: File) -> list[Any]:
    return [item["keypoints"] for item in file.values["categories"] if item.get("keypoints")]


def _keypoint_names(file: File) -> tuple[str, ...]:
    """Those of the categories that have keypoints, which must be the same for all of them."""
    lists, path = _keypoint_lists(file), file.path
    if not lists:
        raise InputError(f"{path}: no category has keypoints; take a recipe without keypoints, or other data")
    if not isinstance(lists[0], list) or not all(isinstance(name, str) for name in lists[0]):
        raise InputError(f"{path}: the keypoints of a category are not a list of names; correct the file")
    if any(other != lists[0] for other in lists):
        raise InputError(f"{path}: its categories have different keypoints; keep those of one category")
    return tuple(lists[0])


def _check_same_keypoints(test: File, names: tuple[str, ...]) -> None:
    """Raises InputError where the test file has other keypoints, or in another order, than those trained on."""
    for other in _keypoint_lists(test):
        if names and other != list(names):
            raise InputError(
                f"{test.path}: its keypoints {str(other)[:80]} are not those trained on, {str(list(names))[:80]}; "
                "export both splits alike, or remove the file's keypoints"
            )


def mirrored(names: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """The keypoints that a mirror exchanges, left_x with right_x, as indices."""
    place = {name: i for i, name in enumerate(names)}
    pairs = ((name, f"right_{name.removeprefix('left_')}") for name in names if name.startswith("left_"))
    return tuple((place[left], place[right]) for left, right in pairs if right in place)


# Annotations


@dataclass(frozen=True)
class Part:
    """What the annotations of one split are checked against.

    `images`: path and size of each image that can be used; `listed`: the ids of all; `names`: of its categories.
    """

    path: Path
    images: dict[Any, tuple[Path, tuple[int, int]]]
    listed: frozenset[Any]
    names: dict[int, str | None]
    categories: Categories
    objects: Objects


def _read(
    file: File, categories: Categories, objects: Objects, keep: bool
) -> tuple[list[Sample], list[dict[str, Any]]]:
    """The samples of a split; where `keep`, its annotations that were read, as pycocotools takes them."""
    objects.findings.begin(file.split)
    images = _images(file, objects.findings)
    listed = frozenset(item["id"] for item in file.values["images"])
    part = Part(file.path, images, listed, file.names, categories, objects)
    annotations: dict[Any, list[Annotated]] = {image_id: [] for image_id in images}
    kept: list[dict[str, Any]] = []
    for item in file.values["annotations"]:
        annotation = _annotated(item, part)
        if annotation is None:
            continue
        annotations[annotation.image_id].append(annotation)
        if keep:
            kept.append(_for_pycocotools(len(kept) + 1, item, annotation, part))
    return [_sample(key, *images[key], annotations[key], len(categories.keypoints)) for key in images], kept


def _annotated(item: dict[str, Any], part: Part) -> Annotated | None:
    """An annotation, checked; None where it is refused or dropped."""
    where, findings = f"{part.path} annotation {item['id']}", part.objects.findings
    if field := _wrong_field(item):
        value = f"{field} is {repr(item.get(field))[:60]}"
        message = (
            f"{where}: it needs image_id, category_id, bbox with four numbers, iscrowd 0 or 1, and an area, if any, "
            f"that is a number from 0 on; its {value}; correct it"
        )
        findings.refuse(
            "annotations with a field that is missing, text or out of range", f"{value} in {where}", message
        )
        return None
    image_id = item["image_id"]
    try:
        x, y, width, height = map(float, item["bbox"])
    except OverflowError:  # a whole number beyond all floats
        x = y = width = height = math.inf
    if image_id not in part.listed:
        message = f"{where}: its image {image_id!r} is not among the images; remove the one or add the other"
        findings.refuse("annotations of images that are not listed", where, message)
    if image_id not in part.images:  # refused, now or before
        return None
    size = part.images[image_id][1]
    label = _label(item["category_id"], part, where)
    corners = part.objects.box((x, y, x + width, y + height), size, SLACK, where)
    if label is None or corners is None:
        return None
    mask, points = _shape(item, size, len(part.categories.keypoints), where, findings)
    return Annotated(image_id, label, corners, bool(item.get("iscrowd")), mask, points)


def _wrong_field(item: dict[str, Any]) -> str | None:
    """The first field of an annotation that cannot be read; None where all can. Text, true and false are no numbers."""
    if type(item.get("image_id")) not in (int, float, str):
        return "image_id"
    if type(item.get("category_id")) not in NUMBERS:
        return "category_id"
    box, area, crowd = item.get("bbox"), item.get("area"), item.get("iscrowd")
    if type(box) is not list or len(box) != 4 or not NUMBERS.issuperset(map(type, box)):
        return "bbox"
    if area is not None and (type(area) not in NUMBERS or not 0 <= area <= LARGEST):
        return "area"
    return None if crowd is None or crowd in (0, 1) else "iscrowd"


def _label(category: int, part: Part, where: str) -> int | None:
    """The class index of a category id; None where it is not listed, or its class not trained on."""
    if category in part.names:
        name = part.names[category]  # None was refused
        return None if name is None else part.objects.label(name, where)
    place = f"category_id {category} in {where}"
    if part.objects.clip:
        part.objects.findings.note("objects of unknown classes skipped", place)
    else:
        message = (
            f"{where}: its category_id {category} is not among the file's {len(part.names)} categories "
            f"({', '.join(map(str, list(part.names)[:25]))}); correct it, or --set data.clip=true skips it"
        )
        part.objects.findings.refuse("objects of categories that are not listed", place, message)
    return None


def _shape(
    item: dict[str, Any], size: tuple[int, int], count: int, where: str, findings: Findings
) -> tuple[Any, np.ndarray | None]:
    """Mask and `count` keypoints of an annotation; None for a mask that is not there, and where count is 0."""
    mask, points = None, np.zeros((count, 3)) if count else None
    with findings.catching("masks and keypoints that are wrong", where):
        mask, dropped = read_mask(item.get("segmentation"), size, where)
        if dropped:
            findings.note("polygons of fewer than three points, or a number too many, dropped", where)
        if count:
            points = _points(item.get("keypoints"), count, where)
    return mask, points


def _points(value: Any, count: int, where: str) -> np.ndarray:
    """Keypoints, (K, 3), half a pixel added to x and y: COCO counts whole pixels. All 0 where the object has none."""
    if value is None:
        return np.zeros((count, 3))
    points = np.zeros(0)
    if isinstance(value, list) and all(type(number) in NUMBERS and abs(number) <= LARGEST for number in value):
        points = np.array(value, dtype=np.float64)
    if points.shape != (3 * count,) or not np.isfinite(points).all() or not np.isin(points[2::3], (0, 1, 2)).all():
        raise InputError(
            f"{where}: its keypoints are not {count} times x, y and 0, 1 or 2; correct the file, or remove them"
        )
    return points.reshape(count, 3) + np.array([0.5, 0.5, 0])


def _sample(image_id: Any, path: Path, size: tuple[int, int], annotations: list[Annotated], points: int) -> Sample:
    """An image with its annotations, of `points` keypoints each."""
    rows = [(annotation.corners, annotation.label, False, annotation.crowd) for annotation in annotations]
    masks = [annotation.mask for annotation in annotations]
    if all(mask is None for mask in masks):
        masks = []
    keypoints = None
    if points:
        each = [annotation.keypoints for annotation in annotations]
        keypoints = np.array(each, dtype=np.float64).reshape(-1, points, 3)
    return make_sample(image_id, path, size, rows, masks, keypoints)


def _area(item: dict[str, Any], annotation: Annotated, part: Part) -> float:
    """The area of an object that is judged: the file's; where it says none or 0, that of the mask, or else of the box.

    AP by size goes by it.
    """
    where, findings = f"{part.path} annotation {item['id']}", part.objects.findings
    box, said = float(item["bbox"][2]) * float(item["bbox"][3]), float(item.get("area") or 0)
    if not said:
        findings.note("objects without an area (that of the mask, or else of the box, is taken)", where)
        return box if annotation.mask is None else area_of(annotation.mask, part.images[annotation.image_id][1])
    if said > 1.1 * box + 10 or (said < 1 and box > 50):
        findings.note("objects whose area does not fit their box, as AP by size goes by it", f"{said:g} in {where}")
    return said


def _for_pycocotools(number: int, item: dict[str, Any], annotation: Annotated, part: Part) -> dict[str, Any]:
    """An annotation under a new number from 1 on: pycocotools takes a match with annotation 0 for none."""
    x0, y0, x1, y1 = annotation.corners
    box = [x0, y0, x1 - x0, y1 - y0]
    kept = {
        "id": number,
        "image_id": annotation.image_id,
        "category_id": part.categories.ids[annotation.label],
        "bbox": box,
        "area": _area(item, annotation, part),
        "iscrowd": int(annotation.crowd),
    }
    if annotation.mask is not None:
        mask = annotation.mask
        kept["segmentation"] = mask if isinstance(mask, dict) else [part.tolist() for part in mask]
    if annotation.keypoints is not None:
        kept["keypoints"] = item.get("keypoints") or [0] * annotation.keypoints.size
        kept["num_keypoints"] = int((annotation.keypoints[:, 2] > 0).sum())
    return kept


# Images


def _folder(root: Path, split: str) -> Path:
    """Where the images of a split are."""
    return root / split if (root / split).is_dir() else root / "images"


def _images(file: File, findings: Findings) -> dict[Any, tuple[Path, tuple[int, int]]]:
    """Path and size of each image id; each file is there, is an image and has the size that the json says."""
    folder, json_path, items = file.images, file.path, file.values["images"]
    if not folder.is_dir():
        message = f"neither {folder.with_name(file.split)} nor {folder} exists; the images of {file.split} belong there"
        findings.refuse("folders of images that are missing", str(folder), message)
        return {}
    there = [item for item in items if _inside(item.get("file_name"), item["id"], json_path, findings)]
    there = _present(there, len(items), folder, json_path, findings)
    there = [item for item in there if _size_is_number(item, json_path, findings)]
    paths = [folder / item["file_name"] for item in there]
    findings.refuse_twice(map(str, paths), "file names of images", str(json_path))
    images = {}
    for item, path, size in zip(there, paths, image_sizes(paths, findings)):
        if size is None:
            continue
        declared = tuple(own if item.get(side) is None else item[side] for side, own in zip(SIDES, size))
        if declared != size:
            findings.refuse(
                "images of another size than the json says",
                str(path),
                f"{json_path} says {declared[0]}x{declared[1]} for {path} of {size[0]}x{size[1]} pixels "
                "(after EXIF rotation); correct the one that is wrong",
            )
        else:
            images[item["id"]] = (path, size)
    return images


def _size_is_number(item: dict[str, Any], json_path: Path, findings: Findings) -> bool:
    """Whether an image's width and height are numbers, or not said."""
    wrong = [side for side in SIDES if item.get(side) is not None and type(item[side]) not in NUMBERS]
    for side in wrong:
        said = f"{side} is {repr(item[side])[:60]}"
        message = f"{json_path} image {item['id']}: its {said} and must be a number, without quotes; correct it"
        findings.refuse("images whose size is not a number", f"{said} in image {item['id']}", message)
    return not wrong


def _inside(name: object, image_id: Any, json_path: Path, findings: Findings) -> bool:
    """Whether an image's file_name is one, and leads nowhere else."""
    if isinstance(name, str) and name and inside(name):
        return True
    findings.refuse(
        "file names that are missing, or lead out of the folder",
        f"image {image_id}",
        f"{json_path} image {image_id}: its file_name {name!r} is not a name inside the folder of images; correct it",
    )
    return False


def _present(
    items: list[dict[str, Any]], count: int, folder: Path, json_path: Path, findings: Findings
) -> list[dict[str, Any]]:
    """The images whose file is there; `datasets check` lists the others, `detect` refuses them all at once."""
    names = {path.name for path in folder.iterdir()}

    def there(item: dict[str, Any]) -> bool:
        name = item["file_name"]
        return name in names or ("/" in name and (folder / name).is_file())

    present = [item for item in items if there(item)]
    missing = [item for item in items if not there(item)]
    for item in missing:
        findings.refuse(
            "images that are missing",
            item["file_name"],
            f"{len(missing)} of {count} images of {json_path} are not in {folder}: {item['file_name']}; "
            "add them, or take them out of the file",
        )
    return present
