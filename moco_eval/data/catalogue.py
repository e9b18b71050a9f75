"""Image data sets by name: built in, in memory, in class folders, flat, in tar shards, as published, in VOC format."""

import hashlib
import math
import os
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from moco_eval.config.data_name import called, layout_of
from moco_eval.config.load import require_named
from moco_eval.data import band_statistics, every_file, glance, hugging_face, in_memory
from moco_eval.data.bands import FILE, Bands, bands_of, require_measured, with_stored, write
from moco_eval.data.benchmarks import BENCHMARKS, read_benchmark, read_voc07, read_voc_folder
from moco_eval.data.boxes.samples import one_line
from moco_eval.data.image_set import ImageSet
from moco_eval.data.index import EXTENSIONS, Listing, list_images
from moco_eval.data.label_subsets import held_out, is_published
from moco_eval.data.repeats import repeats
from moco_eval.data.shards import open_shards
from moco_eval.errors import InputError
from moco_eval.preprocessing import BANDS, Preprocessing

IN_MEMORY: dict[str, Callable[[Path, str], ImageSet]] = {
    "cifar10": in_memory.cifar10,
    "cifar100": in_memory.cifar100,
    "stl10": in_memory.stl10,
}
OF_BANDS = ("imagefolder", "flat")  # which a bands.yaml makes sets of images of any number of channels
BAND_FILES = (*EXTENSIONS, ".npy")
UNLABELLED = ("flat", "webdataset")
WITH_BOXES = (
    "voc",
    "voc07",
    "voc-folder",
    "coco",
    "coco-folder",
    "lvis-v0.5",
    "lvis-v1",
    "cityscapes",
)  # detectron2 too
NAMES = ("digits", "imagefolder", "imagenet", *IN_MEMORY, *BENCHMARKS, "voc07", "voc-folder", "hf", *UNLABELLED)
# images of the published splits; a set's first two entries are what is trained on and what is tested on
OFFICIAL: dict[tuple[str, str], int] = {
    ("digits", "train"): in_memory.DIGITS_TRAIN,
    ("digits", "test"): 500,
    ("cifar10", "train"): 50_000,
    ("cifar10", "test"): 10_000,
    ("cifar100", "train"): 50_000,
    ("cifar100", "test"): 10_000,
    ("stl10", "train"): 5_000,
    ("stl10", "test"): 8_000,
    ("stl10", "pretrain"): 105_000,
    ("imagenet", "train"): 1_281_167,
    ("imagenet", "val"): 50_000,
    ("voc07", "trainval"): 5_011,
    ("voc07", "test"): 4_952,
    **{(name, split): count for name, benchmark in BENCHMARKS.items() for split, count in benchmark.images.items()},
}

METRICS = {"voc07": "mAP", "voc-folder": "mAP", **{name: benchmark.metric for name, benchmark in BENCHMARKS.items()}}
NAMED = 200  # classes that `check` names
LAYOUTS = {
    "imagefolder": "train/CLASS/*.jpg -> val/CLASS/*.jpg",
    "voc-folder": "JPEGImages, Annotations, ImageSets/Main",
    "hf": "hf:FOLDER, hf:FILE.parquet, hf:ORG/NAME",
    "flat": "any images, for pretraining only",
    "webdataset": "tar files, for pretraining only",
}

CIFAR_STATISTICS: dict[str, Any] = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
# weiaicunzai/pytorch-cifar100@1b42089, conf/global_settings.py
CIFAR100_STATISTICS: dict[str, Any] = {"mean": (0.5071, 0.4867, 0.4408), "std": (0.2675, 0.2565, 0.2761)}
SMALL: dict[str, Preprocessing] = {
    "cifar10": Preprocessing(size=32, resize=32, **CIFAR_STATISTICS),
    "cifar100": Preprocessing(size=32, resize=32, **CIFAR100_STATISTICS),
    "stl10": Preprocessing(size=96, resize=96),
    "digits": Preprocessing(size=64, resize=64, mean=(0.305, 0.305, 0.305), std=(0.335, 0.335, 0.335)),
}


