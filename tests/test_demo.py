"""The whole path on the built-in data, as `make demo` runs it."""

import pytest
from commands import moco_eval

from moco_eval.results.run_directory import read


@pytest.mark.slow
def test_the_demo_shows_what_it_says(tmp_path):
    moco_eval("demo", "--output", "demo", cwd=tmp_path)
    page = (tmp_path / "demo" / "report.html").read_text()
    assert len(page) < 3e6 and "10 labels per class" in page
    records = {record["run"].rsplit("/", 1)[1]: record for record in read(tmp_path / "demo")}
    few = {name: records[f"linear-10-{name}"] for name in ("moco", "random", "pixels")}
    spread = max(record["std"]["top1"] for record in few.values())
    assert few["moco"]["metrics"]["top1"] > few["random"]["metrics"]["top1"] + 2 * spread
    assert records["detect-moco"]["metrics"]["AP50"] >= 20
    assert len(records) == 11
