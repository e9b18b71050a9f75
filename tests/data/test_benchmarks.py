"""Published data sets: layouts drawn here in small, as torchvision and the VOC devkit lay them out."""

import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from commands import error_line, in_process
from PIL import Image
from torchvision import datasets as torchvision_datasets

from moco_eval.cli import options
from moco_eval.data import catalogue as data_sets
from moco_eval.data.benchmarks import BENCHMARKS
from moco_eval.data.catalogue import NAMES, OFFICIAL, known, open_images, open_splits, split_deviations
from moco_eval.data.image_set import require_single_label
from moco_eval.errors import InputError


def draw(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8 + shade, 6), (shade, 2 * shade, 9)).save(path, quality=90)


def write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def flowers102(root: Path, monkeypatch) -> None:
    from scipy.io import savemat

    files = {key: (name, None) for key, (name, _) in torchvision_datasets.Flowers102._file_dict.items()}
    monkeypatch.setattr(torchvision_datasets.Flowers102, "_file_dict", files)  # ours have not the published md5
    root = root / "flowers-102"
    for number in range(1, 8):
        draw(root / "jpg" / f"image_{number:05d}.jpg", number)
    savemat(root / "imagelabels.mat", {"labels": np.array([[2, 1, 2, 1, 102, 1, 3]])})
    savemat(root / "setid.mat", {"trnid": [[6, 1]], "valid": [[2, 7]], "tstid": [[3, 4, 5]]})


def pets(root: Path, _monkeypatch) -> None:
    root = root / "oxford-iiit-pet"
    lines = {
        "trainval": ["Beagle_2 2 2 1", "Abyssinian_100 1 1 1", "Abyssinian_5 1 1 1"],
        "test": ["Beagle_1 2 2 1", "Abyssinian_7 1 1 1"],
    }
    for split, rows in lines.items():
        write(root / "annotations" / f"{split}.txt", rows)
        for row in rows:
            draw(root / "images" / f"{row.split()[0]}.jpg", len(row))


def food101(root: Path, _monkeypatch) -> None:
    root = root / "food-101"
    lists = {"train": {"waffles": ["waffles/7", "waffles/3"], "ramen": ["ramen/1"]}}
    lists["test"] = {"ramen": ["ramen/2"], "waffles": ["waffles/8"]}
    for split, classes in lists.items():
        write(root / "meta" / f"{split}.json", [json.dumps(classes)])
        for name in itertools.chain(*classes.values()):
            draw(root / "images" / f"{name}.jpg", int(name[-1]))


def dtd(root: Path, _monkeypatch) -> None:
    root = root / "dtd" / "dtd"
    for shade, split in enumerate(("train1", "val1", "test1")):
        rows = [f"{name}/{name}_{split}.jpg" for name in ("woven", "banded")]
        write(root / "labels" / f"{split}.txt", rows)
        for row in rows:
            draw(root / "images" / row, shade)


LAYOUTS = {"flowers102": flowers102, "pets": pets, "food101": food101, "dtd": dtd}
# (file, class) of each split, in the order of their paths
EXPECTED = {
    "flowers102": (
        [("image_00001.jpg", 1), ("image_00002.jpg", 0), ("image_00006.jpg", 0), ("image_00007.jpg", 2)],
        [("image_00003.jpg", 1), ("image_00004.jpg", 0), ("image_00005.jpg", 101)],
    ),
    "pets": (
        [("Abyssinian_100.jpg", 0), ("Abyssinian_5.jpg", 0), ("Beagle_2.jpg", 1)],
        [("Abyssinian_7.jpg", 0), ("Beagle_1.jpg", 1)],
    ),
    "food101": ([("1.jpg", 0), ("3.jpg", 1), ("7.jpg", 1)], [("2.jpg", 0), ("8.jpg", 1)]),
    "dtd": (
        [("banded_train1.jpg", 0), ("banded_val1.jpg", 0), ("woven_train1.jpg", 1), ("woven_val1.jpg", 1)],
        [("banded_test1.jpg", 0), ("woven_test1.jpg", 1)],
    ),
}
benchmarks = pytest.mark.parametrize("name", BENCHMARKS)


@benchmarks
def test_images_and_labels_are_the_published_lists(name, tmp_path, monkeypatch):
    LAYOUTS[name](tmp_path, monkeypatch)
    splits = open_splits(name, tmp_path)
    for images, expected in zip(splits, EXPECTED[name]):
        found = [(Path(images.name_of(i)).name, int(images.labels[i])) for i in range(len(images))]
        assert found == expected
        assert images.image(0).mode == "RGB" and images.metric == BENCHMARKS[name].metric
        assert Path(images.name_of(0)).is_file()
    train, test = splits
    assert train.fingerprint != test.fingerprint
    assert split_deviations(train, test) == [
        f"{name} {one.split} of {len(one)} images instead of {OFFICIAL[name, one.split]}" for one in splits
    ]


