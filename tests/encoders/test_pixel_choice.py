"""Pixels: each method's own, those that the user chooses, and what a choice makes of a record."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import ARCH, FILES, VIT, body, error, written
from commands import error_line, in_process

import moco_eval as me
from moco_eval.encoders.load import load
from moco_eval.encoders.pixel_choice import as_option, parsed
from moco_eval.encoders.settings_files import METHODS
from moco_eval.errors import InputError
from moco_eval.preprocessing import Preprocessing

IMAGENET = "mean=0.485,0.456,0.406,std=0.229,0.224,0.225"


def dino(folder: Path) -> str:
    return written(folder, FILES["dino ViT"]().values)


# What the option says


def test_the_option_is_repeated_or_between_commas():
    expected = {"interpolation": "bicubic", "mean": (0.5,), "std": (0.1, 0.2, 0.3), "size": 96, "squash": True}
    assert parsed(["interpolation=bicubic,mean=0.5,std=0.1,0.2,0.3", "size=96, squash=true"]) == expected
    pixels = Preprocessing(96, 96, (0.4, 0.5, 0.6), (0.5,) * 3, squash=True)
    assert as_option(pixels, ["mean", "std", "squash"]) == "mean=0.4,0.5,0.6,std=0.5,squash=true"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("interpolaton=bicubic", "--pixels interpolaton: there is no such key. Did you mean 'interpolation'?"),
        ("bicubic", "--pixels bicubic: write it as KEY=VALUE"),
        ("mean=abc", "--pixels mean=abc: give numbers between commas"),
        ("size=1.5", "--pixels size=1.5: give a whole number"),
        ("antialias=perhaps", "--pixels antialias=perhaps: give true or false"),
        ("interpolation=lanczos", "--pixels interpolation=lanczos: preprocessing makes no sense"),
        ("mean=0.1,0.2", "--pixels mean=0.1,0.2: preprocessing makes no sense"),
        ("std=0", "--pixels std=0: preprocessing makes no sense"),
        ("size=64", "--pixels says images of 64 pixels, but the network takes 32"),
    ],
)
def test_senseless_pixels_are_one_line(given, words, tmp_path, capfd, monkeypatch):
    assert words in error_line(capfd, monkeypatch, "inspect", dino(tmp_path), "--pixels", given)


def test_senseless_pixels_in_python(tmp_path):
    for pixels, words in [
        ({"colour": 1}, "^pixels colour: there is no such key"),
        ({"mean": "0.5"}, "^pixels mean='0.5': give numbers"),
        ({"size": "32"}, "^pixels size=32"),
        ({"antialias": 1}, "^pixels antialias=1"),
    ]:
        with pytest.raises(ValueError, match=words):
            me.load(dino(tmp_path), pixels=pixels)


def test_an_encoder_without_pixels_takes_them_whole():
    with pytest.raises(InputError, match=r"random:resnet18_quarter does not say its pixels.*mean, std missing"):
        load(f"random:{ARCH}", pixels={"size": 32})
    encoder = load(f"random:{ARCH}", pixels={"size": 32, "mean": 0.5, "std": (0.5,)})
    assert encoder.preprocessing == Preprocessing(32, 32, (0.5,) * 3, (0.5,) * 3) and not encoder.deviations()


# Two records


def test_a_vit_judged_bilinear_and_bicubic_leaves_two_records(tmp_path, few_digits):
    path = dino(tmp_path)
    own, other = me.load(path), me.load(path, pixels={"interpolation": "bilinear"})
    results = [me.judge(encoder, *few_digits, "knn/digits", k=5, device="cpu") for encoder in (own, other)]
    bicubic, bilinear = (result.record for result in results)
    deviation = "bilinear resize instead of facebookresearch/dino's bicubic"
    assert deviation in bilinear["deviations"] and deviation not in bicubic["deviations"]
    assert len(bilinear["deviations"]) == len(bicubic["deviations"]) + 1
    assert bilinear["preprocessing"]["interpolation"] == "bilinear" and bilinear["encoder"]["pixels"]
    assert bicubic["preprocessing"]["interpolation"] == "bicubic" and "pixels" not in bicubic["encoder"]
    features = [me.features(encoder, few_digits[1], device="cpu") for encoder in (own, other)]
    assert (features[0][0] != features[1][0]).any() and features[0][1] != features[1][1]


@pytest.mark.slow
def test_the_command_makes_two_runs_of_them(in_tmp, capfd, monkeypatch):
    command = ("knn", dino(in_tmp), "--dataset", "digits", "--set", "k=5", "--device", "cpu")
    in_process(capfd, monkeypatch, *command)
    in_process(capfd, monkeypatch, *command, "--pixels", "interpolation=bilinear")
    records = [json.loads(path.read_text()) for path in Path("runs").glob("knn-*/result.json")]
    assert sorted(record["preprocessing"]["interpolation"] for record in records) == ["bicubic", "bilinear"]
    assert len([words for record in records for words in record["deviations"] if "bilinear resize" in words]) == 1


def test_every_difference_has_its_words(tmp_path):
    chosen = {"mean": 0.5, "std": 0.25, "antialias": False, "squash": True, "resize": 32, "channels": "BGR"}
    assert load(dino(tmp_path), pixels=chosen).deviations() == [
        "images of 32 pixels (resized to 32) instead of facebookresearch/dino's images of 32 pixels (resized to 36)",
        "resize without antialiasing instead of facebookresearch/dino's antialiased resize",
        "images squashed to a square instead of facebookresearch/dino's images in their proportions",
        "pixels of mean 0.5 and std 0.25 instead of facebookresearch/dino's pixels of mean 0.485,0.456,0.406 and std "
        "0.229,0.224,0.225",
        "BGR of 0..1 instead of facebookresearch/dino's RGB of 0..1",
    ]
    same = load(dino(tmp_path), pixels={"interpolation": "bicubic"})
    assert not same.deviations() and same.run_name.endswith("-interpolation_bicubic")


# What no byte tells


def test_a_plain_vits_pixels_are_asked_until_they_are_settled(tmp_path):
    path = written(tmp_path, body(0, VIT))
    asked = load(path).warnings[-1]
    assert "do not tell its pixels" in asked
    assert asked.endswith(f"This settles it: --pixels interpolation=bicubic,{IMAGENET}")
    part = load(path, pixels={"interpolation": "bilinear"})
    assert part.warnings[-1].endswith(f"This settles it: --pixels {IMAGENET}") and not part.deviations()
    option = asked.rpartition("--pixels ")[2]
    settled = load(path, pixels=parsed([option]))
    assert not any("--pixels" in words for words in settled.warnings) and not settled.deviations()
    assert settled.preprocessing == load(path).preprocessing
    squashed = load(path, pixels=parsed(["interpolation=bilinear,mean=0.5,std=0.5,squash=true"]))
    assert squashed.deviations() == [
        "images squashed to a square instead of timm ViT's images in their proportions"  # nobody leaves that open
    ]


def test_a_vit_under_ones_own_prefix_is_asked_too(tmp_path):
    encoder = load(written(tmp_path, {f"mine.{name}": tensor for name, tensor in body(0, VIT).items()}))
    assert encoder.preprocessing.interpolation == "bicubic" and "do not tell its pixels" in encoder.warnings[-1]


def test_torchvisions_vits_may_be_swags(tmp_path):
    path = written(tmp_path, FILES["torchvision ViT"]().values)
    assert load(path).warnings[-1].endswith("This settles it: --pixels interpolation=bilinear")
    assert len(load(path, pixels={"interpolation": "bicubic"}).warnings) == 1  # its heads


@pytest.mark.parametrize("config", [None, {"model_type": "vit", "num_attention_heads": 3}])
def test_hugging_faces_vits_without_an_image_processor_say_that_halves_were_taken(config, tmp_path):
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    path = written(tmp_path, FILES["Hugging Face ViT"]().values)
    asked = load(path).warnings[-1]
    assert "no preprocessor_config.json says its pixels; mean and std 0.5 were taken" in asked
    assert asked.endswith(f"want ImageNet's: --pixels {IMAGENET}")
    settled = load(path, pixels=parsed([IMAGENET]))
    assert settled.preprocessing.mean == (0.485, 0.456, 0.406) and not settled.deviations()
    assert len(settled.warnings) == (config is None)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.4] * 3, "image_std": [0.2] * 3, "size": 32})
    )
    assert not any("were taken" in words for words in load(path).warnings if "pixels" in words and config)


@pytest.mark.parametrize(
    ("kind", "interpolation", "mean"),
    [("vit_mae", "bicubic", 0.485), ("deit", "bicubic", 0.485), ("vit_msn", "bilinear", 0.485)],
)
def test_a_model_type_that_names_its_method_has_its_pixels(kind, interpolation, mean, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "num_attention_heads": 3}))
    encoder = load(written(tmp_path, FILES["Hugging Face ViT"]().values))
    pixels = encoder.preprocessing
    assert (pixels.size, pixels.resize, pixels.interpolation, pixels.mean[0]) == (32, 36, interpolation, mean)
    (said,) = encoder.warnings
    assert f"{METHODS[kind][0]}'s own were taken for model_type '{kind}'" in said and said.count("--pixels") == 1


def test_torchvisions_resnets_stay_bilinear_and_unasked(tmp_path):
    encoder = load(written(tmp_path, body(0)))
    assert encoder.preprocessing == Preprocessing() and not encoder.warnings


# Where encoders go


def test_a_copy_carries_what_was_settled_and_no_deviation(tmp_path, capfd, monkeypatch):
    plain = written(tmp_path, body(0, VIT))
    option = f"interpolation=bilinear,{IMAGENET}"
    in_process(capfd, monkeypatch, "convert", plain, tmp_path / "copy.pth", "--to", "timm", "--pixels", option)
    copy = load(str(tmp_path / "copy.pth"))
    assert copy.preprocessing.interpolation == "bilinear" and not any("pixels" in words for words in copy.warnings)
    (tmp_path / "dino").mkdir()
    command = ("convert", dino(tmp_path / "dino"), tmp_path / "no.pth", "--to", "timm")
    line = error_line(capfd, monkeypatch, *command, "--pixels", "interpolation=bilinear")
    assert "they are bilinear resize instead of facebookresearch/dino's bicubic" in line
    assert not (tmp_path / "no.pth").exists()


def test_a_detector_resizes_as_its_recipe_says(tmp_path, capfd, monkeypatch):
    path = written(tmp_path, body(0))
    command = ("detect", path, "--dataset", "digits", "--dry-run", "--pixels")
    line = error_line(capfd, monkeypatch, *command, "interpolation=bicubic")
    assert "--pixels interpolation: a detector resizes whole images, bilinearly" in line
    in_process(capfd, monkeypatch, *command, "mean=0.5,std=0.5")


def test_inspect_prints_the_resize(tmp_path, capfd, monkeypatch):
    path = dino(tmp_path)
    assert "bicubic resize to 36, crop 32" in in_process(capfd, monkeypatch, "inspect", path)[0]
    chosen = ("--pixels", "squash=true,antialias=false,interpolation=bilinear")
    out, _ = in_process(capfd, monkeypatch, "inspect", path, *chosen)
    assert "bilinear resize to 36x36 without antialiasing, crop 32" in out


def test_a_run_of_other_pixels_is_another_run(tmp_path):
    path = dino(tmp_path)
    identities = [load(path, pixels=pixels).identity() for pixels in ({}, {"interpolation": "bilinear"}, {"mean": 0.5})]
    assert len({json.dumps(identity) for identity in identities}) == 3
    assert "preprocessing" not in load(written(tmp_path, body(0))).identity()  # bilinear runs go on as they were


def test_a_wrapped_network_states_its_own():
    pixels = me.Preprocessing(size=32, interpolation="bicubic", squash=True)
    encoder = me.wrap(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 4)), pixels)
    assert encoder.preprocessing == pixels and not encoder.deviations()
    with pytest.raises(ValueError, match="preprocessing makes no sense"):
        me.wrap(torch.nn.Flatten(), me.Preprocessing(size=32, interpolation="lanczos"))


def test_an_unknown_key_is_refused_for_any_encoder(tmp_path):
    assert "there is no such key" in error(written(tmp_path, body(0)), pixels={"crop": 3})


@pytest.mark.parametrize(("layout", "interpolation"), [("dino ViT", "bicubic"), ("moco-v3 ViT", "bilinear")])
@pytest.mark.parametrize("to", ["timm", "safetensors"])
def test_a_copy_of_an_earlier_version_has_its_methods_interpolation(layout, interpolation, to, tmp_path, monkeypatch):
    """It says mean, std and sizes alone."""
    from moco_eval.encoders.export.convert import convert

    whole = Preprocessing.to_dict

    def earlier(pixels: Preprocessing) -> dict:
        values = whole(pixels)
        return {key: values[key] for key in ("size", "resize", "mean", "std", "channels", "range")}

    with monkeypatch.context() as patched:
        patched.setattr(Preprocessing, "to_dict", earlier)
        convert(written(tmp_path, FILES[layout]().values), tmp_path / "copy.safetensors", to)
    assert load(str(tmp_path / "copy.safetensors")).preprocessing.interpolation == interpolation


def test_pixels_in_python_are_a_dict(tmp_path):
    with pytest.raises(ValueError, match=r"^pixels is a Preprocessing; give a dict"):
        me.load(written(tmp_path, body(0, VIT)), pixels=me.Preprocessing())
