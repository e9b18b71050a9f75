"""The recipes, what is read, and the whole of `segment` on a few scenes."""

import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from commands import error_line, in_process
from PIL import Image
from segmentation_runs import recipe, run, tiny

from moco_eval.config import load as configs
from moco_eval.config.fine_tuning import rescaled
from moco_eval.data.masks.folder import read_mask_folder
from moco_eval.data.masks.samples import IGNORED
from moco_eval.data.masks.scenes import write_mask_scenes
from moco_eval.errors import InputError, Interrupted, RunFailed
from moco_eval.report import runs as read
from moco_eval.report.page import _contents
from moco_eval.results.compare import compare
from moco_eval.segmentation import inputs, pictures
from moco_eval.segmentation import train as training
from moco_eval.segmentation.recipe import DEFAULTS, PROTOCOLS, learning_rate, recipe_deviations
from moco_eval.segmentation.scores import metrics_of, per_class
from moco_eval.segmentation.segment import format_table
from moco_eval.segmentation.task import DATASETS

# Recipes


def test_every_protocol_is_a_shipped_config_that_keeps_to_itself():
    assert {f"segment/{protocol.recipe}" for protocol in PROTOCOLS.values()} == set(configs.shipped("segment"))
    for name, protocol in PROTOCOLS.items():
        config = recipe(protocol.recipe)
        assert config.protocol == name
        assert recipe_deviations(config, protocol.dataset or "ade20k", protocol.arch or "vit_base_patch16_224") == []
    assert set(DEFAULTS) <= set(DATASETS)


def test_the_papers_numbers():
    voc, cityscapes = recipe("voc_fcn16s_30k"), recipe("cityscapes_fcn16s_90k")
    assert (voc.views.crop, voc.optimizer.lr, voc.schedule.iterations) == (513, 0.003, 30000)
    assert (cityscapes.views.crop, cityscapes.optimizer.lr, cityscapes.schedule.iterations) == (769, 0.01, 90000)
    rates = [learning_rate(voc, iteration) for iteration in (0, 20999, 21000, 26999, 27000, 29999)]
    assert rates == pytest.approx([3e-3, 3e-3, 3e-4, 3e-4, 3e-5, 3e-5])
    assert cityscapes.schedule.steps == (63000, 81000)
    poly = recipe("vocaug_fcn_20k")
    assert [learning_rate(poly, i) for i in (0, 10000)] == pytest.approx([0.01, (0.01 - 1e-4) * 0.5**0.9 + 1e-4])
    dinov2 = recipe("linear_dinov2")
    assert [learning_rate(dinov2, i) for i in (750, 20000, 39999)] == pytest.approx([4.9e-4, 5e-4, 2.5e-8], rel=2e-3)


def test_deviations_are_named():
    assert recipe_deviations(recipe("voc_fcn16s_30k", "views.crop=257"), "voc2012", "resnet18") == [
        "views.crop 257 instead of 513",
        "dataset voc2012 instead of voc-aug",
        "arch resnet18 instead of resnet50",
    ]
    half = rescaled(recipe("linear"), 8)
    assert half.sweep.lr == pytest.approx([5e-5, 1.5e-4, 5e-4, 1.5e-3]) and half.schedule.iterations == 20000
    (deviation,) = recipe_deviations(half, "ade20k", "resnet50")
    assert deviation.startswith("batch 8 instead of 16: lr, iterations, steps and warm-up rescaled")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("test.window=64", "test.window and test.stride belong together"),
        ("test={window: 64, stride: 65}", "would leave gaps"),
        ("views.scales=[2, 1]", "smallest and the largest"),
        ("auxiliary=0.4", "auxiliary is only for model fcn_d8"),
        ("output_stride=8", "output_stride is only for frozen encoders"),
        ("sweep={lr: [1], weight_decay: [0]}", "sweep is only for frozen encoders"),
        ("schedule={kind: poly, iterations: 9, steps: [3]}", "takes no steps"),
        ("scenes.side=[40, 20]", r"scenes.side is the least and the most, got \[40, 20\]"),
    ],
)
def test_what_does_not_belong_together_is_refused(override, words):
    with pytest.raises(InputError, match=words):
        recipe("digits_fcn16s", override)


