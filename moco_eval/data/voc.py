"""Pascal VOC format: JPEGImages/, Annotations/*.xml, ImageSets/Main/<split>.txt, with any list of classes."""

import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from moco_eval.config import did_you_mean
from moco_eval.data.boxes import (
    DetectionData,
    Objects,
    Sample,
    fingerprint,
    image_size,
    images_by_stem,
    make_sample,
    refuse_twice,
)
from moco_eval.errors import InputError

VOC_CLASSES = (
    *(
        "aeroplane",
        "bicycle",
        "bird",
        "boat",
        "bottle",
        "bus",
        "car",
        "cat",
        "chair",
        "cow",
        "diningtable",
        "dog",
    ),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
# images of the official splits: (year, split) to count
OFFICIAL = {("2007", "trainval"): 5011, ("2012", "trainval"): 11540, ("2007", "test"): 4952}


@dataclass(frozen=True)
class Entry:
    """One image of a split with its XML file."""

    name: str
    image: Path
    xml: Path


def read_voc_folder(
    root: Path,
    train_split: str | None,
    test_split: str | None,
    clip: bool = False,
    name: str = "voc-folder",
    classes: tuple[str, ...] = (),
) -> DetectionData:
    """Any data in VOC format.

    Args:
        root: holds JPEGImages, Annotations and ImageSets/Main.
        train_split: a file of ImageSets/Main; by default trainval where there is a test split, else train.
        test_split: by default test, else val.
        clip: cut boxes to their image and pass over unknown classes, which are refused otherwise.
        name: the dataset's name in the record.
        classes: by default those of the training split, sorted.
    Raises:
        InputError: what is missing, damaged or contradictory, with its file.
    """
    train_split, test_split = find_splits(root, train_split, test_split)
    train, test = read_entries(root, train_split), read_entries(root, test_split)
    classes = classes or class_names(train)
    return DetectionData(
        name=name,
        classes=classes,
        train=_read(train, train_split, classes, clip),
        test=_read(test, test_split, classes, clip),
        train_split=train_split,
        test_split=test_split,
        fingerprint=fingerprint(root, [path for entry in train + test for path in (entry.image, entry.xml)]),
    )


def read_voc(root: Path) -> DetectionData:
    """The official VOC07+12: trainval2007 and trainval2012 to test2007, its counts checked.

    Args:
        root: VOCdevkit, or the folder that holds it.
    Raises:
        InputError: another number of images than the official splits have.
    """
    if (root / "VOCdevkit").is_dir():
        root = root / "VOCdevkit"
    parts = {}
    for (year, split), count in OFFICIAL.items():
        folder = root / f"VOC{year}"
        if not folder.is_dir():
            raise InputError(f"{root} has no VOC{year}; --dataset voc is VOC07+12, for other data take voc-folder")
        entries = read_entries(folder, split)
        if len(entries) != count:
            raise InputError(
                f"{folder} {split} lists {len(entries)} images and the official split {count}; "
                f"for other data take --dataset voc-folder --data {folder}"
            )
        parts[year, split] = entries
    train, test = parts["2007", "trainval"] + parts["2012", "trainval"], parts["2007", "test"]
    return DetectionData(
        name="voc",
        classes=VOC_CLASSES,
        train=_read(train, "trainval07+12", VOC_CLASSES, clip=True),
        test=_read(test, "test2007", VOC_CLASSES, clip=True),
        train_split="trainval07+12",
        test_split="test2007",
        fingerprint=fingerprint(root, [path for entry in train + test for path in (entry.image, entry.xml)]),
    )


def find_splits(root: Path, train: str | None, test: str | None) -> tuple[str, str]:
    """The names of the splits, chosen where None. Raises InputError where a folder or a list is missing."""
    lists = root / "ImageSets" / "Main"
    for folder in (root, root / "JPEGImages", root / "Annotations", lists):
        if not folder.is_dir():
            raise InputError(
                f"{folder} does not exist; VOC format is JPEGImages/, Annotations/ and ImageSets/Main/ below --data"
            )
    there = {path.stem for path in lists.glob("*.txt")}
    if test is None:
        test = "test" if "test" in there else "val"
    if train is None:  # trainval holds val, which must not be both trained on and tested
        train = "trainval" if "trainval" in there and (test != "val" or "train" not in there) else "train"
    for option, split in (("--train-split", train), ("--test-split", test)):
        if split not in there:
            raise InputError(
                f"{lists / (split + '.txt')} does not exist ({option}).{did_you_mean(split, sorted(there))}"
            )
    return train, test


def read_entries(root: Path, split: str) -> list[Entry]:
    """The images that a split lists. Raises InputError where it is empty, names one twice, or a file is missing."""
    path = root / "ImageSets" / "Main" / f"{split}.txt"
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if not lines:
        raise InputError(f"{path} lists no images")
    images = images_by_stem(root / "JPEGImages")
    # a list of one class has a second column, its presence; a name may itself hold a space
    names = [line if line in images else line.split()[0] for line in lines]
    refuse_twice(names, str(path))
    return [Entry(name, _image(images, name, root, path), _xml(root, name)) for name in names]


def _image(images: dict[str, list[Path]], name: str, root: Path, split: Path) -> Path:
    found = images.get(name, [])
    if not found:
        raise InputError(f"{root / 'JPEGImages'} has no image {name} (any suffix), which {split} lists")
    if len(found) > 1:
        raise InputError(f"{root / 'JPEGImages'} has {' and '.join(path.name for path in found)}; keep one")
    return found[0]


def _xml(root: Path, name: str) -> Path:
    path = root / "Annotations" / f"{name}.xml"
    if not path.is_file():
        raise InputError(f"{path} does not exist; every image of a split needs one (without objects if it has none)")
    return path


def class_names(entries: list[Entry]) -> tuple[str, ...]:
    """The classes of all objects, sorted. Raises InputError where there is no object."""
    names = {text_of(item, "name", entry.xml) for entry in entries for item in read_xml(entry.xml).iter("object")}
    if not names:
        raise InputError(f"none of the {len(entries)} training images has an object ({entries[0].xml} and the others)")
    return tuple(sorted(names))


def _read(entries: list[Entry], split: str, classes: tuple[str, ...], clip: bool) -> list[Sample]:
    objects = Objects(split, classes, clip)
    samples = [_sample(entry, objects) for entry in entries]
    objects.report()
    return samples


def _sample(entry: Entry, objects: Objects) -> Sample:
    tree = read_xml(entry.xml)
    size = image_size(entry.image)
    _check_size(tree, size, entry)
    rows = []
    for item in tree.iter("object"):
        label = objects.label(text_of(item, "name", entry.xml), str(entry.xml))
        # VOC counts pixels from 1, labelling tools from 0 or 1: both lie within 0..width
        corners = objects.box(_corners(item, entry.xml), size, slack=0, where=str(entry.xml))
        if label is None or corners is None:
            continue
        x0, y0, x1, y1 = corners
        rows.append(((x0 - 1, y0 - 1, x1, y1), label, is_difficult(item), False))
    return make_sample(entry.name, entry.image, size, rows)


def is_difficult(item: ElementTree.Element) -> bool:
    """Whether an object is marked so; it is not where nothing is said."""
    return (item.findtext("difficult") or "0").strip() not in ("0", "")


def _check_size(tree: ElementTree.Element, size: tuple[int, int], entry: Entry) -> None:
    """An XML may leave its image's size out, or zero; a wrong one means boxes on another scale."""
    try:
        told = tuple(round(float(tree.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
    except ValueError:
        raise InputError(f"{entry.xml}: its size is no number") from None
    if 0 not in told and told != size:
        raise InputError(
            f"{entry.xml} says {told[0]}x{told[1]} and {entry.image.name} has {size[0]}x{size[1]} pixels "
            "(after EXIF rotation); correct the one that is wrong"
        )


def read_xml(path: Path) -> ElementTree.Element:
    """An annotation file. Raises InputError where it is damaged."""
    try:
        return ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError, ValueError) as error:
        raise InputError(f"{path} is not readable XML: {error}") from None


def text_of(item: ElementTree.Element, key: str, path: Path) -> str:
    """What an object says of itself. Raises InputError where it says nothing."""
    text = (item.findtext(key) or "").strip()
    if not text:
        raise InputError(f"{path}: an object has no <{key.replace('/', '><')}>")
    return text


def _corners(item: ElementTree.Element, path: Path) -> tuple[float, ...]:
    values = [text_of(item, f"bndbox/{key}", path) for key in ("xmin", "ymin", "xmax", "ymax")]
    try:
        return tuple(float(value) for value in values)
    except ValueError:
        raise InputError(f"{path}: box {', '.join(values)} is not four numbers") from None
