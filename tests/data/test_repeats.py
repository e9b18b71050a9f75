"""Test images that are trained on too, one class only, nothing to count: said or refused before anything runs."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import error_line, in_process
from PIL import Image

import moco_eval as me
from moco_eval.config import load as configs
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.data import glance, repeats
from moco_eval.data.catalogue import check, open_splits
from pretraining.monitor import Monitor
from pretraining.plan import plan

SMALL = ("--set", "k=2", "--device", "cpu")


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch) -> None:
    monkeypatch.setattr(repeats, "_known", {})
    monkeypatch.setattr(glance, "_told", set())


def noise(seed: int, size: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3)).astype(np.uint8)


def folder_of(
    root: Path, train: int = 6, val: int = 4, classes: tuple[str, ...] = ("cat", "dog"), ending="png"
) -> Path:
    """Class folders of noise, every picture another one."""
    for c, name in enumerate(classes):
        for split, count in (("train", train), ("val", val)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(noise(1000 * c + i + 100 * (split == "val"))).save(
                    root / split / name / f"{i}.{ending}"
                )
    return root


def copy(root: Path, count: int, ending: str = "png") -> None:
    """The first training images of cat under other names among the test images of dog."""
    for i in range(count):
        shutil.copy(root / f"train/cat/{i}.{ending}", root / f"val/dog/copy{i}.{ending}")


@pytest.mark.parametrize("ending", ["png", "bmp"])  # sizes that differ, and one size for all
def test_copies_are_found_by_their_content_whatever_their_names(tmp_path, ending):
    root = folder_of(tmp_path / "set", ending=ending)
    assert not any("trained on" in line for line in check("imagefolder", root))
    copy(root, 3, ending)
    copies = repeats.repeats(*open_splits("imagefolder", root))
    assert (len(copies.rows), copies.looked, copies.images) == (3, 11, 11)
    words = f"3 of 11 test images are also trained on (the same content; first: {root}/val/dog/copy0.{ending})"
    assert f"repeated: {words}" in check("imagefolder", root)


def test_a_naive_comparison_of_all_contents_finds_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(repeats, "PIECE", 64)  # so that the changed start lies outside of the piece compared first
    root = folder_of(tmp_path / "set", train=20, val=15)
    copy(root, 7)
    for path in (root / "val").rglob("1*.png"):  # the same size, and another content at the start
        data = (root / "train/cat/3.png").read_bytes()
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    train, test = open_splits("imagefolder", root)
    trained = {train.read(i) for i in range(len(train))}
    naive = [i for i in range(len(test)) if test.read(i) in trained]
    assert list(repeats.repeats(train, test).rows) == naive and len(naive) == 7


def test_of_a_large_set_a_sample_is_looked_at_and_its_size_is_said(tmp_path, monkeypatch):
    root = folder_of(tmp_path / "set", ending="bmp")
    for i, path in enumerate(sorted((root / "train").rglob("*.bmp"))):
        path.write_bytes(path.read_bytes() + bytes(i % 3))  # three sizes
    for name in ("train/cat", "train/dog"):
        for path in (root / name).iterdir():
            shutil.copy(path, root / "val/dog" / f"{name[-3:]}-{path.name}")
    monkeypatch.setattr(repeats, "READS", 17)
    copies = repeats.repeats(*open_splits("imagefolder", root))
    assert 0 < len(copies.rows) <= copies.looked < copies.images == 20
    assert f"{len(copies.rows)} of a sample of {copies.looked} test images are also trained on" in copies.sentence()


def test_every_kind_of_set_is_compared():
    pixels = np.stack([noise(i) for i in range(12)])
    labels = np.arange(12) % 2
    arrays = [me.ImageSet.from_arrays(pixels[:8], labels[:8]), me.ImageSet.from_arrays(pixels[6:], labels[6:])]
    assert repeats.repeats(*arrays).rows == (0, 1)
    items = [(Image.fromarray(noise(i, 8 + i)), i % 2) for i in range(12)]  # of several sizes: not held in memory
    images = me.ImageSet.from_dataset(items)
    assert repeats.repeats(images.take(np.arange(8)), images.take(np.arange(6, 12))).rows == (0, 1)
    assert repeats.repeats(images, arrays[0]) is None
    assert repeats.repeats(*open_splits("digits", None)).rows == ()


def test_an_evaluation_says_it_once_and_its_record_too(tmp_path, capfd, monkeypatch):
    root = folder_of(tmp_path / "set")
    copy(root, 2)
    where = ("--dataset", "imagefolder", "--data", root, "--output", tmp_path / "run")
    _, err = in_process(capfd, monkeypatch, "knn", "random:resnet18_quarter", *where, *SMALL)
    assert err.count("2 of 10 test images are also trained on") == 1
    record = me.Result.read(tmp_path / "run").record
    assert any(words.startswith("2 of 10 test images are also trained on") for words in record["deviations"])


def test_the_monitor_of_pretraining_says_it(tmp_path, capfd):
    root = folder_of(tmp_path / "set")
    copy(root, 2)
    monitor = Monitor(plan(small("knn.every=1"), "imagefolder", root, 1))
    assert monitor.splits and "2 of 10 test images are also trained on" in capfd.readouterr().err


def small(*settings: str) -> PretrainConfig:
    base = ["batch_size=4", "bn_groups=2", "queue_size=8", "arch=resnet18_quarter"]
    return configs.load("digits", "pretrain", PretrainConfig, [*base, *settings])


# One class only, and nothing to count


def test_one_class_only_is_refused_by_every_command_before_anything_runs(tmp_path, capfd, monkeypatch):
    root = folder_of(tmp_path / "set", classes=("only",))
    there = ("random:resnet18_quarter", "--dataset", "imagefolder", "--data", root, "--output", tmp_path / "run")
    for command in ("knn", "linear", "logistic", "svm", "finetune", "suite"):
        line = error_line(capfd, monkeypatch, command, *there)
        assert (
            "imagefolder:set has only one class, 'only': every answer would be right" in line and "--tasks" not in line
        )
    assert not (tmp_path / "run").exists()


def test_one_class_only_is_refused_in_python_and_gets_no_monitor(tmp_path, monkeypatch):
    pixels, labels = np.stack([noise(i) for i in range(8)]), np.zeros(8, np.int64)
    images = me.ImageSet.from_arrays(pixels, labels)
    encoder = me.load("random:resnet18_quarter")
    with pytest.raises(ValueError, match="only one class, '0'"):
        me.judge(encoder, images, images, device="cpu")
    with pytest.raises(ValueError, match="only one class, '0'"):
        me.Monitor(images, images, me.Preprocessing(size=32))
    said = []
    monkeypatch.setattr("pretraining.monitor.log", said.append)
    root = folder_of(tmp_path / "set", classes=("only",))
    monitor = Monitor(plan(small("knn.every=1"), "imagefolder", root, 1))
    assert monitor.splits is None and not monitor.due(1)
    assert said[0].startswith("no kNN monitor: imagefolder:set has only one class, 'only'")


@pytest.mark.parametrize("gone", ["ant", "dog", "owl"])
@pytest.mark.parametrize(
    "command", [("logistic", "--set", "solver=sklearn"), ("svm",), ("finetune",)], ids=lambda c: c[0]
)
def test_a_label_list_that_lacks_a_class_is_refused_by_every_command(tmp_path, capfd, monkeypatch, gone, command):
    classes = ("ant", "dog", "owl")
    root = folder_of(tmp_path / "set", classes=classes)
    (tmp_path / "some.txt").write_text(
        "\n".join(f"{name}/{i}.png" for name in classes if name != gone for i in range(4))
    )
    kind, *settings = command
    where = ("--dataset", "imagefolder", "--data", root, "--output", tmp_path / "run")
    listed = ("--labels", tmp_path / "some.txt", *settings)
    line = error_line(capfd, monkeypatch, kind, "random:resnet18_quarter", *where, *listed)
    assert f"class {gone!r} has no training image (the 8 images of an unpublished list" in line
    assert "(1 such classes of 3)" in line and not (tmp_path / "run").exists()


def test_nothing_to_count_is_refused(tmp_path):
    pixels, labels = np.stack([noise(i) for i in range(8)]), np.arange(8) % 2
    images = me.ImageSet.from_arrays(pixels, labels)
    encoder = me.load("random:resnet18_quarter")
    with pytest.raises(ValueError, match=r"arrays test has no images, so there is nothing to evaluate"):
        me.judge(encoder, images, images.take(np.array([], np.int64)), device="cpu")


def test_a_test_split_of_difficult_objects_alone_is_refused(tmp_path, capfd, monkeypatch):
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / "voc" / part).mkdir(parents=True)
    for split, numbers in (("train", range(8)), ("val", range(8, 12))):
        for i in numbers:
            Image.fromarray(noise(i, 40)).save(tmp_path / "voc/JPEGImages" / f"{i}.png")
            box = "<bndbox><xmin>2</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
            hard = f"<difficult>{int(split == 'val')}</difficult>"
            name = f"<name>{('cat', 'dog')[i % 2]}</name>"
            (tmp_path / "voc/Annotations" / f"{i}.xml").write_text(
                f"<annotation><object>{name}{hard}{box}</object></annotation>"
            )
        (tmp_path / "voc/ImageSets/Main" / f"{split}.txt").write_text("\n".join(map(str, numbers)))
    where = ("--dataset", "voc-folder", "--data", tmp_path / "voc", "--output", tmp_path / "run")
    line = error_line(capfd, monkeypatch, "svm", "random:resnet18_quarter", *where)
    assert "none of the 4 images of val has an object that counts" in line
