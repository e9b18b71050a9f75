"""Which engine is taken, and the detectron2 engine on a real detectron2."""

import importlib.util
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image

from moco_eval.config import load as configs
from moco_eval.config.detection import DetectConfig, Scenes
from moco_eval.detection import engine as engines
from moco_eval.detection import torchvision_engine
from moco_eval.detection.detect import detect
from moco_eval.detection.detector import build_detector
from moco_eval.detection.detector_names import detector_to_detectron2
from moco_eval.detection.engine import choose
from moco_eval.detection.judge import evaluate
from moco_eval.detection.task import DetectionTask, open_digits
from moco_eval.encoders.load import load
from moco_eval.errors import InputError, Interrupted, RunFailed
from moco_eval.runtime.stop import Stop

CPU = torch.device("cpu")
QUARTER = "random:resnet50_quarter"
TINY = (
    *("scenes.train=6", "scenes.test=2", "schedule.iterations=3", "schedule.steps=[2]", "schedule.warmup=1"),
    *("batch_size=2", "roi.batch_per_image=8", "precise_bn=2", "optimizer.lr=0.01", "log_every=1", "workers=0"),
)
SMALL = (
    *TINY,
    *("input.min_size_train=[96]", "input.min_size_test=96", "input.max_size=160"),
    *("rpn.post_nms_train=50", "rpn.post_nms_test=20", "test.detections=10"),
)
real = [pytest.mark.detectron2, pytest.mark.skipif(not importlib.util.find_spec("detectron2"), reason="no detectron2")]


def recipe(name="digits_r50_c4", *overrides):
    return configs.load(name, "detect", DetectConfig, overrides)


def encoder(name=QUARTER):
    return load(name, None, None, 0)


def run(output, *overrides, name="digits_r50_c4", dataset="digits", data=None):
    return detect(DetectionTask(encoder(), recipe(name, *overrides), dataset, data, engine="detectron2"), output, CPU)


# The choice