# What is read


def halves(width=40, height=30):
    """An image whose left half is dark, of class 1, and whose right half is bright, of class 2."""
    mask = np.full((height, width), 1, np.uint8)
    mask[:, width // 2 :] = 2
    return Image.fromarray(np.repeat((mask * 100)[..., None], 3, axis=2)), mask


def views(**changed):
    return recipe().views.model_copy(update={"crop": 32, "flip": 0.5, "scales": (0.5, 2.0), "step": 0.25, **changed})


def test_the_mask_moves_with_its_image():
    image, mask = halves()
    scales = set()
    for seed in range(40):
        pixels, classes = inputs.training_view(image, mask, views(), np.random.default_rng(seed), (7, 8, 9))
        assert pixels.shape == (32, 32, 3) and classes.shape == (32, 32)
        assert (pixels[classes == IGNORED] == (7, 8, 9)).all()
        inside = classes != IGNORED
        wrong = np.abs(pixels[..., 0][inside].astype(int) - 100 * classes[inside].astype(int)) > 60
        assert wrong.mean() < 0.05  # the edge between the halves, which is enlarged smoothly
        scales.add(inputs.drawn_scale(views(), np.random.default_rng(seed)))
    assert scales == {0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0}


def test_an_image_fits_into_its_sides():
    assert inputs.fitted((500, 375), (2048, 512)) == (683, 512)
    assert inputs.fitted((5000, 375), (2048, 512)) == (2048, 154)
    assert inputs.fitted((500, 375), None, 0.5) == (250, 188)


def test_no_class_has_more_of_a_crop_than_it_may():
    _, mask = halves(400, 30)
    few = [0, 0]
    for seed in range(100):
        for place, most in enumerate((1.0, 0.75)):
            left, _ = inputs.crop_place(mask, views(most_of_one_class=most), np.random.default_rng(seed))
            counts = np.bincount(mask[:, left : left + 32].ravel(), minlength=3)
            few[place] += counts.max() < 0.75 * counts.sum()
    assert few[0] < 20 < 30 < few[1]


def test_distortion_keeps_the_picture_and_no_random_number_is_shared():
    image, _ = halves()
    pixels = np.asarray(image)
    several = [inputs.distorted(pixels, np.random.default_rng(seed)) for seed in range(8)]
    assert all(one.shape == pixels.shape and one.dtype == np.uint8 for one in several)
    assert any((one != pixels).any() for one in several)
    assert all((one[:, 30:].mean() > one[:, :10].mean()) for one in several)


def test_batches_begin_where_a_run_goes_on(tmp_path):
    config = tiny()
    data = read_mask_folder(write_mask_scenes(tmp_path / "scenes", train=5, test=2))
    whole = list(inputs.training_batches(data, data.train, config, 0, (0, 0, 0)))
    later = list(inputs.training_batches(data, data.train, config, 2, (0, 0, 0)))
    shares = [list(inputs.training_batches(data, data.train, config, 0, (0, 0, 0), (rank, 2))) for rank in (0, 1)]
    assert len(whole) == 3 and torch.equal(whole[2][0], later[0][0]) and torch.equal(whole[2][1], later[0][1])
    for number, (images, masks) in enumerate(whole):
        assert torch.equal(images, torch.cat([share[number][0] for share in shares]))
        assert torch.equal(masks, torch.cat([share[number][1] for share in shares]))


def test_training_images_held_out_are_no_training_images(tmp_path):
    data = read_mask_folder(write_mask_scenes(tmp_path / "scenes", train=20, test=2))
    kept, chooses = inputs.held_out(data.train, tiny("digits_linear"))
    assert len(chooses) == 2 and {*kept, *chooses} == set(data.train) and not {*kept} & {*chooses}
    assert inputs.held_out(data.train, tiny()) == (data.train, [])


def test_shuffled_masks_are_all_there_and_none_is_its_own(tmp_path):
    data = read_mask_folder(write_mask_scenes(tmp_path / "scenes", train=9, test=2))
    shuffled = inputs.shuffled_masks(data.train, 0)
    assert sorted(one.mask for one in shuffled) == sorted(one.mask for one in data.train)
    assert all(one.image == other.image and one.mask != other.mask for one, other in zip(shuffled, data.train))


# The whole


@pytest.fixture(scope="module", params=["digits_fcn16s", "digits_linear"])
def whole(request, tmp_path_factory):
    output = tmp_path_factory.mktemp("segment") / "run"
    return request.param, output, run(output, name=request.param)


def same_state(output, other):
    one, two = (torch.load(run / "checkpoints/last.pth", weights_only=True) for run in (output, other))
    assert one["format"] == "moco-eval/segment@1" and one["finished"] and two["finished"]
    one, two = one["model"], two["model"]
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_record_says_what_the_predictions_are_worth(whole):
    name, output, record = whole
    classes = ["background", *"0123456789"]
    assert record["dataset"]["name"] == "digits" and record["dataset"]["classes"] == 11
    with np.load(output / "pixel_counts.npz") as file:
        counts = file["counts"]
    total = np.zeros((3, 11), int)
    for number in range(3):
        said = np.asarray(Image.open(output / f"predictions/{number:04d}.png")).astype(int)
        true = np.asarray(Image.open(output / f"scenes/test_masks/{number:04d}.png")).astype(int)
        rows = [np.bincount(said[said == true], minlength=11), np.bincount(said.ravel(), minlength=11)]
        assert (counts[number] == [*rows, np.bincount(true.ravel(), minlength=11)]).all()
        total += counts[number]
    assert record["metrics"] == metrics_of(total) and record["per_class"] == per_class(total, classes)
    low, high = record["interval"]["pixel_accuracy"]
    assert low <= record["metrics"]["pixel_accuracy"] <= high
    assert record["cost"]["images"] == 6 and record["cost"]["seconds"] > 0
    assert len(record["pictures"]) == 3 and all((output / one).is_file() for one in record["pictures"])
    assert (output / "per_class.svg").is_file() and (output / "losses.svg").is_file()
    assert record["over"] == ("head" if name == "digits_linear" else "finetune")
    assert format_table(record).splitlines()[0].startswith(f"{record['protocol']} digits mIoU")


def test_a_finished_run_is_not_repeated_and_another_is_refused(whole, monkeypatch):
    name, output, record = whole
    monkeypatch.setattr("moco_eval.segmentation.segment.train", None)
    assert run(output, name=name) == record
    with pytest.raises(InputError, match="holds another run"):
        run(output, "optimizer.lr=0.02", name=name)


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
    ("owner", "name", "message"),
    [
        (training.Trainer, "step", "iteration 2 of 3 is saved"),
        (pictures, "save_prediction", "the trained segmentation is saved"),
    ],
)
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(whole, tmp_path, monkeypatch, owner, name, message):
    kind, output, uninterrupted = whole
    interrupt(monkeypatch, owner, name, 2)
    with pytest.raises(Interrupted, match=message):
        run(tmp_path / "run", name=kind)
    monkeypatch.undo()
    record = run(tmp_path / "run", name=kind)
    assert same_state(tmp_path / "run", output) and record["metrics"] == uninterrupted["metrics"]
    assert (tmp_path / "run/metrics.jsonl").read_text() == (output / "metrics.jsonl").read_text()
    for place in ("predictions/0002.png", "pictures/0-0000.png"):
        assert (tmp_path / "run" / place).read_bytes() == (output / place).read_bytes()


