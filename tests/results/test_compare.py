"""moco-eval compare on real small runs: what it says, and everything it refuses."""

import json
import re
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from commands import error_line, in_process
from scipy.stats import binomtest
from test_statistics import naive_ap

from moco_eval.cli.main import cli
from moco_eval.results.compare import compare

KNN = ["--dataset", "digits", "--protocol", "digits"]
FEW = ["--dataset", "digits", "--protocol", "digits_few", "--labels", "10-per-class", "--trials", "3"]
FEW += ["--set", "schedule.epochs=4", "--set", "schedule.milestones=[3]"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """kNN of raw pixels and of an untrained network on the digits, and a linear classifier on few labels in 3 draws."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for command in (
            ["knn", "pixels", *KNN, "--output", "pixels"],
            ["knn", "random:resnet18_quarter", *KNN, "--output", "random"],
            ["linear", "pixels", *FEW, "--output", "few"],
        ):
            CliRunner().invoke(cli, command, catch_exceptions=False)
    return root


@pytest.fixture
def runs(made, tmp_path):
    """A copy to spoil."""
    for name in ("pixels", "random", "few"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def edit(folder, **changes):
    """Change a run's record; a key with two underscores reaches one level down."""
    path = folder / "result.json"
    record = json.loads(path.read_text())
    for key, value in changes.items():
        outer, _, inner = key.partition("__")
        if inner:
            record[outer][inner] = value
        else:
            record[outer] = value
    path.write_text(json.dumps(record))
    return record


def predictions(folder):
    """What a run of one trial predicted: (N,), and the scores behind it, (N, C)."""
    with np.load(folder / "predictions.npz") as kept:
        one = len(kept["prediction"]) == 1
        return {name: array[0] if one and name in ("prediction", "scores") else array for name, array in kept.items()}


def rewrite(folder, **changes):
    np.savez(folder / "predictions.npz", **(predictions(folder) | changes))


def test_two_encoders_of_one_protocol(made, capfd, monkeypatch):
    a, b = made / "pixels", made / "random"
    out, _ = in_process(capfd, monkeypatch, "compare", a, b)
    records = [json.loads((run / "result.json").read_text()) for run in (a, b)]
    top1 = [record["metrics"]["top1"] for record in records]
    right = [kept["prediction"] == kept["label"] for kept in map(predictions, (a, b))]
    only_a, only_b = (right[0] & ~right[1]).sum(), (right[1] & ~right[0]).sum()
    assert out.splitlines()[0] == "B - A in top1, percent, on the same 500 images of digits test"
    for name, run, record in zip("AB", (a, b), records):
        low, high = record["interval"]["top1"]
        row = rf"^{name}  {re.escape(str(run))} +knn/instdisc@1 +{record['metrics']['top1']:.2f} +"
        assert re.search(row + rf"\[{low:.2f}, {high:.2f}\] over test images$", out, re.M)
    found = re.search(r"^B - A (\S+), 95 % interval \[(\S+), (\S+)\] over test images, (p \S \S+) \(paired", out, re.M)
    difference, low, high = (float(found[i]) for i in (1, 2, 3))
    assert difference == pytest.approx(top1[1] - top1[0], abs=0.005) and low < difference < high
    error = 100 * (only_a + only_b - (only_a - only_b) ** 2 / 500) ** 0.5 / 500
    assert (low, high) == pytest.approx((difference - 1.96 * error, difference + 1.96 * error), abs=0.3)
    exact = binomtest(int(only_a), int(only_a + only_b)).pvalue
    words = "p < 0.001" if exact < 0.001 else f"p = {exact:.3f}"
    assert f"McNemar's exact test: {words} (only A is right on {only_a} images, only B on {only_b})" in out
    detectable = float(re.search(r"sees a difference of (\S+) points or more with 80 % power at 5 %", out)[1])
    assert detectable == pytest.approx(2.8 * error, rel=0.03)
    assert "NOT A DIFFERENCE" not in out and "only A:" not in out and "±" not in out


def test_a_run_against_itself(made, capfd, monkeypatch):
    out, _ = in_process(capfd, monkeypatch, "compare", made / "few", made / "few")
    assert "B - A +0.00, 95 % interval [+0.00, +0.00] over test images, p = 1.000" in out
    assert "No image tells the runs apart" in out


def test_other_protocols_are_compared_under_a_loud_first_line(made, capfd, monkeypatch):
    out, _ = in_process(capfd, monkeypatch, "compare", made / "pixels", made / "few")
    assert out.splitlines()[0] == (
        "NOT A DIFFERENCE OF ENCODERS ALONE: A is knn/instdisc@1 and B is linear/moco-lincls@1; "
        "A was trained on all labels and B on 10 labels per class"
    )
    assert "only A: k 20 instead of 200\n" in out and "only B: 10 labels per class\n" in out


def test_other_labels_of_one_protocol_are_said_as_loudly(runs, capfd, monkeypatch):
    edit(runs / "random", dataset__subset="1%")
    out, _ = in_process(capfd, monkeypatch, "compare", runs / "pixels", runs / "random")
    assert out.splitlines()[0].endswith("ENCODERS ALONE: A was trained on all labels and B on 1%")


def test_trials_count_by_their_mean_and_their_spread_stands_beside(made, capfd, monkeypatch):
    out, _ = in_process(capfd, monkeypatch, "compare", made / "pixels", made / "few")
    record = json.loads((made / "few" / "result.json").read_text())
    mean, std = record["metrics"]["top1"], record["std"]["top1"]
    assert f"linear/moco-lincls@1  {mean:.2f} ± {std:.2f} (3 label draws)  [" in out
    assert "over test images, given these\ntrials; the spread over trials (±) stands beside" in out
    assert "McNemar" not in out  # a test of single answers
    few, one = predictions(made / "few"), predictions(made / "pixels")
    values = (few["prediction"] == few["label"]).mean(axis=0) - (one["prediction"] == one["label"])
    done = compare(made / "pixels", made / "few")
    assert done.difference == pytest.approx(100 * values.mean())
    assert done.over_images.standard_error == pytest.approx(100 * values.std() / 500**0.5, rel=0.03)


def test_the_record_as_printed_names_both_spreads(made, in_tmp, capfd, monkeypatch):
    out, _ = in_process(capfd, monkeypatch, "linear", "pixels", *FEW, "--output", made / "few")
    record = json.loads((made / "few" / "result.json").read_text())
    (low, high), mean, std = record["interval"]["top1"], record["metrics"]["top1"], record["std"]["top1"]
    said = f"top1 {mean:.2f} ± {std:.2f} (3 label draws)  [{low:.2f}, {high:.2f}] over test images"
    assert out.splitlines()[0] == f"linear/moco-lincls@1 digits {said}"


def test_the_mean_per_class_where_the_data_set_is_judged_by_it(runs):
    for name in ("pixels", "random"):
        kept = predictions(runs / name)
        right = kept["prediction"] == kept["label"]
        mean = 100 * np.mean([right[kept["label"] == c].mean() for c in range(10)])
        edit(runs / name, metrics={"mean_per_class": mean, "top1": 100 * right.mean()})
    done = compare(runs / "pixels", runs / "random")
    assert done.metric == "mean_per_class" and done.discordant is None
    low, high = done.over_images.interval
    assert low < done.difference < high


def test_several_labels_are_compared_by_mean_average_precision(runs, capfd, monkeypatch):
    """The digits' votes as ten one-against-rest problems, some labels ignored; in two trials."""
    values = []
    for name in ("pixels", "random"):
        kept = predictions(runs / name)
        labels = np.eye(10, dtype=np.int8)[kept["label"]]
        labels[::7, 3] = -1
        votes = np.maximum(kept["scores"], 0)  # minus infinity: no vote
        scores = np.stack([votes, votes**2])
        np.savez(runs / name / "predictions.npz", prediction=scores.argmax(2), label=labels, scores=scores)
        values.append(100 * np.mean([naive_ap(votes[:, c], labels[:, c]) for c in range(10)]))
        trials = [{"seed": seed, "metrics": {"mAP": values[-1]}} for seed in (0, 1)]
        edit(runs / name, metrics={"mAP": values[-1]}, std={"mAP": 0.0}, interval={}, trials=trials, over="labels")
    out, _ = in_process(capfd, monkeypatch, "compare", runs / "pixels", runs / "random")
    assert out.startswith("B - A in mAP, percent, on the same 500 images of digits test\n")
    found = re.search(r"^B - A (\S+), 95 % interval \[(\S+), (\S+)\]", out, re.M)
    difference, low, high = map(float, found.groups())
    assert difference == pytest.approx(values[1] - values[0], abs=0.01)
    assert low < difference < high and "2 label draws" in out


def test_predictions_of_one_trial_may_be_a_row_or_a_matrix(runs):
    before = compare(runs / "pixels", runs / "random").over_images
    rewrite(runs / "random", prediction=predictions(runs / "random")["prediction"][None])
    assert compare(runs / "pixels", runs / "random").over_images == before


def spoil_label(run):
    labels = predictions(run)["label"]
    labels[[3, 8]] = (labels[[3, 8]] + 1) % 10
    rewrite(run, label=labels)


def truncate(run):
    path = run / "predictions.npz"
    path.write_bytes(path.read_bytes()[:-4000])


def flip(run):
    path = run / "predictions.npz"
    data = bytearray(path.read_bytes())
    data[200] ^= 255  # in the first array
    path.write_bytes(data)


REFUSALS = {
    "no folder": (lambda run: shutil.rmtree(run), "random is no folder"),
    "not finished": (lambda run: (run / "result.json").unlink(), "random holds no result.json, so no finished"),
    "no record": (lambda run: (run / "result.json").write_text("[]"), "is no moco-eval/result@1 record"),
    "no json": (lambda run: (run / "result.json").write_text("{"), "is not readable JSON"),
    "half a record": (lambda run: edit(run, dataset=None), "is damaged: dataset is None, no mapping of keys"),
    "detection": (
        lambda run: edit(run, protocol="detect/digits-r50-c4@1"),
        "random holds no matches.npz, which detections",
    ),
    "segmentation": (lambda run: edit(run, protocol="segment/linear@1"), "random/pixel_counts.npz does not exist"),
    "no predictions": (lambda run: (run / "predictions.npz").unlink(), "predictions.npz does not exist"),
    "cut": (truncate, "predictions.npz cannot be read"),
    "flipped": (flip, "predictions.npz cannot be read"),
    "not npz": (lambda run: (run / "predictions.npz").write_text("x"), "predictions.npz cannot be read"),
    "one array": (lambda run: np.save((run / "predictions.npz").open("wb"), np.ones(3)), "cannot be read"),
    "pickles": (lambda run: rewrite(run, prediction=np.array([{}] * 500, dtype=object)), "cannot be read"),
    "array missing": (lambda run: np.savez(run / "predictions.npz", label=np.zeros(500, int)), "cannot be read"),
    "other trials": (lambda run: rewrite(run, prediction=np.zeros((2, 500), int)), "shape (2, 500) for 1 trials"),
    "other type": (lambda run: rewrite(run, prediction=np.zeros(500)), "prediction of type float64"),
    "data set": (lambda run: edit(run, dataset__name="cifar10"), "the same images: name is digits in"),
    "fingerprint": (lambda run: edit(run, dataset__fingerprint="f00d"), "fingerprint is"),
    "images": (lambda run: edit(run, dataset__images=499), "it has 500 answers for 499 images"),
    "fewer answers": (
        lambda run: rewrite(run, **{name: predictions(run)[name][:-1] for name in ("prediction", "label")}),
        "it has 499 answers for 500 images",
    ),
    "labels": (spoil_label, "2 of 500 have another label in"),
    "another run's": (
        lambda run: shutil.copy(run.parent / "pixels" / "predictions.npz", run / "predictions.npz"),
        "they are not of one run",
    ),
    "no metric": (lambda run: edit(run, metrics={"top5": 99.0}), "share no metric of top1, mean_per_class, mAP"),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_what_cannot_be_compared_is_refused_in_one_line(why, runs, capfd, monkeypatch):
    spoil, words = REFUSALS[why]
    spoil(runs / "random")
    assert words in error_line(capfd, monkeypatch, "compare", runs / "pixels", runs / "random")


def test_scores_of_several_labels_must_be_numbers(runs, capfd, monkeypatch):
    labels = np.eye(10, dtype=np.int8)[predictions(runs / "random")["label"]]
    for label, score in ((labels, np.nan), (labels + 5, 0.0)):
        rewrite(runs / "random", label=label, scores=np.full((1, 500, 10), score))
        line = error_line(capfd, monkeypatch, "compare", runs / "random", runs / "random")
        assert "a score is not finite, or a label is none of 1, 0 and -1" in line
