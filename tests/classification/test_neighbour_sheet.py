"""The picture of nearest neighbours: right and wrong ones are framed, and white lies between."""

import numpy as np
import torch
from PIL import Image, ImageColor

from moco_eval.classification.neighbour_sheet import APART, GAP, LABEL, RIGHT, SIDE, WRONG, draw_neighbours
from moco_eval.data.image_set import ImageSet


def grey(split, labels):
    """Small grey pictures of two classes."""
    pixels = np.full((len(labels), 8, 8, 3), 120, np.uint8)
    return ImageSet("mine", split, ("a cat", "dog"), np.array(labels), "f00d", pixels=pixels)


def test_a_right_neighbour_is_framed_green_and_a_wrong_one_red(tmp_path):
    draw_neighbours(grey("train", [0, 1]), grey("test", [0]), torch.tensor([[0, 1]]), tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (2 + 3 * SIDE + GAP + APART, 2 + SIDE + LABEL + GAP)
    middle, first = 1 + SIDE // 2, 1 + SIDE + APART
    second = first + SIDE + GAP
    assert [sheet.getpixel((x, middle)) for x in (first, second)] == [
        ImageColor.getrgb(colour) for colour in (RIGHT, WRONG)
    ]
    assert sheet.getpixel((first + SIDE // 2, middle)) == (120, 120, 120)
    for x in (1 + SIDE + APART // 2, second - GAP // 2):
        assert sheet.getpixel((x, middle)) == (255, 255, 255)
    words = np.asarray(sheet)[2 + SIDE :]
    assert all((words[:, x : x + SIDE] != 255).any() for x in (1, first, second))  # each has its class below it


def test_a_class_in_common_is_right_where_an_image_shows_several(tmp_path):
    train, test = grey("train", [[1, 1], [0, 1]]), grey("test", [[1, 0]])
    draw_neighbours(train, test, torch.tensor([[0, 1]]), tmp_path / "sheet.png")
    sheet, first = Image.open(tmp_path / "sheet.png"), 1 + SIDE + APART
    edges = [sheet.getpixel((x, 1 + SIDE // 2)) for x in (first, first + SIDE + GAP)]
    assert edges == [ImageColor.getrgb(colour) for colour in (RIGHT, WRONG)]
