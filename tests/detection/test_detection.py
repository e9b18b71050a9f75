"""The recipe, the engine and the whole of `detect` on a few scenes."""

import dataclasses
import json
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from commands import error_line, in_process, start
from PIL import Image
from torch import nn
from torch.nn.utils import parameters_to_vector

from moco_eval.config import load as configs
from moco_eval.config.detection import DetectConfig, Scenes
from moco_eval.config.fine_tuning import rescaled
from moco_eval.data.boxes.samples import DetectionData, make_sample
from moco_eval.detection import fine_tune, inputs, torchvision_engine
from moco_eval.detection.average_precision import Detections
from moco_eval.detection.detect import _judge, _mean_per_class, detect, format_table, plan
from moco_eval.detection.detector import build_detector
from moco_eval.detection.fine_tune import optimizer_for
from moco_eval.detection.recipe import PROTOCOLS, is_on, learning_rate, recipe_deviations
from moco_eval.detection.task import DetectionTask, open_digits
from moco_eval.detection.torchvision_engine import on_disk
from moco_eval.encoders.architectures import architecture, build_backbone
from moco_eval.encoders.encoder import Encoder
from moco_eval.errors import InputError, Interrupted, RunFailed
from moco_eval.preprocessing import Preprocessing
from moco_eval.results.record import Cost
from moco_eval.runtime import stop

CPU = torch.device("cpu")
TINY = (
    *("scenes.train=4", "scenes.test=2", "schedule.iterations=3", "schedule.steps=[]", "schedule.warmup=0"),
    *("batch_size=2", "roi.batch_per_image=8", "precise_bn=2", "optimizer.lr=0.01", "log_every=1"),
    *("input.min_size_train=[64,96]", "input.min_size_test=96", "input.flip=0.5"),
)


def encoder(arch="resnet18_quarter", seed=0):
    torch.manual_seed(seed)
    net = build_backbone(arch)
    with torch.no_grad():
        net.bn1.running_mean.uniform_()
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


def recipe(name="digits_r50_c4", *overrides):
    return configs.load(name, "detect", DetectConfig, overrides)


def run(output, *overrides, dataset="digits", data=None, trials=1, **options):
    config = recipe("digits_r50_c4", *TINY, *overrides)
    task = DetectionTask(encoder(**options), config, dataset, data, engine="torchvision", trials=trials)
    return detect(task, output, CPU)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    output = tmp_path_factory.mktemp("detect") / "run"
    return output, run(output)


def same_weights(output, other):
    one, two = (torch.load(run / "checkpoints/last.pth", weights_only=True)["model"] for run in (output, other))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# Data that a recipe makes nothing of


