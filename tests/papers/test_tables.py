"""How a comparison is shown: every format of every table, the spread, what is missing."""

import csv
import dataclasses
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from commands import environment, error_line, in_process, moco_eval
from test_papers import cifar_record

from moco_eval.errors import InputError
from moco_eval.papers import latex, match, render, tables, todo
from moco_eval.papers import steps as chain
from moco_eval.papers.cost import Cost
from moco_eval.runtime.printable import printable

TABLES = {name: tables.load_table(name) for name, _ in tables.tables()}
FORMS = ("text", "markdown", "csv", "latex", "html")


def left(table, records, places):
    return chain.left(chain.steps(table, table.rows, places), table, records)


def lacking(table, records=(), places=None):
    """What is missing, each step at an hour; without looking at the machine."""
    steps = left(table, records, places or chain.Places(Path("none")))
    return todo.Missing([(step, Cost(3600.0, "timed")) for step in steps], machine="a machine")


def spread(mean, *, std=0.3, over="head", published_over="head", n=5, published_std=0.2, mark=None, trials=1):
    """One line against a published 60.8; fixtures, not measurements."""
    column = tables.Column(title="top-1", metric="top1", protocol="linear/moco-lincls@1", dataset="d", trials=trials)
    ours = match.Ours(mean, std, n, over, ["runs/a"], ["k 20 & 30_x"] if mark else [])
    return match.Line("a row", column, 60.8, published_std, 5, published_over, ours, mark)


# The published spread


@pytest.mark.parametrize(
    ("mean", "word"),
    [(60.8, "within"), (61.0, "within"), (60.6, "within"), (61.01, "above"), (60.59, "below"), (0.0, "below")],
)
def test_ours_lies_within_above_or_below_the_published_spread(mean, word):
    assert spread(mean).judgement == word


def test_nothing_is_said_without_a_spread_over_the_same_thing():
    assert spread(60.8, published_std=None).judgement is None
    assert spread(60.8, over="pretrain").judgement is None
    assert spread(60.8, published_over=None).judgement is None
    assert spread(60.8, mark=1).judgement is None  # left its protocol
    assert spread(60.8, n=3, trials=5).judgement is None  # from fewer trials than the published number
    assert match.Line("a row", spread(60.8).column, 60.8, 0.2, 5, "head").judgement is None  # nothing of ours


def test_the_spread_comes_from_the_table_with_its_trials():
    lines = match.compare(TABLES["moco-repo-linear"], []).lines
    assert [(line.published_std, line.published_n, line.published_over) for line in lines] == [
        (0.2, 5, "pretrain"),
        (0.1, 5, "pretrain"),
    ]


def judged():
    """A comparison with a judged line, a marked one and one without anything of ours."""
    done = match.Comparison(TABLES["moco-repo-linear"])
    done.lines = [spread(60.9), spread(70.0, mark=1), match.Line("another", spread(0).column, None, None)]
    done.footnotes = ["runs/a: k 20 & 30_x"]
    return done


@pytest.mark.parametrize("form", FORMS)
def test_the_judgement_and_the_mark_are_in_every_format(form):
    out = render.render(judged(), form)
    assert form == "csv" or re.search(r"\+0\.10\W.*within", out)
    assert "k 20" in out and "30" in out
    if form == "csv":
        rows = list(csv.DictReader(io.StringIO(out)))
        assert [row["judgement"] for row in rows] == ["within", "", ""]
        assert [row["status"] for row in rows] == ["there", "not comparable", "missing"]
        assert rows[1]["deviations"] == "k 20 & 30_x"
    else:
        assert "[1]" in out and "(+9.20)" in out and "not comparable: runs/a" in out
        assert "(n=5)" in out  # of the published spread
        assert "standard deviation over" in out


# Every table in every format


