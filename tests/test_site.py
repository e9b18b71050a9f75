"""The documentation as a site, and the tutorial: built and run whole, where `pip install '.[docs]'` has been."""

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import browser
from commands import ROOT, environment

pytestmark = pytest.mark.slow
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
NEEDED = "is not installed (pip install '.[docs]')"
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "object": "data"}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site; `--strict` has failed for a link, an anchor, a docstring or a page outside the navigation."""
    for needed in ("mkdocs", "material", "mkdocstrings", "nbconvert"):
        pytest.importorskip(needed, reason=f"{needed} {NEEDED}")
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        folder,
    ]  # --quiet would hide warnings from --strict
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


class Assets(HTMLParser):
    """What a page makes a browser load; a link that a reader may click is none."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name == LOADED.get(tag) and value]


def outside(text: str, suffix: str) -> list[str]:
    """The addresses of other hosts that a page or a style sheet loads."""
    loaded = Assets(text).found if suffix == ".html" else re.findall(r"url\(['\"]?([^)'\"]+)", text)
    return [address for address in loaded if re.match(r"(https?:)?//", address)]


def test_an_asset_from_outside_is_noticed():
    assert outside('<link href="https://fonts.example/x.css"><a href="https://x.example">x</a>', ".html")
    assert outside("a { background: url('//x.example/y.png') }", ".css")


def test_the_site_asks_nothing_of_other_hosts(site):
    pages = [path for path in site.rglob("*") if path.suffix in (".html", ".css")]
    assert len(pages) > 35
    assert {path.name: outside(path.read_text(encoding="utf-8"), path.suffix) for path in pages} == {
        path.name: [] for path in pages
    }


def test_the_reference_has_every_public_name(site):
    import moco_eval

    page = (site / "api.html").read_text(encoding="utf-8")
    for name in moco_eval.__all__:
        assert re.search(rf'id="moco_eval\.[\w.]*{name}"', page), name


@pytest.fixture(scope="module")
def address(site) -> Iterator[str]:
    """The site as a server gives it, which its search wants."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.browser
def test_pages_fit_the_screen_and_load_nothing_else(address, width):
    with browser(width) as window:
        for name in ("index", "how_it_works", "encoders", "protocols/linear", "api", "tutorial"):
            window.open(f"{address}{name}.html")
            assert window.run("return document.documentElement.scrollWidth <= innerWidth"), name
            loaded = window.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
            assert loaded and all(one.startswith(address) for one in loaded), name
            assert window.log() == [], name


# The tutorial


SMALLER = (
    ("--quiet", "--quiet --set schedule.epochs=1"),
    ('= me.images("digits")', '= (part.take(range(length)) for part, length in zip(me.images("digits"), (200, 60)))'),
)  # which moves the numbers; their places are those of the page


def smaller(source: str) -> str:
    """A cell for one epoch and few images."""
    for piece, other in SMALLER:
        source = source.replace(piece, other)
    return source


def test_the_tutorial_runs_and_prints_what_it_shows(tmp_path, monkeypatch):
    for needed in ("nbclient", "ipykernel"):
        pytest.importorskip(needed, reason=f"{needed} {NEEDED}")
    import nbformat
    from nbclient import NotebookClient

    shown, run = (nbformat.read(NOTEBOOK, as_version=4) for _ in range(2))
    for cell in run.cells:
        cell.source = smaller(cell.source)
    assert sum(one.source != other.source for one, other in zip(run.cells, shown.cells)) == len(SMALLER)
    commands = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for name, value in {**environment(), "PATH": commands}.items():
        monkeypatch.setenv(name, value)
    NotebookClient(run, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    for before, after in zip(shown.cells, run.cells):
        assert forms(before) == forms(after), before.source


def forms(cell: dict) -> str:
    """What a cell printed, with a mark for each number and the spaces about it, and for a verdict."""
    printed = "".join(output.get("text") or output["data"]["text/plain"] for output in cell.get("outputs", []))
    printed = re.sub(r"(ahead of|behind|level with)", "V", printed)
    return re.sub(r"\s*[<=]?\s*[-+]?\d[\d.e,-]*\s*", "#", printed)
