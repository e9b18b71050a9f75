"""Shared fixtures. Outside data is optional: tests that want it are marked `data` and skip with a reason."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moco_eval.runtime import command

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> None:
    """No test writes to the user's cache."""
    os.environ["MOCO_EVAL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def as_a_command(request) -> Iterator[None]:
    """Tests stand in a command's process, but for those of the Python API, marked `library`."""
    if request.node.get_closest_marker("library"):
        yield
        return
    with command.running("moco-eval"):
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    path = Path(os.environ.get("MOCO_EVAL_SHARED_DATA", default))
    if not path.is_dir():
        pytest.skip(f"no data sets in {path.parent.name}/{path.name} beside the repository")
    return path


@pytest.fixture(scope="session")
def few_digits():
    """A few of the built-in digits: 150 training and 50 test images."""
    from moco_eval.data.catalogue import open_images

    return open_images("digits", None, "train").take(range(150)), open_images("digits", None, "test").take(range(50))


@pytest.fixture
def quick_probe(monkeypatch) -> None:
    """Every piece of a published table's work takes a hundredth of a second, and nothing is timed."""
    monkeypatch.setattr("moco_eval.papers.cost.seconds_per_image", lambda probe, device: 0.01)


@pytest.fixture(autouse=True)
def quick_forecast(request, monkeypatch) -> None:
    """A dry run times nothing, but in the tests of that, marked `probe`."""
    if not request.node.get_closest_marker("probe"):
        monkeypatch.setattr("moco_eval.papers.forecast.probed", lambda part, device: (0.01, 1e9))
        monkeypatch.setattr("pretraining.forecast._augmentation", lambda config, device: 0.0)


@pytest.fixture
def cluster(in_tmp, monkeypatch) -> Path:
    """SLURM: jobs are kept and nothing is run, until `pretend_slurm.run_jobs`."""
    from pretend_slurm import put

    pytest.importorskip("submitit")
    return put(in_tmp, monkeypatch)


@pytest.fixture
def in_tmp(tmp_path, monkeypatch) -> Path:
    """A test in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