def test_trials_vary_the_seed_and_finished_ones_are_not_repeated(whole, tmp_path, monkeypatch):
    kind, output, alone = whole
    interrupt(monkeypatch, training.Trainer, "step", 4)
    with pytest.raises(Interrupted):
        run(tmp_path / "run", name=kind, trials=2)
    monkeypatch.undo()
    kept = (tmp_path / "run/trial_0/trial.json").stat().st_mtime_ns
    record = run(tmp_path / "run", name=kind, trials=2)
    assert (tmp_path / "run/trial_0/trial.json").stat().st_mtime_ns == kept
    assert same_state(tmp_path / "run/trial_0", output) and not same_state(tmp_path / "run/trial_1", output)
    one, two = (json.loads((tmp_path / f"run/trial_{seed}/trial.json").read_text()) for seed in (0, 1))
    assert one["metrics"] == alone["metrics"]
    assert record["metrics"]["mIoU"] == pytest.approx((one["metrics"]["mIoU"] + two["metrics"]["mIoU"]) / 2)
    assert record["std"].keys() == record["metrics"].keys() and len(record["pictures"]) == 3


def test_the_head_is_chosen_by_training_images_alone(tmp_path, monkeypatch):
    """Of heads that learn nothing and one that learns, the one that does; the test images are asked once, of it."""
    asked = []
    look = training.counts_of_heads

    def noting(model, data, samples, *arguments):
        asked.append([sample.name for sample in samples])
        return look(model, data, samples, *arguments)

    monkeypatch.setattr(training, "counts_of_heads", noting)
    sweep = "sweep={lr: [1.0e-9, 3.0e-2], weight_decay: [0], held_out: 0.2}"
    settings = (sweep, "schedule.iterations=25", "scenes.train=10", "views.crop=64", "test={window: 128, stride: 128}")
    record = run(tmp_path / "run", *settings, name="digits_linear")
    assert record["trials"][0]["chosen"] == {"lr": 0.03, "weight_decay": 0.0}
    assert len(asked) == 1 and len(asked[0]) == 2
    assert torch.load(tmp_path / "run/checkpoints/last.pth", weights_only=True)["model"]["chosen"] == 1


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(RunFailed, match=r"the loss is (nan|inf) at iteration"):
        run(tmp_path / "run", "optimizer.lr=1e30", "schedule.iterations=6", "schedule.steps=[]")


