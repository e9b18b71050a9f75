"""What pages, docstrings and comments name of this repository is there: files by path, modules and what they hold."""

import ast
import io
import re
import tokenize
from functools import cache
from pathlib import Path

import pytest
from commands import ROOT
from documented import PAGES, RECORDS, name_of

SOURCES = sorted(
    path for folder in ("moco_eval", "pretraining", "tests", "tools") for path in (ROOT / folder).rglob("*.py")
)
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
# a path of ours: not part of a longer one; tools/ has no folders, other repositories' tools/ have
PATH = re.compile(r"(?<![\w./-])(?:(?:moco_eval|pretraining|tests)/[\w/]*\w|tools/\w+)\.(?:py|html|sbatch)\b")
MODULE = re.compile(r"(?<![\w./-])(?:moco_eval|pretraining)(?:\.[A-Za-z_]\w*)+")
FOREIGN = {"tools/extract_backbone_weights.py"}  # VISSL's


def missing_paths(text: str) -> list[str]:
    """The paths in a text that are not there."""
    return [path for path in PATH.findall(text) if path not in FOREIGN and not (ROOT / path).exists()]


def missing_modules(text: str) -> list[str]:
    """The dotted names in a text that are neither a module nor anything that a module holds."""
    named = [name for name in MODULE.findall(text) if not name.endswith((".md", ".py"))]
    return [name for name in named if not exists(name)]


@cache
def exists(name: str) -> bool:
    module, _, held = name.rpartition(".")
    if file_of(name) is not None:
        return True
    path = file_of(module)
    return held in names_in(path) if path else "." in module and exists(module)  # a method, a field


def file_of(module: str) -> Path | None:
    folder = ROOT.joinpath(*module.split("."))
    return next((path for path in (folder.with_suffix(".py"), folder / "__init__.py") if path.is_file()), None)


@cache
def names_in(path: Path) -> frozenset[str]:
    """What a module defines or imports at its top."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        else:
            names |= {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
            names |= {inner.asname or inner.name for inner in ast.walk(node) if isinstance(inner, ast.alias)}
    return frozenset(names)


def texts_of(path: Path) -> str:
    """The comments and strings of a Python file, docstrings and scripts for other processes among them."""
    source = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    constants = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return "\n".join([*comments, *(value for value in constants if isinstance(value, str))])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    assert missing_paths(text) == []
    assert name_of(page) == RECORDS or missing_modules(text) == []  # which keeps names as they were then


def test_what_sources_and_configs_name_is_there():
    texts = {path: texts_of(path) for path in SOURCES if path != Path(__file__)}
    texts |= {path: path.read_text(encoding="utf-8") for path in CONFIGS}
    wrong = {name_of(path): missing_paths(text) + missing_modules(text) for path, text in texts.items()}
    assert {path: names for path, names in wrong.items() if names} == {}


@pytest.mark.parametrize("path", ["moco_eval/health.py", "pretraining/bn.py", "tests/test_knn.py", "tools/export.py"])
def test_a_path_that_is_gone_is_noticed(path):
    assert missing_paths(f"see `{path}`, line 3") == [path]


@pytest.mark.parametrize(
    "name",
    ["moco_eval.cache", "moco_eval.logistic.on_features", "pretraining.moco.inform_nce", "moco_eval.data.labels"],
)
def test_a_name_that_is_gone_is_noticed(name):
    assert missing_modules(f"see `{name}`") == [name]


def test_what_is_there_and_what_is_others_is_left_alone():
    assert missing_paths("pretraining/moco.py, solo/tools/knn.py, x/tests/test_y.py and tools/svm/svm_helper.py") == []
    assert missing_modules("pretraining.moco.MoCo.push, `moco_eval.runtime.files.atomic`, pretraining.md") == []
