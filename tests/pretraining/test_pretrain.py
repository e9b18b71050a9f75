"""Pretraining as a whole: its files, its checkpoints, and going on after being stopped."""

import copy
import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import ROOT, error_line, in_process, start
from PIL import Image
from torchvision import transforms

from moco_eval.config import load as configs
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.data import in_memory
from moco_eval.data.loader import Normalise
from moco_eval.encoders.architectures import build_resnet
from moco_eval.errors import InputError, Interrupted, RunFailed
from moco_eval.runtime.batch_norm import SplitBatchNorm2d
from moco_eval.runtime.device import compile_
from pretraining.mechanisms import _may_record, build_encoder
from pretraining.moco import Step
from pretraining.monitor import Monitor, OfOneSize
from pretraining.plan import plan
from pretraining.record import Measurements
from pretraining.train import Trainer, pretrain
from pretraining.views import preprocessing, two_views

FAST = ["arch=resnet18_quarter", "views.size=32", "workers=0", "log_every=7", "symmetric=false", "queue_size=256"]
CPU = torch.device("cpu")


def config(*settings: str) -> PretrainConfig:
    return configs.load("digits", "pretrain", PretrainConfig, [*FAST, "knn=null", *settings])


def run(output: Path, *settings: str) -> dict:
    last = pretrain(plan(config(*settings), "digits", None, 1), output, CPU)
    return torch.load(last, weights_only=True)


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run")
    run(output, "schedule.epochs=2", "knn={every: 2, k: 20}")
    return output


def test_a_run_leaves_what_the_design_says(two_epochs):
    expected = {"config.yaml", "environment.json", "metrics.jsonl", "tensorboard", "checkpoints", "views.png"}
    assert {path.name for path in two_epochs.iterdir()} == expected
    names = {path.name for path in (two_epochs / "checkpoints").iterdir()}
    assert names == {"epoch_0000.pth", "epoch_0001.pth", "epoch_0002.pth", "last.pth"}
    assert list((two_epochs / "tensorboard").iterdir())


def test_metrics_start_with_the_chance_level_and_end_with_knn(two_epochs):
    metrics = lines(two_epochs)
    assert metrics[0]["chance"] == pytest.approx(5.5491, abs=1e-3)  # log 257
    assert metrics[0]["queue_full_step"] == 4
    assert [line["step"] for line in metrics if "loss" in line] == [7, 14, 20, 21, 28, 35, 40]
    assert 20 < metrics[-1]["knn_top1"] <= 100
    assert {"loss", "accuracy", "lr", "feature_std", "images_per_second", "data_wait"} <= metrics[1].keys()


def test_the_checkpoint_has_the_official_layout(two_epochs):
    state = torch.load(two_epochs / "checkpoints" / "last.pth", weights_only=True)
    assert {"epoch", "arch", "state_dict", "optimizer", "step", "sampler", "config", "format"} <= state.keys()
    assert (state["epoch"], state["step"], state["format"]) == (2, 40, "moco-eval/1")
    keys = state["state_dict"].keys()
    assert {"module.queue", "module.queue_ptr"} <= keys
    assert {key.split(".")[1] for key in keys} == {"encoder_q", "encoder_k", "queue", "queue_ptr"}
    # main_lincls.py's rule: strip encoder_q's prefix, leave out fc, and exactly fc must be missing
    kept = {
        k[len("module.encoder_q.") :]: v for k, v in state["state_dict"].items() if k.startswith("module.encoder_q")
    }
    kept = {k: v for k, v in kept.items() if not k.startswith("fc")}
    found = build_resnet("resnet18_quarter").load_state_dict(kept, strict=False)
    assert set(found.missing_keys) == {"fc.weight", "fc.bias"} and not found.unexpected_keys