def test_bf16_is_close_to_fp32(tmp_path):
    record = run(tmp_path / "run", "precision=bf16")
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(np.log(11), rel=0.05)
    assert "precision bf16 instead of fp32" in record["deviations"]


# The command


def mask_folder(root, mask=None, mode="L"):
    for split, count in (("train", 3), ("val", 2)):
        for kind in ("", "_masks"):
            (root / f"{split}{kind}").mkdir(parents=True)
        for number in range(count):
            image, classes = halves()
            classes = classes - 1 if mask is None else mask
            image.save(root / split / f"{number}.png")
            Image.fromarray(classes.astype(np.uint8)).convert(mode).save(root / f"{split}_masks" / f"{number}.png")
    return root


COMMAND = ("segment", "random:resnet18_quarter", "--dataset", "mask-folder", "--recipe", "linear", "--device", "cpu")


@pytest.mark.parametrize(
    ("mask", "mode", "more", "words"),
    [
        (np.full((30, 40), 7), "L", (), r"0\.png has the value 7 at 1200 pixels, and the 2 classes are 0 to 1"),
        (np.zeros((31, 40)), "L", (), r"0\.png is 40x31 and its image .* is 40x30"),
        (np.zeros((30, 40)), "RGB", (), r"0\.png is a mask of 3 channels \(RGB\) and must have one"),
        (np.full((30, 40), 255), "L", (), r"no mask of train in .* has a labelled pixel: all are ignored"),
        (None, "L", ("--dataset", "ade20k"), r"--classes is of --dataset mask-folder; ade20k has its own"),
        (None, "L", ("--train-split", "old"), r"has no images and masks of split 'old'"),
        (None, "L", ("--batch-size", "0"), "batch-size"),
        (None, "L", ("--dataset", "cityscape"), "'--dataset': 'cityscape'. Did you mean 'cityscapes'"),
        (None, "L", ("--pixels", "size=64,mean=0.5,std=0.5"), "--pixels size: a segmentation resizes whole images"),
        (None, "L", ("--recipe", "linaer"), "no segment config named 'linaer'. Did you mean 'linear'"),
    ],
)
def test_what_the_command_refuses_in_one_line(tmp_path, capfd, monkeypatch, mask, mode, more, words):
    (tmp_path / "names.txt").write_text("left\nright\n")
    folder = mask_folder(tmp_path / "data", mask, mode)
    arguments = (*COMMAND, "--classes", tmp_path / "names.txt", "--data", folder, "--output", tmp_path / "run")
    for dry in ((), ("--dry-run",)):
        if more[:1] == ("--batch-size",):
            in_process(capfd, monkeypatch, *arguments, *more, *dry, code=2)
        else:
            assert re.search(words, error_line(capfd, monkeypatch, *arguments, *more, *dry))
    assert not (tmp_path / "run").exists()


