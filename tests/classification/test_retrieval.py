"""Retrieval by class: against naive loops and scikit-learn, and the whole command on the digits."""

import json

import numpy as np
import pytest
import torch
from commands import in_process
from sklearn.metrics import average_precision_score
from sklearn.neighbors import NearestNeighbors

from moco_eval.classification import retrieval
from moco_eval.errors import InputError

CPU = torch.device("cpu")


def some(count=90, classes=7, seed=0):
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, count)
    features = random.normal(size=(count, 6)) + 1.5 * np.eye(classes, 6)[labels]
    return torch.from_numpy(features).float(), labels


def test_average_precision_is_scikit_learns_query_by_query():
    features, labels = some()
    found = retrieval.rank(features, labels, None, CPU)
    unit = features.double() / features.double().norm(dim=1, keepdim=True)
    similarity = (unit @ unit.T).numpy()
    for place, query in enumerate(found.queries):
        others = np.arange(len(labels)) != query
        wanted = average_precision_score(labels[others] == labels[query], similarity[query][others])
        assert found.precision[place] == pytest.approx(100 * wanted, abs=1e-3)
    assert found.metrics()["mAP"] == pytest.approx(found.precision.mean())


def test_recall_is_that_of_scikit_learns_neighbours():
    features, labels = some(seed=1)
    found = retrieval.rank(features, labels, None, CPU)
    index = NearestNeighbors(n_neighbors=11, metric="cosine").fit(features).kneighbors(features)[1]
    for place, query in enumerate(found.queries):
        others = [other for other in index[query] if other != query][:10]
        for column, k in enumerate(retrieval.RECALLS):
            assert found.hits[place, column] == any(labels[other] == labels[query] for other in others[:k])


def test_a_loop_over_a_ranking_by_hand():
    """Relevant at places 1 and 3: (1/1 + 2/3) / 2; the image that is alone in its class asks nothing."""
    features = torch.tensor([[1.0, 0], [1, 0.1], [1, 0.2], [1, 0.3], [-1, 0]])
    labels = np.array([0, 0, 1, 0, 2])
    found = retrieval.rank(features, labels, None, CPU)
    assert found.queries.tolist() == [0, 1, 3]
    assert found.precision[0] == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert found.hits[2].tolist() == [False, True, True]
    table = retrieval.by_class(found, labels, ("a", "b", "c"))
    assert table["a"]["mAP"] == pytest.approx(found.precision.mean())
    assert table["b"] == {"mAP": None, "recall@1": None, "recall@5": None, "recall@10": None}


def test_blocks_of_queries_change_nothing(monkeypatch):
    features, labels = some()
    whole = retrieval.rank(features, labels, None, CPU)
    monkeypatch.setattr(retrieval, "AT_ONCE", 7)
    parts = retrieval.rank(features, labels, 1e5, CPU)
    assert np.array_equal(whole.hits, parts.hits)
    np.testing.assert_allclose(whole.precision, parts.precision, atol=1e-4)


def test_intervals_hold_the_means_and_a_perfect_encoder_has_all():
    features, labels = some()
    found = retrieval.rank(features, labels, None, CPU)
    for name, (low, high) in found.intervals().items():
        assert low < found.metrics()[name] < high
    perfect = retrieval.rank(torch.eye(7)[labels], labels, None, CPU)
    assert set(perfect.metrics().values()) == {100.0}


def test_a_set_of_single_images_is_refused():
    with pytest.raises(InputError, match="no class has two images"):
        retrieval.rank(torch.eye(3), np.arange(3), None, CPU)


def test_the_command_leaves_a_record(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("retrieve", "pixels", "--dataset", "digits", "--device", "cpu", "--workers", "0", "--output", "run")
    planned, _ = in_process(capfd, monkeypatch, *words, "--dry-run")
    assert "retrieve/cosine@1 of pixels" in planned and not (tmp_path / "run").exists()
    out, _ = in_process(capfd, monkeypatch, *words)
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    metrics = record["metrics"]
    assert list(metrics) == ["mAP", "recall@1", "recall@5", "recall@10"]
    assert 100 > metrics["recall@10"] > metrics["recall@1"] > 90 > metrics["mAP"] > 30
    assert f"retrieve/cosine@1 digits mAP {metrics['mAP']:.2f}" in out
    assert list(record["per_class"]) == [str(digit) for digit in range(10)] and record["queries"] == 500
    again, _ = in_process(capfd, monkeypatch, *words)
    assert again == out


def test_a_limit_is_taken_and_said(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("retrieve", "pixels", "--dataset", "digits", "--device", "cpu", "--workers", "0", "--output", "run")
    in_process(capfd, monkeypatch, *words, "--limit", "40")
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["dataset"]["images"] == 40
    assert any("40 images, evenly spread" in deviation for deviation in record["deviations"])
