"""The VOC and COCO readers, their dirt, and the built-in scenes."""

import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import error_line, in_process
from PIL import Image

from moco_eval.data.benchmarks import read_voc07 as classify_voc07
from moco_eval.data.boxes import voc as voc_module
from moco_eval.data.boxes.check import check, copies
from moco_eval.data.boxes.coco import read_coco, read_coco_folder
from moco_eval.data.boxes.samples import image_size, read_image
from moco_eval.data.boxes.scenes import DIGITS, TRAIN_DIGITS, draw_scenes, write_scenes
from moco_eval.data.boxes.segmentation import runs_of, uncompressed
from moco_eval.data.boxes.voc import read_voc, read_voc07, read_voc_folder
from moco_eval.errors import InputError


def voc_object(name="cat", box=(1, 1, 20, 10), more="<difficult>0</difficult>"):
    sides = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
    return f"<object><name>{name}</name>{more}<bndbox>{sides}</bndbox></object>"


def difficult(word):
    return f"<difficult>{word}</difficult>"


@pytest.fixture
def voc(tmp_path):
    """A VOC folder of 40x30 images: a and b to train on, c to test on."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for name in "abc":
        Image.new("RGB", (40, 30), "grey").save(tmp_path / "JPEGImages" / f"{name}.png")
        write_xml(tmp_path, name, voc_object("cat") + voc_object("dog", (5.5, 6, 30, 30)))
    (tmp_path / "ImageSets/Main/trainval.txt").write_text("a\nb\n")
    (tmp_path / "ImageSets/Main/test.txt").write_text("c\n")
    return tmp_path


def write_xml(root: Path, name: str, objects: str, head: str = ""):
    (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{head}{objects}</annotation>")


def test_voc_boxes_lose_one_on_their_upper_left_and_classes_come_from_training(voc):
    data = read_voc_folder(voc, None, None)
    assert data.classes == ("cat", "dog")
    assert [len(data.train), len(data.test)] == [2, 1]
    assert (data.train_split, data.test_split) == ("trainval", "test")
    np.testing.assert_array_equal(data.test[0].boxes, [[0, 0, 20, 10], [4.5, 5, 30, 30]])
    assert data.test[0].labels.tolist() == [0, 1]


def test_voc_optional_fields_and_difficult(voc):
    write_xml(voc, "c", voc_object(more="<difficult>1</difficult>") + voc_object("dog", more=""))
    assert read_voc_folder(voc, None, None).test[0].difficult.tolist() == [True, False]


def test_voc_marks_in_other_tools_words(voc):
    words = {"0": False, "": False, " 0.0 ": False, "False": False, "NO": False, "1": True, "1.0": True, "true": True}
    write_xml(voc, "c", "".join(voc_object(more=difficult(word)) for word in words) + voc_object(more="<difficult/>"))
    assert read_voc_folder(voc, None, None).test[0].difficult.tolist() == [*words.values(), False]


def test_voc_every_box_of_an_object_is_one(voc, capsys):
    """As tools write that have one object for each class; a part's box, and what LabelMe marks as deleted, are none."""
    corners = [(1, 1, 20, 10), (5, 6, 30, 30), (2, 2, 8, 9)]
    first, *others = (voc_object(box=box, more="") for box in corners)
    boxes = "".join(other.partition("</name>")[2].removesuffix("</object>") for other in others)
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>"
    deleted = voc_object("cow", more="<deleted>1</deleted>")
    write_xml(voc, "c", first.replace("</object>", f"{boxes}{part}</object>") + voc_object("dog") + deleted)
    sample = read_voc_folder(voc, None, None).test[0]
    assert sample.labels.tolist() == [0, 0, 0, 1]
    np.testing.assert_array_equal(sample.boxes[:3], [(x0 - 1, y0 - 1, x1, y1) for x0, y0, x1, y1 in corners])
    assert "test: 1 objects with several boxes, each of which is read as an object" in capsys.readouterr().err


def test_voc_tags_in_capitals(voc):
    (voc / "Annotations/c.xml").write_text((voc / "Annotations/c.xml").read_text().replace("object>", "Object>"))
    assert len(read_voc_folder(voc, None, None).test[0].labels) == 2


def test_an_xml_of_another_image_and_classes_that_look_alike_are_said(voc, capsys):
    write_xml(voc, "a", voc_object("Cat"), "<filename>C:\\photos\\z.jpg</filename>")
    write_xml(voc, "b", voc_object("cat") + voc_object("dog"), "<filename>photos/b.jpeg</filename>")
    write_xml(voc, "c", voc_object("dog"), "<filename>c</filename>")
    read_voc_folder(voc, None, None)
    err = capsys.readouterr().err
    assert "1 XML files that name another image: C:\\photos\\z.jpg in " in err
    assert "1 sets of classes whose names differ by spaces or case only: 'Cat' and 'cat'" in err


def test_copies_are_seen_by_their_content(voc):
    """Files of one size: the content of a training image under another name, and one that differs in a byte."""
    data = bytes(range(256)) * 100
    folder = voc / "JPEGImages"
    (folder / "x").write_bytes(data)
    (folder / "y").write_bytes(data)
    (folder / "z").write_bytes(b"!" + data[1:])
    assert copies([folder / name for name in "xyzx"]) == [folder / "y"]


def test_voc_one_line_and_two_column_lists_and_names_with_spaces(voc):
    (voc / "JPEGImages/a.png").rename(voc / "JPEGImages/a photo.JPG")
    (voc / "Annotations/a.xml").rename(voc / "Annotations/a photo.xml")
    (voc / "ImageSets/Main/cat_train.txt").write_text("a photo\nb  -1\n")
    assert [s.image_id for s in read_voc_folder(voc, "cat_train", "test").train] == ["a photo", "b"]
    (voc / "ImageSets/Main/cat_train.txt").write_text("a photo 0\nb 1\n")
    assert [s.image_id for s in read_voc_folder(voc, "cat_train", "test").train] == ["a photo", "b"]


def test_val_is_not_trained_on_when_there_is_no_test_split(voc):
    (voc / "ImageSets/Main/test.txt").rename(voc / "ImageSets/Main/val.txt")
    (voc / "ImageSets/Main/train.txt").write_text("a\n")
    data = read_voc_folder(voc, None, None)
    assert (data.train_split, data.test_split) == ("train", "val")