def test_a_missing_mask_and_classes_without_a_pixel(tmp_path, capfd, monkeypatch):
    folder = mask_folder(tmp_path / "data")
    (tmp_path / "names.txt").write_text("left\nright\nsky\n")
    arguments = (*COMMAND, "--classes", tmp_path / "names.txt", "--data", folder, "--output", tmp_path / "run")
    out, err = in_process(capfd, monkeypatch, *arguments, "--dry-run")
    assert err.count("warning: 1 of 3 classes have no pixel in the training masks (sky): they are never learnt") == 1
    assert (
        err.count("warning: 1 of 3 classes have no pixel in the test masks (sky): they count only where they are") == 1
    )
    assert "mask-folder:data, 3 training and 2 test images, 3 classes" in out and "12 heads" in out
    Image.fromarray(np.full((30, 40), 255, np.uint8)).save(folder / "train_masks/1.png")
    _, err = in_process(capfd, monkeypatch, *arguments, "--dry-run")
    assert "warning: 1 of 3 training masks have no labelled pixel (the first: " in err
    (folder / "train_masks/2.png").unlink()
    assert "1 of 3 images have no mask: " in error_line(capfd, monkeypatch, *arguments)
    assert not (tmp_path / "run").exists()


def test_the_command_learns_two_halves(tmp_path, capfd, monkeypatch):
    """Dark and bright: a linear head on a random encoder must find them, and say so."""
    folder = mask_folder(tmp_path / "data")
    settings = ("views.crop=40", "views.fit=null", "test={window: 40, stride: 40}", "schedule.iterations=40")
    settings = (*settings, "schedule.warmup=0", "batch_size=2", "workers=0", "views.scales=[1, 1]")
    small = [part for setting in settings for part in ("--set", setting)]
    out, _ = in_process(capfd, monkeypatch, *COMMAND, "--data", folder, "--output", tmp_path / "run", *small)
    record = json.loads((tmp_path / "run/result.json").read_text())
    assert record["metrics"]["mIoU"] > 60 and list(record["per_class"]) == ["0", "1"]
    assert f"segment/linear@1 mask-folder:data mIoU {record['metrics']['mIoU']:.2f}" in out


def test_without_data_the_command_says_what_it_needs(capfd, monkeypatch):
    assert "segment needs --dataset; for example: moco-eval segment" in error_line(
        capfd, monkeypatch, "segment", "random:resnet18_quarter"
    )
    assert "--dataset voc-aug needs --data (or MOCO_EVAL_DATA); for example: " in error_line(
        capfd, monkeypatch, "segment", "random:resnet18_quarter", "--dataset", "voc-aug"
    )


