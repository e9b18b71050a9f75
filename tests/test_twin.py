"""The suite's own work on the twin of a GPU: no mixing of memories, no waits, few copies. See twin.py for what it sees.

One launch of processes serves each group; what a piece of work raises is its result, so that the others are still seen.
"""

import contextlib
import json
import os
import re
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import twin
import twin_cuda
from commands import moco_eval
from PIL import Image
from ranks import run_ranks

from moco_eval.classification.judge import judge_in_memory
from moco_eval.classification.protocols import PROTOCOLS, load_config
from moco_eval.classification.task import Task
from moco_eval.config import load as configs
from moco_eval.config.detection import DetectConfig
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.data.boxes.samples import DetectionData, Sample, make_sample
from moco_eval.data.catalogue import open_images
from moco_eval.detection import torchvision_engine
from moco_eval.encoders.load import load
from moco_eval.encoders.wrap import wrap
from moco_eval.errors import InputError, Interrupted
from moco_eval.preprocessing import Preprocessing
from moco_eval.results.record import Cost
from moco_eval.runtime.device import LARGEST_PINNED, to_device
from moco_eval.runtime.rank import rank, world_size
from pretraining.plan import Plan, plan
from pretraining.profile import profile
from pretraining.train import Trainer, pretrain

STEPS = 2  # that are counted, after one that is not


def noted(work: Callable[[], Any]) -> dict[str, Any]:
    """What a piece of work returns, or its traceback; and what it cost."""
    forget()
    result, error = None, ""
    try:
        result = work()
    except Exception:
        error = traceback.format_exc()
    lines = {kind: twin.lines(kind) for kind in ("waits", "copies", "collectives")}
    return {"result": result, "error": error, "calls": twin.notes["calls"].total(), **lines}


def forget() -> None:
    for counter in twin.notes.values():
        counter.clear()


# Pretraining

SMALL = ("arch=resnet18_quarter", "views.size=32", "symmetric=false", "knn=null", "workers=0", "compile=false")
SMALL = (*SMALL, "precision=fp32", "batch_size=16", "bn_groups=2", "queue_size=64", "schedule.epochs=1", "log_every=2")
MECHANISMS: dict[str, tuple[str, ...]] = {
    "moco": (),
    "moco, symmetric": ("symmetric=true",),
    "memory bank": ("mechanism=memory_bank",),
    "end to end": ("mechanism=end_to_end", "queue_size=16"),
    "reference views": ("views.backend=reference",),
    "files": (),
    "accumulate": ("accumulate=2",),
    "bf16": ("precision=bf16",),
    "moco v3": ("mechanism=moco_v3", "hidden_dim=32", "symmetric=true", "queue_size=16"),
}
# by SGD: AdamW asks the driver whether a graph is recorded, which the twin has not
MECHANISMS["a ViT in parts"] = (*MECHANISMS["moco v3"], "arch=vit_narrow_patch8_32", "accumulate=2")
# Copies to the device in a step: images or their numbers, parameters of the augmentation, the way of a shuffle.
COPIES = {"moco": 3, "moco, symmetric": 4, "memory bank": 3, "end to end": 3, "reference views": 2, "files": 2}
COPIES |= {"accumulate": 4, "bf16": 3, "moco v3": 2, "a ViT in parts": 2}


def of(name: str, folder: Path, *settings: str) -> Plan:
    config = configs.load("digits", "pretrain", PretrainConfig, [*SMALL, *MECHANISMS[name], *settings])
    where = ("flat", folder / "images") if name == "files" else ("digits", None)
    return plan(config, *where, world_size(), twin.DEVICE)


def steps(name: str, folder: Path) -> float:
    """The loss after a few steps of the loop; the first one's notes are dropped."""
    trainer = Trainer(of(name, folder), Path(os.devnull), twin.DEVICE)
    batches = trainer.batches()
    for _ in range(1 + STEPS):
        trainer.train_step(next(batches))
        if trainer.step == 1:
            forget()
    batches.close()
    return trainer.measured.rows[-1][0].values.tolist()


def stopped_and_resumed(folder: Path) -> list[bool]:
    """Whether the weights of three steps are those of two and one more."""
    for output, stops in (("whole", (3,)), ("parts", (2, 3))):
        for step in stops:
            try:
                pretrain(of("moco", folder, f"max_steps={step}"), folder / output, twin.DEVICE)
            except Interrupted:
                continue
    one, two = (
        torch.load(folder / output / "checkpoints/last.pth", weights_only=True)["state_dict"]
        for output in ("whole", "parts")
    )
    return [torch.equal(one[name], two[name]) for name in one]


