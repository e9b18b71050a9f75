"""The Python that the pages show, run as it stands there: on small data, with weights made here."""

import ast
import io
import pickle
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from checkpoints import ours
from commands import ROOT, environment, in_process
from documented import blocks

import moco_eval
from moco_eval.data.in_memory import CIFAR10_CLASSES, CIFAR10_FILES

pytestmark = pytest.mark.library
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
FEWER = {"knn": {"k": 5}, "log": {"path": {"count": 2}}}  # settings for sixty images
NEW = (ROOT / "docs" / "new_protocol.md").read_text(encoding="utf-8")


def python_of(text: str) -> list[str]:
    return ["\n".join(lines) + "\n" for _, language, lines in blocks(text) if language == "python"]


def the_one(text: str, holding: str) -> str:
    (found,) = (code for code in python_of(text) if holding in code)
    return found


def run(code: str, **replaced: str) -> tuple[dict[str, Any], str]:
    """The names that a block leaves and what it prints; `replaced` are pieces of it that a small run does without."""
    for piece, other in replaced.values():
        assert piece in code, piece
        code = code.replace(piece, other)
    names: dict[str, Any] = {}
    with redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "page", "exec"), names)
    return names, out.getvalue()


class Python2(pickle._Pickler):
    """Writes text and bytes as Python 2's one string, as CIFAR-10 was published: a reader says what it is to be."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, value: str | bytes) -> None:
        data = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def python_2(value: object) -> bytes:
    file = io.BytesIO()
    Python2(file, 2).dump(value)
    return file.getvalue()


@pytest.fixture
def cifar(tmp_path, monkeypatch) -> Path:
    """CIFAR-10 of ten images a file, without the checksums of the published one."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "datasets" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in (file for files in CIFAR10_FILES.values() for file in files):
        pixels = generator.integers(0, 256, (10, 3072), dtype=np.uint8)
        (folder / name).write_bytes(python_2({"data": pixels, "labels": list(range(10))}))
    (folder / "batches.meta").write_bytes(python_2({"label_names": list(CIFAR10_CLASSES)}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda _: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    return folder.parent


@pytest.fixture
def readme(cifar, tmp_path, monkeypatch):
    """README's script on that data; `mine` is a checkpoint made here."""
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine.pth"
    torch.save(ours(), mine)
    code = the_one(README, "results = {}")
    assert len(code.splitlines()) <= 20
    return lambda: run(
        code,
        data=('"/datasets"', repr(str(cifar))),
        weights=('weights="IMAGENET1K_V1"', "weights=None"),
        mine=('"runs/pretrain-cifar10-cifar10/checkpoints/last.pth"', repr(str(mine))),
        k=("train, test, protocol)", f"train, test, protocol, workers=0, **{FEWER}.get(protocol[:3], {{}}))"),
    )


def test_the_readmes_script_runs_and_gives_what_the_commands_give(readme, cifar, tmp_path, capfd, monkeypatch):
    names, out = readme()
    assert out.count("linear/quick@1 cifar10 top1") == 2 and "B - A in top1" in out
    theirs = names["net"]
    assert theirs.training and all(weight.requires_grad for weight in theirs.parameters())
    fewer = {"knn/instdisc@1": ["k=5"], "linear/quick@1": [], "logistic/lbfgs@1": ["path.count=2"]}
    for protocol, settings in fewer.items():
        kind, name = protocol.removesuffix("@1").split("/")
        arguments = ["--dataset", "cifar10", "--data", cifar, "--protocol", name, "--workers", "0"]
        arguments += [f"--set={setting}" for setting in settings]
        in_process(capfd, monkeypatch, kind, "mine.pth", *arguments, "--output", tmp_path / kind)
        command = moco_eval.Result.read(tmp_path / kind)
        result = names["results"]["mine", protocol]
        assert (command.metrics, command.interval, command.deviations) == (
            result.metrics,
            result.interval,
            result.deviations,
        )
        assert np.array_equal(command.scores, result.scores)


def test_the_pages_other_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(ours(), "mine.pth")
    run(
        the_one(PYTHON, "linear/quick@1"),
        mine=('"runs/digits/checkpoints/last.pth"', '"mine.pth"'),
        epochs=('schedule={"epochs": 20}', 'schedule={"epochs": 1}, crops=0, workers=0'),
    )
    assert run(the_one(PYTHON, "timm.create_model"))[0]["encoder"].feature_dim == 512
    assert run(the_one(PYTHON, "from_arrays"))[0]["images"].classes == ("cat", "dog", "fox", "owl")


def test_the_loop_of_the_page_looks_every_other_epoch():
    names, out = run(the_one(PYTHON, "monitor(net, epoch)"))
    assert [step for step, _ in names["monitor"].history] == [0, 2]
    assert [line.split()[0] for line in out.splitlines()] == ["0", "2"]


def trained(trainer_of, monitor) -> tuple[torch.nn.Module, Any]:
    """A small network with batch norm and dropout after two epochs, and the trainer."""
    import pytorch_lightning as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            layers = (torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Dropout(0.2))
            self.backbone = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
            self.head = torch.nn.Linear(8, 10)

        def training_step(self, batch, _):
            images, labels = batch
            return torch.nn.functional.cross_entropy(self.head(self.backbone(images)), labels)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    pl.seed_everything(0, verbose=False)
    module = Module()
    images, labels = torch.rand(32, 3, 32, 32), torch.arange(32) % 10
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 8, shuffle=True)
    trainer = trainer_of(pl, monitor)
    trainer.fit(module, batches)
    return module, trainer


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_the_lightning_callback_changes_no_bit(tmp_path):
    pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed (pip install '.[peers]')")
    callback = run(the_one(PYTHON, "pl.Callback"))[0]["Judge"]
    train, test = moco_eval.images("digits")
    monitor = moco_eval.Monitor(train.take(np.arange(100)), test.take(np.arange(50)), moco_eval.Preprocessing(32), k=5)

    def trainer_of(pl, watched):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        callbacks = [callback(watched)] if watched else []
        return pl.Trainer(
            max_epochs=2, accelerator="cpu", devices=1, callbacks=callbacks, default_root_dir=tmp_path, **quiet
        )

    watched, trainer = trained(trainer_of, monitor)
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    alone, _ = trained(trainer_of, None)
    assert torch.equal(states[0], torch.random.get_rng_state()) and (states[1] == np.random.get_state()[1]).all()
    assert [step for step, _ in monitor.history] == [0, 1]
    assert trainer.callback_metrics["knn_top1"] == pytest.approx(monitor.history[-1][1].metrics["top1"])
    for seen, unseen in zip(watched.state_dict().values(), alone.state_dict().values()):
        assert torch.equal(seen, unseen)
    assert {module.training for module in watched.modules()} == {module.training for module in alone.modules()}
    assert all(weight.requires_grad for weight in watched.parameters())
    for seen, unseen in zip(watched.parameters(), alone.parameters()):
        assert torch.equal(seen.grad, unseen.grad)


@pytest.mark.slow
def test_a_new_protocol_is_one_module_one_config_and_one_row(tmp_path):
    """In a copy of the source the page's protocol is in the help, the suite, the forecast, the API and the battery."""
    copy = tmp_path / "copy"
    for name in ("moco_eval", "pretraining", "configs", "tests", "pyproject.toml"):
        source, target = ROOT / name, copy / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    module, loader, row = python_of(NEW)
    ast.parse(module)
    (yaml,) = ("\n".join(lines) + "\n" for _, language, lines in blocks(NEW) if language == "yaml")
    (copy / "moco_eval" / "classification" / "nearest_mean.py").write_text(module)
    (copy / "configs/mean").mkdir()
    (copy / "configs/mean/nearest.yaml").write_text(yaml)
    table = copy / "moco_eval/classification/protocols.py"
    text = table.read_text()
    text = text.replace(
        "@dataclass(frozen=True)\nclass Protocol", f"{loader}\n\n@dataclass(frozen=True)\nclass Protocol"
    )
    row = row.removeprefix("PROTOCOLS = (\n").partition("    ...,")[0]
    table.write_text(text.replace("PROTOCOLS = (\n", f"PROTOCOLS = (\n{row}", 1))
    variables = environment() | {"PYTHONPATH": str(copy), "MOCO_EVAL_CACHE": str(tmp_path / "cache")}

    def output_of(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, env=variables, cwd=copy, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    command = ("-m", "moco_eval")
    assert "nearest class mean" in output_of(*command, "--help")
    assert "[default: nearest]" in " ".join(output_of(*command, "mean", "--help").split())
    encoder = ("random:resnet18_quarter", "--dataset", "digits", "--workers", "0")
    printed = output_of(*command, "mean", *encoder, "--output", "run")
    assert "mean/nearest@1 digits top1" in printed and "not comparable" not in printed
    assert "mean/nearest@1" in output_of(*command, "suite", *encoder, "--tasks", "mean,knn", "--dry-run")
    assert "mean/nearest@1" in output_of(*command, "suite", *encoder, "--tasks", "mean", "--output", "suite")
    code = (
        "import moco_eval as me; train, test = me.images('digits'); "
        "print(me.judge(me.load('random:resnet18_quarter'), train, test, 'mean/nearest@1', workers=0))"
    )
    assert printed.startswith(output_of("-c", code))  # the command adds chance and raw pixels
    battery = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/classification/test_protocols.py")
    output_of(*battery, "-k", "mean or names or shows or row")
