"""Images of any number of channels: read, described by a bands.yaml, measured, and refused where they do not fit."""

import io
import struct
import zlib
from pathlib import Path

import band_images
import numpy as np
import pytest
import tifffile
import torch
from band_images import draw_set, pixels, save
from PIL import Image

from moco_eval.data import band_transforms, catalogue
from moco_eval.data.augment.pixel_ops import blur, box_reach
from moco_eval.data.bands import bands_of, decode
from moco_eval.data.loader import Normalise, clean_transform, crop_transform
from moco_eval.errors import InputError
from moco_eval.preprocessing import Preprocessing
from pretraining.views import RECIPES


def tiff(image: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    band_images.tiff(file, image, **options)
    return file.getvalue()


def pages(image: np.ndarray, **options) -> bytes:
    """As tifffile stores an array if it is told nothing more."""
    file = io.BytesIO()
    tifffile.imwrite(file, image, **options)
    return file.getvalue()


def npy(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, image)
    return file.getvalue()


def described(folder: Path, text: str) -> Path:
    (folder / "bands.yaml").write_text(text, encoding="utf-8")
    return folder


# Reading


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("bands", [1, 2, 3, 4, 12, 13])
def test_every_layout_of_tiff_holds_the_same_bands(bands, dtype):
    image = (pixels(bands, side=20) / 10).astype(dtype)
    layouts = [
        tiff(image, planar=True),
        tiff(image),
        pages(image, photometric="minisblack"),  # a page a band
        tiff(image, tile=(16, 16), compression="zlib"),
        tiff(image, planar=True, bigtiff=True, byteorder=">"),
    ]
    layouts += [] if dtype == np.float32 else [tiff(image, compression="zlib", predictor=2)]
    for data in layouts:
        read = decode(data, "a.tif")
        assert read.dtype == dtype and (read == image).all()


def test_npy_of_either_order_by_the_count_of_bands():
    image = pixels(13, side=10).astype(np.float32)  # fewer pixels than bands: the count tells
    for array in (image, image.transpose(1, 2, 0), np.asfortranarray(image)):
        assert (decode(npy(array), "a.npy", 13) == image).all()
    wide = pixels(4, side=10).astype(np.int16)
    for array in (wide, wide.transpose(1, 2, 0)):  # without a count, the shorter end
        assert (decode(npy(array), "a.npy") == wide).all()
    assert (decode(npy(wide[0]), "a.npy") == wide[:1]).all()
    with pytest.raises(InputError, match=r"a.npy of shape \(10, 10, 10\): its first and last sides are equal"):
        decode(npy(np.zeros((10, 10, 10))), "a.npy", 10)


def test_images_of_other_formats_are_read_as_stored():
    image = pixels(3, side=9).astype(np.uint16)
    for mode, array in (("L", image[0].astype(np.uint8)), ("RGB", image.astype(np.uint8)), ("I;16", image[0])):
        file = io.BytesIO()
        Image.fromarray(array.transpose(1, 2, 0) if array.ndim == 3 else array).save(file, "PNG")
        assert (decode(file.getvalue(), mode) == (array if array.ndim == 3 else array[None])).all()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (npy(np.array([[None]])), "type object"),
        (npy(np.zeros((4, 4), complex)), "type complex128"),
        (npy(np.zeros((2, 4, 4, 3))), r"the shape \(2, 4, 4, 3\)"),
        (npy(np.zeros((65, 80, 90), np.uint8)), "65 channels, and 64 are the most"),
        (npy(np.zeros((4, 9, 9)))[:-8], "has 2,584 bytes instead of 2,592"),
        (b"\x93NUMPY\x01\x00\x10\x00nonsense", "not a .npy array"),
        (tiff(np.zeros((4, 9, 9), np.uint8))[:60], "cannot be decoded"),
        (tiff(np.zeros((4, 9, 9), np.complex64)), "type complex64"),
        (pages(np.zeros((2, 9, 9, 3), np.uint8), photometric="rgb"), "2 pages of 3 channels"),
        (
            tiff(np.zeros((4, 9, 9), np.uint8), compression="lzma"),
            "compressed by LZMA; uncompressed and Deflate",
        ),
        (b"<html>", "a web page in place of the image"),
        (b"", "empty"),
    ],
)
def test_what_is_no_image_of_bands_is_refused_in_one_line(data, words):
    with pytest.raises(InputError, match=words) as error:
        decode(data, "a.tif")
    assert "\n" not in str(error.value) and str(error.value).startswith("a.tif")


