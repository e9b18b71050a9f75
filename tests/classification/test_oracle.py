"""Published weights whose accuracy is known: kNN and a linear classifier must find it again."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import pad, relu

from moco_eval.classification import logistic
from moco_eval.classification.knn import vote
from moco_eval.classification.neighbours import nearest
from moco_eval.config import load as configs
from moco_eval.config.classification import LogisticConfig
from moco_eval.data.catalogue import open_images
from moco_eval.features.extract import extract
from moco_eval.preprocessing import Preprocessing
from moco_eval.results.metrics import accuracy

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
WEIGHTS = DATA / "checkpoints" / "resnet20-12fca82f.th"
IMAGENET = Preprocessing(size=32, resize=32)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.data,
    pytest.mark.skipif(not WEIGHTS.is_file(), reason=f"{WEIGHTS} is not there"),
]


class Block(nn.Module):
    """Two 3x3 convolutions; a shortcut that takes every other pixel and fills new channels with zeros."""

    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.stride, self.new = stride, width - before

    def forward(self, x):
        short = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new // 2, self.new // 2))
        return relu(self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))) + short)


class ResNet20(nn.Module):
    """He et al. 2016, arXiv:1512.03385, Sec. 4.2, with shortcuts of option A."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for n, (before, width, stride) in enumerate(((16, 16, 1), (16, 32, 2), (32, 64, 2)), start=1):
            blocks = [Block(before, width, stride), *(Block(width, width, 1) for _ in range(2))]
            setattr(self, f"layer{n}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        return self.layer3(self.layer2(self.layer1(relu(self.bn1(self.conv1(x)))))).mean((2, 3))


@pytest.fixture(scope="module")
def known():
    """Features and labels of CIFAR-10's two splits, and the network's own classifier."""
    net = ResNet20().eval()
    state = torch.load(WEIGHTS, map_location="cpu", weights_only=True)["state_dict"]
    net.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    sets = [open_images("cifar10", DATA, split) for split in ("train", "test")]
    features = [extract(net, images, IMAGENET, torch.device("cpu"), batch_size=500) for images in sets]
    return features, [torch.as_tensor(images.labels) for images in sets], net.linear


def test_the_network_classifies_as_published(known):
    (_, test), (_, labels), head = known
    with torch.no_grad():
        assert accuracy(head(test), labels) == pytest.approx(91.73, abs=0.005)


@pytest.mark.parametrize(
    ("k", "temperature", "top1"), [(200, 0.1, 91.86), (200, 0.07, 91.88), (20, 0.07, 91.72), (1, 0.07, 91.37)]
)
def test_knn_finds_the_known_accuracy(k, temperature, top1, known):
    (bank, queries), (bank_labels, labels), _ = known
    found = nearest(queries, bank, k)
    assert accuracy(vote(found, bank_labels, 10, temperature), labels) == pytest.approx(top1, abs=0.011)


def test_logistic_regression_finds_the_networks_own_accuracy(known):
    (train, test), (train_labels, labels), _ = known
    config = configs.load("lbfgs", "logistic", LogisticConfig, ["path={low: 0.0001, high: 1, count: 5}"])
    assert config.path.count == 5
    found = logistic.on_features(train, train_labels.numpy(), test, config, 0, torch.device("cpu"))
    assert accuracy(found.scores, labels) == pytest.approx(91.73, abs=0.4)
