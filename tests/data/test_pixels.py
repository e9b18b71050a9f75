"""Pixels of every kind become 8-bit RGB by one rule, or are refused; pictures that became black or white are said."""

import resource
from pathlib import Path

import numpy as np
import pytest
from commands import error_line, in_process
from PIL import Image
from torchvision import transforms

import moco_eval as me
from moco_eval.config import load as configs
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.data import glance, loader
from moco_eval.data.augment.decode import photo
from moco_eval.data.boxes.samples import image_size, read_image
from moco_eval.data.catalogue import check, open_images
from moco_eval.data.image_set import decode_bytes
from moco_eval.errors import InputError
from pretraining.plan import plan

RAMP = np.linspace(0, 200, 64 * 64).reshape(64, 64)
KNOWN = {  # pixels, the file's ending, and what they are in 8 bits
    "8 bits": (RAMP.astype(np.uint8), "png", RAMP.astype(np.uint8)),
    "16 bits": ((RAMP * 257).astype(np.uint16), "png", (RAMP * 257).astype(int) >> 8),
    "16 bits, TIFF": ((RAMP * 257).astype(np.uint16), "tif", (RAMP * 257).astype(int) >> 8),
    "32-bit integers of 8 bits": (RAMP.astype(np.int32), "tif", RAMP.astype(np.uint8)),
}
UNKNOWN = {
    "floats of 0 to 1": (RAMP / 255).astype(np.float32),
    "floats of 0 to 255": RAMP.astype(np.float32),
    "floats of 0 to 65535": (RAMP * 257).astype(np.float32),
    "integers of 16 bits": (RAMP * 257).astype(np.int32),
    "negative integers": (RAMP - 100).astype(np.int32),
}


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch) -> None:
    monkeypatch.setattr(glance, "_told", set())


def folder_of(root: Path, pixels: np.ndarray, ending: str) -> Path:
    """Class folders whose pictures all have these pixels, each turned another way."""
    for split in ("train", "val"):
        for c, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(2):
                turned = np.rot90(pixels, 2 * c + i + (split == "val"))
                Image.fromarray(np.ascontiguousarray(turned)).save(root / split / name / f"{i}.{ending}")
    return root


@pytest.mark.parametrize(("pixels", "ending", "expected"), KNOWN.values(), ids=KNOWN)
def test_what_is_known_is_the_same_for_classification_pretraining_and_detection(tmp_path, pixels, ending, expected):
    """32-bit integers as PIL converts them, 16 bits scaled."""
    path = tmp_path / "set" / f"x.{ending}"
    path.parent.mkdir()
    Image.fromarray(pixels).save(path)
    if pixels.dtype != np.uint16:
        with Image.open(path) as image:
            assert (np.asarray(image.convert("RGB"))[..., 0] == expected).all()
    images = open_images("flat", path.parent, "train")
    decoded = [decode_bytes(path.read_bytes(), "x"), read_image(path), images.image(0)]
    assert all((np.asarray(image) == expected[..., None]).all() for image in decoded)
    assert (photo(images, 0).numpy() == expected[None]).all() and image_size(path, decode=True) == (64, 64)


@pytest.mark.parametrize("pixels", UNKNOWN.values(), ids=UNKNOWN)
def test_pixels_of_no_known_scale_are_refused_by_name_and_range(tmp_path, pixels):
    path = tmp_path / "x.tif"
    Image.fromarray(pixels).save(path)
    kind = "floating-point pixels" if pixels.dtype == np.float32 else "32-bit integers"
    words = rf"x.tif holds {kind}, {pixels.min():g} to {pixels.max():g}.*save it in 8 or 16 bits"
    for read in (read_image, image_size, lambda path: decode_bytes(path.read_bytes(), str(path))):
        with pytest.raises(InputError, match=words):
            read(path)
    dataset = [(Image.fromarray(pixels), 0)] * 2
    with pytest.raises(ValueError, match=rf"dataset\[0\] holds {kind}"):
        me.ImageSet.from_dataset(dataset)