@benchmarks
def test_the_sets_own_folder_will_do_and_a_relative_one(name, tmp_path, monkeypatch):
    LAYOUTS[name](tmp_path, monkeypatch)
    whole = open_images(name, tmp_path, "test")
    own = tmp_path / BENCHMARKS[name].marker.split("/")[0]
    assert open_images(name, own, "test").fingerprint == whole.fingerprint
    monkeypatch.chdir(own)
    assert open_images(name, Path(), "test").fingerprint == whole.fingerprint
    monkeypatch.chdir(tmp_path)
    here = open_images(name, Path(), "test")
    assert here.fingerprint == whole.fingerprint and here.image(0).size == whole.image(0).size


@benchmarks
def test_what_is_missing_is_said_with_the_layout_and_where_it_is_published(name, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"torchvision's layout: .* below --data. Published at https://"):
        open_images(name, tmp_path, "train")
    LAYOUTS[name](tmp_path, monkeypatch)
    Path(open_images(name, tmp_path, "test").name_of(0)).unlink()
    with pytest.raises(InputError, match="jpg is missing, which"):
        open_images(name, tmp_path, "test")


@pytest.mark.parametrize(
    ("name", "file", "text"),
    [
        ("pets", "oxford-iiit-pet/annotations/test.txt", "Beagle_1 2\n"),
        ("food101", "food-101/meta/test.json", "{"),
        ("dtd", "dtd/dtd/labels/test1.txt", "banded\n"),
        ("flowers102", "flowers-102/setid.mat", "no mat"),
    ],
)
def test_damaged_lists_are_refused(name, file, text, tmp_path, monkeypatch):
    LAYOUTS[name](tmp_path, monkeypatch)
    (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match=f"torchvision cannot read {name}'s test split"):
        open_images(name, tmp_path, "test")


def test_flowers_with_another_md5_are_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        flowers102(tmp_path, patched)
    with pytest.raises(InputError, match="not found or corrupted"):
        open_images("flowers102", tmp_path, "train")


def test_a_fingerprint_covers_labels_that_only_a_list_says_but_not_its_order(tmp_path):
    pets(tmp_path, None)
    before, lists = open_images("pets", tmp_path, "train"), tmp_path / "oxford-iiit-pet/annotations/trainval.txt"
    lines = lists.read_text().splitlines()
    write(lists, lines[::-1])
    again = open_images("pets", tmp_path, "train")
    assert again.fingerprint == before.fingerprint and np.array_equal(again.labels, before.labels)
    write(lists, ["Beagle_2 1 2 1", *lines[1:]])
    assert open_images("pets", tmp_path, "train").fingerprint != before.fingerprint


def test_splits_that_number_classes_differently_are_refused(tmp_path):
    pets(tmp_path, None)
    write(tmp_path / "oxford-iiit-pet/annotations/test.txt", ["Beagle_1 1 2 1", "Abyssinian_7 2 1 1"])
    with pytest.raises(InputError, match="number their classes differently"):
        open_splits("pets", tmp_path)


# CIFAR-100


def cifar100(root: Path, more: dict | None = None) -> np.ndarray:
    root = root / "cifar-100-python"
    root.mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
    names = [f"class {i}".encode() for i in range(100)]
    (root / "meta").write_bytes(pickle.dumps({b"fine_label_names": names}, protocol=2))
    for split in ("train", "test"):
        batch = {b"data": rows, b"fine_labels": [99, 0, 3, 3, 4, 5], b"coarse_labels": [1] * 6} | (more or {})
        (root / split).write_bytes(pickle.dumps(batch, protocol=2))
    return rows


def test_cifar100_reads_its_fine_labels(tmp_path):
    rows = cifar100(tmp_path)
    train, test = open_splits("cifar100", tmp_path)
    assert (
        train.labels.tolist() == [99, 0, 3, 3, 4, 5] and train.classes[99] == "class 99" and len(train.classes) == 100
    )
    assert np.array_equal(train.pixels[4], rows[4].reshape(3, 32, 32).transpose(1, 2, 0))
    assert split_deviations(train, test)[0] == "cifar100 train of 6 images instead of 50000"
    assert len(open_images("cifar100", tmp_path / "cifar-100-python", "test")) == 6


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({b"fine_labels": [0, 1]}, "6 images, labels of shape"),
        ({b"fine_labels": [0, 1, 2, 3, 4, 100]}, "a label outside its 100 classes"),
        ({b"data": b"x"}, "not a CIFAR batch"),
    ],
)
def test_damaged_cifar100_is_refused(more, words, tmp_path):
    cifar100(tmp_path, more)
    with pytest.raises(InputError, match=words):
        open_images("cifar100", tmp_path, "train")


