"""Logistic regression on frozen features: both solvers, their objective, the path over C, and the whole protocol."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import cross_entropy

from moco_eval.classification import logistic
from moco_eval.classification.judge import judge
from moco_eval.classification.task import Task
from moco_eval.config import load as configs
from moco_eval.config.classification import LogisticConfig
from moco_eval.data.catalogue import SMALL, open_images
from moco_eval.data.label_subsets import held_out
from moco_eval.encoders.load import load
from moco_eval.errors import InputError, RunFailed
from moco_eval.features.cache import Features
from moco_eval.features.extract import extract
from moco_eval.features.stages import network
from moco_eval.results.metrics import accuracy

CPU = torch.device("cpu")
TIGHT = logistic.SolverSettings(tolerance=1e-7, max_iterations=5000)


@pytest.fixture(scope="module")
def digits() -> SimpleNamespace:
    """Pixels of the digits at 8 x 8, as they were written: 64 real features."""
    train, test = (open_images("digits", None, split) for split in ("train", "test"))
    X, Xt = (images.pixels[:, ::4, ::4, 0].reshape(len(images), -1) / 255 for images in (train, test))
    return SimpleNamespace(X=X, y=train.labels, Xt=Xt, yt=test.labels)


@pytest.fixture(scope="module")
def encoded() -> SimpleNamespace:
    """Features of a small random network on 600 + 500 digits: correlated, as features are."""
    encoder = load("random:resnet18_quarter")
    train, test = (open_images("digits", None, split) for split in ("train", "test"))
    train = train.few_labels(60, 0)
    net, like = network(encoder, "pooled").eval(), {"batch_size": 200}
    X, Xt = (extract(net, images, SMALL["digits"], CPU, **like).double().numpy() for images in (train, test))
    return SimpleNamespace(X=X, y=train.labels, Xt=Xt, yt=test.labels)


def top1(fit, data):
    return accuracy(logistic.scores(data.Xt, fit), torch.as_tensor(data.yt))


@pytest.mark.parametrize("C", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("which", ["digits", "encoded"])
def test_both_solvers_reach_the_same_optimum(which, C, request):
    data = request.getfixturevalue(which)
    theirs = logistic.fit_sklearn(data.X, data.y, C, settings=TIGHT)
    ours = logistic.fit_torch(data.X, data.y, C, CPU, settings=TIGHT)
    assert theirs.converged and ours.converged
    assert logistic.loss(data.X, data.y, ours) == pytest.approx(logistic.loss(data.X, data.y, theirs), rel=1e-4)
    assert top1(ours, data) == pytest.approx(top1(theirs, data), abs=0.1)


def test_the_optimum_is_scikit_learns_called_by_hand(digits):
    theirs = LogisticRegression(C=0.1, tol=1e-7, max_iter=5000).fit(digits.X, digits.y)
    ours = logistic.fit_torch(digits.X, digits.y, 0.1, CPU, settings=TIGHT)
    p = theirs.predict_proba(digits.X)[np.arange(len(digits.y)), digits.y]
    loss = -np.log(p).mean() + (theirs.coef_**2).sum() / (2 * 0.1 * len(p))
    assert logistic.loss(digits.X, digits.y, ours) == pytest.approx(loss, rel=1e-6)
    assert top1(ours, digits) == pytest.approx(100 * theirs.score(digits.Xt, digits.yt), abs=0.1)


def test_two_classes_have_the_same_objective_in_both(digits):
    few = digits.y < 2
    X, y = digits.X[few], digits.y[few]
    theirs, ours = logistic.fit_sklearn(X, y, 0.1, settings=TIGHT), logistic.fit_torch(X, y, 0.1, CPU, settings=TIGHT)
    assert theirs.weight.shape == ours.weight.shape == (2, 64)
    assert logistic.loss(X, y, ours) == pytest.approx(logistic.loss(X, y, theirs), rel=1e-6)
    again = logistic.fit_sklearn(X, y, 0.1, theirs, TIGHT)
    assert again.iterations <= 1  # a start from the solution stays there


def test_gradient_is_autograds_and_blocks_change_nothing(digits):
    generator = torch.Generator().manual_seed(0)
    X, y = torch.as_tensor(digits.X), torch.as_tensor(digits.y)
    weight = torch.randn(10, 64, generator=generator, dtype=torch.float64).requires_grad_()
    bias = torch.randn(10, generator=generator, dtype=torch.float64).requires_grad_()
    loss = cross_entropy(X @ weight.T + bias, y) + weight.square().sum() / (2 * 0.3 * len(X))
    loss.backward()
    place = weight.detach(), bias.detach()
    for block in (len(X), 100):
        found = logistic.loss_and_gradient(X, y, *place, 0.3, block)
        for one, wanted in zip(found, (loss.detach(), weight.grad, bias.grad)):
            assert torch.allclose(one, wanted, rtol=1e-10, atol=1e-12)
    mean = X.mean(dim=0)
    centred = logistic.loss_and_gradient(X, y, place[0], place[1] + place[0] @ mean, 0.3, 100, mean)
    assert torch.allclose(centred[0], loss.detach())


def test_a_fit_in_blocks_is_the_fit_of_the_whole(encoded):
    whole = logistic.fit_torch(encoded.X, encoded.y, 1.0, CPU)
    parts = logistic.fit_torch(encoded.X, encoded.y, 1.0, CPU, block=64)
    assert np.allclose(whole.weight, parts.weight, atol=1e-4 * abs(whole.weight).max())


def test_a_start_elsewhere_ends_at_the_same_optimum(encoded):
    far = logistic.fit_torch(encoded.X, encoded.y, 1e-3, CPU)
    for fit in (
        logistic.fit_torch(encoded.X, encoded.y, 0.1, CPU, far, TIGHT),
        logistic.fit_sklearn(encoded.X, encoded.y, 0.1, far, TIGHT),
    ):
        cold = logistic.fit_torch(encoded.X, encoded.y, 0.1, CPU, settings=TIGHT)
        assert logistic.loss(encoded.X, encoded.y, fit) == pytest.approx(
            logistic.loss(encoded.X, encoded.y, cold), rel=1e-5
        )


@pytest.mark.parametrize("solver", ["sklearn", "torch"])
def test_a_fit_that_is_cut_short_says_so(digits, solver):
    hurried = logistic.SolverSettings(max_iterations=3)
    fit = {
        "sklearn": lambda: logistic.fit_sklearn(digits.X, digits.y, 1.0, settings=hurried),
        "torch": lambda: logistic.fit_torch(digits.X, digits.y, 1.0, CPU, settings=hurried),
    }[solver]()
    assert not fit.converged and fit.iterations == 3


@pytest.fixture
def parts(digits) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Features and labels to fit, and to choose C by."""
    return tuple((digits.X[rows], digits.y[rows]) for rows in held_out(digits.y, 0.2, 0))