def test_sizes_are_looked_at_before_memory_is_taken():
    header = npy(np.zeros((1, 1, 1)))
    shape = b"'shape': (8, 99999, 99999), }"
    start = header.index(b"'shape'")
    large = header[:start] + shape + header[start + len(shape) :]
    with pytest.raises(InputError, match=r"has 79,998,400,008 values in all channels, and 268,435,456 are the most"):
        decode(large, "a.npy")
    small = bytearray(tiff(np.zeros((1, 8, 8), np.uint8)))
    for tag in (256, 257):  # width and height
        with tifffile.TiffFile(io.BytesIO(small)) as file:
            place = file.pages[0].tags[tag].offset + 8
        small[place : place + 4] = struct.pack("<I", 60_000)
    with pytest.raises(InputError, match="has 3,600,000,000 values in all channels"):
        decode(bytes(small), "a.tif")


def test_a_packed_part_that_is_larger_than_it_says_is_refused():
    data = tiff(np.zeros((5, 64, 64), np.uint8), compression="zlib", rowsperstrip=64)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        start, count = page.dataoffsets[0], page.databytecounts[0]
        place = page.tags["StripByteCounts"].valueoffset
        offsets = page.tags["StripOffsets"].valueoffset
    bomb = zlib.compress(bytes(64 * 64 * 5 * 500))
    changed = bytearray(data + bomb)
    changed[offsets : offsets + 4] = struct.pack("<I", len(data))
    changed[place : place + 4] = struct.pack("<I", len(bomb))
    assert start and count < len(bomb)
    with pytest.raises(InputError, match="a packed part of more than the 20,480 bytes it stands for"):
        decode(bytes(changed), "a.tif")


# bands.yaml


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mean: [1, 2, 3, 4]\nstd: [1, 2, 3]", "4 in mean, 3 in std"),
        ("mean: [1, 2, oops, 4]\nstd: [1, 2, 3, 4]", "mean of band 3 is 'oops'"),
        ("mean: [1, 2, .nan, 4]\nstd: [1, 2, 3, 4]", "mean of band 3 is nan"),
        ("mean: [1, 2, true, 4]\nstd: [1, 2, 3, 4]", "mean of band 3 is True"),
        ("mean: [1, 2, 3, 4]\nstd: [1, 0, 3, 4]", "std of band 2 is 0"),
        ("mean: [1, 2, 3, 4]\nstd: [1, -5, 3, 4]\nnames: [R, G, B, N]", r"std of band 2 \(G\) is -5"),
        ("mean: [1, 2, 3, 4]", "mean without std"),
        ("mean: 5\nstd: 4", "mean is 5; it must be a list"),
        ("means: [1, 2, 3, 4]", "unknown key 'means' in .* Did you mean 'mean'?"),
        ("mean: [1, 2, 3]\nstd: [1, 2, 3]", "3 means for the 4 channels of .*0.tif"),
        ("names: [A, B]", "2 names for the 4 channels"),
        ("names: [A, A]", "'A' is given to several"),
        ("bands: [0, 1]", "bands has 0; bands are counted from 1"),
        ("bands: [5]", "bands has 5, but .*0.tif has 4 channels"),
        ("bands: [1, 1]", "bands has 1 more than once"),
        ("bands: [2, 1]", "no mean and std of the 4 channels .* datasets check imagefolder --data .* --write"),
        ("- 4", "must hold keys and values"),
        ("", "no mean and std"),
    ],
)
def test_a_bands_yaml_that_makes_no_sense_is_refused(tmp_path, text, words):
    folder = described(draw_set(tmp_path, 4, ".tif", train=2, test=2), text)
    with pytest.raises(InputError, match=words) as error:
        catalogue.open_images("imagefolder", folder, "train")
    assert "\n" not in str(error.value)


FOUR = "mean: [1000, 1000, 1000, 1000]\nstd: [300, 300, 300, 300]\n"


