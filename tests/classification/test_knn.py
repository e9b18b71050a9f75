"""The kNN classifier against naive loops and scikit-learn, and the protocol as a whole."""

import json
import math
import resource
import sys

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch.nn.functional import normalize

import moco_eval as me
from moco_eval.classification import knn
from moco_eval.classification.judge import judge
from moco_eval.classification.neighbours import Neighbours, nearest
from moco_eval.classification.task import Task
from moco_eval.config import load as configs
from moco_eval.config.classification import KnnConfig
from moco_eval.data.catalogue import open_images
from moco_eval.encoders.architectures import build_resnet
from moco_eval.encoders.load import load
from moco_eval.errors import InputError
from moco_eval.features import extract as extraction
from moco_eval.preprocessing import Preprocessing
from moco_eval.results.statistics import Answers, value

from ranks import run_ranks  # isort: skip

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def features() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(300, 16, generator=generator), torch.randn(50, 16, generator=generator)
    return bank, queries, torch.randint(0, 7, (300,), generator=generator)


def test_scores_against_a_naive_loop(features):
    bank, queries, labels = features
    found = nearest(queries, bank, 20, memory=1e5)
    scores = knn.vote(found, labels, 7, temperature=0.07)
    for i, query in enumerate(queries):
        similarity = [(query @ row / (query.norm() * row.norm())).item() for row in bank]
        best = sorted(range(300), key=lambda j: -similarity[j])[:20]
        naive = [sum(math.exp(similarity[j] / 0.07) for j in best if labels[j] == c) for c in range(7)]
        ours = scores[i].double() * math.exp(similarity[best[0]] / 0.07)
        assert torch.allclose(ours, torch.tensor(naive, dtype=torch.float64), rtol=1e-3)


def test_more_neighbours_than_images_are_refused(features):
    bank, queries, _ = features
    with pytest.raises(InputError, match="k 301 is more than the 300 images"):
        nearest(queries, bank, 301)


def test_accuracy_in_percent():
    scores = torch.tensor([[3.0, 2, 1], [3, 2, 1], [1, 2, 3], [1, 3, 2]])
    assert knn.accuracy(scores, torch.tensor([0, 1, 2, 2])) == 50
    assert knn.accuracy(scores, torch.tensor([0, 1, 2, 2]), top=2) == 100


def test_protocol_on_pixels_is_cosine_knn_and_leaves_a_record(tmp_path):
    train, test = (open_images("digits", None, split) for split in ("train", "test"))
    config = configs.load("digits", "knn", KnnConfig)
    record = judge(Task(load("pixels"), train, test), config, tmp_path, CPU)
    assert record == json.loads((tmp_path / "result.json").read_text())
    assert record["protocol"] == "knn/instdisc@1" and record["dataset"]["name"] == "digits"
    assert record["deviations"] == ["k 20 instead of 200"]
    low, high = record["interval"]["top1"]
    assert low < record["metrics"]["top1"] < high
    assert record["metrics"]["top1"] > 90
    with np.load(tmp_path / "predictions.npz") as kept:
        assert 100 * (kept["prediction"] == kept["label"]).mean() == pytest.approx(record["metrics"]["top1"])
    assert (tmp_path / "neighbours.png").is_file()
    again = judge(Task(load("pixels"), train, test), config, tmp_path, CPU)
    assert again == record


@pytest.mark.parametrize(
    ("name", "settings"), [("instdisc", (200, 0.07, "pooled")), ("cifar10-demo", (200, 0.1, "head"))]
)
def test_protocols_are_as_specified(name, settings):
    config = configs.load(name, "knn", KnnConfig)
    assert (config.k, config.temperature, config.feature) == settings
    assert config.protocol == f"knn/{name}@1"


def test_query_and_key_encoder_are_two_runs_and_the_key_is_a_deviation(tmp_path):
    torch.manual_seed(0)
    state = {}
    for which in "qk":
        net = build_resnet("resnet18_quarter", num_classes=16)
        state |= {f"module.encoder_{which}.{name}": tensor for name, tensor in net.state_dict().items()}
    torch.save({"epoch": 1, "arch": "resnet18", "state_dict": state}, tmp_path / "moco.pth")
    few = [open_images("digits", None, split).few_labels(3, 0) for split in ("train", "test")]
    config = configs.load("digits", "knn", KnnConfig, ["k=5"])
    query, key = (load(str(tmp_path / "moco.pth"), encoder=which) for which in ("query", "key"))
    judge(Task(query, *few), config, tmp_path / "run", CPU)
    with pytest.raises(InputError, match=r"encoder.which is query there and key now"):
        judge(Task(key, *few), config, tmp_path / "run", CPU)
    record = judge(Task(key, *few), config, tmp_path / "key", CPU)
    assert "the key encoder instead of the query encoder" in record["deviations"]


def test_the_head_is_asked_only_of_encoders_that_have_one(tmp_path):
    train, test = (open_images("digits", None, split) for split in ("train", "test"))
    config = configs.load("cifar10-demo", "knn", KnnConfig, ["workers=0"])
    with pytest.raises(InputError, match="has no projection head"):
        judge(Task(load("random:resnet18_quarter"), train, test), config, tmp_path, CPU)


