"""`datasets check` looks into every file; folders as people have them: train and test, or a single one."""

from pathlib import Path

import numpy as np
import pytest
from commands import error_line, in_process
from PIL import Image

from moco_eval.data import every_file
from moco_eval.data.catalogue import open_splits, split_deviations


@pytest.fixture
def folder(in_tmp) -> Path:
    """Ten images of two classes in train/, as many in test/, all whole."""
    draws = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (in_tmp / "own" / split / name).mkdir(parents=True)
            for index in range(10):
                pixels = draws.integers(0, 256, (24, 32, 3), np.uint8)
                Image.fromarray(pixels).save(in_tmp / "own" / split / name / f"{index}.{('jpg', 'png')[index % 2]}")
    return in_tmp / "own"


def check(capfd, monkeypatch, *more: str) -> list[str]:
    return in_process(capfd, monkeypatch, "datasets", "check", "imagefolder", "--data", "own", *more)[0].splitlines()


def test_whole_images_are_not_spoken_of(folder, capfd, monkeypatch):
    lines = check(capfd, monkeypatch)
    assert lines[0].startswith("imagefolder:own train: 20 images") and lines[1].startswith(
        "imagefolder:own test: 20 images"
    )
    assert not any(line.startswith(("doubtful", "not read")) for line in lines)


def damage(folder: Path) -> None:
    """One file of each kind of trouble."""
    cat, dog = folder / "train" / "cat", folder / "train" / "dog"
    (cat / "0.jpg").write_bytes((cat / "0.jpg").read_bytes()[:-300])
    (cat / "1.png").write_bytes((cat / "1.png").read_bytes()[:-300])
    (cat / "2.jpg").write_bytes(b"")
    (dog / "3.png").write_text("no image\nat all")
    (dog / "4.jpg").write_bytes(b"\xff\xd8\xff" + bytes(range(256)) + b"\xff\xd9")
    (dog / "a.gif").write_bytes(b"GIF89a")
    (dog / "notes").write_text("x")


def test_every_kind_of_trouble_is_counted_and_named(folder, capfd, monkeypatch):
    damage(folder)
    text = "\n".join(check(capfd, monkeypatch))
    assert "2 of 20 images: truncated (first: own/train/cat/0.jpg, own/train/cat/1.png)" in text
    assert "1 of 20 images: empty, 0 bytes (first: own/train/cat/2.jpg)" in text
    assert "1 of 20 images: text under an image's name (first: own/train/dog/3.png)" in text
    assert "1 of 20 images: not to be decoded (first: own/train/dog/4.jpg)" in text
    assert "not read: 1 file .gif (first: own/train/dog/a.gif)" in text
    assert "not read: 1 file without a suffix (first: own/train/dog/notes)" in text


def test_quick_looks_at_headers_alone(folder, capfd, monkeypatch):
    damage(folder)
    monkeypatch.setattr("moco_eval.data.image_set.ImageSet.array", lambda *_: pytest.fail("an image was decoded"))
    monkeypatch.setattr("moco_eval.data.glance.doubts", lambda *_: [])
    text = "\n".join(check(capfd, monkeypatch, "--quick"))
    assert "empty, 0 bytes" in text and "truncated" not in text


def test_a_set_in_memory_has_no_files(few_digits):
    assert every_file.look(few_digits[0]) == [] and every_file.other_suffixes(few_digits) == []


# Folders


def test_a_folder_called_test_is_tested_on_and_val_goes_before_it(folder):
    assert [images.split for images in open_splits("imagefolder", folder)] == ["train", "test"]
    (folder / "test").rename(folder / "val")
    (folder / "test").mkdir()
    assert [images.split for images in open_splits("imagefolder", folder)] == ["train", "val"]


@pytest.mark.parametrize("inside", ["train", ""])
def test_one_folder_is_parted_by_a_stated_share(inside, folder):
    one = folder if inside else folder / "train"
    for path in sorted((folder / "test").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (folder / "test").rmdir()
    train, test = open_splits("imagefolder", one, val_fraction=0.3)
    assert np.bincount(train.labels).tolist() == [7, 7] and np.bincount(test.labels).tolist() == [3, 3]
    files = [{images.name_of(index) for index in range(len(images))} for images in (train, test)]
    assert not files[0] & files[1] and len(files[0] | files[1]) == 20
    again = open_splits("imagefolder", one, val_fraction=0.3)[1]
    assert [again.name_of(index) for index in range(6)] == [test.name_of(index) for index in range(6)]
    assert split_deviations(train, test) == [
        f"imagefolder:{one.name} train: 70 % of each class, drawn from seed 0",
        f"imagefolder:{one.name} test: 30 % of each class, drawn from seed 0",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["imagefolder", "--data", "own", "--val-fraction", "0.3"], "own has test/ to test on; leave the option out"),
        (["digits", "--val-fraction", "0.3"], "is for --dataset imagefolder"),
        (["imagefolder", "--data", "own/train"], "--val-fraction 0.2 tests on a fifth"),
    ],
)
def test_a_share_where_there_is_no_need_is_refused(arguments, words, folder, capfd, monkeypatch):
    assert words in error_line(capfd, monkeypatch, "datasets", "check", *arguments)


def test_a_parted_folder_is_judged_with_its_deviation(folder, capfd, monkeypatch):
    arguments = ["--dataset", "imagefolder", "--data", "own/train", "--val-fraction", "0.3", "--set", "k=3"]
    out, _ = in_process(capfd, monkeypatch, "knn", "random:resnet18_quarter", *arguments, "--workers", "0")
    assert "imagefolder:train test: 30 % of each class, drawn from seed 0" in out