def test_pixels_reach_a_network_as_they_are_stored(tmp_path):
    folder = described(draw_set(tmp_path, 4, ".npy", train=4, test=2, dtype=np.float32), FOUR)
    images = catalogue.open_images("imagefolder", folder, "train")
    stored = pixels(4, seed=0).astype(np.float32)
    assert images.channels == 4 and (images.values(0) == stored).all()
    assert images.image(0).mode == "RGB"  # to look at
    expects = images.bands.preprocessing(24, 24)
    mine = clean_transform(expects)(torch.from_numpy(images.values(0)))
    assert torch.allclose(mine, (torch.from_numpy(stored) - 1000) / 300, atol=1e-6)
    assert torch.equal(Normalise(expects)(torch.from_numpy(stored)[None])[0], mine)


def test_bands_that_are_taken_are_another_set(tmp_path):
    folder = described(draw_set(tmp_path, 4, ".tif", train=2, test=2), FOUR)
    whole = catalogue.open_images("imagefolder", folder, "train")
    three = catalogue.open_images("imagefolder", described(folder, FOUR + "bands: [3, 2, 1]"), "train")
    assert (three.values(1) == whole.values(1)[[2, 1, 0]]).all() and three.channels == 3
    assert three.fingerprint != whole.fingerprint
    assert three.record()["bands"] == {"stored": 4, "taken": [3, 2, 1]}


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (pixels(5).astype(np.uint16), "has 5 channels, and .*bands.yaml describes 4"),
        (pixels(1)[0].astype(np.uint16), "has 1 channel, and .*bands.yaml describes 4"),
        (np.full((4, 6, 6), np.nan, np.float32), r"144 values that are not finite \(first: nan in band 1, row 0"),
        (np.full((4, 6, 6), 1e300), "not finite|first: 1e"),
    ],
)
def test_an_image_that_does_not_fit_its_set_is_named(tmp_path, image, words):
    folder = described(draw_set(tmp_path, 4, ".npy", train=2, test=2, dtype=np.float32), FOUR)
    np.save(folder / "train" / "wood" / "odd.npy", image)
    images = catalogue.open_images("imagefolder", folder, "train")
    with pytest.raises(InputError, match=f"wood/odd.npy {words}|wood/odd.npy has {words}"):
        images.values(2)


def test_without_a_bands_yaml_the_refusal_says_the_channels_and_the_way_out(tmp_path):
    images = catalogue.open_images("imagefolder", draw_set(tmp_path / "tif", 13, ".tif", 2, 2), "train")
    with pytest.raises(InputError, match=r"0.tif has 13 channels of uint16, and without a bands.yaml .* --write"):
        images.image(0)
    with pytest.raises(InputError, match=r"its 1 .npy files are images where a bands.yaml describes them: .* --write"):
        catalogue.open_images("imagefolder", draw_set(tmp_path / "npy", 13, ".npy", 2, 2), "train")


def test_grey_and_rgb_files_stay_rgb_without_a_bands_yaml(tmp_path):
    for number, mode in enumerate(("L", "RGB")):
        Image.new(mode, (9, 9), 70 if mode == "L" else (70, 80, 90)).save(tmp_path / f"{number}.png")
    images = catalogue.open_images("flat", tmp_path, "train")
    assert images.bands is None and images.channels == 3 and images.image(0).getpixel((0, 0)) == (70, 70, 70)
    described(tmp_path, "mean: [70]\nstd: [5]")
    one = catalogue.open_images("flat", tmp_path, "train")
    assert one.values(0).shape == (1, 9, 9)
    with pytest.raises(InputError, match=r"1.png has 3 channels, and .*describes 1"):
        one.values(1)


# Measuring


