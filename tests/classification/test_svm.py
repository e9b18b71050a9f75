"""Linear SVMs per class against scikit-learn called by hand, low-shot draws, and the whole protocol."""

import tracemalloc
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import precision_recall_curve
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC

import moco_eval as me
from moco_eval.classification import svm
from moco_eval.classification.judge import judge
from moco_eval.classification.probe import Probe
from moco_eval.classification.task import Task
from moco_eval.config import load as configs
from moco_eval.config.classification import SvmConfig
from moco_eval.data.catalogue import open_images, open_splits
from moco_eval.encoders.load import load
from moco_eval.errors import InputError
from moco_eval.results.metrics import mean_average_precision

CPU = torch.device("cpu")
FEW = (0.01, 1.0, 100.0)


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """200 training and 150 test images of the first four digits, one label each."""
    bunch = load_digits(n_class=4)
    labels = svm.one_hot(bunch.target, 4)
    return bunch.data[:200], labels[:200], bunch.data[200:350], labels[200:350]


def by_hand(train, labels, test, costs, seed=0):
    """The protocol written out with scikit-learn: scores of one class and the cost it took."""
    norm = lambda X: X / (np.linalg.norm(X, axis=1) + 1e-5)[:, None]  # noqa: E731
    target = np.where(labels == 1, 1, -1)
    best = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for cost in costs:
            model = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, dual=True, max_iter=2000, tol=1e-4, random_state=seed)
            value = cross_val_score(model, norm(train), target, cv=3, scoring="average_precision").mean()
            if best is None or value > best[0]:
                best = value, cost, model.fit(norm(train), target).decision_function(norm(test))
    return best


def test_each_class_is_scikit_learns_called_by_hand(digits):
    train, labels, test, _ = digits
    for column, ours in enumerate(svm.fit_classes(train, labels, test, FEW)):
        value, cost, scores = by_hand(train, labels[:, column], test, FEW)
        assert ours.cost == cost and ours.validation.max() == pytest.approx(value)
        assert np.array_equal(ours.scores, scores)


@pytest.mark.slow
def test_two_processes_give_the_same_to_the_bit(digits):
    train, labels, test, _ = digits
    one, two = (svm.fit_classes(train, labels[:, :2], test, FEW, processes=n) for n in (1, 2))
    for a, b in zip(one, two):
        assert a.cost == b.cost and np.array_equal(a.scores, b.scores) and np.array_equal(a.validation, b.validation)


def test_fits_that_did_not_converge_are_counted(digits):
    train, labels, test, _ = digits
    (hurried,) = svm.fit_classes(train, labels[:, :1], test, (100.0,), max_iterations=2)
    assert hurried.unconverged == svm.FOLDS + 1
    with pytest.warns(ConvergenceWarning):
        svm.classifier(100.0, 0, 2).fit(train, np.where(labels[:, 0] == 1, 1, -1))


def test_ignored_images_train_as_absent_and_are_not_tested(digits):
    train, labels, test, _ = digits
    difficult, absent = labels[:, :1].copy(), labels[:, :1].copy()
    changed = np.flatnonzero(labels[:, 0] == 1)[:5]
    difficult[changed], absent[changed] = -1, 0
    a, b = (svm.fit_classes(train, one, test, (1.0,))[0] for one in (difficult, absent))
    assert np.array_equal(a.scores, b.scores)


@pytest.mark.parametrize("name", ["voc07", "voc07-low-shot"])
def test_protocols_are_as_specified(name):
    """Goyal et al. 2019: C in 2^[-19, -4] and 10^[-7, 2], in the order of the official script's list."""
    config = configs.load(name, "svm", SvmConfig)
    assert config.protocol == f"svm/{name}@1" and config.max_iterations == 2000
    assert config.costs == (*(float(f"1e{n}") for n in range(-7, 3)), *(0.5**n for n in range(4, 20)))
    assert (config.shots, config.samples) == (((1, 2, 4, 8, 16, 32, 64, 96), 5) if config.low_shot else ((), 1))


def test_a_class_without_images_is_refused(digits):
    train, labels, test, _ = digits
    with pytest.raises(InputError, match="class 1 is in 0 of 200 training images"):
        svm.fit_classes(train, labels * np.array([1, 0, 1, 1], dtype=np.int8), test, (1.0,))