@pytest.fixture
def without(monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def within(monkeypatch):
    """As if a detectron2 were there."""
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(engines.importlib, "import_module", lambda name: object())


def test_auto_takes_torchvision_where_there_is_no_detectron2(without):
    assert choose("auto", encoder(), recipe()) == "torchvision"
    with pytest.raises(InputError, match=r"not installed; it is built from its source.* --engine torchvision"):
        choose("detectron2", encoder(), recipe())


def test_auto_takes_detectron2_where_it_can_do_it(within):
    assert choose("auto", encoder(), recipe()) == "detectron2"
    assert choose("torchvision", encoder(), recipe()) == "torchvision"


@pytest.mark.parametrize(
    "name, overrides, message",
    [
        ("random:resnet18", (), "with an FPN only"),
        ("random:resnet18_quarter", (), "own builder makes no resnet18_quarter"),
        (QUARTER, ("accumulate=2",), "one part"),
    ],
)
def test_what_detectron2_cannot_do_is_said(within, name, overrides, message):
    assert choose("auto", encoder(name), recipe("digits_r50_c4", *overrides)) == "torchvision"
    with pytest.raises(InputError, match=message):
        choose("detectron2", encoder(name), recipe("digits_r50_c4", *overrides))


def test_a_broken_install_is_said_in_one_line(within, monkeypatch):
    def broken(name):
        raise OSError("undefined symbol:\n_ZN2at")

    monkeypatch.setattr(engines.importlib, "import_module", broken)
    with pytest.raises(InputError, match=r"does not import \(undefined symbol: _ZN2at\)"):
        choose("detectron2", encoder(), recipe())


# The configuration

OFFICIAL = {
    "r50_c4_24k": {
        "MODEL.MASK_ON": False,
        "MODEL.ROI_HEADS.NUM_CLASSES": 20,
        "INPUT.MIN_SIZE_TRAIN": tuple(range(480, 801, 32)),
        "SOLVER.STEPS": (18000, 22000),
        "SOLVER.MAX_ITER": 24000,
        "SOLVER.WARMUP_ITERS": 100,
    },
    "coco_r50_c4_2x": {
        "MODEL.MASK_ON": True,
        "MODEL.ROI_HEADS.NUM_CLASSES": 80,
        "INPUT.MIN_SIZE_TRAIN": tuple(range(640, 801, 32)),
        "SOLVER.STEPS": (120000, 160000),
        "SOLVER.MAX_ITER": 180000,
    },
}
BASE = {
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 6000,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeadsExtraNorm",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.NORM": "naiveSyncBN",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "INPUT.FORMAT": "RGB",
    "INPUT.MIN_SIZE_TEST": 800,
    "TEST.PRECISE_BN.ENABLED": True,
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.BASE_LR": 0.02,
}
FREE = ("DATALOADER.NUM_WORKERS", "DATASETS", "OUTPUT_DIR", "SEED", "MODEL.DEVICE", "MODEL.WEIGHTS", "VERSION")


def flat(node, prefix=""):
    for name, value in node.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


class TestConfig:
    pytestmark = real

    @pytest.mark.parametrize("name", OFFICIAL)
    def test_resolves_to_the_official_codes_configuration_key_by_key(self, name):
        """detectron2's defaults with what the released files set: nothing else differs that a detector looks at."""
        from detectron2.config import get_cfg

        from moco_eval.detection.detectron2_config import config_of

        official = dict(flat(get_cfg())) | BASE | OFFICIAL[name]
        ours = dict(
            flat(config_of(recipe(name), encoder("random:resnet50"), OFFICIAL[name]["MODEL.ROI_HEADS.NUM_CLASSES"]))
        )
        assert ours.keys() == official.keys()
        differ = {
            key: (ours[key], official[key]) for key in ours if not key.startswith(FREE) and ours[key] != official[key]
        }
        assert differ == {}

    def test_the_supervised_baseline_keeps_msras_pixels(self):
        from dataclasses import replace

        from moco_eval.detection.detectron2_config import config_of
        from moco_eval.preprocessing import Preprocessing

        msra = replace(
            encoder("random:resnet50"),
            preprocessing=Preprocessing(mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0), channels="BGR", range=255),
        )
        cfg = config_of(recipe("r50_c4_24k"), msra, 20)
        assert (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN) == ("BGR", [103.53, 116.28, 123.675])
        assert cfg.MODEL.PIXEL_STD == [1.0, 1.0, 1.0]

    @pytest.mark.parametrize("name", ["r50_c4_24k", "voc07_r50_c4_9k", "coco_r50_fpn_1x"])
    def test_our_rate_is_that_of_detectron2s_scheduler(self, name):
        from detectron2.solver import build_lr_scheduler

        from moco_eval.detection.detectron2_config import config_of
        from moco_eval.detection.recipe import learning_rate

        settings = recipe(name)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=settings.optimizer.lr)
        scheduler = build_lr_scheduler(config_of(settings, encoder(), 3), optimizer)
        total, near = settings.schedule.iterations, {settings.schedule.warmup, *settings.schedule.steps}
        for iteration in sorted({0, 1, total // 3, total - 1, *(step + by for step in near for by in (-2, -1, 0, 1))}):
            multiplier = scheduler._multiplier(iteration / total)
            assert learning_rate(settings, iteration) == pytest.approx(settings.optimizer.lr * multiplier, rel=1e-6)

    def test_every_recipe_builds_and_takes_every_backbone_tensor(self):
        from moco_eval.detection.detectron2_config import config_of
        from moco_eval.detection.detectron2_engine import build_detector

        for name in ("r50_c4_24k", "r50_dc5_24k", "coco_r50_c4_1x", "coco_r50_fpn_1x", "coco_keypoints_r50_fpn_2x"):
            ours = encoder()
            model = build_detector(config_of(recipe(name, "bn=local"), ours, 3, 17), ours)
            assert model.roi_heads.num_classes == 3

    def test_a_tensor_without_a_place_stops(self):
        from moco_eval.detection.detectron2_config import config_of
        from moco_eval.detection.detectron2_engine import build_detector

        ours = encoder()
        ours.backbone.layer1.register_buffer("extra", torch.zeros(1))
        with pytest.raises(AssertionError, match="no place for"):
            build_detector(config_of(recipe(), ours, 3), ours)


# Whole runs


class TestRuns:
    pytestmark = real

    @pytest.fixture(scope="class")
    def whole(self, tmp_path_factory):
        output = tmp_path_factory.mktemp("d2") / "run"
        return output, run(output, *TINY)

    def test_leaves_a_whole_run_directory(self, whole):
        output, record = whole
        assert record["engine"] == "detectron2"
        assert record["equivalences"] == []
        assert record["environment"]["versions"]["detectron2"]
        assert set(record["per_class"]) == set("0123456789")
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        assert [line["iteration"] for line in lines] == [1, 2, 3]
        assert [line["lr"] for line in lines] == pytest.approx([0.0001, 0.01, 0.001])
        assert all(
            line["loss"] == pytest.approx(sum(v for k, v in line.items() if k.startswith("loss_"))) for line in lines
        )
        assert all((output / name).is_file() for name in record["pictures"])
        stray = {path.name for path in output.iterdir()} - {
            *(
                "config.yaml",
                "environment.json",
                "result.json",
                "trial.json",
                "detections.json",
                "matches.npz",
                "metrics.jsonl",
            ),
            *("checkpoints", "pictures", "scenes", "losses.svg", "per_class.svg"),
        }
        assert not stray

    def test_the_rate_that_was_used_is_the_one_that_is_logged(self, whole):
        state = torch.load(whole[0] / "checkpoints/last.pth", weights_only=True)
        assert state["finished"] and state["iteration"] == 3
        assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.001)

    def test_a_warm_up_longer_than_the_schedule_is_not_squeezed(self, tmp_path):
        run(tmp_path / "run", *TINY, "schedule.warmup=100", "schedule.steps=[]")
        lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
        expected = [0.01 * (0.01 * (1 - i / 100) + i / 100) for i in range(3)]
        assert [line["lr"] for line in lines] == pytest.approx(expected)

    def test_another_engine_is_another_run(self, whole):
        with pytest.raises(InputError, match="engine is detectron2 there and torchvision now"):
            task = DetectionTask(encoder(), recipe("digits_r50_c4", *TINY), "digits", engine="torchvision")
            detect(task, whole[0], CPU)

    def test_interrupted_and_resumed(self, tmp_path, monkeypatch):
        from moco_eval.detection import detectron2_engine

        step = detectron2_engine._Trainer.run_step

        def step_and_signal(trainer):
            if trainer.iter == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            step(trainer)

        monkeypatch.setattr(detectron2_engine._Trainer, "run_step", step_and_signal)
        with pytest.raises(Interrupted, match="iteration 2 of 3 is saved"):
            run(tmp_path / "run", *TINY)
        monkeypatch.undo()
        record = run(tmp_path / "run", *TINY)
        lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
        assert [line["iteration"] for line in lines] == [1, 2, 3]
        assert [line["lr"] for line in lines] == pytest.approx([0.0001, 0.01, 0.001])
        assert record["cost"]["images"] == 6

    def test_a_loss_that_is_not_finite_stops_the_run(self, tmp_path):
        with pytest.raises(RunFailed, match=r"iteration [123]: .*smaller optimizer.lr"):
            run(tmp_path / "run", *TINY, "optimizer.lr=1e18")

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_damaged_image_stops_in_one_line(self, tmp_path, workers):
        data = open_digits(tmp_path / "scenes", Scenes(train=6, test=2))
        for sample in data.train:  # as JPEG, whose header is whole when its end is gone
            Image.open(sample.path).save(sample.path.with_suffix(".jpg"))
            sample.path.unlink()
            jpeg = sample.path.with_suffix(".jpg").read_bytes()
            sample.path.with_suffix(".jpg").write_bytes(jpeg[: len(jpeg) // 2])
        with pytest.raises(InputError, match=r"cannot read \S+\.jpg: .*truncated.*replace") as error:
            run(tmp_path / "run", *TINY, f"workers={workers}", dataset="voc-folder", data=tmp_path / "scenes/voc")
        assert "\n" not in str(error.value)

    def test_16_bit_greys_are_refused(self, tmp_path):
        data = open_digits(tmp_path / "scenes", Scenes(train=6, test=2))
        for sample in data.train:
            Image.new("I;16", sample.size, 40000).save(sample.path)
        with pytest.raises(InputError, match=r"16-bit greys.* --engine torchvision"):
            run(tmp_path / "run", *TINY, dataset="voc-folder", data=tmp_path / "scenes/voc")

    def test_the_command_in_two_processes(self, tmp_path):
        settings = [word for one in TINY for word in ("--set", one)]
        command = ["detect", QUARTER, "--dataset", "digits", "--engine", "detectron2", "--nproc", "2", *settings]
        subprocess.run([sys.executable, "-m", "moco_eval", *command, "--output", tmp_path / "run"], check=True)
        record = json.loads((tmp_path / "run/result.json").read_text())
        assert (record["engine"], record["processes"], record["cost"]["images"]) == ("detectron2", 2, 6)
        found = json.loads((tmp_path / "run/detections.json").read_text())["images"]
        assert len(found) == 2

    def test_masks_and_shuffled_labels(self, tmp_path):
        open_digits(tmp_path / "scenes", Scenes(train=6, test=2))
        record = run(
            *(tmp_path / "run", *SMALL, "data.shuffle_labels=true"),
            name="coco_r50_fpn_1x",
            dataset="coco-folder",
            data=tmp_path / "scenes/coco",
        )
        assert {"APbb", "APmk"} <= set(record["metrics"])
        lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
        assert "loss_mask" in lines[0]

    @pytest.mark.data
    def test_keypoints_of_coco(self, tmp_path, shared_data):
        record = run(
            *(tmp_path / "run", *SMALL),
            name="coco_keypoints_r50_fpn_2x",
            dataset="coco-folder",
            data=shared_data / "coco-mini",
        )
        assert {"APbb", "APkp"} <= set(record["metrics"])
        assert set(record["per_class"]) == {"person"}


# One truth


@pytest.mark.slow
@pytest.mark.detectron2
def test_one_trained_detector_has_one_ap_on_both_engines(tmp_path):
    """Trained on our engine, judged on both."""
    pytest.importorskip("detectron2")
    from moco_eval.detection import detectron2_engine
    from moco_eval.detection.detectron2_config import config_of

    ours, settings = encoder(), recipe("digits_r50_c4")
    record = detect(DetectionTask(ours, settings, "digits", engine="torchvision"), tmp_path / "run", CPU)
    data = open_digits(tmp_path / "run/scenes", settings.scenes)
    state = torch.load(tmp_path / "run/checkpoints/last.pth", weights_only=True)["model"]
    detector = build_detector(ours, len(data.classes), settings)
    detector.load_state_dict(state)
    with Stop() as stop:
        here = evaluate(data, torchvision_engine._detect(detector, data, settings, CPU, stop))[0]
    cfg = config_of(settings, ours, len(data.classes))
    model = detectron2_engine.build_detector(cfg, ours)
    model.load_state_dict(detector_to_detectron2(state))
    there = evaluate(data, detectron2_engine.detect(model, cfg, data, settings, CPU))[0]
    print(here, there)
    assert here == pytest.approx(record["metrics"])
    assert here["AP50"] > 10
    assert all(abs(here[name] - there[name]) < 0.1 for name in here)