@pytest.mark.parametrize(("bands", "suffix", "dtype"), [(4, ".npy", np.float32), (13, ".tif", np.uint16)])
def test_check_measures_mean_and_std_over_all_pixels(tmp_path, bands, suffix, dtype):
    folder = draw_set(tmp_path, bands, suffix, train=6, test=2, dtype=dtype)
    lines = catalogue.check("imagefolder", folder, writes=True)
    every = np.stack([pixels(bands, seed=number, bright=900 * (number % 2)).astype(dtype) for number in range(6)])
    mean, std = every.mean((0, 2, 3), dtype=np.float64), every.astype(np.float64).std((0, 2, 3))
    written = bands_of(folder)
    assert np.allclose(written.mean, mean, rtol=1e-12) and np.allclose(written.std, std, rtol=1e-12)
    assert f"band {bands}: mean {mean[-1]:.6g}, std {std[-1]:.6g}" in lines
    again = catalogue.check("imagefolder", folder)
    assert f"band 1: mean {mean[0]:.6g}, std {std[0]:.6g}" in again and not any("doubtful" in line for line in again)
    with pytest.raises(InputError, match="has mean and std already"):
        catalogue.check("imagefolder", folder, writes=True)


def test_check_keeps_what_a_bands_yaml_says_and_doubts_other_numbers(tmp_path):
    folder = described(draw_set(tmp_path, 4, ".tif", 4, 2), "names: [B, G, R, N]\nbands: [3, 2, 1]")
    assert any("no mean and std yet; --write" in line for line in catalogue.check("imagefolder", folder))
    lines = catalogue.check("imagefolder", folder, writes=True)
    assert any(line.startswith("band 4 (N): mean") and line.endswith("(not used)") for line in lines)
    written = bands_of(folder)
    assert written.names == ("B", "G", "R", "N") and written.taken == (2, 1, 0) and len(written.mean) == 4
    described(folder, FOUR)
    assert any(
        "doubtful: " in line and "says mean 1000 of band 2" in line for line in catalogue.check("imagefolder", folder)
    )


def test_a_band_of_one_value_is_left_out_by_the_others(tmp_path):
    for number in range(3):
        image = pixels(3, seed=number).astype(np.uint16)
        image[1] = 7
        save(tmp_path / f"{number}.tif", image)
    with pytest.raises(InputError, match=r"std of band 2 is 0; .* leave number 2 out by a list `bands` of the others"):
        catalogue.check("flat", tmp_path, writes=True)
    path = tmp_path / "bands.yaml"
    path.write_text(path.read_text() + "bands: [1, 3]\n")
    assert catalogue.open_images("flat", tmp_path, "train").channels == 2


def test_write_is_for_sets_of_bands(tmp_path):
    with pytest.raises(InputError, match="--write is for images of any number of channels"):
        catalogue.check("digits", None, writes=True)


# Transforms


def test_transforms_of_bands_are_those_of_rgb_on_three_of_them():
    rgb = Preprocessing(size=16, resize=20)
    bands = Preprocessing(16, 20, tuple(255 * m for m in rgb.mean), tuple(255 * s for s in rgb.std), "bands", 0)
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 40, 30)).astype(np.float32))
    picture = Image.fromarray(image.numpy().astype(np.uint8).transpose(1, 2, 0))
    level = 1 / (255 * min(rgb.std))  # of 256; PIL rounds between its passes
    assert torch.allclose(clean_transform(bands)(image), clean_transform(rgb)(picture), atol=1.5 * level)
    torch.manual_seed(0)
    of_bands = crop_transform(bands)(image)
    torch.manual_seed(0)
    assert torch.allclose(of_bands, crop_transform(rgb)(picture), atol=1.5 * level)


def test_an_oblong_image_of_bands_takes_no_more_memory_than_its_square():
    oblong = band_transforms.ResizedCentre(256, 224)(torch.zeros(13, 1, 60_000))
    assert oblong.shape == (13, 224, 224)


def test_views_of_bands_keep_crops_flips_and_blur_and_name_what_is_left_out():
    recipe = band_transforms.without_colour(RECIPES["moco_v2"])
    assert [type(step).__name__ for step in recipe.steps] == ["Crop", "Blur", "Flip"]
    assert band_transforms.left_out(RECIPES["moco_v2"]) == "colour jitter, grey"


def test_blur_rounds_no_bands():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 20, 20)).astype(np.uint8))
    sigma, reach = torch.tensor([0.5, 1.7]), box_reach(1.7)
    exact = blur(image.float(), sigma, reach)
    assert (exact - blur(image, sigma, reach)).abs().max() < 3
    scaled = blur(image.float() / 1000 - 5, sigma, reach)
    assert torch.allclose(scaled, exact / 1000 - 5, atol=1e-5)
