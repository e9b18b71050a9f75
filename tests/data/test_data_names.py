"""What a folder of one's own is called, and that two of them never collide."""

import json

import numpy as np
import pytest
from commands import error_line, in_process
from PIL import Image

from moco_eval.config import data_name
from moco_eval.data.catalogue import open_images, open_splits
from moco_eval.errors import InputError
from moco_eval.papers.match import is_called
from moco_eval.results.run_directory import holds, write_resolved


def imagefolder(root, seed=0):
    """Two classes of three images in each split."""
    random = np.random.default_rng(seed)
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for number in range(3):
                image = random.integers(0, 255, (40, 40 + seed, 3), dtype=np.uint8)
                Image.fromarray(image).save(root / split / label / f"{number}.png")
    return root


@pytest.mark.parametrize(
    ("name", "layout", "said"),
    [
        ("imagefolder", "imagefolder", "imagefolder:my_pets-2"),
        ("imagefolder:birds", "imagefolder", "imagefolder:birds"),
        ("digits", "digits", "digits"),
        ("timm:birds", "timm:birds", "timm:birds"),
    ],
)
def test_one_s_own_is_called_by_its_folder(name, layout, said, tmp_path):
    assert data_name.layout_of(name) == layout
    assert data_name.called(name, tmp_path / "my pets-2") == said


def test_a_set_is_called_by_its_folder_or_by_name_and_may_be_opened_by_that(tmp_path):
    folder = imagefolder(tmp_path / "imagenette2-224")
    for name, said in (("imagefolder", "imagefolder:imagenette2-224"), ("imagefolder:few", "imagefolder:few")):
        train, test = open_splits(name, folder)
        assert train.name == test.name == open_images(name, folder, "test").name == said
        assert open_splits(said, folder)[0].fingerprint == train.fingerprint
    assert open_images("flat", folder, "train").name == "flat:imagenette2-224"


def test_records_before_had_the_layout_alone(tmp_path):
    assert is_called("imagefolder:pets", "imagefolder") and is_called("imagefolder", "imagefolder")
    assert not is_called("imagefolder", "imagefolder:pets") and not is_called("cifar100", "cifar10")
    assert data_name.agree("imagefolder", "imagefolder:pets") and not data_name.agree("imagefolder", "imagenet")
    run, about = tmp_path / "run", {"dataset": {"test": {"name": "imagefolder", "fingerprint": "f00d"}}}
    run.mkdir()
    write_resolved(run, about, {})
    (run / "trial.json").touch()
    named = {"dataset": {"test": {"name": "imagefolder:pets", "fingerprint": "f00d"}}}
    assert holds(run, named)
    named["dataset"]["test"]["fingerprint"] = "beef"
    with pytest.raises(InputError, match=r"another run: dataset\.test\.fingerprint is f00d there"):
        holds(run, named)


def test_two_folders_of_one_name_have_run_directories_of_their_own(tmp_path, in_tmp, capfd, monkeypatch):
    outputs = []
    for seed, place in enumerate(("a", "b")):
        folder = imagefolder(tmp_path / place / "pets", seed)
        command = ("knn", "pixels", "--dataset", "imagefolder", "--data", folder, "--set", "k=2", "--dry-run")
        out, _ = in_process(capfd, monkeypatch, *command)
        assert "data: imagefolder:pets, 6 training and 6 test images" in out
        outputs.append(next(line for line in out.splitlines() if line.startswith("output: ")))
        named, _ = in_process(capfd, monkeypatch, *command, "--name", "birds")
        assert "data: imagefolder:birds" in named and "-imagefolder-birds-" in named
    assert outputs[0] != outputs[1] and all("-imagefolder-pets-" in line for line in outputs)


def test_a_record_is_of_the_name_and_a_published_set_keeps_its_own(tmp_path, in_tmp, capfd, monkeypatch):
    folder = imagefolder(tmp_path / "pets")
    command = ("knn", "pixels", "--dataset", "imagefolder", "--data", folder, "--set", "k=2", "--name", "my birds")
    out, _ = in_process(capfd, monkeypatch, *command)
    assert "knn/instdisc@1 imagefolder:my_birds top1" in out
    (record,) = (in_tmp / "runs").glob("knn-*/result.json")
    assert json.loads(record.read_text())["dataset"]["name"] == "imagefolder:my_birds"
    line = error_line(capfd, monkeypatch, "knn", "pixels", "--dataset", "digits", "--name", "mine", "--dry-run")
    assert "--name mine: digits has its name; --name is for a folder of your own" in line
