"""Which feature is taken, of which pixels: stages and heads of networks, and colours in their order and range."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import VIT, body, caffe2, mlp, moco, network, transformer, under, written
from PIL import Image

from moco_eval.config.detection import DetectConfig
from moco_eval.data import in_memory
from moco_eval.data.catalogue import open_images
from moco_eval.data.image_set import ImageSet
from moco_eval.data.loader import Normalise, clean_transform, crop_transform
from moco_eval.detection.detector import Detector, check_architecture
from moco_eval.encoders import download
from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.load import MSRA, load
from moco_eval.errors import InputError
from moco_eval.features.stages import network as feature_network
from moco_eval.preprocessing import Preprocessing

from commands import in_process  # isort: skip


@pytest.fixture
def moco_file(tmp_path) -> str:
    return written(tmp_path, {"state_dict": moco(mlp)})


def first(whole: ImageSet, count: int) -> ImageSet:
    return replace(whole, pixels=whole.pixels[:count], labels=whole.labels[:count], fingerprint=f"first {count}")


# Stages


@pytest.mark.parametrize("stage", ["layer1", "layer2", "layer3", "layer4"])
def test_a_stage_of_a_resnet_is_its_mean_over_places(stage, moco_file):
    encoder, images = load(moco_file), torch.randn(2, 3, 64, 64)
    reference, caught = network(0).eval(), []
    getattr(reference, stage).register_forward_hook(lambda _, __, output: caught.append(output))
    with torch.no_grad():
        reference(images)
        found = feature_network(encoder, stage)(images)
    assert torch.allclose(found, caught[0].mean((2, 3)), atol=1e-6)
    if stage == "layer4":
        assert torch.allclose(found, encoder.backbone(images), atol=1e-6)


def test_a_block_of_a_vit_is_its_normalised_class_token(tmp_path):
    encoder, images = load(written(tmp_path, body(0, VIT))), torch.randn(2, 3, 32, 32)
    reference, caught = transformer(0).eval(), []
    for block in reference.blocks:
        block.register_forward_hook(lambda _, __, output: caught.append(output))
    with torch.no_grad():
        pooled = reference(images)
        first, last = (feature_network(encoder, f"blocks.{i}")(images) for i in (0, 1))
        assert torch.allclose(first, reference.norm(caught[0])[:, 0], atol=1e-6)
    assert torch.allclose(last, pooled, atol=1e-6)


@pytest.mark.parametrize(
    ("source", "feature", "words"),
    [
        ("random:resnet18_quarter", "layer5", "it has pooled, head and layer1, layer2, layer3, layer4"),
        ("random:resnet18_quarter", "blocks.0", "is not a stage of resnet18_quarter"),
        (f"random:{VIT}", "blocks.2", "it has pooled, head and blocks.0, blocks.1"),
        ("pixels", "layer1", "it has pooled alone"),
        ("random:resnet18_quarter", "head", "has no projection head"),
    ],
)
def test_features_that_an_encoder_does_not_have(source, feature, words):
    with pytest.raises(InputError) as caught:
        feature_network(load(source), feature)
    assert words in str(caught.value)


def test_evaluations_take_the_feature_asked_for_and_say_so(moco_file, capfd, monkeypatch, tmp_path):
    digits = in_memory.digits
    monkeypatch.setattr(in_memory, "digits", lambda split: first(digits(split), 100))
    given = ["--dataset", "digits", "--protocol", "digits", "--feature", "layer1"]
    out, _ = in_process(capfd, monkeypatch, "knn", moco_file, *given, "--output", tmp_path / "knn")
    assert "knn/instdisc@1 digits top1" in out and "layer1 feature instead of pooled" in out
    few = ["--protocol", "digits_few", "--labels", "2-per-class", "--set", "schedule.epochs=1", "--feature", "head"]
    out, _ = in_process(capfd, monkeypatch, "linear", moco_file, *given, *few, "--output", tmp_path / "linear")
    assert "head feature instead of pooled" in out


def test_a_wrong_feature_leaves_nothing_behind(moco_file, capfd, monkeypatch, tmp_path):
    for command in ("knn", "linear"):
        given = [command, moco_file, "--dataset", "digits", "--protocol", "digits", "--feature", "layer9"]
        _, err = in_process(capfd, monkeypatch, *given, "--output", tmp_path / command, code=2)
        assert "is not a stage of" in err and not (tmp_path / command).exists()


def test_a_vit_is_evaluated_at_its_own_size(capfd, monkeypatch, tmp_path):
    source = written(tmp_path, body(0, "vit_narrow_patch16_64"))
    given = ["--dataset", "digits", "--protocol", "digits", "--output", tmp_path / "out"]
    in_process(capfd, monkeypatch, "knn", source, *given)
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert record["preprocessing"]["size"] == 64 and record["encoder"]["arch"] == "vit_narrow_patch16_64"
    assert record["metrics"]["top1"] > 30  # random patches still tell digits apart


# Pixels


def test_bgr_of_0_to_255_everywhere(tmp_path):
    """Caffe's pixels: blue first, the mean taken off, nothing divided."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = torch.from_numpy(pixels[:, :, ::-1].astype(np.float32) - np.float32([103.53, 116.28, 123.675]))
    expected = expected.permute(2, 0, 1)
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    assert torch.allclose(Normalise(MSRA)(batch)[0], expected, atol=1e-3)
    small = Preprocessing(64, 64, MSRA.mean, MSRA.std, "BGR", 255)
    assert torch.allclose(clean_transform(small)(Image.fromarray(pixels)), expected, atol=1e-3)
    whole = crop_transform(small, (1.0, 1.0), flip=False)
    assert torch.allclose(whole(Image.fromarray(pixels)), expected, atol=1e-3)