class Page(HTMLParser):
    """Text, and the tags that were left open or asked for something from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.words, self.outside = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "link"):
            self.open.append(tag)
        found = [value for name, value in attributes if name in ("src", "href", "srcset") and value != "data:,"]
        self.outside += [tag] * (tag == "script") + found

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TABLES)
def test_every_table_in_every_format(name, form):
    table = TABLES[name]
    done, wanted = match.compare(table, []), lacking(table)
    out = render.render(done, form, wanted)
    assert out == render.render(match.compare(table, []), form, lacking(table))
    numbers = [str(line.published) for line in done.lines if line.published is not None]
    if form == "csv":
        rows = list(csv.DictReader(io.StringIO(out)))
        assert [row["row"] for row in rows] == [line.row for line in done.lines]
        assert [row["published"] for row in rows if row["published"]] == numbers
    elif form == "html":
        page = Page()
        page.feed(out)
        assert (page.open, page.outside) == ([], []) and "url(" not in out and "@import" not in out
        found = " ".join(page.words)
        assert all(number in found for number in numbers)
        assert all(step.command in found for step, _ in wanted.steps)
    else:
        plain = out.replace("$-$", "-")
        assert all(number in plain for number in numbers)
        assert all(out.count(step.command) >= 1 for step, _ in wanted.steps)


def test_text_for_a_pipe_is_not_cut_at_80_columns(monkeypatch, in_tmp, quick_probe, capfd):
    monkeypatch.setenv("COLUMNS", "80")
    out, _ = in_process(capfd, monkeypatch, "table", "moco-v1-1")
    assert "…" not in out
    assert "RelativePosition, R50w2x" in out and "MoCo, RX50 (ResNeXt-50 32x8d)" in out


def test_a_terminal_breaks_no_command(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    table = TABLES["moco-v2-2"]
    wanted = lacking(table)
    out = render.render(match.compare(table, []), "text", wanted)
    assert "…" not in out and all(step.command in out.splitlines() for step, _ in wanted.steps)


# LaTeX


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("10% of x_y & #1 {a}", r"10\% of x\_y \& \#1 \{a\}"),
        ("C:\\x~^<>|", r"C:\textbackslash{}x\textasciitilde{}\textasciicircum{}\textless{}\textgreater{}\textbar{}"),
        ("± 0.2", r"$\pm$ 0.2"),
        ("[1] first", "{}[1] first"),
        ("Grégoire 日", "Grégoire ?"),
    ],
)
def test_latex_prints_text_as_it_is(text, escaped):
    assert latex.escape(text) == escaped


def test_what_is_missing_is_a_comment_in_latex():
    table = TABLES["moco-v2-2"]
    lines = render.render(match.compare(table, []), "latex", lacking(table)).splitlines()
    assert lines[0] == r"% needs \usepackage{booktabs}"
    after = lines[lines.index(r"\end{table}") + 1 :]
    assert after and all(line.startswith("% ") for line in after)


def test_a_long_table_breaks_over_pages(monkeypatch):
    out = render.render(match.compare(TABLES["moco-v1-1"], []), "latex")
    assert r"\begin{longtable}" in out and r"\usepackage{longtable}" in out.splitlines()[0]


@pytest.mark.slow
def test_latex_of_every_table_compiles(tmp_path):
    if not shutil.which("pdflatex"):
        pytest.skip("no pdflatex")
    hard = judged()
    hard.lines[0].row = '[1] 100% of a_b & c#1 {x} \\y ~ ^ <z> | "q" ± é 日'
    pages = {name: match.compare(table, []) for name, table in TABLES.items()} | {"hard": hard}
    for name, done in pages.items():
        (tmp_path / f"{name}.tex").write_text(render.render(done, "latex", lacking(done.table)) + "\n")
    body = "\n".join(rf"\input{{{name}}}\clearpage" for name in pages)
    (tmp_path / "all.tex").write_text(
        f"\\documentclass{{article}}\n\\usepackage{{booktabs,longtable}}\n\\begin{{document}}\n{body}\n\\end{{document}}\n"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Missing character" not in (tmp_path / "all.log").read_text(errors="replace")
    assert (tmp_path / "all.pdf").read_bytes().startswith(b"%PDF")


def test_markup_in_labels_and_deviations_is_text_in_html():
    done = judged()
    done.lines[0].row = done.footnotes[0] = '<script>alert("1")</script> & [b]'
    page = Page()
    page.feed(render.render(done, "html"))
    assert page.outside == [] and '<script>alert("1")</script> & [b]' in page.words


# What is missing


def test_the_steps_that_are_left_are_there_once_in_order():
    table = TABLES["moco-v1-2b"]
    kinds = [step.kind for step in left(table, [], chain.Places(Path("none")))]
    assert kinds == ["evaluate", "evaluate", "pretrain", "convert", "evaluate"]


def test_a_cell_with_a_comparable_number_needs_neither_evaluation_nor_pretraining():
    table, places = TABLES["cifar10-demo"], chain.Places(Path("none"))
    before = left(table, [], places)
    after = left(table, [cifar_record()], places)
    gone = [step for step in before if step.arguments not in [one.arguments for one in after]]
    assert [step.kind for step in gone] == ["pretrain", "evaluate"]
    assert {cell for step in gone for cell in step.cells} == {("asymmetric loss, 200 epochs", "knn_top1")}
    marked = left(table, [cifar_record(deviations=["k 20 instead of 200"])], places)
    assert [step.arguments for step in marked] == [step.arguments for step in before]


def test_a_pretraining_that_fills_no_cell_is_not_asked_for():
    """Training curves stand in no record: the table says so instead."""
    table = TABLES["moco-v1-a1"]
    found = todo.find(table, [], chain.Places(Path("none")))
    labels = [row.label for row in table.rows]
    assert found.steps == [] and found.reasons == {chain.why_none(table, table.rows[0]): labels}


def test_a_table_that_cannot_be_shown_is_refused(tmp_path):
    values = {"id": "x", "paper": "p", "table": "t", "caption": "c", "source": "s", "reference": []}
    column = {"metric": "top1", "protocol": "knn/instdisc@1", "dataset": "digits"}
    two = {"a": {"title": "a", **column}, "b": {"title": "b", **column, "config": "digits"}}
    row = {"label": "r", "published": {"a": 1.0}, "unavailable": "not yet built"}
    for columns, rows, words in (({}, [], "rows"), (two, [row], "each would show the other's runs")):
        (tmp_path / "x.yaml").write_text(json.dumps({**values, "columns": columns, "rows": rows}))
        with pytest.raises(InputError, match=words):
            tables.load_table(str(tmp_path / "x.yaml"))


def test_reasons_and_unmeasured_columns_are_told(quick_probe):
    found = todo.find(TABLES["moco-v1-1"], [], chain.Places(Path("none")))
    assert "BigBiGAN, R50" in found.reasons["not yet built"] and found.unmeasured == ["parameters"]
    text = render.render(match.compare(TABLES["moco-v1-1"], []), "text", found)
    assert "cannot be had (not yet built): Exemplar, R50w3x; RelativePosition, R50w2x; " in text
    assert "of no protocol of ours: parameters" in text
    assert f"{len(found.steps)} steps, in all about " in text


def test_a_label_of_two_lines_is_no_command():
    step = left(TABLES["moco-v2-2"], [], chain.Places())[0]
    hard = todo.Missing([(dataclasses.replace(step, cells=(("a\nrm -rf b", "top1"),)), None)], {"why": ["c\nd"]})
    lines = todo.script(hard).splitlines()
    assert lines == ["# a rm -rf b", "# cost unknown", step.command]
    out = render.render(match.compare(TABLES["moco-v2-2"], []), "latex", hard).splitlines()
    assert "% cannot be had (why): c d" in out and "% # a rm -rf b" in out


def test_markdown_keeps_its_columns_and_shows_angles():
    done = judged()
    done.lines[0].row, done.footnotes[0] = "a | b\nc", "batch <5>"
    out = render.render(done, "markdown")
    rows = [line for line in out.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 6 for row in rows)
    assert r"| a \| b c |" in out and r"batch \<5>" in out


def test_the_total_says_how_many_costs_are_unknown():
    (step, *_) = left(TABLES["moco-v2-2"], [], chain.Places())
    assert todo.Missing([(step, None)]).total == ""
    total = todo.Missing([(step, None), (step, Cost(7200.0, "timed"))]).total
    assert total == "2 steps, in all about 2.0 h, and 1 of unknown cost"


def test_commands_are_a_shell_script(monkeypatch, in_tmp, quick_probe, capfd):
    given = ("--data", "imagenet=/my data/in", "--data", "voc=/v")
    out, _ = in_process(capfd, monkeypatch, "table", "moco-v1-2b", "--commands", *given)
    lines = out.splitlines()
    commands = [shlex.split(line) for line in lines if not line.startswith("#")]
    assert commands.pop(0) == ["set", "-e"] and len(commands) == 5
    assert all(command[0] == "moco-eval" for command in commands)
    folders = {value for command in commands for option, value in pairwise(command) if option == "--data"}
    assert folders == {"/my data/in", "/v"}
    assert lines[:2] == ["set -e", "# random init"] and lines[3] == shlex.join(commands[0])
    assert lines[2].startswith("# about ") and lines[lines.index(shlex.join(commands[3])) - 1] == "# under a minute"
    assert lines.count("# MoCo, IN-1M") == 1  # of three steps


def test_csv_has_the_commands_and_hours_of_each_cell(monkeypatch, in_tmp, quick_probe, capfd):
    out, _ = in_process(capfd, monkeypatch, "table", "moco-v1-2b", "--format", "csv", "--here")
    rows = {(row["row"], row["metric"]): row for row in csv.DictReader(io.StringIO(out))}
    row = rows["MoCo, IN-1M", "AP"]
    pretrain, convert, detect = row["commands"].split(" && ")
    assert pretrain.startswith("moco-eval pretrain") and "convert" in convert and "detect" in detect
    assert float(row["hours"]) > 1 and row["status"] == "missing"
    gone = rows["MoCo, IG-1B", "AP"]
    assert (gone["commands"], gone["hours"], gone["status"]) == ("", "", "data never public")
    assert row["gpu_hours"] == ""


def test_a_folder_of_data_that_the_table_does_not_read_is_refused(capfd, monkeypatch):
    line = error_line(capfd, monkeypatch, "table", "moco-v1-2b", "--data", "imagnet=/x")
    assert line == "Error: --data imagnet: moco-v1-2b reads imagenet, voc. Did you mean 'imagenet'?"


@pytest.mark.parametrize("given", ["imagenet", "=x", "imagenet="])
def test_data_are_given_as_name_and_folder(given, capfd, monkeypatch):
    line = error_line(capfd, monkeypatch, "table", "moco-v2-2", "--data", given)
    assert line.startswith(f"Error: --data {given} is not NAME=FOLDER")


def test_naming_the_tables_imports_no_torch():
    code = "import sys; from moco_eval.cli.main import cli; cli(['table', '--list'], standalone_mode=False); "
    code += "sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment())


@pytest.mark.slow
def test_the_whole_command_says_what_is_missing(tmp_path):
    out, err = moco_eval("table", "cifar10-demo", "--runs", tmp_path, "--here")
    assert "moco-eval pretrain cifar10 --dataset cifar10" in out and "about" in out
    assert "timing this machine once: resnet18_cifar at 32 pixels" in err
    again, err = moco_eval("table", "cifar10-demo", "--runs", tmp_path, "--here")
    assert again == out and "timing" not in err


HOSTILE = "![t](http://evil/t.png) [c](javascript:alert(1)) \\<img src=x> `id` *b* a_b _c_ ~~d~~ &lt; # x"


def test_markdown_of_strangers_is_text():
    done = judged()
    done.lines[0].row = done.footnotes[0] = HOSTILE
    out = render.render(done, "markdown")
    shown = (
        r"!\[t](http://evil/t.png) \[c](javascript:alert(1)) \\\<img src=x> \`id\` \*b\* a_b \_c\_ \~\~d\~\~ \&lt; \# x"
    )
    assert f"| {shown} |" in out and f"- [1] not comparable: {shown}" in out


@pytest.mark.parametrize(
    ("note", "shown"),
    [
        ("[1]: http://evil", r"- \[1]: http://evil"),
        ("+ x", r"- \+ x"),
        ("12. x", r"- 12\. x"),
        ("-3.5 x", r"- \-3.5 x"),
    ],
)
def test_an_item_of_markdown_begins_no_list_and_no_link(note, shown):
    assert render._item(note) == shown


def test_code_of_markdown_ends_where_it_ends():
    assert render._fence("a ```` b") == "`````" and render._fence("a") == "```"


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "＝"])
def test_cells_of_csv_are_no_formulas_and_numbers_stay(start):
    done = judged()
    done.lines[0].row, done.lines[0].ours.deviations = f"{start}1+1", [f'{start}HYPERLINK("http://evil")']
    done.lines[0].published, done.lines[0].ours.mean = -3.5, -1.25
    row = next(csv.DictReader(io.StringIO(render.render(done, "csv"), newline="")))
    shown = printable(start)
    assert row["row"] == f"'{shown}1+1" and row["deviations"].startswith(f"'{shown}HYPERLINK")
    assert (float(row["published"]), float(row["ours"]), float(row["difference"])) == (-3.5, -1.25, 2.25)
    assert render._inert("-3.5e2") == "-3.5e2" and render._inert("-3.5x") == "'-3.5x"


def test_control_characters_are_nothing_in_latex():
    assert latex.escape("a\x1b[31m\x00b") == "a?[31m?b"


def test_a_note_of_two_lines_is_one():
    done = judged()
    done.footnotes[0] = "a\npublished: theirs\x1b[31m"
    assert r"[1] not comparable: a\npublished: theirs\x1b[31m" in render.render(done, "text")
