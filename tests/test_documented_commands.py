"""Every command that README.md, CONTRIBUTING.md and docs/ show.

As written, each is parsed, and planned (`--dry-run`) where it has a plan. At reduced size, each is run (slow): the
commands of one code block in order, in one folder, on data made here. A command without a known reduction fails by its
name.
"""

import itertools
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from band_images import draw_set
from checkpoints import mlp, moco
from commands import ROOT, environment, in_process, moco_eval
from documented import PAGES, RECORDS, Command, blocks, commands
from PIL import Image

from moco_eval.cli.main import cli
from moco_eval.data import catalogue, in_memory
from moco_eval.data.boxes import coco, scenes, voc
from moco_eval.data.image_set import ImageSet
from moco_eval.data.in_memory import CIFAR10_FILES
from moco_eval.data.masks.scenes import write_mask_scenes
from moco_eval.papers import cost


def launched(command: Command) -> Command:
    """What srun starts; SLURM's own options are SLURM's."""
    if command.program != "srun":
        return command
    return command._replace(words=command.words[command.words.index("moco-eval") :])


COMMANDS = [launched(one) for one in commands()]
SHOWN = [one for one in COMMANDS if one.page != RECORDS]
ON_CPU = "--device cpu --workers 0 --nproc 1"
CLASSES = "--dataset imagefolder"  # ImageNet's layout with three classes
PRETRAIN = (
    f"{ON_CPU} --set arch=resnet18_quarter --set bn_groups=2 --set queue_size=16 --batch-size 4 "
    "--set schedule.epochs=1 --set views.size=32 --set knn.k=2"
)
DIGITS = f"{ON_CPU} --set views.size=32 --set schedule.epochs=1 --set knn.every=1"
ITERATIONS = "--set schedule.iterations=2 --set schedule.steps=[1] --set precise_bn=1"
SCENES = f"{ON_CPU} --set batch_size=2 {ITERATIONS} --set scenes.train=8 --set scenes.test=4"
DETECT = (
    f"{ON_CPU} --set batch_size=2 --batch-size 2 {ITERATIONS} --set input.min_size_train=[64] "
    "--set input.min_size_test=64 --set rpn.pre_nms_train=50 --set rpn.post_nms_train=20 --set rpn.pre_nms_test=50 "
    "--set rpn.post_nms_test=10 --set roi.batch_per_image=8"
)
SEGMENT = (
    f"{ON_CPU} --set batch_size=2 --batch-size 2 --set schedule.iterations=2 --set schedule.steps=[] "
    "--set schedule.warmup=0 --set views.crop=64 --set views.fit=[128,64] --set test.fit=[128,64] "
    "--set test.window=64 --set test.stride=64"
)
# What is appended to a command that holds these words: of an option, and of a key of --set, the last value counts.
# The first that fits is taken.
REDUCED: list[tuple[str, str]] = [
    ("pretrain digits --profile", f"{PRETRAIN} --profile 2"),
    ("pretrain digits", DIGITS),
    ("pretrain cifar10", f"{PRETRAIN} --set arch=resnet18_quarter_cifar"),
    ("pretrain moco_v2_r50 --profile", f"{CLASSES} {PRETRAIN} --set schedule.epochs=2 --profile 2"),
    ("pretrain moco_v2_r50", f"{CLASSES} {PRETRAIN}"),
    ("knn --dataset", f"{ON_CPU} --set k=2"),
    ("knn", f"{CLASSES} {ON_CPU} --set k=2"),
    ("linear digits --trials", f"{ON_CPU} --set schedule.epochs=1 --trials 2"),
    ("linear digits", f"{ON_CPU} --set schedule.epochs=1"),
    ("linear", f"{CLASSES} {ON_CPU} --set schedule.epochs=1"),
    ("finetune", f"{CLASSES} {ON_CPU} --set schedule.epochs=1 --set batch_size=4"),
    ("svm", f"{ON_CPU} --protocol digits"),
    ("suite digits", f"{ON_CPU} --tasks knn,quick"),
    ("suite imagefolder", f"{ON_CPU} --tasks quick"),  # kNN's 200 neighbours want more images
    ("suite", f"{CLASSES} {ON_CPU} --tasks quick,logistic"),
    ("watch", f"{ON_CPU} --tasks quick --every 0.3"),
    ("detect digits", SCENES),
    ("detect coco", f"{DETECT} --trials 1"),
    ("detect --trials", f"{DETECT} --trials 2"),
    ("detect", DETECT),
    ("segment digits", f"{SEGMENT} --set scenes.train=4 --set scenes.test=2"),
    ("segment --trials", f"{SEGMENT} --trials 2"),
    ("segment", SEGMENT),
    ("reproduce", "--dry-run"),  # tests/papers/test_reproduce.py runs whole chains
    *((name, "") for name in ("inspect", "convert", "table", "report", "compare", "fetch --list")),
    *((name, "") for name in ("configs", "datasets", "doctor", "results")),
]
# What is not run, and why. No other command is left out.
NOT_RUN = {
    "make": "each target is a test suite, an installation or the demo, which tests/test_demo.py runs",
    "pip": "fetches several GB",
    "git": "clones this repository",
    "sbatch": "wants SLURM; tests/pretraining/test_resume.py runs the script with stand-ins",
}


