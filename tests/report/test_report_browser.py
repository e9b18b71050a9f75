"""The report in a real browser, opened from disk, on a phone and on a desk."""

import re

import pytest
from browser import browser
from test_report import HOSTILE, Elements, of_a_row, write_demo, write_run

from moco_eval.report.page import write_report

pytestmark = pytest.mark.browser
ENTER = "\ue007"
ORDER = "return [...document.querySelectorAll('table.sortable tbody th')].map((cell) => cell.textContent)"
SECOND = "document.querySelectorAll('table.sortable thead th')[1]"
BACKGROUND = "return getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """A demo, a run of a published row, and a title with markup in it."""
    folder = tmp_path_factory.mktemp("browser")
    write_run(folder / "demo/detect-voc", "detect", of_a_row(61.0))
    write_report([write_demo(folder / "demo")], folder / "report.html", title=HOSTILE)
    return folder / "report.html"


@pytest.fixture(scope="module")
def window():
    with browser(1280) as opened:
        yield opened


@pytest.mark.parametrize("width", [360, 1280])
def test_it_opens_whole_without_a_complaint_or_a_request(page_file, width):
    with browser(width) as window:
        window.open(page_file)
        assert window.log() == []
        assert window.run("return performance.getEntriesByType('resource').length") == 0
        assert window.run("return document.documentElement.scrollWidth") == width
        paper = "const box = document.querySelector('.paper').parentNode; return box.scrollWidth - box.clientWidth"
        assert window.run(paper) == 0  # a paper's table is seen whole even on a phone
        assert window.run("return [...document.images].every((image) => image.naturalWidth > 0)")


def test_the_theme_is_switched_and_remembered(page_file, window):
    window.open(page_file)
    window.run("localStorage.clear()")
    window.open(page_file)
    press = "document.querySelector('button.theme').click()"
    auto = window.run(BACKGROUND)
    window.run(press)
    light = window.run(BACKGROUND)
    window.run(press)
    dark = window.run(BACKGROUND)
    assert dark != light and auto in (light, dark)
    window.open(page_file)
    assert window.run(BACKGROUND) == dark
    window.run(press)
    assert window.run(BACKGROUND) == auto
    assert window.run("return document.querySelector('button.theme').textContent") == "theme: auto"


def test_the_theme_is_switched_where_nothing_can_be_remembered(page_file, window):
    """In a frame of its own origin, storage is forbidden."""
    frame = page_file.with_name("frame.html")
    frame.write_text(f'<iframe sandbox="allow-scripts" src="{page_file.name}"></iframe>', encoding="utf-8")
    window.open(frame)
    window.enter_frame()
    assert window.run("try { return localStorage.length } catch { return 'forbidden' }") == "forbidden"
    assert window.run("return document.querySelector('button.theme').textContent") == "theme: auto"
    window.run("document.querySelector('button.theme').click()")
    assert window.run("return document.querySelector('button.theme').textContent") == "theme: light"
    assert window.log() == []


def test_it_prints_in_light_with_all_details_and_no_switch(page_file, window):
    def visible(selector):
        shown = f"[...document.querySelectorAll('{selector}')].map((one) => one.checkVisibility())"
        return window.run(f"return {shown}")

    window.open(page_file)
    window.run("document.documentElement.dataset.theme = 'dark'")
    assert not any(visible("details dl")) and visible(".theme") == [True]
    window.as_printed(True)
    background, details, switch = window.run(BACKGROUND), visible("details dl"), visible(".theme")
    window.as_printed(False)
    assert background == "rgb(255, 255, 255)" and background != window.run(BACKGROUND)
    assert details and all(details) and switch == [False]


def test_a_table_is_sorted_by_its_header(page_file, window):
    window.open(page_file)
    column = "return [...document.querySelectorAll('table.sortable tbody tr')].map((row) => row.cells[1].textContent)"
    press = f"{SECOND}.querySelector('button').click()"
    before = window.run(ORDER)
    window.run(press)
    numbers = [float(re.match(r"[\d.]+", one)[0]) for one in window.run(column) if one.strip() != "-"]
    assert len(numbers) > 1 and numbers == sorted(numbers, reverse=True)
    assert window.run(f"return {SECOND}.getAttribute('aria-sort')") == "descending"
    window.run(press)
    assert window.run(f"return {SECOND}.getAttribute('aria-sort')") == "ascending"
    assert [float(re.match(r"[\d.]+", one)[0]) for one in window.run(column) if one.strip() != "-"] == numbers[::-1]
    last = "document.querySelector('table.sortable thead th:last-child')"
    window.run(f"{last}.querySelector('button').click()")  # with cells that hold nothing
    values = window.run(column.replace("cells[1]", "cells[row.cells.length - 1]"))
    assert values[-1].strip() == "-" and window.run(f"return {SECOND}.getAttribute('aria-sort')") is None
    assert sorted(window.run(ORDER)) == sorted(before)
    assert window.log() == []


def test_the_keyboard_sorts_too(page_file, window):
    window.open(page_file)
    window.run(f"{SECOND}.querySelector('button').focus()")
    window.press(ENTER)
    assert window.run(f"return {SECOND}.getAttribute('aria-sort')") == "descending"


def test_the_script_changes_no_table_and_adds_none(page_file, window):
    """Without it the page has the same tables: the file's own words are those that the browser shows."""
    window.open(page_file)
    rows = "[...table.rows].map((row) => row.textContent.replace(/\\s/g, ''))"
    shown = window.run(f"return [...document.querySelectorAll('table')].map((table) => {rows})")
    assert len(shown) == 2 and shown == Elements(page_file.read_text(encoding="utf-8")).tables


def test_names_stay_words(page_file, window):
    """A name with markup in it is shown, and runs nothing."""
    window.open(page_file)
    assert window.run("return document.querySelector('h1').textContent") == HOSTILE
    assert window.run("return document.scripts.length") == 1
    assert window.log() == []


def test_no_script_but_the_pages_own_would_run(page_file, tmp_path, window):
    """Even one that had got into the file."""
    page = page_file.read_text(encoding="utf-8")
    (tmp_path / "other.html").write_text(
        page.replace("</body>", "<script>window.ran = true</script></body>"), encoding="utf-8"
    )
    window.open(tmp_path / "other.html")
    assert window.run("return window.ran === undefined && document.scripts.length === 2")
    (said,) = window.log()
    assert "Content Security Policy" in said
