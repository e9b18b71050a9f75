import base64
import hashlib
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from PIL import Image

from moco_eval.errors import InputError
from moco_eval.report import figures, pictures, provenance, scores
from moco_eval.report import runs as read
from moco_eval.report.page import _contents, write_report
from moco_eval.results import compare

HOSTILE = '<script>alert("x")</script>'
MOCO = {
    "path": "runs/demo/pretrain/checkpoints/last.pth",
    "sha256": "a" * 64,
    "origin": "moco-eval/1",
    "arch": "resnet18_quarter",
    "pretraining": {"protocol": "pretrain/moco-v2@1", "epochs": 60, "config": {"seed": 0}},
}
RANDOM = MOCO | {"sha256": "b" * 64, "pretraining": {"epochs": 0, "config": {"seed": 0}}}
PIXELS = MOCO | {
    "path": "pixels",
    "sha256": "c" * 64,
    "origin": "raw pixels",
    "arch": "pixels",
    "pretraining": None,
}


def record(encoder, value, *, protocol="linear/moco-lincls@1", metric="top1", std=None, few=None, **more):
    """A result record with invented numbers, to test the page only."""
    n = 5 if std else 1
    interval = {} if protocol.startswith("detect") else {metric: [value - 2, value + 2]}
    return {
        "schema": "moco-eval/result@1",
        "protocol": protocol,
        "dataset": {"name": "digits", "split": "test", "fingerprint": "f00d", "images": 500, "classes": 10}
        | ({"labels_per_class": few} if few else {}),
        "encoder": encoder,
        "metrics": {metric: value},
        "std": {metric: std} if std else {},
        "interval": interval,
        "trials": [{"seed": seed, "metrics": {metric: value}} for seed in range(n)],
        "over": "head",
        "selection": "last-epoch",
        "equivalences": [],
        "deviations": ["batch_size 100 instead of 256"],
        "cost": {"seconds": 12.3, "images": 1797, "peak_memory_MB": 400.0, "device": "cpu"},
        "environment": {},
        **more,
    }