def test_normalised_features_do_not_change_the_answer(features):
    bank, queries, _ = features
    scaled = nearest(5 * queries, normalize(bank, dim=1), 5).index
    assert torch.equal(scaled, nearest(queries, bank, 5).index)


def test_images_in_memory_give_the_features_a_loader_gives(monkeypatch):
    """Where nothing is resized they are not sent through PIL; to the bit."""
    images, as_it_is = open_images("digits", None, "test"), Preprocessing(size=32, resize=32)
    net = torch.nn.Flatten()
    assert extraction._fits_as_it_is(images, as_it_is) and not extraction._fits_as_it_is(images, Preprocessing(32, 36))
    direct = extraction.extract(net, images, as_it_is, CPU, batch_size=64)
    monkeypatch.setattr(extraction, "_fits_as_it_is", lambda *_: False)
    assert torch.equal(direct, extraction.extract(net, images, as_it_is, CPU, batch_size=64))


def test_votes_do_not_vanish_at_a_low_temperature():
    """All similarities far below 1: the nearest still decides, at any temperature."""
    found = Neighbours(torch.tensor([[0.05, 0.0, -0.1]]), torch.tensor([[0, 1, 2]]))
    scores = knn.vote(found, torch.tensor([2, 1, 1]), 3, temperature=0.005)
    assert scores.argmax(1).tolist() == [2] and scores[0, 2] == 1


@pytest.mark.parametrize("k", [1, 3, 20])
def test_a_class_without_a_vote_is_no_guess(k, few_digits, tmp_path):
    """Top-1 and top-5 as scikit-learn's neighbours give them, of classes that got a vote; so says what is kept."""
    train, test = few_digits
    config = configs.load("digits", "knn", KnnConfig, [f"k={k}"])
    record = judge(Task(load("pixels"), train, test), config, tmp_path, CPU)
    bank, queries = (me.features(load("pixels"), images)[0].astype(np.float64) for images in (train, test))
    model = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp(-distance / 0.07))
    voted = model.fit(bank, train.labels).predict_proba(queries)
    best = np.argsort(-voted, axis=1, kind="stable")[:, :5]
    right = (best == test.labels[:, None]) & (np.take_along_axis(voted, best, axis=1) > 0)
    expected = {"top1": 100 * right[:, 0].mean(), "top5": 100 * right.any(axis=1).mean()}
    assert record["metrics"] == pytest.approx(expected)
    with np.load(tmp_path / "predictions.npz") as kept:
        answers = Answers(kept["label"], scores=kept["scores"])
        assert np.array_equal(np.isfinite(kept["scores"][0]), voted > 0)
    for metric in expected:
        assert value(metric, answers) == pytest.approx(expected[metric])
        low, high = record["interval"][metric]
        assert low <= expected[metric] <= high


def test_a_vote_too_small_to_count_is_a_guess():
    """At a low temperature a far neighbour's weight is 0 in float32; its class was named all the same."""
    found = Neighbours(torch.tensor([[1.0, -1.0]]), torch.tensor([[0, 1]]))
    scores = knn.guesses(found, torch.tensor([2, 1]), 4, temperature=0.001)
    assert scores.tolist() == [[-math.inf, 0.0, 1.0, -math.inf]]
    assert [knn.accuracy(scores, torch.tensor([label]), top=3) for label in range(4)] == [0, 100, 100, 0]


# The monitor on several processes


class Wide(torch.nn.Module):
    """Each image to 512 numbers, of which many images together would be seen in the memory."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(3 * 4 * 4, 512, generator=generator), requires_grad=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ self.weight


def monitored(bank: int) -> tuple[float, int]:
    """Top-1 of the monitor, and by how many bytes this process's peak has grown."""
    draw = np.random.default_rng(0)
    labels = draw.integers(10, size=bank + 200)
    pixels = draw.integers(256, size=(bank + 200, 4, 4, 3)).astype(np.uint8) // 2 + 12 * labels[
        :, None, None, None
    ].astype(np.uint8)
    train, test = (me.ImageSet.from_arrays(pixels[part], labels[part]) for part in (slice(bank), slice(bank, None)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    top1 = knn.monitor(Wide(), train, test, Preprocessing(4, 4), CPU, k=20, temperature=0.1, workers=0)
    return top1, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def test_each_process_of_the_monitor_keeps_its_own_part_of_the_bank(tmp_path):
    alone, _ = monitored(1001)
    assert [top1 for top1, _ in run_ranks(monitored, tmp_path, 1001)] == [alone, alone] and 15 < alone < 95


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts kilobytes on Linux")
def test_the_monitors_memory_falls_with_the_number_of_processes(tmp_path):
    """A bank of 200,000 x 512 in float32 is 410 MB."""
    alone, _ = monitored(200_000)
    ranks = run_ranks(monitored, tmp_path, 200_000, ranks=4)
    assert [top1 for top1, _ in ranks] == 4 * [alone]
    assert max(grown for _, grown in ranks) < 200_000 * 512 * 4 / 4 + 200e6
