"""Published data sets whose labels come from lists: those that torchvision reads, and Pascal VOC's classification.

Splits and metrics: Kornblith et al. 2019, arXiv:1805.08974, Table 1; docs/datasets.md says where each is published.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moco_eval import limits
from moco_eval.data.boxes import voc
from moco_eval.data.image_set import ImageSet
from moco_eval.data.index import fingerprint, packed
from moco_eval.errors import InputError


@dataclass(frozen=True)
class Benchmark:
    """A data set as torchvision reads it.

    Attributes:
        reader: torchvision's class.
        paths: its attribute that holds the images' paths.
        splits: torchvision's splits that train and test are made of.
        images: how many images train and test were published with.
        metric: what papers report; see `ImageSet`.
        marker: a folder below --data that is there when the set is.
        lists: the files that torchvision reads beside the images, below --data.
        layout: what must lie below --data.
        url: where it is published.
    """

    reader: str
    paths: str
    splits: dict[str, tuple[str, ...]]
    images: dict[str, int]
    metric: str
    marker: str
    lists: str
    layout: str
    url: str


BENCHMARKS = {
    "flowers102": Benchmark(
        reader="Flowers102",
        paths="_image_files",
        splits={"train": ("train", "val"), "test": ("test",)},
        images={"train": 2_040, "test": 6_149},
        metric="mean_per_class",
        marker="flowers-102/jpg",
        lists="flowers-102/*.mat",
        layout="flowers-102/jpg/image_*.jpg, flowers-102/imagelabels.mat and flowers-102/setid.mat",
        url="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
    ),
    "pets": Benchmark(
        reader="OxfordIIITPet",
        paths="_images",
        splits={"train": ("trainval",), "test": ("test",)},
        images={"train": 3_680, "test": 3_669},
        metric="mean_per_class",
        marker="oxford-iiit-pet/annotations",
        lists="oxford-iiit-pet/annotations/*.txt",
        layout="oxford-iiit-pet/images/*.jpg and oxford-iiit-pet/annotations/{trainval,test}.txt",
        url="https://www.robots.ox.ac.uk/~vgg/data/pets/",
    ),
    "food101": Benchmark(
        reader="Food101",
        paths="_image_files",
        splits={"train": ("train",), "test": ("test",)},
        images={"train": 75_750, "test": 25_250},
        metric="top1",
        marker="food-101/meta",
        lists="food-101/meta/*.json",
        layout="food-101/images/CLASS/*.jpg and food-101/meta/{train,test}.json",
        url="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
    ),
    "dtd": Benchmark(  # the first of its ten partitions
        reader="DTD",
        paths="_image_files",
        splits={"train": ("train", "val"), "test": ("test",)},
        images={"train": 3_760, "test": 1_880},
        metric="top1",
        marker="dtd/dtd/labels",
        lists="dtd/dtd/labels/*.txt",
        layout="dtd/dtd/images/CLASS/*.jpg and dtd/dtd/labels/{train1,val1,test1}.txt",
        url="https://www.robots.ox.ac.uk/~vgg/data/dtd/",
    ),
}


def read_benchmark(name: str, folder: Path, split: str) -> ImageSet:
    """One of BENCHMARKS, from its published files; nothing is fetched.

    Args:
        folder: what torchvision calls the root, or the set's own folder in it.
        split: 'train' or 'test'.
    Raises:
        InputError: the files are not there, not the published ones, or an image is missing.
    """
    benchmark = BENCHMARKS[name]
    root = _root(name, folder)
    parts = [_read_part(name, root, part) for part in benchmark.splits[split]]
    classes = parts[0][2]
    if any(part[2] != classes for part in parts):
        raise InputError(f"{name}: its {' and '.join(benchmark.splits[split])} lists do not have the same classes")
    paths, labels = [path for part in parts for path in part[0]], [label for part in parts for label in part[1]]
    if not paths or not 0 <= min(labels) <= max(labels) < len(classes):
        raise InputError(
            f"{root / benchmark.marker}: {split} lists {len(paths)} images, or a label outside its classes"
        )
    return _file_set(name, split, root, paths, np.array(labels, np.int64), classes, benchmark.metric)


def _root(name: str, folder: Path) -> Path:
    """The folder that the set's own folder lies in."""
    benchmark = BENCHMARKS[name]
    own, _, inside = benchmark.marker.partition("/")
    if (folder / benchmark.marker).is_dir():
        return folder
    absolute = folder.absolute()  # of '.', too
    if absolute.name == own and (folder / inside).is_dir():
        return absolute.parent
    raise InputError(
        f"{folder} has no {benchmark.marker}; --dataset {name} reads torchvision's layout: {benchmark.layout} below "
        f"--data. Published at {benchmark.url}"
    )