def test_zero_area_boxes_are_dropped_and_named(voc, capsys):
    write_xml(voc, "b", voc_object(box=(7, 7, 7, 9)) + voc_object("dog"))
    assert read_voc_folder(voc, None, None).train[1].labels.tolist() == [1]
    assert "1 boxes of zero area dropped" in capsys.readouterr().err


WAYS_OUT = (
    r"correct|add|keep|take|export|save|give|remove|name one|belong|needs one|--data|--set|Known:|splits there are"
)


def assert_refused(root: Path, read, name: str, words: str):
    """`detect` refuses with one line that names a file and a way out; `datasets check` says the same and lists it."""
    with pytest.raises(InputError, match=words) as error:
        read(root, None, None)
    message = str(error.value)
    assert "\n" not in message and str(root) in message
    assert re.search(WAYS_OUT, message), message
    lines, refusal = check(name, root)
    assert refusal == message
    assert any(line.startswith("refused: ") for line in lines)
    assert all("\n" not in line for line in lines)


def write_bytes(path: Path, data: bytes):
    path.write_bytes(data)


BOMB = (
    "<!DOCTYPE a [<!ENTITY a 'ha'>"
    + "".join(f"<!ENTITY {b} '{f'&{a};' * 10}'>" for a, b in itertools.pairwise("abcdefghijklm"))
    + "]><annotation>&m;</annotation>"
)
SPLIT = "ImageSets/Main/test.txt"


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda r: shutil.rmtree(r / "JPEGImages"), "JPEGImages does not exist"),
        (lambda r: shutil.rmtree(r / "ImageSets"), "ImageSets/Main does not exist"),
        (lambda r: write_xml(r, "b", voc_object(box=(1, 1, 60, 10))), "outside its 40x30 image"),
        (lambda r: write_xml(r, "c", voc_object("cow")), "class 'cow' is not among the 2 classes"),
        (lambda r: write_xml(r, "b", voc_object(box=(9, 1, 3, 10))), "not min before max"),
        (lambda r: write_xml(r, "b", voc_object(box=("x", 1, 3, 10))), "not four numbers"),
        (lambda r: write_xml(r, "b", voc_object(box=("nan", 1, 3, 10))), "not finite"),
        (lambda r: write_xml(r, "b", voc_object(box=("1e400", 1, 3, 10))), "not finite"),
        (lambda r: write_xml(r, "b", "<object><name>cat</name></object>"), "no <bndbox><xmin>"),
        (lambda r: write_xml(r, "b", voc_object("")), "no <name>"),
        (
            lambda r: write_xml(r, "b", "", "<size><width>30</width><height>40</height></size>"),
            "says 30x40 and b.png has 40x30",
        ),
        (
            lambda r: write_xml(r, "b", "", "<size><width>x</width><height>4</height></size>"),
            "its size is not a number",
        ),
        (lambda r: (r / "Annotations/b.xml").write_text("<annotation><obj"), "not readable XML"),
        (lambda r: (r / "Annotations/b.xml").write_text(""), "not readable XML"),
        (
            lambda r: (r / "Annotations/b.xml").write_text('<?xml version="1.0" encoding="gbk"?><a/>'),
            "save it as UTF-8",
        ),
        (lambda r: (r / "Annotations/b.xml").write_text('<?xml version="1.0" encoding="no"?><a/>'), "not readable XML"),
        (lambda r: (r / "Annotations/b.xml").write_text(BOMB), "declares XML entities"),
        (lambda r: write_bytes(r / "Annotations/b.xml", BOMB.encode("utf-16")), "declares XML entities"),
        (lambda r: (r / "Annotations/b.xml").unlink(), "b.xml does not exist"),
        (lambda r: (r / "JPEGImages/b.png").unlink(), "has no image b"),
        (lambda r: (r / "JPEGImages/b.png").write_text("hello"), "it is no image"),
        (lambda r: write_bytes(r / "JPEGImages/b.png", (r / "JPEGImages/a.png").read_bytes()[:20]), "cannot read"),
        (lambda r: shutil.copy(r / "JPEGImages/b.png", r / "JPEGImages/b.jpg"), "has b.jpg and b.png"),
        (lambda r: (r / SPLIT).write_text("\n"), "lists no images"),
        (lambda r: write_bytes(r / SPLIT, b"\xff\xfe\xfac"), "save it as UTF-8"),
        (lambda r: (r / SPLIT).write_text("c\nc\n"), "is listed 2 times"),
        (lambda r: (r / SPLIT).write_text("c\n../a\n"), "'../a', which is not a name inside"),
        (lambda r: (r / SPLIT).write_text("c\n/etc/a\n"), "'/etc/a', which is not a name inside"),
        (lambda r: (r / SPLIT).unlink(), "val.txt does not exist"),
        (lambda r: write_xml(r, "c", voc_object(box=(0.1, 0.2, 0.5, 0.9))), "all boxes of test lie between 0 and 1"),
        (lambda r: [write_xml(r, n, "") for n in "ab"], "none of the 2 training images has an object"),
        (
            lambda r: write_xml(r, "b", voc_object(more=difficult("Unspecified"))),
            "<difficult> is 'Unspecified' and must",
        ),
        (lambda r: write_xml(r, "b", voc_object(more=difficult("2"))), "<difficult> is '2' and must be 0 or 1"),
        (lambda r: write_xml(r, "b", voc_object(more=difficult("0") + difficult("1"))), "is '0' and '1' and must"),
        (lambda r: write_xml(r, "b", voc_object(more="<name>dog</name>")), "several <name>, cat and dog; keep one"),
        (lambda r: write_xml(r, "b", voc_object(box=("1</xmin><xmin>3", 1, 9, 10))), "several <xmin>, 1 and 3"),
        (lambda r: write_xml(r, "b", voc_object(box=("1_0", 1, 30, 10))), "not four numbers"),
        (lambda r: write_xml(r, "b", voc_object(box=("1,5", 1, 30, 10))), "not four numbers"),
        (lambda r: write_xml(r, "b", voc_object().replace("object>", "item>")), "has a <bndbox> and no <object>"),
        (
            lambda r: write_xml(r, "b", "", "<size><width>40</width><height>0</height></size>"),
            "says 40x0 and b.png has",
        ),
        (lambda r: (r / SPLIT).write_text("c\n./c\n"), "'c' is listed 2 times"),
        (lambda r: (r / SPLIT).write_text("c\nb (1)\n"), r"has no image b \(1\) \(any suffix\)"),
        (lambda r: (r / SPLIT).write_text("c\nb 1\n"), "has no image b 1 "),
        (lambda r: (r / SPLIT).write_text("c 1\nb 2\n"), "has no image b 2 "),
        (lambda r: (r / SPLIT).write_text("c copy\n"), "has no image c copy "),
        (
            lambda r: write_xml(r, "c", voc_object(more=difficult("1")) * 2),
            r"none of the 1 test images of test has an object that counts \(2 are difficult, 0 crowd regions\)",
        ),
        (lambda r: write_xml(r, "c", ""), "none of the 1 test images of test has an object that counts"),
    ],
)
def test_bad_voc_is_refused_in_one_line(voc, damage, words):
    damage(voc)
    assert_refused(voc, read_voc_folder, "voc-folder", words)