def test_sixteen_bit_pgm_is_scaled_whatever_pillow_holds_it_in(tmp_path):
    """Pillow opens it as 32-bit integers."""
    data = b"P5 2 1 65535\n" + np.array([256, 65535], ">u2").tobytes()
    (tmp_path / "x.pgm").write_bytes(data)
    assert np.asarray(decode_bytes(data, "x"))[0, :, 0].tolist() == [1, 255]
    assert np.asarray(read_image(tmp_path / "x.pgm"))[0, :, 0].tolist() == [1, 255]


@pytest.mark.parametrize("rotated", [False, True])
def test_detection_knows_the_format_after_a_rotation(tmp_path, rotated):
    exif = Image.Exif()
    exif[0x0112] = 3 if rotated else 1
    Image.fromarray(np.array([[256, 512]], np.uint16)).save(tmp_path / "x.png", exif=exif)
    assert np.asarray(read_image(tmp_path / "x.png"))[0, :, 0].tolist() == ([2, 1] if rotated else [1, 2])


# A look at a few


def test_a_folder_of_floats_is_refused_before_anything_runs(tmp_path, capfd, monkeypatch):
    root = folder_of(tmp_path / "set", UNKNOWN["floats of 0 to 1"], "tif")
    there = ("--dataset", "imagefolder", "--data", root)
    for command in (("knn", "random:resnet18_quarter", *there), ("suite", "random:resnet18_quarter", *there)):
        line = error_line(capfd, monkeypatch, *command, "--output", tmp_path / "out")
        assert "0.tif holds floating-point pixels, 0 to 0.784314" in line and "--tasks" not in line
    assert "holds floating-point" in error_line(capfd, monkeypatch, "datasets", "check", "imagefolder", "--data", root)
    settings = configs.load("digits", "pretrain", PretrainConfig, ["batch_size=4", "bn_groups=2", "queue_size=8"])
    with pytest.raises(InputError, match="holds floating-point"):
        plan(settings, "imagefolder", root, 1)
    assert not (tmp_path / "out").exists()


def test_twelve_bits_in_sixteen_are_said_everywhere(tmp_path, capfd, monkeypatch):
    root = folder_of(tmp_path / "set", (RAMP * 16).astype(np.uint16), "tif")
    words = "no pixel of 4 images looked at is brighter than 12 of 255; if they are of 10 to 14 bits"
    assert f"doubtful: imagefolder:set train: {words}" in "\n".join(check("imagefolder", root))
    settings = configs.load("digits", "pretrain", PretrainConfig, ["batch_size=4", "bn_groups=2", "queue_size=8"])
    assert any(words in line for line in plan(settings, "imagefolder", root, 1).warnings)
    command = ("knn", "random:resnet18_quarter", "--dataset", "imagefolder", "--data", root, "--set", "k=2")
    _, err = in_process(capfd, monkeypatch, *command, "--device", "cpu", "--dry-run")
    assert err.count(words) == 2  # training and test images, once each


@pytest.mark.parametrize(
    ("pixels", "ending"),
    [
        (RAMP.astype(np.uint16), "tif"),  # 8 bits in 16
        (np.dstack([np.zeros((64, 64, 3)), RAMP]).astype(np.uint8), "png"),  # all of the picture is transparency
        (np.full((64, 64), 65535, np.uint16), "png"),
    ],
    ids=["8 bits in 16", "all in alpha", "white"],
)
def test_pictures_that_become_black_or_white_are_said(tmp_path, pixels, ending):
    root = folder_of(tmp_path, pixels, ending)
    (train, test) = [line for line in check("imagefolder", root) if line.startswith("doubtful")]
    assert "4 of 4 images looked at have one or two values when decoded (first:" in train and "cat/0." in test
    (words,) = glance.doubts_about("test", 4, lambda i: read_image(root / f"val/cat/0.{ending}"), str)
    assert "one or two values" in words


def test_arrays_of_zeros_and_ones_are_doubtful_and_pictures_are_not():
    pixels = np.random.default_rng(0).integers(0, 2, (10, 8, 8, 3)).astype(np.uint8)
    (words,) = glance.doubts(me.ImageSet.from_arrays(pixels, np.arange(10) % 2))
    assert "8 of 8 images looked at have one or two values" in words
    assert glance.doubts(open_images("digits", None, "test")) == []


