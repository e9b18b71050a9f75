"""The Python API as a guest: the network, the threads and the process of its host are as they were."""

import logging
import os
import random
import signal
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from own_network import SHORT, SIZE, Net, encoder, refusal
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import moco_eval as me
from moco_eval.errors import RunFailed

PROTOCOLS = [
    ("knn/digits", {}),
    ("knn/grid@1", {"k": [1, 5], "workers": 0}),
    ("linear/digits", SHORT),
    ("linear/quick@1", {**SHORT, "crops": 1, "workers": 0}),
    ("logistic/digits", {"path": {"low": 1.0, "high": 1.0, "count": 1}}),
    ("finetune/digits", {"schedule": {"epochs": 1, "kind": "cosine", "milestones": []}}),
]

pytestmark = pytest.mark.library


class Gives(nn.Module):
    """A network that gives whatever a function makes of its features."""

    def __init__(self, function):
        super().__init__()
        self.net, self.function = Net(), function

    def forward(self, x):
        return self.function(self.net(x))


class OtherWidth(Net):
    def forward(self, x):
        return super().forward(x)[:, : 3 if self.training else 6]


class Counts(Net):
    """Notes in a buffer how many images it has seen, in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.counts = False

    def forward(self, x):
        if self.counts:
            self.seen += len(x)
        return super().forward(x)


# What is no encoder


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (Gives(lambda z: (z, z)), "gives a tuple"),
        (Gives(lambda z: {"features": z}), "gives a dict"),
        (Gives(lambda z: z[:, :, None, None].expand(2, 6, 4, 4)), "net gives maps, 2 x 6 x 4 x 4: pooling is missing"),
        (Gives(lambda z: z.mean(1)), "net gives 2 for 2 images"),
        (Gives(lambda z: z[:1]), "net gives 1 x 6 for 2 images"),
        (Gives(lambda z: z / 0), "not finite"),
        (Gives(lambda z: z.argmax(1, keepdim=True)), "torch.int64; features are floating-point numbers"),
        (OtherWidth(), "6 numbers an image in evaluation mode and 2 x 3 in training mode"),
        (Net().to("meta"), "net is on the meta device"),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), "lazy module (1.weight has no shape yet)"),
        (Net().bfloat16(), "net does not take images of 3 x 32 x 32 pixels (RuntimeError"),
        ("net.pth", "net is a str; give a torch.nn.Module"),
        (Net, "net is a type"),
    ],
)
def test_a_network_that_is_no_encoder_is_refused_in_words(net, words):
    assert words in refusal(me.wrap, net, SIZE)


def test_a_vit_of_another_size():
    timm = pytest.importorskip("timm")
    shape = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 0}
    net = timm.models.vision_transformer.VisionTransformer(img_size=32, **shape)
    assert "net does not take images of 3 x 64 x 64 pixels" in refusal(me.wrap, net, me.Preprocessing(size=64))
    assert me.wrap(net, SIZE).feature_dim == 32


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"size": -3}, "preprocessing makes no sense"),
        ({"size": "32"}, "preprocessing makes no sense"),
        ({"size": 64, "resize": 32}, "preprocessing makes no sense"),
        ({"size": 32, "channels": "rgb"}, "channels='rgb'"),
        ({"size": 32, "std": (0.0, 0.2, 0.2)}, "std=(0.0, 0.2, 0.2)"),
        ({"size": 32, "mean": 0.5}, "preprocessing is damaged"),
        ({"size": 32, "range": 100}, "preprocessing has pixels of 0..100"),
    ],
)
def test_a_preprocessing_that_makes_no_sense(values, words):
    assert words in refusal(me.wrap, Net(), me.Preprocessing(**values))
    assert "preprocessing is a dict; give a moco_eval.Preprocessing" in refusal(me.wrap, Net(), values)


def test_a_network_that_moved_is_refused(few_digits):
    mine = encoder()
    mine.backbone.to("meta")
    assert "device 'cpu': network is on meta; move it there first" in refusal(me.judge, mine, *few_digits, device="cpu")
    assert "network is on meta; move it to the CPU or to a GPU" in refusal(me.judge, mine, *few_digits)


# The network is as it was


def network() -> nn.Module:
    """Mixed modes, a frozen tensor, gradients, a hook and a buffer that no state dict keeps."""
    torch.manual_seed(0)
    net = nn.Sequential(Counts(), nn.Dropout(0.5), nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5))
    for step in range(3):
        net(torch.randn(8, 3, 32, 32) + step).square().sum().backward()
    net[0].conv.bias.requires_grad_(False)
    net[0].bn.eval()
    return net


def traces(net: nn.Module) -> dict:
    """All that a host could find changed."""
    return {
        "modes": [module.training for module in net.modules()],
        "requires_grad": [tensor.requires_grad for tensor in net.parameters()],
        "gradients": [(id(tensor.grad), tensor.grad.tolist()) for tensor in net.parameters()],
        "tensors": [(id(tensor), tensor.tolist()) for tensor in (*net.parameters(), *net.buffers())],
        "hooks": [list(module._forward_hooks) + list(module._forward_pre_hooks) for module in net.modules()],
        "attributes": [sorted(vars(module)) for module in net.modules()],
    }


@pytest.mark.parametrize(("protocol", "settings"), PROTOCOLS)
def test_a_network_is_given_back_as_it_came(protocol, settings, few_digits):
    net, seen = network(), []
    net[0].register_forward_hook(lambda *_: seen.append(1))
    before = traces(net)
    mine = me.wrap(net, SIZE)
    assert traces(net) == before
    me.judge(mine, *few_digits, protocol, **settings)
    assert traces(net) == before and seen
    with pytest.raises(ValueError):
        me.judge(mine, *few_digits, "linear/digits", feature="head")
    assert traces(net) == before


def test_a_forward_that_writes_to_a_buffer_is_told(few_digits):
    net = Counts()
    mine = me.wrap(net, SIZE)
    net.counts = True
    with pytest.raises(RunFailed, match="a tensor of the network changed while it was judged"):
        me.judge(mine, *few_digits, "knn/digits")


def test_a_network_that_trained_on_is_another_encoder(few_digits, tmp_path):
    mine = encoder()
    runs = [me.judge(mine, *few_digits, "knn/digits", cache=tmp_path)]
    with torch.no_grad():
        mine.backbone.bn.running_mean += torch.linspace(-1, 1, 6)
    runs += [me.judge(mine, *few_digits, "knn/digits", cache=tmp_path)]
    again = me.judge(mine, *few_digits, "knn/digits")
    first, second = (run.record["encoder"]["sha256"] for run in runs)
    assert first != second == again.record["encoder"]["sha256"]
    np.testing.assert_array_equal(runs[1].scores, again.scores)
    assert not np.array_equal(runs[0].scores, runs[1].scores)


# The process is as it was


def host() -> dict:
    """What belongs to the process, as plain values."""
    random_state = np.random.get_state()
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": (random_state[1].tolist(), *random_state[2:]),
        "random": random.getstate(),
        "tf32": [place.fp32_precision for place in (torch.backends.cuda.matmul, torch.backends.cudnn.conv)],
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "threads": torch.get_num_threads(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "argv": list(sys.argv),
        "warnings": list(warnings.filters),
        "environ": dict(os.environ),
        "logging": [logging.getLogger(name).level for name in (None, "torch", "matplotlib", "PIL", "py.warnings")],
        "streams": (sys.stdout, sys.stderr),
        "cwd": Path.cwd(),
    }


@pytest.mark.parametrize(("protocol", "settings"), PROTOCOLS)
def test_the_process_is_as_it_was(protocol, settings, few_digits):
    mine, loaded = encoder(), me.load("random:resnet18_quarter")
    me.judge(mine, *few_digits, protocol, **settings)  # libraries have been imported
    during = []
    mine.backbone.register_forward_hook(lambda *_: during.append(host()["signals"]))
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        before = host()
        me.judge(mine, *few_digits, protocol, **settings)
        me.features(mine, few_digits[1])
        me.load("random:resnet18_quarter", arch=loaded.arch)
        assert host() == before and all(signals == before["signals"] for signals in during) and during
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"


def test_wrapping_draws_nothing():
    net = nn.Sequential(Net(), nn.Dropout(0.5))
    before = host()
    me.wrap(net, SIZE)
    assert host() == before


SURPRISES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("surprise", SURPRISES)
def test_a_host_in_another_mode_gets_the_same_numbers(surprise, few_digits):
    net = encoder().backbone
    for protocol, settings in [*PROTOCOLS[:1], *PROTOCOLS[2:]]:
        usual = me.judge(me.wrap(net, SIZE), *few_digits, protocol, **settings)
        with SURPRISES[surprise]():
            before = host()
            found = me.judge(me.wrap(net, SIZE), *few_digits, protocol, **settings)
            assert host() == before
        np.testing.assert_array_equal(found.scores, usual.scores)


def test_an_encoder_made_in_inference_mode(few_digits):
    usual = me.load("random:resnet18_quarter")
    with torch.inference_mode():
        loaded, net = me.load("random:resnet18_quarter"), Net()
        mine = me.wrap(net, SIZE)
    one = [
        me.judge(it, *(part.take(np.arange(30)) for part in few_digits), "knn/digits", k=5) for it in (usual, loaded)
    ]
    np.testing.assert_array_equal(one[0].scores, one[1].scores)
    assert not any(tensor.is_inference() for tensor in loaded.backbone.parameters())
    for protocol, settings in (PROTOCOLS[2], PROTOCOLS[5]):
        me.judge(mine, *few_digits, protocol, **settings)
    assert all(tensor.requires_grad for tensor in net.parameters())


def test_another_default_dtype_is_refused(few_digits):
    mine = encoder()
    torch.set_default_dtype(torch.float64)
    try:
        assert "torch's default dtype is torch.float64" in refusal(me.judge, mine, *few_digits)
    finally:
        torch.set_default_dtype(torch.float32)


def test_from_another_thread(few_digits):
    with ThreadPoolExecutor(1) as pool:
        for protocol, settings in PROTOCOLS[2:3]:
            there = pool.submit(me.judge, encoder(), *few_digits, protocol, **settings).result()
            assert there.metrics == me.judge(encoder(), *few_digits, protocol, **settings).metrics


@pytest.mark.parametrize("same", [True, False], ids=["one network", "two networks"])
def test_two_threads_judge_at_once(same, few_digits):
    first = encoder()
    second = first if same else encoder()
    first.backbone.train()
    jobs = [(first, *PROTOCOLS[2])] + [(second, *PROTOCOLS[0])] * 4
    usual = [me.judge(mine, *few_digits, protocol, **settings).scores for mine, protocol, settings in jobs]
    start = threading.Barrier(len(jobs))

    def job(mine, protocol, settings):
        start.wait()
        return me.judge(mine, *few_digits, protocol, **settings).scores

    with ThreadPoolExecutor(len(jobs)) as pool:
        found = list(pool.map(job, *zip(*jobs)))
    for one, other in zip(usual, found):
        np.testing.assert_array_equal(one, other)
    assert first.backbone.training and all(tensor.requires_grad for tensor in first.backbone.parameters())


# The monitor


def training(few_digits, watch: bool):
    """Three epochs of a small network, with or without a monitor; what is left at the end."""
    torch.manual_seed(0)
    net = nn.Sequential(Net(), nn.Dropout(0.2), nn.Linear(6, 10))
    train = few_digits[0]
    data = TensorDataset(torch.from_numpy(train.pixels).permute(0, 3, 1, 2).float() / 255, torch.tensor(train.labels))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    look = me.Monitor(*few_digits, SIZE, protocol="knn/digits", every=2) if watch else None
    results = []
    for epoch in range(3):
        for images, labels in DataLoader(data, 50, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
        if look:
            results.append(look(net[0], epoch))
    states = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())
    return traces_of_training(net), states, look, results


def traces_of_training(net: nn.Module) -> dict:
    found = traces(net)
    ids = {"gradients": [value for _, value in found["gradients"]], "tensors": [value for _, value in found["tensors"]]}
    return found | ids


def test_a_monitor_leaves_no_trace_in_the_training(few_digits):
    random.seed(0), np.random.seed(0)
    *plain, _, _ = training(few_digits, watch=False)
    random.seed(0), np.random.seed(0)
    *watched, look, results = training(few_digits, watch=True)
    assert watched == plain
    assert [step for step, _ in look.history] == [0, 2] and results[1] is None
    assert [result for _, result in look.history] == [results[0], results[2]]
    first, last = (result.record["encoder"]["sha256"] for _, result in look.history)
    assert first != last and results[0].protocol == "knn/instdisc@1"


def test_a_monitor_refuses_what_is_wrong_before_the_training(few_digits):
    def monitor(**settings):
        return refusal(me.Monitor, *few_digits, SIZE, **settings)

    assert "Did you mean 'knn/instdisc@1'?" in monitor(protocol="knn/instdsc@1")
    assert "Did you mean 'temperature'?" in monitor(temprature=1)
    assert "every is 0; take an integer of at least 1" in monitor(every=0)
    assert "trials is 0" in monitor(trials=0)
    assert "labels 'few'" in monitor(labels="few")
    assert "output" in monitor(output="run")
    assert "preprocessing is a int" in refusal(me.Monitor, *few_digits, 32)
    assert "train is a list" in refusal(me.Monitor, [], few_digits[1], SIZE)
