"""The Python API: the numbers of the commands, to the last digit, and every refusal in words."""

import json
import subprocess
import sys
import tempfile
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import environment, in_process
from own_network import SHORT, Net, encoder, refusal

import moco_eval as me
from moco_eval.classification.task import Task
from moco_eval.config import load as configs
from moco_eval.config.classification import KnnConfig
from moco_eval.data import in_memory
from moco_eval.errors import RunFailed
from moco_eval.runtime import console

pytestmark = pytest.mark.library


@pytest.fixture
def cut_digits(monkeypatch) -> None:
    """The data set `digits` has few images, for a command and for the API alike."""
    whole = {split: in_memory.digits(split) for split in ("train", "test")}

    def few(split: str) -> me.ImageSet:
        images, count = whole[split], {"train": 60, "test": 30}[split]
        return me.ImageSet("digits", split, images.classes, images.labels[:count], "f" * 64, images.pixels[:count])

    monkeypatch.setattr(in_memory, "digits", few)
    monkeypatch.setattr("joblib.cpu_count", lambda: 1)  # processes take seconds to start


@pytest.fixture
def heard(capfd, monkeypatch):
    """What is said on both streams; the level is put back."""
    monkeypatch.setattr(console, "_level", None)
    capfd.readouterr()

    def said() -> str:
        return "".join(capfd.readouterr())

    return said


# The package


def test_the_package_is_light_and_names_its_api():
    code = (
        "import sys, time\n"
        "start = time.perf_counter()\n"
        "import moco_eval\n"
        "assert time.perf_counter() - start < 0.1, time.perf_counter() - start\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
        "assert set(moco_eval.__all__) <= set(dir(moco_eval)) and 'judge' in dir(moco_eval)\n"
        "try: getattr(moco_eval, 'jugde')\n"
        "except AttributeError as error: assert 'jugde' in str(error)\n"
        "else: raise SystemExit('no AttributeError')\n"
    )
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0


def test_features_is_the_function_and_its_room_stays_importable():
    from moco_eval import features as imported
    from moco_eval.features.cache import Features

    assert me.features is imported is sys.modules["moco_eval.api"].features
    assert Features.__module__ == "moco_eval.features.cache"


# The numbers of the commands


@pytest.mark.parametrize(
    ("kind", "protocol", "settings"),
    [
        ("knn", "digits", {}),
        ("linear", "digits", SHORT),
        ("linear", "quick", {**SHORT, "crops": 1, "workers": 0}),
        ("linear", "sweep", {"schedule": {"epochs": 1}, "learning_rates": [0.1, 1.0], "workers": 0}),
        ("logistic", "digits", {"path": {"low": 1.0, "high": 10.0, "count": 2}}),
        ("svm", "digits", {"costs": [1.0]}),
        ("finetune", "digits", {"schedule": {"epochs": 2, "milestones": [1]}, "test_every": 1}),
    ],
)
def test_same_numbers_as_the_command(kind, protocol, settings, cut_digits, capfd, monkeypatch, in_tmp):
    options = [part for override in configs.as_overrides(settings) for part in ("--set", override)]
    command = [kind, "random:resnet18_quarter", "--protocol", protocol, "--dataset", "digits", "--device", "cpu"]
    out, _ = in_process(capfd, monkeypatch, *command, *options, "--output", "command")
    ours = me.load("random:resnet18_quarter"), *me.images("digits"), f"{kind}/{protocol}"
    kept = me.judge(*ours, output="ours", device="cpu", **settings)
    scratch = in_tmp / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    files = sorted(in_tmp.rglob("*"))
    memory = me.judge(*ours, device="cpu", **settings)
    assert sorted(in_tmp.rglob("*")) == files

    records = [json.loads((in_tmp / run / "result.json").read_text()) for run in ("command", "ours")]
    assert records[1] == json.loads(json.dumps(kept.record))
    assert records[1]["environment"]["command"] is None and "moco-eval" in records[0]["environment"]["command"]
    for record in records:
        del record["environment"], record["cost"]
    assert records[0] == records[1]
    ours, theirs = ({path.name for path in Path(run).iterdir()} for run in ("ours", "command"))
    assert theirs - ours == {"log.txt"} and ours < theirs  # a program keeps no log of its host
    assert memory.metrics == kept.metrics == records[0]["metrics"]
    assert memory.interval == kept.interval == {name: tuple(ends) for name, ends in records[0]["interval"].items()}
    assert memory.deviations == kept.deviations == records[0]["deviations"] and memory.std == kept.std == {}
    for name in kept.arrays:
        np.testing.assert_array_equal(memory.arrays[name], kept.arrays[name])
    assert memory.resolved == kept.resolved
    left = json.loads(json.dumps(memory.record))
    assert {**left, "environment": None, "cost": None} == {
        **{name: value for name, value in records[0].items() if name != "health"},  # which looks at more images
        **{"environment": None, "cost": None},
    }
    assert str(kept) == str(memory) and out.startswith(f"{kept}\nchance: top1 10.00\n")  # what stands beside it