def has(command: Command, words: str) -> bool:
    first, *others = words.split()
    return first in command.words[:2] and all(word in command.words for word in others)


def reduction(command: Command) -> list[str]:
    """What makes it small; fails by the command's name where nobody has said."""
    for words, more in REDUCED:
        if has(command, words):
            return more.split()
    return pytest.fail(f"no reduced form for {command}: add one to REDUCED, or a reason to NOT_RUN")


# As written


def parsed(words: tuple[str, ...]) -> click.Context:
    """The command line of `moco-eval WORDS` as click takes it, nothing run. Raises click.UsageError."""
    name, *rest = words
    if name not in cli.commands:
        raise click.UsageError(f"no command {name}")
    return cli.commands[name].make_context(name, rest)


def options_of(name: str) -> set[str]:
    """Of a command; of one that there is not, none."""
    return {one for parameter in cli.commands[name].params for one in parameter.opts} if name in cli.commands else set()


def is_complete(command: Command) -> bool:
    """Not a form such as `moco-eval table ID`, and not, in prose, the name of a command alone."""
    bare = command.program == "moco-eval" and len(command.words) == 2
    if command.is_synopsis or (not command.block and (bare or command.has_placeholder)):
        return False
    if command.program != "moco-eval":
        return True
    try:
        parsed(command.words[1:])
    except click.UsageError:
        return bool(command.block)
    except click.exceptions.Exit:
        return False  # --help
    return True


OURS = [one for one in COMMANDS if one.program == "moco-eval"]
TO_RUN = [one for one in SHOWN if one.program not in NOT_RUN and is_complete(one)]
BLOCKS = sorted({(one.page, one.block) for one in TO_RUN if one.block})
IN_PROSE = sorted({one.words for one in TO_RUN if not one.block})


@pytest.mark.parametrize("command", OURS, ids=str)
def test_every_command_parses_as_written(command):
    if is_complete(command):
        parsed(command.words[1:])
        return
    name, *rest = [word.strip("[]") for word in command.words[1:]]
    if name == "--help":
        return
    assert name in cli.commands, f"no command {name}: {command}"
    unknown = {word.partition("=")[0] for word in rest if word.startswith("--")} - options_of(name) - {"--help"}
    assert not unknown, f"{command} has no {unknown}"


WITH_PLAN = [
    one for one in TO_RUN if one.block and one.program == "moco-eval" and "--dry-run" in options_of(one.words[1])
]


@pytest.mark.parametrize("command", [one for one in WITH_PLAN if one.words[1] != "suite"], ids=str)
@pytest.mark.slow
def test_every_command_plans_as_written(command, place, made, capfd, monkeypatch):
    """Nothing but the reader's folders is replaced: ImageNet has its 1,000 classes, eight processes are eight.

    `suite` is not among them: it tries for a while how long things take, and runs below.
    """
    Path("mine").unlink()
    Path("mine").symlink_to(made / "whole" / "imagenet")
    Path("fields").unlink()
    Path("fields").symlink_to(made / "whole" / "fields")
    words = unlogged([here(word, made, "whole") for word in command.words[1:]])
    bring([word for word in words if not word.startswith("runs")], made)
    words = ["CHECKPOINT" if word.startswith("runs/") and word.endswith(".pth") else word for word in words]
    out, _ = in_process(capfd, monkeypatch, *words, "--dry-run")
    assert "output" in out and not list(place.glob("runs/*/result.json"))