def test_detect_itself_refuses_with_that_line(voc, tmp_path, capfd, monkeypatch):
    write_xml(voc, "b", voc_object(box=(1, 1, 60, 10)))
    run = ["random:resnet50_quarter", "--dataset", "voc-folder", "--data", voc, "--output", tmp_path / "run"]
    line = error_line(capfd, monkeypatch, "detect", *run)
    assert line == f"Error: {check('voc-folder', voc)[1]}"
    assert not (tmp_path / "run").exists()


def test_a_split_that_is_not_there_is_told_with_the_nearest(voc):
    with pytest.raises(InputError, match="Did you mean 'trainval'"):
        read_voc_folder(voc, "trainvall", "test")


def test_check_lists_all_that_is_wrong_at_once(voc, capfd, monkeypatch):
    """Three kinds of damage and two notes, in files of both splits."""
    write_xml(voc, "a", voc_object(box=(1, 1, 60, 10)) + voc_object(box=(-9, 1, 20, 10)) + voc_object("dog"))
    write_xml(voc, "b", voc_object(more="<difficult>1</difficult>") * 2 + voc_object(box=(9, 1, 3, 10)))
    write_xml(voc, "c", voc_object("cow"))
    out, err = in_process(capfd, monkeypatch, "datasets", "check", "voc-folder", "--data", voc, code=2)
    lines = out.splitlines()
    assert "refused: trainval: 2 boxes outside their image: Annotations/a.xml" in lines
    assert "refused: trainval: 1 inverted boxes: Annotations/b.xml" in lines
    assert "refused: test: 1 objects of classes that are not trained on: cow in Annotations/c.xml" in lines
    assert "note: trainval: 2 difficult objects: b" in lines
    assert "note: trainval: 1 objects that are listed twice, with the same box: b" in lines
    assert "note: test: 1 images without objects: c" in lines
    assert err.startswith(f"Error: detect refuses these data: {voc}/Annotations/a.xml: box (1, 1, 60, 10) lies outside")


def test_check_passes_what_detect_takes(voc, capfd, monkeypatch):
    (voc / SPLIT).write_text("c\nb\n")
    out, err = in_process(capfd, monkeypatch, "datasets", "check", "voc-folder", "--data", voc)
    assert not err
    assert "note: test: 2 images that are in trainval too: JPEGImages/c.png, JPEGImages/b.png" in out  # c is a copy
    assert "voc-folder trainval: 2 images, 4 objects" in out
    assert [line.split() for line in out.splitlines() if line.startswith("  ")] == [
        ["cat", "2", "2"],
        ["dog", "2", "2"],
    ]
    assert "as classification: 2 classes, several in an image; metric mAP" in out


def test_check_finds_images_cut_short_which_only_decoding_shows(voc):
    noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(voc / "JPEGImages/b.jpg")
    (voc / "JPEGImages/b.png").unlink()
    (voc / "JPEGImages/b.jpg").write_bytes((voc / "JPEGImages/b.jpg").read_bytes()[:-500])
    read_voc_folder(voc, None, None)
    lines, refusal = check("voc-folder", voc)
    assert lines[0] == "refused: trainval: 1 images that cannot be read: JPEGImages/b.jpg"
    assert "truncated" in refusal


def test_voc_in_subfolders_with_any_suffix_and_windows_line_ends(voc):
    for folder in ("JPEGImages", "Annotations"):
        (voc / folder / "sub").mkdir()
    (voc / "JPEGImages/a.png").rename(voc / "JPEGImages/sub/a.b.PNG")
    (voc / "Annotations/a.xml").rename(voc / "Annotations/sub/a.b.xml")
    Image.new("RGB", (40, 30)).save(voc / "JPEGImages/d.JPG", format="JPEG")
    write_xml(voc, "d", voc_object("cat"))
    (voc / "ImageSets/Main/trainval.txt").write_bytes(b"\xef\xbb\xbfsub/a.b\r\nd  -1\r\n")
    assert [sample.image_id for sample in read_voc_folder(voc, None, None).train] == ["sub/a.b", "d"]


@pytest.mark.parametrize(
    "text, encoding",
    [
        ('<?xml version="1.0" encoding="latin-1"?><annotation>{}</annotation>', "latin-1"),
        ("<annotation>{}</annotation>", "utf-8-sig"),
        ('<?xml version="1.0" encoding="utf-16"?><annotation>{}</annotation>', "utf-16"),
        ('<annotation xmlns="http://example.org/voc">{}</annotation>', "utf-8"),
    ],
)
def test_xml_of_any_encoding_and_with_a_name_space(voc, text, encoding):
    for name in "ab":
        words = text.format(voc_object("café/crème brûlée", (1.5, 2, 20.25, 10)))
        (voc / f"Annotations/{name}.xml").write_bytes(words.encode(encoding))
    (voc / "Annotations/c.xml").write_bytes((voc / "Annotations/a.xml").read_bytes())
    data = read_voc_folder(voc, None, None)
    assert data.classes == ("café/crème brûlée",)
    np.testing.assert_array_equal(data.train[0].boxes, [[0.5, 1, 20.25, 10]])


def test_a_deeply_nested_xml_is_read_or_refused_but_does_not_crash(voc):
    (voc / "Annotations/b.xml").write_text("<a>" * 100_000 + "</a>" * 100_000)
    assert read_voc_folder(voc, None, None).train[1].labels.tolist() == []


