"""The recipe, the engine and the whole of `detect` on a few scenes."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from torch import nn

from moco_eval import config, runtime
from moco_eval.data.boxes import make_sample
from moco_eval.detection import fine_tune, inputs, proposals
from moco_eval.detection.detect import detect, format_table, open_digits
from moco_eval.detection.detector import build_detector
from moco_eval.detection.fine_tune import optimizer_for
from moco_eval.detection.recipe import PROTOCOLS, DetectConfig, Scenes, departures, learning_rate
from moco_eval.encoders.build import architecture, build_backbone
from moco_eval.encoders.encoder import Encoder
from moco_eval.errors import InputError, Interrupted, RunFailed

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
    return config.load(name, "detect", DetectConfig, overrides)


def run(output, *overrides, dataset="digits", data=None, **options):
    return detect(encoder(**options), dataset, data, recipe("digits_r50_c4", *TINY, *overrides), output, CPU)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    output = tmp_path_factory.mktemp("detect") / "run"
    return output, run(output)


def weights(output):
    return torch.load(output / "checkpoints/last.pth", weights_only=True)["model"]


# Recipes


def test_every_protocol_has_its_config_and_no_departure_from_itself():
    for protocol, meaning in PROTOCOLS.items():
        shipped = recipe(meaning.recipe)
        assert shipped.protocol == protocol
        assert departures(shipped, meaning.dataset, meaning.arch or "resnet50_quarter") == []
    changed = departures(recipe("r50_c4_24k", "batch_size=8", "seed=3"), "voc-folder", "resnet18")
    assert changed == [
        "batch_size 8 instead of 16",
        "dataset voc-folder instead of voc",
        "arch resnet18 instead of resnet50",
    ]


def test_learning_rate_of_the_24k_recipe():
    r = recipe("r50_c4_24k")
    rates = [learning_rate(r, i) for i in (0, 50, 100, 17999, 18000, 21999, 22000, 23999)]
    assert rates == pytest.approx([0.02e-3, 0.02 * 0.5005, 0.02, 0.02, 0.002, 0.002, 0.0002, 0.0002])


@pytest.mark.parametrize(
    "override, words",
    [
        ("schedule.iteration=3", "Did you mean 'schedule.iterations'"),
        ("schedule.steps=[5, 3]", "must ascend"),
        ("batch_size=0", "greater than 0"),
        ("input.min_size_train=[]", "at least 1 item"),
    ],
)
def test_impossible_recipes_are_refused(override, words):
    with pytest.raises(InputError, match=words):
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


# The model


def test_every_backbone_tensor_is_the_encoders_and_the_extra_norm_starts_at_one():
    ours = encoder("resnet50_quarter")
    model = build_detector(ours, 3, recipe())
    inside = model.backbone.state_dict()
    inside |= {f"layer4.{name}": tensor for name, tensor in model.heads.box_head.layer4.state_dict().items()}
    assert inside.keys() == ours.backbone.state_dict().keys()
    assert all(torch.equal(inside[name], tensor) for name, tensor in ours.backbone.state_dict().items())
    assert model.heads.box_head.norm.weight.unique().tolist() == [1]
    assert model.heads.box_head.norm.bias.unique().tolist() == [0]
    assert all(p.requires_grad for p in model.parameters())
    assert model.heads.box_predictor.cls_score.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert model.heads.box_predictor.bbox_pred.weight.std().item() == pytest.approx(0.001, rel=0.1)


def test_norms_are_not_decayed_and_nothing_is_left_out():
    model = build_detector(encoder(), 3, recipe())
    decayed, norms = optimizer_for(model, recipe()).param_groups
    assert (decayed["weight_decay"], norms["weight_decay"]) == (1e-4, 0)
    assert len(decayed["params"]) + len(norms["params"]) == len(list(model.parameters()))
    assert len(norms["params"]) == 2 * sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_anchors_are_unrounded_sizes_first_on_stride_16():
    anchors = proposals._Anchors(((32, 64),), ((0.5, 1.0, 2.0),))
    cells = anchors.cell_anchors[0]
    half = 32 * 2**0.5 / 2
    np.testing.assert_allclose(cells[0], [-half, -half / 2, half, half / 2], rtol=1e-6)
    assert cells[4].tolist() == [-32, -32, 32, 32]
    images = proposals.ImageList(torch.zeros(1, 3, 40, 55), [(40, 55)])
    grid = anchors(images, [torch.zeros(1, 8, 3, 4)])[0].reshape(3, 4, 6, 4)
    np.testing.assert_allclose(grid[2, 3, 4] - cells[4], [48, 32, 48, 32])


def test_box_losses_are_l1_over_what_was_asked_for():
    network = build_detector(encoder(), 3, recipe("digits_r50_c4", "rpn.batch_per_image=8")).rpn
    deltas, wanted = torch.full((5, 4), 3.0), torch.ones(5, 4)
    labels = torch.tensor([1.0, 1.0, 0.0, 0.0, -1.0])
    objectness, box = network.compute_loss(torch.zeros(5, 1), deltas, [labels], [wanted])
    assert box.item() == pytest.approx(2 * 4 * 2 / 8)
    assert objectness.item() == pytest.approx(4 * np.log(2) / 8)


def test_precise_bn_gives_the_moments_of_all_batches_together():
    r = recipe("digits_r50_c4", "precise_bn=3")
    bn, batches = nn.BatchNorm2d(2), [torch.randn(4, 2, 5, 5) * (i + 1) + i for i in range(3)]
    model = nn.Sequential(bn)
    model.forward = lambda images, targets: bn(images[0])
    stream = iter([([batch], []) for batch in batches])
    fine_tune._precise_bn(model, stream, r, CPU, runtime.Stop())
    together = torch.cat(batches).transpose(0, 1).flatten(1)
    torch.testing.assert_close(bn.running_mean, together.mean(1))
    torch.testing.assert_close(bn.running_var, together.var(1, unbiased=False))
    assert bn.momentum == 0.1


@pytest.mark.parametrize("arch", ["resnet18_quarter_cifar", "pixels"])
def test_other_layouts_are_refused(tmp_path, arch):
    odd = encoder()
    odd.arch = arch
    with pytest.raises(InputError, match="detect"):
        detect(odd, "digits", None, recipe(), tmp_path / "run", CPU)
    assert not (tmp_path / "run").exists()


# The whole


def test_detect_leaves_a_whole_run_directory(whole):
    output, record = whole
    assert json.loads((output / "result.json").read_text())["metrics"] == record["metrics"]
    assert set(record["metrics"]) == {"AP", "AP50", "AP75", "AP_area", "AP50_area", "AP75_area"}
    assert set(record["per_class"]) == set("0123456789")
    assert (record["over"], record["selection"]) == ("finetune", "last-iteration")
    assert "schedule.iterations 3 instead of" in " ".join(record["deviations"])
    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in logged] == [1, 2, 3]
    assert len(json.loads((output / "detections.json").read_text())["images"]) == 2
    assert all((output / name).is_file() for name in record["pictures"])
    assert "AP50" in format_table(record).splitlines()[0]
    assert len(format_table(record).splitlines()) == 12


def test_a_finished_run_is_returned_and_another_one_refused(whole, monkeypatch):
    output, record = whole
    monkeypatch.setattr("moco_eval.detection.engine.fine_tune_and_detect", None)
    assert run(output) == record
    with pytest.raises(InputError, match="holds another run"):
        run(output, "optimizer.lr=0.02")


def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(whole, tmp_path, monkeypatch):
    step = fine_tune._step

    def step_and_signal(model, optimizer, batch, recipe, iteration, device):
        if iteration == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(model, optimizer, batch, recipe, iteration, device)

    monkeypatch.setattr(fine_tune, "_step", step_and_signal)
    with pytest.raises(Interrupted, match="iteration 2 of 3 is saved"):
        run(tmp_path / "run")
    monkeypatch.undo()
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "loss": 1}\n{"iterat')  # as a killed run leaves it
    record = run(tmp_path / "run")
    output, uninterrupted = whole
    ours, theirs = weights(tmp_path / "run"), weights(output)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert record["metrics"] == uninterrupted["metrics"]
    assert (tmp_path / "run/metrics.jsonl").read_text() == (output / "metrics.jsonl").read_text()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(RunFailed, match=r"at iteration [123]"):
        run(tmp_path / "run", "optimizer.lr=1e18")


def test_coco_folder_by_pycocotools(tmp_path):
    open_digits(tmp_path / "scenes", Scenes(train=4, test=2), None, None)
    record = run(tmp_path / "run", dataset="coco-folder", data=tmp_path / "scenes/coco")
    assert {"APbb", "APbb50", "APbb75"} <= set(record["metrics"])  # and by size, as there are objects
    assert "dataset coco-folder instead of digits" in record["deviations"]


@pytest.mark.parametrize(
    "dataset, data, words",
    [
        ("vocc", None, "Did you mean 'voc'"),
        ("voc", None, "for example: moco-eval detect"),
        ("voc-folder", "nowhere", "does not exist"),
        ("coco-folder", ".", "instances_train2017.json does not exist"),
    ],
)
def test_bad_data_arguments(tmp_path, dataset, data, words):
    with pytest.raises(InputError, match=words):
        run(tmp_path / "run", dataset=dataset, data=data and tmp_path / data)
    assert not (tmp_path / "run").exists()


def test_an_image_damaged_since_it_was_listed_stops_in_one_line(tmp_path):
    data = open_digits(tmp_path / "scenes", Scenes(train=4, test=2), None, None)
    data.train[0].path.write_bytes(data.train[0].path.read_bytes()[:200])
    for workers in (0, 1):
        r = recipe("digits_r50_c4", f"workers={workers}", "batch_size=4")
        with pytest.raises(InputError, match=r"cannot read .*train_0000\.png") as error:
            next(inputs.training_batches(data.train, r, 0, 1))
        assert "\n" not in str(error.value)


def test_a_training_split_without_boxes_is_refused(tmp_path):
    open_digits(tmp_path / "scenes", Scenes(train=4, test=2), None, None)
    path = tmp_path / "scenes/coco/annotations/instances_train2017.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    with pytest.raises(InputError, match="none of the 4 images of train2017 has a box"):
        run(tmp_path / "run", dataset="coco-folder", data=tmp_path / "scenes/coco")


@pytest.mark.slow
def test_a_detector_learns_the_scenes_and_shuffled_labels_do_not(tmp_path):
    def ap50(name, *overrides):
        record = detect(encoder("resnet50_quarter"), "digits", None, recipe(*overrides), tmp_path / name, CPU)
        return record["metrics"]["AP50"]

    real, control = (
        ap50("real", "digits_r50_c4"),
        ap50("control", "digits_r50_c4", "data.shuffle_labels=true"),
    )
    assert real >= 20
    assert real >= 3 * control
