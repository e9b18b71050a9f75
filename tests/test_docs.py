"""The pages: every one is in the index, every link leads somewhere, every config and option named is there."""

import re
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import yaml
from commands import ROOT
from documented import PAGES, anchors, blocks, links, name_of, prose
from pydantic import BaseModel

from moco_eval.classification.protocols import load_config
from moco_eval.cli.main import cli
from moco_eval.config import base, classification, detection, pretrain, segmentation
from moco_eval.config import load as configs
from moco_eval.config.detection import DetectConfig
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.data.index import EXTENSIONS
from moco_eval.papers import gpu_hours
from moco_eval.papers.tables import Table, load_table
from moco_eval.papers.tables import tables as shipped_tables
from tools.draw_diagrams import DIAGRAMS

INDEX, PROTOCOLS = ROOT / "docs" / "README.md", ROOT / "docs" / "protocols"
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
# options of other programs that the pages speak of
FOREIGN = {
    *("--mlp", "--moco-t", "--aug-plus", "--cos"),  # main_moco.py
    *("--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"),  # torchrun
    *("--folder", "--gigabytes", "--repeats", "--measure", "--crop", "--iterations"),  # tools/benchmark_*
    *("--nodes", "--partition"),  # sbatch
    *("--shm-size", "--ipc"),  # docker
    *("--logdir",),  # tensorboard
    *("--classifier",),  # tools/classifier_accuracy.py
}


def test_every_page_is_in_the_index_with_a_line():
    linked = {(INDEX.parent / target.partition("#")[0]).resolve() for target in links(TEXTS[INDEX])}
    pages = {page for page in PAGES if page.is_relative_to(ROOT / "docs")} - {INDEX}
    assert pages <= linked, f"docs/README.md does not name {sorted(map(name_of, pages - linked))}"
    for row in [line for line in TEXTS[INDEX].splitlines() if line.startswith("| [")]:
        assert len(row.split("|")[2].strip()) > 10, row


def test_every_page_is_in_the_sites_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = {name_of(page).removeprefix("docs/") for page in PAGES if page.is_relative_to(ROOT / "docs")}
    moved = {"index.md", "pages.md", "tutorial.md", "changelog.md", "contributing.md", "security.md"}
    assert set(leaves(nav)) == pages - {"README.md"} | moved


def leaves(nav: object) -> list[str]:
    """The pages of a navigation."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in leaves(part)]


def test_the_diagrams_are_those_that_the_program_draws():
    for name, draw in DIAGRAMS.items():
        assert (ROOT / "docs" / "diagrams" / f"{name}.svg").read_text(encoding="utf-8") == draw()


def test_the_readme_leads_to_the_index():
    assert "docs/README.md" in links(TEXTS[ROOT / "README.md"])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in links(TEXTS[page]):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            assert anchor in anchors(TEXTS[there]), f"{name_of(page)}: {name_of(there)} has no heading #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_named_are_there(page):
    for path in re.findall(r"`((?:tests|configs|moco_eval|pretraining)/[\w/.-]+|tools/\w+\.\w+)`", prose(TEXTS[page])):
        assert (ROOT / path).exists(), f"{name_of(page)} names {path}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_named_exist(page):
    ours = {one for command in cli.commands.values() for each in command.params for one in each.opts} | {"--help"}
    spans = " ".join(re.findall(r"`([^`]+)`", prose(TEXTS[page])))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", spans))
    assert named <= ours | FOREIGN, f"{name_of(page)} names {sorted(named - ours - FOREIGN)}"


SCHEMAS = [
    value for module in (base, classification, detection, pretrain, segmentation) for value in vars(module).values()
]
MODELS = [schema for schema in SCHEMAS if isinstance(schema, type) and issubclass(schema, base.Model)]


def keys(model: type[BaseModel]) -> set[str]:
    """The dotted keys of a config."""
    found = set()
    for name, field in model.model_fields.items():
        inner = [one for one in (field.annotation, *get_args(field.annotation)) if is_model(one)]
        found |= {name, *(f"{name}.{key}" for one in inner for key in keys(one))}
    return found


def is_model(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_keys_that_are_set_exist(page):
    known = set().union(*(keys(model) for model in MODELS))
    named = re.findall(r"--set[ =]'?([a-z_.0-9]+)=", TEXTS[page])
    known |= {"key"}  # of `--set key=value`
    assert set(named) <= known, f"{name_of(page)} sets {sorted(set(named) - known)}"


# The recipes


def rows_of(page: Path) -> dict[str, str]:
    """The table rows of a page by heading and by the names in their first cell: 'kind/name' to the row."""
    kinds = {"pretrain": "Pretraining", "finetune": "Fine-tuning", "detect": "Detection", "segment": "Segmentation"}
    kinds |= {name: f"moco-eval {name} " for name in ("linear", "knn", "logistic", "svm")}
    found, here = {}, []
    for line in TEXTS[page].splitlines():
        if line.startswith("#"):
            here = [kind for kind, words in kinds.items() if words in line]
        for kind in here:
            for name in re.findall(r"`([\w-]+)`", line.split("|")[1]) if line.startswith("| `") else []:
                found[f"{kind}/{name}"] = line
    return found


RECIPES = rows_of(ROOT / "docs" / "recipes.md")
KINDS = ("pretrain", "linear", "knn", "logistic", "svm", "finetune", "detect", "segment")
SHIPPED = [name for name in configs.shipped() if name.split("/")[0] in KINDS]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_config_is_on_the_page_of_recipes_with_its_published_numbers(name):
    assert name in RECIPES, f"docs/recipes.md has no row for {name}"
    expect = yaml.safe_load((configs.folder() / f"{name}.yaml").read_text(encoding="utf-8")).get("expect") or []
    for one in expect if isinstance(expect, list) else [expect]:
        for number in one["metrics"].values():
            assert re.search(rf"(?<![\d.]){number:g}0?(?![\d])", RECIPES[name]), f"{name}: {number} is not in its row"


def test_the_page_of_recipes_names_no_other_config():
    names = {row.split("|")[1] for row in RECIPES.values()}
    named = {name for cell in names for name in re.findall(r"`([\w-]+)`", cell)}
    assert named == {name.split("/")[1] for name in SHIPPED}


@cache
def tables() -> list[Table]:
    return [load_table(name) for name, _ in shipped_tables()]


DETECT = [name for name in SHIPPED if name.startswith("detect/")]


@pytest.mark.parametrize("name", DETECT)
def test_detection_recipes_carry_the_papers_numbers(name):
    """Those of MoCo on ImageNet-1M, where a shipped table has a column of the recipe's protocol."""
    protocol = configs.load(name.split("/")[1], "detect", DetectConfig).protocol
    for table in tables():
        columns = {key: one.metric for key, one in table.columns.items() if one.protocol == protocol}
        for row in [one for one in table.rows if one.label == "MoCo, IN-1M"]:
            for column, metric in columns.items():
                number = row.published.get(column)
                assert number is None or f"{metric} {number}" in RECIPES[name], f"{name}: {table.id} {metric} {number}"