def sides(root, count=24):
    """Images of two shades, cut somewhere across or down, the brighter of class 1: masks that differ."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("", "_masks"):
            (root / f"{split}{kind}").mkdir(parents=True)
        for number in range(count):
            mask = np.zeros((48, 48), np.uint8)
            mask[:, : random.integers(8, 40)] = 1
            mask = np.rot90(mask, random.integers(4)).copy()
            Image.fromarray(np.repeat((60 + 120 * mask)[..., None], 3, axis=2)).save(root / split / f"{number}.png")
            Image.fromarray(mask).save(root / f"{split}_masks" / f"{number}.png")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits_fcn16s", "digits_linear"])
def test_shuffled_masks_are_far_below(tmp_path, name):
    folder = sides(tmp_path / "data")
    settings = ("schedule.iterations=60", "batch_size=8", "views.crop=49", "views.scales=[1, 1]", "scenes=null")
    more = ("test={window: 49, stride: 49}",) if name == "digits_linear" else ()
    scores = []
    for shuffle in ("false", "true"):
        given = (*settings, *more, "optimizer.lr=0.02", f"data.shuffle_masks={shuffle}")
        record = run(tmp_path / shuffle, *given, name=name, dataset="mask-folder", data=folder)
        scores.append(record["metrics"]["mIoU"])
    assert scores[0] > 70 and scores[1] < scores[0] - 20, scores


def test_the_report_shows_segmentations_beside_each_other(whole, tmp_path, capfd, monkeypatch):
    _, output, record = whole
    in_process(capfd, monkeypatch, "report", output, "--output", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Segmentations</h2>" in page and "the image, the truth (white: no class), the prediction" in page
    assert page.count("IoU of each class, in one order") == 1 and "mIoU" in page
    assert page.count('alt="Image 1, as') == 1 and f"{record['metrics']['mIoU']:.1f}" in page


def test_segmentations_get_the_verdict_of_compare(whole, tmp_path):
    _, output, record = whole
    better = shutil.copytree(output, tmp_path / "better")
    with np.load(better / "pixel_counts.npz") as file:
        counts = file["counts"]
    counts[:, :2] = counts[:, 2:]  # says the truth
    np.savez_compressed(better / "pixel_counts.npz", counts=counts)
    trained = {
        "sha256": "f" * 64,
        "origin": "moco-eval/1",
        "path": "mine.pth",
        "pretraining": {"protocol": "pretrain/moco-v2@1", "epochs": 1},
    }
    perfect = {"metrics": {"mIoU": 100.0, "pixel_accuracy": 100.0}, "encoder": record["encoder"] | trained}
    (better / "result.json").write_text(json.dumps(record | perfect))
    said = " ".join(_contents(read.read_runs([output, better]))["summary"])
    assert compare(output, better).verdict == "ahead of" and " is ahead of " in said and "not compared" not in said


def test_two_segmentations_are_compared_on_the_same_images(whole, tmp_path, capfd, monkeypatch):
    """A run that errs on fewer pixels of every image is better for certain; of one that says the same nothing is."""
    _, output, record = whole
    same = compare(output, output)
    assert (same.metric, same.difference, same.over_images.p) == ("mIoU", 0.0, 1.0)
    better = shutil.copytree(output, tmp_path / "better")
    with np.load(better / "pixel_counts.npz") as file:
        counts = file["counts"]
    counts[:, :2] = counts[:, 2:]  # says the truth
    np.savez_compressed(better / "pixel_counts.npz", counts=counts)
    with pytest.raises(
        InputError, match=r"result.json says mIoU .* pixel_counts.npz gives 100.00; they are not of one"
    ):
        compare(output, better)
    (better / "result.json").write_text(json.dumps(record | {"metrics": {"mIoU": 100.0, "pixel_accuracy": 100.0}}))
    done = compare(output, better)
    assert done.difference == pytest.approx(100 - record["metrics"]["mIoU"])
    assert done.over_images.interval[0] > 0 and done.over_images.p < 0.001 and done.discordant is None
    out, _ = in_process(capfd, monkeypatch, "compare", output, better)
    assert f"B - A in mIoU, percent, on the same 3 images of {record['dataset']['name']} test" in out
    counts[0, :, 0] += 1  # another mask
    np.savez_compressed(better / "pixel_counts.npz", counts=counts)
    assert "1 of 3 have another label" in error_line(capfd, monkeypatch, "compare", output, better)
    np.savez_compressed(better / "pixel_counts.npz", counts=counts[:2])
    assert "pixel_counts.npz is damaged" in error_line(capfd, monkeypatch, "compare", output, better)
    (better / "pixel_counts.npz").write_bytes(b"nothing")
    assert "pixel_counts.npz cannot be read" in error_line(capfd, monkeypatch, "compare", output, better)
    (better / "pixel_counts.npz").unlink()
    assert "pixel_counts.npz does not exist" in error_line(capfd, monkeypatch, "compare", output, better)


def test_each_iteration_has_crops_of_its_own(tmp_path):
    data = read_mask_folder(write_mask_scenes(tmp_path / "scenes", train=1, test=1))
    (first, _), (second, _), _ = inputs.training_batches(data, data.train, tiny(), 0, (0, 0, 0))
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[0], first[1])