def test_the_optimiser_covers_both_encoders_and_moves_one(two_epochs):
    first, last = (torch.load(two_epochs / "checkpoints" / f"epoch_000{i}.pth", weights_only=True) for i in (0, 2))
    parameters = sum(1 for key in last["state_dict"] if key.endswith(("weight", "bias")))
    assert len(last["optimizer"]["param_groups"][0]["params"]) == parameters
    moved = last["state_dict"]["module.encoder_q.conv1.weight"] - first["state_dict"]["module.encoder_q.conv1.weight"]
    assert moved.abs().max() > 1e-4


def test_interrupted_anywhere_it_ends_the_same(tmp_path, monkeypatch):
    digits = in_memory.digits("train")
    few = replace(digits, pixels=digits.pixels[:640], labels=digits.labels[:640])
    monkeypatch.setattr(in_memory, "digits", lambda _: few)
    whole = run(tmp_path / "whole", "schedule.epochs=2")
    step = Trainer.train_step

    def stops_at(where):
        def train_step(self, batch):
            step(self, batch)
            if self.step == where:
                os.kill(os.getpid(), signal.SIGTERM)

        return train_step

    for where in (3, 14, 17):  # 14: with a line of metrics on its way
        monkeypatch.setattr(Trainer, "train_step", stops_at(where))
        with pytest.raises(Interrupted, match=f"SIGTERM; saved at step {where} of 20"):
            run(tmp_path / "parts", "schedule.epochs=2")
    monkeypatch.setattr(Trainer, "train_step", step)
    parts = run(tmp_path / "parts", "schedule.epochs=2")
    assert all(torch.equal(whole["state_dict"][key], parts["state_dict"][key]) for key in whole["state_dict"])
    for left, right in zip(whole["optimizer"]["state"].values(), parts["optimizer"]["state"].values()):
        assert torch.equal(left["momentum_buffer"], right["momentum_buffer"])
    timing = {"images_per_second", "data_wait"}
    plain = [
        [{k: v for k, v in line.items() if k not in timing} for line in lines(tmp_path / x)] for x in ("whole", "parts")
    ]
    assert plain[0] == plain[1]


def test_max_steps_stops_and_a_run_without_it_goes_on(tmp_path):
    with pytest.raises(Interrupted, match="max_steps reached and saved at step 5 of 20"):
        run(tmp_path, "schedule.epochs=1", "max_steps=5")
    assert torch.load(tmp_path / "checkpoints" / "last.pth", weights_only=True)["step"] == 5
    with pytest.raises(Interrupted, match="max_steps reached and saved at step 5 of 20"):
        run(tmp_path, "schedule.epochs=1", "max_steps=5")
    assert run(tmp_path, "schedule.epochs=1")["step"] == 20


def test_what_a_killed_first_save_leaves_behind_is_no_run_yet(tmp_path):
    """Killed while config.yaml, then while the untrained network was written; the run starts as if it were new."""
    (tmp_path / ".config.yaml.abc.yaml").write_text("half")
    with pytest.raises(Interrupted):
        run(tmp_path, "schedule.epochs=1", "max_steps=2")
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "last.pth").unlink()
    (checkpoints / ".last.pth.abc.pth").write_text("half")
    with pytest.raises(Interrupted):
        run(tmp_path, "schedule.epochs=1", "max_steps=2")
    assert {path.name for path in checkpoints.iterdir()} == {"epoch_0000.pth", "last.pth"}
    assert torch.load(checkpoints / "last.pth", weights_only=True)["step"] == 2


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_place(tmp_path):
    with pytest.raises(RunFailed, match=r"in epoch 0, step \d+; a smaller .* last good checkpoint is .*\(step 0\)"):
        run(tmp_path, "optimizer.lr=1e30", "schedule.epochs=1")
    state = torch.load(tmp_path / "checkpoints" / "last.pth", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    with pytest.raises(
        RunFailed, match=r"weights are not finite after step 1; .* last good checkpoint is .*\(step 0\)"
    ):
        run(tmp_path, "optimizer.lr=1e38", "optimizer.weight_decay=10", "schedule.epochs=1", "checkpoints.steps=1")
    assert torch.load(tmp_path / "checkpoints" / "last.pth", weights_only=True)["step"] == 0


def test_another_run_in_the_same_place_is_refused(two_epochs, tmp_path):
    with pytest.raises(InputError, match=r"config.optimizer.lr is 0.01 there and 0.5 now"):
        run(two_epochs, "schedule.epochs=2", "knn={every: 2, k: 20}", "optimizer.lr=0.5")
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="not one of our runs"):
        run(tmp_path, "schedule.epochs=1")
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_a_damaged_checkpoint_is_said(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, "schedule.epochs=1", "max_steps=2")
    last = tmp_path / "checkpoints" / "last.pth"
    damaged = last.read_bytes()[:5000]
    last.unlink()
    last.write_bytes(damaged)
    with pytest.raises(InputError, match="cannot be resumed from"):
        run(tmp_path, "schedule.epochs=1")


