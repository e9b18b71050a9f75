"""Readers of images with masks: layouts, values, and what they refuse in one line."""

import numpy as np
import pytest
from PIL import Image

from moco_eval.data.boxes.scenes import draw_scenes, written_once
from moco_eval.data.masks.ade20k import read_ade20k
from moco_eval.data.masks.check import check
from moco_eval.data.masks.cityscapes import CLASSES, IDS, read_cityscapes
from moco_eval.data.masks.coco_stuff import VALUES, read_coco_stuff
from moco_eval.data.masks.folder import read_class_names, read_mask_folder
from moco_eval.data.masks.samples import IGNORED, count_pixels, read_values
from moco_eval.data.masks.scenes import mask_of, write_mask_scenes
from moco_eval.data.masks.voc import read_voc2012, read_voc_aug
from moco_eval.errors import InputError, RunFailed

SIZE = (6, 4)  # width and height
GREY = np.arange(24, dtype=np.uint8).reshape(4, 6) % 3


def save(path, values=None, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.zeros((SIZE[1], SIZE[0]), np.uint8) if values is None else values
    image = Image.fromarray(np.asarray(values, np.uint8))
    if mode == "P":
        image.putpalette([value for colour in range(256) for value in (colour * 37 % 256, colour, 255 - colour)])
    elif mode == "RGB":
        image = image.convert("RGB")
    image.save(path)


def folder(root, layout="train_masks", mask=GREY, mode="L"):
    """A mask-folder of two training images and one test image; `mask` is the last training image's."""
    for split, names in (("train", "ab"), ("val", "c")):
        for name in names:
            images, masks = (
                (split, f"{split}_masks") if layout == "train_masks" else (f"images/{split}", f"masks/{split}")
            )
            save(root / images / f"{name}.png")
            if mask is not None or name != "b":
                save(root / masks / f"{name}.png", mask if name == "b" else GREY, mode if name == "b" else "L")
    return root


@pytest.mark.parametrize("layout", ["train_masks", "masks/train"])
def test_a_mask_folder_is_read_with_the_classes_that_its_masks_have(tmp_path, layout):
    data = read_mask_folder(folder(tmp_path, layout))
    assert (data.classes, data.train_split, data.test_split) == (("0", "1", "2"), "train", "val")
    assert [sample.name for sample in data.train + data.test] == ["a", "b", "c"]
    image, mask = data.pair(data.train[0])
    assert image.mode == "RGB" and (mask == GREY).all()
    assert count_pixels(data, data.train).tolist() == [[8, 8, 8], [8, 8, 8]]


def test_ignored_values_are_no_classes(tmp_path):
    data = read_mask_folder(folder(tmp_path), ignored=(2,))
    assert data.classes == ("0", "1")
    assert set(np.unique(data.mask(data.train[0]))) == {0, 1, IGNORED}


def test_a_palette_is_not_applied(tmp_path):
    """The usual bug: converted to RGB or to grey, the indices are gone."""
    data = read_mask_folder(folder(tmp_path, mode="P"))
    assert (data.mask(data.train[1]) == GREY).all()
    assert (np.asarray(Image.open(data.train[1].mask).convert("L")) != GREY).any()


def test_masks_of_sixteen_bits_and_of_one_are_read(tmp_path):
    Image.fromarray(GREY.astype(np.uint16) * 300).save(tmp_path / "16.png")
    assert (read_values(tmp_path / "16.png") == GREY.astype(int) * 300).all()
    Image.fromarray(GREY > 0).save(tmp_path / "1.png")
    assert (read_values(tmp_path / "1.png") == (GREY > 0)).all()


@pytest.mark.parametrize(
    ("mask", "mode", "words"),
    [
        (
            GREY + 7,
            "L",
            r"b\.png has the value 7 at 8 pixels, and the 3 classes are 0 to 2, ignored is 255; ",
        ),
        (np.zeros((5, 6)), "L", r"b\.png is 6x5 and its image .*b\.png is 6x4 .*put the right mask in its place"),
        (GREY, "RGB", r"b\.png is a mask of 3 channels \(RGB\) and must have one"),
        (None, "L", r"1 of 2 images have no mask: .*train_masks/b\.png does not exist; put it there"),
    ],
)
def test_a_wrong_mask_is_refused_by_its_name(tmp_path, mask, mode, words):
    with pytest.raises(InputError, match=words):
        data = read_mask_folder(folder(tmp_path, mask=mask, mode=mode), classes=("sky", "sea", "land"))
        count_pixels(data, data.train)


def test_a_mask_is_no_jpeg(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.jpg")
    with pytest.raises(InputError, match=r"a\.jpg is a JPEG, whose compression changes values"):
        read_values(tmp_path / "a.jpg")


def test_a_mask_without_an_image_two_splits_of_one_name_and_no_split_are_refused(tmp_path):
    with pytest.raises(InputError, match="has no split test, val, validation; a mask-folder has"):
        read_mask_folder(tmp_path)
    folder(tmp_path)
    with pytest.raises(InputError, match="are both val"):
        read_mask_folder(tmp_path, train_split="val")
    with pytest.raises(InputError, match="no images and masks of split 'train2'"):
        read_mask_folder(tmp_path, train_split="train2")
    save(tmp_path / "val_masks" / "z.png", GREY, "L")
    with pytest.raises(InputError, match=r"z\.png has no image in .*val"):
        read_mask_folder(tmp_path)


def test_a_foreground_of_255_is_explained(tmp_path):
    root = folder(tmp_path, mask=np.zeros((4, 6)))
    for name in "ab":
        save(root / "train_masks" / f"{name}.png", (GREY > 1) * 255, "L")
    with pytest.raises(InputError, match="write a foreground of 255 as 1"):
        read_mask_folder(root)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sky\n\nsea\n", "line 2 is empty, and would name class 1"),
        ("sky\nsky\n", "has 'sky' twice"),
        ("sky\n", "names 1 classes; a mask has at least 2"),
        (None, "does not exist|No such file"),
    ],
)
def test_a_file_of_class_names(tmp_path, text, words):
    path = tmp_path / "classes.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=words):
        read_class_names(path)
    path.write_text("sky\nopen sea\n\n")
    assert read_class_names(path) == ["sky", "open sea"]