def test_folds_without_the_class_are_counted():
    train = np.random.default_rng(0).normal(size=(30, 4))
    labels = np.zeros((30, 1), dtype=np.int8)
    labels[[3, 20]] = 1
    (found,) = svm.fit_classes(train, labels, train, (1.0,))
    assert found.folds_without == 1


def test_low_shot_draws_hold_n_positives_and_are_reproducible():
    labels = np.random.default_rng(0).choice(np.array([0, 0, 0, 0, 0, 1, -1], dtype=np.int8), size=(400, 5))
    for shots in (1, 4, 16):
        drawn = svm.draw(labels, shots, seed=3)
        assert ((drawn == 1).sum(axis=0) == shots).all() and ((drawn == 0).sum(axis=0) == 4 * shots).all()
        assert (drawn[drawn >= 0] == labels[drawn >= 0]).all()
        assert np.array_equal(drawn, svm.draw(labels, shots, seed=3))
        assert not np.array_equal(drawn, svm.draw(labels, shots, seed=4))


def test_too_few_images_for_a_draw_are_refused():
    labels = np.eye(3, dtype=np.int8)[[0, 1, 2] * 4]
    with pytest.raises(InputError, match=r"8 low-shot images per class: class 0 has 4 images and needs 8"):
        svm.draw(labels, 8, 0)
    with pytest.raises(InputError, match=r"class 0 has 8 images without it and needs 10"):
        svm.draw(np.concatenate([labels, np.full((1, 3), 1, np.int8)]), 5, 0)


def test_low_shot_is_scikit_learns_on_the_images_drawn(digits):
    from sklearn.metrics import average_precision_score

    train, labels, test, test_labels = digits
    found = svm.fit_low_shot(train, labels, test, test_labels, 4, FEW, seed=2)
    drawn, X = svm.draw(labels, 4, 2), svm.normalise(train)
    assert found.test.shape == found.rest.shape == (len(FEW), 4)
    for column in range(4):
        used = drawn[:, column] >= 0
        assert used.sum() == 4 + 12
        model = svm.classifier(1.0, 2, 2000).fit(X[used], np.where(drawn[used, column] == 1, 1, -1))
        scores = model.decision_function(svm.normalise(test))
        assert found.test[1, column] == mean_average_precision(scores[:, None], test_labels[:, [column]])[1]
        assert np.array_equal(found.scores[1, :, column], scores)
        # the area under monotonous precision is never below scikit-learn's, and near it
        theirs = 100 * average_precision_score(test_labels[:, column], scores)
        assert theirs - 1e-9 <= found.test[1, column] < theirs + 3
        rest = mean_average_precision(model.decision_function(X[~used])[:, None], labels[~used][:, [column]])[1]
        assert found.rest[1, column] == pytest.approx(rest)


@pytest.fixture
def one_process(monkeypatch):
    """No other processes: they are slow to start."""
    monkeypatch.setattr("joblib.cpu_count", lambda: 1)


def area(scores, labels):
    """Average precision by scikit-learn's curve: precision raised to the highest at the same or a higher recall."""
    counted = labels >= 0
    precision, recall, _ = precision_recall_curve(labels[counted], scores[counted])
    return -100 * np.sum(np.diff(recall) * np.maximum.accumulate(precision)[:-1])


def test_the_protocol_on_digits_has_both_metrics(tmp_path, one_process):
    train, test = (open_images("digits", None, split).few_labels(20, 0) for split in ("train", "test"))
    task = Task(load("random:resnet18_quarter"), train, test)
    config = configs.load("digits", "svm", SvmConfig)
    record = judge(task, config, tmp_path, CPU)
    assert set(record["metrics"]) == {"top1", "mAP"} and record["metrics"]["top1"] > 60
    assert len(record["trials"][0]["AP"]) == 10
    assert record["metrics"]["mAP"] == pytest.approx(np.mean(record["trials"][0]["AP"]))