def monitored(folder: Path) -> None:
    """The kNN monitor, after an epoch."""
    run = of("moco", folder, "batch_size=512", "queue_size=1024", "knn.k=5", "knn.every=1", "knn.temperature=0.1")
    trainer = Trainer(run, Path(os.devnull), twin.DEVICE)
    trainer.monitor(trainer.model.encoder_q, twin.DEVICE)


def pretraining(folder: Path, names: list[str], more: bool) -> dict[str, dict]:
    """Steps of pretraining of these kinds and, where asked for, what belongs to a run, on this rank."""
    work: dict[str, Callable[[], Any]] = {name: lambda name=name: steps(name, folder) for name in names}
    work["large batch"] = lambda: (
        to_device(torch.zeros(LARGEST_PINNED + 1, dtype=torch.uint8).pin_memory(), twin.DEVICE).shape
    )
    if more:
        work |= run_and_resume(folder)
    results = {name: noted(each) for name, each in work.items()}
    return results | {"joined": {"nccl on": str(twin_cuda.joined)}}


def run_and_resume(folder: Path) -> dict[str, Callable[[], Any]]:
    work: dict[str, Callable[[], Any]] = {}
    work |= {"resume": lambda: stopped_and_resumed(folder), "monitor": lambda: monitored(folder)}
    work["profile"] = lambda: profile(of("files", folder), twin.DEVICE, 2).report()
    return work


CASES = {  # MoCo v3 on one rank alone: SyncBN's kernels are twin.DEVICE's own, and the twin has none
    "one rank": (1, [*MECHANISMS], True),
    "two ranks": (2, ["moco", "memory bank", "end to end", "reference views", "files"], False),
    "two ranks, more": (2, ["moco, symmetric", "accumulate", "bf16"], True),
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, id=name, marks=[pytest.mark.slow] * ("more" in name)) for name, case in CASES.items()],
)
def pretrained(request, tmp_path_factory) -> tuple[int, list[dict]]:
    ranks, names, more = request.param
    folder = tmp_path_factory.mktemp("twin")
    (folder / "images").mkdir()
    for number in range(64 + 16):
        Image.effect_noise((40, 40), 10 + number).convert("RGB").save(folder / "images" / f"{number:02}.png")
    return ranks, run_ranks(pretraining, folder, folder, names, more, ranks=ranks, device="cuda")


def test_pretraining_runs_whole_on_a_device(pretrained):
    _, ranks = pretrained
    for each in ranks:
        errors = {name: work["error"] for name, work in each.items() if work.get("error")}
        assert not errors, "\n".join(errors.values())
        assert all(np.isfinite(each[name]["result"]) for name in MECHANISMS.keys() & each.keys())
        if "resume" in each:
            assert all(each["resume"]["result"]) and "2 steps of" in each["profile"]["result"]
            assert re.search(r"waiting for the next batch +1.0 ms", each["profile"]["result"])  # an event's millisecond


def test_a_step_of_pretraining_waits_for_nothing(pretrained):
    for each in pretrained[1]:
        steps = (MECHANISMS.keys() | {"large batch"}) & each.keys()
        assert {name: each[name]["waits"] for name in steps if each[name]["waits"]} == {}


def test_a_step_of_pretraining_copies_so_often_to_the_device(pretrained):
    for each in pretrained[1]:
        for name, wanted in ((name, wanted) for name, wanted in COPIES.items() if name in each):
            copies = each[name]["copies"]
            assert sum(copies.values()) == STEPS * wanted, (name, copies)


def test_ranks_say_which_device_is_theirs(pretrained):
    number, ranks = pretrained
    for place, each in enumerate(ranks):
        if number > 1:
            assert "'nccl'" in each["joined"]["nccl on"] and f"index={place}" in each["joined"]["nccl on"]


# Classification

# of a protocol with many images, epochs or settings, what is enough
FEW = {
    # of ViTs' recipes, what a ResNet and the twin (which has no AdamW) take
    **{"drop_path": [0], "optimizer.layer_decay": [1], "pooling": ["null"], "optimizer.kind": ["sgd"]},
    **{"repeated_augmentation": [1], "mixup": ["null"], "schedule.warmup_epochs": [0]},
    **{"batch_size": [16], "workers": [0], "k": [5, [1, 5]], "schedule.epochs": [2], "crops": [1], "path.count": [2]},
    **{"costs": [[0.1, 1.0]], "shots": [[1]], "samples": [1], "drop_last": [False], "learning_rates": [[0.1, 1.0]]},
    **{"features": [["pooled", "layer3"]], "solver": ["torch"], "max_iterations": [40], "bn_groups": [1]},
}