def test_missing_cifar100_files_are_named(tmp_path):
    cifar100(tmp_path)
    (tmp_path / "cifar-100-python/test").unlink()
    with pytest.raises(InputError, match="test is missing; --data must hold cifar-100-python"):
        open_images("cifar100", tmp_path, "test")
    (tmp_path / "cifar-100-python/meta").write_bytes(pickle.dumps([1]))
    with pytest.raises(InputError, match="not a CIFAR batch but a list"):
        open_images("cifar100", tmp_path, "train")


# VOC


def voc(root: Path, shown: dict[str, list[tuple[str, int]]], **splits: str) -> Path:
    """A VOC folder; `shown` is (class, difficult) of each image's objects, `splits` the images of each list."""
    for name, objects in shown.items():
        draw(root / "JPEGImages" / f"{name}.jpg", 3)
        items = "".join(f"<object><name>{c}</name><difficult>{d}</difficult></object>" for c, d in objects)
        write(root / "Annotations" / f"{name}.xml", [f"<annotation>{items}</annotation>"])
    for split, names in splits.items():
        write(root / "ImageSets/Main" / f"{split}.txt", list(names))
    return root


SHOWN = {
    "a": [("dog", 0), ("dog", 1), ("cat", 1)],
    "b": [("cat", 0)],
    "c": [("cat", 1), ("cat", 0), ("dog", 1), ("dog", 1)],
    "d": [],
}


def test_voc_labels_are_shown_not_shown_and_difficult_only(tmp_path):
    train, test = open_splits("voc-folder", voc(tmp_path, SHOWN, trainval="ba", test="dc"))
    assert train.classes == ("cat", "dog") and train.multi_label and train.metric == "mAP"
    assert train.labels.dtype == np.int8
    assert train.labels.tolist() == [[-1, 1], [1, 0]]  # a, b: in the order of their names
    assert test.labels.tolist() == [[1, -1], [0, 0]]
    assert (train.split, test.split, split_deviations(train, test)) == ("trainval", "test", [])
    with pytest.raises(InputError, match="moco-eval svm"):
        require_single_label(test)
    with pytest.raises(InputError, match="moco-eval svm"):
        train.few_labels(1, 0)


@pytest.mark.parametrize("word, shown", [("False", 1), ("no", 1), ("0.0", 1), ("True", -1), ("yes", -1)])
def test_voc_marks_in_other_tools_words(tmp_path, word, shown):
    train, _ = open_splits("voc-folder", voc(tmp_path, SHOWN | {"a": [("cat", word)]}, trainval="ba", test="b"))
    assert train.labels.tolist() == [[shown], [1]]


@pytest.mark.parametrize(
    "odd, words",
    [
        ([("cat", "Unspecified")], "<difficult> is 'Unspecified' and must be 0 or 1"),
        ([("cat", 1), ("dog", 1)], r"none of the 1 images of test has an object that counts"),
        ([], r"none of the 1 images of test has an object that counts"),
    ],
)
def test_voc_that_cannot_be_judged_is_refused(tmp_path, odd, words):
    root = voc(tmp_path, SHOWN | {"e": odd}, trainval="ba", test="e")
    with pytest.raises(InputError, match=words):
        open_splits("voc-folder", root)


def test_voc_splits_are_chosen_by_name(tmp_path):
    root = voc(tmp_path, SHOWN, trainval="ba", test="dc", mine="bc", yours="a")
    train, test = open_splits("voc-folder", root, "mine", "yours")
    assert (train.split, len(train), test.split, len(test)) == ("mine", 2, "yours", 1)
    with pytest.raises(InputError, match=r"--train-split.*Did you mean 'mine'"):
        open_splits("voc-folder", root, "mines", None)
    with pytest.raises(InputError, match="for --dataset voc-folder"):
        open_splits("digits", None, "train", None)


def test_a_class_of_the_test_split_alone_is_refused(tmp_path):
    root = voc(tmp_path, SHOWN | {"e": [("cow", 0)]}, trainval="ba", test="e")
    with pytest.raises(InputError, match=r"e.xml: class 'cow' is not among the 2 classes"):
        open_splits("voc-folder", root)