def open_images(name: str, data: Path | None, split: str) -> ImageSet:
    """Open a data set.

    Args:
        name: one of NAMES; a layout of one's own may be followed by a name, as in imagefolder:pets, and hf by a place.
        data: its folder; None for built-in ones and hf, or where MOCO_EVAL_DATA says it.
        split: 'train' or 'test' (an imagefolder's `val/`), or 'pretrain', which is 'train' but for STL-10, where it
            is the labelled and unlabelled images together, without labels.
    Raises:
        InputError: unknown name, missing or empty folder, a class without images, an incomplete copy.
    """
    full, name = name, layout_of(name)
    require_named(name, NAMES)
    if name == "hf":
        return hugging_face.open_both(full, data)[1] if split == "test" else hugging_face.open_training(full, data)
    if split == "pretrain" and name != "stl10":
        split = "train"
    if name == "digits":
        return in_memory.digits(split)
    folder = data_folder(name, data)
    if name in IN_MEMORY:
        return IN_MEMORY[name](folder, split)
    if name in BENCHMARKS:
        return read_benchmark(name, folder, split)
    if name == "voc07":
        return read_voc07(folder, split)
    if name == "voc-folder":
        images = dict(zip(("train", "test"), read_voc_folder(folder)))[split]
    elif name in UNLABELLED:
        images = _unlabelled(name, folder, split)
    else:
        images = _imagefolder(name, folder, split)
    return replace(images, name=called(full, folder))


def require_there(name: str, data: Path | None) -> None:
    """Raises InputError for an unknown data set, or where its folder is none; its images are not looked at."""
    layout = layout_of(name)
    require_named(layout, NAMES)
    if layout == "hf":
        hugging_face.require_there(name, data)
    elif layout != "digits":
        data_folder(layout, data)


def open_splits(
    name: str,
    data: Path | None,
    train_split: str | None = None,
    test_split: str | None = None,
    val_fraction: float | None = None,
) -> tuple[ImageSet, ImageSet]:
    """Training and test images, of the same classes.

    Args:
        train_split, test_split: files of ImageSets/Main of voc-folder, splits of hf.
        val_fraction: share of each class that is tested on, of an imagefolder or hf that has a single split.
    Raises:
        InputError: as `open_images`; the classes differ; split names for a set whose splits are fixed.
    """
    layout = layout_of(name)
    require_named(layout, NAMES)
    if val_fraction is not None:
        if layout == "hf":
            return _parted(hugging_face.open_whole(name, data, val_fraction), val_fraction)
        folder = data_folder(layout, data) if layout != "digits" else Path()
        whole = _single_folder(layout, folder, val_fraction)
        return _parted(replace(whole, name=called(name, folder)), val_fraction)
    if layout == "voc-folder":
        folder = data_folder("voc-folder", data)
        train, test = read_voc_folder(folder, train_split, test_split)
        return replace(train, name=called(name, folder)), replace(test, name=called(name, folder))
    if layout == "hf":
        train, test = hugging_face.open_both(name, data, train_split, test_split)
    elif train_split or test_split:
        raise InputError(
            f"--train-split and --test-split are for --dataset voc-folder and hf; the splits of {name} are fixed"
        )
    else:
        train, test = (open_images(name, data, split) for split in ("train", "test"))
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        if not odd:
            raise InputError(f"{name}: its two splits number their classes differently; fetch the data set again")
        _refuse_spellings(name, odd)
        raise InputError(f"{name}: {len(odd)} classes are in one split only (first: {odd[0]!r}); mend train/ or val/")
    return train, test


def _refuse_spellings(name: str, odd: list[str]) -> None:
    """Raises InputError where two of the classes that are in one split only are one name in two spellings."""
    seen: dict[str, str] = {}
    for spelling in odd:
        other = seen.setdefault(unicodedata.normalize("NFC", spelling).casefold(), spelling)
        if other != spelling:
            raise InputError(
                f"{name}: class {other!a} of one split and {spelling!a} of the other differ only in capitals or in the "
                "Unicode form of a letter; rename one of them"
            )


def split_deviations(*splits: ImageSet) -> list[str]:
    """In words, where a split of a known data set has not the number of images it was published with.

    Also where a list file chose the training images and is none that was published. Of a subset, its whole is counted.
    """
    counts = [
        f"{images.name} {images.split} of {len(images)} images instead of {OFFICIAL[images.name, images.split]}"
        for images in (split.whole or split for split in splits)
        if len(images) != OFFICIAL.get((images.name, images.split), len(images))
    ]
    listed = [split for split in splits if split.subset and split.labels_per_class is None]
    return counts + [
        f"{images.name} {images.split}: {images.subset}" for images in listed if not is_published(images.subset)
    ]


def known() -> list[str]:
    """A line about each data set: its name, its splits, its metric."""
    lines = []
    for name in NAMES:
        counts = [count for (owner, _), count in OFFICIAL.items() if owner == name][:2]
        splits = " -> ".join(f"{count:,}" for count in counts) or LAYOUTS[name]
        metric = "" if name in UNLABELLED else METRICS.get(name, "top1")
        lines.append(row(name, splits, metric))
    return lines


