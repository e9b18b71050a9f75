"""The VOC and COCO readers, their dirt, and the built-in scenes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moco_eval.data.boxes import image_size, read_image
from moco_eval.data.coco import read_coco, read_coco_folder
from moco_eval.data.scenes import DIGITS, TRAIN_DIGITS, draw_scenes, write_scenes
from moco_eval.data.voc import read_voc, read_voc_folder
from moco_eval.errors import InputError


def voc_object(name="cat", box=(1, 1, 20, 10), more="<difficult>0</difficult>"):
    sides = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
    return f"<object><name>{name}</name>{more}<bndbox>{sides}</bndbox></object>"


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


def test_voc_one_line_and_two_column_lists_and_names_with_spaces(voc):
    (voc / "JPEGImages/a.png").rename(voc / "JPEGImages/a photo.JPG")
    (voc / "Annotations/a.xml").rename(voc / "Annotations/a photo.xml")
    (voc / "ImageSets/Main/cat_train.txt").write_text("a photo\nb  -1\n")
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


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda r: write_xml(r, "b", voc_object(box=(1, 1, 60, 10))), "outside its 40x30 image"),
        (lambda r: write_xml(r, "c", voc_object("cow")), "class 'cow' is not among the 2 classes"),
        (lambda r: write_xml(r, "b", voc_object(box=(9, 1, 3, 10))), "not min before max"),
        (lambda r: write_xml(r, "b", voc_object(box=("x", 1, 3, 10))), "not four numbers"),
        (lambda r: write_xml(r, "b", voc_object(box=("nan", 1, 3, 10))), "not min before max"),
        (lambda r: write_xml(r, "b", "<object><name>cat</name></object>"), "no <bndbox><xmin>"),
        (
            lambda r: write_xml(r, "b", "", "<size><width>30</width><height>40</height></size>"),
            "says 30x40 and b.png has 40x30",
        ),
        (lambda r: (r / "Annotations/b.xml").write_text("<annotation><obj"), "not readable XML"),
        (lambda r: (r / "Annotations/b.xml").unlink(), "b.xml does not exist"),
        (lambda r: (r / "JPEGImages/b.png").unlink(), "has no image b"),
        (lambda r: (r / "JPEGImages/b.png").write_text("hello"), "it is no image"),
        (lambda r: (r / "ImageSets/Main/test.txt").write_text("\n"), "lists no images"),
        (lambda r: (r / "ImageSets/Main/test.txt").write_text("c\nc\n"), "stands there 2 times"),
        (lambda r: (r / "ImageSets/Main/test.txt").unlink(), "val.txt does not exist"),
        (lambda r: [write_xml(r, n, "") for n in "ab"], "none of the 2 training images has an object"),
    ],
)
def test_bad_voc_is_refused_in_one_line(voc, damage, words):
    damage(voc)
    with pytest.raises(InputError, match=words) as error:
        read_voc_folder(voc, None, None)
    assert "\n" not in str(error.value)


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


def write_json(root, split, annotations, image=None, categories=None):
    values = {
        "images": [image or {"id": 7, "file_name": "x.jpg", "width": 40, "height": 30}],
        "annotations": annotations,
        "categories": categories or [{"id": 90, "name": "dog"}, {"id": 3, "name": "cat"}],
    }
    (root / f"annotations/instances_{split}.json").write_text(json.dumps(values))


def test_coco_categories_are_sorted_by_id_and_crowds_marked(coco):
    data = read_coco_folder(coco, None, None)
    assert (data.classes, data.category_ids) == (("cat", "dog"), (3, 90))
    assert data.train[0].labels.tolist() == [1, 0]
    assert data.train[0].crowd.tolist() == [False, True]
    np.testing.assert_array_equal(data.train[0].boxes[0], [1, 2, 11, 10])
    assert [item["category_id"] for item in data.coco["annotations"]] == [90, 3]


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda r: (r / "train2017/x.jpg").unlink(), "1 of 1 images"),
        (lambda r: write_json(r, "val2017", [annotation(1, 3), annotation(1, 3)]), "stands there 2 times"),
        (lambda r: write_json(r, "val2017", [annotation(1, 3, (1, 2, 50, 8))]), "outside its 40x30 image"),
        (lambda r: write_json(r, "val2017", [annotation(1, 4)]), "class '4' is not among the 2 classes"),
        (
            lambda r: write_json(r, "val2017", [annotation(1, 3, image_id=8)]),
            "its image 8 is not among the images",
        ),
        (lambda r: write_json(r, "val2017", [annotation(1, 3, (1, 2, 3))]), "bbox with four numbers"),
        (lambda r: (r / "annotations/instances_val2017.json").write_text("{"), "not readable JSON"),
        (lambda r: (r / "annotations/instances_val2017.json").write_text("[]"), "is no COCO annotation file"),
        (lambda r: (r / "annotations/instances_val2017.json").unlink(), "the splits there are train2017"),
    ],
)
def test_bad_coco_is_refused_in_one_line(coco, damage, words):
    damage(coco)
    with pytest.raises(InputError, match=words) as error:
        read_coco_folder(coco, None, None)
    assert "\n" not in str(error.value)


def test_official_coco_checks_its_counts(coco):
    with pytest.raises(InputError, match="lists 1 images and the official split 118287"):
        read_coco(coco)


def test_scenes_are_the_same_for_the_same_seed_and_keep_the_split_of_the_digits(monkeypatch):
    first, again, other = draw_scenes(3, 4, 4), draw_scenes(3, 4, 4), draw_scenes(4, 4, 4)
    assert all(np.array_equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(first["train"], again["train"]))
    assert not np.array_equal(first["train"][0][0], other["train"][0][0])

    from sklearn import datasets

    digits = datasets.load_digits()
    digits.target[:TRAIN_DIGITS], digits.target[TRAIN_DIGITS:] = (
        1,
        7,
    )  # the label tells which part a digit is of
    monkeypatch.setattr(datasets, "load_digits", lambda: digits)
    scenes = draw_scenes(0, 20, 20)
    assert {label for _, objects in scenes["train"] for _, label in objects} == {1}
    assert {label for _, objects in scenes["test"] for _, label in objects} == {7}


def test_scenes_read_alike_in_both_formats(tmp_path):
    folder = write_scenes(tmp_path / "scenes", seed=1, train=6, test=3)
    voc = read_voc_folder(folder / "voc", None, None, classes=DIGITS)
    coco = read_coco_folder(folder / "coco", None, None)
    assert [len(voc.train), len(voc.test)] == [len(coco.train), len(coco.test)] == [6, 3]
    for one, two in zip(voc.train + voc.test, coco.train + coco.test):
        np.testing.assert_array_equal(one.boxes, two.boxes)
        assert [voc.classes[i] for i in one.labels] == [coco.classes[i] for i in two.labels]
        assert 1 <= len(one.labels) <= 6
    assert write_scenes(folder, seed=1, train=6, test=3) == folder
    with pytest.raises(InputError, match="choose another --data"):
        write_scenes(folder, seed=2, train=6, test=3)


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
