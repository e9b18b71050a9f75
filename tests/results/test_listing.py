"""`moco-eval results`: all one's own numbers, the same in every format."""

import csv
import io
import json

import pytest
from commands import error_line, in_process
from run_folders import write_run


@pytest.fixture
def two_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        write_run(tmp_path / "runs" / name)
    return tmp_path


def test_results_are_the_same_numbers_in_every_format(two_runs, capfd, monkeypatch):
    records = [json.loads(path.read_text()) for path in sorted((two_runs / "runs").glob("*/result.json"))]
    expected = [(metric, value) for record in records for metric, value in record["metrics"].items()]
    as_json = json.loads(in_process(capfd, monkeypatch, "results", "--format", "json")[0])
    assert [(row["metric"], row["value"]) for row in as_json] == expected
    as_csv = list(csv.DictReader(io.StringIO(in_process(capfd, monkeypatch, "results", "--format", "csv")[0])))
    assert [(row["metric"], float(row["value"])) for row in as_csv] == expected
    markdown = in_process(capfd, monkeypatch, "results", "runs", "--format", "markdown")[0].splitlines()
    assert len(markdown) == 2 + len(expected) and markdown[0].startswith("| run | encoder |")
    text = in_process(capfd, monkeypatch, "results")[0]
    assert all(f"{value:.2f}" in text for _, value in expected)


def test_results_without_a_folder_say_where_runs_are(in_tmp, capfd, monkeypatch):
    assert "commands put them below runs/" in error_line(capfd, monkeypatch, "results")