def few(name: str, kind: str) -> Any:
    """A shipped config with the first value that fits of every key of FEW that it has."""
    overrides: list[str] = []
    for key, values in FEW.items():
        for value in values:
            with contextlib.suppress(InputError):
                load_config(name, kind, [*overrides, f"{key}={value}"])
                overrides.append(f"{key}={value}")
                break
    return load_config(name, kind, overrides)


def classification(arch: str = "resnet18_quarter") -> dict[str, dict]:
    """Every protocol, on a few images; labels of few images a class are drawn for it."""
    import joblib

    joblib.cpu_count = lambda: 1
    train, test = (open_images("digits", None, split) for split in ("train", "test"))
    encoder = load(f"random:{arch}")
    encoder = replace(encoder, head=torch.nn.Linear(encoder.feature_dim, 16))
    task = Task(encoder, train.few_labels(6, 0), test.take(np.arange(40)))
    work: dict[str, Callable[[], Any]] = {}
    for row in PROTOCOLS:
        config = few(row.name.name, row.name.kind)
        work[row.protocol] = lambda config=config: judge_in_memory(task, config, twin.DEVICE).record["metrics"]
    some = replace(task, train=train.take(np.arange(200)), labels_per_class=4, trials=2)
    work["few labels"] = lambda: judge_in_memory(some, few("quick", "linear"), twin.DEVICE).record["metrics"]
    results = {name: noted(each) for name, each in work.items()}
    own = wrap(load(f"random:{arch}").backbone.to(twin.DEVICE), Preprocessing(size=32, resize=32))
    judge_in_memory(replace(task, encoder=own), few("instdisc", "knn"), twin.DEVICE)
    layouts = {name: channels_last(net.backbone) for name, net in (("ours", encoder), ("the caller's", own))}
    return results | {"layouts": layouts}


def channels_last(backbone: torch.nn.Module) -> bool:
    return backbone.conv1.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def classified(tmp_path_factory) -> dict[str, dict]:
    (only,) = run_ranks(classification, tmp_path_factory.mktemp("twin"), ranks=1, device="cuda")
    layouts = only.pop("layouts")
    assert layouts == {"ours": True, "the caller's": False}  # of a network that is judged where it lies
    return only


def test_every_protocol_runs_on_a_device(classified):
    errors = {name: work["error"] for name, work in classified.items() if work["error"]}
    assert not errors, "\n".join(errors.values())
    assert all(0 <= value <= 100 for work in classified.values() for value in work["result"].values())


def test_a_step_of_a_classifier_waits_for_nothing_and_copies_images_and_labels(classified):
    """What is left is done once a trial or an epoch."""
    steps = ("(train_step)", "(step)", "(_move)", "(run)")
    for name in ("linear/moco-lincls@1", "linear/sweep@1", "linear/quick@1", "finetune/openselfsup-1percent@1"):
        waits = [line for line in classified[name]["waits"] if any(step in line.split(" < ")[0] for step in steps)]
        assert not waits, (name, waits)
    for name in ("linear/moco-lincls@1", "linear/sweep@1", "finetune/openselfsup-1percent@1"):
        copies = [count for line, count in classified[name]["copies"].items() if "training_loop.py" in line]
        assert sum(copies) == 2 * 2 * 4, name  # of two epochs of 60 images in batches of 16


def test_features_arrive_while_the_next_are_made(classified):
    for name, work in classified.items():
        assert not [line for line in work["waits"] if "features/" in line.split(" < ")[0] and "host" in line], name


# MPS: no float64, no pinned memory, no second stream


def on_mps(folder: Path) -> dict[str, dict]:
    """Pretraining with its monitor, stopped and resumed; every protocol; a detector with precise BN."""
    for number in range(64 + 16):
        Image.effect_noise((40, 40), 10 + number).convert("RGB").save(folder / "images" / f"{number:02}.png")
    names = ("moco", "memory bank", "end to end", "reference views", "files", "accumulate", "bf16")
    work: dict[str, Callable[[], Any]] = {name: lambda name=name: steps(name, folder) for name in names}
    work |= run_and_resume(folder) | {"C4": lambda: detector("C4", folder)}
    results = {name: noted(each) for name, each in work.items()}
    protocols = classification()
    protocols.pop("layouts")
    return results | protocols


@pytest.mark.slow
def test_no_float64_is_sent_to_mps(tmp_path):
    (tmp_path / "images").mkdir()
    (only,) = run_ranks(on_mps, tmp_path, tmp_path, ranks=1, device="mps")
    errors = {name: work["error"] for name, work in only.items() if work["error"]}
    assert not errors, "\n".join(errors.values())
    assert all(only["resume"]["result"])
    assert {"knn/instdisc@1", "logistic/lbfgs@1", "linear/moco-lincls@1", "svm/voc07@1"} <= only.keys()


# Detection