@pytest.fixture
def photos(tmp_path) -> Path:
    """96 small pictures without classes; the 5th is text."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(96):
        Image.effect_noise((40, 40), 10 + i).convert("RGB").save(folder / f"{i:03}.jpg")
    (folder / "004.jpg").write_text("no image")
    return folder


def test_an_unreadable_image_has_a_fixed_substitute_and_a_limit(photos, tmp_path, capsys):
    flat = config("batch_size=32", "schedule.epochs=2", "bn_groups=4", "views.recipe=moco_v2")
    pretrain(plan(flat, "flat", photos, 1), tmp_path / "run", CPU)
    assert capsys.readouterr().err.count("004.jpg") == 1
    images = plan(flat, "flat", photos, 1).images
    _, index, substitute, _ = two_views(images, flat).__getitems__([(0, 4), (0, 7)])
    assert (index.tolist(), substitute.tolist()) == ([4, 7], [5, -1])
    strict = flat.model_copy(update={"bad_images": 0})
    with pytest.raises(RunFailed, match="more than 0 images cannot be read"):
        pretrain(plan(strict, "flat", photos, 1), tmp_path / "strict", CPU)


def test_unreadable_images_are_counted_with_the_damage_and_each_once(photos, monkeypatch):
    """As several ranks count them: what each found since all knew of each other's; beyond the limit, exactly."""
    run = plan(config("bn_groups=4", "batch_size=32", "views.recipe=moco_v2", "bad_images=4"), "flat", photos, 1)
    run.images = replace(run.images, damaged=("a.tar", "b.tar"))
    measured, row = Measurements(run, torch.device("cpu")), Step(*torch.ones(3), torch.ones(1))
    monkeypatch.setattr("pretraining.record.union", lambda values: values | {4, 5})
    asked = []
    measured.note_unreadable([4])
    for _ in range(3):
        measured.add([row])
        measured.line(1, 0.0)()
        asked.append(measured.known)
    assert asked == [0, 0, 0]  # two damaged and one unreadable: nobody needs to be asked
    measured.together(3)
    assert measured.known == 2 and measured.unreadable == {4, 5}
    measured.add([row])
    measured.line(4, 0.0)()
    measured.note_unreadable([6])
    measured.add([row])
    with pytest.raises(RunFailed, match="more than 4 images cannot be read"):
        measured.line(5, 0.0)()


def test_an_unreadable_image_does_not_stop_the_monitor_nor_the_run(tmp_path, capfd):
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(16):
                Image.effect_noise((40, 40), 10 + i).convert("RGB").save(
                    tmp_path / "data" / split / name / f"{i:02}.jpg"
                )
    (tmp_path / "data" / "train" / "a" / "03.jpg").write_text("no image")
    settings = config("batch_size=16", "schedule.epochs=2", "knn={every: 1, k: 5}", "views.recipe=moco_v2")
    pretrain(plan(settings, "imagefolder", tmp_path / "data", 1), tmp_path / "run", CPU)
    assert "03.jpg is not an image" in capfd.readouterr().err
    assert lines(tmp_path / "run")[-1]["knn_top1"] >= 0
    assert (tmp_path / "run" / "checkpoints" / "epoch_0002.pth").is_file()


