"""The curve of a watched run in the report."""

import json
from pathlib import Path

import pytest
from run_folders import changed, write_run

from moco_eval.errors import InputError
from moco_eval.report.page import write_report
from moco_eval.report.watched import watched

HOSTILE = "<script>alert(1)</script>"


def line(epoch: int, top1: float, protocol: str = "knn/instdisc@1", **more) -> dict:
    about = {"epoch": epoch, "checkpoint": f"epoch_{epoch}.pth", "protocol": protocol, "metrics": {"top1": top1}}
    return {**about, "interval": {"top1": [top1 - 2, top1 + 2]}, "sha256": f"{epoch:064x}", **more}


def write_watch(run: Path, *lines: dict) -> Path:
    output = run / "watch"
    output.mkdir(parents=True)
    (output / "checkpoints.json").write_text("{}")
    (output / "curve.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    return output


def test_the_report_shows_the_curve_of_each_protocol_with_its_intervals(tmp_path):
    hostile = line(2, 60, f"knn/{HOSTILE}@1", metrics={f"${HOSTILE}": 1.0})
    output = write_watch(tmp_path / "mine", line(1, 40), line(2, 50.04), hostile)
    for epoch in (1, 2):
        run = write_run(output / f"epoch_{epoch}/knn")
        changed(encoder__sha256=f"{epoch:064x}", encoder__path=f"of-epoch-{epoch}.pth")(run)
    write_report([tmp_path / "mine"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<a href="#watched">' in page and "Checkpoints of mine, judged" in page
    assert "top1 50.0 [48.0, 52.0] at epoch 2" in page and "2 checkpoints, each judged" in page
    assert page.count('aria-label="Judged checkpoints"') == 2 and HOSTILE not in page
    assert "of-epoch-2" in page and "of-epoch-1" not in page
    write_report([output / "epoch_1"], tmp_path / "first.html")
    assert "of-epoch-1" in (tmp_path / "first.html").read_text(encoding="utf-8")
    (group,) = watched([tmp_path / "mine", tmp_path])  # once, however it is reached
    assert [curve["protocol"] for curve in group["curves"]] == ["knn/instdisc@1", f"knn/{HOSTILE}@1"]


def test_what_is_no_watch_or_has_no_point_yet_is_left_out_and_a_damaged_curve_is_refused(tmp_path):
    assert watched([tmp_path]) == []
    output = write_watch(tmp_path)
    assert watched([tmp_path]) == []
    for wrong, words in (
        (line(1, 1) | {"step": 3}, "no single place"),
        ({key: value for key, value in line(1, 1).items() if key != "epoch"}, "no single place"),
        (line(1, 1) | {"metrics": {}}, "damaged"),
        (line(1, 1) | {"interval": {"top1": [1]}}, "damaged"),
    ):
        (output / "curve.jsonl").write_text(f"{json.dumps(wrong)}\n{json.dumps(line(2, 1))}\n")
        with pytest.raises(InputError, match=words):
            watched([tmp_path])
    mixed = {key: value for key, value in line(1, 1).items() if key != "epoch"} | {"order": 1}
    (output / "curve.jsonl").write_text(f"{json.dumps(line(2, 1))}\n{json.dumps(mixed)}\n")
    with pytest.raises(InputError, match="it counts by epoch and order"):
        watched([tmp_path])
    (output / "checkpoints.json").unlink()
    assert watched([tmp_path]) == []  # another program's