SHORT = ("schedule.iterations=2", "schedule.steps=[]", "schedule.warmup=0", "batch_size=2", "roi.batch_per_image=8")
SHORT = (*SHORT, "precise_bn=1", "optimizer.lr=0.001", "log_every=1", "workers=0", "roi.pool_size=4")
SHORT = (*SHORT, "rpn.pre_nms_train=40", "rpn.post_nms_train=20", "rpn.pre_nms_test=40", "rpn.post_nms_test=10")
DETECTORS = {
    "C4": ("digits_r50_c4",),
    "FPN": ("coco_r50_fpn_1x", "masks=false"),
    "masks": ("coco_r50_c4_1x",),
    "keypoints": ("coco_keypoints_r50_fpn_2x",),
}


def scene(number: int, folder: Path) -> Sample:
    """A square on noise, with its outline and five keypoints."""
    path = folder / f"{number}.png"
    picture = Image.effect_noise((96, 64 + 16 * number), 40).convert("RGB")
    picture.paste((200, 10, 10), (20, 20, 60, 60))
    picture.save(path)
    outline = [np.array([20.0, 20, 60, 20, 60, 60, 20, 60])]
    points = np.array([[[30.0, 30, 2], [50, 30, 2], [40, 40, 2], [30, 50, 1], [0, 0, 0]]])
    rows = [((20.0, 20.0, 60.0, 60.0), 0, False, False)]
    return make_sample(number, path, picture.size, rows, masks=[outline], keypoints=points)


def detector(name: str, folder: Path, arch: str = "resnet18_quarter") -> int:
    """Train a detector for two iterations, stop, go on and run it; how many objects it sees."""
    recipe = configs.load(DETECTORS[name][0], "detect", DetectConfig, [*SHORT, *DETECTORS[name][1:]])
    sizes = {"min_size_train": [64, 96], "min_size_test": 96, "max_size": 160}
    recipe = recipe.model_copy(update={"input": recipe.input.model_copy(update=sizes)})
    output, pictures = folder / name, folder / f"{name}_{rank()}"
    output.mkdir(exist_ok=True)
    pictures.mkdir()
    samples = [scene(number, pictures) for number in range(4)]
    classes = ("square",) if recipe.keypoints else ("square", "circle")
    keypoints = tuple("abcde") if recipe.keypoints else ()
    data = DetectionData("scenes", classes, samples[:2], samples[2:], "train", "test", "", keypoints=keypoints)
    found = [
        torchvision_engine.fine_tune_and_detect(load(f"random:{arch}"), data, longer, output, twin.DEVICE, Cost("cuda"))
        for longer in (recipe, recipe)
    ]
    return sum(len(each.boxes) for each in found[-1])


def detection(folder: Path, names: list[str]) -> dict[str, dict]:
    return {name: noted(lambda name=name: detector(name, folder)) for name in names}


@pytest.mark.parametrize(
    "names", [["C4", "FPN", "masks"], pytest.param(["keypoints"], marks=pytest.mark.slow)], ids=["boxes", "keypoints"]
)
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_detectors_run_on_a_device(names, ranks, tmp_path):
    for each in run_ranks(detection, tmp_path, tmp_path, names, ranks=ranks, device="cuda"):
        errors = {name: work["error"] for name, work in each.items() if work["error"]}
        assert not errors, "\n".join(errors.values())
        for name, work in each.items():
            copies = [count for line, count in work["copies"].items() if "fine_tune.py" in line]
            assert sum(copies) == 3 * 2 // ranks * (4 if name == "keypoints" else 3), name  # image, boxes, labels
            assert not [line for line in work["waits"] if "matching.py" in line and "new_tensor" in line], name


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_commands_and_their_processes_run_on_a_device(nproc, tmp_path, monkeypatch):
    for name, value in twin.environment(tmp_path, gpus=nproc).items():
        monkeypatch.setenv(name, value)
    small = [f"--set={setting}" for setting in SMALL if setting not in ("knn=null", "compile=false", "workers=0")]
    command = ["pretrain", "digits", "--dataset", "digits", "--output", tmp_path / "run", *small, "--set=workers=1"]
    _, err = moco_eval(*command, "--device", "cuda", "--nproc", str(nproc))
    assert "torch.compile does not work here (a twin compiles nothing" in err
    encoder = ["--dataset", "digits", "--device", "cuda", "--output", tmp_path / "linear", "--set=schedule.epochs=1"]
    out, _ = moco_eval("linear", tmp_path / "run/checkpoints/last.pth", "--protocol", "digits", *encoder)
    assert "top1" in out
    reports = [json.loads(path.read_text()) for path in tmp_path.glob("twin_*.json")]
    assert sum(any("all_reduce" in line for line in each["collectives"]) for each in reports) == nproc * (nproc > 1)