def test_clip_cuts_boxes_and_passes_over_unknown_classes(voc):
    write_xml(voc, "c", voc_object(box=(-5, 1, 60, 10)) + voc_object("cow"))
    sample = read_voc_folder(voc, None, None, clip=True).test[0]
    np.testing.assert_array_equal(sample.boxes, [[-1, 0, 40, 10]])  # xmin 0, counted from 1
    assert sample.labels.tolist() == [0]


def test_official_voc_checks_its_counts(voc, tmp_path):
    for year in ("2007", "2012"):
        (tmp_path / f"VOCdevkit/VOC{year}").parent.mkdir(exist_ok=True)
        (tmp_path / f"VOCdevkit/VOC{year}").symlink_to(voc)
    with pytest.raises(InputError, match=r"lists 2 images and the official split 5011.*voc-folder"):
        read_voc(tmp_path)


def test_voc07_is_found_where_classification_finds_it_and_counted(voc, tmp_path, monkeypatch):
    (tmp_path / "devkit/VOCdevkit").mkdir(parents=True)
    (tmp_path / "devkit/VOCdevkit/VOC2007").symlink_to(voc)
    monkeypatch.setattr(voc_module, "VOC_CLASSES", ("cat", "dog"))
    for folder in (tmp_path / "devkit", tmp_path / "devkit/VOCdevkit", tmp_path / "devkit/VOCdevkit/VOC2007"):
        with pytest.raises(InputError, match="trainval lists 2 images and the official split 5011"):
            read_voc07(folder)
        assert len(classify_voc07(folder, "train")) == 2
    with pytest.raises(InputError, match="has no VOC2007"):
        read_voc07(tmp_path / "devkit/VOCdevkit/VOC2007/JPEGImages")
    monkeypatch.setattr(voc_module, "OFFICIAL", {("2007", "trainval"): 2, ("2007", "test"): 1})
    data = read_voc07(tmp_path / "devkit")
    assert (data.name, data.train_split, data.test_split) == ("voc07", "trainval2007", "test2007")
    assert [len(data.train), len(data.test), data.classes] == [2, 1, ("cat", "dog")]


def test_detectron2s_folder_is_taken_where_no_other_is_given(voc, tmp_path, monkeypatch, capfd):
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets/VOC2007").symlink_to(voc)
    monkeypatch.setattr(voc_module, "OFFICIAL", {("2007", "trainval"): 2, ("2007", "test"): 1})
    monkeypatch.setattr(voc_module, "VOC_CLASSES", ("cat", "dog"))
    monkeypatch.delenv("MOCO_EVAL_DATA", raising=False)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "sets"))
    out, _ = in_process(capfd, monkeypatch, "datasets", "check", "voc07")
    assert "voc07 trainval2007: 2 images" in out and "as classification: voc07 trainval: 2 images" in out
    detect = ("detect", "random:resnet18_quarter", "--dataset", "voc07", "--dry-run")
    assert "data: voc07, 2 training and 1 test images" in in_process(capfd, monkeypatch, *detect)[0]
    monkeypatch.setenv("MOCO_EVAL_DATA", str(tmp_path / "nowhere"))
    assert "nowhere does not exist" in error_line(capfd, monkeypatch, "datasets", "check", "voc07")
    assert "nowhere does not exist" in error_line(capfd, monkeypatch, *detect)


def test_voc0712_trains_on_both_years(voc, tmp_path, monkeypatch):
    monkeypatch.setattr(voc_module, "OFFICIAL", {("2007", "trainval"): 2, ("2007", "test"): 1, ("2012", "trainval"): 2})
    monkeypatch.setattr(voc_module, "VOC_CLASSES", ("cat", "dog"))
    for year in ("2007", "2012"):
        (tmp_path / f"VOCdevkit/VOC{year}").parent.mkdir(exist_ok=True)
        shutil.copytree(voc, tmp_path / f"VOCdevkit/VOC{year}", ignore=lambda *_: ["VOCdevkit"])
    data = read_voc(tmp_path)
    assert [len(data.train), len(data.test)] == [4, 1]
    assert (data.train_split, data.test_split) == ("trainval07+12", "test2007")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tiff"])
def test_the_size_that_is_said_is_that_of_the_image_that_is_read(ending, orientation, tmp_path):
    """A TIFF that is turned was turned twice for its size."""
    exif, path = Image.Exif(), tmp_path / f"a.{ending}"
    exif[0x0112] = orientation
    Image.new("RGB", (9, 6)).save(path, exif=exif)
    assert image_size(path) == read_image(path).size == ((9, 6) if orientation < 5 else (6, 9))


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert image_size(tmp_path / "a.jpg") == read_image(tmp_path / "a.jpg").size == (20, 40)


def test_sixteen_bit_and_palette_images_become_rgb(tmp_path):
    Image.fromarray(np.full((4, 5), 0x8000, np.uint16)).save(tmp_path / "a.png")
    Image.new("P", (5, 4)).save(tmp_path / "b.png")
    assert np.asarray(read_image(tmp_path / "a.png")).tolist() == np.full((4, 5, 3), 128).tolist()
    assert read_image(tmp_path / "b.png").mode == "RGB"


@pytest.fixture
def coco(tmp_path):
    """A COCO folder with categories 3 and 90, one training and one test image of 40x30."""
    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (40, 30)).save(tmp_path / split / "x.jpg")
        write_json(tmp_path, split, [annotation(1, 90), annotation(2, 3, iscrowd=1)])
    return tmp_path


def annotation(number, category, box=(1, 2, 10, 8), **more):
    return {
        "id": number,
        "image_id": 7,
        "category_id": category,
        "bbox": list(box),
        "iscrowd": 0,
        "area": 80,
    } | more


def write_json(root, split, annotations, image=None, categories=None, kind="instances"):
    values = {
        "images": [image or {"id": 7, "file_name": "x.jpg", "width": 40, "height": 30}],
        "annotations": annotations,
        "categories": categories or [{"id": 90, "name": "dog"}, {"id": 3, "name": "cat"}],
    }
    (root / f"annotations/{kind}_{split}.json").write_text(json.dumps(values))


def test_coco_categories_are_sorted_by_id_and_crowds_marked(coco):
    data = read_coco_folder(coco, None, None)
    assert (data.classes, data.category_ids) == (("cat", "dog"), (3, 90))
    assert data.train[0].labels.tolist() == [1, 0]
    assert data.train[0].crowd.tolist() == [False, True]
    np.testing.assert_array_equal(data.train[0].boxes[0], [1, 2, 11, 10])
    assert [item["category_id"] for item in data.coco["annotations"]] == [90, 3]


