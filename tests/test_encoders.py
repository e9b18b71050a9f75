"""Loading: every layout with every tensor in place, and each way in which one can be out of place."""

import argparse
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import error_line
from torch import nn

from moco_eval.encoders import load as loading
from moco_eval.encoders.build import ARCHITECTURES, build_backbone, build_resnet
from moco_eval.encoders.encoder import Preprocessing
from moco_eval.encoders.inspect import describe, format_description
from moco_eval.encoders.load import load, run_name
from moco_eval.encoders.recognise import LAYOUTS
from moco_eval.errors import InputError

ARCH = "resnet18_quarter"
PREPROCESSING = {"size": 64, "resize": 64, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "channels": "RGB"}


def network(seed: int, arch: str = ARCH, head: str = "linear", dim: int = 16) -> nn.Module:
    """A network whose BN statistics look used."""
    torch.manual_seed(seed)
    net = build_resnet(arch, dim)
    if head == "mlp":
        width = net.fc.in_features
        net.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), net.fc)
    torch.manual_seed(seed)  # the same statistics under either head
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
        else:
            buffer.fill_(seed + 7)
    return net


def moco_state(head: str, module: str = "module.", encoders: str = "qk", queue: bool = True) -> dict:
    state = {}
    for seed, letter in enumerate("qk"):
        if letter in encoders:
            state |= {f"{module}encoder_{letter}.{k}": v for k, v in network(seed, head=head).state_dict().items()}
    if queue:
        state |= {f"{module}queue": torch.randn(16, 32), f"{module}queue_ptr": torch.zeros(1, dtype=torch.int64)}
    return state


def checkpoint(state: dict, **beside) -> dict:
    return {"epoch": 3, "arch": "resnet18", "state_dict": state, **beside}


def ours() -> dict:
    return checkpoint(
        moco_state("mlp"),
        optimizer={"state": {}},
        step=30,
        sampler={"seed": 0},
        unreadable=[7],
        rng=[],
        config={"arch": ARCH},
        preprocessing=PREPROCESSING,
        pretraining={"protocol": "pretrain/moco-v2@1", "dataset": {"name": "digits"}, "epochs": 3, "deviations": []},
        format="moco-eval/1",
    )


def memory_bank() -> dict:
    """One encoder and a slot for each image."""
    values = ours()
    values["state_dict"] = moco_state("mlp", encoders="q", queue=False) | {"module.bank": torch.randn(40, 16)}
    return values


def end_to_end() -> dict:
    """Two encoders and no dictionary: the next batch brings its own."""
    values = ours()
    values["state_dict"] = moco_state("mlp", queue=False)
    return values


# layout: (what the file holds, origin, prefix of the query backbone, whether there is a key encoder)
FILES = {
    "ours": (ours, "moco-eval", "module.encoder_q.", True),
    "ours, memory bank": (memory_bank, "moco-eval", "module.encoder_q.", False),
    "ours, end-to-end": (end_to_end, "moco-eval", "module.encoder_q.", True),
    "v1 full": (
        lambda: checkpoint(moco_state("linear"), optimizer={}),
        "facebookresearch/moco v1",
        "module.encoder_q.",
        True,
    ),
    "v2 full": (
        lambda: checkpoint(moco_state("mlp"), optimizer={}),
        "facebookresearch/moco v2",
        "module.encoder_q.",
        True,
    ),
    "v1 without DDP": (
        lambda: checkpoint(moco_state("linear", "")),
        "facebookresearch/moco v1",
        "encoder_q.",
        True,
    ),
    "v2 released": (
        lambda: checkpoint(moco_state("mlp", encoders="q", queue=False)),
        "facebookresearch/moco v2",
        "module.encoder_q.",
        False,
    ),
    "torchvision": (lambda: dict(network(0).state_dict()), "torchvision ResNet", "", False),
    "torchvision under state_dict": (
        lambda: checkpoint({f"module.{k}": v for k, v in network(0).state_dict().items()}, best_acc1=1.0),
        "torchvision ResNet",
        "module.",
        False,
    ),
}
layouts = pytest.mark.parametrize("layout", FILES)


def written(folder: Path, values: object, name: str = "encoder.pth") -> str:
    torch.save(values, folder / name)
    return str(folder / name)


