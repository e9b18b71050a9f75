"""Our converted files in a real detectron2: every tensor taken, the same activations, the papers' head at hand."""

import pytest
import torch
from checkpoints import used
from torch import nn

from moco_eval.encoders.architectures import build_resnet
from moco_eval.encoders.export.convert import convert
from moco_eval.encoders.export.detectron2 import to_detectron2
from moco_eval.encoders.export.verify import stages
from moco_eval.encoders.fingerprint import probe_features
from moco_eval.encoders.load import load

pytestmark = pytest.mark.detectron2


@pytest.fixture(scope="module", autouse=True)
def detectron2():
    return pytest.importorskip("detectron2", reason="detectron2 is not installed; build it from its source")


@pytest.fixture(scope="module")
def moco(tmp_path_factory):
    """An official-layout checkpoint of a ResNet-50 with lively BN statistics, and its converted file and settings."""
    torch.manual_seed(0)
    net = used(build_resnet("resnet50", num_classes=128), 0)
    folder = tmp_path_factory.mktemp("moco")
    state = {f"module.encoder_q.{name}": tensor for name, tensor in net.state_dict().items()}
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": state}, folder / "moco.pth.tar")
    said = convert(str(folder / "moco.pth.tar"), folder / "moco.pkl", "detectron2")
    return net.eval(), folder / "moco.pkl", said


@pytest.fixture(scope="module")
def detector(moco):
    """Faster R-CNN by the YAML that lies beside the file, loaded by detectron2's own checkpointer."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    import moco_eval.detection.extra_norm  # noqa: F401 (registers the head)

    settings = get_cfg()
    settings.merge_from_file(str(moco[1].with_suffix(".yaml")))
    settings.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.NUM_CLASSES", 20, "MODEL.RESNETS.NORM", "BN"])
    assert str(moco[1]) == settings.MODEL.WEIGHTS
    model = build_model(settings)
    DetectionCheckpointer(model).load(settings.MODEL.WEIGHTS)
    return model.eval()


def test_every_backbone_tensor_is_taken(detector, moco):
    ours = {to_detectron2(name): tensor for name, tensor in moco[0].state_dict().items() if not name.startswith("fc.")}
    theirs = detector.state_dict()
    taken = 0
    for name, tensor in ours.items():
        place = f"roi_heads.{name}" if name.startswith("res5") else f"backbone.{name}"
        assert torch.equal(theirs[place], tensor), name
        taken += 1
    extra = [name for name in theirs if name.startswith("roi_heads.res5.norm.")]
    in_the_model = [name for name in theirs if name.startswith(("backbone.", "roi_heads.res5."))]
    assert taken == len(ours) == len(in_the_model) - len(extra) == 318 and len(extra) == 5


def test_activations_are_torchvisions(detector, moco):
    image = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = stages(moco[0], image)
        y, theirs = detector.backbone.stem(image), {}
        for name in ("res2", "res3", "res4"):
            y = theirs[name] = getattr(detector.backbone, name)(y)
        theirs["res5"] = nn.Sequential(*list(detector.roi_heads.res5)[:3])(y)
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-5 * ours[name].abs().max().item()), name


def test_convert_says_that_it_asked_detectron2(moco):
    assert "res2, res3, res4, res5 equal (largest difference" in moco[2]
    assert "all 318 tensors of its build_resnet_backbone taken" in moco[2]


@pytest.mark.parametrize("arch", ["resnet18", "resnet50_msra", "resnext50_32x4d", "resnet50_w2", "wide_resnet50_2"])
def test_other_networks_are_built_as_their_settings_say(arch, tmp_path):
    assert "of its build_resnet_backbone taken" in convert(f"random:{arch}", tmp_path / "x.pkl", "detectron2")


def test_the_extra_norm_is_the_last_part_of_res5(detector):
    res5 = detector.roi_heads.res5
    assert [name for name, _ in res5.named_children()] == ["0", "1", "2", "norm"]
    assert isinstance(res5.norm, nn.BatchNorm2d) and res5.norm.num_features == 2048
    assert (res5.norm.weight == 1).all() and (res5.norm.bias == 0).all()
    x = torch.randn(2, 1024, 14, 14)
    with torch.no_grad():
        assert torch.equal(res5(x), res5.norm(nn.Sequential(*list(res5)[:3])(x)))


def test_a_detector_gives_its_backbone_back(detector, moco, tmp_path):
    """What detectron2 trained is an encoder again."""
    torch.save({"model": detector.state_dict(), "iteration": 9}, tmp_path / "model_final.pth")
    encoder, original = load(str(tmp_path / "model_final.pth")), load(str(moco[1].with_name("moco.pth.tar")))
    assert (encoder.origin, encoder.tensors_loaded) == ("detectron2", 318)
    assert torch.equal(probe_features(encoder), probe_features(original))


def test_msra_weights_are_read_as_detectron2_reads_them(tmp_path):
    """The older Caffe2 names, folded statistics and stride in the 1x1: stage by stage what detectron2 computes."""
    import pickle

    from checkpoints import body, caffe2
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone.resnet import build_resnet_backbone

    tensors = {n: t.numpy() for n, t in body(0, "resnet50").items() if n.endswith(("weight", "bias"))}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({caffe2(n): array for n, array in tensors.items()}, 2))
    encoder = load(str(tmp_path / "R-50.pkl"))
    assert (encoder.origin, encoder.arch) == ("detectron2 MSRA", "resnet50_msra")
    config = get_cfg()  # its defaults are those for these weights: frozen batch norm, stride in the 1x1
    config.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    theirs = build_resnet_backbone(config, ShapeSpec(channels=3))
    DetectionCheckpointer(theirs).load(str(tmp_path / "R-50.pkl"))
    image = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, found = stages(encoder.backbone, image), theirs.eval()(image)
    for name in ours:
        assert torch.allclose(ours[name], found[name], rtol=0, atol=1e-5 * ours[name].abs().max().item()), name


def test_a_detector_of_detectron2s_own_defaults_is_read_by_its_settings(tmp_path):
    """BGR of 0..255 and the stride in the 1x1: only config.yaml says so."""
    import yaml
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    config = get_cfg()
    config.MODEL.DEVICE = "cpu"
    config.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    config.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    config.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    config.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    config.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    config.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    config.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    config.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    config.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    config.MODEL.ROI_BOX_HEAD.NUM_FC, config.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 1, 7
    detector = build_model(config).eval()
    torch.save({"model": detector.state_dict()}, tmp_path / "model_final.pth")
    assert any(
        "the stride in the 3x3 were taken" in words for words in load(str(tmp_path / "model_final.pth")).warnings
    )
    (tmp_path / "config.yaml").write_text(config.dump())  # as its trainer leaves it
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["INPUT"]["FORMAT"] == "BGR"
    encoder = load(str(tmp_path / "model_final.pth"))
    assert encoder.arch == "resnet50_msra" and encoder.preprocessing.channels == "BGR"
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = stages(encoder.backbone, image), detector.backbone.bottom_up(image)
    for name in ours:
        difference = (ours[name] - theirs[name]).abs().max()
        assert difference <= 1e-4 * ours[name].abs().max(), name  # frozen batch norm rounds in its own way