def test_torchrun_takes_its_options():
    from torch.distributed.run import get_args_parser

    for command in [one for one in SHOWN if one.program == "torchrun" and not one.is_synopsis]:
        launcher, ours = halves(command)
        get_args_parser().parse_args([*launcher, "-m", "moco_eval"])
        parsed(ours.words[1:])


def test_sbatch_scripts_are_sound_and_take_their_arguments():
    shown = [one for one in SHOWN if one.program == "sbatch"]
    assert shown
    for command in shown:
        at = next(index for index, word in enumerate(command.words) if word.endswith(".sbatch"))
        script, words = command.words[at], command.words[at + 1 :]
        subprocess.run(["bash", "-n", ROOT / script], check=True)
        launched = re.search(r"-m moco_eval (\w+) \"\$@\"", (ROOT / script).read_text())
        assert launched, f"{script} launches no moco_eval"
        parsed((launched[1], *words))


def test_make_targets_exist():
    targets = {word for one in COMMANDS if one.program == "make" for word in one.words[1:]}
    text = (ROOT / "Makefile").read_text()
    assert "demo" in targets
    for target in targets:
        assert re.search(rf"(?m)^{target}:", text), f"the Makefile has no {target}"
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_pip_installs_what_there_is():
    extras = (ROOT / "setup.py").read_text()
    for command in [one for one in SHOWN if one.program == "pip"]:
        assert command.words[1] == "install"
        for extra in re.findall(r"\[([\w,]+)\]", " ".join(command.words)):
            assert all(f'"{name}"' in extras for name in extra.split(",")), command


TOOLS = [one for one in COMMANDS if one.program in ("python", "python3")]


@pytest.mark.parametrize("command", TOOLS, ids=str)
def test_tools_exist_with_the_options_shown(command):
    """Their --help is slow to print, as it imports torch; the options stand in the source."""
    source = (ROOT / command.words[1]).read_text(encoding="utf-8")
    for word in command.words[2:]:
        option = word.strip("[]").partition("=")[0]
        assert not option.startswith("--") or f'"{option}"' in source, f"{command.words[1]} has no {option}"