@pytest.mark.parametrize("solver", ["sklearn", "torch"])
def test_the_path_is_a_naive_loop(parts, solver):
    train, rest = parts
    path = logistic.costs(1e-5, 1.0, 12)
    points = logistic.follow(train, rest, path, solver)
    fit = {"sklearn": logistic.fit_sklearn, "torch": lambda X, y, C: logistic.fit_torch(X, y, C, CPU)}[solver]
    naive = [accuracy(logistic.scores(rest[0], fit(*train, C)), torch.as_tensor(rest[1])) for C in path]
    assert [point.held_out for point in points] == pytest.approx(naive, abs=0.5)  # cold and warm starts: one image
    assert path[np.argmax([point.held_out for point in points])] == logistic.choose(points).C


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["sklearn", "torch"])
def test_two_processes_follow_the_same_path_to_the_bit(parts, solver):
    path = logistic.costs(1e-5, 1.0, 12)  # two parts
    assert logistic.follow(*parts, path, solver) == logistic.follow(*parts, path, solver, processes=2)


def test_of_equally_accurate_points_the_most_regularised_is_chosen():
    points = [logistic.PathPoint(C, accurate, 1, True) for C, accurate in ((0.1, 50.0), (1.0, 70.0), (10.0, 70.0))]
    assert logistic.choose(points).C == 1.0


def test_costs_are_the_inverse_of_forty_five_weight_decays():
    ours = logistic.costs(1e-5, 1e6, 45)
    assert np.allclose(ours[::-1], 1 / np.logspace(-6, 5, 45))