def test_a_run_without_its_last_checkpoint_does_not_start_again(two_epochs, tmp_path):
    copy = shutil.copytree(two_epochs, tmp_path / "run")
    (copy / "checkpoints" / "last.pth").unlink()
    with pytest.raises(InputError, match=r"has no last.pth; copy epoch_0002.pth there to go on"):
        run(copy, "schedule.epochs=2", "knn={every: 2, k: 20}")
    assert lines(copy) == lines(two_epochs)


@pytest.mark.parametrize(("setting", "marks"), [("compile=reduce-overhead", 1), ("compile=false", 0)])
def test_a_step_of_graphs_says_where_it_begins(setting, marks, monkeypatch, tmp_path):
    begun, asked = [], []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    monkeypatch.setattr("pretraining.mechanisms.compile_", lambda nets, device, graphs: asked.append(graphs))
    monkeypatch.setattr("moco_eval.data.augment.steps.can_compile", lambda device: False)
    started = plan(config(setting, "batch_size=32"), "digits", None, 1)
    assert ("as CUDA graphs" in started.describe()) == bool(marks)
    assert not any("compile" in deviation for deviation in started.deviations)
    trainer = Trainer(started, tmp_path, CPU)
    trainer.train_step(next(trainer.batches()))
    assert (len(begun), asked) == (marks, [True] * marks)


def test_graphs_hold_no_exchange_inside_an_encoder(monkeypatch, capfd):
    started = plan(config("compile=reduce-overhead", "bn=sync"), "digits", None, 1)
    assert _may_record(started)
    monkeypatch.setattr("pretraining.mechanisms.world_size", lambda: 2)
    assert not _may_record(started) and "bn sync exchanges" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("precision=bf16", "precision bf16 instead of fp32"),
        ("precision=tf32", "precision tf32 instead of fp32"),
        ("bn=none", "bn none on 1 process"),
        ("bn=shuffle", "bn shuffle on 1 process"),
        ("bn_groups=2", "batch norm in 2 groups instead of 8"),
    ],
)
def test_what_may_move_a_number_is_a_deviation(setting, words):
    assert any(words in deviation for deviation in plan(config(setting), "digits", None, 1).deviations)


def command(output: Path, epochs: int = 3) -> list:
    settings = [f"--set={setting}" for setting in [*FAST, "knn=null", f"schedule.epochs={epochs}"]]
    return ["pretrain", "digits", "--dataset", "digits", "--output", output, *settings]


def wait_for(path: Path, process, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_command_saves_and_exits_3(number, tmp_path, capfd, monkeypatch):
    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda *given: (step(*given), os.kill(os.getpid(), number)))
    _, err = in_process(capfd, monkeypatch, *command(tmp_path / "run"), code=3)
    assert f"stopped by {signal.Signals(number).name}; saved at step 1 of 60" in err and "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_exits_3(tmp_path, number):
    process = start(*command(tmp_path / "run", epochs=50))
    wait_for(tmp_path / "run" / "checkpoints" / "epoch_0001.pth", process)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 3, err
    assert f"stopped by {signal.Signals(number).name}; saved at step" in err and "Traceback" not in err


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capfd, monkeypatch):
    out, _ = in_process(capfd, monkeypatch, *command(tmp_path / "run"), "--dry-run")
    assert "chance level of the loss: 5.5491; the queue is filled after 4 steps" in out
    assert not (tmp_path / "run").exists()


def test_batch_size_carries_the_learning_rate_along(tmp_path, capfd, monkeypatch):
    out, err = in_process(capfd, monkeypatch, *command(tmp_path / "run"), "--batch-size", "128", "--dry-run")
    assert "batch 128, lr 0.02" in out
    assert "--batch-size 128 instead of 64: lr 0.02 instead of 0.01" in err


