"""Image processors' files and timm's settings: read, and pixel for pixel what these libraries make of a photo."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torch import Tensor

from moco_eval.data.loader import clean_transform
from moco_eval.encoders.image_processor import ForeignProcessor, pixels_of
from moco_eval.encoders.settings_files import of_timm
from moco_eval.preprocessing import Preprocessing

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def read(values: dict, transformer: bool = True) -> Preprocessing:
    pixels = pixels_of(values, transformer)
    assert pixels is not None
    return Preprocessing.from_dict(pixels)


def drawn(width: int = 320, height: int = 260) -> Image.Image:
    """Smooth colours with an edge, and fine noise."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (9, 11, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    pixels[:, width // 3 :] = pixels[:, width // 3 :] * 0.6 + random.integers(0, 80, (height, width - width // 3, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(params=["drawn", "real"])
def photos(request) -> list[Image.Image]:
    """A picture drawn here, or photographs of the shared data where they are there."""
    if request.param == "drawn":
        return [drawn(), drawn(231, 300)]
    folder: Path = request.getfixturevalue("shared_data") / "imagenet-sample-images"
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.JPEG"))[:4]]


def levels(ours: Tensor, theirs: Tensor, pixels: Preprocessing) -> float:
    """The largest difference in levels of 8 bits."""
    std = torch.tensor(pixels.rgb()[1]).view(3, 1, 1)
    return float((ours - theirs).abs().mul(std).max() * 255)


# What the files say


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (HALF, Preprocessing(224, 224, (0.5,) * 3, (0.5,) * 3, squash=True)),
        (HALF | {"resample": 3, "size": 384}, (384, 384, "bicubic", True)),
        (
            HALF | {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": 224},
            (224, 256, "bilinear", False),
        ),
        ({"image_processor_type": "CLIPImageProcessor"}, (224, 224, "bicubic", False)),
        (
            {"feature_extractor_type": "CLIPFeatureExtractor", "size": 336, "crop_size": 336},
            (336, 336, "bicubic", False),
        ),
        (
            {"image_processor_type": "BitImageProcessorFast", "size": {"shortest_edge": 256}},
            (224, 256, "bicubic", False),
        ),
        ({"image_processor_type": "BeitImageProcessor"}, (224, 224, "bicubic", True)),
        (
            {"image_processor_type": "BeitImageProcessor", "size": 256, "do_center_crop": True},
            (224, 256, "bicubic", True),
        ),
        ({"image_processor_type": "DeiTImageProcessor"}, (224, 256, "bicubic", True)),
        ({"image_processor_type": "DINOv3ViTImageProcessorFast"}, (224, 224, "bilinear", True)),
        ({"image_processor_type": "SiglipImageProcessor"}, (224, 224, "bicubic", True)),
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}},
            (224, 256, "bicubic", False),
        ),
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}},
            (384, 384, "bicubic", True),
        ),
        (
            {"image_processor": HALF | {"image_processor_type": "ViTImageProcessor", "size": 32}},
            (32, 32, "bilinear", True),
        ),
    ],
)
def test_every_kind_of_processor(values, expected):
    pixels = read(values)
    if not isinstance(expected, Preprocessing):
        pixels, expected = (pixels.size, pixels.resize, pixels.interpolation, pixels.squash), expected
    assert pixels == expected


def test_statistics_follow_the_scale():
    whole = read(HALF | {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3})
    assert whole.range == 255 and whole.rgb() == ((0.5,) * 3, (0.5,) * 3)
    doubled = read({"image_mean": [1.0] * 3, "image_std": [1.0] * 3, "rescale_factor": 1 / 127.5})
    assert doubled.mean == pytest.approx((0.5,) * 3) and doubled.std == pytest.approx((0.5,) * 3)
    assert read(HALF | {"rescale_factor": 0.00392156862745098}).mean == (0.5,) * 3
    plain = read(HALF | {"do_normalize": False})
    assert (plain.mean, plain.std) == ((0.0,) * 3, (1.0,) * 3)
    assert read(HALF | {"image_mean": 0.5, "image_std": 0.25}).std == (0.25,) * 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"do_resize": False}, "do_resize is False"),
        ({"do_pad": True}, "do_pad is True"),
        ({"resample": 1}, r"resample is 1 \(lanczos\); 2 \(bilinear\) and 3 \(bicubic\) are built here"),
        ({"resample": 9}, "resample is 9"),
        ({"size": {"height": 224, "width": 336}}, "is not square"),
        ({"size": {"longest_edge": 224}}, "not a number"),
        ({"size": True}, "not a number"),
    ],
)
def test_what_a_processor_does_that_is_not_built_here(change, words):
    with pytest.raises(ValueError, match=words):
        pixels_of(HALF | change, True)


