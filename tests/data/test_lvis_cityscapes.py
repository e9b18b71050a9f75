"""The readers of LVIS and of Cityscapes' instances: what they read, and what they refuse in one line."""

import json

import numpy as np
import pytest
from boxes_beyond_coco import CATEGORIES, SIDE, lvis_image, picture, write_cityscapes, write_lvis
from PIL import Image
from pycocotools import mask as coco_mask

from moco_eval.data.boxes.check import check
from moco_eval.data.boxes.cityscapes import read_cityscapes_instances
from moco_eval.data.boxes.lvis import read_lvis
from moco_eval.errors import InputError


def refused(read, *arguments):
    with pytest.raises(InputError) as error:
        read(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# LVIS


@pytest.mark.parametrize("version", ["v0.5", "v1"])
def test_lvis_images_lie_where_their_url_says_and_classes_are_sorted(tmp_path, monkeypatch, version):
    root = write_lvis(tmp_path, monkeypatch, version)
    data = read_lvis(root, version)
    assert data.name == f"lvis-{version}" and data.federated
    assert data.classes == ("cup", "sink", "bow_(weapon)") and data.category_ids == (1, 2, 3)
    assert [sample.path.relative_to(root / "coco").as_posix() for sample in data.test] == [
        "val2017/5.jpg",
        "train2017/6.jpg",
    ]
    assert [sample.labels.tolist() for sample in data.train] == [[0, 1], [0], [0], [2]]
    assert [item["frequency"] for item in data.coco["categories"]] == ["f", "c", "r"]
    assert data.coco["images"][0]["neg_category_ids"] == []


def test_lvis_v05_has_a_file_name_of_coco_2014_which_names_no_file(tmp_path, monkeypatch):
    def name(values):
        for image in values["images"]:
            image["file_name"] = f"COCO_val2014_{image['id']:012}.jpg"

    assert len(read_lvis(write_lvis(tmp_path, monkeypatch, "v0.5", name, name), "v0.5").train) == 4


def test_lvis_annotations_and_images_may_lie_in_data_itself(tmp_path, monkeypatch):
    root = write_lvis(tmp_path, monkeypatch)
    (root / "lvis").rename(root / "annotations")
    for split in ("train2017", "val2017"):
        (root / "coco" / split).rename(root / split)
    assert len(read_lvis(root, "v1").test) == 2


LVIS_DAMAGES = [
    (lambda v: v["categories"].pop(), "lists 2 categories and LVIS v1 val has 3"),
    (lambda v: v["images"].pop(), "lists 1 images and LVIS v1 val has 2"),
    (lambda v: v["categories"][0].pop("frequency"), "its frequency is None and must be r, c or f"),
    (lambda v: v["images"][0].pop("neg_category_ids"), "its neg_category_ids is no list of categories"),
    (lambda v: v["images"][0].update(not_exhaustive_category_ids=[9]), "its not_exhaustive_category_ids is no list"),
    (lambda v: v["images"][0].pop("coco_url"), "its coco_url 'None' names no image of train2017 or val2017"),
    (lambda v: v["images"][0].update(coco_url="http://x/../../etc/passwd"), "names no image of train2017"),
    (lambda v: v["images"].__setitem__(0, lvis_image(5, "val2017/none.jpg")), "are not in"),
]


@pytest.mark.parametrize(("damage", "words"), LVIS_DAMAGES, ids=[words for _, words in LVIS_DAMAGES])
def test_bad_lvis_is_refused_in_one_line(tmp_path, monkeypatch, damage, words):
    def damaged(values):
        values["categories"] = [dict(item) for item in CATEGORIES]
        damage(values)

    assert words in refused(read_lvis, write_lvis(tmp_path, monkeypatch, test=damaged), "v1")


def test_lvis_without_its_files_or_images_says_where_they_belong(tmp_path, monkeypatch):
    assert "lvis_v1_train.json does not exist" in refused(read_lvis, tmp_path, "v1")
    root = write_lvis(tmp_path, monkeypatch)
    (root / "coco").rename(root / "images")
    assert "LVIS is on COCO's images" in refused(read_lvis, root, "v1")


def test_lvis_is_checked(tmp_path, monkeypatch):
    root = write_lvis(tmp_path, monkeypatch)
    lines, refusal = check("lvis-v1", root)
    assert refusal is None and "lvis-v1 train: 4 images, 5 objects" in lines
    picture(root / "coco" / "val2017" / "5.jpg", size=(SIDE, 9))
    lines, refusal = check("lvis-v1", root)
    assert "of another size than the json says" in lines[0] and "64x64" in refusal
    path = root / "lvis" / "lvis_v1_val.json"
    path.write_text(json.dumps([]))
    assert check("lvis-v1", root)[1] is not None


# Cityscapes


def test_cityscapes_instances_are_pixels_with_boxes_around_them(tmp_path, monkeypatch):
    data = read_cityscapes_instances(write_cityscapes(tmp_path, monkeypatch))
    assert (len(data.train), len(data.test), len(data.classes)) == (3, 2, 8)
    sample = data.test[1]
    assert [data.classes[label] for label in sample.labels] == ["bicycle", "person", "car"]
    assert sample.crowd.tolist() == [True, False, False]
    assert sample.boxes.tolist() == [[64, 44, 96, 60], [50, 20, 62, 60], [6, 10, 36, 40]]
    ids = np.asarray(Image.open(data.instance_files[1]))
    for mask, value in zip(sample.masks, (33, 24003, 26000)):
        assert np.array_equal(coco_mask.decode(mask) > 0, ids == value)
    assert sample.image_id == "aachen_000001_000019" and data.coco is None


def test_an_instance_of_any_shape_is_its_pixels(tmp_path, monkeypatch):
    """Pieces, one pixel, whole columns one after the other, and the corners."""
    root = write_cityscapes(tmp_path, monkeypatch, 1, 1)
    ids = np.full((64, 96), 7)
    ids[3, 5] = 25000
    ids[:, 40:43] = 26000
    ids[60:, 50:52] = ids[:4, 52] = 27000
    ids[0, 0] = ids[-1, -1] = 31000
    Image.fromarray(ids.astype(np.uint16)).save(
        root / "gtFine" / "train" / "aachen" / "aachen_000000_000019_gtFine_instanceIds.png"
    )
    (sample,) = read_cityscapes_instances(root).train
    assert sample.boxes.tolist() == [[5, 3, 6, 4], [40, 0, 43, 64], [50, 0, 53, 64], [0, 0, 96, 64]]
    for mask, value in zip(sample.masks, (25000, 26000, 27000, 31000)):
        assert np.array_equal(coco_mask.decode(mask) > 0, ids == value)


def test_bad_cityscapes_is_refused_in_one_line(tmp_path, monkeypatch):
    root = write_cityscapes(tmp_path, monkeypatch)
    file = root / "gtFine" / "val" / "aachen" / "aachen_000000_000019_gtFine_instanceIds.png"
    good = file.read_bytes()
    Image.fromarray(np.full((64, 96), 60_000, np.uint16)).save(file)
    assert "has the value 60000" in refused(read_cityscapes_instances, root)
    Image.fromarray(np.zeros((64, 64), np.uint16)).save(file)
    assert "is 64x64 and its image" in refused(read_cityscapes_instances, root)
    Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save(file)
    assert "is a mask of 3 channels" in refused(read_cityscapes_instances, root)
    file.unlink()
    assert "1 of 2 images have no instances" in refused(read_cityscapes_instances, root)
    file.write_bytes(good)
    monkeypatch.undo()
    assert "train has 3 images and the official split 2975" in refused(read_cityscapes_instances, root)


def test_cityscapes_is_checked(tmp_path, monkeypatch):
    root = write_cityscapes(tmp_path, monkeypatch)
    lines, refusal = check("cityscapes", root)
    assert refusal is None and "cityscapes val: 2 images, 4 objects" in lines
    assert any("crowd regions" in line for line in lines)
    for number in range(2):
        file = root / "gtFine" / "val" / "aachen" / f"aachen_{number:06}_000019_gtFine_instanceIds.png"
        Image.fromarray(np.full((64, 96), 60_000, np.uint16)).save(file)
    lines, refusal = check("cityscapes", root)
    assert "2 files of instances that cannot be read" in lines[0] and "60000" in refusal