@pytest.mark.data
@pytest.mark.parametrize("C", [0.001, 0.01, 0.1])
def test_both_solvers_agree_on_pixels_of_cifar10(shared_data, C):
    train, test = (open_images("cifar10", shared_data, split) for split in ("train", "test"))
    X, Xt = (images.pixels[:n, ::4, ::4].reshape(n, -1) / 255 for images, n in ((train, 5000), (test, 2000)))
    data = SimpleNamespace(X=X, y=train.labels[:5000], Xt=Xt, yt=test.labels[:2000])
    theirs = logistic.fit_sklearn(data.X, data.y, C, settings=logistic.SolverSettings(1e-6, 3000))
    ours = logistic.fit_torch(data.X, data.y, C, CPU)
    assert logistic.loss(X, data.y, ours) == pytest.approx(logistic.loss(X, data.y, theirs), rel=1e-4)
    assert top1(ours, data) == pytest.approx(top1(theirs, data), abs=0.1)


@pytest.fixture
def one_process(monkeypatch):
    """No other processes: they are slow to start."""
    monkeypatch.setattr("joblib.cpu_count", lambda: 1)


def evaluate(folder, *settings, per_class=None):
    train, test = (open_images("digits", None, split) for split in ("train", "test"))
    config = configs.load("digits", "logistic", LogisticConfig, settings)
    task = Task(load("random:resnet18_quarter"), train, test.few_labels(20, 0), labels_per_class=per_class)
    return judge(task, config, folder, CPU)


def test_the_protocol_on_digits_leaves_a_record(tmp_path, one_process):
    record = evaluate(tmp_path)
    (trial,) = record["trials"]
    path = trial["path"]
    assert trial["chosen"]["C"] in [point["C"] for point in path] and len(path) == 13
    assert max(point["held_out"] for point in path) == next(
        point["held_out"] for point in path if point["C"] == trial["chosen"]["C"]
    )
    assert record["deviations"] == [
        "path.low 0.01 instead of 1e-05",
        "path.high 10000.0 instead of 1000000.0",
        "path.count 13 instead of 45",
    ]
    low, high = record["interval"]["top1"]
    assert low < record["metrics"]["top1"] < high and record["metrics"]["top1"] > 80
    assert record["selection"].startswith("held-out")


def test_a_record_says_what_did_not_converge(tmp_path, one_process, capsys):
    record = evaluate(tmp_path, "max_iterations=4", "path.count=3", "path.low=1", per_class=5)
    ends = "stopped after 4 iterations, before the tolerance 1e-05"
    assert f"3 of 3 fits of the path over C {ends}" in record["deviations"]
    assert f"the fit at the chosen C {record['trials'][0]['chosen']['C']:.3g} {ends}" in record["deviations"]
    assert "--set max_iterations=40 allows more" in capsys.readouterr().err


def test_one_label_per_class_leaves_none_to_choose_by(tmp_path, one_process):
    with pytest.raises(InputError, match=r"none can be held out to choose C.*--set path.count=1"):
        evaluate(tmp_path / "a", per_class=1)
    record = evaluate(tmp_path / "b", "path.count=1", "path.low=1.0", per_class=1)
    assert record["trials"][0]["chosen"] == {"C": 1.0} and record["over"] == "labels"


def test_a_path_that_goes_down_is_refused():
    with pytest.raises(InputError, match=r"low 10 must be below high 1"):
        configs.load("lbfgs", "logistic", LogisticConfig, ["path.low=10", "path.high=1"])


def test_rows_that_stay_in_their_files_give_the_same_fit(encoded, monkeypatch):
    """Features that are too many for the memory are read block by block."""
    everything = Features([encoded.X[:250].astype(np.float32), encoded.X[250:].astype(np.float32)])
    kept = logistic.Taken(everything, np.arange(0, 600, 2))
    whole = logistic.resident(kept, CPU)
    assert isinstance(whole, np.ndarray)
    monkeypatch.setattr(logistic, "RESIDENT", 0)
    assert logistic.resident(kept, CPU) is kept
    one, two = (logistic.fit_torch(rows, encoded.y[::2], 0.1, CPU, block=100) for rows in (whole, kept))
    assert np.array_equal(one.weight, two.weight)