def rewrite(root, key, change, split="val2017", kind="instances"):
    """One list of a json, changed."""
    path = root / f"annotations/{kind}_{split}.json"
    values = json.loads(path.read_text())
    values[key] = change(values[key])
    path.write_text(json.dumps(values))


def val_json(r):
    return r / "annotations/instances_val2017.json"


def val(number=1, category=3, *box, **more):
    """A val2017 with one annotation."""
    return lambda r: write_json(r, "val2017", [annotation(number, category, box or (1, 2, 10, 8), **more)])


def image(**more):
    return lambda r: write_json(
        r, "val2017", [annotation(1, 3)], {"id": 7, "file_name": "x.jpg", "width": 40, "height": 30} | more
    )


BAD_COCO = [
    (lambda r: (r / "train2017/x.jpg").unlink(), "1 of 1 images"),
    (lambda r: (r / "val2017/x.jpg").write_text("hello"), "it is no image"),
    (lambda r: shutil.rmtree(r / "val2017"), "the images of val2017 belong there"),
    (image(width=30, height=40), "says 30x40 for .*x.jpg of 40x30 pixels"),
    (image(width="40"), "image 7: its width is '40' and must be a number"),
    (image(height=True), "image 7: its height is True and must be a number"),
    (image(height=0), "says 40x0 for"),
    (image(file_name="../val2017/x.jpg"), "is not a name inside the folder of images"),
    (image(file_name="/etc/hostname"), "is not a name inside the folder of images"),
    (image(file_name="C:\\x.jpg"), "is not a name inside the folder of images"),
    (image(file_name=None), "is not a name inside the folder of images"),
    (image(id=1.5), "is not a COCO annotation file"),
    (image(id=None), "is not a COCO annotation file"),
    (lambda r: write_json(r, "val2017", [annotation(1, 3), annotation(1, 3)]), "ids of annotations: 1 is listed 2"),
    (lambda r: rewrite(r, "images", lambda items: items * 2), "ids of images: 7 is listed 2 times"),
    (lambda r: rewrite(r, "categories", lambda items: items * 2, "train2017"), "ids of categories"),
    (
        lambda r: rewrite(r, "categories", lambda items: [i | {"name": "cat"} for i in items], "train2017"),
        "names of categories: 'cat' is listed 2 times",
    ),
    (lambda r: rewrite(r, "categories", lambda _: [], "train2017"), "has no categories"),
    (
        lambda r: rewrite(r, "categories", lambda _: [{"id": 3}], "train2017"),
        "category 3 has no name of one",
    ),
    (lambda r: rewrite(r, "categories", lambda _: [3], "train2017"), "is not a COCO annotation file"),
    (lambda r: rewrite(r, "images", lambda _: []), "lists no images"),
    (lambda r: rewrite(r, "annotations", lambda _: [], "train2017"), "none of the 1 training images"),
    (lambda r: write_json(r, "train2017", [annotation(1, 3, iscrowd=1)]), "none of the 1 training images"),
    (val(1, 3, 1, 2, 50, 8), "outside its 40x30 image"),
    (val(1, 3, 1, 2, -5, 8), "not min before max"),
    (val(1, 3, 0.1, 0.2, 0.5, 0.7), "all boxes of val2017 lie between 0 and 1"),
    (val(1, 3, float("nan"), 2, 5, 8), "not finite"),
    (val(1, 3, 1, 2, 3), "bbox with four numbers"),
    (val(bbox=None), "bbox with four numbers"),
    (val(area="big"), "an area, if any, that is a number"),
    (val(category=4), r"annotation 1: its category_id 4 is not among the file's 2 categories \(3, 90\)"),
    (val(category=[3]), "it needs image_id, category_id"),
    (val(category="3"), "its category_id is '3'; correct it"),
    (val(category=True), "its category_id is True; correct it"),
    (val(category=float("nan")), "its category_id nan is not among"),
    (val(iscrowd="0"), "its iscrowd is '0'; correct it"),
    (val(iscrowd="false"), "its iscrowd is 'false'; correct it"),
    (val(iscrowd=2), "its iscrowd is 2; correct it"),
    (val(area=-80), "its area is -80; correct it"),
    (val(area=float("nan")), "its area is nan; correct it"),
    (val(area=float("inf")), "its area is inf; correct it"),
    (val(area="80"), "its area is '80'; correct it"),
    (val(bbox="1234"), "its bbox is '1234'; correct it"),
    (val(bbox=["1", "2", "10", "8"]), r"its bbox is \['1', '2', '10', '8'\]; correct it"),
    (val(bbox={"0": 1, "1": 2, "2": 10, "3": 8}), "bbox with four numbers"),
    (val(bbox=[1, 2, 10, 8, 0.3]), "bbox with four numbers"),
    (val(bbox=[1, 2, 10, 10**400]), "not finite"),
    (val(area=10**400), "its area is 10000"),
    (val(bbox=[1, 2, 10, float("inf")]), "not finite"),
    (lambda r: write_json(r, "train2017", [annotation(1, 3, iscrowd="1")]), "its iscrowd is '1'"),
    (lambda r: rewrite(r, "categories", lambda items: [i | {"name": ""} for i in items]), "has no name of one line"),
    (
        lambda r: rewrite(r, "images", lambda items: [*items, items[0] | {"id": 8}]),
        "file names of images: .*x.jpg' is listed",
    ),
    (
        lambda r: rewrite(r, "images", lambda items: [*items, items[0] | {"id": 8, "file_name": "./x.jpg"}]),
        "file names of images: .*x.jpg' is listed 2 times; keep one",
    ),
    (val(iscrowd=1), r"none of the 1 test images of val2017 has an object that counts \(0 are difficult, 1 crowd"),
    (lambda r: rewrite(r, "annotations", lambda _: []), "none of the 1 test images of val2017 has an object that"),
    (val(image_id=8), "its image 8 is not among the images"),
    (val(segmentation=5), "its segmentation is neither polygons nor"),
    (val(segmentation="12345678"), "its segmentation is neither polygons nor"),
    (val(segmentation="M0 0"), "its segmentation is neither polygons nor"),
    (val(segmentation=[1, 2, 3, 4, 5, 6]), "its segmentation is neither polygons nor"),
    (val(segmentation=[["a", "b", "c", "d", "e", "f"]]), "its segmentation is neither polygons nor"),
    (val(segmentation=[[1, 1, float("inf"), 1, 5, 6]]), "a number that is not finite"),
    (val(segmentation={"size": [40, 30], "counts": [1200]}), "its mask has size"),
    (val(segmentation={"size": [30, 40], "counts": [1, 2]}), "not runs that fill 40x30 pixels"),
    (val(segmentation={"size": [30, 40], "counts": [1300, -100]}), "not runs that fill 40x30 pixels"),
    (val(segmentation={"size": [30, 40], "counts": "oooo"}), "not runs that fill 40x30 pixels"),
    (val(segmentation={"size": [30, 40], "counts": "é"}), "not runs that fill 40x30 pixels"),
    (val(segmentation={"size": [30, 40]}), "not runs that fill 40x30 pixels"),
    (lambda r: val_json(r).write_text(val_json(r).read_text()[:99]), "not readable JSON"),
    (lambda r: val_json(r).write_bytes(b"\xff{}"), "not readable JSON"),
    (lambda r: val_json(r).write_text("[" * 100_000 + "]" * 100_000), "nested too deeply"),
    (lambda r: val_json(r).write_text("[]"), "is not a COCO annotation file"),
    (lambda r: val_json(r).write_text('{"images": {}, "annotations": [], "categories": []}'), "not a COCO annotation"),
    (lambda r: val_json(r).unlink(), "the splits there are train2017"),
]