def test_rgb_of_0_to_1_is_bit_for_bit_torchvisions():
    from torchvision import transforms

    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    usual = Preprocessing(64, 64)
    theirs = transforms.Compose([transforms.ToTensor(), transforms.Normalize(usual.mean, usual.std)])
    expected = theirs(Image.fromarray(pixels))
    assert torch.equal(clean_transform(usual)(Image.fromarray(pixels)), expected)
    assert torch.equal(Normalise(usual)(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0], expected)


def test_a_detector_gives_caffes_pixels_to_caffes_weights(tmp_path):
    from moco_eval.config import load as configs

    tensors = {n: t for n, t in body(0, "resnet50").items() if n.endswith(("weight", "bias"))}
    encoder = load(written(tmp_path, under("", tensors, caffe2)))
    recipe = configs.load("digits_r50_c4", "detect", DetectConfig)
    detector = Detector(encoder, 3, recipe)
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    found = detector.batch([image])[0][0]
    mean = torch.tensor([103.53, 116.28, 123.675])[:, None, None]
    assert torch.allclose(found, image.flip(0).float() - mean, atol=1e-3)
    assert detector.backbone.body.layer2[0].conv1.stride == (2, 2)  # layer2 strides in its 1x1


@pytest.mark.parametrize("arch", [VIT, "resnet18_quarter_cifar", "resnet18_cifar_pad2"])
def test_networks_that_no_c4_detector_takes(arch):
    with pytest.raises(InputError, match=r"needs a ResNet|CIFAR stem"):
        check_architecture(load(f"random:{arch}"))


def test_pretraining_takes_resnets():
    from moco_eval.config import load as configs
    from moco_eval.config.pretrain import PretrainConfig
    from pretraining.plan import plan

    vit = configs.load("digits", "pretrain", PretrainConfig, [f"arch={VIT}"])
    with pytest.raises(InputError, match=f"{VIT} is a ViT, which MoCo v3 trains and mechanism moco does not"):
        plan(vit, "digits", None, 1)


# The zoo


def test_a_checkpoint_of_the_zoo(tmp_path, monkeypatch):
    path = written(tmp_path, {"state_dict": moco(mlp)})
    monkeypatch.setattr(download, "fetch", lambda name: tmp_path / "encoder.pth")
    encoder = load("zoo:moco_v2_800ep")
    assert (encoder.source, encoder.run_name, encoder.origin) == (
        "zoo:moco_v2_800ep",
        "moco_v2_800ep",
        "facebookresearch/moco v2",
    )
    assert encoder.sha256 == load(path).sha256 and not encoder.warnings
    assert load("zoo:moco_v2_800ep", encoder="key").run_name == "moco_v2_800ep-key"
    (said,) = load("zoo:simsiam_r50_100ep").warnings
    assert (
        "expects simsiam_r50_100ep in the layout of facebookresearch/simsiam, not of facebookresearch/moco v2" in said
    )


def test_digits_have_their_own_pixels():
    """An encoder that says nothing leaves the pixels to the data."""
    encoder: Encoder = load("random:resnet18_quarter")
    assert encoder.preprocessing is None and open_images("digits", None, "test").pixels is not None
