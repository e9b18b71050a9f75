"""Every command that takes images with labels, on tables of Hugging Face's: the numbers of the same image files."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import error_line, in_process
from hf_tables import digits_folder, parquet, saved

datasets = pytest.importorskip("datasets", reason="datasets is not installed (pip install '.[hf]')")

SMALL = ("--pixels", "size=32,mean=0.3,std=0.3", "--device", "cpu", "--workers", "0")
ENCODER = "random:resnet18_quarter"


@pytest.fixture
def places(in_tmp, monkeypatch) -> dict[str, tuple[str, ...]]:
    """The same digits as image files, saved and as parquet: what a command is told of each."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", in_tmp / "home/datasets")
    monkeypatch.setenv("HF_HOME", str(in_tmp / "home"))
    root = digits_folder(in_tmp / "own")
    saved(datasets, root, in_tmp / "disk")
    parquet(datasets, root, in_tmp / "tables")
    files = ("--dataset", "imagefolder", "--data", "own")
    return {"files": files, "disk": ("--dataset", "hf:disk"), "parquet": ("--dataset", "hf:tables")}


def outcome(folder: Path) -> tuple:
    """Metrics and answers of a run."""
    record = json.loads((folder / "result.json").read_text())
    with np.load(folder / "predictions.npz") as arrays:
        return record["metrics"], {name: arrays[name].tolist() for name in sorted(arrays.files)}


def test_the_same_top1_and_predictions_of_knn(places, capfd, monkeypatch):
    for name, where in places.items():
        more = (*where, *SMALL, "--set", "k=3", "--output", f"runs/{name}")
        out, _ = in_process(capfd, monkeypatch, "knn", ENCODER, *more)
        assert "top1" in out
    assert outcome(Path("runs/files")) == outcome(Path("runs/disk")) == outcome(Path("runs/parquet"))
    names = [json.loads(Path("runs", name, "result.json").read_text())["dataset"]["name"] for name in places]
    assert names == ["imagefolder:own", "hf:disk", "hf:tables"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("linear", ("--protocol", "quick", "--set", "crops=1")),
        ("finetune", ("--set", "schedule.epochs=1", "--set", "batch_size=6")),
        ("suite", ("--tasks", "knn,quick")),
        ("retrieve", ()),
    ],
)
def test_the_same_numbers_of_every_other_command(places, capfd, monkeypatch, command, more):
    found = {}
    for name, where in places.items():
        in_process(capfd, monkeypatch, command, ENCODER, *where, *SMALL, *more, "--output", f"runs/{name}")
        records = sorted(Path("runs", name).rglob("result.json"))
        assert records
        found[name] = [json.loads(path.read_text())["metrics"] for path in records]
    assert found["files"] == found["disk"] == found["parquet"]


@pytest.mark.slow
def test_pretrain_watch_features_and_check(places, capfd, monkeypatch):
    """The same loss to the bit as on the image files, with workers; its monitor finds the test split."""
    small = ("--set", "schedule.epochs=2", "--set", "knn.k=3", "--set", "knn.every=1", "--set", "views.size=32")
    small = (*small, "--set", "queue_size=32", "--batch-size", "8", "--device", "cpu", "--workers", "2")
    losses = {}
    for name, where in places.items():
        in_process(capfd, monkeypatch, "pretrain", "digits", *where, *small, "--output", f"runs/{name}")
        lines = [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]
        losses[name] = (
            [line["loss"] for line in lines if "loss" in line],
            [line["knn_top1"] for line in lines if "knn_top1" in line],
        )
    assert losses["files"] == losses["disk"] == losses["parquet"] and all(map(any, losses["files"]))
    watched = ("watch", "runs/disk", *places["disk"], "--tasks", "knn", "--once", "--every", "0.3", "--device", "cpu")
    out, _ = in_process(capfd, monkeypatch, *watched)
    assert "top1" in out and len(Path("runs/disk/watch/curve.jsonl").read_text().splitlines()) > 0
    out, _ = in_process(capfd, monkeypatch, "features", ENCODER, *places["parquet"], *SMALL)
    assert len(out.splitlines()) == 2
    out, _ = in_process(capfd, monkeypatch, "datasets", "check", "hf:disk")
    assert "hf:disk train: 36 images" in out and "classes: nought, one, two" in out and "not to be" not in out


def test_refusals_are_one_line_before_torch(places, capfd, monkeypatch):
    assert error_line(capfd, monkeypatch, "knn", ENCODER, "--dataset", "hf:nowhere").endswith(
        "nowhere does not exist; give a folder, a .parquet file, or ORG/NAME of the hub"
    )
    assert "leave --data out" in error_line(
        capfd, monkeypatch, "pretrain", "digits", "--dataset", "hf:disk", "--data", "."
    )
    assert "'hff'. Did you mean 'hf'?" in error_line(capfd, monkeypatch, "knn", ENCODER, "--dataset", "hff")
