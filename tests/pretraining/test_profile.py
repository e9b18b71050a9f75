"""What limits a run: the words for each case, and the command that measures it."""

import itertools
import os
from pathlib import Path

import pytest
import torch
from commands import error_line, in_process

from moco_eval.config import load as configs
from moco_eval.config.pretrain import PretrainConfig
from pretraining.bottleneck import Parts
from pretraining.feed import Feed
from pretraining.plan import plan
from pretraining.record import Waiting
from pretraining.train import Trainer

BALANCED = {
    "device": "a GPU",
    "images": 256,
    "steps": 100,
    "loop": 0.105,
    "waiting": 0.002,
    "training": 0.095,
    "augmentation": 0.005,
    "launching": 0.03,
    "copies": 0.003,
    "collectives": 0.0,
    "worker": 0.002,
    "decoding": 0.0015,
    "workers": 8,
}


def parts(**changes: float) -> Parts:
    return Parts(**{**BALANCED, **changes})


def test_the_cores_a_device_needs_are_its_rate_times_the_seconds_of_an_image():
    assert parts().cores == 6  # 256 images / 0.1 s * 0.002 s = 5.12
    assert (
        "One core makes views of 500 images/s, so this device needs 6 loader processes; there are 8."
        in parts().report()
    )


def test_a_busy_device_is_limited_by_the_model():
    said = parts().advice()
    assert said[-1].startswith("The model is the bottleneck") and not any(
        "loader is the bottleneck" in words for words in said
    )
    assert said[0] == "2438 images/s; the training device alone would take 2560."


def test_a_device_that_is_done_as_soon_as_the_host_is_waits_for_launches():
    assert (
        parts(launching=0.09)
        .advice()[-1]
        .startswith("Launching is the bottleneck: the host takes 90.0 ms to give the device")
    )
    assert not any("Launching" in sentence for sentence in parts(launching=0.09, loop=0.3, waiting=0.2).advice())
    assert parts(launching=0.0).advice()[-1].startswith("The model is the bottleneck")  # a CPU


def test_a_starved_device_names_the_loader_and_what_it_needs():
    said = parts(loop=0.3, waiting=0.2, workers=2).advice()
    assert "mostly decoding (75 % of it)" in said[-1] and "Take --workers 6" in said[-1]
    assert "mostly cutting and augmenting" in parts(loop=0.3, waiting=0.2, workers=2, decoding=0.0005).advice()[-1]
    assert "Tar shards" in parts(loop=0.3, waiting=0.2).advice()[-1]
    assert "other programs share this machine" in parts(loop=0.3).advice()[-1]


def test_augmentation_and_exchanges_are_named_from_a_tenth_on():
    assert any("Augmentation takes 24 %" in words for words in parts(augmentation=0.03, loop=0.125).advice())
    assert any("Exchanges between processes would take 20 %" in words for words in parts(collectives=0.02).advice())


def test_data_in_memory_needs_no_loader():
    report = parts(worker=0.0, decoding=0.0).report()
    assert "loader" not in report


def test_a_gpu_waits_until_the_images_are_there_and_a_cpu_until_it_has_made_the_views(monkeypatch):
    """Events of a clock that moves by a second at each look."""
    clock = itertools.count(10)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock)

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)

    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("pretraining.record.time.perf_counter", lambda: next(clock))
    for device, seconds in (("cuda", 3), ("cpu", 6)):
        waiting = Waiting(torch.device(device))
        for _ in range(3):
            waiting.begin()
            if device == "cpu":
                next(clock)  # the views are made
            waiting.images_there()
            waiting.batch_there()
        assert waiting.take()() == seconds and waiting.take()() == 0


def test_images_are_said_to_be_there_before_anything_is_done_to_them(monkeypatch):
    small = ("arch=resnet18_quarter", "views.size=32", "batch_size=8", "knn=null", "queue_size=64")
    run, order = plan(configs.load("digits", "pretrain", PretrainConfig, small), "digits", None, 1), []
    feed = Feed(run, torch.device("cpu"), lambda: order.append("there"))
    made = feed.views.of_pixels
    monkeypatch.setattr(feed.views, "of_pixels", lambda *arguments: order.append("made") or made(*arguments))
    next(feed(0))
    assert order == ["there", "made"]


@pytest.mark.parametrize("data", ["memory", "files", "reference"])
@pytest.mark.slow
def test_profile_says_what_limits_and_keeps_nothing(data, tmp_path, capfd, monkeypatch):
    from PIL import Image

    for i in range(40):
        Image.effect_noise((40, 40), 10 + i).convert("RGB").save(tmp_path / f"{i}.jpg")
    (tmp_path / "3.jpg").write_text("no image")
    where = ["--dataset", "flat", "--data", tmp_path] if data == "files" else ["--dataset", "digits"]
    backend = "reference" if data == "reference" else "device"
    small = ["arch=resnet18_quarter", "views.size=32", "views.recipe=moco_v2", "bn_groups=2", "knn=null", "workers=0"]
    settings = [
        f"--set={setting}" for setting in (*small, "queue_size=64", "schedule.epochs=3", f"views.backend={backend}")
    ]
    output = tmp_path / "run"
    command = ["pretrain", "digits", *where, "--output", output, "--batch-size", "8", *settings, "--profile", "5"]
    out, _ = in_process(capfd, monkeypatch, *command)
    assert (
        "5 steps of 8 images on the CPU" in out
        and "training, batch in place" in out
        and "images/s; the training" in out
    )
    assert ("One core makes views of" in out) == (data != "memory")
    assert not output.exists()
    short = error_line(capfd, monkeypatch, *command[:-1], "5000")
    assert "--profile 5000 runs 5500 steps (500 to warm up), the schedule has" in short


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", ["false", "true", "reduce-overhead"])
@pytest.mark.parametrize("data", ["memory", "files"])
def test_a_step_on_a_gpu_waits_for_nothing(data, compiled, tmp_path):
    """Every copy and every reading of a metric runs beside the host, which torch checks; views are a CPU's."""
    from PIL import Image

    for i in range(256):
        Image.effect_noise((40, 40), 10 + i).convert("RGB").save(tmp_path / f"{i:03}.jpg")
    small = ("arch=resnet18_quarter", "views.size=32", "views.recipe=moco_v2", "knn=null", "queue_size=64")
    settings = (*small, f"compile={compiled}", "batch_size=32", "workers=1")
    config, device = configs.load("digits", "pretrain", PretrainConfig, settings), torch.device("cuda")
    where = ("digits", None) if data == "memory" else ("flat", tmp_path)
    run = plan(config, *where, 1, device)
    trainer = Trainer(run, Path(os.devnull), device)
    batches, coming = trainer.batches(), None
    try:
        for step, batch in zip(range(40), batches):
            torch.cuda.set_sync_debug_mode("error" if step > 30 else "default")
            trainer.train_step(batch)
            if coming is not None:
                assert coming()["loss"] > 0
            coming = trainer.measured.line(trainer.step, 0.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ours = next(Feed(run, device)(0))[0].view_q.cpu().int()
    difference = (ours - next(Feed(run, torch.device("cpu"))(0))[0].view_q.int()).abs().float()
    assert difference.mean() < 0.05
