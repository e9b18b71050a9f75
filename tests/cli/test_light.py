"""Light commands stay light: what lists and what refuses answers without torch, and a wrong option is told first."""

import json
import subprocess
import sys

import pytest
from commands import environment, in_process

LISTS = ["--help", "knn --help", "datasets", "configs", "configs show pretrain/digits", "table --list", "fetch --list"]
LISTS += ["results ."]
REFUSED = {
    "linear x": "x does not exist; CHECKPOINT is a file, or random:resnet50",
    "linear random:resnet18 --dataset vocc": "'vocc'. Did you mean 'voc07'?",
    "linear random:resnet18 --dataset imagefolder --data nowhere": "--data nowhere does not exist",
    "linear x --set optimizer.lrr=3": "Did you mean 'optimizer.lr'?",
    "linear x --protocol moco-linclss": "Did you mean 'moco-lincls'?",
    "linear random:resnet18 --labels ten": "is not N-per-class",
    "knn nowhere.pth --dataset digits": "nowhere.pth does not exist",
    "knn zoo:moco_v2_800 --dataset digits": "Did you mean 'moco_v2_800ep'?",
    "knn random:resnet18 --pixels sise=3": "Did you mean 'size'?",
    "suite x --tasks nosuch": "'nosuch' does not work on extracted features",
    "features x --crops 2 --split test": "--crops are of training images",
    "inspect resnet50": "random:resnet50 (random weights) or torchvision:resnet50",
    "convert x y --to timm": "x does not exist",
    "pretrain digits": "pretrain needs --dataset",
    "pretrain digits --dataset digits --set nosuch=1": "unknown key 'nosuch'",
    "pretrain digits --dataset imagefolder --data nowhere": "--data nowhere does not exist",
    "detect x": "for example: moco-eval detect",
    "detect random:resnet50 --dataset vocc": "'vocc'. Did you mean 'voc'?",
    "detect x --dataset digits": "x does not exist",
    "segment x": "for example: moco-eval segment",
    "segment random:resnet50 --dataset voc-augg": "Did you mean 'voc-aug'?",
    "segment random:resnet50 --dataset digits --set modle=linear": "Did you mean 'model'?",
    "compare a b": "a is no folder",
    "results nowhere": "nowhere does not exist",
    "results . --html page.html": "holds no finished run",
    "configs show pretrain/cifar": "Did you mean 'pretrain/cifar10'?",
}

# Each command in turn in one process; for each its exit code, whether torch had come, and what it said
ALL_IN_ONE = """
import contextlib, io, json, sys
from moco_eval.cli.main import main
said = []
for line in json.load(sys.stdin):
    sys.argv = ["moco-eval", *line.split()]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    heavy = [name for name in ("torch", "sklearn", "timm", "matplotlib") if name in sys.modules]
    said.append([code, heavy, out.getvalue()])
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict:
    lines = [*LISTS, *REFUSED]
    done = subprocess.run(
        [sys.executable, "-c", ALL_IN_ONE],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        env=environment(),
        cwd=tmp_path_factory.mktemp("nothing"),
        check=True,
    )
    return dict(zip(lines, json.loads(done.stdout)))


@pytest.mark.parametrize("line", LISTS)
def test_a_list_needs_no_torch(line, said):
    code, heavy, _ = said[line]
    assert code == 0 and heavy == []


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_wrong_is_told_before_torch_is_imported(line, said):
    code, heavy, words = said[line]
    assert code == 2 and heavy == []
    assert REFUSED[line] in words, words


# what a network with random weights is not made of, each a part of a second or tens of MB
NOT_FOR_INSPECT = ("timm", "sklearn", "scipy", "matplotlib", "tensorboard", "pycocotools", "simplejpeg", "tifffile")
NOT_FOR_INSPECT += ("jinja2", "torch.utils.tensorboard", "moco_eval.data", "moco_eval.features", "moco_eval.detection")


def test_inspect_of_random_weights_imports_what_it_needs_alone(capfd, monkeypatch):
    """What comes with the modules themselves is in tests/test_imports.py; this is what they import when they run."""
    for name in NOT_FOR_INSPECT:
        monkeypatch.setitem(sys.modules, name, None)  # importing it is an ImportError now
    out, _ = in_process(capfd, monkeypatch, "inspect", "random:resnet18_quarter")
    assert "random initialisation" in out


def test_the_help_is_in_groups_and_cuts_nothing_off(said):
    _, _, text = said["--help"]
    assert all(title in text for title in ("Train:", "Judge an encoder:", "Encoders:", "Papers' tables:"))
    assert not any(line.endswith("...") for line in text.splitlines()[1:]) and "how to produce" in text


def test_every_command_shows_an_example():
    from click.testing import CliRunner

    from moco_eval.cli.main import cli

    for name in cli.commands:
        text = CliRunner().invoke(cli, [name, "--help"]).output
        assert f"Example: moco-eval {name}" in text, name


@pytest.mark.parametrize(
    ("line", "first"), [("datasets", "digits"), ("fetch --list", "moco_v1"), ("configs", "detect/")]
)
def test_lists_have_a_heading(line, first, said):
    rows = said[line][2].splitlines()
    assert rows[0].startswith("NAME") and rows[1].startswith(first)


def test_the_completion_of_the_shell_names_the_commands():
    given = {"_MOCO_EVAL_COMPLETE": "bash_complete", "COMP_WORDS": "moco-eval seg", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['moco-eval']; from moco_eval.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=environment() | given, capture_output=True, text=True)
    assert done.stdout.split() == ["plain,segment"]


def test_json_prints_the_record(in_tmp, capfd, monkeypatch):
    arguments = ["knn", "pixels", "--dataset", "digits", "--protocol", "digits", "--workers", "0", "--json"]
    out, _ = in_process(capfd, monkeypatch, *arguments, "--output", "run")
    assert json.loads(out) == json.loads((in_tmp / "run" / "result.json").read_text())