def test_voc07_takes_voc2007_and_the_folders_above_it(tmp_path):
    root = voc(tmp_path / "VOCdevkit/VOC2007", SHOWN, trainval="ba", test="dc")
    found = [open_splits("voc07", folder) for folder in (root, root.parent, tmp_path)]
    assert len({train.fingerprint for train, _ in found}) == 1
    train, test = found[0]
    assert train.labels.shape == test.labels.shape == (2, 20)
    assert [train.classes[i] for i in np.flatnonzero(train.labels[0])] == ["cat", "dog"]
    assert split_deviations(train, test)[0] == "voc07 trainval of 2 images instead of 5011"
    assert open_images("voc07", tmp_path, "pretrain").split == "trainval"
    with pytest.raises(InputError, match="give VOCdevkit or VOC2007"):
        open_images("voc07", tmp_path / "VOCdevkit/VOC2007/Annotations", "train")


@pytest.mark.data
def test_labels_of_real_voc_images_are_those_of_the_devkits_class_lists(shared_data):
    root = shared_data / "VOCdevkit/VOC2012"
    train, test = open_splits("voc-folder", root)
    assert (len(train), len(test), len(train.classes)) == (60, 40, 20)
    ours_of = {"1": 1, "-1": 0, "0": -1}
    seen = set()
    for images in (train, test):
        for label, name in enumerate(images.classes):
            lines = (root / f"ImageSets/Main/{name}_{images.split}.txt").read_text().split()
            said = dict(zip(lines[::2], lines[1::2]))
            found = {Path(images.name_of(i)).stem: int(images.labels[i, label]) for i in range(len(images))}
            assert found == {image: ours_of[word] for image, word in said.items()}
            seen |= set(found.values())
    assert seen == {1, 0, -1}


# The command


def test_every_name_is_listed_and_in_the_help(capfd, monkeypatch):
    out, _ = in_process(capfd, monkeypatch, "datasets")
    detected = ("voc", "coco", "lvis-v0.5", "lvis-v1", "cityscapes", "coco-folder")
    masked = ("voc-aug", "voc2012", "cityscapes", "ade20k", "coco-stuff", "mask-folder")
    assert [line.split()[0] for line in out.splitlines()] == ["NAME", *NAMES, *detected, *masked]
    assert "mean_per_class" in next(line for line in out.splitlines() if line.startswith("pets"))
    assert len(known()) == len(NAMES)
    assert [word.split()[0].partition(":")[0] for word in options.DATASETS.split(", ")] == [
        n for n in NAMES if n not in data_sets.UNLABELLED
    ]


def test_datasets_check_says_what_there_is_or_what_is_wrong(tmp_path, capfd, monkeypatch):
    pets(tmp_path, None)
    out, _ = in_process(capfd, monkeypatch, "datasets", "check", "pets", "--data", tmp_path)
    train = open_images("pets", tmp_path, "train")
    assert f"pets train: 3 images, fingerprint {train.fingerprint}" in out
    assert "2 classes; metric mean_per_class" in out
    assert "not as published: pets train of 3 images instead of 3680" in out
    flat = ["datasets", "check", "flat", "--data", tmp_path / "oxford-iiit-pet"]
    assert in_process(capfd, monkeypatch, *flat)[0].startswith("flat:oxford-iiit-pet train: 5 images")
    wrong = ["datasets", "check", "dtd", "--data", tmp_path]
    assert "Published at https://" in error_line(capfd, monkeypatch, *wrong)
    assert "needs a NAME" in error_line(capfd, monkeypatch, "datasets", "check")
    root = voc(tmp_path / "voc", SHOWN, one="ba", two="dc")
    mine = ["datasets", "check", "voc-folder", "--data", root, "--train-split", "one", "--test-split", "two"]
    out, err = in_process(capfd, monkeypatch, *mine, code=2)  # its objects have no boxes
    assert "as classification: 2 classes, several in an image; metric mAP" in out
    assert err.startswith("Error: detect refuses these data: ")


def test_knn_and_linear_refuse_images_of_several_classes(tmp_path, capfd, monkeypatch):
    root = voc(tmp_path / "voc", SHOWN, trainval="ba", test="dc")
    for command in (["knn", "--protocol", "digits", "--set", "k=1"], ["linear", "--protocol", "digits"]):
        arguments = [command[0], "pixels", "--dataset", "voc-folder", "--data", root, *command[1:]]
        line = error_line(capfd, monkeypatch, *arguments, "--output", tmp_path / "run")
        assert "evaluate it with moco-eval svm" in line
        assert not (tmp_path / "run").exists()


def test_pretraining_on_them_goes_without_the_monitor(tmp_path):
    from types import SimpleNamespace

    from pretraining.monitor import Monitor

    root = voc(tmp_path / "voc", SHOWN, trainval="ba", test="dc")
    run = SimpleNamespace(images=open_images("voc-folder", root, "train"), dataset="voc-folder", data=root)
    run.config = SimpleNamespace(knn=SimpleNamespace(every=1))
    assert Monitor(run).splits is None
