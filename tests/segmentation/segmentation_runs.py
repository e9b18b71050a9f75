"""Small encoders, recipes and runs that the tests of segmentation share."""

import torch

from moco_eval.config import load as configs
from moco_eval.config.segmentation import SegmentConfig
from moco_eval.encoders.architectures import architecture, build_backbone
from moco_eval.encoders.encoder import Encoder
from moco_eval.segmentation.segment import segment
from moco_eval.segmentation.task import SegmentationTask

CPU = torch.device("cpu")
TINY = (
    *("scenes.train=5", "scenes.test=3", "schedule.iterations=3", "schedule.warmup=0", "batch_size=2", "log_every=1"),
    *("views.crop=65", "optimizer.lr=0.01"),
)
STEPS = {"digits_fcn16s": (), "digits_linear": ("test.window=65", "test.stride=40")}


def encoder(arch="resnet18_quarter", seed=0):
    torch.manual_seed(seed)
    net = build_backbone(arch, fork=False).eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
    return Encoder(
        source=f"random:{arch}",
        run_name=f"random-{arch}",
        arch=arch,
        backbone=net,
        feature_dim=architecture(arch).feature_dim,
        head=None,
        origin="random",
        sha256=f"{seed:064d}",
        tensors_loaded=len(net.state_dict()),
    )


def recipe(name="digits_fcn16s", *overrides):
    return configs.load(name, "segment", SegmentConfig, overrides)


def tiny(name="digits_fcn16s", *overrides):
    return recipe(name, *TINY, *STEPS[name], *overrides)


def run(output, *overrides, name="digits_fcn16s", dataset="digits", data=None, trials=1, **options):
    task = SegmentationTask(encoder(**options), tiny(name, *overrides), dataset, data, trials=trials)
    return segment(task, output, CPU)