def test_low_shot_reports_both_choices_of_the_cost(tmp_path, one_process):
    train, test = (open_images("digits", None, split).few_labels(20, 0) for split in ("train", "test"))
    task = Task(load("random:resnet18_quarter"), train, test)
    config = configs.load("digits-low-shot", "svm", SvmConfig, ["shots=[1,2]", "costs=[0.1,1.0]"])
    record = judge(task, config, tmp_path, CPU)
    assert len(record["trials"]) == 3 and record["over"] == "labels" and set(record["std"]) == {"mAP_1", "mAP_2"}
    table = np.array([trial["mAP_by_C"] for trial in record["trials"]])
    for row, name in enumerate(("mAP_1", "mAP_2")):
        best = record["best_on_test"][name]
        assert best["mean"] == pytest.approx(table[:, row].mean(axis=0).max())
        assert best["mean"] >= record["metrics"][name] - 1e-9 or record["trials"][0]["C"] != record["trials"][1]["C"]
    with pytest.raises(InputError, match="low-shot draws its own labels"):
        judge(replace(task, trials=2), config, tmp_path / "two", CPU)


@pytest.mark.data
def test_average_precision_on_voc_is_scikit_learns_called_by_hand(tmp_path, shared_data, one_process):
    """Real VOC images, 20 classes, difficult objects among them."""
    train, test = open_splits("voc-folder", shared_data / "VOCdevkit" / "VOC2012")
    assert (test.labels == -1).any()
    task = Task(load("random:resnet18_quarter"), train, test)
    config = configs.load("voc07", "svm", SvmConfig, ["costs=[0.1,1.0,10.0]", "workers=0"])
    record = judge(task, config, tmp_path, CPU)
    X, Xt = (task.features(images, config, CPU).tensor().double().numpy() for images in (train, test))
    theirs = []
    for column, ours in enumerate(record["trials"][0]["AP"]):
        if not (test.labels[:, column] == 1).any():
            assert ours is None
            continue
        _, cost, scores = by_hand(X, train.labels[:, column], Xt, config.costs)
        assert cost == record["trials"][0]["C"][column]
        theirs.append(area(scores, test.labels[:, column]))
        assert ours == pytest.approx(theirs[-1])
    assert record["metrics"]["mAP"] == pytest.approx(np.mean(theirs))


def test_a_class_of_one_image_is_refused_before_the_folds():
    labels = np.zeros((40, 2), np.int8)
    labels[:20, 0], labels[0, 1] = 1, 1
    features = np.random.default_rng(0).normal(size=(40, 4))
    with pytest.raises(InputError, match="class 1 is in 1 of 40 training images"):
        svm.fit_classes(features, labels, features, [1.0])


def test_a_class_is_called_by_its_name():
    pixels = np.random.default_rng(0).integers(0, 256, (17, 8, 8, 3)).astype(np.uint8)
    images = me.ImageSet.from_arrays(pixels, [0] * 8 + [1] * 8 + [2], classes=["ant", "cat", "dog"])
    encoder = me.load("random:resnet18_quarter")
    with pytest.raises(ValueError, match=r"class dog is in 1 of 17 training images"):
        me.judge(encoder, images, images, "svm/voc07@1", device="cpu")
    with pytest.raises(ValueError, match=r"class dog has 1 images and needs 2"):
        me.judge(encoder, images, images, "svm/voc07-low-shot@1", device="cpu", shots=[2])


def test_low_shot_that_draws_everything_has_nothing_to_choose_by():
    labels = np.eye(2, dtype=np.int8).repeat(4, axis=0)
    features = np.random.default_rng(0).normal(size=(8, 4))
    with pytest.raises(InputError, match="4 shots leave no training image of any class"):
        svm.fit_low_shot(features, labels, features, labels, 4, [1.0])


def test_svms_hold_what_they_say():
    """Features in float32, in float64, and once more while they are normalised; numpy's arrays are traced."""
    probe = Probe(train=600, test=200, dim=512, classes=10, device=CPU, seconds=1.0)
    train = np.ones((600, 512), np.float32)
    tracemalloc.start()
    svm.normalise(train)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    said = svm.memory(configs.load("voc07", "svm", SvmConfig), probe)
    assert said - 4 * 512 * (600 + 200) == pytest.approx(most, rel=0.05)
