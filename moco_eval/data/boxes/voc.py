"""Pascal VOC format: JPEGImages/, Annotations/*.xml, ImageSets/Main/<split>.txt, with any list of classes."""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from moco_eval import limits
from moco_eval.config.load import did_you_mean
from moco_eval.data.boxes.samples import (
    DetectionData,
    Findings,
    Objects,
    Sample,
    fingerprint,
    image_sizes,
    images_by_stem,
    inside,
    make_sample,
    note_similar,
    refuse_fractions,
    require_counted,
    require_objects,
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
# what tools write for VOC's 0 and 1, in any case; an empty element says nothing, which is 0
MARKS = dict.fromkeys(("0", "0.0", "false", "no", ""), False) | dict.fromkeys(("1", "1.0", "true", "yes"), True)
SIDES = ("xmin", "ymin", "xmax", "ymax")
LONG_NAMESPACE = re.compile(  # it stands in each element's tag
    rb"xmlns(?:[^=<>]{257}|[^=<>]{0,256}=(?:\s{257}|\s{0,256}(?:\"[^\"]{257}|'[^']{257})))"
)
PRESENCE = ("-1", "0", "1")  # the second column of the devkit's lists of one class


@dataclass(frozen=True)
class Entry:
    """One image of a split with its XML file."""

    name: str
    image: Path
    xml: Path


@dataclass(frozen=True)
class Annotation:
    """What an XML file says: its image's size (None where it says nothing) and the objects.

    An object: its class, (xmin, ymin, xmax, ymax), and whether it is difficult.
    """

    size: tuple[int, int] | None
    objects: list[tuple[str, tuple[float, ...], bool]]


# Data sets


def read_voc_folder(
    root: Path,
    train_split: str | None,
    test_split: str | None,
    clip: bool = False,
    name: str = "voc-folder",
    classes: tuple[str, ...] = (),
    findings: Findings | None = None,
) -> DetectionData:
    """Any data in VOC format.

    Args:
        root: holds JPEGImages, Annotations and ImageSets/Main.
        train_split: a file of ImageSets/Main; by default trainval where there is a test split, else train.
        test_split: by default test, else val.
        clip: cut boxes to their image and pass over unknown classes, which are refused otherwise.
        name: the dataset's name in the record.
        classes: by default those of the training split, sorted.
        findings: where `datasets check` collects all that is wrong.
    Raises:
        InputError: what is missing, damaged or contradictory, with its file.
    """
    findings = findings or Findings()
    train_split, test_split = find_splits(root, train_split, test_split)
    train, test = (read_entries(root, split, findings) for split in (train_split, test_split))
    return _read(name, root, {train_split: train}, {test_split: test}, classes, clip, findings)


def read_voc(root: Path, findings: Findings | None = None) -> DetectionData:
    """The official VOC07+12: trainval2007 and trainval2012 to test2007, its counts checked.

    Args:
        root: VOCdevkit, or the folder that holds it.
    Raises:
        InputError: another number of images than the official splits have.
    """
    findings = findings or Findings()
    root = root / "VOCdevkit" if (root / "VOCdevkit").is_dir() else root
    for year in ("2007", "2012"):
        if not (root / f"VOC{year}").is_dir():
            raise InputError(f"{root} has no VOC{year}; --dataset voc is VOC07+12, for other data take voc-folder")
    train = _official(root / "VOC2007", "2007", "trainval", findings)
    train |= _official(root / "VOC2012", "2012", "trainval", findings)
    test = _official(root / "VOC2007", "2007", "test", findings)
    return replace(_read("voc", root, train, test, VOC_CLASSES, True, findings), train_split="trainval07+12")


def read_voc07(root: Path, findings: Findings | None = None) -> DetectionData:
    """The official VOC07: trainval2007 to test2007, its counts checked.

    Args:
        root: VOC2007, VOCdevkit, or the folder that holds it.
    Raises:
        InputError: another number of images than the official splits have.
    """
    findings = findings or Findings()
    root = voc07_folder(root)
    train, test = (_official(root, "2007", split, findings) for split in ("trainval", "test"))
    return _read("voc07", root, train, test, VOC_CLASSES, True, findings)


def voc07_folder(folder: Path) -> Path:
    """VOC2007 itself, in a folder that is it or holds it. Raises InputError where it is not there."""
    for root in (folder, folder / "VOC2007", folder / "VOCdevkit" / "VOC2007"):
        if all((root / part).is_dir() for part in ("JPEGImages", "Annotations", "ImageSets/Main")):
            return root
    raise InputError(
        f"{folder} has no VOC2007 with JPEGImages/, Annotations/ and ImageSets/Main/; give VOCdevkit or VOC2007 "
        "itself (published at http://host.robots.ox.ac.uk/pascal/VOC/voc2007/); for other data take voc-folder"
    )


def _official(root: Path, year: str, split: str, findings: Findings) -> dict[str, list[Entry]]:
    """A split of an official year under its name, its count checked."""
    find_splits(root, split, split)
    entries, count = read_entries(root, split, findings), OFFICIAL[year, split]
    if len(entries) != count:
        findings.refuse(
            "splits of another size than the official one",
            str(root),
            f"{root} {split} lists {len(entries)} images and the official split {count}; "
            f"for other data take --dataset voc-folder --data {root}",
        )
    return {f"{split}{year}": entries}


def _read(
    name: str,
    root: Path,
    train: dict[str, list[Entry]],
    test: dict[str, list[Entry]],
    classes: tuple[str, ...],
    clip: bool,
    findings: Findings,
) -> DetectionData:
    """The data from the entries of each split; several training splits are one."""
    drawn = {split: _annotations(entries, split, findings) for split, entries in (train | test).items()}
    if not classes:
        with findings.catching("training splits without objects", " and ".join(train)):
            names = (item[0] for split in train for annotation in drawn[split] for item in annotation.objects)
            classes = class_names(names, [entry for entries in train.values() for entry in entries])
    note_similar(classes, findings)
    objects = Objects(classes, clip, findings)
    samples = {split: _samples(entries, drawn[split], split, objects) for split, entries in (train | test).items()}
    trained = [sample for split in train for sample in samples[split]]
    tested = [sample for split in test for sample in samples[split]]
    train_split, test_split = " and ".join(train), " and ".join(test)
    if findings.refusal is None:
        require_objects(trained, train_split, root, findings)
        require_counted(tested, test_split, root, findings)
        refuse_fractions(trained, train_split, root, findings)
        refuse_fractions(tested, test_split, root, findings)
    findings.tell()
    listed = [entry for entries in (train | test).values() for entry in entries]
    return DetectionData(
        name=name,
        classes=classes,
        train=trained,
        test=tested,
        train_split=train_split,
        test_split=test_split,
        fingerprint=fingerprint(root, [path for entry in listed for path in (entry.image, entry.xml)]),
    )


# Splits


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


def read_entries(root: Path, split: str, findings: Findings | None = None) -> list[Entry]:
    """The images that a split lists; refused are an empty list, one named twice, a file that is missing."""
    findings = findings or Findings()
    findings.begin(split)
    path = root / "ImageSets" / "Main" / f"{split}.txt"
    lines = [str(PurePosixPath(line)) if "/" in line else line for line in _lines(path, findings)]  # ./a is a
    folders = {line.rpartition("/")[0] for line in lines}
    images = {
        f"{folder}/{stem}" if folder else stem: paths
        for folder in folders
        if inside(folder)
        for stem, paths in images_by_stem(root / "JPEGImages" / folder).items()
    }
    columns = all(len(line.split()) > 1 for line in lines)
    names = [line if line in images else _name(line, columns) for line in lines]
    findings.refuse_twice(names, "images", str(path))
    entries = []
    for name in dict.fromkeys(names):
        with findings.catching("images or XML files that are missing", name):
            entries.append(Entry(name, _image(images, name, root, path), _xml(root, name)))
    return entries


def _name(line: str, columns: bool) -> str:
    """The image that a line means, without its presence; a name may hold spaces, as that of a copy, 'photo (1)', does.

    Where not every line has several words (`columns`), 'photo 1' is a name; 'photo  1' and 'photo -1', as the devkit
    writes them, are none.
    """
    name, presence = line.rsplit(maxsplit=1) if " " in line or "\t" in line else (line, "")
    two_wide = len(line) - len(name) > 2
    return name if presence in PRESENCE and (columns or two_wide) else line


def _lines(path: Path, findings: Findings) -> list[str]:
    try:
        text = limits.read_bytes(path, "list").decode("utf-8-sig")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
    except InputError as error:
        findings.refuse("lists that cannot be read", str(path), f"cannot read {error}")
        return []
    except (OSError, UnicodeDecodeError) as error:
        findings.refuse("lists that cannot be read", str(path), f"cannot read {path}: {error}; save it as UTF-8 text")
        return []
    if not lines:
        findings.refuse("lists without images", str(path), f"{path} lists no images; name one per line")
    return lines


def _image(images: dict[str, list[Path]], name: str, root: Path, split: Path) -> Path:
    if not inside(name):
        raise InputError(f"{split} lists {name!r}, which is not a name inside {root / 'JPEGImages'}; correct the list")
    paths = images.get(name, [])
    if not paths:
        raise InputError(
            f"{root / 'JPEGImages'} has no image {name} (any suffix), which {split} lists; add it or take it off"
        )
    if len(paths) > 1:
        raise InputError(f"{root / 'JPEGImages'} has {' and '.join(path.name for path in paths)}; keep one")
    return paths[0]


def _xml(root: Path, name: str) -> Path:
    path = root / "Annotations" / f"{name}.xml"
    if not path.exists():
        raise InputError(f"{path} does not exist; every image of a split needs one (without objects if it has none)")
    return path


# Objects


def class_names(names: Iterable[str], entries: Sequence[Entry]) -> tuple[str, ...]:
    """The classes of the objects of these images, sorted. Raises InputError where there is no object."""
    classes = tuple(sorted(set(names)))
    if not classes:
        first = f" ({entries[0].xml} and the others)" if entries else ""
        raise InputError(f"none of the {len(entries)} training images has an object{first}; add some")
    return classes


def _samples(entries: list[Entry], drawn: list[Annotation], split: str, objects: Objects) -> list[Sample]:
    objects.findings.begin(split)
    sizes = image_sizes([entry.image for entry in entries], objects.findings)
    samples = []
    for entry, annotation, size in zip(entries, drawn, sizes):
        if size is None or (annotation.size and not _same_size(annotation.size, size, entry, objects.findings)):
            continue
        samples.append(_sample(entry, annotation, size, objects))
    return samples


def _sample(entry: Entry, annotation: Annotation, size: tuple[int, int], objects: Objects) -> Sample:
    where, rows = str(entry.xml), []
    for name, drawn, difficult in annotation.objects:
        label = objects.label(name, where)
        # VOC counts pixels from 1, labelling tools from 0 or 1: both lie within 0..width
        corners = objects.box(drawn, size, slack=0, where=where)
        if label is None or corners is None:
            continue
        x0, y0, x1, y1 = corners
        rows.append(((x0 - 1, y0 - 1, x1, y1), label, difficult, False))
    return make_sample(entry.name, entry.image, size, rows)


def _same_size(declared: tuple[int, int], size: tuple[int, int], entry: Entry, findings: Findings) -> bool:
    """A wrong size means boxes on another scale."""
    if declared != size:
        findings.refuse(
            "images of another size than their XML says",
            str(entry.image),
            f"{entry.xml} says {declared[0]}x{declared[1]} and {entry.image.name} has {size[0]}x{size[1]} pixels "
            "(after EXIF rotation); correct the one that is wrong",
        )
    return declared == size


# XML


def _annotations(entries: list[Entry], split: str, findings: Findings) -> list[Annotation]:
    findings.begin(split)
    return [_annotation(entry, findings) for entry in entries]


def _annotation(entry: Entry, findings: Findings) -> Annotation:
    size, objects, path = None, [], entry.xml
    with findings.catching("XML files that are damaged", str(path)):
        tree = read_xml(path)
        size = _size(tree, path)
        if (named := (tree.findtext("filename") or "").strip()) and not _names(named, entry):
            findings.note("XML files that name another image", f"{named} in {path}")
        if next(tree.iter("bndbox"), None) is not None and next(tree.iter("object"), None) is None:
            raise InputError(f"{path} has a <bndbox> and no <object>, which VOC's boxes belong to; export it again")
        for item in objects_in(tree):
            with findings.catching("objects without a class, a box of four numbers or a known mark", str(path)):
                name, difficult = text_of(item, "name", path), is_difficult(item, path)
                boxes = _boxes(item, path)
                objects += [(name, corners, difficult) for corners in boxes]
                if len(boxes) > 1:
                    findings.note("objects with several boxes, each of which is read as an object", str(path))
    return Annotation(size, objects)


def _names(filename: str, entry: Entry) -> bool:
    """Whether a <filename>, with or without folders and suffix, is that of the entry's image."""
    if filename == entry.image.name:
        return True
    last, own = PureWindowsPath(filename), PurePosixPath(entry.name).name
    return own in (last.name, last.stem)


def read_xml(path: Path) -> ElementTree.Element:
    """An annotation file, its tags in small letters without name spaces.

    Raises:
        InputError: damaged, no regular file or too large, or it declares a document type or long name spaces, with
            which a small file can fill the memory.
    """
    try:
        data = limits.read_bytes(path, "xml")
        ascii_data = data.replace(b"\0", b"")  # of any encoding
        if b"<!DOCTYPE" in ascii_data or b"<!ENTITY" in ascii_data:
            raise InputError(f"{path} declares XML entities or a document type; take them out, no annotation needs one")
        if b"xmlns" in ascii_data and LONG_NAMESPACE.search(ascii_data):
            raise InputError(f"{path} declares a name space of more than 256 characters; take it out")
        tree = ElementTree.fromstring(data)
    except (ElementTree.ParseError, OSError, LookupError) as error:
        raise InputError(f"{path} is not readable XML: {error}; export it again") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not readable XML: {error}; save it as UTF-8") from None
    for element in tree.iter():
        if "}" in element.tag:
            element.tag = element.tag.rpartition("}")[2]
        element.tag = element.tag.lower()
    return tree


def objects_in(tree: ElementTree.Element) -> Iterator[ElementTree.Element]:
    """The objects of an annotation, without those that LabelMe keeps and marks as deleted."""
    return (item for item in tree.iter("object") if (item.findtext("deleted") or "").strip() != "1")


def text_of(item: ElementTree.Element, key: str, path: Path) -> str:
    """What an object says of itself. Raises InputError where it says nothing, or two things."""
    texts = {(element.text or "").strip() for element in item.findall(key)} - {""}
    if len(texts) != 1:
        tags, several = f"<{key.replace('/', '><')}>", " and ".join(sorted(texts))
        wrong = f"has several {tags}, {several}; keep one" if several else f"has no {tags}; add it"
        raise InputError(f"{path}: an object {wrong}, or take the object out")
    return texts.pop()


def is_difficult(item: ElementTree.Element, path: Path) -> bool:
    """Whether an object is marked so; it is not where nothing is said. Raises InputError for another word."""
    words = [(element.text or "").strip() for element in item.findall("difficult")]
    if words == ["0"]:  # nearly always
        return False
    marks = {MARKS.get(word.lower()) for word in words}
    if None in marks or len(marks) > 1:
        said = " and ".join(repr(word) for word in sorted(set(words)))
        raise InputError(f"{path}: <difficult> is {said} and must be 0 or 1; correct the file, or take it out")
    return any(marks)


def _size(tree: ElementTree.Element, path: Path) -> tuple[int, int] | None:
    """Width and height; an XML may leave its image's size out, or zero."""
    try:
        width, height = (round(float(tree.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
    except (ValueError, OverflowError):
        raise InputError(f"{path}: its size is not a number; correct it, or take it out") from None
    return (width, height) if width or height else None


def _boxes(item: ElementTree.Element, path: Path) -> list[tuple[float, ...]]:
    """The boxes of an object: one, or, of tools that write an object for each class, several."""
    boxes = item.findall("bndbox")
    if not boxes:
        text_of(item, "bndbox/xmin", path)
    return [_corners(box, path) for box in boxes]


def _corners(box: ElementTree.Element, path: Path) -> tuple[float, ...]:
    values = [box.findtext(side) or "" for side in SIDES]
    if len(box) != len(SIDES) or not all(values):  # one that is missing, or stands there twice
        values = [text_of(box, side, path) for side in SIDES]
    said = ", ".join(values)
    try:
        if "_" in said:  # Python reads 1_0 as 10
            raise ValueError
        return tuple(map(float, values))
    except ValueError:
        raise InputError(f"{path}: box {said} is not four numbers; correct the file") from None