def test_batch_size_carries_the_dictionary_of_end_to_end_along(tmp_path, capfd, monkeypatch):
    settings = ("--set=mechanism=end_to_end", "--set=queue_size=64")
    out, err = in_process(capfd, monkeypatch, *command(tmp_path / "run"), *settings, "--batch-size", "128", "--dry-run")
    assert "end-to-end, K 128 (the batch)" in out
    assert "lr 0.02 instead of 0.01, K 128 instead of 64" in err


@pytest.mark.parametrize(
    "settings", [("queue_size=200",), ("mechanism=end_to_end", "queue_size=128"), ("accumulate=3",)]
)
def test_batch_size_is_checked_with_what_it_carries_along_not_before(tmp_path, capfd, monkeypatch, settings):
    batch = "129" if settings == ("accumulate=3",) else "128"
    given = [f"--set={setting}" for setting in ("bn=none", *settings)]
    in_process(capfd, monkeypatch, *command(tmp_path / "run"), *given, "--batch-size", batch, "--dry-run")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("mechanism=end_to_end",), "queue_size 256 is not the dictionary of mechanism end_to_end, whose K is the 64"),
        (("mechanism=memory_bank", "symmetric=true"), "symmetric is MoCo's option; mechanism memory_bank has one"),
        (("accumulate=3",), "accumulate 3 does not divide batch_size 64"),
        (("queue_size=63",), "queue_size 63 holds less than one step's 64 keys"),
        (("accumulate=16", "bn=split"), "a batch of 4 per process does not divide into 8 BN groups"),
        (("mechanism=memory_bank", "batch_size=1297", "bn=none"), "draws its negatives outside the batch"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(settings, words):
    with pytest.raises(InputError) as refused:
        plan(config("bn_groups=8", *settings), "digits", None, 1)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("queue_size=200",), "queue_size 200 is not a multiple of the 64 keys of a step: the queue wraps around"),
        (("queue_size=65536",), "the 400 steps of the schedule never fill the queue of 65536"),
        (("mechanism=end_to_end", "accumulate=2", "queue_size=32"), "a query meets the 31 other keys of its part"),
        (("bn=shuffle",), "bn: shuffle on one process protects nothing"),
    ],
)
def test_what_may_not_be_meant_is_said(settings, words):
    run = plan(config(*settings), "digits", None, 1)
    assert any(words in warning for warning in run.warnings) and f"warning: {run.warnings[0]}" in run.describe()
    assert not plan(config("queue_size=256"), "digits", None, 1).warnings


def test_end_to_end_may_scale_its_batch_and_nothing_else_may():
    scaled = ("batch_size=128", "queue_size=128", "views.recipe=moco_v2", "views.size=224", "bn_groups=8")
    rates = ("optimizer.lr=0.015", "optimizer.weight_decay=1e-4")
    ours = plan(config("mechanism=end_to_end", *scaled, *rates), "digits", None, 1)
    assert not any("batch_size" in words or "lr" in words for words in ours.deviations)
    moco = plan(config(*scaled, *rates), "digits", None, 1)
    assert "batch_size 128 instead of 256" in moco.deviations
    other = plan(config("mechanism=end_to_end", *scaled, "optimizer.lr=0.03"), "digits", None, 1)
    assert "batch_size 128 instead of 256" in other.deviations


def test_sync_and_accumulation_are_deviations_of_their_own():
    assert (
        "bn sync on 2 process(es), which does not protect from leaking"
        in plan(config("bn=sync"), "digits", None, 2).deviations
    )
    assert "accumulate 2 instead of 1" in plan(config("accumulate=2", "bn_groups=8"), "digits", None, 1).deviations


def test_views_are_normalised_on_the_device_to_the_same_bits():
    run = plan(config(), "digits", None, 1)
    view = two_views(run.images, run.config).__getitems__([(0, 3)])[0][0, 0]
    expects = preprocessing(run.config.views)
    picture = transforms.functional.to_pil_image(view)
    expected = transforms.functional.normalize(transforms.functional.to_tensor(picture), expects.mean, expects.std)
    assert view.dtype == torch.uint8
    assert torch.equal(Normalise(expects)(view[None])[0], expected)