def test_a_finished_run_gives_the_same_result_and_another_is_refused(few_digits, tmp_path, monkeypatch):
    first = me.judge(encoder(), *few_digits, "knn/digits", output=tmp_path / "run")
    monkeypatch.setattr("moco_eval.classification.trials.kept", None)  # nothing is judged anew
    again = me.judge(encoder(), *few_digits, "knn/digits", output=str(tmp_path / "run"))
    assert again.record == first.record and again.resolved == first.resolved
    np.testing.assert_array_equal(again.scores, first.scores)
    np.testing.assert_array_equal(again.predictions, first.predictions)
    message = refusal(me.judge, encoder(), *few_digits, "knn/digits", output=tmp_path / "run", k=5)
    assert "holds another run: config.k is 20 there and 5 now" in message
    assert "encoder.sha256" in refusal(me.judge, encoder(1), *few_digits, "knn/digits", output=tmp_path / "run")


def test_labels_per_class_are_drawn_anew_in_each_trial(few_digits):
    result = me.judge(encoder(), *few_digits, "linear/digits", labels="5-per-class", trials=2, **SHORT)
    assert len(result.record["trials"]) == 2 and result.record["over"] == "labels"
    assert set(result.std) == {"top1", "top5"} and result.arrays["prediction"].shape == (2, 50)
    assert "2 label draws" in str(result) and "5 labels per class" in result.deviations


# What is wrong, in Python's words


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temprature": 0.1}, "unknown key 'temprature' in temprature=0.1. Did you mean 'temperature'?"),
        ({"k": object()}, "of type object, which a config cannot hold"),
        ({"temperature": float("nan")}, "temperature is nan in temperature=.nan: input should be a finite number"),
        ({"k": 0}, "k is 0 in k=0: input should be greater than 0"),
        ({"k": 1000}, "take k=150 or less"),
        ({"seed": -1}, "seed is -1"),
        ({"trials": 0}, "trials is 0; take an integer of at least 1"),
        ({"trials": True}, "trials is True"),
        ({"labels": "ten"}, "labels 'ten' is not N-per-class"),
        ({"labels": "90-per-class"}, "labels 90-per-class: class"),
        ({"labels": "1%"}, "labels 1% is a list of ImageNet's file names, which digits does not have"),
        ({"feature": "head"}, "network has no projection head"),
        ({"feature": "layer3"}, "feature 'layer3' is not a stage of Net"),
        ({"device": "tpu"}, "device 'tpu' is not a device; take auto, cpu, cuda, cuda:N or mps"),
        ({"protocol": "knn/instdsc@1"}, "protocol: no protocol 'knn/instdsc@1'. Did you mean 'knn/instdisc@1'?"),
        ({"protocol": None}, "protocol is a NoneType"),
        ({"protocol": "mine.yaml"}, "mine.yaml"),
    ],
)
def test_an_argument_that_is_wrong_is_named(settings, words, few_digits):
    assert words in refusal(me.judge, encoder(), *few_digits, **{"protocol": "knn/digits", **settings})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(few_digits):
    assert "device cuda: no CUDA device is visible here" in refusal(me.judge, encoder(), *few_digits, device="cuda")


def test_settings_are_nested_python_values(few_digits):
    typo = refusal(me.judge, encoder(), *few_digits, "linear/digits", schedule={"epoch": 1})
    assert "unknown key 'schedule.epoch' in schedule.epoch=1. Did you mean 'schedule.epochs'?" in typo
    scale = {"augmentation": {"crop_scale": (np.float64(0.5), 1)}}
    result = me.judge(encoder(), *few_digits, "linear/digits", seed=np.int64(1), **scale, **SHORT)
    assert result.resolved["config"]["augmentation"]["crop_scale"] == [0.5, 1.0]
    assert result.resolved["config"]["seed"] == 1
    assert me.judge(encoder(), *few_digits, "knn/digits", k=np.int64(3)).resolved["config"]["k"] == 3