def boxes_folder(root, *sizes, mark="0"):
    """A VOC folder: the first image is trained on, the others are for testing; sizes in pixels."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    noise = np.random.default_rng(0)
    for number, (width, height) in enumerate(sizes):
        Image.fromarray(noise.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(
            root / f"JPEGImages/{number}.png"
        )
        corners = f"<xmin>0</xmin><ymin>0</ymin><xmax>{width}</xmax><ymax>{min(height, 40)}</ymax>"
        item = (
            f"<object><name>cat</name><difficult>{mark if number else 0}</difficult><bndbox>{corners}</bndbox></object>"
        )
        (root / f"Annotations/{number}.xml").write_text(f"<annotation>{item}</annotation>")
    (root / "ImageSets/Main/train.txt").write_text("0\n")
    (root / "ImageSets/Main/val.txt").write_text("".join(f"{number}\n" for number in range(1, len(sizes))))
    return root


@pytest.mark.parametrize(
    "sizes, mark, words",
    [
        ([(60, 50), (1, 3000)], "0", "1 of 2 images are too long and thin: .*1.png of 1x3000 pixels has a side of 0"),
        ([(3000, 1), (60, 50)], "0", "1 of 2 images are too long and thin: .*0.png of 3000x1 pixels has a side of 0"),
        ([(60, 50), (1, 20000), (20000, 1)], "0", "2 of 3 images are too long and thin: .*1.png of 1x20000 pixels"),
        ([(60, 50), (60, 50)], "1", "none of the 1 test images of val has an object that counts"),
    ],
)
def test_data_that_a_recipe_makes_nothing_of_are_refused_before_anything_is_written(
    tmp_path, capfd, monkeypatch, sizes, mark, words
):
    folder = boxes_folder(tmp_path / "boxes", *sizes, mark=mark)
    run = ("detect", "random:resnet18_quarter", "--dataset", "voc-folder", "--data", folder, "--recipe", "r50_c4_24k")
    for more in (("--dry-run",), ()):  # a broken check must not start to train
        assert re.search(words, error_line(capfd, monkeypatch, *run, "--output", tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_an_image_of_one_pixel_after_resizing_is_trained_on_and_judged(tmp_path):
    """The thinnest that is taken: 96 pixels at most, so 1 x 150 becomes 1 x 96."""
    folder = boxes_folder(tmp_path / "boxes", (1, 150), (150, 1), (60, 50))
    record = run(tmp_path / "run", "input.max_size=96", dataset="voc-folder", data=folder)
    assert 0 <= record["metrics"]["AP50"] <= 100


def test_the_test_images_are_warned_of_at_the_start(tmp_path, capfd):
    """A copy under another name of a training image, and more objects than the recipe lets the detector find."""
    folder = boxes_folder(tmp_path / "boxes", (60, 50), (60, 50), (64, 50))
    shutil.copy(folder / "JPEGImages/0.png", folder / "JPEGImages/2.png")
    item = "<object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>30</xmax><ymax>9</ymax></bndbox></object>"
    (folder / "Annotations/2.xml").write_text(f"<annotation>{item * 21}</annotation>")
    task = DetectionTask(encoder(), recipe(), "voc-folder", folder, engine="torchvision")
    text, err = plan(task, tmp_path / "run"), capfd.readouterr().err
    assert err.count("warning: 1 of 2 test images are also trained on") == 1
    assert "warning: 1 of 2 test images have more objects (up to 21) than test.detections 20" in err
    assert "differs from detect/digits-r50-c4@1: 1 of 2 test images are also trained on" in text


# Recipes


def test_every_protocol_has_its_config_and_no_deviation_from_itself():
    for protocol, meaning in PROTOCOLS.items():
        shipped = recipe(meaning.recipe)
        assert shipped.protocol == protocol
        assert recipe_deviations(shipped, meaning.dataset, meaning.arch or "resnet50_quarter") == []
    changed = recipe_deviations(recipe("r50_c4_24k", "batch_size=8", "seed=3"), "voc-folder", "resnet18")
    assert changed == [
        "batch_size 8 instead of 16",
        "dataset voc-folder instead of voc",
        "arch resnet18 instead of resnet50",
    ]


@pytest.mark.parametrize(
    ("protocol", "data"),
    [
        ("detect/voc-r50-c4-24k@1", "voc"),
        ("detect/voc07-r50-c4-9k@10", "voc"),
        ("detect/voc-mine", "voc"),
        ("detect/coco-r50-fpn-1x@10", "coco"),
        ("detect/digits-r50-c4@1", None),
        ("linear/voc@1", None),
        ("mine-of-detect/voc@1", None),
        ("voc", None),
    ],
)
def test_a_protocol_of_detection_says_its_data(protocol, data):
    assert [name for name in ("voc", "coco") if is_on(protocol, name)] == ([data] if data else [])
    assert is_on(protocol, "voc", "coco") == bool(data)


def test_a_smaller_batch_carries_rate_and_schedule_along_and_is_one_deviation():
    paper = recipe("r50_c4_24k", "accumulate=2")
    half = rescaled(paper, 8)
    assert (half.batch_size, half.optimizer.lr, half.precise_bn) == (8, 0.01, 200)  # as in moco's issue 11
    assert (half.schedule.iterations, half.schedule.steps, half.schedule.warmup) == (48000, (36000, 44000), 200)
    sentence = "batch 8 instead of 16: lr, iterations, steps and warm-up rescaled by the linear rule"
    assert recipe_deviations(half, "voc", "resnet50") == [sentence, "accumulate 2 instead of 1"]
    assert "batch_size 8 instead of 16" in recipe_deviations(
        half.model_copy(update={"optimizer": paper.optimizer}), "voc", "resnet50"
    )
    with pytest.raises(InputError, match="batch_size 7 does not divide into accumulate 2 parts"):
        rescaled(paper, 7)


def test_the_recipes_detections_reach_the_judge_and_others_are_a_deviation(tmp_path):
    """150 objects in one image, all found: COCO's 100 give 2/3 of the recall, and 67 of its 101 levels."""
    places = [(12.0 * (i % 15), 12.0 * (i // 15)) for i in range(150)]
    annotations = [
        {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": [x, y, 10, 10], "area": 100, "iscrowd": 0}
        for i, (x, y) in enumerate(places)
    ]
    truth = {"images": [{"id": 1}], "annotations": annotations, "categories": [{"id": 1, "name": "cell"}]}
    Image.new("RGB", (180, 120)).save(tmp_path / "a.png")
    boxes = np.array([(x, y, x + 10, y + 10) for x, y in places])
    samples = [make_sample(1, tmp_path / "a.png", (180, 120), [(box, 0, False, False) for box in boxes])]
    data = DetectionData("coco-folder", ("cell",), samples, samples, "a", "b", "", coco=truth, category_ids=(1,))
    found = [Detections(boxes, np.linspace(0.9, 0.1, 150), np.zeros(150, np.int64))]
    for detections, expected in ((100, 100 * 67 / 101), (400, 100)):
        config = recipe("coco_r50_fpn_1x", f"test.detections={detections}")
        (tmp_path / str(detections)).mkdir()
        trial = _judge(data, config, tmp_path / str(detections), Cost("cpu"), found)
        assert trial["metrics"]["APbb"] == pytest.approx(expected)
        named = recipe_deviations(config, "coco", "resnet50")
        assert named == ([] if detections == 100 else ["test.detections 400 instead of 100"])


def test_learning_rate_of_the_24k_recipe():
    r = recipe("r50_c4_24k")
    rates = [learning_rate(r, i) for i in (0, 50, 100, 17999, 18000, 21999, 22000, 23999)]
    assert rates == pytest.approx([0.02e-3, 0.02 * 0.5005, 0.02, 0.02, 0.002, 0.002, 0.0002, 0.0002])


@pytest.mark.parametrize(
    "override, message",
    [
        ("schedule.iteration=3", "Did you mean 'schedule.iterations'"),
        ("schedule.steps=[5, 3]", "must ascend"),
        ("batch_size=0", "greater than 0"),
        ("input.min_size_train=[]", "at least 1 item"),
    ],
)
def test_impossible_recipes_are_refused(override, message):
    with pytest.raises(InputError, match=message):
        recipe("digits_r50_c4", override)


# Images


@pytest.mark.parametrize(
    "size, shorter, expected",
    [
        ((500, 375), 800, (1067, 800)),  # 1066.67 rounded
        ((375, 500), 480, (480, 640)),
        ((1000, 300), 800, (1333, 400)),  # the longer side bounds it
        ((3, 2), 5, (8, 5)),  # 7.5 is rounded up
    ],
)
def test_resized_as_detectron2(size, shorter, expected):
    assert inputs.resized(size, shorter, 1333) == expected


def samples(sizes):
    return [make_sample(i, None, size, [((0, 0, 5, 5), i, False, False)]) for i, size in enumerate(sizes)]


def test_batches_hang_on_the_seed_cover_an_epoch_and_keep_aspects_apart():
    r = recipe("digits_r50_c4", "batch_size=2", "input.aspect_grouping=true")
    several = samples([(40, 30)] * 4 + [(30, 40)] * 4)
    stream = inputs.batches(several, r)
    drawn = [next(stream) for _ in range(4)]
    assert sorted(index for batch in drawn for _, _, index in batch) == list(range(8))
    assert all(len({index < 4 for _, _, index in batch}) == 1 for batch in drawn)
    assert [batch[0][0] for batch in drawn] == [0, 1, 2, 3]
    again = inputs.batches(several, r)
    assert [next(again) for _ in range(4)] == drawn
    other = inputs.batches(several, r.model_copy(update={"seed": 1}))
    assert [next(other) for _ in range(4)] != drawn


def test_shuffled_labels_are_the_same_labels_elsewhere():
    several = samples([(40, 30)] * 20)
    shuffled = inputs.shuffle_labels(several, 0)
    labels = [s.labels[0] for s in shuffled]
    assert sorted(labels) == list(range(20))
    assert labels != list(range(20))
    assert all(np.array_equal(a.boxes, b.boxes) for a, b in zip(several, shuffled))


def test_crowds_and_empty_images_are_not_trained_on():
    crowd = make_sample(0, None, (9, 9), [((0, 0, 5, 5), 0, False, True), ((1, 1, 5, 5), 1, False, False)])
    only_crowd = make_sample(1, None, (9, 9), [((0, 0, 5, 5), 0, False, True)])
    assert [s.labels.tolist() for s in inputs.trainable([crowd, only_crowd])] == [[1]]


# Training


def test_norms_are_not_decayed_and_nothing_is_left_out():
    model = build_detector(encoder(), 3, recipe())
    decayed, norms = optimizer_for(model, recipe()).param_groups
    assert (decayed["weight_decay"], norms["weight_decay"]) == (1e-4, 0)
    assert len(decayed["params"]) + len(norms["params"]) == len(list(model.parameters()))
    assert len(norms["params"]) == 2 * sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


class OneNorm(nn.Module):
    """Batches of any size through one BN."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(2)

    def forward(self, images, targets):
        return self.bn(torch.stack(images))


def odd_batches():
    """Four images each of two sizes, whose distributions differ."""
    torch.manual_seed(0)
    return [torch.randn(4, 2, 5, side) * side + side for side in (3, 7, 5)]


def test_precise_bn_gives_the_moments_of_all_elements_together():
    model = OneNorm()
    stream = iter([(list(batch), [{}] * 4) for batch in odd_batches()])
    fine_tune.precise_bn(model, stream, recipe("digits_r50_c4", "precise_bn=3"), CPU, stop.Stop())
    together = torch.cat([batch.transpose(0, 1).flatten(1) for batch in odd_batches()], dim=1)
    torch.testing.assert_close(model.bn.running_mean, together.mean(1))
    torch.testing.assert_close(model.bn.running_var, together.var(1, unbiased=False))
    assert model.bn.momentum == 0.1


@pytest.mark.detectron2
def test_precise_bn_is_fvcores():
    update_bn_stats = pytest.importorskip("fvcore.nn.precise_bn").update_bn_stats
    ours, theirs = OneNorm(), OneNorm()
    stream = iter([(list(batch), [{}] * 4) for batch in odd_batches()])
    fine_tune.precise_bn(ours, stream, recipe("digits_r50_c4", "precise_bn=3"), CPU, stop.Stop())
    theirs.forward = lambda batch: theirs.bn(batch)
    update_bn_stats(theirs, odd_batches(), 3)
    torch.testing.assert_close(ours.bn.running_mean, theirs.bn.running_mean)
    torch.testing.assert_close(ours.bn.running_var, theirs.bn.running_var)


def test_a_batch_in_parts_takes_the_mean_of_their_gradients(tmp_path):
    """SGD's first step is the gradient itself; each part has BN and a seed of its own."""
    r = recipe("digits_r50_c4", *TINY, "accumulate=2", "optimizer.weight_decay=0")
    data = open_digits(tmp_path / "scenes", Scenes(train=4, test=2))
    batch = next(inputs.training_batches(inputs.trainable(data.train), r, 0, 1))
    model = build_detector(encoder(), 10, r)
    start, gradients = parameters_to_vector(model.parameters()), []
    for part, _ in fine_tune.parts(batch, r, 0, CPU):
        model.zero_grad()
        sum(model(*part).values()).backward()
        gradients.append(parameters_to_vector(p.grad for p in model.parameters()))
    fresh = build_detector(encoder(), 10, r)
    losses = fine_tune.Trainer(fresh, r, tmp_path / "run", CPU, Cost("cpu")).step(batch, 0)
    expected = start - r.optimizer.lr * (gradients[0] + gradients[1]) / 2
    torch.testing.assert_close(parameters_to_vector(fresh.parameters()), expected)
    assert losses["loss"] == pytest.approx(sum(v.item() for n, v in losses.items() if n != "loss"))
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[0].norm()


def test_boxes_are_scaled_to_the_image_on_disk_cut_to_it_and_dropped_where_nothing_is_left():
    boxes = torch.tensor([[10.0, 20.0, 30.0, 40.0], [-5.0, 10.0, 50.0, 300.0], [120.0, 5.0, 130.0, 9.0]])
    seen = {"boxes": boxes, "scores": torch.tensor([0.9, 0.8, 0.7]), "labels": torch.tensor([1, 3, 2])}
    found = on_disk(seen, (100, 200), (50, 400))
    assert found.boxes.tolist() == [[5, 40, 15, 80], [0, 20, 25, 400]]
    assert found.labels.tolist() == [0, 2]
    np.testing.assert_allclose(found.scores, [0.9, 0.8], rtol=1e-6)


@pytest.mark.parametrize("arch", ["resnet18_quarter_cifar", "pixels"])
def test_other_layouts_are_refused(tmp_path, arch):
    odd = encoder()
    odd.arch, odd.tensors_loaded = arch, 0 if arch == "pixels" else odd.tensors_loaded
    with pytest.raises(InputError, match="detect"):
        detect(DetectionTask(odd, recipe(), "digits"), tmp_path / "run", CPU)
    assert not (tmp_path / "run").exists()


# The whole


def test_detect_leaves_a_whole_run_directory(whole):
    output, record = whole
    assert json.loads((output / "result.json").read_text())["metrics"] == record["metrics"]
    assert set(record["metrics"]) == {"AP", "AP50", "AP75", "AP_area", "AP50_area", "AP75_area"}
    assert set(record["per_class"]) == set("0123456789")
    assert (record["over"], record["selection"]) == ("finetune", "last-iteration")
    assert "schedule.iterations 3 instead of" in " ".join(record["deviations"])
    assert (record["engine"], record["processes"], record["equivalences"]) == ("torchvision", 1, [])
    assert record["preprocessing"]["from"] == "default: the encoder does not say"
    assert record["trials"] == [{"seed": 0, "metrics": record["metrics"]}] and record["std"] == {}
    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in logged] == [1, 2, 3]
    assert len(json.loads((output / "detections.json").read_text())["images"]) == 2
    assert all((output / name).is_file() for name in (*record["pictures"], "per_class.svg", "losses.svg"))
    assert "AP50" in format_table(record).splitlines()[0]
    assert len(format_table(record).splitlines()) == 12 + 3  # the interval's two ends, and what it does not cover
    assert "not the spread of fine-tuning" in format_table(record)
    for name in ("AP", "AP50", "AP75"):
        low, high = record["interval"][name]
        assert low <= record["metrics"][name] <= high
    assert "AP_area" not in record["interval"]


def test_a_finished_run_is_returned_and_another_one_refused(whole, monkeypatch):
    output, record = whole
    monkeypatch.setattr("moco_eval.detection.engine.fine_tune_and_detect", None)
    assert run(output) == record
    with pytest.raises(InputError, match="holds another run"):
        run(output, "optimizer.lr=0.02")


def interrupt(monkeypatch, owner, name, call):
    """Send this process SIGTERM at the so-manieth call of a function."""
    function, calls = getattr(owner, name), []

    def counting(*arguments):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments)

    monkeypatch.setattr(owner, name, counting)


@pytest.mark.parametrize(
    "owner, name, call, message",
    [
        (fine_tune.Trainer, "step", 2, "iteration 2 of 3 is saved"),
        (fine_tune, "_moments", 1, "the trained detector is saved"),
        (torchvision_engine, "on_disk", 1, "the trained detector is saved"),
    ],
)
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(whole, tmp_path, monkeypatch, owner, name, call, message):
    interrupt(monkeypatch, owner, name, call)
    with pytest.raises(Interrupted, match=message):
        run(tmp_path / "run")
    monkeypatch.undo()
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "loss": 1}\n{"iterat')  # as a killed run leaves it
    record = run(tmp_path / "run")
    output, uninterrupted = whole
    assert same_weights(tmp_path / "run", output)
    assert record["metrics"] == uninterrupted["metrics"]
    assert (tmp_path / "run/metrics.jsonl").read_text() == (output / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(in_tmp, capfd, monkeypatch):
    command = ("detect", "random:resnet18_quarter", "--dataset", "digits", "--engine", "torchvision")
    settings = [part for one in (*TINY, "schedule.iterations=6", "checkpoints.every=1") for part in ("--set", one)]
    process = start(*command, *settings, "--output", "killed")
    while process.poll() is None and not (in_tmp / "killed/checkpoints/last.pth").is_file():
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert not (in_tmp / "killed/result.json").is_file()
    for output in ("killed", "whole"):
        in_process(capfd, monkeypatch, *command, *settings, "--output", output)
    assert same_weights(in_tmp / "killed", in_tmp / "whole")
    assert (in_tmp / "killed/detections.json").read_text() == (in_tmp / "whole/detections.json").read_text()
    assert [path.name for path in (in_tmp / "killed/checkpoints").iterdir()] == ["last.pth"]


def test_trials_vary_the_seed_of_the_fine_tuning_and_finished_ones_are_not_repeated(whole, tmp_path, monkeypatch):
    interrupt(monkeypatch, fine_tune.Trainer, "step", 4)
    with pytest.raises(Interrupted):
        run(tmp_path / "run", trials=2)
    monkeypatch.undo()
    kept = (tmp_path / "run/trial_0/trial.json").stat().st_mtime_ns
    record = run(tmp_path / "run", trials=2)
    assert (tmp_path / "run/trial_0/trial.json").stat().st_mtime_ns == kept
    assert [trial["seed"] for trial in record["trials"]] == [0, 1]
    assert same_weights(tmp_path / "run/trial_0", whole[0])
    assert not same_weights(tmp_path / "run/trial_1", whole[0])
    one, two = (json.loads((tmp_path / f"run/trial_{seed}/trial.json").read_text()) for seed in (0, 1))
    assert record["trials"][0]["metrics"] == one["metrics"] == whole[1]["metrics"]
    for name in ("AP50", "AP_area"):
        assert record["metrics"][name] == pytest.approx((one["metrics"][name] + two["metrics"][name]) / 2)
    assert record["std"].keys() == record["metrics"].keys()
    assert record["cost"]["images"] == 2 * whole[1]["cost"]["images"]
    assert (tmp_path / "run/detections.json").read_text() == (whole[0] / "detections.json").read_text()
    assert all((tmp_path / "run" / name).is_file() for name in record["pictures"])
    assert "std of 2 fine-tunings" in format_table(record)
    with pytest.raises(InputError, match="trials is 2 there and 1 now"):
        run(tmp_path / "run")


def test_classes_without_objects_stay_out_of_the_mean_over_trials():
    trials = [{"a": {"AP": 10.0}, "b": {"AP": None}}, {"a": {"AP": 20.0}, "b": {"AP": None}}]
    assert _mean_per_class(trials) == {"a": {"AP": 15.0}, "b": {"AP": None}}


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(RunFailed, match=r"at iteration [123]"):
        run(tmp_path / "run", "optimizer.lr=1e18")


def test_coco_folder_by_pycocotools(tmp_path):
    open_digits(tmp_path / "scenes", Scenes(train=4, test=2))
    record = run(tmp_path / "run", dataset="coco-folder", data=tmp_path / "scenes/coco")
    assert {"APbb", "APbb50", "APbb75"} <= set(record["metrics"])  # and by size, as there are objects
    assert "dataset coco-folder instead of digits" in record["deviations"]


def test_data_that_are_open_already_give_what_their_folder_gives(tmp_path):
    open_digits(tmp_path / "scenes", Scenes(train=4, test=2))
    config = recipe("digits_r50_c4", *TINY)
    folder = DetectionTask(encoder(), config, "voc-folder", tmp_path / "scenes/voc", engine="torchvision")
    held = DetectionTask(encoder(), config, data=folder.open(), engine="torchvision")
    assert plan(held, tmp_path / "run") == plan(folder, tmp_path / "run")
    records = [detect(task, tmp_path / name, CPU) for task, name in ((folder, "folder"), (held, "held"))]
    for key in ("metrics", "per_class", "dataset", "deviations", "trials"):
        assert records[0][key] == records[1][key], key
    assert detect(held, tmp_path / "held", CPU) == records[1]  # finished: read, not run again
    other = DetectionTask(encoder(), config, data=dataclasses.replace(held.data, fingerprint="0"), engine="torchvision")
    with pytest.raises(InputError, match="fingerprint"):
        detect(other, tmp_path / "held", CPU)


def test_data_that_are_open_already_have_their_splits_and_what_they_lack_is_refused(tmp_path):
    data = open_digits(tmp_path / "scenes", Scenes(train=4, test=2))
    config = recipe("digits_r50_c4", *TINY)
    with pytest.raises(InputError, match="train_split and test_split are of data in a folder; digits is open already"):
        DetectionTask(encoder(), config, data=data, test_split="train", engine="torchvision").check(1)
    masks = recipe("digits_r50_c4", *TINY, "masks=true")
    with pytest.raises(InputError, match=f"asks for masks and no object of {data.train_split} in digits has one"):
        DetectionTask(encoder(), masks, data=data).open()
    for both_or_none in ({"dataset": "digits", "data": data}, {}):
        with pytest.raises(AssertionError):
            DetectionTask(encoder(), config, **both_or_none)


@pytest.mark.parametrize(
    "dataset, data, message",
    [
        ("vocc", None, "Did you mean 'voc'"),
        ("voc", None, "for example: moco-eval detect"),
        ("voc-folder", "nowhere", "does not exist"),
        ("coco-folder", ".", "instances_train2017.json does not exist"),
    ],
)
def test_bad_data_arguments(tmp_path, dataset, data, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path / "run", dataset=dataset, data=data and tmp_path / data)
    assert not (tmp_path / "run").exists()


MSRA = Preprocessing(mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0), channels="BGR", range=255)


@pytest.mark.parametrize(
    "overrides, change, options, message",
    [
        (
            ["input.format=rgb"],
            {"preprocessing": MSRA},
            {},
            "format rgb in the recipe, and random:resnet18_quarter exp",
        ),
        (["input.format=bgr"], {"preprocessing": Preprocessing()}, {}, "expects RGB; take --set input.format=auto"),
        (["input.format=bgr"], {}, {}, "does not say what it expects and is given RGB"),
        (["masks=true"], {}, {}, "has boxes only and recipe detect/digits-r50-c4@1 asks for masks"),
        (["accumulate=2"], {}, {"processes": 2}, "batch_size 2 does not divide into 2 processes x 2 parts; .*-size 4,"),
        (["batch_size=8"], {}, {"processes": 3}, "--batch-size 6 or 9, or another --nproc"),
        ([], {}, {"dataset": "digit"}, "Did you mean 'digits'"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_data_are_opened(overrides, change, options, message):
    ours = dataclasses.replace(encoder(), **change)
    given = {"dataset": "digits", "processes": 1} | options
    task = DetectionTask(ours, recipe("digits_r50_c4", *TINY, *overrides), given["dataset"], engine="torchvision")
    with pytest.raises(InputError, match=message) as error:
        task.check(given["processes"])
    assert "\n" not in str(error.value)


def test_colours_that_agree_are_no_deviation():
    config = recipe("digits_r50_c4", "input.format=bgr")
    ours = dataclasses.replace(encoder(), preprocessing=MSRA)
    DetectionTask(ours, config, "digits", engine="torchvision").check(1)
    assert recipe_deviations(config, "digits", "resnet18_quarter") == []


def test_masks_and_keypoints_that_the_data_do_not_have_are_refused(tmp_path):
    open_digits(tmp_path / "scenes", Scenes(train=4, test=2))
    for path in (tmp_path / "scenes/coco/annotations").iterdir():
        values = json.loads(path.read_text())
        bare = [{name: value for name, value in one.items() if name != "segmentation"} for one in values["annotations"]]
        path.write_text(json.dumps(values | {"annotations": bare}))
    for head in ("masks", "keypoints"):
        fpn = recipe("coco_r50_fpn_1x", "masks=false", f"{head}=true")
        with pytest.raises(InputError, match=rf"{head}.*or (other )?data"):
            detect(DetectionTask(encoder(), fpn, "coco-folder", tmp_path / "scenes/coco"), tmp_path / "run", CPU)
    assert not (tmp_path / "run").exists()


def test_the_plan_names_engine_schedule_and_shares(tmp_path, capfd, monkeypatch):
    command = ("detect", "random:resnet18_quarter", "--dataset", "digits", "--dry-run", "--engine", "torchvision")
    output = ("--output", tmp_path / "run")
    out, err = in_process(capfd, monkeypatch, *command, *output, "--nproc", "2", "--batch-size", "4", "--trials", "3")
    assert "engine: torchvision; 2 processes with 2 images each" in out
    assert "400 iterations of 4 images, lr 0.025, steps [300, 360], warm-up 20; precise BN over 10" in out
    assert "trials: 3, seeds from 0" in out
    assert "batch 4 instead of 8: lr, iterations, steps and warm-up rescaled by the linear rule" in out
    assert "--batch-size 4 instead of 8: lr 0.025 instead of 0.05, 400 iterations instead of 200" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("plan", [(), ("--dry-run",)])
def test_the_built_in_scenes_keep_their_splits(plan, tmp_path, capfd, monkeypatch):
    """To train on the test scenes would leave no trace in the record."""
    command = ("detect", "random:resnet18_quarter", "--dataset", "digits", "--output", tmp_path / "run", *plan)
    line = error_line(capfd, monkeypatch, *command, "--train-split", "test")
    assert "digits has its own splits" in line and not (tmp_path / "run").exists()


def test_an_image_damaged_since_it_was_listed_stops_in_one_line(tmp_path):
    data = open_digits(tmp_path / "scenes", Scenes(train=4, test=2))
    data.train[0].path.write_bytes(data.train[0].path.read_bytes()[:200])
    for workers in (0, 1):
        r = recipe("digits_r50_c4", f"workers={workers}", "batch_size=4")
        with pytest.raises(InputError, match=r"cannot read .*train_0000\.png") as error:
            next(inputs.training_batches(data.train, r, 0, 1))
        assert "\n" not in str(error.value)


def test_a_training_split_without_boxes_is_refused(tmp_path):
    open_digits(tmp_path / "scenes", Scenes(train=4, test=2))
    path = tmp_path / "scenes/coco/annotations/instances_train2017.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    with pytest.raises(InputError, match="none of the 4 training images of train2017 has an object"):
        run(tmp_path / "run", dataset="coco-folder", data=tmp_path / "scenes/coco")


@pytest.mark.slow
def test_a_detector_learns_the_scenes_and_shuffled_labels_do_not(tmp_path):
    def ap50(name, *overrides):
        task = DetectionTask(encoder("resnet50_quarter"), recipe(*overrides), "digits", engine="torchvision")
        return detect(task, tmp_path / name, CPU)["metrics"]["AP50"]

    real, control = (
        ap50("real", "digits_r50_c4"),
        ap50("control", "digits_r50_c4", "data.shuffle_labels=true"),
    )
    assert real >= 20
    assert real >= 3 * control


@pytest.mark.parametrize("split, message", [("train2017", "of train2017"), ("val2017", "of val2017")])
def test_a_split_without_masks_is_refused_before_anything_is_written(tmp_path, split, message):
    open_digits(tmp_path / "scenes", Scenes(train=4, test=2))
    path = tmp_path / f"scenes/coco/annotations/instances_{split}.json"
    values = json.loads(path.read_text())
    for item in values["annotations"]:
        del item["segmentation"]
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=f"asks for masks and no object {message} .* has one"):
        run(tmp_path / "run", "masks=true", dataset="coco-folder", data=tmp_path / "scenes/coco")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("override, claimed", [("seed=0", 1), ("precision=bf16", 0), ("accumulate=2", 0)])
def test_parity_is_claimed_only_for_what_its_tests_ran(tmp_path, override, claimed):
    protocol = "protocol=detect/voc-r50-c4-24k@1"
    assert len(run(tmp_path / "run", protocol, override)["equivalences"]) == claimed


def test_a_finished_run_keeps_the_environment_it_had(whole):
    output, _ = whole
    before = (output / "environment.json").read_bytes()
    run(output)
    assert (output / "environment.json").read_bytes() == before


def test_a_rate_that_never_falls_is_warned_of(capfd):
    for iterations in (150, 151):
        config = recipe("digits_r50_c4", f"schedule.iterations={iterations}")
        DetectionTask(encoder(), config, "digits", engine="torchvision").check(1)
    assert " ".join(capfd.readouterr().err.split()).count("the rate never falls") == 1


def test_a_dry_run_looks_at_the_device(capfd, monkeypatch):
    command = ("detect", "random:resnet18_quarter", "--dataset", "digits", "--dry-run", "--device")
    in_process(capfd, monkeypatch, *command, "cpu")
    assert "tpu" in error_line(capfd, monkeypatch, *command, "tpu")