@pytest.mark.slow
def test_compiled_networks_keep_their_names_and_their_values():
    """Where there is a compiler; otherwise it is said, and nothing changes."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), SplitBatchNorm2d(8, 2), torch.nn.ReLU())
    images, names = torch.randn(4, 3, 8, 8), list(net.state_dict())
    plain = copy.deepcopy(net)
    compile_([net], CPU)
    assert torch.allclose(net(images), plain(images), atol=1e-5) and list(net.state_dict()) == names
    assert torch.allclose(net[1].running_var, plain[1].running_var, atol=1e-6)


def test_the_three_files_are_short():
    """To understand MoCo pretraining one opens three files; what else belongs to it lies beside them."""
    paths = [ROOT / "pretraining" / name for name in ("moco.py", "views.py", "train.py")]
    assert sum(len(path.read_text().splitlines()) for path in paths) < 500


def test_mistakes_of_the_command_line_are_one_line(capfd, monkeypatch):
    assert "needs --dataset; for example" in error_line(capfd, monkeypatch, "pretrain", "digits")
    assert "Did you mean 'digits'" in error_line(capfd, monkeypatch, "pretrain", "digit", "--dataset", "digits")
    assert "--data /nowhere does not exist" in error_line(
        capfd, monkeypatch, "pretrain", "cifar10", "--dataset", "flat", "--data", "/nowhere"
    )
    assert "cannot write" in error_line(capfd, monkeypatch, *command(Path("/proc/run")))


# The monitor, compiled


def small_monitor(*settings: str) -> tuple[Monitor, torch.nn.Module]:
    """Of 257 and 100 images, whose batches are of 256, 1 and 100; and a network to look at."""
    started = plan(config("knn={every: 1, k: 20}", *settings), "digits", None, 1)
    monitor = Monitor(started)
    monitor.splits = tuple(
        replace(split, pixels=split.pixels[:count], labels=split.labels[:count])
        for split, count in zip(monitor.splits, (257, 100))
    )
    torch.manual_seed(0)
    return monitor, build_encoder(started.config, "none").to(memory_format=torch.channels_last)


def test_a_smaller_batch_is_filled_in_its_own_order_of_bytes():
    sizes, net = [], OfOneSize(torch.nn.Identity())
    net.net.register_forward_pre_hook(lambda _, given: sizes.append((len(given[0]), given[0].stride())))
    for rows in (8, 3, 8):
        images = torch.rand(rows, 3, 4, 4).to(memory_format=torch.channels_last)
        assert torch.equal(net(images), images)
    assert sizes == [(8, (48, 1, 12, 3))] * 3


@pytest.mark.slow
def test_two_monitors_and_training_compile_two_variants():
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    monitor, net = small_monitor("compile=true")
    net.compile(backend="eager")
    try:
        for _ in range(2):
            for _ in range(2):
                net.train()(torch.randn(32, 3, 32, 32)).sum().backward()
            monitor(net, CPU)
        net.train()(torch.randn(32, 3, 32, 32)).sum().backward()
        assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("feature", ["pooled", "head"])
def test_added_rows_change_no_score(feature):
    scores = []
    for setting in ("compile=true", "compile=false"):
        monitor, net = small_monitor(setting, f"knn.feature={feature}")
        head = net.fc
        scores.append(monitor(net, CPU))
        assert net.training and net.fc is head
    assert scores[0] == scores[1]


def test_graphs_are_not_recorded_for_the_monitor():
    monitor, net = small_monitor("compile=reduce-overhead")
    stances = []
    net.register_forward_pre_hook(lambda *_: stances.append(torch._dynamo.eval_frame._stance.stance))
    monitor(net, CPU)
    assert set(stances) == {"force_eager"} and torch._dynamo.eval_frame._stance.stance == "default"