def test_a_config_of_ones_own(few_digits, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("protocol: knn/instdisc@1\nk: 3\ntemperature: 0.1\nworkers: 0\n")
    assert (
        me.judge(encoder(), *few_digits, str(mine)).metrics
        == me.judge(encoder(), *few_digits, "knn/digits", k=3, temperature=0.1).metrics
    )


def test_what_is_no_encoder_and_no_image_set(few_digits):
    train, test = few_digits
    for call in (me.judge, me.features):
        arguments = few_digits if call is me.judge else (test,)
        assert "encoder is a Net; give what moco_eval.load or moco_eval.wrap returns" in refusal(
            call, Net(), *arguments
        )
        assert "encoder is a str" in refusal(call, "x.pth", *arguments)
    assert "test is a ndarray; give an ImageSet" in refusal(me.judge, encoder(), train, test.pixels)
    other = me.ImageSet.from_arrays(test.pixels, test.labels, classes=[*"abcdefghij"])
    assert "train and test have different classes: '0' is only in one of them" in refusal(
        me.judge, encoder(), train, other
    )
    turned = me.ImageSet.from_arrays(test.pixels, test.labels, classes=[*"1023456789"])
    assert "they are in another order" in refusal(me.judge, encoder(), train, turned)
    bare = me.ImageSet("bare", "test", (), None, "0" * 64, pixels=test.pixels)
    assert "test (bare) has no labels" in refusal(me.judge, encoder(), train, bare)
    assert "precision is 'fp16'; take fp32, tf32 or bf16" in refusal(me.features, encoder(), test, precision="fp16")


def test_a_run_that_fails_speaks_python_too(few_digits):
    with pytest.raises(RunFailed, match=r"the loss is .* a smaller optimizer.lr may help") as error:
        me.judge(
            encoder(), *few_digits, "linear/digits", optimizer={"lr": 1e38}, schedule={"epochs": 3, "milestones": [2]}
        )
    assert "--" not in str(error.value)


def test_quiet_unless_asked(few_digits, heard, tmp_path):
    sweep = {"schedule": {"epochs": 1}, "learning_rates": [0.1, 1.0], "workers": 0}
    me.judge(encoder(), *few_digits, "knn/digits", output=tmp_path / "one")
    me.judge(encoder(), *few_digits, "linear/digits", **SHORT)
    assert heard() == ""
    me.judge(encoder(), *few_digits, "linear/sweep@1", **sweep)
    assert heard().startswith("warning: the chosen learning rate") and "--" not in heard()
    me.set_verbosity("silent")
    me.judge(encoder(), *few_digits, "linear/sweep@1", **sweep)
    assert heard() == ""
    me.set_verbosity("info")
    me.judge(encoder(), *few_digits, "knn/digits", output=tmp_path / "two")
    assert f"result: {tmp_path / 'two' / 'result.json'}" in heard()
    assert "level is 'loud'; take silent, warnings or info" in refusal(me.set_verbosity, "loud")


# Results


def test_a_result_is_frozen_kept_and_read_again(few_digits, tmp_path, capfd, monkeypatch):
    result = me.judge(encoder(name="<b>&"), *few_digits, "knn/digits")
    with pytest.raises(FrozenInstanceError):
        result.record = {}
    assert result.scores.shape == (50, 10) and result.std == {}
    np.testing.assert_array_equal(result.predictions, result.scores.argmax(1))
    np.testing.assert_array_equal(result.labels, few_digits[1].labels)
    assert result.metrics["top1"] == pytest.approx(100 * (result.predictions == result.labels).mean())
    low, high = result.interval["top1"]
    assert low <= result.metrics["top1"] <= high
    assert repr(result) == f"<Result {str(result).splitlines()[0]}>"
    page = result._repr_html_()
    assert "&lt;b&gt;&amp;" in page and "<b>" not in page and "k 20 instead of 200" in page

    folder = result.save(tmp_path / "saved")
    read = me.Result.read(folder)
    assert read.record == json.loads(json.dumps(result.record)) and str(read) == str(result)
    np.testing.assert_array_equal(read.scores, result.scores)
    assert me.judge(encoder(), *few_digits, "knn/digits", output=folder).metrics == result.metrics
    assert "holds another run" in refusal(me.judge(encoder(1), *few_digits, "knn/digits").save, folder)

    other = me.judge(encoder(1), *few_digits, "knn/digits")
    place = other.save(tmp_path / "other")
    wanted = other.metrics["top1"] - result.metrics["top1"]
    said = {str(me.compare(a, b)).partition("\nB - A")[2] for a in (result, folder) for b in (other, str(place))}
    assert len(said) == 1 and me.compare(result, place).difference == pytest.approx(wanted)
    out, _ = in_process(capfd, monkeypatch, "compare", folder, place)
    assert said.pop() in out and f"B - A {wanted:+.2f}" in out


def test_what_cannot_be_compared(few_digits):
    train, test = few_digits
    result = me.judge(encoder(), *few_digits, "knn/digits")
    less = me.judge(encoder(), train, test.take(np.arange(20)), "knn/digits")
    assert "not tested on the same images: images is 50 in a (network) and 20 in b (network)" in refusal(
        me.compare, result, less
    )
    found = me.Result({"protocol": "detect/digits-r50-c4@1", "encoder": {"path": "x"}})
    assert "holds no answer to each image" in refusal(me.compare, found, result)
    assert "has no scores" in refusal(lambda: found.scores)
    assert "is no folder" in refusal(me.compare, result, "nowhere")


# Features


def test_features_are_those_of_a_task_and_are_kept_where_asked(few_digits, tmp_path):
    train, test = few_digits
    mine, seen = encoder(), []
    mine.backbone.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    array, identity = me.features(mine, test)
    task = Task(mine, train, test)
    config = configs.load("digits", "knn", KnnConfig)
    mine.backbone.eval()
    np.testing.assert_array_equal(array, task.features(test, config, torch.device("cpu")).tensor().numpy())
    assert array.shape == (50, 6) and array.dtype == np.float32
    assert identity["feature"] == "pooled" and identity["data"]["fingerprint"] == test.fingerprint
    assert identity["encoder"]["sha256"] == mine.sha256

    seen.clear()
    for _ in range(2):
        kept, same = me.features(mine, test, cache=tmp_path / "features")
        np.testing.assert_array_equal(kept, array)
        assert sum(seen) == 50 and same == identity
    with torch.no_grad():
        mine.backbone.conv.weight.mul_(-1)  # trained on: another encoder
    changed, other = me.features(mine, test, cache=tmp_path / "features")
    assert sum(seen) == 100 and other["encoder"]["sha256"] != identity["encoder"]["sha256"]
    assert not np.array_equal(changed, array)


# Detection

TINY = {
    **{"scenes": {"train": 4, "test": 2}, "schedule": {"iterations": 2, "steps": [], "warmup": 0}},
    **{"batch_size": 2, "roi": {"batch_per_image": 8}, "precise_bn": 2, "optimizer": {"lr": 0.01}},
    "input": {"min_size_train": [64], "min_size_test": 64},
}


def test_detect_leaves_nothing_unless_asked(tmp_path, monkeypatch, heard):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = torch.get_rng_state()
    result = me.detect(me.load("random:resnet18_quarter"), "digits", device="cpu", engine="torchvision", **TINY)
    assert torch.equal(before, torch.get_rng_state()) and list(tmp_path.iterdir()) == [] and heard() == ""
    assert {"AP", "AP50", "AP75"} <= set(result.metrics) and result.protocol == "detect/digits-r50-c4@1"
    assert "is a network in memory" in refusal(me.detect, encoder(), "digits")
    assert "encoder is a Net" in refusal(me.detect, Net(), "digits")
    loaded = me.load("random:resnet18_quarter")
    assert "vocc" in refusal(me.detect, loaded, "vocc")
    assert "unknown key 'schedule.iteration'" in refusal(me.detect, loaded, "digits", schedule={"iteration": 1})


# Segmentation

FEW = {
    **{"scenes": {"train": 5, "test": 2}, "schedule": {"iterations": 2, "warmup": 0}, "batch_size": 2},
    **{"views": {"crop": 64}, "test": {"window": 64, "stride": 64}},
}


def test_segment_leaves_nothing_unless_asked(tmp_path, monkeypatch, heard):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before, loaded = torch.get_rng_state(), me.load("random:resnet18_quarter")
    result = me.segment(loaded, "digits", device="cpu", **FEW)
    assert torch.equal(before, torch.get_rng_state()) and list(tmp_path.iterdir()) == [] and heard() == ""
    assert list(result.metrics) == ["mIoU", "pixel_accuracy"] and result.protocol == "segment/digits-linear@2"
    assert result.interval["mIoU"][0] <= result.interval["mIoU"][1]
    assert "is a network in memory" in refusal(me.segment, encoder(), "digits")
    assert "encoder is a Net" in refusal(me.segment, Net(), "digits")
    assert "cityscape" in refusal(me.segment, loaded, "cityscape")
    assert "unknown key 'schedule.iteration'" in refusal(me.segment, loaded, "digits", schedule={"iteration": 1})