@pytest.mark.slow
@pytest.mark.parametrize("tool", sorted({one.words[1] for one in TOOLS}))
def test_tools_explain_themselves(tool):
    done = subprocess.run([sys.executable, ROOT / tool, "--help"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout.lower(), done.stderr


def test_what_a_command_reads_was_written_before():
    """On the same page, or by README's walk on the digits; runs/A and runs/B are the reader's."""
    written = {"README.md": {"runs/A", "runs/B"}}
    for command in [one for one in TO_RUN if one.block and one.program in ("moco-eval", "torchrun")]:
        words = command.words if command.program == "moco-eval" else halves(command)[1].words
        there = written.setdefault(command.page, {*written["README.md"]})
        given = parsed(words[1:]).params
        place = given.get("output") or Path("runs") / f"pretrain-{given.get('config')}-{given.get('dataset')}"
        read = {"/".join(word.split("/")[:2]) for word in words if word.startswith("runs/")} - {str(place)}
        assert read <= there, f"{command} reads {read - there}, which nothing wrote"
        there.add(str(place))


def test_nothing_is_left_out():
    """Every command is run, or is a form to fill in, or has a reason."""
    rest = [one for one in SHOWN if one not in TO_RUN]
    forms = [one for one in rest if one.program not in NOT_RUN]
    assert not [one for one in forms if one.block], "a block holds commands, not forms"
    assert {one.program for one in rest} - {one.program for one in forms} == set(NOT_RUN)
    assert {(one.page, one.block) for one in TO_RUN if one.block} == set(BLOCKS)
    for command in TO_RUN:
        if command.program in ("moco-eval", "torchrun"):
            reduction(halves(command)[1] if command.program == "torchrun" else command)


# At reduced size


@pytest.fixture(scope="module", autouse=True)
def few():
    """The built-in digits cut short, and official splits as small as those made here."""
    with pytest.MonkeyPatch.context() as patch:
        whole, lengths = in_memory.digits, {"train": 220, "test": 40}
        patch.setattr(in_memory, "digits", lambda split: first(whole(split), lengths[split]))
        patch.setattr(voc, "OFFICIAL", {("2007", "trainval"): 16, ("2012", "trainval"): 16, ("2007", "test"): 8})
        patch.setattr(coco, "OFFICIAL", {"train2017": 16, "val2017": 8})
        patch.setattr(cost, "seconds_per_image", lambda *_: 0.01)  # which times full-size networks
        yield


def first(whole: ImageSet, count: int) -> ImageSet:
    return replace(whole, pixels=whole.pixels[:count], labels=whole.labels[:count])


@pytest.fixture(scope="module")
def made(few, tmp_path_factory) -> Path:
    """What the pages take as given: data sets, CHECKPOINT, and runs of earlier blocks."""
    root = tmp_path_factory.mktemp("made")
    image_folder(root / "datasets" / "imagenet", classes=3, train=4, test=2)
    image_folder(root / "whole" / "imagenet", classes=1000, train=1, test=1)
    cifar10(root / "datasets" / "cifar-10-batches-py", images=4)
    cifar10(root / "whole" / "cifar-10-batches-py", images=110)
    boxes(root / "datasets")
    masks(root / "datasets")
    draw_set(root / "datasets" / "fields", 13, ".tif", train=8, test=4)
    catalogue.check("imagefolder", draw_set(root / "whole" / "fields", 13, ".npy", train=256, test=2), writes=True)
    for name in ("coco", "BCCD", "VOCdevkit", "camvid", "ADEChallengeData2016"):
        (root / "whole" / name).symlink_to(root / "datasets" / name)
    state = {"epoch": 800, "arch": "resnet18", "state_dict": moco(mlp), "optimizer": {}}  # as MoCo v2 was published
    torch.save(state, root / "CHECKPOINT")
    digits = f"pretrain digits --dataset digits --output runs/digits {DIGITS}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for line in (digits, *(knn_run(name) for name in "AB")):
            assert cli.main(shlex.split(line), standalone_mode=False) == 0
    return root


def knn_run(name: str) -> str:
    data = f"--dataset imagefolder --data datasets/imagenet --output runs/{name}"
    return f"knn CHECKPOINT {data} {ON_CPU} --set k={'AB'.index(name) + 1}"


def image_folder(root: Path, classes: int, train: int, test: int) -> None:
    """train/CLASS/*.jpg and val/CLASS/*.jpg of a shade for each class, and SimCLR's list of labels in small."""
    for split, count in (("train", train), ("val", test)):
        for name in range(classes):
            folder = root / split / f"n{name:08d}"
            folder.mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (24, 20), (20 * name % 256, 40 + 9 * number, 90))
                image.save(folder / f"{folder.name}_{number}.jpg")
    (root / "1percent.txt").write_text(
        "".join(f"n{name:08d}_{n}.jpg\n" for name in range(classes) for n in range(min(2, train)))
    )


def cifar10(root: Path, images: int) -> None:
    """So many images in each of the six files."""
    root.mkdir()
    random = np.random.default_rng(0)
    for name in (*CIFAR10_FILES["train"], *CIFAR10_FILES["test"]):
        rows = random.integers(0, 256, (images, 3072), dtype=np.uint8)
        (root / name).write_bytes(pickle.dumps({b"data": rows, b"labels": [row % 10 for row in range(images)]}))


def boxes(root: Path) -> None:
    """The digit scenes as COCO, as a VOC folder of their own classes, and as VOC07+12 with VOC's in turn."""
    drawn = scenes.write_scenes(root / "scenes", train=16, test=8)
    shutil.copytree(drawn / "coco", root / "coco")
    lists = drawn / "voc" / "ImageSets" / "Main"
    shutil.copy(lists / "train.txt", lists / "trainval.txt")
    shutil.copytree(drawn / "voc", root / "BCCD")
    names = itertools.cycle(voc.VOC_CLASSES)
    for year in ("VOC2007", "VOC2012"):
        shutil.copytree(drawn / "voc", root / "VOCdevkit" / year)
        for path in sorted((root / "VOCdevkit" / year / "Annotations").iterdir()):
            path.write_text(re.sub(r"<name>\d", lambda _: f"<name>{next(names)}", path.read_text()))


def masks(root: Path) -> None:
    """The digit scenes as a folder of masks and as ADE20K, and masks of the images of VOC2012."""
    drawn = write_mask_scenes(root / "camvid", train=6, test=3)
    (root / "camvid.txt").write_text("".join(f"class {number}\n" for number in range(11)))
    for split, name in (("train", "training"), ("test", "validation")):
        shutil.copytree(drawn / split, root / "ADEChallengeData2016" / "images" / name)
        shutil.copytree(drawn / f"{split}_masks", root / "ADEChallengeData2016" / "annotations" / name)
    voc2012 = root / "VOCdevkit" / "VOC2012"
    (voc2012 / "SegmentationClassAug").mkdir()
    (voc2012 / "ImageSets" / "Segmentation").mkdir()
    for split, name in (("train", "train_aug"), ("test", "val")):
        shutil.copy(voc2012 / "ImageSets" / "Main" / f"{split}.txt", voc2012 / f"ImageSets/Segmentation/{name}.txt")
    for path in (voc2012 / "JPEGImages").iterdir():
        Image.new("L", (128, 128), 1).save(voc2012 / "SegmentationClassAug" / f"{path.stem}.png")


def code_of(page: Path, wanted: str) -> list[str]:
    """The blocks of one language."""
    found = blocks(page.read_text(encoding="utf-8"))
    return ["\n".join(lines) for _, language, lines in found if language == wanted]


@pytest.fixture
def place(made, in_tmp) -> Path:
    """A folder to work in, with what stands for the reader's own."""
    for name in ("CHECKPOINT", "mine.pth"):
        Path(name).symlink_to(made / "CHECKPOINT")
    own = {
        "camvid.txt": "camvid.txt",
        "FOLDER": "imagenet",
        "mine": "imagenet",
        "BCCD": "BCCD",
        "boxes": "BCCD",
        "masks": "coco",
        "fields": "fields",
    }
    for name, target in own.items():
        Path(name).symlink_to(made / "datasets" / target)
    return in_tmp


def here(word: str, made: Path, sets: str = "datasets") -> str:
    """A word of a command, with the reader's folders and the zoo's checkpoints replaced by those made here."""
    return "CHECKPOINT" if word.startswith("zoo:") else re.sub(r"(^|=)/datasets\b", rf"\1{made / sets}", word)


def unlogged(words: list[str]) -> list[str]:
    """Without --log, whose packages few have; tests/results/test_loggers.py has it."""
    return [word for before, word in zip(["", *words], words) if "--log" not in (before, word)]


def bring(words: list[str], made: Path) -> None:
    """The runs of an earlier block that a command reads, and the table of one's own that its page shows."""
    if "mine.yaml" in words:
        (text,) = [text for page in PAGES for text in code_of(page, "yaml") if text.startswith("id: mine\n")]
        Path("mine.yaml").write_text(text)
        Path("FOLDER").unlink()
        Path("FOLDER").symlink_to(made / "whole" / "imagenet")  # enough images for a batch of its recipe
    for word in ["runs/A" if word == "runs" and not Path(word).exists() else word for word in words]:
        run = Path(*Path(word).parts[:2])
        if not word.startswith("runs/") or run.exists():
            continue
        if (made / run).exists():
            shutil.copytree(made / run, run)
        elif word.endswith(".pth"):
            Path(word).parent.mkdir(parents=True)
            Path(word).symlink_to(made / "CHECKPOINT")


def run(capfd, monkeypatch, command: Command, made: Path) -> None:
    """The command made small; it must end with exit code 0."""
    if command.program == "torchrun":
        return run_torchrun(command, made)
    sets = "whole" if command.words[1] in ("datasets", "reproduce") else "datasets"
    words, more = unlogged([here(word, made, sets) for word in command.words[1:]]), reduction(command)
    if words[0] != "pretrain":
        bring(words, made)
    elif not {"--output", "--profile"} & set(words):
        given = parsed(command.words[1:]).params
        more += ["--output", f"runs/pretrain-{given['config']}-{given['dataset']}"]  # the default, as written
    in_process(capfd, monkeypatch, *words, *more)
    return None


def run_torchrun(command: Command, made: Path) -> None:
    """On this machine alone, in two processes."""
    launcher, ours = halves(command)
    launcher += ["--nnodes", "1", "--nproc-per-node", "2", "--rdzv-endpoint", "localhost:0"]
    more = " ".join(reduction(ours)).replace("--nproc 1", "").split()  # torchrun takes it for its own
    words = [*(here(word, made) for word in ours.words[1:]), *more]
    done = [sys.executable, "-m", "torch.distributed.run", *launcher, "-m", "moco_eval", *words]
    subprocess.run(done, env=environment(), check=True, timeout=200)


def halves(command: Command) -> tuple[list[str], Command]:
    """What torchrun itself is given, and the command that it launches."""
    at = command.words.index("-m")
    assert command.words[at + 1] == "moco_eval", command
    return list(command.words[1:at]), command._replace(words=("moco-eval", *command.words[at + 2 :]))


@pytest.mark.slow
@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=str)
def test_every_block_runs(page, block, place, made, capfd, monkeypatch):
    for command in TO_RUN:
        if (command.page, command.block) == (page, block):
            run(capfd, monkeypatch, command, made)