def _read_part(name: str, root: Path, part: str) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """Paths, labels and class names of one of torchvision's splits."""
    from torchvision import datasets

    benchmark = BENCHMARKS[name]
    try:
        for path in root.glob(benchmark.lists):
            limits.open_unbuffered(path, "list").close()
        dataset: Any = getattr(datasets, benchmark.reader)(root, split=part)
    except InputError:
        raise
    except Exception as error:  # whatever damaged lists make torchvision's readers raise
        reason = " ".join(str(error).replace(" You can use download=True to download it", "").split())
        raise InputError(
            f"{root / benchmark.marker}: torchvision cannot read {name}'s {part} split ({type(error).__name__}: "
            f"{reason}); it takes {benchmark.layout} as published at {benchmark.url}"
        ) from None
    labels = [int(label) for label in dataset._labels]
    # torchvision before 0.22 has no names of the flowers, which are numbered from 1
    classes = getattr(dataset, "classes", None) or [str(number + 1) for number in range(102)]
    return getattr(dataset, benchmark.paths), labels, tuple(classes)


def _file_set(
    name: str,
    split: str,
    root: Path,
    paths: list[Path],
    labels: np.ndarray,
    classes: tuple[str, ...],
    metric: str,
) -> ImageSet:
    """A set of image files in the order of their paths, whatever the order of the lists; the labels belong to `paths`.

    Its fingerprint covers the labels too: they are not in the paths.
    """
    entries = [(os.fsencode(path.relative_to(root)), _size(path, name)) for path in paths]
    order = sorted(range(len(entries)), key=entries.__getitem__)
    entries, labels = [entries[i] for i in order], labels[order]
    digest = hashlib.sha256(fingerprint(entries).encode() + np.ascontiguousarray(labels).tobytes()).hexdigest()
    images = packed(str(root), [relative for relative, _ in entries], [size for _, size in entries])
    return ImageSet(name, split, classes, labels, digest, files=images, metric=metric)


def _size(path: Path, name: str) -> int:
    try:
        about = path.stat()
        limits.require_regular(path, about)
        return about.st_size
    except FileNotFoundError:
        raise InputError(f"{path} is missing, which {name} lists; fetch the data set again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); mend or replace it") from None


# Pascal VOC


def read_voc07(folder: Path, split: str) -> ImageSet:
    """VOC2007 classification: trainval to test, 20 classes, several in an image.

    Args:
        folder: VOC2007, VOCdevkit, or the folder that holds it.
        split: 'train' (trainval) or 'test'.
    Raises:
        InputError: files are missing or damaged.
    """
    root = voc.voc07_folder(folder)
    names = dict(zip(("train", "test"), voc.find_splits(root, "trainval", "test")))
    entries = voc.read_entries(root, names[split])
    return _voc_set("voc07", names[split], root, entries, voc.VOC_CLASSES)


def read_voc_folder(
    root: Path, train_split: str | None = None, test_split: str | None = None
) -> tuple[ImageSet, ImageSet]:
    """Training and test images of any folder in VOC format, to be told which classes they show.

    Args:
        root: holds JPEGImages, Annotations and ImageSets/Main.
        train_split, test_split: files of ImageSets/Main; by default as in detection, see `boxes.voc.read_voc_folder`.
    Raises:
        InputError: what is missing or damaged, with its file; a class in the test split only.
    """
    splits = voc.find_splits(root, train_split, test_split)
    entries = [voc.read_entries(root, split) for split in splits]
    objects = ((item, entry.xml) for entry in entries[0] for item in voc.objects_in(voc.read_xml(entry.xml)))
    classes = voc.class_names((voc.text_of(item, "name", xml) for item, xml in objects), entries[0])
    train, test = (_voc_set("voc-folder", split, root, part, classes) for split, part in zip(splits, entries))
    return train, test


def _voc_set(name: str, split: str, root: Path, entries: list[voc.Entry], classes: tuple[str, ...]) -> ImageSet:
    labels = np.stack([_shown(entry, classes) for entry in entries])
    if not (labels == 1).any():
        raise InputError(
            f"{root}: none of the {len(entries)} images of {split} has an object that counts (difficult ones count "
            "neither way); add some, or take another split"
        )
    return _file_set(name, split, root, [entry.image for entry in entries], labels, classes, "mAP")


def _shown(entry: voc.Entry, classes: tuple[str, ...]) -> np.ndarray:
    """Which classes an image shows, (C,) int8: 1, 0, or -1 where all objects of the class are difficult.

    The devkit's own ImageSets/Main/CLASS_SPLIT.txt say the same as 1, -1 and 0.
    """
    row = np.zeros(len(classes), np.int8)
    for item in voc.objects_in(voc.read_xml(entry.xml)):
        name = voc.text_of(item, "name", entry.xml)
        if name not in classes:
            raise InputError(
                f"{entry.xml}: class {name!r} is not among the {len(classes)} classes trained on "
                f"({', '.join(classes[:25])}); correct the file or the splits"
            )
        label = classes.index(name)
        if not voc.is_difficult(item, entry.xml):
            row[label] = 1
        elif row[label] == 0:
            row[label] = -1
    return row
