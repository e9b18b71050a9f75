"""Images of 4 and 13 bands from the first file to the record: pretraining, then every way of judging the network."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from band_images import draw_set, pixels
from commands import error_line, in_process

import moco_eval as me
from moco_eval.config import load as configs
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.data import catalogue
from moco_eval.errors import InputError
from moco_eval.preprocessing import Preprocessing
from pretraining.plan import plan, shuffle_bytes
from pretraining.views import two_views

SMALL = (
    "views.recipe=moco_v2",
    "views.size=24",
    "batch_size=8",
    "schedule.epochs=10",
    "queue_size=16",
    "bn_groups=2",
    "knn=null",
    "arch=resnet18_quarter",
)
SETTINGS = tuple(part for setting in SMALL for part in ("--set", setting))
FAST = ("--device", "cpu", "--workers", "0")


def described(root: Path, bands: int, suffix: str = ".tif", dtype: type = np.uint16) -> Path:
    """A drawn set with its bands.yaml."""
    draw_set(root, bands, suffix, train=16, test=8, dtype=dtype)
    catalogue.check("imagefolder", root, writes=True)
    return root


def config(*overrides: str) -> PretrainConfig:
    return configs.load("digits", "pretrain", PretrainConfig, [*SMALL, *overrides])


@pytest.mark.parametrize(("bands", "suffix", "dtype"), [(4, ".npy", np.float32), (13, ".tif", np.uint16)])
def test_pretraining_of_20_steps_and_knn_and_linear_from_it(tmp_path, monkeypatch, capfd, bands, suffix, dtype):
    monkeypatch.chdir(tmp_path)
    described(tmp_path / "set", bands, suffix, dtype)
    data = ("--dataset", "imagefolder", "--data", "set")
    _, log = in_process(capfd, monkeypatch, "pretrain", "digits", *data, *SETTINGS, *FAST, "--output", "run")
    left_out = f"images of {bands} bands: views without colour jitter, grey"
    assert log.count(left_out) == 1
    checkpoint = torch.load("run/checkpoints/last.pth", weights_only=True)
    measured = catalogue.open_images("imagefolder", Path("set"), "train").bands
    assert checkpoint["arch"] == f"resnet18_quarter,channels={bands}" and checkpoint["step"] == 20
    assert checkpoint["state_dict"]["module.encoder_q.conv1.weight"].shape[1] == bands
    assert tuple(checkpoint["preprocessing"]["mean"]) == measured.mean
    assert checkpoint["preprocessing"]["channels"] == "bands" and checkpoint["preprocessing"]["range"] == 0
    assert Path("run/views.png").stat().st_size > 1000
    for command in (("knn", "--set", "k=3"), ("linear", "--protocol", "quick", "--set", "crops=0")):
        last = "run/checkpoints/last.pth"
        _, log = in_process(capfd, monkeypatch, *command[:1], last, *command[1:], *data, *FAST, "--output", command[0])
        assert "channels and does not say" not in log
        record = json.loads(Path(command[0], "result.json").read_text())
        assert record["metrics"]["top1"] > 60  # 50 is chance
        assert record["encoder"]["arch"] == f"resnet18_quarter,channels={bands}"
        assert record["dataset"]["bands"]["stored"] == bands
        assert f"encoder: {left_out}" in record["deviations"]


def test_the_same_features_one_by_one_as_from_the_pipeline(tmp_path):
    train = catalogue.open_images("imagefolder", described(tmp_path, 4, ".npy", np.float32), "train")
    encoder = me.load("random:resnet18_quarter,channels=4")
    features, _ = me.features(encoder, train, device="cpu")
    stored = np.stack([train.values(index) for index in range(len(train))])
    mean, std = (np.array(part).reshape(-1, 1, 1) for part in (train.bands.mean, train.bands.std))
    enlarged = torch.nn.functional.interpolate(torch.from_numpy(stored), (256, 256), mode="bilinear", antialias=True)
    views = (enlarged[:, :, 16:240, 16:240] - torch.from_numpy(mean).float()) / torch.from_numpy(std).float()
    with torch.no_grad():
        assert np.allclose(features, encoder.backbone(views).flatten(1).numpy(), atol=1e-4)


@pytest.mark.parametrize("protocol", ["finetune/lightly@1", "linear/moco-lincls@1", "knn/grid@1"])
def test_other_protocols_take_bands(tmp_path, protocol):
    train, test = catalogue.open_splits("imagefolder", described(tmp_path, 4))
    encoder = (
        me.wrap(
            torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten()),
            Preprocessing(24, 24, train.bands.mean, train.bands.std, "bands", 0),
        )
        if protocol.startswith("knn")
        else me.load("random:resnet18_quarter,channels=4")
    )
    epochs = {} if protocol.startswith("knn") else {"schedule.epochs": 1}
    result = me.judge(encoder, train, test, protocol, device="cpu", batch_size=8, workers=0, **epochs)
    assert 0 <= result.metrics["top1"] <= 100


# Where channels differ


def test_both_numbers_and_both_ways_out_where_channels_differ(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    described(tmp_path / "set", 13)
    data = ("--dataset", "imagefolder", "--data", "set")
    line = error_line(capfd, monkeypatch, "knn", "random:resnet18_quarter", *data, *FAST)
    assert "takes images of 3 channels, and those of imagefolder:set have 13" in line
    assert "one trained on 13 channels" in line and "`bands` of [3, 2, 1], say, in set/bands.yaml" in line
    line = error_line(capfd, monkeypatch, "linear", "random:resnet18_quarter,channels=13", "--dataset", "digits", *FAST)
    assert "takes images of 13 channels, and those of digits have 3" in line
    assert "one trained on 3 channels" in line and "give images of 13 channels and a bands.yaml" in line
    line = error_line(capfd, monkeypatch, "detect", "random:resnet18,channels=4", "--dataset", "digits")
    assert "detect trains on photographs of 3 channels" in line and "takes images of 4 channels" in line
    line = error_line(
        capfd, monkeypatch, "pretrain", "digits", *data, *SETTINGS, "--set", "arch=resnet18_quarter,channels=4"
    )
    assert "takes 4 channels, and the images of imagefolder:set have 13" in line


def test_three_of_the_bands_for_a_network_of_rgb_are_a_deviation(tmp_path):
    folder = described(tmp_path, 4)
    path = folder / "bands.yaml"
    path.write_text(path.read_text() + "bands: [3, 2, 1]\n")
    train, test = catalogue.open_splits("imagefolder", folder)
    encoder = me.load("random:vit_narrow_patch8_32")
    result = me.judge(encoder, train, test, "knn/instdisc@1", device="cpu", k=3, workers=0)
    assert any(deviation.startswith("bands 3, 2, 1, each less its mean") for deviation in result.deviations)
    used = result.record["preprocessing"]
    assert used["mean"] == [train.bands.mean[place] for place in (2, 1, 0)] and used["size"] == 32


def test_a_network_of_three_bands_takes_no_photographs():
    three = Preprocessing(32, 32, (1000.0,) * 3, (300.0,) * 3, "bands", 0)
    digits = catalogue.open_images("digits", None, "test")
    with pytest.raises(InputError, match=r"trained on 3 bands in the units .* images of digits are RGB of 8 bits"):
        catalogue.preprocessing_on(digits, three, 3)


def test_a_network_of_0_to_255_takes_no_bands(tmp_path):
    folder = described(tmp_path, 3)
    images = catalogue.open_images("imagefolder", folder, "train")
    with pytest.raises(InputError, match="takes RGB of 0 to 255 as they are"):
        catalogue.preprocessing_on(images, Preprocessing(range=255), 3)


# Views


@pytest.mark.parametrize(
    ("override", "words"),
    [("views.backend=reference", "PIL's, for RGB"), ("views.recipe=digits", "slants drawn strokes")],
)
def test_views_that_bands_do_not_have_are_refused(tmp_path, override, words):
    with pytest.raises(InputError, match=words):
        plan(config(override), "imagefolder", described(tmp_path, 4), 1)


def test_views_are_float32_and_their_bytes_are_counted(tmp_path):
    run = plan(config(), "imagefolder", described(tmp_path, 13), 1)
    views = two_views(run.images, run.config)
    made, *_ = views.__getitems__([(0, 0), (0, 1)])
    assert made.dtype == torch.float32 and made.shape == (2, 2, 13, 24, 24)
    assert views.item_bytes == made.nbytes / 2
    low, high = pixels(13).min(), 4000
    assert low - 1000 < made.min() and made.max() < high  # in the units in which they are stored
    of_rgb = shuffle_bytes(run.config, 2)
    of_bands = shuffle_bytes(run.config, 2, run.images)
    assert of_bands[0] / of_rgb[0] == 4 * 13 / 3 and of_bands[1] / of_rgb[1] == 13 / 3
