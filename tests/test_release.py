"""What is released: one version everywhere, and a wheel that holds every file of the packages and nothing else."""

import re
import runpy
from pathlib import Path

import pytest
import setuptools
import yaml
from commands import ROOT

import moco_eval


@pytest.fixture(scope="module")
def given() -> dict:
    """What setup.py tells setuptools."""
    said = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", said.update)
        patch.chdir(ROOT)
        runpy.run_path(str(ROOT / "setup.py"))
    return said


def folder_of(package: str, given: dict) -> Path:
    return ROOT / given["package_dir"].get(package, package.replace(".", "/"))


def carried(given: dict) -> set[Path]:
    """Every file of the repository that goes into a wheel."""
    modules = {path for package in given["packages"] for path in folder_of(package, given).glob("*.py")}
    data = {
        path
        for package, patterns in given["package_data"].items()
        for pattern in patterns
        for path in folder_of(package, given).glob(pattern)
    }
    return modules | data


def written() -> set[Path]:
    """Every file below the packages and the shipped configs."""
    folders = ("moco_eval", "pretraining", "configs")
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path for path in paths if "__pycache__" not in path.parts}


def test_a_wheel_holds_every_file_of_the_packages_and_no_other(given):
    assert carried(given) == written()


def test_every_package_is_one(given):
    """Without its __init__.py a folder imports from a clone, but is missing from a wheel."""
    folders = {path.parent for path in written() if path.suffix == ".py"}
    assert folders == {folder_of(package, given) for package in given["packages"]} - {ROOT / "configs"}
    assert {package.split(".")[0] for package in given["packages"]} == {"moco_eval", "pretraining"}


def test_the_version_is_written_in_one_place_and_the_others_agree(given):
    assert given["version"] == moco_eval.__version__
    assert f"\nversion: {moco_eval.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.fullmatch(rf"{re.escape(moco_eval.__version__)} \(\d{{4}}-\d\d-\d\d\)", headings[0])
    assert len(set(headings)) == len(headings)


def test_what_the_packages_index_is_told_exists(given):
    assert all((ROOT / name).is_file() for name in given["license_files"])
    assert given["long_description"] == (ROOT / "README.md").read_text(encoding="utf-8")
    name, _, function = given["entry_points"]["console_scripts"][0].partition("=")[2].partition(":")
    assert name == "moco_eval.cli.main" and function == "main"
    assert {"slurm", "hf"} <= set(given["extras_require"])


def test_the_image_and_the_conda_environment_take_versions_that_setup_allows(given):
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    least = next(need for need in given["install_requires"] if need.startswith("torch>="))
    base = re.search(r"^FROM pytorch/pytorch:([\d.]+)-cuda[\d.]+-cudnn\d+-devel$", image, re.MULTILINE)
    assert base and _numbers(base[1]) >= _numbers(least.removeprefix("torch>="))
    python = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"][0]
    assert f"Programming Language :: Python :: {python.removeprefix('python=')}" in given["classifiers"]


def test_the_image_has_the_detectron2_that_was_tested():
    (commit,) = re.findall(r"^ARG DETECTRON2=([0-9a-f]{40})$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    (tested,) = re.findall(r"Tested with commit ([0-9a-f]+)", (ROOT / "docs" / "detection.md").read_text())
    assert commit.startswith(tested)


def test_the_image_is_built_from_what_a_wheel_is_made_of(given):
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    folders = {folder_of(package, given).relative_to(ROOT).parts[0] for package in given["packages"]}
    assert "*" in lines and all((ROOT / name).exists() for name in kept)
    assert kept >= {*folders, *given["license_files"], "setup.py", "pyproject.toml", "README.md"}
    assert not kept & {"tests", "tools", "docs"}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