def voc(root, masks, split):
    for name in ("2007_1", "2007_2"):
        save(root / "JPEGImages" / f"{name}.jpg")
        save(root / masks / f"{name}.png", [[0, 20, 255, 1, 1, 1]] * 4, "P")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / f"{split}.txt").write_text("2007_1\n")
    (lists / "val.txt").write_text("2007_2\n")


def test_voc_names_other_counts_than_the_published_ones(tmp_path):
    voc(tmp_path / "VOC2012", "SegmentationClassAug", "train_aug")
    data = read_voc_aug(tmp_path)
    assert len(data.classes) == 21 and data.classes[0] == "background" and data.classes[20] == "tvmonitor"
    assert data.deviations == ("1 training images instead of 10582", "1 test images instead of 1449")
    assert data.mask(data.train[0])[0].tolist() == [0, 20, 255, 1, 1, 1]
    voc(tmp_path / "VOC2012", "SegmentationClass", "train")
    assert read_voc2012(tmp_path).deviations[0] == "1 training images instead of 1464"


def test_voc_aug_as_mmsegmentation_lays_it_out(tmp_path):
    """train.txt and aug.txt, and VOC's own masks before SBD's of the same images."""
    voc(tmp_path, "SegmentationClassAug", "aug")
    (tmp_path / "ImageSets/Segmentation/aug.txt").write_text("2007_3\n")
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("2007_1\n")
    save(tmp_path / "JPEGImages/2007_3.jpg")
    save(tmp_path / "SegmentationClassAug/2007_3.png", GREY, "L")
    save(tmp_path / "SegmentationClass/2007_2.png", GREY, "L")
    data = read_voc_aug(tmp_path)
    assert data.train_split == "train+aug" and [sample.name for sample in data.train] == ["2007_1", "2007_3"]
    assert {sample.mask.parent.name for sample in data.train} == {"SegmentationClassAug"}
    assert data.test[0].mask.parent.name == "SegmentationClass"