def write_run(folder, command, result=None, **values):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"command": command, **values}))
    environment = {
        "command": f"moco-eval {command} somewhere",
        "time": "2026-01-01T00:00:00+0000",
        "versions": {"moco-eval": "0.1.0", "torch": "2.6.0"},
        "hardware": {"machine": "x86_64", "cpus": 2, "gpus": []},
        "commit": "0123456789ab",
        "seed": 0,
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    if result:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def answer(folder, share, trials):
    """Of 500 images of ten classes the first are right, so many as the record says, in every trial."""
    labels = np.arange(500) % 10
    said = np.where(np.arange(500) < round(5 * share), labels, (labels + 1) % 10)
    np.savez(folder / "predictions.npz", label=labels, prediction=np.tile(said, (trials, 1)))


def write_pretraining(folder):
    write_run(
        folder,
        "pretrain",
        dataset={"name": "digits", "images": 1297},
        config={"protocol": "pretrain/moco-v2@1"},
    )
    lines = [{"step": 0, "epoch": 0, "chance": 8.3, "queue_full_step": 30}]
    lines += [{"step": step, "epoch": step / 20, "loss": 9 - step / 40, "accuracy": 5.0} for step in range(10, 200, 10)]
    lines += [{"step": 20 * epoch, "epoch": epoch, "knn_top1": 60.0 + epoch} for epoch in range(1, 11)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Image.new("RGB", (64, 32), "teal").save(folder / "views.png")
    return folder


def write_demo(root):
    """The run directories of a demo, with invented numbers."""
    write_pretraining(root / "pretrain")
    for name, encoder, few, knn in (
        ("moco", MOCO, 88.0, 97.0),
        ("random", RANDOM, 70.0, 80.0),
        ("pixels", PIXELS, 92.0, 97.4),
    ):
        answer(write_run(root / f"linear-10-{name}", "linear", record(encoder, few, std=1.5, few=10)), few, 5)
        answer(write_run(root / f"linear-{name}", "linear", record(encoder, few + 5)), few + 5, 1)
        folder = write_run(root / f"knn-{name}", "knn", record(encoder, knn, protocol="knn/instdisc@1"))
        answer(folder, knn, 1)
        Image.new("RGB", (60, 40), "navy").save(folder / "neighbours.png")
    for name, encoder, value in (("moco", MOCO, 40.0), ("random", RANDOM, 20.0)):
        scores = {"per_class": {HOSTILE: {"AP50": 12.5}, "7": {"AP50": None}}}
        folder = write_run(
            root / f"detect-{name}",
            "detect",
            record(encoder, value, protocol="detect/x@1", metric="AP50", **scores),
        )
        lines = [
            {"iteration": i, "lr": 0.02 if i < 60 else 0.002, "loss": 3.0, "loss_cls": 1.0} for i in range(0, 90, 5)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "pictures").mkdir()
        for number in range(6):
            Image.new("RGB", (80, 40), "olive").save(folder / "pictures" / f"{number}-scene.png")
    return root


@pytest.fixture
def runs(tmp_path):
    return write_demo(tmp_path / "demo")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    write_report([write_demo(folder / "demo")], folder / "report.html", title=f"Demo {HOSTILE}")
    return folder / "report.html"


@pytest.fixture
def page(page_file):
    return page_file.read_text()


def test_every_number_is_on_the_page_fewest_labels_first(page):
    for words in (
        "88.0 ± 1.5",
        "70.0 ± 1.5",
        "92.0 ± 1.5",
        "93.0",
        "97.0",
        "97.4",
        "40.0",
        "[86.0, 90.0]",
        "5 label draws",
    ):
        assert words in page
    head = page[page.index("<thead>") : page.index("</thead>")]
    assert head.index("10 labels per class") < head.index("all labels") < head.index("detection")


def test_the_summary_says_where_moco_wins_and_where_not(runs):
    found = read.read_runs([runs])
    words = " ".join(_contents(found)["summary"])
    assert words.startswith(
        "Linear top-1 with 10 labels per class on digits, in percent: "
        "MoCo v2 (epoch 60) 88.0 ± 1.5, random initialisation 70.0 ± 1.5, raw pixels 92.0 ± 1.5."
    )
    assert (
        "MoCo v2 (epoch 60) is ahead of random initialisation in linear top-1 with 10 labels per class, "
        "linear top-1 with all labels, kNN top-1 with all labels; not compared (a run kept no answers) with random "
        "initialisation in detection AP50."
    ) in words
    assert (
        "MoCo v2 (epoch 60) is level with raw pixels in kNN top-1 with all labels; behind raw pixels in linear top-1 "
        "with 10 labels per class, linear top-1 with all labels."
    ) in words


def test_every_verdict_is_that_of_compare(runs):
    """Whatever the records' own spreads say: of the demo kNN was once level where compare said p < 0.001."""
    for kind in ("linear-10", "linear", "knn"):
        for rival in ("random", "pixels"):
            done = compare.compare(runs / f"{kind}-{rival}", runs / f"{kind}-moco")
            assert f"B is {done.verdict} A." in str(done)
            found = read.read_runs([runs / f"{kind}-moco", runs / f"{kind}-{rival}"])
            (_, said) = _contents(found)["summary"]
            assert said.startswith(f"MoCo v2 (epoch 60) is {done.verdict} ")


def test_what_is_level_with_the_highest_is_coloured_like_it(runs, page):
    columns = _contents(read.read_runs([runs]))["columns"]
    leading = {(column.task, column.regime): column.leading for column in columns}
    assert leading["kNN", "all labels"] == {"raw pixels", "MoCo v2 (epoch 60)"}  # 97.4 and 97.0
    assert leading["linear", "all labels"] == {"raw pixels"}  # of 97.0, 93.0 and 75.0
    assert leading["detection", "all labels"] == {"MoCo v2 (epoch 60)"}  # 20 kept no answers
    assert page.count('class="best"') == sum(map(len, leading.values()))
    (alone,) = _contents(read.read_runs([runs / "knn-moco"]))["columns"]
    assert alone.leading == set()


def test_two_runs_are_resampled_once_for_the_summary_and_the_colours(runs, tmp_path, monkeypatch):
    for name, encoder, value in (("moco", MOCO, 97.4), ("pixels", PIXELS, 97.0)):  # here the trained one is the highest
        answer(write_run(runs / f"grid-{name}", "knn", record(encoder, value, protocol="knn/grid@1")), value, 1)
    asked, verdict = [], compare.verdict
    monkeypatch.setattr(compare, "verdict", lambda *pair: (asked.append(pair), verdict(*pair))[1])
    write_report([runs], tmp_path / "report.html")
    assert asked and len(set(asked)) == len(asked)
    level = {frozenset(pair) for pair in asked if verdict(*pair) == "level with"}
    assert level and sum(frozenset(pair) in level for pair in asked) == len(level)  # nor once in each direction


def test_chance_stands_in_the_table_and_suspicious_numbers_above_it(runs, tmp_path):
    untrained = MOCO | {"sha256": "d" * 64, "path": "x/mine.pth", "pretraining": None}
    doubt = "every norm layer is as initialised, scale 1 (or 0) and shift 0: these weights look untrained"
    write_run(tmp_path / "more" / "knn", "knn", record(untrained | {"warnings": [doubt]}, 80.0, protocol="knn/x@1"))
    write_run(tmp_path / "more" / "linear", "linear", record(untrained | {"warnings": [doubt]}, 40.0))
    write_report([tmp_path / "more"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    (results,) = Elements(page).tables
    assert results[-1] == "chance10.010.0"
    above = page[: page.index("<nav")]
    assert f"mine: {doubt}." in above
    assert (
        "mine on digits: on the same features knn/x@1 80.0 [78.0, 82.0] and linear/moco-lincls@1 40.0 [38.0, 42.0] "
        "differ by more than their intervals in top1"
    ) in above
    assert "Raw pixels are not among these runs" in page
    assert not _contents(read.read_runs([runs]))["pixels_missing"]


@pytest.mark.parametrize(
    ("over", "few", "message"),
    [
        ("head", None, "5 heads"),
        ("labels", 10, "5 label draws"),
        ("head", 10, "5 label draws"),  # as records said at first
        ("finetune", 10, "5 fine-tunings"),
        ("pretrain", None, "5 pretrainings"),
    ],
)
def test_a_spread_is_named_by_what_it_is_over(over, few, message):
    done = record(MOCO, 88.0, std=1.5, few=few, over=over)
    score = scores._score(read.Run(Path("x"), {}, {}, done), "top1")
    assert (score.text, score.trials, score.interval) == ("88.0 ± 1.5", message, (86, 90))
    assert ("trials", f"{message}, seeds 0, 1, 2, 3, 4") in provenance._evaluation_facts(done)


def test_nothing_is_fetched_and_nothing_runs(page):
    assert "http:" not in page and "https:" not in page
    assert page.count("<script") == 1 and "@import" not in page  # its own, which is tested below
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    assert not re.search(r"url\((?!#)", page)
    assert len(page) < 3_000_000


class Elements(HTMLParser):
    """The elements of a page: how many, the text of each table's rows, and what was closed that was not open."""

    ALONE = ("meta", "link", "br", "wbr", "img")

    def __init__(self, page):
        super().__init__()
        self.count, self.tables, self.wrong, self.open = {}, [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.open += [] if tag in self.ALONE else [tag]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append("")

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append((tag, self.getpos()))

    def handle_data(self, data):
        if "tr" in self.open:
            self.tables[-1][-1] += "".join(data.split())


def test_the_page_is_whole_without_its_script(page):
    found = Elements(page)
    assert found.wrong == [] and found.open == []
    (results,) = found.tables
    assert len(results) == 5 and results[1].startswith("MoCov2(epoch60)88.0±1.55labeldraws")


def test_what_users_name_is_escaped_wherever_it_stands(tmp_path):
    encoder = MOCO | {"path": f"{HOSTILE}.pth", "origin": HOSTILE, "pretraining": None}
    done = record(encoder, 80.0, protocol=f"linear/{HOSTILE}", deviations=[HOSTILE])
    done["dataset"] |= {"name": HOSTILE, "split": HOSTILE, "subset": HOSTILE}
    write_run(tmp_path / "runs" / HOSTILE.replace("/", ""), "linear", done)
    found = read.read_runs([tmp_path / "runs"])
    assert HOSTILE in found[0].record["encoder"]["path"]
    write_report([tmp_path / "runs"], tmp_path / "report.html", title=HOSTILE)
    elements = Elements((tmp_path / "report.html").read_text())
    assert elements.count["script"] == 1 and elements.wrong == [] and elements.open == []


def test_protocols_that_strangers_named_are_shown_as_they_are(tmp_path):
    odd = ("odd", "knn", "a/b/c@1", "linear/x@1", "linear/x@10")
    for number, protocol in enumerate(odd):
        write_run(tmp_path / "runs" / f"{number}", "linear", record(MOCO, 60.0 + number, protocol=protocol))
    write_report([tmp_path / "runs"], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text().replace("/<wbr>", "/")
    assert all(f"<br>{protocol}</small>" in text for protocol in odd)
    runs = read.read_runs([tmp_path / "runs"])
    columns = scores.result_columns(runs, read.encoder_names(runs))
    assert [(column.task, column.protocol) for column in columns] == [
        ("linear", "linear/x@1"),
        ("linear", "linear/x@10"),
        ("kNN", "knn"),
        ("a", "a/b/c@1"),
        ("odd", "odd"),
    ]


def test_a_pretrainings_recipe_is_shown_without_its_protocol_and_what_is_expected_of_it():
    config = {"protocol": "pretrain/x@1", "protocols": 2, "expect": {"metrics": {"top1": 1.0}}, "expectation": 3}
    facts = dict(provenance._pretraining_facts({"dataset": "digits", "config": config}))
    assert facts["recipe"] == "protocols 2, expectation 3"


def test_what_users_name_is_escaped(page):
    assert HOSTILE not in page
    assert page.count("&lt;script&gt;") >= 3  # in the title twice, and as a class of the detections


def test_day_data_and_one_plot_come_first(page):
    head = page[page.index("<h1>") : page.index("<nav")]
    assert "2026-01-01 \u00b7 digits (500 test images, 10 classes) \u00b7 12 runs" in head
    assert head.count("<svg") == 1 and "MoCo v2 (epoch 60)" in head[head.index("<svg") : head.index("</svg>")]
    assert ">chance</text>" in head


def test_the_loss_begins_where_the_queue_is_full(runs):
    (curve,) = _contents(read.read_runs([runs / "pretrain"]))["curves"]
    assert (curve["first"], curve["title"]) == (9 - 40 / 40, "MoCo v2 on digits")  # the line of steps 31 to 40
    lines = [line for line in (runs / "pretrain" / "metrics.jsonl").read_text().splitlines() if "chance" not in line]
    (runs / "pretrain" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (curve,) = _contents(read.read_runs([runs / "pretrain"]))["curves"]
    assert curve["first"] == 9 - 10 / 40


def test_bars_of_all_encoders_are_in_the_order_of_the_first(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(pictures, "bars_figure", lambda *given: drawn.append(given[3]) or Figure())
    for name, encoder, scores_ in (("moco", MOCO, (9.0, 5.0)), ("random", RANDOM, (1.0, 2.0))):
        per_class = {label: {"AP50": value} for label, value in zip("ab", scores_)}
        done = record(encoder, 3.0, protocol="detect/x@1", metric="AP50", per_class=per_class)
        write_run(tmp_path / name, "detect", done)
    _contents(read.read_runs([tmp_path]))
    assert drawn == [["a", "b"], ["a", "b"]]


def test_curves_carry_their_marks_and_take_the_pages_colours(page):
    assert "chance 8.30" in page and "the queue is full of keys" in page
    assert "var(--accent)" in page and "currentColor" in page and "#010203" not in page
    assert page.count("<svg") == 2 + 4 + 5 + 1  # pretraining; detections; confusions and differences; the first plot


def test_a_figure_keeps_to_itself():
    """Two figures share no name, by which one would be cut or marked as the other, and set no style of the page."""
    drawn = []
    for top in (1, 2):
        figure = Figure()
        axes = figure.add_subplot()
        axes.plot([0, top], marker="o")
        drawn.append(figures.svg(figure, "a curve"))
    names = [set(re.findall(r' id="([^"]+)"', one)) for one in drawn]
    used = [set(re.findall(r'(?:url\(#|href="#)([^")]+)', one)) for one in drawn]
    assert names[0] and not names[0] & names[1]
    assert used[0] and all(wanted <= held for wanted, held in zip(used, names))
    assert not any("<style" in one for one in drawn)


def test_each_class_and_each_loss_is_shown(page):
    shown = page[page.index("<h2>Detections") : page.index("<h2>Deviations")]
    assert "AP50 (%), mean 12.5" in shown and "no object" in shown
    assert "RPN" not in shown and shown.count(">class<") == 2 and "lr 0.002" in shown


def test_many_classes_take_the_whole_width(tmp_path):
    per_class = {f"class {i}": {"APbb": float(i)} for i in range(80)}
    done = record(MOCO, 40.0, protocol="detect/coco@1", metric="APbb", per_class=per_class)
    folder = write_run(tmp_path / "run", "detect", done)
    for seed in (0, 1):
        (folder / f"trial_{seed}/pictures").mkdir(parents=True)
        (folder / f"trial_{seed}/metrics.jsonl").write_text('{"iteration": 20, "lr": 0.02, "loss": 1.0}\n')
        Image.new("RGB", (80, 40), "olive").save(folder / f"trial_{seed}/pictures/0-a.png")
    write_report([folder], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert '<figure class="row">' in page and "APbb (%), mean 39.5" in page and "class 79" in page
    assert page.count("<svg") == 2 + 1 and page.count("data:image/png;base64,") == 2
    assert len(page) < 150_000


def test_pictures_are_inside_and_limited(page):
    assert page.count("data:image/png;base64,") == 1 + 3 + 2 * pictures.PICTURES


def test_a_large_picture_is_made_smaller(tmp_path):
    Image.effect_noise((1500, 1500), 90).save(tmp_path / "big.png")
    assert (tmp_path / "big.png").stat().st_size > pictures.PICTURE_BYTES
    assert pictures.image(tmp_path / "big.png").startswith("data:image/jpeg")


def test_two_encoders_never_share_a_name(tmp_path):
    other = MOCO | {"path": "runs/second/checkpoints/last.pth", "sha256": "d" * 64}
    twin = MOCO | {"path": "elsewhere/second/checkpoints/last.pth", "sha256": "e" * 64}
    for name, encoder in (("one", MOCO), ("two", other), ("three", twin)):
        write_run(tmp_path / "r" / name, "linear", record(encoder, 80.0))
    names = read.encoder_names(read.read_runs([tmp_path / "r"]))
    assert names[MOCO["sha256"]] == "MoCo v2 (epoch 60), pretrain"
    assert sorted(names.values())[1:] == [
        "MoCo v2 (epoch 60), second, dddddddd",
        "MoCo v2 (epoch 60), second, eeeeeeee",
    ]


def test_other_settings_are_another_column(tmp_path):
    write_run(tmp_path / "r" / "one", "linear", record(MOCO, 80.0))
    write_run(tmp_path / "r" / "two", "linear", record(RANDOM, 70.0, deviations=["optimizer.lr 1 instead of 30"]))
    runs = read.read_runs([tmp_path / "r"])
    columns = scores.result_columns(runs, read.encoder_names(runs))
    assert [len(column.scores) for column in columns] == [1, 1]
    assert {column.regime for column in columns} == {"all labels", "all labels, settings 2"}


def test_what_kept_to_the_protocol_comes_first(tmp_path):
    write_run(tmp_path / "r" / "one", "linear", record(MOCO, 80.0))
    write_run(tmp_path / "r" / "two", "linear", record(RANDOM, 70.0, deviations=["encoder: batch_size 64"]))
    runs = read.read_runs([tmp_path / "r"])
    columns = scores.result_columns(runs, read.encoder_names(runs))
    assert [list(column.scores) for column in columns] == [["random initialisation"], ["MoCo v2 (epoch 60)"]]


def test_deviations_of_the_same_runs_stand_together(tmp_path):
    write_run(tmp_path / "r" / "one", "linear", record(MOCO, 80.0, deviations=["a", "b"]))
    write_run(tmp_path / "r" / "two", "linear", record(RANDOM, 70.0, deviations=["a", "c", "b"]))
    found = provenance.deviations_by_protocol(read.read_runs([tmp_path / "r"]))
    assert found == [("linear/moco-lincls@1", [(["a", "b"], ["one", "two"]), (["c"], ["two"])])]


def test_detections_that_left_nothing_to_show_have_no_section(tmp_path):
    write_run(tmp_path / "run", "detect", record(MOCO, 40.0, protocol="detect/x@1", metric="AP50"))
    write_report([tmp_path / "run"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "detection <span>AP50" in page and "<h2>Detections" not in page and 'href="#detections"' not in page


def test_pretraining_alone_makes_a_page(tmp_path):
    write_pretraining(tmp_path / "pretrain")
    write_report([tmp_path / "pretrain"], tmp_path / "report.html")
    assert "No evaluation is among these runs yet." in (tmp_path / "report.html").read_text()


def test_a_line_being_written_is_passed_over_and_a_damaged_one_is_not(tmp_path):
    folder = write_pretraining(tmp_path / "pretrain")
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text + '{"step": 2')
    assert read.read_runs([folder])
    (folder / "metrics.jsonl").write_text('{"step": 2\n' + text)
    with pytest.raises(InputError, match="line 1 is not JSON"):
        read.read_runs([folder])


def test_what_is_no_run_is_refused(tmp_path, runs):
    with pytest.raises(InputError, match="is no folder"):
        write_report([tmp_path / "nowhere"], tmp_path / "report.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no finished run"):
        write_report([runs, tmp_path / "empty"], tmp_path / "report.html")
    (runs / "knn-moco" / "neighbours.png").write_text("no picture")
    with pytest.raises(InputError, match="not a readable picture"):
        write_report([runs], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def damaged(change):
    """result.json of a run after a change to its record."""

    def damage(folder):
        done = json.loads((folder / "result.json").read_text())
        change(done)
        (folder / "result.json").write_text(json.dumps(done))

    return damage


def put(name, text):
    return lambda folder: (folder / name).write_bytes(text)


HEALTH = {"images": 5, "dimensions": 3, "uniformity": -1.0, "alignment": None, "effective_rank": 2.0}
DAMAGED = {
    "environment is a list": (put("environment.json", b"[]"), r"environment\.json is damaged: it is \[\], no mapping"),
    "hardware is a word": (
        put("environment.json", b'{"hardware": "x"}'),
        r"environment\.json is damaged: hardware is 'x', no mapping",
    ),
    "nothing but the schema": (
        put("result.json", b'{"schema": "moco-eval/result@1"}'),
        r"result\.json is damaged: it lacks protocol",
    ),
    "a bracket in another": (put("result.json", b"[" * 100_000), r"is not readable JSON"),
    "an endless number": (put("environment.json", b"9" * 5000), r"is not readable JSON"),
    "no top-1": (damaged(lambda done: done["metrics"].update(top1=None)), r"metrics\.top1 is None, no number"),
    "top-1 in words": (damaged(lambda done: done["metrics"].update(top1="80")), r"metrics\.top1 is '80', no number"),
    "an infinite top-1": (damaged(lambda done: done["metrics"].update(top1=float("inf"))), "metrics.top1 is inf"),
    "half an interval": (damaged(lambda done: done["interval"].update(top1=[78.0])), r"interval\.top1 is \[78\.0\]"),
    "no trial": (damaged(lambda done: done.update(trials=[])), r"trials is \[\]"),
    "health is a list": (damaged(lambda done: done.update(health=[1])), r"health is \[1\], no mapping"),
    "health without a key": (damaged(lambda done: done.update(health=HEALTH)), "it lacks health.dead_dimensions"),
    "classes in a list": (damaged(lambda done: done.update(per_class=[1])), r"per_class is \[1\], no mapping"),
    "no time": (damaged(lambda done: done.update(environment={"time": 5})), "environment.time is 5, no text"),
    "encoder is a word": (
        put("config.yaml", b"command: knn\nencoder: hello"),
        r"config\.yaml is damaged: encoder is 'hello', no mapping",
    ),
    "command is a list": (put("config.yaml", b"command: [1]"), r"config\.yaml is damaged: command is \[1\], no text"),
}


def refused(folder, output, message):
    """A report is refused in one line with the way out, and none is written."""
    with pytest.raises(InputError, match=message) as error:
        write_report([folder], output)
    assert "\n" not in str(error.value) and "; leave that run out, or run it again" in str(error.value)
    assert not output.exists()


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_evaluation_is_told_in_a_line(name, tmp_path):
    damage, words = DAMAGED[name]
    folder = write_run(tmp_path / "run", "linear", record(MOCO, 80.0))
    damage(folder)
    refused(folder, tmp_path / "report.html", words)


NEEDED = ("protocol", "dataset", "encoder", "metrics", "std", "trials", "over", "selection", "equivalences")


@pytest.mark.parametrize("key", [*NEEDED, "deviations", "cost"])
def test_a_record_without_a_key_is_told_in_a_line(key, tmp_path):
    folder = write_run(tmp_path / "run", "linear", record(MOCO, 80.0))
    damaged(lambda done: done.pop(key))(folder)
    refused(folder, tmp_path / "report.html", rf"result\.json is damaged: it lacks {key};")


def test_a_record_of_an_older_version_is_read(tmp_path):
    folder = write_run(tmp_path / "run", "linear", record(MOCO, 80.0))
    damaged(lambda done: [done.pop(key) for key in ("interval", "environment")])(folder)
    assert "health" not in json.loads((folder / "result.json").read_text())
    write_report([folder], tmp_path / "report.html")
    assert "80.0" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b'{"step": 1, "epoch": 1, "loss": 1}\n\xff\n{}\n', "line 2 is not JSON"),
        (b"12\n", "line 1 is damaged: it is 12, no mapping"),
        (b'{"epoch": 1, "loss": 1}\n', "line 1 is damaged: it lacks step"),
        (b'{"step": 1, "epoch": 1, "loss": null}\n', "line 1 is damaged: loss is None, no number"),
        (b'{"step": 1, "epoch": 1, "loss": "x"}\n', "line 1 is damaged: loss is 'x', no number"),
        (b'{"step": 1, "epoch": 0, "loss": 1}\n', "line 1 is damaged: .* a loss before the first step"),
        (b'{"step": 1, "epoch": 1, "knn_top1": null}\n', "line 1 is damaged: knn_top1 is None"),
    ],
)
def test_a_damaged_line_of_a_pretraining_is_told(lines, message, tmp_path):
    folder = write_pretraining(tmp_path / "pretrain")
    (folder / "metrics.jsonl").write_bytes(lines)
    refused(folder, tmp_path / "report.html", rf"metrics\.jsonl {message}")


def test_half_a_character_at_the_end_is_still_being_written(tmp_path):
    folder = write_pretraining(tmp_path / "pretrain")
    (folder / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes() + b'{"alarms": ["\xc3')
    assert read.read_runs([folder])[0].metrics[-1]["knn_top1"] == 70.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("command: pretrain\nconfig: 3", "config is 3, no mapping"),
        ("command: pretrain\ndataset: {images: 3}", r"it lacks dataset\.name"),
        ("command: pretrain\ndataset: 3", "dataset is 3, no mapping"),
    ],
)
def test_a_damaged_config_of_a_pretraining_is_told(text, message, tmp_path):
    folder = write_pretraining(tmp_path / "pretrain")
    (folder / "config.yaml").write_text(text)
    refused(folder, tmp_path / "report.html", rf"config\.yaml is damaged: {message}")


@pytest.mark.parametrize(
    ("line", "message"),
    [("3", "it is 3"), ('{"loss": 1}', "it lacks iteration"), ('{"iteration": 1, "loss": "x"}', "loss")],
)
def test_a_damaged_line_of_a_fine_tuning_is_told(line, message, tmp_path):
    folder = write_run(tmp_path / "run", "detect", record(MOCO, 40.0, protocol="detect/x@1", metric="AP50"))
    (folder / "metrics.jsonl").write_text(f"{line}\n")
    refused(folder, tmp_path / "report.html", rf"metrics\.jsonl line 1 is damaged: {message}")


def test_a_folder_is_no_page(tmp_path):
    folder = write_pretraining(tmp_path / "pretrain")
    with pytest.raises(InputError, match=r"pages is a folder; name a file in it, such as .*pages/report\.html"):
        (tmp_path / "pages").mkdir()
        write_report([folder], tmp_path / "pages")


# Names and times


def test_a_folder_whose_name_is_no_utf8_is_shown_with_backslashes(tmp_path):
    folder = tmp_path / os.fsdecode(b"r\xff")
    done = record(MOCO | {"path": os.fsdecode(b"w\xfe.pth"), "pretraining": None}, 80.0)
    write_run(folder, "linear", done)
    assert read.read_runs([folder])[0].name == r"r\xff"
    write_report([folder], folder / "report.html")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert r"w\udcfe" in page and r"r\udcff" in page  # the folder, as it was given


def test_runs_of_one_folder_name_are_told_apart(tmp_path, monkeypatch):
    for name in ("a/knn", "b/knn", "c/b/knn", "c/linear"):
        write_run(tmp_path / name, "knn", record(MOCO, 80.0))
    monkeypatch.chdir(tmp_path / "a" / "knn")
    assert [run.name for run in read.read_runs([Path()])] == ["knn"]
    names = {run.path.relative_to(tmp_path).as_posix(): run.name for run in read.read_runs([tmp_path])}
    above = tmp_path.name
    assert names == {
        "a/knn": "a/knn",
        "b/knn": f"{above}/b/knn",
        "c/b/knn": "c/b/knn",
        "c/linear": "linear",
    }


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1970-01-01T02:30:00+0200", 1800.0),
        ("1970-01-01T01:50:00+0000", 6600.0),  # later, though its words come first
        ("yesterday", 0.0),
        (None, 0.0),
    ],
)
def test_times_of_two_zones_are_compared_as_times(text, seconds, tmp_path):
    folder = write_run(tmp_path / "run", "linear", record(MOCO, 80.0))
    (folder / "environment.json").write_text(json.dumps({} if text is None else {"time": text}))
    assert read.read_runs([folder])[0].time == seconds


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "MoCo v2 (epoch 60)"),
        ({"pretraining": {"protocol": "pretrain/cifar10-demo@2", "epochs": 9}, "origin": "other"}, "MoCo (epoch 9)"),
        ({"pretraining": {"epochs": 200}, "origin": "facebookresearch/moco v2"}, "MoCo v2 (epoch 200)"),
        ({"pretraining": {"epochs": 200}, "origin": "moco-eval safetensors, from facebookresearch/moco v1"}, "MoCo"),
        ({"pretraining": {"epochs": 100}, "origin": "facebookresearch/simsiam"}, "pretrain"),
        ({"pretraining": {"epochs": 100}, "origin": "facebookresearch/dino", "path": "my/dino.pth"}, "dino"),
        ({"pretraining": {"epochs": 100}, "origin": "moco-eval safetensors, from facebookresearch/dino"}, "pretrain"),
        ({"pretraining": {"protocol": "pretrain/moco-v2@1"}}, "MoCo"),
        ({"pretraining": {"deviations": []}, "origin": "other", "path": "checkpoints/last.pth"}, "last"),
    ],
)
def test_only_what_moco_trained_is_named_moco(changes, name, tmp_path):
    write_run(tmp_path / "run", "linear", record(MOCO | changes, 80.0))
    (run,) = read.read_runs([tmp_path / "run"])
    found = read.encoder_names([run])[read.sha_of(run)]
    assert found.startswith(name) and found.startswith("MoCo") == name.startswith("MoCo")
    assert read.kind_of(run.record["encoder"]) == "trained"


def test_query_and_key_encoder_of_a_file_are_two(tmp_path):
    write_run(tmp_path / "runs" / "query", "linear", record(MOCO | {"which": "query"}, 80.0))
    write_run(tmp_path / "runs" / "key", "linear", record(MOCO | {"which": "key"}, 70.0))
    runs = read.read_runs([tmp_path / "runs"])
    assert read.encoder_names(runs) == {
        MOCO["sha256"]: "MoCo v2 (epoch 60)",
        f"{MOCO['sha256']}:key": "MoCo v2 (epoch 60), key encoder",
    }
    write_report([tmp_path / "runs"], tmp_path / "report.html")
    rows = Elements((tmp_path / "report.html").read_text()).tables[0]
    assert any(row.startswith("MoCov2(epoch60),keyencoder") and "70.0" in row for row in rows)


# Beside the papers


def of_a_row(value):
    """A record as `detect` writes it for an untrained ResNet-50 on VOC; a fixture, not a measurement."""
    encoder = RANDOM | {"path": "random:resnet50", "arch": "resnet50", "origin": "random", "pretraining": None}
    found = record(encoder, value, protocol="detect/voc-r50-c4-24k@1", metric="AP50", over="finetune", deviations=[])
    found["dataset"] = {"name": "voc", "split": "test2007", "fingerprint": "ef", "images": 4952, "classes": 20}
    return found


def test_a_run_of_a_published_row_stands_beside_it(tmp_path):
    write_run(tmp_path / "runs/detect-voc", "detect", of_a_row(61.0))
    write_report([tmp_path / "runs"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    section = page[page.index('<section id="papers">') : page.index('<section id="deviations">')]
    assert "moco-v1-2b: MoCo v1" in section and "moco-v1-4" not in section
    row = section[section.index("random init") :]
    assert row.index(">60.2") < row.index(">61.00 <small>(n=1)") < row.index(">+0.80")
    assert section.count("AP75") == 1 and "<li>of these runs nothing for: AP, AP75</li>" in section


def test_runs_of_no_published_row_say_so(page):
    assert "None of these runs is of a published row" in page


def test_the_contents_name_every_section_that_is_there(page):
    anchors = re.findall(r'<li><a href="#(\w+)">', page)
    assert anchors and all(f'id="{anchor}"' in page for anchor in anchors)
    assert anchors[0] == "results" and anchors[-1] == "provenance"


def test_only_the_pages_own_script_may_run(page):
    (allowed,) = re.findall(r"script-src 'sha256-([^']+)'", page)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() == allowed
    assert "default-src 'none'" in page