@pytest.mark.parametrize("damage, words", BAD_COCO)
def test_bad_coco_is_refused_in_one_line(coco, damage, words):
    damage(coco)
    assert_refused(coco, read_coco_folder, "coco-folder", words)


def test_a_category_that_is_not_listed_is_no_class_of_that_number(coco):
    """Classes named by numbers: id 3 is '90', and an annotation of the unlisted category 9 is not class '9'."""
    named = [{"id": 90, "name": "9"}, {"id": 3, "name": "90"}]
    write_json(coco, "train2017", [annotation(1, 90), annotation(2, 3)], categories=named)
    write_json(coco, "val2017", [annotation(1, 90), annotation(2, 9)], categories=named)
    with pytest.raises(InputError, match="its category_id 9 is not among the file's 2 categories"):
        read_coco_folder(coco, None, None)
    assert read_coco_folder(coco, None, None, clip=True).test[0].labels.tolist() == [1]


def test_an_area_that_is_not_said_is_that_of_the_mask_or_the_box(coco, capsys):
    """pycocotools' own rule for detections; AP by size goes by the area."""
    masks = pytest.importorskip("pycocotools.mask")
    text = masks.frPyObjects(RUNS, 30, 40)["counts"].decode()
    kinds = [[SQUARE], RUNS, {"size": [30, 40], "counts": text}, None]
    items = [annotation(i, 3, segmentation=kind) for i, kind in enumerate(kinds)]
    items += [items[0] | {"id": 4, "area": None}, items[0] | {"id": 5, "area": 0}, items[3] | {"id": 6, "area": 7.5}]
    for item in items[:4]:
        del item["area"]
    write_json(coco, "val2017", items)
    areas = [item["area"] for item in read_coco_folder(coco, None, None).coco["annotations"]]
    square = masks.area(masks.merge(masks.frPyObjects([SQUARE], 30, 40)))
    assert areas == [square, 30, 30, 80, square, square, 7.5]
    assert "6 objects without an area" in capsys.readouterr().err


def test_numbers_that_mean_the_same_are_read_alike(coco):
    """Ids and sides as 7.0, marks as true and null, a size that is null or left out."""
    plain = read_coco_folder(coco, None, None).test[0]
    items = [annotation(1, 90.0, image_id=7.0, iscrowd=False), annotation(2, 3.0, iscrowd=True)]
    write_json(coco, "val2017", items, {"id": 7, "file_name": "x.jpg", "width": 40.0, "height": None})
    read = read_coco_folder(coco, None, None).test[0]
    assert (read.labels.tolist(), read.crowd.tolist()) == (plain.labels.tolist(), plain.crowd.tolist())
    write_json(coco, "val2017", [annotation(1, 90, iscrowd=None)], {"id": 7, "file_name": "x.jpg"})
    assert read_coco_folder(coco, None, None).test[0].crowd.tolist() == [False]


def test_what_is_odd_in_a_file_is_said_with_its_value(coco, capsys):
    named = [{"id": 90, "name": "Red car"}, {"id": 3, "name": "redcar "}]
    for split in ("train2017", "val2017"):
        write_json(coco, split, [annotation(1, 90, area=0.05), annotation(2, 3, area=1200)], categories=named)
    read_coco_folder(coco, None, None)
    err = capsys.readouterr().err
    assert "classes whose names differ by spaces or case only: 'redcar ' and 'Red car'" in err
    assert "2 objects whose area does not fit their box" in err and "0.05 in" in err and "1200 in" in err


def test_official_coco_checks_its_counts(coco):
    with pytest.raises(InputError, match="lists 1 images and the official split 118287"):
        read_coco(coco)


def test_bytes_before_json_and_subfolders_of_images(coco):
    val_json(coco).write_bytes(b"\xef\xbb\xbf" + val_json(coco).read_bytes())
    (coco / "val2017/sub").mkdir()
    (coco / "val2017/x.jpg").rename(coco / "val2017/sub/y.JPG")
    rewrite_bom = json.loads(val_json(coco).read_bytes())
    rewrite_bom["images"][0]["file_name"] = "sub/y.JPG"
    val_json(coco).write_bytes(b"\xef\xbb\xbf" + json.dumps(rewrite_bom).encode())
    assert read_coco_folder(coco, None, None).test[0].path.name == "y.JPG"


SQUARE = [2, 3, 10, 3, 10, 9, 2, 9]
RUNS = {"size": [30, 40], "counts": [60, 30, 1110]}