def test_voc_takes_lists_of_pairs_as_deeplab_has_them(tmp_path):
    voc(tmp_path, "SegmentationClassAug", "trainaug")
    pair = "/JPEGImages/2007_1.jpg /SegmentationClassAug/2007_1.png\n"
    (tmp_path / "ImageSets/Segmentation/trainaug.txt").write_text(pair)
    data = read_voc_aug(tmp_path)
    assert (data.train_split, data.train[0].name) == ("trainaug", "2007_1")
    (tmp_path / "ImageSets/Segmentation/trainaug.txt").write_text("2007_1\n2007_1\n")
    with pytest.raises(InputError, match="lists '2007_1' twice"):
        read_voc_aug(tmp_path)


def test_cityscapes_label_ids_become_train_ids(tmp_path):
    values = np.resize(np.arange(34, dtype=np.uint8), (4, 9))
    for split in ("train", "val"):
        save(tmp_path / f"leftImg8bit/{split}/bonn/bonn_0_leftImg8bit.png", np.zeros((4, 9)))
        save(tmp_path / f"gtFine/{split}/bonn/bonn_0_gtFine_labelIds.png", values, "L")
    data = read_cityscapes(tmp_path)
    mask = data.mask(data.train[0])
    assert len(CLASSES) == len(IDS) == 19 and data.classes[mask[values == 26][0]] == "car"
    assert [int(mask[values == label][0]) for label in IDS] == list(range(19))
    assert (mask[~np.isin(values, IDS)] == IGNORED).all()


def test_ade20k_and_coco_stuff_have_their_own_numbers(tmp_path):
    for split in ("training", "validation"):
        save(tmp_path / f"images/{split}/a.jpg")
        save(tmp_path / f"annotations/{split}/a.png", [[0, 1, 2, 150, 3, 4]] * 4, "L")
    data = read_ade20k(tmp_path)
    assert len(data.classes) == 150 and data.mask(data.test[0])[0].tolist() == [255, 0, 1, 149, 2, 3]
    for split in ("train2017", "val2017"):
        save(tmp_path / split / "a.jpg")
        save(tmp_path / f"stuffthingmaps/{split}/a.png", [[0, 10, 12, 181, 255, 91]] * 4, "L")
    data = read_coco_stuff(tmp_path)
    assert len(data.classes) == len(VALUES) == 171
    assert data.mask(data.test[0])[0].tolist() == [0, 10, 11, 170, 255, 80]
    save(tmp_path / "stuffthingmaps/val2017/a.png", [[11] * 6] * 4, "L")
    with pytest.raises(InputError, match="has the value 11 at 24 pixels, and the 171 classes are 171 values"):
        data.mask(data.test[0])


def test_the_scenes_of_digits_have_masks_where_their_ink_is(tmp_path):
    data = read_mask_folder(
        write_mask_scenes(tmp_path / "scenes", train=3, test=2), classes=("background", *"0123456789")
    )
    assert (len(data.train), len(data.test), len(data.classes)) == (3, 2, 11)
    for sample, scene in zip(data.test, draw_scenes(0, 3, 2)["test"]):
        image, mask = data.pair(sample)
        assert (mask == mask_of(scene)).all() and (np.asarray(image)[..., 0] == scene.canvas).all()
        assert {int(value) - 1 for value in np.unique(mask)} - {-1} == {digit for _, digit in scene.objects}
        ink = sum(int(ink.sum()) for ink in scene.inks)
        assert (mask > 0).sum() == ink
    assert write_mask_scenes(tmp_path / "scenes", train=3, test=2) == tmp_path / "scenes"
    with pytest.raises(InputError, match="holds something other than the digit scenes"):
        write_mask_scenes(tmp_path / "scenes", train=4, test=2)


def test_scenes_have_digits_of_the_size_and_the_number_asked_for(tmp_path):
    scenes = draw_scenes(0, 20, 1, side=(56, 96), count=(1, 2))["train"]
    heights = [y1 - y0 for scene in scenes for (_, y0, _, y1), _ in scene.objects]
    assert {len(scene.objects) for scene in scenes} == {1, 2} and min(heights) > 40 and 80 < max(heights) <= 96
    folder = write_mask_scenes(tmp_path / "scenes", train=20, test=1, side=(56, 96), count=(1, 2))
    data = read_mask_folder(folder)
    assert all((data.mask(sample) == mask_of(scene)).all() for sample, scene in zip(data.train, scenes))
    with pytest.raises(InputError, match="holds something other than the digit scenes"):
        write_mask_scenes(folder, train=20, test=1)


