"""detect on LVIS and on Cityscapes' instances, whole, on small folders of their layouts."""

import json

import pytest
import torch
from boxes_beyond_coco import write_cityscapes, write_lvis

from moco_eval.config import load as configs
from moco_eval.config.detection import DetectConfig
from moco_eval.detection.detect import detect, format_table
from moco_eval.detection.task import DetectionTask
from moco_eval.encoders.load import load
from moco_eval.errors import InputError

TINY = (
    *("schedule.iterations=1", "schedule.steps=[]", "schedule.warmup=0", "batch_size=2", "precise_bn=1", "workers=0"),
    *("roi.batch_per_image=8", "rpn.post_nms_train=20", "rpn.post_nms_test=10", "log_every=1"),
    *("input.min_size_train=[32]", "input.min_size_test=32", "optimizer.lr=0.001", "test.detections=4"),
)


def task(dataset, recipe, data, *overrides):
    config = configs.load(recipe, "detect", DetectConfig, (*TINY, *overrides))
    return DetectionTask(load("random:resnet18_quarter"), config, dataset, data, engine="torchvision")


def run(tmp_path, *arguments):
    asked = task(*arguments)
    record = detect(asked, tmp_path / "run", torch.device("cpu"))
    assert detect(asked, tmp_path / "run", torch.device("cpu")) == record, "a finished run is read"
    assert (tmp_path / "run" / "per_class.svg").stat().st_size and len(record["pictures"]) == 2
    return record


def test_lvis_is_trained_and_judged_by_its_rules(tmp_path, monkeypatch):
    root = write_lvis(tmp_path / "data", monkeypatch, "v0.5")
    record = run(tmp_path, "lvis-v0.5", "lvis_v05_r50_fpn_1x", root)
    assert {"APbb", "APbb50", "APmk", "APmk75", "APbb_rare", "APmk_frequent"} <= record["metrics"].keys()
    assert not {"APbb_common", "APmk_common"} & record["metrics"].keys(), "no test image shows a common class"
    assert set(record["per_class"]) == {"cup", "sink", "bow_(weapon)"}
    assert record["dataset"]["name"] == "lvis-v0.5" and record["equivalences"] == []
    assert "arch resnet18_quarter instead of resnet50" in record["deviations"]
    assert not any("data.repeat_threshold" in line or "score" in line for line in record["deviations"])


def test_cityscapes_is_trained_and_judged_by_its_script(tmp_path, monkeypatch):
    root = write_cityscapes(tmp_path / "data", monkeypatch)
    record = run(tmp_path, "cityscapes", "cityscapes_r50_fpn_24k", root)
    assert list(record["metrics"]) == ["APmk", "APmk50"] and record["per_class"]["train"]["APmk"] is None
    assert record["per_class"]["car"]["APmk"] is not None
    masks = json.loads((tmp_path / "run" / "detections.json").read_text())["images"][0]["masks"]
    assert all(mask["size"] == [64, 96] for mask in masks)


def test_cityscapes_without_masks_or_with_splits_is_refused(tmp_path, monkeypatch):
    root = write_cityscapes(tmp_path / "data", monkeypatch)
    without = task("cityscapes", "cityscapes_r50_fpn_24k", root, "masks=false")
    with pytest.raises(InputError, match="cityscapes is judged by its masks"):
        without.check(1)
    opened = task("cityscapes", "cityscapes_r50_fpn_24k", root).open()
    held = DetectionTask(without.encoder, without.config, data=opened, engine="torchvision")
    with pytest.raises(InputError, match="cityscapes is judged by its masks"):
        held.open()


def test_a_table_of_a_thousand_classes_is_of_the_means_alone():
    record = {"metrics": {"APbb": 1.0}, "std": {}, "interval": {}, "trials": [{}], "over": "finetune"}
    few = {str(place): {"APbb": 1.0} for place in range(100)}
    assert len(format_table(record | {"per_class": few}).splitlines()) == 102
    assert len(format_table(record | {"per_class": few | {"one more": {"APbb": None}}}).splitlines()) == 2
