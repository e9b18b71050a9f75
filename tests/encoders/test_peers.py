"""Checkpoints written by the libraries themselves: recognised, loaded with proof, and the same activations.

torchvision and timm are installed with us; the others are optional (`pip install '.[peers]'`) and skip with a reason.
"""

import argparse
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from checkpoints import VIT, used
from safetensors.torch import save_file
from torch import Tensor, nn

from moco_eval.encoders import libraries as loading
from moco_eval.encoders.load import load
from moco_eval.errors import InputError


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def require_same(source: Path | str, theirs, size: int, **given):
    """Load a file and compare with what the library's own network gives for the same images."""
    encoder = load(str(source), **given)
    expected, found = theirs(images(size)), encoder.backbone(images(size))
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    return encoder


# torchvision and timm


@pytest.mark.parametrize("name", ["resnet18", "wide_resnet50_2", "resnext50_32x4d"])
def test_torchvisions_resnets(name, tmp_path):
    net = used(torchvision.models.get_model(name, weights=None), 0)
    torch.save(net.state_dict(), tmp_path / "x.pth")
    net.fc = nn.Identity()
    assert require_same(tmp_path / "x.pth", net.eval(), 64).arch == name


def test_torchvisions_vit(tmp_path):
    shape = {"image_size": 32, "patch_size": 16, "num_layers": 2, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 192}
    net = used(torchvision.models.VisionTransformer(**shape), 0)
    nn.init.normal_(net.encoder.pos_embedding)
    torch.save(net.state_dict(), tmp_path / "x.pth")
    net.heads = nn.Identity()
    encoder = require_same(tmp_path / "x.pth", net.eval(), 32)
    assert (encoder.origin, encoder.arch) == ("torchvision ViT", VIT)


@pytest.mark.parametrize(("name", "size"), [("resnet18", 64), ("resnet50.a1_in1k", 64), ("vit_tiny_patch16_224", 224)])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_timms_networks(name, size, ending, tmp_path):
    net = used(timm.create_model(name, pretrained=False), 0)
    path = tmp_path / f"x.{ending}"
    save_file(net.state_dict(), path) if ending == "safetensors" else torch.save(net.state_dict(), path)
    net.reset_classifier(0)
    assert require_same(path, net.eval(), size).arch == name.partition(".")[0]


def test_timms_own_training_checkpoint(tmp_path):
    """It keeps its settings as an argparse.Namespace beside the weights."""
    from timm.utils import CheckpointSaver

    net = used(timm.create_model("resnet18"), 0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    settings = argparse.Namespace(model="resnet18", lr=0.1)
    CheckpointSaver(net, optimizer, args=settings, checkpoint_dir=str(tmp_path)).save_checkpoint(3, 50.0)
    net.reset_classifier(0)
    encoder = require_same(tmp_path / "last.pth.tar", net.eval(), 64)
    assert dict(encoder.dropped)["args"] == "settings of the run that wrote it"


@pytest.mark.parametrize(("name", "heads"), [("resnet18", None), ("vit_tiny_patch16_224", 3)])
def test_timms_published_weights(name, heads, monkeypatch):
    """As if downloaded: its own settings travel, its own number of heads is asked of it."""
    net = used(timm.create_model(name, num_classes=0), 0).eval()
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: net)
    monkeypatch.setattr(loading, "unreachable", lambda *_: None)
    encoder = require_same(f"timm:{name}", net, 224)
    assert encoder.preprocessing.mean == tuple(net.pretrained_cfg["mean"]) and encoder.preprocessing.size == 224
    assert encoder.run_name == f"timm-{name}" and encoder.origin.startswith(f"timm {name}.")
    assert not any("attention heads" in words for words in encoder.warnings)
    twelve = timm.models.VisionTransformer(embed_dim=192, depth=12, num_heads=12, num_classes=0)
    twelve.pretrained_cfg = net.pretrained_cfg
    if heads:
        assert loading._of_timm("timm:x", used(twelve, 0).eval()).arch == "vit_tiny_12h_patch16_224"


def test_timm_without_weights(monkeypatch):
    def offline(*_, **__):
        raise OSError("cut off")

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(loading, "unreachable", lambda *_: None)
    with pytest.raises(InputError, match=r"cannot download timm's weights of resnet18 \(cut off\)"):
        load("timm:resnet18")
    with pytest.raises(InputError, match="timm has no published weights of "):
        load("timm:vit_small_patch16_18x2_224")