def state_of(values: dict) -> dict:
    return values.get("state_dict", values)


def error(source: str, **given) -> str:
    with pytest.raises(InputError) as caught:
        load(source, **given)
    message = str(caught.value)
    assert "\n" not in message
    return message


# The battery: layouts x states


@layouts
def test_every_layout_loads_to_the_last_bit(layout, tmp_path):
    make, origin, _, _ = FILES[layout]
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    encoder = load(written(tmp_path, make()))
    assert (encoder.origin, encoder.arch, encoder.feature_dim) == (origin, ARCH, 128)
    expected = {name: tensor for name, tensor in network(0).state_dict().items() if not name.startswith("fc.")}
    loaded = encoder.backbone.state_dict()
    assert list(loaded) == list(expected) and encoder.tensors_loaded == len(expected) == 120
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert not encoder.warnings and not encoder.backbone.training
    images = torch.randn(2, 3, 64, 64)
    reference = network(0, head="mlp" if "v2" in layout or layout.startswith("ours") else "linear").eval()
    if encoder.head is not None:
        assert torch.equal(encoder.head(encoder.backbone(images)), reference(images))
    assert (encoder.head is None) == layout.startswith("torchvision")
    torch.manual_seed(5)
    assert torch.equal(before, torch.random.get_rng_state())


@layouts
def test_one_tensor_missing(layout, tmp_path):
    make, _, prefix, _ = FILES[layout]
    values = make()
    del state_of(values)[f"{prefix}layer2.1.bn1.running_var"]
    message = error(written(tmp_path, values))
    assert "of the 120 backbone tensors of resnet18_quarter, 1 are missing (first: layer2.1.bn1.running_var" in message


@layouts
def test_one_tensor_of_another_shape(layout, tmp_path):
    make, _, prefix, _ = FILES[layout]
    values = make()
    state_of(values)[f"{prefix}layer3.0.conv1.weight"] = torch.zeros(64, 32, 1, 1)
    message = error(written(tmp_path, values))
    assert "1 have another shape (first: layer3.0.conv1.weight, 64x32x1x1, expected 64x32x3x3)" in message


@layouts
def test_one_tensor_too_many(layout, tmp_path):
    make, _, prefix, _ = FILES[layout]
    values = make()
    state_of(values)[f"{prefix}layer4.2.conv1.weight"] = torch.zeros(128, 128, 3, 3)
    message = error(written(tmp_path, values))
    assert "1 are unexpected (first: layer4.2.conv1.weight, 128x128x3x3)" in message and "2-2-2-3" in message


@layouts
def test_one_tensor_of_another_dtype(layout, tmp_path):
    make, _, prefix, _ = FILES[layout]
    values = make()
    state_of(values)[f"{prefix}bn1.num_batches_tracked"] = torch.tensor(1, dtype=torch.int32)
    assert "1 have another dtype (first: bn1.num_batches_tracked, torch.int32" in error(written(tmp_path, values))


@layouts
def test_a_value_that_is_not_finite(layout, tmp_path):
    make, _, prefix, _ = FILES[layout]
    values = make()
    state_of(values)[f"{prefix}layer1.0.bn2.bias"][3] = float("nan")
    assert "layer1.0.bn2.bias has 1 values that are not finite, of 16" in error(written(tmp_path, values))


@layouts
def test_the_key_encoder(layout, tmp_path):
    make, _, _, has_key = FILES[layout]
    path = written(tmp_path, make())
    if not has_key:
        assert "encoder" in error(path, encoder="key")
        return
    key = load(path, encoder="key")
    expected = network(1).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in key.backbone.state_dict().items())
    assert key.run_name == "encoder-key" and ("query encoder (" in str(key.dropped))


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_only_the_key_encoder(head, tmp_path):
    path = written(tmp_path, checkpoint(moco_state(head, encoders="k")))
    assert "only the key encoder is in this file: --encoder key" in error(path)
    assert load(path, encoder="key").tensors_loaded == 120