def row(name: str, images: str, metric: str) -> str:
    """A line of the list of data sets."""
    return f"{name:<12} {images:<42} {metric}".rstrip()


def check(
    name: str,
    data: Path | None,
    train_split: str | None = None,
    test_split: str | None = None,
    writes: bool = False,
    val_fraction: float | None = None,
    quick: bool = False,
) -> list[str]:
    """What a copy of a data set holds and where it deviates from the published one, in lines.

    Args:
        writes: measure mean and standard deviation of each band and write them to bands.yaml.
        quick: look at the headers of images alone.
    Raises:
        InputError: as `open_splits`.
    """
    bands = _check_bands(name, data, writes)
    if bands and bands[-1].startswith(NOT_WRITTEN):
        return bands
    if name in UNLABELLED:
        splits: tuple[ImageSet, ...] = (open_images(name, data, "train"),)
    else:
        splits = open_splits(name, data, train_split, test_split, val_fraction)
    lines = [
        f"{images.name} {images.split}: {len(images):,} images, fingerprint {images.fingerprint}" for images in splits
    ]
    if splits[0].classes:
        several = ", several in an image" if splits[0].multi_label else ""
        lines.append(f"{len(splits[0].classes)} classes{several}; metric {splits[0].metric}")
        lines.append(f"classes: {_named(splits[0].classes)}")
    lines += [f"not as published: {deviation}" for deviation in split_deviations(*splits)]
    for images in splits:
        lines += glance.passed_over(images)
        lines += [f"doubtful: {doubt}" for doubt in glance.doubts(images, "pass")]
        lines += [f"doubtful: {words}" for words in every_file.look(images, quick)]
    lines += [f"not read: {words}" for words in every_file.other_suffixes(splits)]
    if len(splits) == 2 and (copies := repeats(*splits)) and copies.rows:
        lines.append(f"repeated: {copies.sentence()}")
    return bands + lines + [f"damaged: {damage}" for images in splits for damage in images.damaged]


NOT_WRITTEN = "not written: "


def _check_bands(name: str, data: Path | None, writes: bool) -> list[str]:
    """Mean and standard deviation of each band of the training images, in lines; none for a set of RGB images.

    Raises:
        InputError: `writes` for a set that has no bands, or whose bands.yaml has mean and std already.
    """
    if name not in OF_BANDS:
        if writes:
            raise InputError(f"--write is for images of any number of channels ({', '.join(OF_BANDS)}), not for {name}")
        return []
    folder = data_folder(name, data)
    bands = bands_of(folder) or (Bands(folder / FILE) if writes else None)
    if bands is None:
        return []
    if writes and bands.mean:
        raise InputError(f"{bands.path} has mean and std already; remove both lines to have them measured again")
    listing = list_images(folder, None if name == "flat" else "train", BAND_FILES)
    images = ImageSet(name, "train", listing.classes, None, listing.fingerprint, **_files(listing))
    images = of_bands(images, bands, measured=False)
    measured = band_statistics.measured(images)
    lines = [f"{name} train: {measured.stored} bands, measured over {len(images):,} images"]
    lines += band_statistics.table(measured)
    if bands.mean:
        return lines + [f"doubtful: {words}" for words in band_statistics.differences(bands, measured)]
    if not writes:
        return [*lines, f"{NOT_WRITTEN}{bands.path} has no mean and std yet; --write puts these there"]
    write(measured)
    bands_of(folder)  # raises where a band is of one value
    return [*lines, f"written to {bands.path}"]


def _named(classes: tuple[str, ...]) -> str:
    """The names of all classes, of many the first."""
    first = ", ".join(one_line(name) for name in classes[:NAMED])
    return first if len(classes) <= NAMED else f"{first}, ... and {len(classes) - NAMED} more"


def check_too(name: str, data: Path | None, train_split: str | None, test_split: str | None) -> list[str]:
    """The lines of `check` for a detection data set that also tells which classes an image shows; else none."""
    if name not in NAMES:
        return []
    try:
        lines = check(name, data, train_split, test_split)
    except InputError as error:
        lines = [f"refused: {error}"]
    return [f"as classification: {line}" for line in lines]


