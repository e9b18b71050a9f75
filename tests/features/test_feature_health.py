"""Alignment, uniformity, rank and dead dimensions against closed forms and naive loops, and what runs leave of it."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import i0

from moco_eval.classification.judge import judge
from moco_eval.classification.task import Task
from moco_eval.config import load as configs
from moco_eval.config.base import Augmentation
from moco_eval.config.classification import KnnConfig, QuickConfig
from moco_eval.data import in_memory
from moco_eval.encoders.load import load
from moco_eval.errors import InputError
from moco_eval.features import cache, health, sample
from moco_eval.features.extract import Crops, pixels
from moco_eval.features.stages import network
from moco_eval.report.page import write_report
from moco_eval.runtime.files import read_json

CPU = torch.device("cpu")


@pytest.fixture
def random():
    return np.random.default_rng(0)


# The mathematics


def test_uniformity_of_a_circle_is_bessels(random):
    """The mean of exp(4 cos a - 4) over all angles a is exp(-4) I0(4); the pairs leave each point with itself out."""
    n = 300
    angles = 2 * np.pi * np.arange(n) / n
    circle = random.uniform(0.1, 9, (n, 1)) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    wanted = math.log((n * math.exp(-4) * i0(4) - 1) / (n - 1))
    assert health.uniformity(circle) == pytest.approx(wanted, abs=1e-9)


def test_uniformity_of_a_simplex_is_its_distance():
    corners = np.eye(7) - 1 / 7  # squared distance of unit corners: 2 n / (n - 1)
    assert health.uniformity(corners) == pytest.approx(-2 * 2 * 7 / 6)
    assert health.uniformity(corners, t=1) == pytest.approx(-2 * 7 / 6)


def test_uniformity_of_one_point_is_0_and_of_one_image_nothing():
    assert health.uniformity(np.full((5, 3), 2.0)) == pytest.approx(0, abs=1e-12)
    assert health.uniformity(np.ones((1, 3))) is None


def test_uniformity_and_alignment_are_the_naive_loops(random):
    x, y = random.normal(size=(2, 12, 5))
    units = [[row / math.sqrt(sum(v * v for v in row)) for row in rows] for rows in (x, y)]
    pairs = [
        math.exp(-2 * sum((a - b) ** 2 for a, b in zip(units[0][i], units[0][j]))) for i in range(12) for j in range(i)
    ]
    assert health.uniformity(x) == pytest.approx(math.log(sum(pairs) / len(pairs)))
    distances = [sum((a - b) ** 2 for a, b in zip(p, q)) for p, q in zip(*units)]
    assert health.alignment(x, y) == pytest.approx(sum(distances) / 12)


def test_alignment_knows_no_length_and_two_is_orthogonal(random):
    x = random.normal(size=(9, 4))
    assert health.alignment(x, 3 * x) == pytest.approx(0, abs=1e-12)
    assert health.alignment(np.eye(4), np.roll(np.eye(4), 1, axis=0)) == pytest.approx(2)
    assert health.alignment(x, -x) == pytest.approx(4)


@pytest.mark.parametrize("shape", [(6, 6), (30, 6), (6, 30)])
def test_effective_rank_is_full_for_orthogonal_directions_and_1_for_one(shape, random):
    left, right = (np.linalg.qr(random.normal(size=(n, n)))[0] for n in shape)
    orthonormal = 5 * left[:, :6] @ right[:6]
    assert health.effective_rank(orthonormal) == pytest.approx(6, rel=1e-6)
    assert health.effective_rank(np.outer(left[0], right[0])) == pytest.approx(1, abs=1e-6)
    assert health.effective_rank(np.zeros(shape)) == 0


def test_effective_rank_is_the_entropy_of_numpys_singular_values(random):
    x = random.normal(size=(40, 15)) @ random.normal(size=(15, 25))
    share = np.linalg.svd(x, compute_uv=False)[:15]
    share = share / share.sum()
    assert health.effective_rank(x) == pytest.approx(math.exp(-sum(p * math.log(p) for p in share)), rel=1e-6)
    assert health.effective_rank(100 * x.T) == pytest.approx(health.effective_rank(x))


def test_dead_dimensions_are_counted(random):
    x = random.normal(size=(50, 8))
    assert health.dead_dimensions(x) == 0
    x[:, 2], x[:, 5] = 3.0, 1e-6 * x[:, 0]
    assert health.dead_dimensions(x) == 2
    x[:, 5] *= 100
    assert health.dead_dimensions(x) == 1
    assert health.dead_dimensions(np.ones((4, 3))) == 3


def test_zeros_have_health():
    found = health.describe(np.zeros((4, 3)), (np.zeros((2, 3)), np.zeros((2, 3))))
    assert (found["uniformity"], found["alignment"], found["effective_rank"], found["dead_dimensions"]) == (0, 0, 0, 3)


@pytest.mark.parametrize("shape", [(40, 60), (40, 7)])
def test_principal_components_are_scikit_learns(shape, random):
    from sklearn.decomposition import PCA

    x = random.normal(size=shape) * np.linspace(1, 3, shape[1]) + 5
    ours, share = sample.principal_components(x, 5)
    theirs = PCA(5, svd_solver="full").fit(x)
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs.transform(x)), atol=1e-4)
    np.testing.assert_allclose(share, theirs.explained_variance_ratio_, rtol=1e-5)
    assert (ours[np.abs(ours).argmax(axis=0), np.arange(5)] > 0).all()


def test_principal_components_of_one_point():
    scores, share = sample.principal_components(np.ones((3, 2)))
    assert not scores.any() and not share.any()


@pytest.mark.parametrize(("count", "most"), [(0, 5), (3, 5), (5, 5), (50_000, 2000), (1001, 1000)])
def test_evenly_takes_no_image_twice_and_spans_the_set(count, most):
    rows = sample.evenly(count, most)
    assert len(rows) == min(count, most) == len(set(rows.tolist()))
    gaps = np.diff([*rows, count])
    assert not count or (rows[0] == 0 and gaps.max() - gaps.min() <= 1)


# The file


def a_sample(labels=(0, 1, 1)):
    label = np.array(labels)
    return sample.Sample(
        np.array([0, 4, 8]), label, ("a", "ü"), np.arange(6, dtype=np.float32).reshape(3, 2), np.array([0.7, 0.2], "f4")
    )


@pytest.mark.parametrize("labels", [(0, 1, 1), ((1, 0), (0, -1), (1, 1))])
def test_a_sample_is_read_as_it_was_written(labels, tmp_path):
    sample.write(tmp_path / "sample.npz", a_sample(labels))
    found = sample.read(tmp_path / "sample.npz")
    assert found.classes == ("a", "ü")
    for name in ("index", "label", "components", "variance"):
        assert np.array_equal(getattr(found, name), getattr(a_sample(labels), name))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label": np.array([0, 1])}, "label (2,)"),
        ({"label": np.array([0, 1, 2])}, "a label is not one of its 2 classes"),
        ({"label": np.array([0.0, 1, 1])}, "label of type float64"),
        ({"components": np.full((3, 2), np.nan, np.float32)}, "a component is not finite"),
        ({"components": np.zeros((3, 3))}, "components (3, 3)"),
        ({"classes": np.array([{}], dtype=object)}, "cannot be read"),
        ({"variance": None}, "cannot be read"),
    ],
)
def test_a_damaged_sample_is_refused_by_name(change, words, tmp_path):
    path = tmp_path / "sample.npz"
    parts = {**vars(a_sample()), "classes": np.array(["a", "b"])} | change
    np.savez(path, **{name: array for name, array in parts.items() if array is not None})
    with pytest.raises(InputError, match=r"sample\.npz.*run the evaluation again") as raised:
        sample.read(path)
    assert words in str(raised.value)


@pytest.mark.parametrize("share", [0, 0.3, 0.9])
def test_a_cut_sample_is_refused(share, tmp_path):
    path = tmp_path / "sample.npz"
    sample.write(path, a_sample())
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(InputError, match=r"sample\.npz cannot be read"):
        sample.read(path)


# What evaluations leave


@pytest.fixture(scope="module")
def encoder():
    return load("random:resnet18_quarter")


def task(encoder, **more) -> Task:
    train, test = (
        replace(one, pixels=one.pixels[:count], labels=one.labels[:count], fingerprint=f"few {one.split}")
        for one, count in ((in_memory.digits("train"), 60), (in_memory.digits("test"), 30))
    )
    return Task(encoder, train, test, **more)


def knn_recipe() -> KnnConfig:
    return configs.load("digits", "knn", KnnConfig, ("k=5",))


def naive_features(work: Task, images, crops, rows) -> np.ndarray:
    """One image at a time."""
    net = network(work.encoder, "pooled").eval()
    epoch = crops.epoch if crops else 0
    batches = [[(epoch, int(row))] for row in rows]
    with torch.no_grad():
        views = pixels(images, work.preprocessing, crops, batches, CPU, 0)
        return np.concatenate([net(one).flatten(1).numpy() for one in views])


@pytest.mark.parametrize("cached", [False, True])
def test_knn_leaves_a_sample_and_health_of_the_test_images(cached, encoder, tmp_path):
    """Without crops there is no alignment; from the cache or not, the numbers are the same."""
    work = task(encoder, cache=tmp_path / "cache" if cached else None)
    record = judge(work, knn_recipe(), tmp_path / "run", CPU)
    clean = naive_features(work, work.test, None, range(30))
    assert record == read_json(tmp_path / "run" / "result.json") and record["health"].pop("alignment") is None
    assert record["health"].pop("crops") is None
    wanted = health.describe(clean)
    assert record["health"] == pytest.approx({key: wanted[key] for key in record["health"]}, rel=1e-4)
    found = sample.read(tmp_path / "run" / "sample.npz")
    assert found.index.tolist() == list(range(30)) and np.array_equal(found.label, work.test.labels)
    assert found.classes == tuple("0123456789") and found.components.shape == (30, 30)
    wanted, share = sample.principal_components(clean)
    np.testing.assert_allclose(found.variance, share, atol=1e-5)
    np.testing.assert_allclose(np.abs(found.components[:, :3]), np.abs(wanted[:, :3]), rtol=1e-2, atol=1e-4)


def test_features_in_the_cache_pass_no_network_again(encoder, tmp_path, monkeypatch):
    judge(task(encoder, cache=tmp_path / "cache"), knn_recipe(), tmp_path / "first", CPU)
    monkeypatch.setattr(cache, "pixels", None)
    record = judge(task(encoder, cache=tmp_path / "cache"), knn_recipe(), tmp_path / "second", CPU)
    assert record["health"] == read_json(tmp_path / "first" / "result.json")["health"]
    files = [(tmp_path / run / "sample.npz").read_bytes() for run in ("first", "second")]
    assert files[0] == files[1]


def test_alignment_is_of_the_protocols_own_crops(encoder, tmp_path):
    recipe = configs.load(
        "quick", "linear", QuickConfig, ("crops=2", "schedule.epochs=2", "schedule.milestones=[1]", "workers=0")
    )
    record = judge(task(encoder, cache=tmp_path / "cache"), recipe, tmp_path / "run", CPU)
    work = task(encoder)
    two = [naive_features(work, work.train, Crops(recipe.augmentation, 0, epoch), range(60)) for epoch in (0, 1)]
    assert record["health"]["alignment"] == pytest.approx(health.alignment(*two), rel=1e-4)
    assert record["health"]["alignment_images"] == 60
    whole = Augmentation(crop_scale=(1.0, 1.0), flip=False)
    mild = [naive_features(work, work.train, Crops(whole, 0, epoch), range(60)) for epoch in (0, 1)]
    assert health.alignment(*mild) < record["health"]["alignment"]


def test_a_run_that_ended_before_its_record_makes_them_again(encoder, tmp_path):
    work, run = task(encoder), tmp_path / "run"
    first = judge(work, knn_recipe(), run, CPU)
    before = (run / "sample.npz").read_bytes()
    shutil.copytree(run, tmp_path / "again")
    for name in ("result.json", "sample.npz"):
        (tmp_path / "again" / name).unlink()
    again = judge(work, knn_recipe(), tmp_path / "again", CPU)
    assert again["health"] == first["health"] and (tmp_path / "again" / "sample.npz").read_bytes() == before


def test_a_real_run_fills_the_reports_new_sections(encoder, tmp_path):
    judge(task(encoder), knn_recipe(), tmp_path / "run", CPU)
    write_report([tmp_path], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for words in ("Maps of features", "All 30 test images", "Health of the features", "Which classes are confused"):
        assert words in page