def test_datasets_check_counts_all_that_is_wrong_with_masks(tmp_path):
    """One of each defect: a line for each kind, with how many and where; and the first as what segment says."""
    names = ("alone", "good", "large", "none", "palette", "rgb", "small", "void")
    for name in names:
        save(tmp_path / "train" / f"{name}.png")
        save(tmp_path / "val" / f"{name}.png")
        save(tmp_path / "val_masks" / f"{name}.png", GREY, "L")
    for name, values, mode in (
        *(("good", GREY, "L"), ("palette", GREY, "P"), ("rgb", GREY, "RGB"), ("void", np.full((4, 6), 255), "L")),
        *(("large", GREY + 7, "L"), ("small", GREY[:3], "L"), ("none", GREY, "L"), ("odd", GREY, "L")),
    ):
        save(tmp_path / "train_masks" / f"{name}.png", values, mode)
    (tmp_path / "train_masks" / "large.png").rename(tmp_path / "train_masks" / "good2.png")
    (tmp_path / "train" / "large.png").rename(tmp_path / "train" / "good2.png")
    (tmp_path / "train_masks" / "none.png").unlink()
    (tmp_path / "names.txt").write_text("sky\nsea\nland\nfire\n")
    lines, refusal = check("mask-folder", tmp_path, classes=tmp_path / "names.txt")
    assert lines[:6] == [
        "refused: train: 1 masks without an image: train_masks/odd.png",
        "refused: train: 2 images without a mask: train_masks/alone.png, train_masks/none.png",
        "refused: train: 1 masks with a value that is no class: train_masks/good2.png",
        "refused: train: 1 masks that are not one channel of class numbers (RGB, JPEG or damaged): train_masks/rgb.png",
        "refused: train: 1 masks of another size than their image: train_masks/small.png",
        "note: train: 1 masks without a labelled pixel: train_masks/void.png",
    ]
    assert lines[6:8] == ["note: train: 1 classes without a pixel: fire", "note: val: 1 classes without a pixel: fire"]
    assert lines[8:10] == [
        "mask-folder train: 6 images, 66 labelled pixels",
        "mask-folder val: 8 images, 192 labelled pixels",
    ]
    assert lines[11].split() == ["sky", "22", "64"] and refusal.endswith("put it there, or remove the mask")
    with pytest.raises(InputError, match="ade20k has its own splits, classes and ignored values"):
        check("ade20k", tmp_path, ("train", None))


def test_datasets_check_of_whole_and_of_useless_masks(tmp_path):
    lines, refusal = check("mask-folder", folder(tmp_path / "whole"))
    assert refusal is None and lines[0] == "mask-folder train: 2 images, 48 labelled pixels"
    for split in ("train", "val"):
        for name in ("a", "b"):
            save(tmp_path / "void" / split / f"{name}.png")
            save(
                tmp_path / "void" / f"{split}_masks" / f"{name}.png", GREY if split == "train" else GREY * 0 + 255, "L"
            )
    lines, refusal = check("mask-folder", tmp_path / "void")
    assert refusal == "no mask of val has a labelled pixel"
    lines, refusal = check("mask-folder", tmp_path / "whole" / "train")
    assert len(lines) == 1 and lines[0].startswith("refused: ") and "has no split" in refusal


def test_scenes_that_another_process_has_drawn_meanwhile_are_taken(tmp_path):
    def slow(place):
        write_mask_scenes(tmp_path / "scenes", train=1, test=1)
        (place / "never").write_text("kept")

    wanted = {"scenes": "digit-masks@2", "seed": 0, "train": 1, "test": 1, "side": [20, 40], "count": [2, 6]}
    assert written_once(tmp_path / "scenes", wanted, slow) == tmp_path / "scenes"
    assert not (tmp_path / "scenes/never").exists() and (tmp_path / "scenes/train/0000.png").is_file()
    with pytest.raises(RunFailed, match="cannot write"):
        written_once(
            tmp_path / "other", wanted | {"seed": 1}, lambda place: write_mask_scenes(tmp_path / "other", 0, 1, 1)
        )
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