# Libraries that are optional


@pytest.fixture
def lightning():
    return pytest.importorskip(
        "pytorch_lightning", reason="pytorch-lightning is not installed (pip install '.[peers]')"
    )


def trained(lightning, model, batch, folder: Path, **given) -> Path:
    """One step of a real Trainer, and its checkpoint."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_steps=1, devices=1, default_root_dir=folder, **quiet)
    trainer.fit(model, torch.utils.data.DataLoader([batch], batch_size=None))
    trainer.save_checkpoint(folder / "x.ckpt", **given)
    model.eval()
    return folder / "x.ckpt"


@pytest.mark.peers
@pytest.mark.parametrize("weights_only", [False, True])
def test_lightlys_moco(lightning, weights_only, tmp_path):
    pytest.importorskip("lightly", reason="lightly is not installed (pip install '.[peers]')")
    import copy

    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    class MoCo(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])
            self.projection_head = MoCoProjectionHead(512, 512, 128)
            self.backbone_momentum = copy.deepcopy(self.backbone)
            self.projection_head_momentum = copy.deepcopy(self.projection_head)
            deactivate_requires_grad(self.backbone_momentum)
            deactivate_requires_grad(self.projection_head_momentum)
            self.criterion = NTXentLoss(memory_bank_size=(64, 128))

        def training_step(self, batch, _):
            update_momentum(self.backbone, self.backbone_momentum, 0.9)
            update_momentum(self.projection_head, self.projection_head_momentum, 0.9)
            q = self.projection_head(self.backbone(batch).flatten(1))
            k = self.projection_head_momentum(self.backbone_momentum(batch.flip(-1)).flatten(1))
            return self.criterion(q, k)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.06)

    model = MoCo()
    path = trained(lightning, model, torch.randn(8, 3, 32, 32), tmp_path, weights_only=weights_only)
    encoder = require_same(path, lambda x: model.backbone(x).flatten(1), 32)
    key = require_same(path, lambda x: model.backbone_momentum(x).flatten(1), 32, encoder="key")
    assert encoder.origin == key.origin == "lightly" and not torch.equal(
        encoder.backbone.conv1.weight, key.backbone.conv1.weight
    )
    features = torch.randn(2, 512)
    assert torch.allclose(encoder.head(features), model.projection_head(features), atol=1e-6)
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    require_same(tmp_path / "plain.pth", lambda x: model.backbone(x).flatten(1), 32)


@pytest.mark.peers
def test_a_lightning_module_with_its_settings(lightning, tmp_path):
    """hyper_parameters hold whatever was passed: a Namespace, an OmegaConf dictionary, a path."""
    omegaconf = pytest.importorskip("omegaconf", reason="omegaconf is not installed (pip install '.[peers]')")

    class Module(lightning.LightningModule):
        def __init__(self, args, config, folder):
            super().__init__()
            self.save_hyperparameters()
            self.model = torchvision.models.resnet18()

        def training_step(self, batch, _):
            return self.model(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    config = omegaconf.OmegaConf.create({"lr": 0.1, "layers": [1, 2, {"deep": None}]})
    model = Module(argparse.Namespace(lr=0.1), config, tmp_path)
    path = trained(lightning, model, torch.randn(8, 3, 32, 32), tmp_path)
    model.model.fc = nn.Identity()
    encoder = require_same(path, model.model, 32)
    assert encoder.origin == "torchvision or timm ResNet, under 'model.'"
    assert dict(encoder.dropped)["hyper_parameters"] == "settings of the run that wrote it"


@pytest.mark.peers
@pytest.mark.parametrize(
    ("group", "size", "arch"), [("cifar", 32, "resnet18_cifar_pad2"), ("imagenet-100", 64, "resnet18")]
)
def test_solo_learns_moco(lightning, group, size, arch, tmp_path):
    solo = pytest.importorskip("solo.methods", reason="solo-learn is not installed (from its repository)")
    omegaconf = pytest.importorskip("omegaconf")
    from solo.args.pretrain import parse_cfg

    recipe = Path(solo.__file__).parents[2] / "scripts" / "pretrain" / group / "mocov2plus.yaml"
    if not recipe.is_file():
        pytest.skip("solo-learn's own recipes are only in its repository")
    config = omegaconf.OmegaConf.load(recipe)
    del config["defaults"], config["hydra"]
    config.augmentations = omegaconf.OmegaConf.load(recipe.parent / "augmentations" / "symmetric_weak.yaml")
    small = {"wandb": {"enabled": False}, "devices": [0], "max_epochs": 1, "method_kwargs": {"queue_size": 64}}
    config.merge_with(small | {"optimizer": {"batch_size": 8}, "backbone": {"name": "resnet18"}})
    omegaconf.OmegaConf.set_struct(config, False)
    model = solo.METHODS["mocov2plus"](parse_cfg(config))
    views = [torch.randn(8, 3, size, size) for _ in range(2)]
    batch = [torch.arange(8), views, torch.randint(0, 10, (8,))]
    path = trained(pytest.importorskip("lightning.pytorch"), model, batch, tmp_path)
    encoder = require_same(path, model.backbone, size)
    require_same(path, model.momentum_backbone, size, encoder="key")
    assert (encoder.origin, encoder.arch) == ("solo-learn", arch)
    features = torch.randn(2, 512)
    assert torch.allclose(encoder.head(features), model.projector(features), atol=1e-5)


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[peers]')")


def both_ways(net: nn.Module, folder: Path) -> list[Path]:
    """As save_pretrained writes it, and as torch.save of what is in memory does."""
    net.save_pretrained(folder / "hub")
    torch.save(net.state_dict(), folder / "memory.bin")
    return [folder / "hub" / "model.safetensors", folder / "memory.bin"]


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["ResNetModel", "ResNetForImageClassification"])
@pytest.mark.parametrize(
    ("layer", "depths", "widths", "arch"),
    [
        ("basic", [2, 2, 2, 2], [64, 128, 256, 512], "resnet18"),
        ("bottleneck", [3, 4, 6, 3], [256, 512, 1024, 2048], "resnet50"),
    ],
)
def test_hugging_faces_resnets(transformers, kind, layer, depths, widths, arch, tmp_path):
    config = transformers.ResNetConfig(layer_type=layer, depths=depths, hidden_sizes=widths)
    net = used(getattr(transformers, kind)(config), 0).eval()
    inner = net if kind == "ResNetModel" else net.resnet
    for path in both_ways(net, tmp_path):
        encoder = require_same(path, lambda x: inner(x).pooler_output.flatten(1), 64)
        assert encoder.origin.startswith("Hugging Face ResNet") and encoder.arch == arch


@pytest.mark.peers
def test_hugging_faces_settings_count(transformers, tmp_path):
    """Heads, epsilon and strides are in config.json alone."""
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 192}
    vit = used(transformers.ViTModel(transformers.ViTConfig(image_size=32, layer_norm_eps=0.1, **shape)), 0).eval()
    vit.save_pretrained(tmp_path / "vit")
    path = tmp_path / "vit" / "model.safetensors"
    encoder = require_same(path, lambda x: vit(x).last_hidden_state[:, 0], 32)
    assert encoder.norm_eps == 0.1 and "_12h_" in encoder.arch and len(encoder.warnings) == 1  # its pixels
    config = transformers.ResNetConfig(depths=[3, 4, 6, 3], downsample_in_bottleneck=True)
    resnet = used(transformers.ResNetModel(config), 0).eval()
    resnet.save_pretrained(tmp_path / "resnet")
    path = tmp_path / "resnet" / "model.safetensors"
    assert require_same(path, lambda x: resnet(x).pooler_output.flatten(1), 64).arch == "resnet50_msra"


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification"])
def test_hugging_faces_vits(transformers, kind, tmp_path):
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 192}
    net = used(getattr(transformers, kind)(transformers.ViTConfig(image_size=32, **shape)), 0).eval()
    inner = net if kind == "ViTModel" else net.vit
    for path in both_ways(net, tmp_path):
        encoder = require_same(path, lambda x: inner(x).last_hidden_state[:, 0], 32)
        assert encoder.origin.startswith("Hugging Face ViT") and encoder.arch == VIT
    transformers.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path / "hub")
    with pytest.raises(InputError, match="says images of 224 pixels, but the network takes 32"):
        load(str(tmp_path / "hub" / "model.safetensors"))
    size = {"height": 32, "width": 32}
    transformers.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], size=size).save_pretrained(tmp_path / "hub")
    encoder = load(str(tmp_path / "hub" / "model.safetensors"))
    assert encoder.preprocessing.mean == (0.1, 0.2, 0.3) and encoder.preprocessing.size == 32