def test_processors_of_other_kinds_of_networks():
    for kind in (
        "WhisperFeatureExtractor",
        "Mask2FormerImageProcessor",
        "SegformerImageProcessor",
        "Siglip2ImageProcessor",
    ):
        with pytest.raises(ForeignProcessor, match=kind):
            pixels_of({"image_processor_type": kind}, True)
    with pytest.raises(ForeignProcessor):
        pixels_of({"image_processor_type": "CLIPImageProcessor"}, False)
    assert pixels_of({"processor_class": "CLIPProcessor"}, True) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"crop_pct": 0.9, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3},
        {"crop_pct": 0.875, "interpolation": "bilinear"},
        {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bicubic"},
        {"crop_pct": 0.9, "crop_mode": "squash", "input_size": [3, 96, 96]},
        {},
    ],
)
def test_timms_own_transform_to_the_bit(settings, photos):
    """timm.data.create_transform of the same settings on the same photos."""
    usual = {"input_size": [3, 224, 224], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    settings = usual | settings
    pixels = Preprocessing.from_dict(of_timm(settings))
    theirs = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=settings))
    for photo in photos:
        assert torch.equal(clean_transform(pixels)(photo), theirs(photo))


@pytest.mark.parametrize("change", [{"crop_mode": "border"}, {"interpolation": "lanczos"}, {"interpolation": "random"}])
def test_timms_settings_that_are_not_built_here(change):
    settings = {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3} | change
    with pytest.raises(ValueError, match=f"its {next(iter(change))} is"):
        of_timm(settings)


# Bilinear and bicubic, with and without antialiasing


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_without_antialiasing_it_is_torchs_interpolation(interpolation):
    pixels = Preprocessing(64, 72, (0.0,) * 3, (1.0,) * 3, interpolation=interpolation, antialias=False)
    image = torch.from_numpy(np.array(drawn())).permute(2, 0, 1)[None].float()
    size = (72, int(72 * 320 / 260))
    theirs = torch.nn.functional.interpolate(image, size, mode=interpolation, align_corners=False)[0]
    top, left = (round((side - 64) / 2) for side in size)
    cut = theirs.clamp(0, 255).round()[:, top : top + 64, left : left + 64] / 255
    assert torch.allclose(clean_transform(pixels)(drawn()), cut, atol=1e-6)


def test_interpolations_are_four_pictures():
    made = [
        clean_transform(Preprocessing(64, 72, interpolation=name, antialias=antialias))(drawn())
        for name in ("bilinear", "bicubic")
        for antialias in (True, False)
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(made) for b in made[:i])


def test_a_very_oblong_bicubic_image_is_cut_as_torchvision_does(monkeypatch):
    from moco_eval.data import loader

    image = drawn(40, 400)
    whole = np.asarray(loader.ResizedCentre(96, 80, "bicubic")(image)).astype(int)
    monkeypatch.setattr(loader, "LARGEST", 1000)
    assert abs(np.asarray(loader.ResizedCentre(96, 80, "bicubic")(image)) - whole).max() <= 2
    squashed = loader.ResizedCentre(96, 80, "bicubic", squash=True)(image)
    assert squashed.size == (80, 80)


@pytest.mark.peers
@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("ViTImageProcessor", {}),
        ("ViTImageProcessor", {"resample": 3, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}),
        ("ViTImageProcessor", {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}),
        ("ViTImageProcessor", {"do_normalize": False}),
        ("ViTImageProcessor", {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [64.0] * 3}),
        ("DeiTImageProcessor", {}),
        ("BeitImageProcessor", {}),
        ("BeitImageProcessor", {"size": {"height": 256, "width": 256}, "do_center_crop": True}),
        ("CLIPImageProcessor", {}),
        ("BitImageProcessor", {"size": {"shortest_edge": 256}}),
        ("SiglipImageProcessor", {}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}),
        ("ConvNextImageProcessor", {}),
        ("DINOv3ViTImageProcessor", {}),
    ],
)
def test_transformers_processors_on_the_same_photos(kind, given, tmp_path, photos):
    """To a hundredth of a level of 8 bits where they resize with PIL; their tensors' resize rounds in between."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[peers]')")
    processor = getattr(transformers, kind)(**given)
    processor.save_pretrained(tmp_path)
    pixels = read(json.loads((tmp_path / "preprocessor_config.json").read_text()))
    with_pil = getattr(transformers, f"{kind}Pil", None)
    for photo in photos:
        if not pixels.squash and (pixels.resize * max(photo.size) // min(photo.size) - pixels.size) % 2:
            continue  # its centre lies half a pixel from the middle: transformers rounds down, torchvision to even
        ours = clean_transform(pixels)(photo)
        theirs = processor(images=photo, return_tensors="pt")["pixel_values"][0]
        scale = max(pixels.std) * 255 / pixels.range
        assert ours.shape == theirs.shape and (ours - theirs).abs().mean() * scale < 1
        if with_pil:
            theirs = torch.as_tensor(with_pil(**given)(images=photo, return_tensors="pt")["pixel_values"][0])
            assert levels(ours, theirs, pixels) < 0.01
        else:
            assert levels(ours, theirs, pixels) < 1.01
