"""The direction of imports: every package knows only those below it, no two files import each other in a circle."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from commands import ROOT, environment

# From the top down; a package imports only from rows below its own, and none of its neighbours.
ROWS = (
    ("__main__",),
    ("cli",),
    ("demo",),
    ("api", "doctor", "report", "pretraining", "watch"),
    ("papers",),
    ("classification", "detection", "segmentation"),
    ("features", "results"),
    ("data", "encoders"),
    ("untrusted",),
    ("runtime", "config", "preprocessing"),
    ("limits",),
    ("errors",),
    ("__init__",),  # the version and the public names, which it imports when they are asked for
)
ROW = {package: row for row, packages in enumerate(ROWS) for package in packages}
PATHS = sorted([*(ROOT / "moco_eval").rglob("*.py"), *(ROOT / "pretraining").rglob("*.py")])


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {module_of(path): path for path in PATHS}


def package_of(module: str) -> str:
    """The room that a module lies in: `data` of moco_eval.data.boxes.voc."""
    parts = module.split(".")
    return parts[0] if parts[0] == "pretraining" else parts[1]


def resolved(name: str) -> str | None:
    """The file that an imported name stands for: a module, a package's __init__, or the module that holds the name."""
    return next((one for one in (name, f"{name}.__init__", name.rpartition(".")[0]) if one in MODULES), None)


def imports_of(path: Path) -> set[str]:
    """Every file of ours that a file imports, at its top or inside a function; `__getattr__` of a package apart."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path == ROOT / "moco_eval" / "__init__.py":
        return set()  # only what is asked for, and then from above
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    ours = [name for name in names if name.split(".")[0] in ("moco_eval", "pretraining")]
    found = {name: resolved(name) or resolved(name.rpartition(".")[0]) for name in ours}
    assert all(found.values()), f"{path}: imports what does not exist: {[name for name in ours if not found[name]]}"
    return {str(module) for module in found.values()} - {module_of(path)}


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports that go up or to a neighbour."""
    wrong = []
    for module, imported in graph.items():
        for other in sorted(imported):
            here, there = package_of(module), package_of(other)
            if here != there and ROW[there] <= ROW[here]:
                wrong.append(f"{module} imports {other}")
    return wrong


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Files that import each other, directly or by way of others: what is left when leaves are taken off."""
    left = {module: set(imported) & set(graph) for module, imported in graph.items()}
    while leaves := [module for module, imported in left.items() if not imported]:
        left = {module: imported - set(leaves) for module, imported in left.items() if module not in leaves}
    return sorted(left)


GRAPH = {module: imports_of(path) for module, path in MODULES.items()}


def test_every_package_has_a_place():
    assert {package_of(module) for module in MODULES} <= set(ROW)


def test_imports_point_down():
    assert upward(GRAPH) == []


def test_no_circle():
    assert circles(GRAPH) == []


@pytest.mark.parametrize(
    ("module", "imported"),
    [("moco_eval.data.loader", "moco_eval.encoders.load"), ("moco_eval.features.extract", "moco_eval.results.record")],
)
def test_an_import_of_a_neighbour_is_noticed(module, imported):
    assert upward(GRAPH | {module: GRAPH[module] | {imported}}) == [f"{module} imports {imported}"]


def test_a_circle_is_noticed():
    below = "moco_eval.data.label_subsets"
    assert below in circles(GRAPH | {below: GRAPH[below] | {"moco_eval.data.image_set"}})


def test_only_the_command_line_and_the_demo_know_both_packages():
    """`pretraining` makes checkpoints, `moco_eval` judges them; the file is the interface."""
    importers = {module for module, found in GRAPH.items() if any(name.startswith("pretraining") for name in found)}
    assert {package_of(module) for module in importers if package_of(module) != "pretraining"} == {"cli", "demo"}


def test_importing_the_package_brings_no_torch():
    code = "import sys, moco_eval; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0


def at_the_top(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """What is imported with a module, in whatever order; not what a function imports when it is called."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from at_the_top(node.orelse)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from at_the_top(ast.iter_child_nodes(node))


def libraries_of(*modules: str) -> set[str]:
    """The libraries that come with some of our modules, by their imports and those of what they import."""
    left, seen, libraries = set(modules), set[str](), set[str]()
    while left:
        seen.add(module := left.pop())
        names = list(at_the_top(ast.parse(MODULES[module].read_text(encoding="utf-8")).body))
        ours = {name for name in names if name.split(".")[0] in ("moco_eval", "pretraining")}
        libraries |= {name.split(".")[0] for name in set(names) - ours} - sys.stdlib_module_names
        left |= {str(resolved(name) or resolved(name.rpartition(".")[0])) for name in ours} - seen
    return libraries


LIGHT = {"click", "pydantic", "pydantic_core", "yaml"}


def test_what_comes_with_a_command_and_with_inspect():
    """torchvision is for its ResNets; the import of both is nearly all of the time of `inspect random:resnet18`."""
    assert libraries_of("moco_eval.cli.main") == LIGHT
    loaded = libraries_of("moco_eval.cli.main", "moco_eval.encoders.inspect")
    assert loaded == LIGHT | {"torch", "torchvision", "numpy", "safetensors", "rich"}