def test_what_is_left_out_is_said(tmp_path):
    encoder = load(written(tmp_path, ours()))
    left = dict(encoder.dropped)
    assert {"queue", "queue_ptr", "optimizer", "step", "sampler", "unreadable", "rng"} <= left.keys() and all(
        left.values()
    )
    assert "key encoder (124 tensors)" in left
    assert encoder.preprocessing == Preprocessing.from_dict(PREPROCESSING)
    assert encoder.pretraining["protocol"] == "pretrain/moco-v2@1"
    assert load(written(tmp_path, FILES["v1 full"][0]())).preprocessing == Preprocessing()


def test_a_memory_bank_has_slots_and_no_key_encoder(tmp_path):
    path = written(tmp_path, memory_bank())
    left = dict(load(path).dropped)
    assert left["bank"] == "the memory bank's slots" and not any("encoder" in what for what in left)
    assert error(path, encoder="key").endswith(
        "--encoder key: a memory bank has no key encoder, its keys are the bank's slots; take --encoder query"
    )
    official = FILES["v1 full"][0]()
    official["state_dict"]["module.bank"] = torch.zeros(3, 4)
    assert "tensor bank belongs to no part of a facebookresearch/moco v1" in error(written(tmp_path, official))


def test_every_value_that_pretraining_writes_is_explained(tmp_path):
    reasons = dict(load(written(tmp_path, ours())).dropped)
    assert "not used by an evaluation" not in reasons.values()


def test_a_tensor_of_unknown_purpose_is_refused(tmp_path):
    values = FILES["v1 full"][0]()
    values["state_dict"]["module.predictor.weight"] = torch.zeros(3)
    assert "tensor predictor.weight belongs to no part" in error(written(tmp_path, values))


def test_a_head_that_does_not_fit(tmp_path):
    values = FILES["v2 full"][0]()
    values["state_dict"]["module.encoder_q.fc.0.weight"] = torch.zeros(128, 99)
    assert "head's 0.weight is 128x99" in error(written(tmp_path, values))
    del values["state_dict"]["module.encoder_q.fc.0.weight"]
    assert "neither linear nor an MLP" in error(written(tmp_path, values))


def test_old_files_without_batch_counts(tmp_path):
    state = {k: v for k, v in network(0).state_dict().items() if "num_batches_tracked" not in k}
    encoder = load(written(tmp_path, state))
    assert encoder.tensors_loaded == 100 and "num_batches_tracked is absent (20 counts" in encoder.warnings[0]
    state["bn1.num_batches_tracked"] = torch.tensor(0)
    assert "19 are missing" in error(written(tmp_path, state))


def test_half_weights_are_cast_and_untouched_statistics_doubted(tmp_path):
    half = {name: t.half() if t.is_floating_point() else t for name, t in network(0).state_dict().items()}
    encoder = load(written(tmp_path, half))
    assert "100 tensors are stored as float16" in encoder.warnings[0]
    assert encoder.backbone.conv1.weight.dtype == torch.float32
    fresh = load(written(tmp_path, build_resnet(ARCH).state_dict()))
    assert "every BN running statistic is at its initial value" in fresh.warnings[0]


# Architectures


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_each_architecture_is_read_off_its_shapes(arch):
    with torch.device("meta"):
        tensors = build_backbone(arch).state_dict()
    assert loading.nearest(tensors) == (arch, 1.0)
    for name in ("bn1.weight", "layer1.0.conv1.weight", "layer4.1.bn2.bias"):
        assert loading.infer("x", {key: tensor for key, tensor in tensors.items() if key != name}) == arch


def parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize(
    ("arch", "published"), [("resnet50", 24), ("resnext50_32x8d", 46), ("resnet50_w2", 94), ("resnet50_w4", 375)]
)
def test_the_papers_feature_extractors_have_its_parameter_counts(arch, published):
    """MoCo v1, Table 1: millions, without the classifier."""
    with torch.device("meta"):
        assert round(parameters(build_backbone(arch)) / 1e6) == published


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnet101", "resnext101_32x8d"])
def test_architectures_of_torchvisions_names_are_torchvisions(arch):
    import torchvision

    with torch.device("meta"):
        ours, theirs = build_resnet(arch), torchvision.models.get_model(arch)
    assert [(name, t.shape) for name, t in ours.state_dict().items()] == [
        (name, t.shape) for name, t in theirs.state_dict().items()
    ]