def require_whole(images: ImageSet, limit: int) -> list[str]:
    """What could not be listed, as a warning in words; none where all is whole.

    Raises:
        InputError: it is more than `limit` (bad_images).
    """
    if not images.damaged:
        return []
    several = ", ..." if len(images.damaged) > 5 else ""
    message = f"{len(images.damaged)} damaged in {images.name}: {', '.join(images.damaged[:5])}{several}"
    if len(images.damaged) > limit:
        raise InputError(f"{message}; mend them, or allow them with --set bad_images={len(images.damaged)}")
    return [f"{message}; the images before each damage are used"]


def data_folder(name: str, data: Path | None) -> Path:
    """`data`, or what MOCO_EVAL_DATA names, or for sets with boxes DETECTRON2_DATASETS; must be a folder."""
    variables = ("MOCO_EVAL_DATA", "DETECTRON2_DATASETS") if name in WITH_BOXES else ("MOCO_EVAL_DATA",)
    for variable in variables:
        data = data or (Path(os.environ[variable]) if os.environ.get(variable) else None)
    if data is None:
        raise InputError(
            f"--dataset {name} needs --data FOLDER (or the environment variable MOCO_EVAL_DATA); for example "
            f"--dataset {name} --data /datasets/{name}, or try the built-in --dataset digits, which needs none"
        )
    if not data.exists():
        raise InputError(f"--data {data} does not exist")
    if not data.is_dir():
        raise InputError(f"--data {data} is a file; give the folder of the data set")
    return data


TESTED_ON = {"imagefolder": ("val", "test"), "imagenet": ("val",)}  # folders, the first that is there
SPLIT_SEED = 0  # of the images that --val-fraction takes


def _imagefolder(name: str, folder: Path, split: str) -> ImageSet:
    choices = ("train",) if split == "train" else TESTED_ON[name]
    directory = next((one for one in choices if (folder / one).is_dir()), None)
    if directory is None:
        raise InputError(
            f"{folder} has no {'/ or '.join(choices)}/ folder; an imagefolder holds train/CLASS/*.jpg and "
            f"val/CLASS/*.jpg{_one_folder(name)}"
        )
    return _class_folders(name, folder, directory)


def _one_folder(name: str) -> str:
    """The way out for images in a single folder."""
    return "; --val-fraction 0.2 tests on a fifth of the images of a single folder" if name == "imagefolder" else ""


def _single_folder(name: str, folder: Path, share: float) -> ImageSet:
    """The images of the only folder of class folders: `train`, or the data set's own.

    Raises:
        InputError: another kind of data set, or one that has a split of its own.
    """
    if name != "imagefolder":
        raise InputError(f"--val-fraction is for --dataset imagefolder and hf; the splits of {name} are fixed")
    if own := next((one for one in TESTED_ON["imagefolder"] if (folder / one).is_dir()), None):
        raise InputError(f"--val-fraction {share:g}: {folder} has {own}/ to test on; leave the option out")
    return _class_folders(name, *((folder, "train") if (folder / "train").is_dir() else (folder.parent, folder.name)))


def _parted(whole: ImageSet, share: float) -> tuple[ImageSet, ImageSet]:
    """The images of one split in two: the share of each class is tested on."""
    assert whole.labels is not None
    rows = held_out(whole.labels, share, SPLIT_SEED)
    shares = {"train": 1 - share, "test": share}
    return tuple(  # type: ignore[return-value]
        replace(whole.take(part, f"{100 * shares[split]:g} % of each class, drawn from seed {SPLIT_SEED}"), split=split)
        for split, part in zip(shares, rows)
    )


def _class_folders(name: str, folder: Path, directory: str) -> ImageSet:
    """The images of one folder of class folders. Raises InputError where it is none, or no ImageNet."""
    bands = bands_of(folder) if layout_of(name) in OF_BANDS else None
    listing = list_images(folder, directory, BAND_FILES if bands else EXTENSIONS)
    if name == "imagenet" and len(listing.classes) != 1000:
        raise InputError(
            f"{folder} has {len(listing.classes)} class folders, ImageNet has 1000; for other data take "
            "--dataset imagefolder"
        )
    images = ImageSet(name, directory, listing.classes, listing.labels, listing.fingerprint, **_files(listing))
    return of_bands(images, bands) if bands else images


def _files(listing: Listing) -> dict[str, Any]:
    return {"files": listing.files, "passed_over": listing.passed_over}


def of_bands(images: ImageSet, bands: Bands, measured: bool = True) -> ImageSet:
    """A set whose folder has a bands.yaml. Its fingerprint covers which bands are taken, too.

    Args:
        measured: refuse it where mean and std are not known yet.
    Raises:
        InputError: the first image cannot be read, or bands.yaml does not fit it.
    """
    bands = with_stored(bands, images.read(0), images.name_of(0))
    if measured:
        require_measured(bands, images.name)
    taken = ",".join(map(str, bands.order))
    fingerprint = hashlib.sha256(f"{images.fingerprint} bands {taken}".encode()).hexdigest()
    return replace(images, fingerprint=fingerprint, bands=bands)