@pytest.mark.slow
@pytest.mark.parametrize("words", IN_PROSE, ids=shlex.join)
def test_every_command_in_prose_runs(words, place, made, capfd, monkeypatch):
    run(capfd, monkeypatch, Command("prose", 0, None, words), made)


def test_the_python_of_the_pages_runs(place, made, capfd, monkeypatch):
    (own,), (features,) = (code_of(ROOT / "docs" / name, "python") for name in ("encoders.md", "suite.md"))
    Path("mine.pth").unlink()
    exec(compile(own, "docs/encoders.md", "exec"), {})
    out, _ = in_process(capfd, monkeypatch, "inspect", "mine.pth")
    assert "resnet18, 11.18 M parameters" in out and "mean 0.5, 0.5, 0.5, std 0.25" in out
    (folder, *_) = sorted(path.parent for path in (made / "runs" / "features").rglob("key.json"))
    exec(compile(features.replace("runs/features/0d8e...", str(folder)), "docs/suite.md", "exec"), {})


def test_the_formats_shown_are_read(tmp_path):
    """docs/datasets.md shows all that an XML and a COCO file must hold."""
    (xml,), (json,) = (code_of(ROOT / "docs" / "datasets.md", language) for language in ("xml", "json"))
    for name in ("JPEGImages", "Annotations", "ImageSets/Main", "train2017", "val2017", "annotations"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("001", "002"):
        for folder in ("JPEGImages", "train2017", "val2017"):
            Image.new("RGB", (80, 80), (9 * int(name), 90, 90)).save(tmp_path / folder / f"{name}.jpg")
        (tmp_path / "Annotations" / f"{name}.xml").write_text(xml)
    for name, split in (("001", "trainval"), ("002", "test")):
        (tmp_path / "ImageSets" / "Main" / f"{split}.txt").write_text(name)
    for split in ("train2017", "val2017"):
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json)
    for data in (voc.read_voc_folder(tmp_path, None, None), coco.read_coco_folder(tmp_path, None, None)):
        assert (data.classes, len(data.train), len(data.test)) == (("cat",), 1, 1)
        np.testing.assert_array_equal(data.train[0].boxes, [[10, 20, 60, 70]])


@pytest.mark.slow
def test_a_documented_command_runs_in_two_processes(place, made):
    """The others are made small by --nproc 1."""
    command = next(one for one in TO_RUN if has(one, "linear --nproc") and one.words[2].startswith("zoo:"))
    words = [here(word, made) for word in command.words[1:]]
    moco_eval(*words, *reduction(command), "--nproc", "2")
    assert list(Path("runs").glob("linear-*/result.json"))
