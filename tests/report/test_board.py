"""`moco-eval results --html`: what stands beside what, seeds as the unit, links, and names that are markup."""

import hashlib
import json
import os
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
from browser import browser
from commands import environment, error_line, in_process
from run_folders import IMAGES, changed, put, write_run

from moco_eval.report.board import write_board
from moco_eval.results import compare

HOSTILE = "<img src=x onerror=alert(1)>'\"&{{ 7*7 }}"
ODD = [HOSTILE, "javascript:alert(1)", "a b#c?d%20e", "line\nbreak", os.fsdecode(b"\xff\xfe"), "..."]


class Page(HTMLParser):
    """The elements of a page with their attributes, and its tables as rows of words."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.tables: list[list[list[str]]] = []
        self.inside = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.inside = True
        elif self.inside:
            self.tables[-1][-1][-1] += " "

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.tables[-1][-1][-1] += data

    @property
    def links(self) -> list[str]:
        return [about["href"] for tag, about in self.elements if tag == "a" and not about["href"].startswith("#")]


def judged(folder: Path, right: int = 40, seed: int | None = None, **keys) -> Path:
    """A finished run of 50 images, so many of them right; with a seed, of one recipe of ours."""
    write_run(folder)
    labels = np.arange(IMAGES) % 10
    predictions = np.where(np.arange(IMAGES) < right, labels, (labels + 1) % 10)
    np.savez(folder / "predictions.npz", label=labels, prediction=predictions[None])
    if seed is not None:
        config = {"seed": seed, "queue_size": 256, "workers": seed}
        keys["encoder__pretraining"] = {"protocol": "pretrain/moco-v2@1", "epochs": 20, "config": config}
    sha256 = hashlib.sha256(os.fsencode(folder)).hexdigest()
    changed(**{"metrics": {"top1": 100 * right / IMAGES}, "encoder__sha256": sha256})(folder)
    changed(**keys)(folder)
    return folder


@pytest.fixture
def runs(tmp_path) -> Path:
    return tmp_path / "runs"


def page_of(runs: Path) -> Page:
    write_board(runs, runs.parent / "page.html")
    return Page(runs.parent / "page.html")


def test_only_like_stands_beside_like(runs):
    judged(runs / "a", 40)
    judged(runs / "b", 45)
    judged(runs / "other-data", dataset__fingerprint="beef")
    judged(runs / "other-split", dataset__split="val")
    judged(runs / "few", dataset__labels_per_class=10)
    judged(runs / "next-version", protocol="linear/moco-lincls@2")
    judged(runs / "settings", 49, deviations=["batch_size 64 instead of 256"])
    judged(runs / "recipe", 30, deviations=["encoder: views.size 64 instead of 224"])
    tables = [[row[0].split()[-1] for row in table[1:-1]] for table in page_of(runs).tables]
    together = [["b", "a", "recipe"], ["settings"], ["other-data"], ["other-split"], ["few"], ["next-version"]]
    assert sorted(tables) == sorted(together)


def test_every_number_has_its_interval_its_deviations_and_a_link_to_its_run(runs):
    """From wherever the page lies."""
    folders = [judged(runs / name, 30 + n, std={"top1": 1.5}) for n, name in enumerate(["a", *ODD])]
    changed(deviations=[f"encoder: {HOSTILE}"])(folders[0])
    page = runs.parent / "pages/of mine/page.html"
    write_board(runs, page)
    (table,) = Page(page).tables
    records = [json.loads((folder / "result.json").read_text()) for folder in folders[::-1]]
    low, high = records[0]["interval"]["top1"]
    words = f"± 1.50 (1 heads)  [{low:.2f}, {high:.2f}]"
    assert [row[1].split(" ", 1)[0] for row in table[1:-1]] == [f"{one['metrics']['top1']:.2f}" for one in records]
    assert all(" ".join(row[1].split()).endswith(" ".join(words.split())) for row in table[1:-1])
    assert f"encoder: {HOSTILE}" in table[-2][-1] and table[1][-1] == "yes"
    assert table[-1][:2] == ["chance", "10.00"]
    leads = [page.parent / os.fsdecode(unquote_to_bytes(link)) for link in Page(page).links]
    assert [place.resolve() for place in leads] == folders[::-1]


def test_markup_in_names_stays_words(runs):
    judged(
        runs / HOSTILE, encoder__path=HOSTILE, dataset__name=f"imagefolder:{HOSTILE}", protocol=f"knn/{HOSTILE}@1",
        metrics={HOSTILE: 3.0}, interval={}, deviations=[HOSTILE],
    )  # fmt: skip
    judged(runs / "</script><script>alert(1)</script>".replace("/", "\u2215"), dataset__split="</title><script>")
    page = page_of(runs)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2 and "img" not in tags
    assert not [about for _, about in page.elements if any(name.startswith("on") for name in about)]
    assert not any(link.partition("/")[0].endswith(":") for link in page.links)


def test_the_seeds_of_one_recipe_are_the_unit(runs):
    values = [40, 43, 41]
    for seed, right in enumerate(values):
        judged(runs / f"seed{seed}", right, seed)
    judged(runs / "other", 35)
    text = (runs.parent / "page.html").read_text() if page_of(runs) else ""
    std = statistics.stdev(2.0 * value for value in values)
    assert f"pretrained from 3 seeds (0: 80.00, 1: 86.00, 2: 82.00): top1 has std {std:.2f} and range 6.00" in text
    rows = {row[0].split()[-1]: row[2] for row in page_of(runs).tables[0][1:-1]}
    assert rows["other"].startswith("-16.00") and f"= {16 / std:.1f} of the seeds' std" in rows["other"]
    assert rows["seed1"] == "0.00"


def test_seeds_of_another_recipe_data_or_epoch_are_none(runs):
    judged(runs / "a", 40, 0)
    judged(runs / "b", 42, 1)
    record = json.loads((runs / "b/result.json").read_text())
    whole = record["encoder"]["pretraining"]
    for other in (whole | {"epochs": 10}, whole | {"config": whole["config"] | {"queue_size": 512}}):
        changed(encoder__pretraining=other)(runs / "b")
        page_of(runs)
        assert "no recipe of this table was pretrained from more than one" in (runs.parent / "page.html").read_text()
    changed(encoder__pretraining=whole)(runs / "b")
    page_of(runs)
    assert "was pretrained from 2 seeds" in (runs.parent / "page.html").read_text()


def test_the_words_are_those_of_compare(runs):
    """None without the answers that it needs."""
    for name, right in (("best", 48), ("near", 47), ("far", 20), ("unknown", 10)):
        judged(runs / name, right)
    (runs / "unknown/predictions.npz").unlink()
    rows = {row[0].split()[-1]: row[2].split(" ", 1) for row in page_of(runs).tables[0][1:-1]}
    for name in ("near", "far"):
        assert rows[name][1].strip() == f"{compare.verdict(runs / 'best', runs / name, 'top1')} the highest"
    assert rows["near"][1].strip().startswith("level") and rows["far"][1].strip().startswith("behind")
    assert rows["best"] == ["0.00"] and rows["unknown"] == ["-76.00"]


def test_a_run_without_the_metric_or_without_any_has_its_row(runs):
    judged(runs / "a", 40)
    judged(runs / "none", metrics={}, protocol="knn/instdisc@1")
    judged(runs / "other", metrics={"top5": 9.0}, encoder__pretraining={"config": {"seed": [1]}})
    for name in ("a", "none", "other"):  # of one encoder, as protocols that disagree are looked for
        changed(encoder__sha256="a" * 64)(runs / name)
    rows = {row[0].split()[-1]: row[1:3] for table in page_of(runs).tables for row in table[1:] if len(row) > 2}
    assert rows["a"] == ["80.00 [70.00, 90.00]", "-"] and rows["other"] == ["-", "9.00"]
    assert 'href="runs/none/"' in (runs.parent / "page.html").read_text()


def test_a_damaged_record_an_empty_folder_and_two_wishes_are_refused_in_a_line(runs, in_tmp, capfd, monkeypatch):
    runs.mkdir()
    asked = ("results", runs, "--html", "page.html")
    assert "holds no finished run, so there is no page to write" in error_line(capfd, monkeypatch, *asked)
    judged(runs / "a")
    assert "give one of the two" in error_line(capfd, monkeypatch, *asked, "--format", "csv")
    assert "is a folder; name a file in it" in error_line(capfd, monkeypatch, "results", runs, "--html", runs)
    put("result.json", '{"schema": "moco-eval/result@1"}')(judged(runs / "b"))
    assert "b/result.json is damaged: it lacks protocol" in error_line(capfd, monkeypatch, *asked)
    assert not Path("page.html").exists()


def test_the_page_needs_neither_torch_nor_matplotlib(runs):
    for number in range(3):
        judged(runs / f"run{number}", 40 + number)
    code = (
        "import sys; from moco_eval.cli.main import cli; cli(standalone_mode=False); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'matplotlib', 'sklearn', 'scipy', 'timm')))"
    )
    arguments = [sys.executable, "-c", code, "results", str(runs), "--html", str(runs.parent / "page.html")]
    assert subprocess.run(arguments, env=environment()).returncode == 0
    assert "level with the highest" in (runs.parent / "page.html").read_text()


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_it_is_filtered_and_sorted_in_a_browser(runs, width, capfd, monkeypatch):
    for number, protocol in enumerate(("linear/moco-lincls@1", "knn/instdisc@1", HOSTILE)):
        judged(runs / f"{number}", 30, protocol=protocol)
        judged(runs / f"{number}b", 40, protocol=protocol, deviations=["encoder: x"])
    judged(runs / "other", dataset__name="pets", dataset__fingerprint="beef")
    page = runs.parent / "page.html"
    in_process(capfd, monkeypatch, "results", runs, "--html", page)
    shown = "return [...document.querySelectorAll('section')].filter((one) => one.checkVisibility()).length"
    with browser(width) as window:
        window.open(page)
        assert window.log() == []
        assert window.run("return document.documentElement.scrollWidth") == width
        assert window.run("return performance.getEntriesByType('resource').length") == 0
        assert window.run(shown) == 4
        choose = (
            "const one = document.querySelectorAll('select')[{}]; one.selectedIndex = {}; "
            "one.dispatchEvent(new Event('change')); return one.value"
        )
        names = [window.run(choose.format(1, index)) for index in (1, 2, 3)]
        assert sorted(names) == sorted((HOSTILE, "knn/instdisc@1", "linear/moco-lincls@1"))
        assert window.run(shown) == (2 if window.run(choose.format(1, names.index("linear/moco-lincls@1") + 1)) else 0)
        assert window.run(choose.format(0, 2)).startswith("pets") and window.run(shown) == 1
        assert window.run("return document.querySelector('[role=status]').textContent") == "1 of 4 shown"
        window.run(choose.format(0, 0)), window.run(choose.format(1, 0))
        window.run("document.querySelector('table thead th:nth-child(2) button').focus()")
        window.press("\ue007"), window.press("\ue007")
        rows = "[...document.querySelector('table').tBodies[0].rows]"
        values = window.run(f"return {rows}.map((row) => parseFloat(row.cells[1].innerText))")
        assert values == sorted(values)
        window.run("document.querySelector('summary').focus()")
        window.press("\ue007")
        assert window.run("return document.querySelector('details').open") and window.log() == []
