"""The whole path on built-in real data: pretrain, kNN, linear, detection, report. Every step is the ordinary one.

Only the command line and this walk know both packages; `pretraining` is imported when the walk begins.
"""

import time
from pathlib import Path

from moco_eval.classification.judge import judge
from moco_eval.classification.protocols import load_config
from moco_eval.classification.task import Task
from moco_eval.config import load as configs
from moco_eval.config.detection import DetectConfig
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.data.catalogue import open_splits
from moco_eval.detection.detect import detect
from moco_eval.detection.task import DetectionTask
from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.load import load
from moco_eval.report.page import write_report
from moco_eval.report.text import table
from moco_eval.results.run_directory import hold
from moco_eval.runtime.console import log
from moco_eval.runtime.launch import processes

FEW, DRAWS = 10, 5  # labels per class in the few-label regime, and how often they are drawn


def run(output: Path, device: str) -> str:
    """Write runs and report.html below `output`; running it again goes on where it stopped. Returns the table."""
    from pretraining.plan import plan
    from pretraining.train import pretrain

    started = time.perf_counter()
    with processes(device) as chosen, hold(output):
        log("1/5 pretrain: MoCo on 1,297 handwritten digits, labels unused")
        recipe = configs.load("digits", "pretrain", PretrainConfig)
        last = pretrain(plan(recipe, "digits", None, 1), output / "pretrain", chosen)
        encoders = {
            "moco": load(str(last)),
            "random": load(str(last.with_name("epoch_0000.pth"))),  # the same network before training
            "pixels": load("pixels"),
        }
        _classify(encoders, output, chosen)
        log("5/5 detection: Faster R-CNN R50-C4 layout on scenes of digits")
        scenes = configs.load("digits_r50_c4", "detect", DetectConfig)
        for name in ("moco", "random"):
            task = DetectionTask(encoders[name], scenes, "digits", output / "scenes", engine="torchvision")
            detect(task, output / f"detect-{name}", chosen)
        write_report([output], output / "report.html")
    log(f"done in {(time.perf_counter() - started) / 60:.1f} minutes: open {output / 'report.html'}")
    return table([output])


def _classify(encoders: dict[str, Encoder], output: Path, device) -> None:
    training, test = open_splits("digits", None)
    log(f"2/5 kNN of {', '.join(encoders)}")
    nearest = load_config("digits", "knn")
    for name, encoder in encoders.items():
        judge(Task(encoder, training, test), nearest, output / f"knn-{name}", device)
    log(f"3/5 linear, {FEW} labels per class, {DRAWS} draws")
    few = load_config("digits_few", "linear")
    for name, encoder in encoders.items():
        task = Task(encoder, training, test, labels_per_class=FEW, trials=DRAWS)
        judge(task, few, output / f"linear-{FEW}-{name}", device)
    log("4/5 linear, all labels")
    everything = load_config("digits", "linear")
    for name, encoder in encoders.items():
        judge(Task(encoder, training, test), everything, output / f"linear-{name}", device)