def _unlabelled(name: str, folder: Path, split: str) -> ImageSet:
    if split != "train":
        raise InputError(f"--dataset {name} has no labels: it is for pretraining only; take imagefolder to evaluate")
    if name == "flat":
        bands = bands_of(folder)
        listing = list_images(folder, None, BAND_FILES if bands else EXTENSIONS)
        images = ImageSet("flat", "train", (), None, listing.fingerprint, **_files(listing))
        return of_bands(images, bands) if bands else images
    shards, fingerprint, damaged = open_shards(folder)
    about = ("webdataset", "train", (), None, fingerprint)
    return ImageSet(*about, files=shards, damaged=damaged, passed_over=shards.passed_over)


def preprocessing_for(dataset: str, encoder_says: Preprocessing | None) -> Preprocessing:
    """The encoder's own contract; where it has none (`random:`, `pixels`), the data set's."""
    return encoder_says or SMALL.get(dataset, Preprocessing())


def preprocessing_on(
    images: ImageSet, encoder_says: Preprocessing | None, channels: int, size: int | None = None
) -> Preprocessing:
    """What the images become for an encoder: its own contract; where it has none, the data set's.

    A network of RGB images sees three bands less their own mean, over their own standard deviation.

    Args:
        channels: of the images that the network takes.
        size: of the only images that it takes, in pixels; None where others will do.
    Raises:
        InputError: the images have other channels than the network takes.
    """
    bands, own = images.bands, encoder_says
    if channels != images.channels:
        raise InputError(_other_channels(images, channels))
    if not bands:
        if own and own.channels == BANDS:
            raise InputError(
                f"the network was trained on {channels} bands in the units in which they are stored, and the images of "
                f"{images.name} are RGB of 8 bits; take a network trained on RGB, or a {FILE} beside the data that "
                "describes them as the same bands"
            )
        return preprocessing_for(images.name, own)
    if own and own.channels == BANDS:
        return own
    if own and own.range == 255:
        raise InputError(
            f"the network takes RGB of 0 to 255 as they are, and {bands.path} has bands of other units; take a network "
            "trained on such bands, or convert them to RGB of 8 bits"
        )
    usual = own or (Preprocessing(size, math.ceil(size * 256 / 224)) if size else Preprocessing())
    return replace(
        bands.preprocessing(usual.size, usual.resize), interpolation=usual.interpolation, antialias=usual.antialias
    )


def _other_channels(images: ImageSet, channels: int) -> str:
    """What a network of other channels than the images have, and what to do, in words."""
    bands = images.bands
    both = f"the network takes images of {channels} channels, and those of {images.name} have {images.channels}"
    trained = f"take one trained on {images.channels} channels (moco-eval pretrain CONFIG --dataset {images.name})"
    if not bands:
        return f"{both} (RGB of 8 bits); {trained}, or give images of {channels} channels and a {FILE} beside them"
    if bands.stored > channels:
        few = f"{list(range(channels, 0, -1))}, say," if channels <= 4 else f"{channels} numbers"
        return f"{both}; {trained}, or choose {channels} of the bands: a list `bands` of {few} in {bands.path}"
    return f"{both}; {trained}, or give images of {channels} channels"


def band_deviations(images: ImageSet, encoder_says: Preprocessing | None) -> list[str]:
    """In words, where a network of RGB images sees bands instead."""
    if not images.bands or not encoder_says or encoder_says.channels == BANDS:
        return []
    numbers = ", ".join(str(place + 1) for place in images.bands.order)
    return [
        f"bands {numbers}, each less its mean and over its standard deviation in the data, instead of the "
        f"{encoder_says.channels} images that the encoder expects"
    ]


def preprocessing_deviations(dataset: str, used: Preprocessing, size: int | None = None) -> list[str]:
    """In words, where images are cut to another size than the data set's protocols do (224 of 256; 32 for CIFAR).

    Args:
        size: of a protocol that has the same for every data set.
    """
    usual = Preprocessing(size) if size else SMALL.get(dataset, Preprocessing())
    if (used.size, used.resize) == (usual.size, usual.resize):
        return []
    return [f"images of {used.size} pixels (resized to {used.resize}) instead of {usual.size} ({usual.resize})"]