def test_masks_of_all_three_kinds(coco, capsys):
    """Polygons that are none are dropped and named; the object stays, without a mask if none is left."""
    masks = pytest.importorskip("pycocotools.mask")
    text = masks.frPyObjects(RUNS, 30, 40)["counts"].decode()
    kinds = [[SQUARE, [1, 1, 5, 5]], RUNS, {"size": [30, 40], "counts": text}, [[1, 2, 3, 4, 5]], [], None]
    write_json(coco, "val2017", [annotation(i, 3, segmentation=kind) for i, kind in enumerate(kinds)])
    data = read_coco_folder(coco, None, None)
    read = data.test[0].masks
    assert [len(part) for part in read[0]] == [8] and read[0][0].tolist() == SQUARE
    assert read[1:] == (RUNS, {"size": [30, 40], "counts": text}, None, None, None)
    assert "2 polygons of fewer than three points" in capsys.readouterr().err
    assert [item.get("segmentation") for item in data.coco["annotations"]][:2] == [[SQUARE], RUNS]
    assert "segmentation" not in data.coco["annotations"][3]
    assert data.train[0].masks == ()


def test_compressed_runs_are_those_of_pycocotools():
    masks = pytest.importorskip("pycocotools.mask")
    random = np.random.default_rng(0)
    for height, width, share in [(1, 1, 0.5), (30, 40, 0.5), (7, 900, 0.01), (700, 800, 0.0001), (5, 5, 1.0)]:
        mask = random.random((height, width)) < share
        runs = runs_of(mask)
        assert sum(runs) == mask.size
        encoded = masks.frPyObjects({"size": [height, width], "counts": runs}, height, width)
        np.testing.assert_array_equal(masks.decode(encoded), mask)
        assert uncompressed(encoded["counts"].decode()).tolist() == runs


def test_annotation_0_counts_for_pycocotools_too(coco):
    """pycocotools reads a match with annotation 0 as none, so they are numbered anew, from 1."""
    from moco_eval.detection.average_precision import coco_ap

    write_json(coco, "val2017", [annotation(0, 3)])
    data = read_coco_folder(coco, None, None)
    rows = [{"image_id": 7, "category_id": 3, "bbox": [1, 2, 10, 8], "score": 1.0}]
    assert coco_ap(data.coco, rows, dict(zip(data.category_ids, data.classes)))[0]["APbb"] == pytest.approx(100)


POINTS = ["nose", "left_eye", "right_eye", "left_tail"]


@pytest.fixture
def people(coco):
    """The COCO folder with keypoints in files of their own: one category, four points."""
    for split in ("train2017", "val2017"):
        write_json(
            coco,
            split,
            [
                annotation(1, 3, keypoints=[3, 4, 2, 5, 6, 1, 0, 0, 0, 0, 0, 0], num_keypoints=2),
                annotation(2, 3),
            ],
            categories=[{"id": 3, "name": "cat", "keypoints": POINTS}],
            kind="person_keypoints",
        )
    return coco


def test_keypoints_are_on_the_scale_of_the_boxes_and_know_their_mirror(people):
    """COCO's keypoint (3, 4) is the middle of that pixel: (3.5, 4.5) where a box from 3 to 4 covers it."""
    data = read_coco_folder(people, None, None, keypoints=True)
    assert data.keypoints == tuple(POINTS) and data.keypoint_pairs == ((1, 2),)
    assert data.test[0].keypoints.shape == (2, 4, 3)
    np.testing.assert_array_equal(data.test[0].keypoints[0, :3], [[3.5, 4.5, 2], [5.5, 6.5, 1], [0.5, 0.5, 0]])
    assert not data.test[0].keypoints[1].any()
    first, second = data.coco["annotations"]
    assert first["keypoints"][:3] == [3, 4, 2]
    assert [first["num_keypoints"], second["num_keypoints"]] == [2, 0]
    without = read_coco_folder(people, None, None)
    assert without.keypoints == () and without.test[0].keypoints is None
    assert without.classes == ("cat", "dog")


@pytest.mark.parametrize(
    "key, change, words",
    [
        ("annotations", {"keypoints": [1, 2, 2]}, "keypoints are not 4 times x, y and 0, 1 or 2"),
        ("annotations", {"keypoints": [1, 2, 3] * 4}, "keypoints are not 4 times x, y and 0, 1 or 2"),
        ("annotations", {"keypoints": "nose"}, "keypoints are not 4 times x, y and 0, 1 or 2"),
        ("annotations", {"keypoints": [float("nan"), 2, 2] * 4}, "keypoints are not 4 times x, y and 0, 1 or 2"),
        ("annotations", {"keypoints": ["3", 4, 2] * 4}, "keypoints are not 4 times x, y and 0, 1 or 2"),
        ("annotations", {"keypoints": "342342342342"}, "keypoints are not 4 times x, y and 0, 1 or 2"),
        ("categories", {"keypoints": POINTS[::-1]}, "are not those trained on"),
        ("categories", {"keypoints": []}, "no category has keypoints"),
        ("categories", {"keypoints": "nose"}, "not a list of names"),
    ],
)
def test_bad_keypoints_are_refused_in_one_line(people, key, change, words):
    rewrite(people, key, lambda items: [item | change for item in items], "train2017", "person_keypoints")

    def read(root, *splits):
        return read_coco_folder(root, *splits, keypoints=True)

    assert_refused(people, read, "coco-folder", words)


def test_keypoints_are_asked_for_where_there_are_none(coco):
    with pytest.raises(InputError, match="no category has keypoints; take a recipe without keypoints"):
        read_coco_folder(coco, None, None, keypoints=True)


def test_scenes_are_the_same_for_the_same_seed_and_keep_the_split_of_the_digits(monkeypatch):
    first, again, other = draw_scenes(3, 4, 4), draw_scenes(3, 4, 4), draw_scenes(4, 4, 4)
    for one, two in zip(first["train"], again["train"]):
        assert np.array_equal(one.canvas, two.canvas) and one.objects == two.objects
    assert not np.array_equal(first["train"][0].canvas, other["train"][0].canvas)

    from sklearn import datasets

    digits = datasets.load_digits()
    digits.target[:TRAIN_DIGITS], digits.target[TRAIN_DIGITS:] = (
        1,
        7,
    )  # the label tells which part a digit is of
    monkeypatch.setattr(datasets, "load_digits", lambda: digits)
    scenes = draw_scenes(0, 20, 20)
    assert {label for scene in scenes["train"] for _, label in scene.objects} == {1}
    assert {label for scene in scenes["test"] for _, label in scene.objects} == {7}


