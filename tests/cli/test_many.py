"""`suite` with several checkpoints and data sets: each judged once, one table and one report at the end."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import error_line, in_process
from PIL import Image


@pytest.fixture
def photos(in_tmp) -> Path:
    """Twelve images of two classes in each split."""
    draws = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, level in (("dark", 60), ("light", 190)):
            (in_tmp / "photos" / split / name).mkdir(parents=True)
            for index in range(6):
                pixels = draws.integers(level - 50, level + 50, (32, 32, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(in_tmp / "photos" / split / name / f"{index}.png")
    return in_tmp / "photos"


MANY = ["suite", "random:resnet18_quarter", "pixels", "--dataset", "digits", "--dataset", "imagefolder"]
MORE = ["--data", "photos", "--limit", "40", "--tasks", "knn", "--workers", "0"]


def test_many_at_once_end_in_one_table_and_one_report(photos, in_tmp, capfd, monkeypatch):
    out, err = in_process(capfd, monkeypatch, *MANY, *MORE, "--pixels", "size=32,mean=0.5,std=0.25", "--output", "out")
    rows = [line.strip() for line in out.splitlines() if line.strip().startswith(("random:", "pixels"))]
    assert len(rows) == 4 and sum("imagefolder:photos" in row for row in rows) == 2
    found = {path.parent: json.loads(path.read_text()) for path in Path("out").rglob("result.json")}
    assert len(found) == 4
    assert all(f"{record['metrics']['top1']:.2f}" in out for record in found.values())
    assert "report: out/suite.html" in err and Path("out/suite.html").stat().st_size > 10_000
    before = {folder: (folder / "result.json").stat().st_mtime_ns for folder in found}
    again, err = in_process(
        capfd, monkeypatch, *MANY, *MORE, "--pixels", "size=32,mean=0.5,std=0.25", "--output", "out"
    )
    assert again == out and err.count("already done") == 4
    assert before == {folder: (folder / "result.json").stat().st_mtime_ns for folder in found}


def test_folders_that_belong_to_no_data_set_are_refused(photos, capfd, monkeypatch):
    line = error_line(capfd, monkeypatch, *MANY, "--dataset", "cifar10", "--data", "photos", "--data", "photos")
    assert "--data is given 2 times for 3 data sets" in line


def test_a_checkpoint_that_is_not_there_is_refused_before_any_work(photos, in_tmp, capfd, monkeypatch):
    assert "nowhere.pth does not exist" in error_line(capfd, monkeypatch, *MANY[:3], "nowhere.pth", *MANY[3:], *MORE)
    assert not (in_tmp / "runs").exists()