def test_rx50_is_twice_as_wide_as_torchvisions_resnext50():
    import torchvision

    with torch.device("meta"):
        rx50, narrow = build_resnet("resnext50_32x8d"), torchvision.models.resnext50_32x4d()
    assert parameters(rx50) == 48_021_800  # 46.0 M and the 1000-class fc
    with pytest.raises(InputError, match=r"128-256-512-1024 channels wide in 32 groups, .*nearest is"):
        loading.infer("x4d.pth", narrow.state_dict())
    assert loading.structure(rx50.state_dict()).count("256-512-1024-2048 channels wide in 32 groups") == 1


def test_a_resnext_loads_with_proof_and_a_wrong_arch_is_named():
    state = {k: v for k, v in network(0, "resnext50_32x8d").state_dict().items() if not k.startswith("fc.")}
    net = loading.prove("rx50.pth", state, loading.infer("rx50.pth", state), [])
    assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 2048)
    with pytest.raises(InputError, match="This looks like resnext50_32x8d: try --arch resnext50_32x8d"):
        loading.prove("rx50.pth", state, "resnet50", [])


def test_a_wrong_arch_names_the_right_one(tmp_path):
    path = written(tmp_path, network(0).state_dict())
    message = error(path, arch="resnet18_quarter_cifar")
    assert "1 have another shape (first: conv1.weight, 16x3x7x7, expected 16x3x3x3)" in message
    assert "This looks like resnet18_quarter: try --arch resnet18_quarter." in message
    cifar = written(tmp_path, network(0, "resnet18_quarter_cifar").state_dict())
    assert "looks like resnet18_quarter_cifar (CIFAR stem)" in error(cifar, arch=ARCH)
    assert "unknown architecture 'resnet19'. Did you mean" in error(path, arch="resnet19")


def test_wide_resnet_is_described(tmp_path):
    import torchvision

    with torch.device("meta"):
        wide = torchvision.models.wide_resnet50_2().state_dict()
    with pytest.raises(InputError, match="4 stages of 3-4-6-3 bottleneck blocks, 128-256-512-1024 channels wide"):
        loading.infer("wide.pth", wide)


def test_a_full_resnet50_v2(tmp_path):
    torch.manual_seed(0)
    state = {f"module.encoder_q.{k}": v for k, v in network(0, "resnet50", "mlp", 128).state_dict().items()}
    encoder = load(written(tmp_path, {"epoch": 200, "arch": "resnet50", "state_dict": state}))
    assert (encoder.arch, encoder.tensors_loaded, encoder.feature_dim) == ("resnet50", 318, 2048)
    assert encoder.pretraining == {"epochs": 200}


# Files that are no checkpoint