def test_unreadable_ones_among_a_few_stop_an_evaluation_and_are_said_by_pretraining():
    def read(index: int) -> Image.Image:
        if index < 3:
            raise InputError(f"{index}.jpg is broken")
        return Image.fromarray(RAMP.astype(np.uint8)).convert("RGB")

    with pytest.raises(InputError, match=r"^0.jpg is broken"):
        glance.doubts_about("train", 8, read, str)
    expected = ["train: 3 of 8 images looked at cannot be read (first: 0.jpg is broken)"]
    assert glance.doubts_about("train", 8, read, str, "say") == expected
    assert glance.doubts_about("train", 8, read, str, "pass") == []
    with pytest.raises(InputError, match=r"^0.jpg is broken"):
        glance.doubts_about("train", 3, read, str, "pass")


# What lies there in place of an image


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "a Git LFS pointer in place of the image",
        ),
        (b"/annex/objects/SHA256E-s1--0.jpg\n", "a git-annex pointer"),
        (b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(60), "an AppleDouble file"),
        (b"<!DOCTYPE html><html>404", "a web page"),
        (b"\n<HTML>", "a web page"),
        (b"", "empty"),
        (bytes(3000), "nothing but zeros"),
        (b"hello", "(not an image that Pillow reads|no image)"),
    ],
)
def test_what_is_no_image_is_called_by_what_it_is(tmp_path, data, words):
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(InputError, match=f"x.png is {words}.*; remove or replace it"):
        decode_bytes(data, "x.png")
    for read in (image_size, read_image):
        with pytest.raises(InputError, match=f"cannot read .*x.png: it is {words}"):
            read(tmp_path / "x.png")


def test_a_folder_of_pointers_is_refused_with_the_way_out(tmp_path, capfd, monkeypatch):
    for i in range(3):
        (tmp_path / f"{i}.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    line = error_line(capfd, monkeypatch, "datasets", "check", "flat", "--data", tmp_path)
    assert "0.png is a Git LFS pointer in place of the image (git lfs pull fetches it)" in line


# Very oblong images


@pytest.mark.parametrize("size", [(1, 300), (3, 400), (500, 2), (31, 977), (300, 1)])
def test_the_centre_of_an_oblong_image_is_torchvisions_but_for_rounding(size, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    expected = np.asarray(transforms.CenterCrop(224)(transforms.Resize(256)(image))).astype(int)
    assert (np.asarray(loader.ResizedCentre(256, 224)(image)) == expected).all()
    monkeypatch.setattr(loader, "LARGEST", 1000)
    assert abs(np.asarray(loader.ResizedCentre(256, 224)(image)) - expected).max() <= 1


@pytest.mark.parametrize("size", [(1, 20000), (20000, 1)])
def test_a_strip_of_twenty_thousand_pixels_takes_little_memory(size):
    """Resized whole it had 1.3 billion pixels, 6 GB."""
    transform = loader.clean_transform(me.Preprocessing())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert transform(Image.new("RGB", size, "red")).shape == (3, 224, 224)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_image_of_which_nothing_is_left_is_refused_before_a_detector_is_trained(tmp_path, capfd, monkeypatch, split):
    from moco_eval.data.boxes.scenes import write_scenes

    root = write_scenes(tmp_path, seed=0, train=12, test=2) / "voc"
    Image.new("RGB", (1, 3000), "red").save(root / "JPEGImages/strip.png")
    box = "<bndbox><xmin>0</xmin><ymin>1</ymin><xmax>1</xmax><ymax>99</ymax></bndbox>"
    (root / "Annotations/strip.xml").write_text(f"<annotation><object><name>3</name>{box}</object></annotation>")
    with (root / f"ImageSets/Main/{split}.txt").open("a") as file:
        file.write("strip\n")
    where = ("--dataset", "voc-folder", "--data", root, "--output", tmp_path / "run", "--device", "cpu")
    line = error_line(capfd, monkeypatch, "detect", "random:resnet18_quarter", *where, "--recipe", "digits_r50_c4")
    assert "strip.png of 1x3000 pixels has a side of 0" in line
    assert not (tmp_path / "run").exists()
