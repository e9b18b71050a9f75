"""knn/grid@1: every point as a naive loop finds it, the choice, and the protocol as a whole."""

import json
from itertools import product

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from moco_eval.classification import knn_grid
from moco_eval.classification.judge import judge
from moco_eval.classification.knn_grid import GridPoint, choose, left_out
from moco_eval.classification.task import Task
from moco_eval.config import load as configs
from moco_eval.config.classification import KnnGridConfig
from moco_eval.data.catalogue import open_images
from moco_eval.encoders.load import load
from moco_eval.errors import InputError

CPU = torch.device("cpu")
SMALL = ("k=[20,1,3]", "temperature=[0.05,1]", "workers=0")


def grid(*settings: str) -> KnnGridConfig:
    return configs.load("grid", "knn", KnnGridConfig, settings)


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes that overlap, and some images twice."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (70,), generator=generator)
    features = torch.randn(70, 6, generator=generator) + 1.2 * torch.randn(3, 6, generator=generator)[labels]
    features[60:], labels[60:] = features[:10], labels[:10]
    return features, labels


def naive(
    query: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, point: GridPoint, own: int | None = None
) -> int:
    """The class that the nearest rows vote for, but for the query's own, by a loop in float64."""
    query, bank, votes = query.double(), bank.double(), [0.0] * (int(labels.max()) + 1)
    cosine = point.distance == "cosine"
    near = normalize(bank, dim=1) @ normalize(query, dim=0) if cosine else -(bank - query).norm(dim=1)
    others = sorted((j for j in range(len(bank)) if j != own), key=lambda j: -near[j].item())
    for j in others[: point.k]:
        votes[labels[j]] += np.exp(near[j] / point.temperature) if cosine else 1 / (1e-5 - near[j])
    return int(np.argmax(votes))


def test_every_point_and_the_choice_are_a_naive_loops(rows):
    features, labels = rows
    chosen = choose(features, labels, 3, grid(*SMALL), 0, CPU)
    expected = {}
    for k in (1, 3, 20):
        for distance, temperature in (("cosine", 1), ("cosine", 0.05), ("euclidean", None)):
            point = GridPoint(distance, k, temperature)
            expected[point] = sum(naive(features[i], features, labels, point, i) == labels[i] for i in range(70))
    assert chosen.accuracy.keys() == expected.keys() and chosen.queries == 70
    for point, right in expected.items():
        assert chosen.accuracy[point] == pytest.approx(100 * int(right) / 70)
    assert len(set(chosen.accuracy.values())) > 3  # the points do differ
    best = max(chosen.accuracy.values())
    assert chosen.best == next(point for point in expected if chosen.accuracy[point] == best)  # in order of preference


def test_of_equal_points_the_smallest_k_then_cosine_then_the_largest_temperature():
    """Classes far apart: every point is right about every image."""
    labels = torch.arange(40) % 2
    features = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)) + 100 * torch.eye(4)[labels]
    chosen = choose(features, labels, 2, grid("k=[5,2,10]", "distance=[euclidean,cosine]"), 0, CPU)
    assert set(chosen.accuracy.values()) == {100}
    assert chosen.best == GridPoint("cosine", 2, 1)


def test_k_beyond_the_other_images_is_left_out_and_said(rows):
    features, labels = rows
    chosen = choose(features, labels, 3, grid("k=[5,69,70,200]"), 0, CPU)
    assert chosen.left_out == (70, 200) and {point.k for point in chosen.accuracy} == {5, 69}
    assert chosen.record()["left_out_k"] == [70, 200]
    with pytest.raises(InputError, match="k 70 is more than the 69 images"):
        choose(features, labels, 3, grid("k=[70]"), 0, CPU)


def test_a_part_of_the_images_is_drawn_from_the_seed(rows):
    drawn = left_out(1000, 50, 3)
    assert len(drawn) == len(set(drawn.tolist())) == 50 and (drawn.diff() > 0).all()
    assert torch.equal(drawn, left_out(1000, 50, 3)) and not torch.equal(drawn, left_out(1000, 50, 4))
    assert torch.equal(left_out(50, 50, 3), torch.arange(50))
    features, labels = rows
    point = GridPoint("cosine", 3, 0.05)
    chosen = choose(features, labels, 3, grid(*SMALL, "queries=33"), 7, CPU)
    right = [naive(features[i], features, labels, point, i) == labels[i] for i in left_out(70, 33, 7).tolist()]
    assert chosen.queries == 33 and chosen.accuracy[point] == pytest.approx(100 * np.mean(right))


def test_class_scores_in_parts_give_the_same(rows, monkeypatch):
    features, labels = rows
    whole = choose(features, labels, 3, grid(*SMALL), 0, CPU)
    monkeypatch.setattr(knn_grid, "VOTING", 3 * 11)
    assert choose(features, labels, 3, grid(*SMALL), 0, CPU) == whole


def test_the_protocol_is_as_documented():
    config = grid()
    assert config.k == (1, 2, 5, 10, 20, 50, 100, 200) and config.queries == 50_000
    assert config.temperature == (0.02, 0.05, 0.07, 0.1, 0.2, 0.5, 1) and config.distance == ("cosine", "euclidean")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("k=[0,5]", "every k must be greater than 0"),
        ("k=[5,5]", "k holds a value twice"),
        ("k=5", "k"),
        ("temperature=[]", "temperature"),
        ("distance=[manhattan]", "distance"),
        ("memory=0", "greater than 0"),
        ("memory=true", "a number is wanted"),
    ],
)
def test_grids_that_are_none_are_refused(setting, words):
    with pytest.raises(InputError, match=words):
        grid(setting)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The protocol on the pixels of a few digits."""
    output = tmp_path_factory.mktemp("grid")
    train, test = (open_images("digits", None, split).few_labels(12, 0) for split in ("train", "test"))
    config = grid("workers=0", "memory=0.001")
    record = judge(Task(load("pixels"), train, test), config, output, CPU)
    return output, record, train, test


def test_the_record_holds_every_point_and_what_was_chosen(run):
    output, record, train, _ = run
    assert record == json.loads((output / "result.json").read_text())
    assert (record["protocol"], record["selection"]) == ("knn/grid@1", "leave-one-out on train")
    found = record["trials"][0]["grid"]
    points = {(p["distance"], p["k"], p["temperature"]): p["top1"] for p in found["points"]}
    ks, temperatures = (1, 2, 5, 10, 20, 50, 100), (0.02, 0.05, 0.07, 0.1, 0.2, 0.5, 1)
    assert set(points) == set(product(["cosine"], ks, temperatures)) | {("euclidean", k, None) for k in ks}
    assert found["left_out_k"] == [200] and found["queries"] == len(train) == 120
    assert points[tuple(found["chosen"][key] for key in ("distance", "k", "temperature"))] == max(points.values())
    assert not [words for words in record["deviations"] if words.startswith(("memory", "workers"))]


def test_the_test_images_are_judged_by_the_chosen_point(run):
    output, record, train, test = run
    best = GridPoint(**record["trials"][0]["grid"]["chosen"])
    task = Task(load("pixels"), train, test)
    bank, queries = (task.features(images, grid("workers=0"), CPU).tensor() for images in (train, test))
    expected = [naive(query, bank, torch.as_tensor(train.labels), best) for query in queries]
    with np.load(output / "predictions.npz") as kept:
        assert kept["prediction"].tolist() == [expected]
        assert kept["neighbour"].shape == (len(test), min(10, best.k))
    assert record["metrics"]["top1"] == pytest.approx(100 * np.mean(np.array(expected) == test.labels))
    assert (output / "neighbours.png").is_file()