class Evil:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("protocol", [2, 4, "zip", "legacy"])
def test_a_malicious_pickle_runs_nothing(protocol, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "evil.pth"
    values = {"state_dict": network(0).state_dict(), "x": Evil(canary)} if isinstance(protocol, str) else Evil(canary)
    if isinstance(protocol, int):
        path.write_bytes(pickle.dumps(values, protocol))
    else:
        torch.save(values, path, _use_new_zipfile_serialization=protocol == "zip")
    assert "wants to run code named posix.system" in error(str(path))
    assert not canary.exists()
    if isinstance(protocol, int):  # the control: the file does run what it says where nobody checks
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert canary.exists()


def test_objects_beside_the_weights_are_named(tmp_path):
    state = network(0).state_dict()
    message = error(written(tmp_path, {"state_dict": state, "args": argparse.Namespace(lr=1)}))
    assert "holds an object of the class argparse.Namespace" in message and "not executed" in message
    assert "torch.nn.modules.linear.Linear" in error(written(tmp_path, nn.Linear(2, 2)))
    assert "numpy" in error(written(tmp_path, {"a": np.zeros(3)}))


def broken(folder: Path, kind: str) -> Path:
    path = folder / "broken.pth"
    whole = Path(written(folder, {"state_dict": network(0).state_dict()}, "whole.pth")).read_bytes()
    legacy = folder / "legacy.pth"
    torch.save({"state_dict": network(0).state_dict()}, legacy, _use_new_zipfile_serialization=False)
    contents = {
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "truncated by a little": whole[:-500],
        "truncated to its start": whole[:20],
        "legacy truncated": legacy.read_bytes()[:-500],
        "text": b"hello world, these are my weights\n" * 30,
        "html": b"<!DOCTYPE html><html><body>404 not found</body></html>",
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "noise": np.random.default_rng(0).bytes(5000),
        "safetensors header": (1000).to_bytes(8, "little") + b'{"a":',
        "plain pickle": pickle.dumps({"a": [1, 2]}, 4),
    }
    path.write_bytes(contents[kind])
    return path


BROKEN = {
    "empty": "is empty",
    "truncated": "is truncated",
    "truncated by a little": "is truncated",
    "truncated to its start": "is truncated",
    "legacy truncated": "truncated or damaged",
    "text": "is a text file",
    "html": "is a web page",
    "lfs": "Git LFS pointer",
    "noise": "no checkpoint that can be read",
    "safetensors header": "damaged safetensors",
    "plain pickle": "no torch checkpoint",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files(kind, tmp_path):
    assert BROKEN[kind] in error(str(broken(tmp_path, kind)))


def test_a_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("notes.txt", "hello")
    assert "zip archive of something else" in error(str(tmp_path / "x.pth"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([torch.zeros(1)], "holds a list, not a dict"),
        (torch.zeros(3), "holds a Tensor, not a dict"),
        ({}, "it is empty"),
        ({"epoch": 3}, "holds no tensors; its entries: epoch"),
        ({"state_dict": {}}, "holds no tensors"),
        ({"encoder.weight": torch.zeros(3)}, "has no layout we know"),
        ({"encoder_q.net.0.weight": torch.zeros(3), "encoder_q.net.9.weight": torch.zeros(2)}, "no ResNet under"),
        ({"format": "moco-eval/9", "state_dict": {"a": torch.zeros(1)}}, "update moco-eval"),
        ({"conv1.weight": torch.zeros(3), "module.conv1.weight": torch.zeros(3)}, "the same tensors twice"),
        ({"conv1.weight": torch.zeros(3), "layer1.0.conv1.weight": torch.zeros(3)}, "not an architecture we build"),
        ({"conv1.weight": torch.eye(3).to_sparse(), "layer1.0.x": torch.zeros(3)}, "only dense tensors"),
    ],
)
def test_files_that_hold_something_else(values, words, tmp_path):
    assert words in error(written(tmp_path, values))


def test_missing_paths_and_folders_suggest_the_newest(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for epoch, seconds in ((1, 100), (3, 300), (2, 200)):
        written(folder, {"a": torch.zeros(1)}, f"epoch_{epoch:04d}.pth")
        os.utime(folder / f"epoch_{epoch:04d}.pth", (seconds, seconds))
    missing = folder / "epoch_0200.pth"
    assert error(str(missing)) == f"{missing} does not exist; the newest there is epoch_0003.pth"
    assert f"is a run directory; give its newest checkpoint: {folder / 'epoch_0003.pth'}" in error(str(folder.parent))
    assert "is a folder, not a checkpoint; the newest there is epoch_0003.pth" in error(str(folder))
    assert error(str(tmp_path / "no" / "such.pth")).endswith("does not exist")
    (tmp_path / "empty").mkdir()
    assert error(str(tmp_path / "empty")).endswith("is a folder, not a checkpoint")
    os.mkfifo(tmp_path / "pipe.pth")
    assert "not a regular file" in error(str(tmp_path / "pipe.pth"))


def test_legacy_files_load_and_names_do_not_matter(tmp_path):
    torch.save(network(0).state_dict(), tmp_path / "x.safetensors", _use_new_zipfile_serialization=False)
    assert load(str(tmp_path / "x.safetensors")).tensors_loaded == 120


# Names and other sources


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("moco_v2_r50.pth", "moco_v2_r50"),
        ("checkpoint_0199.pth.tar", "checkpoint_0199"),
        ("moco_v2_800ep.v1.2.pth", "moco_v2_800ep.v1.2"),
        ("runs/cifar/checkpoints/epoch_0012.pth", "cifar-epoch_0012"),
        ("my runs/a b/checkpoints/last.pth", "a_b-last"),
        ("../weird ü:*?.pt", "weird"),
        ("noext", "noext"),
    ],
)
def test_run_names(path, name):
    assert run_name(Path(path)) == name


def test_random_encoders_come_from_their_seed():
    first, same, other = load(f"random:{ARCH}"), load(f"random:{ARCH}"), load(f"random:{ARCH}", seed=1)
    assert first.sha256 == same.sha256 != other.sha256
    assert first.run_name == f"random-{ARCH}" and first.head is None and first.preprocessing is None
    torch.manual_seed(0)
    assert torch.equal(build_resnet(ARCH).conv1.weight, first.backbone.conv1.weight)


def test_pixels():
    encoder = load("pixels")
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(encoder.backbone(images), images.reshape(2, -1))
    assert (encoder.feature_dim, encoder.tensors_loaded, encoder.run_name) == (0, 0, "pixels")


def test_torchvision_weights(monkeypatch):
    from torchvision.models import ResNet18_Weights

    torch.manual_seed(0)
    state = build_resnet("resnet18").state_dict()
    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", lambda self, **_: dict(state))
    encoder = load("torchvision:resnet18:IMAGENET1K_V1")
    assert encoder.preprocessing == Preprocessing() and encoder.tensors_loaded == 120
    assert (
        encoder.run_name == "torchvision-resnet18-IMAGENET1K_V1"
        and encoder.sha256 == load("torchvision:resnet18").sha256
    )

    def offline(self, **_):
        raise OSError("Name or service not known")

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", offline)
    assert "without a network" in error("torchvision:resnet18")


@pytest.mark.parametrize(
    ("source", "given", "words"),
    [
        ("timm:vit", {}, "timm: is not built yet"),
        ("zoo:x", {}, "zoo: is not built yet"),
        ("random:resnet51", {}, "Did you mean 'resnet50'"),
        ("random:", {}, "unknown architecture ''"),
        ("torchvision:resnet51", {}, "Did you mean 'resnet50'"),
        ("torchvision:resnext50_32x8d", {}, "is no network we build. Did you mean 'resnext101_32x8d'"),
        ("torchvision:resnext101_32x8d:IMAGENET1K_V9", {}, "Did you mean 'IMAGENET1K_V"),
        ("torchvision:resnet50:IMAGENET1K_V9", {}, "Did you mean 'IMAGENET1K_V"),
        (f"random:{ARCH}", {"encoder": "key"}, "has no key encoder"),
        ("pixels", {"arch": "resnet50"}, "contradicts pixels"),
        ("pixels", {"encoder": "keys"}, "must be query or key"),
    ],
)
def test_sources_that_are_wrong(source, given, words):
    assert words in error(source, **given)


# inspect


def test_inspect_describes(tmp_path):
    path = written(tmp_path, ours())
    facts = describe(path)
    assert facts["activations"]["sha256"] == describe(path)["activations"]["sha256"]
    assert facts["activations"]["sha256"] != describe(path, encoder="key")["activations"]["sha256"]
    assert facts["parameters"] == sum(p.numel() for p in build_backbone(ARCH).parameters())
    assert (facts["feature_dim"], facts["head"], facts["tensors_loaded"]) == (128, "128-128-16", 120)
    text = format_description(facts)
    for words in (
        "moco-eval",
        ARCH,
        "all 120 backbone tensors",
        "queue_ptr",
        "pretrain/moco-v2@1, on digits, 3 epochs",
    ):
        assert words in text
    assert "raw pixels" in format_description(describe("pixels"))


def test_the_inspect_command_fails_in_one_line(tmp_path, capfd, monkeypatch):
    assert "is truncated" in error_line(capfd, monkeypatch, "inspect", broken(tmp_path, "truncated"))


@pytest.mark.data
def test_every_checkpoint_of_the_shared_data(shared_data, tmp_path):
    path = shared_data / "checkpoints" / "resnet20-12fca82f.th"
    message = error(str(path))
    assert "3 stages of 3-3-3 basic blocks" in message and "shortcuts without parameters" in message
    assert "is a text file" in error(str(shutil.copy(shared_data / "checkpoints" / "LICENSE", tmp_path / "x.pth")))


def test_layouts_are_told_apart_in_one_place():
    assert len({row.origin for row in LAYOUTS}) == len(LAYOUTS)