def test_the_choice_and_the_refit_by_hand(digits):
    """C by the metric that is asked for, on the held-out images; then all training images, with that C."""
    train, y, test = digits.X, digits.y, digits.Xt
    config = configs.load("digits", "logistic", LogisticConfig, ["path={low: 0.0001, high: 10, count: 6}"])
    asked = []

    def worst_class(scores, labels):
        asked.append(len(labels))
        return min(accuracy(scores[labels == one], labels[labels == one]) for one in labels.unique())

    found = logistic.on_features(train, y, test, config, 0, CPU, worst_class)
    kept, held = held_out(y, config.held_out, 0)
    settings = logistic.SolverSettings(config.tolerance, config.max_iterations)
    right = []
    for C in logistic.costs(0.0001, 10, 6):
        fit = logistic.fit_torch(train[kept], y[kept], C, CPU, settings=settings)
        right.append(worst_class(logistic.scores(train[held], fit), torch.from_numpy(y[held])))
    chosen = logistic.costs(0.0001, 10, 6)[int(np.argmax(right))]
    assert found.notes["chosen"]["C"] == pytest.approx(chosen) and set(asked) == {len(held)}
    refit = logistic.fit_torch(train, y, chosen, CPU, settings=settings)
    assert torch.allclose(found.scores, logistic.scores(test, refit), atol=1e-2)


def test_scikit_learn_reaches_the_optimum_far_from_the_origin():
    generator = np.random.default_rng(0)
    X, y = generator.normal(size=(120, 6)), generator.integers(0, 3, 120)
    near, far = (
        logistic.fit_sklearn(X + shift, y, 1.0, settings=logistic.SolverSettings(1e-8, 10_000))
        for shift in (0.0, 1000.0)
    )
    assert logistic.loss(X + 1000, y, far) == pytest.approx(logistic.loss(X, y, near), rel=1e-9)


def test_more_dimensions_than_images_are_solved_in_their_span(encoded, monkeypatch):
    """Where a covariance would be too large the optimum is sought among the images: scikit-learn's all the same."""
    few = np.concatenate([np.flatnonzero(encoded.y == digit)[:6] for digit in range(10)])
    X, y = encoded.X[few], encoded.y[few]  # 60 images, 128 dimensions
    whole = logistic.fit_torch(X, y, 0.1, CPU, settings=TIGHT)
    theirs = logistic.fit_sklearn(X, y, 0.1, settings=TIGHT)
    monkeypatch.setattr(logistic, "LARGEST", 8 * 128 * 20)  # 20 rows at a time
    axes = logistic.uncorrelated(X, CPU)
    assert axes.vectors.shape == (128, 59) and axes.rows.shape == (60, 59)
    fits = [logistic.fit_torch(X, y, 0.1, CPU, None, TIGHT, axes), logistic.fit_torch(X, y, 0.1, CPU, whole, TIGHT)]
    for fit in fits:
        assert np.allclose(fit.weight, whole.weight, atol=1e-5) and np.allclose(fit.bias, whole.bias, atol=1e-4)
        assert logistic.loss(X, y, fit) == pytest.approx(logistic.loss(X, y, theirs), rel=1e-4)
    points = logistic.follow((X, y), (encoded.Xt, encoded.yt), np.array([0.01, 0.1]), "torch", settings=TIGHT)
    assert all(point.converged for point in points)


def test_raw_pixels_of_224_take_no_covariance():
    """150,528 dimensions: their covariance would take 181 GB."""
    X = np.random.default_rng(0).normal(size=(12, 3 * 224**2)).astype(np.float32)
    fit = logistic.fit_torch(X, np.arange(12) % 3, 1.0, CPU)
    assert fit.weight.shape == (3, 150_528) and fit.converged


def test_a_fit_beyond_the_memory_is_refused_with_its_size():
    features = SimpleNamespace(shape=(200_000, 150_528))
    with pytest.raises(RunFailed, match=r"150,528 dimensions of 200,000 images takes 544 GB and this machine has"):
        logistic.uncorrelated(features, CPU)


@pytest.mark.parametrize("size", [1e-25, 1e-8, 1e8, 1e25])
def test_features_of_a_size_at_which_no_c_regularises_are_refused(digits, size):
    """There a path over C would answer chance, or one number for all of it."""
    config = configs.load("digits", "logistic", LogisticConfig)
    with pytest.raises(InputError, match=r"the features have a standard deviation of .*e[+-]\d+.*moco_eval.wrap"):
        logistic.on_features(digits.X * size, digits.y, digits.Xt, config, 0, CPU)