def test_scenes_read_alike_in_both_formats(tmp_path):
    folder = write_scenes(tmp_path / "scenes", seed=1, train=6, test=3)
    voc = read_voc_folder(folder / "voc", None, None, classes=DIGITS)
    coco = read_coco_folder(folder / "coco", None, None)
    assert [len(voc.train), len(voc.test)] == [len(coco.train), len(coco.test)] == [6, 3]
    for one, two in zip(voc.train + voc.test, coco.train + coco.test):
        np.testing.assert_array_equal(one.boxes, two.boxes)
        assert [voc.classes[i] for i in one.labels] == [coco.classes[i] for i in two.labels]
        assert 1 <= len(one.labels) <= 6
    for sample in coco.train + coco.test:  # each mask is ink, and touches all four sides of its box
        pixels = np.asarray(read_image(sample.path))[:, :, 0].astype(float)
        for (x0, y0, x1, y1), mask in zip(sample.boxes.astype(int), sample.masks):
            counts = mask["counts"]
            drawn = np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(128, 128).T
            assert drawn.sum() == drawn[y0:y1, x0:x1].sum()
            assert drawn[y0, :].any() and drawn[y1 - 1, :].any() and drawn[:, x0].any() and drawn[:, x1 - 1].any()
            assert pixels[drawn].mean() > pixels[y0:y1, x0:x1][~drawn[y0:y1, x0:x1]].mean() + 20
    assert write_scenes(folder, seed=1, train=6, test=3) == folder
    with pytest.raises(InputError, match="choose another --data"):
        write_scenes(folder, seed=2, train=6, test=3)


def test_scenes_of_before_masks_get_them(tmp_path):
    folder = write_scenes(tmp_path / "scenes", seed=1, train=3, test=2)
    whole = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    told = json.loads((folder / "scenes.json").read_text())
    (folder / "scenes.json").write_text(json.dumps(told | {"scenes": "digits@1"}))
    rewrite(folder / "coco", "annotations", lambda _: [])
    write_scenes(folder, seed=1, train=3, test=2)
    assert json.loads((folder / "scenes.json").read_text()) == told
    for path, data in whole.items():
        assert path.name == "scenes.json" or path.read_bytes() == data


@pytest.mark.data
def test_real_data_read(shared_data):
    bccd = read_voc_folder(shared_data / "BCCD", "train", "val")
    assert bccd.classes == ("Platelets", "RBC", "WBC")
    assert [len(bccd.train), len(bccd.test)] == [130, 30]
    voc = read_voc_folder(shared_data / "VOCdevkit/VOC2012", None, None)
    assert len(voc.classes) == 20
    assert sum(len(s.labels) for s in voc.train + voc.test) == 273
    assert sum(s.difficult.sum() for s in voc.train + voc.test) == 38
    coco = read_coco_folder(shared_data / "coco-mini", None, None)
    assert [len(coco.train), len(coco.test)] == [37, 35]
    assert sum(s.crowd.sum() for s in coco.train + coco.test) == 9
    masks = [mask for s in coco.train + coco.test for mask in s.masks]
    assert sum(isinstance(mask, dict) for mask in masks) == 9 and len(masks) == 391 + 236
    people = read_coco_folder(shared_data / "coco-mini", None, None, keypoints=True)
    assert len(people.keypoints) == 17 and len(people.keypoint_pairs) == 8
    assert [sum((s.keypoints[:, :, 2] > 0).any(1).sum() for s in part) for part in (people.train, people.test)] == [
        36,
        32,
    ]


@pytest.mark.data
def test_real_data_are_checked(shared_data):
    lines, refusal = check("voc-folder", shared_data / "BCCD", "train", "val")
    assert refusal is None
    assert [line for line in lines if line.startswith("note")] == [
        "note: train: 1 boxes of zero area dropped: Annotations/BloodImage_00343.xml",
        "note: val: 1 boxes of zero area dropped: Annotations/BloodImage_00338.xml",
    ]
    assert check("voc-folder", shared_data / "VOCdevkit/VOC2012")[1] is None
    lines, refusal = check("coco-folder", shared_data / "coco-mini")
    assert refusal is None
    assert "note: val2017: 2 images without objects: 58636, 226111" in lines
    assert "17 keypoints, of which a mirror exchanges 8 pairs" in lines


@pytest.mark.data
@pytest.mark.detectron2
def test_coco_is_read_as_detectron2_reads_it(shared_data):
    """Boxes, classes, polygons and keypoints of real images; crowd regions apart, which it keeps as objects."""
    coco_json = pytest.importorskip("detectron2.data.datasets.coco")
    root = shared_data / "coco-mini"
    for keypoints, kind in ((False, "instances"), (True, "person_keypoints")):
        ours = {s.image_id: s for s in read_coco_folder(root, None, None, keypoints=keypoints).train}
        theirs = coco_json.load_coco_json(
            root / f"annotations/{kind}_train2017.json", root / "train2017", f"mini-{kind}"
        )
        assert len(ours) == len(theirs)
        for record in theirs:
            sample, items = ours[record["image_id"]], record["annotations"]
            assert sample.size == (record["width"], record["height"])
            assert str(sample.path) == record["file_name"]
            assert sample.labels.tolist() == [item["category_id"] for item in items]
            assert sample.crowd.tolist() == [bool(item["iscrowd"]) for item in items]
            boxes = np.array([item["bbox"] for item in items]).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            np.testing.assert_array_equal(sample.boxes, boxes)
            for mask, item in zip(sample.masks, items):
                if isinstance(mask, list):
                    assert [part.tolist() for part in mask] == item["segmentation"]
            if keypoints:
                points = np.array([item["keypoints"] for item in items]).reshape(-1, 17, 3)
                seen = points[:, :, 2] > 0
                np.testing.assert_array_equal(sample.keypoints[seen], points[seen])


@pytest.mark.data
@pytest.mark.detectron2
def test_voc_is_read_as_detectron2_reads_it(shared_data):
    pascal = pytest.importorskip("detectron2.data.datasets.pascal_voc")
    root = shared_data / "VOCdevkit/VOC2012"
    data = read_voc_folder(root, "trainval", "test")
    for split, samples in (("trainval", data.train), ("test", data.test)):
        theirs = pascal.load_voc_instances(str(root), split, list(data.classes))
        assert [record["image_id"] for record in theirs] == [sample.image_id for sample in samples]
        for record, sample in zip(theirs, samples):
            assert sample.size == (record["width"], record["height"])
            items = record["annotations"]
            assert sample.labels.tolist() == [item["category_id"] for item in items]
            np.testing.assert_array_equal(sample.boxes, np.array([item["bbox"] for item in items]).reshape(-1, 4))