@pytest.mark.parametrize("name", [name.split("/")[1] for name in DETECT])
def test_the_page_of_detection_protocols_has_every_recipe(name):
    cells = [[cell.strip(" `") for cell in line.split("|")] for line in TEXTS[PROTOCOLS / "detection.md"].splitlines()]
    rows = {row[2]: row for row in cells if len(row) == 8}
    recipe = configs.load(name, "detect", DetectConfig)
    numbers = [int(one.replace(",", "").replace("k", "000")) for one in re.findall(r"[\d,]*\d+k?", rows[name][5])]
    assert rows[name][1] == recipe.protocol
    assert numbers == [recipe.schedule.iterations, *recipe.schedule.steps]


def test_the_index_names_every_protocol_of_classification():
    protocols = {
        yaml.safe_load((configs.folder() / f"{name}.yaml").read_text(encoding="utf-8"))["protocol"]
        for name in SHIPPED
        if not name.startswith("detect/")
    }
    named = set(re.findall(r"`([a-z]+/[\w-]+@\d)`", TEXTS[INDEX]))
    assert protocols == {one for one in named if not one.startswith("detect/")}


def published_hours(name: str) -> float:
    """GPU-hours of a recipe at full size, as `moco-eval table` gives them."""
    (kind,) = [one.split("/")[0] for one in SHIPPED if one.endswith(f"/{name}")]
    if kind == "pretrain":
        return gpu_hours._pretraining(configs.load(name, kind, PretrainConfig), "imagenet").hours
    if kind == "detect":
        return gpu_hours._detection(configs.load(name, kind, DetectConfig), 1).hours
    images = (gpu_hours.images_of("imagenet", split) for split in ("train", "test"))
    forward, trained, extracted = gpu_hours.passes(kind, load_config(name, kind), *images)
    return gpu_hours.FORWARD * (forward + 3 * trained + extracted)


def test_the_readmes_hours_are_those_of_the_tables():
    section = TEXTS[ROOT / "README.md"].partition("## How long it takes")[2].partition("\n## ")[0]
    shown = dict(re.findall(r"`([\w-]+)`: ([\d.]+)", section))
    assert len(shown) >= 9
    assert {name: gpu_hours.amount(published_hours(name)) for name in shown} == {
        name: f"{number} GPU-hours" for name, number in shown.items()
    }


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_of_code_compile(page):
    for first, language, lines in blocks(TEXTS[page]):
        if language == "python":
            compile("\n".join(lines), f"{name_of(page)}:{first}", "exec")
        if language == "yaml":
            yaml.safe_load("\n".join(lines))


def test_the_endings_of_images_are_those_that_are_read():
    text = TEXTS[ROOT / "docs" / "datasets.md"].partition("## Your own data")[2].partition("are images:")[0]
    assert set(re.findall(r"`(\.\w+)`", text)) == set(EXTENSIONS)
