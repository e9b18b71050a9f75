"""Our converted file in a real detectron2: every backbone tensor taken, and the same activations."""

import pytest
import torch

from moco_eval.encoders.build import build_resnet
from moco_eval.encoders.export import convert, detectron2_name

pytestmark = pytest.mark.detectron2


@pytest.fixture(scope="module")
def detectron2():
    return pytest.importorskip("detectron2", reason="detectron2 is not installed; build it from its source")


@pytest.fixture(scope="module")
def moco(tmp_path_factory):
    """An official-layout checkpoint of a ResNet-50 with lively BN statistics, and its converted file."""
    torch.manual_seed(0)
    net = build_resnet("resnet50", num_classes=128)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1)
    folder = tmp_path_factory.mktemp("moco")
    state = {f"module.encoder_q.{name}": tensor for name, tensor in net.state_dict().items()}
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": state}, folder / "moco.pth.tar")
    convert(str(folder / "moco.pth.tar"), folder / "moco.pkl", "detectron2")
    return net.eval(), folder / "moco.pkl"


@pytest.fixture(scope="module")
def detector(detectron2, moco):
    """Faster R-CNN R50-C4 with the official MoCo settings, loaded by detectron2's own checkpointer."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    settings = get_cfg()
    settings.MODEL.DEVICE = "cpu"
    settings.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    settings.MODEL.RPN.PRE_NMS_TOPK_TEST = 6000
    settings.MODEL.ROI_HEADS.NAME = "Res5ROIHeads"
    settings.MODEL.ROI_HEADS.NUM_CLASSES = 20
    settings.MODEL.BACKBONE.FREEZE_AT = 0
    settings.MODEL.RESNETS.NORM = "BN"
    settings.MODEL.RESNETS.STRIDE_IN_1X1 = False
    settings.INPUT.FORMAT = "RGB"
    model = build_model(settings)
    DetectionCheckpointer(model).load(str(moco[1]))
    return model.eval()


def test_every_backbone_tensor_is_taken(detector, moco):
    ours = {
        detectron2_name(name): tensor for name, tensor in moco[0].state_dict().items() if not name.startswith("fc.")
    }
    theirs = detector.state_dict()
    taken = 0
    for name, tensor in ours.items():
        place = f"roi_heads.{name}" if name.startswith("res5") else f"backbone.{name}"
        if name.endswith("num_batches_tracked") and place not in theirs:
            continue
        assert torch.equal(theirs[place], tensor), name
        taken += 1
    in_the_model = [name for name in theirs if name.startswith(("backbone.", "roi_heads.res5."))]
    assert taken == len(in_the_model)


def test_activations_are_torchvisions(detector, moco):
    net = moco[0]
    image = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x = net.maxpool(net.relu(net.bn1(net.conv1(image))))
        ours = {"stem": x}
        for stage in range(1, 5):
            x = getattr(net, f"layer{stage}")(x)
            ours[f"res{stage + 1}"] = x
        y = detector.backbone.stem(image)
        theirs = {"stem": y}
        for name in ("res2", "res3", "res4"):
            y = getattr(detector.backbone, name)(y)
            theirs[name] = y
        theirs["res5"] = detector.roi_heads.res5(y)
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=1e-5 * ours[name].abs().max().item()), name
