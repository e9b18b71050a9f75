"""What is written: our own regular files, with the mode that they had or the umask says, whole or as they were."""

import itertools
import json
import multiprocessing
import os
import resource
import signal
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import error_line
from ranks import LIBRARIES
from strangers import NOBODY, as_root

from moco_eval.errors import InputError, RunFailed
from moco_eval.runtime import files

KINDS = {"pipe": "a named pipe", "socket": "a socket", "folder": "a folder", "device": "a device"}


@pytest.fixture(params=KINDS)
def other_kind(request, tmp_path, monkeypatch) -> tuple[Path, str]:
    """Something that is no regular file, and what it is called."""
    path = tmp_path / request.param
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "socket":
        monkeypatch.chdir(tmp_path)  # its whole path may be too long
        socket.socket(socket.AF_UNIX).bind(path.name)
    elif request.param == "folder":
        path.mkdir()
    else:
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("only root can make a device")
    return path, KINDS[request.param]


def test_what_is_no_regular_file_is_never_replaced(other_kind, tmp_path):
    path, kind = other_kind
    before = path.lstat()
    (tmp_path / "link").symlink_to(path)
    for write in (
        lambda: files.write_text(path, "text"),
        lambda: files.output_file(path),
        lambda: files.output_file(tmp_path / "link"),
    ):
        with pytest.raises(InputError, match=f"cannot write .*: it is {kind}; choose another --output"):
            write()
    with pytest.raises(RunFailed, match="cannot write"):
        files.append_line(path, {})
    assert os.path.samestat(path.lstat(), before) and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("command", ["report", "convert", "fetch"])
def test_commands_refuse_it_too(command, tmp_path, capfd, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    arguments = {
        "report": ["report", tmp_path, "--output", tmp_path / "pipe"],
        "convert": ["convert", "random:resnet18", tmp_path / "pipe", "--to", "safetensors", "--force"],
        "fetch": ["fetch", "moco_v2_800ep", "--output", tmp_path / "pipe"],
    }[command]
    assert "pipe: it is a named pipe; choose another --output" in error_line(capfd, monkeypatch, *arguments)


def test_links(tmp_path):
    (tmp_path / "file").write_text("before")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nothing")
    files.write_text(files.output_file(tmp_path / "link"), "through")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "through"
    with pytest.raises(InputError, match="it is a link to nothing"):
        files.output_file(tmp_path / "dangling")
    with pytest.raises(RunFailed, match="cannot write"):
        files.append_line(tmp_path / "link", {})
    files.write_text(tmp_path / "link", "instead")  # inside a run directory: a link may be a stranger's
    assert not (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "through"


@as_root
def test_a_link_of_another_user_is_not_followed(tmp_path):
    (tmp_path / "file").write_text("before")
    (tmp_path / "link").symlink_to("file")
    os.lchown(tmp_path / "link", NOBODY, NOBODY)
    with pytest.raises(InputError, match="it is a link of another user"):
        files.output_file(tmp_path / "link")


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def test_a_file_keeps_its_mode_and_a_new_one_has_the_umasks(tmp_path):
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    (tmp_path / "secret").write_text("before")
    (tmp_path / "secret").chmod(0o600)
    (tmp_path / "shared").write_text("before")
    (tmp_path / "shared").chmod(0o664)
    with umask(0o027):
        for name, expected in (("secret", 0o600), ("shared", 0o664), ("new", 0o640)):
            with files.atomic(tmp_path / name) as temporary:
                assert mode(temporary) == expected & ~0o027
                temporary.write_text("after")
            assert mode(tmp_path / name) == expected and (tmp_path / name).read_text() == "after"


@contextmanager
def full_disk(size: int = 1000) -> Iterator[None]:
    """No file may become larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITERS = {
    "text": lambda path: path.write_text("x" * 5000),
    "npz": lambda path: np.savez(path, rows=np.ones(5000)),
    "npy": lambda path: np.save(path, np.ones(5000)),
    "pth": lambda path: torch.save({"rows": torch.ones(5000)}, path),
}


@pytest.mark.parametrize("ending", WRITERS)
def test_a_full_disk_leaves_what_was_there(ending, tmp_path):
    path = tmp_path / f"file.{ending}"
    path.write_text("before")
    refused = pytest.raises(RunFailed, match=r"cannot write .*he old file is unchanged")
    with full_disk(), refused, files.atomic(path) as temporary:
        WRITERS[ending](temporary)
    assert path.read_text() == "before" and [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(("to", "ending"), [("safetensors", "safetensors"), ("torchvision", "pth"), ("timm", "pth")])
def test_convert_on_a_full_disk_ends_in_one_line(to, ending, tmp_path, capfd, monkeypatch):
    from torchvision.models import resnet18

    name = f"copy.{ending}"
    torch.save(resnet18().state_dict(), tmp_path / "resnet18.pth")
    (tmp_path / name).write_text("before")
    with full_disk(100_000):
        command = ["convert", tmp_path / "resnet18.pth", tmp_path / name, "--to", to, "--force"]
        line = error_line(capfd, monkeypatch, *command, code=1)
    assert f"cannot write {tmp_path / name}" in line and (tmp_path / name).read_text() == "before"


# Killed, or failing, between any two renames

KNN = ["knn", "pixels", "--dataset", "digits", "--protocol", "digits"]
PRETRAIN = ["pretrain", "digits", "--dataset", "digits", "--set=arch=resnet18_quarter", "--set=views.size=32"]
PRETRAIN += ["--set=workers=0", "--set=queue_size=480", "--set=knn=null", "--set=schedule.epochs=2", "--batch-size=240"]
COMMANDS = {"a result": KNN, "a checkpoint": PRETRAIN}
CLOCKS = {"images_per_second", "data_wait"}


def _command(arguments: list[str], errors: Path, number: int, how: str, count) -> None:
    """A whole command, killed at its `number`-th rename, before or after that, or refused it."""
    sys.stderr = errors.open("w")
    from moco_eval.cli.main import main

    rename = os.replace

    def replace(source, target, **more):
        count.value += 1
        if count.value == number and how == "fails":
            raise OSError(28, "No space left on device")
        if count.value == number and how == "killed before":
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target, **more)
        if count.value == number and how == "killed after":
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace
    torch.set_num_threads(1)
    sys.argv = ["moco-eval", *arguments]
    main()


def run(arguments: list, errors: Path, number: int = 0, how: str = "") -> tuple[int, int, list[str]]:
    """The exit code of a command, minus a signal's number; how often it renamed a file; and its lines of errors."""
    multiprocessing.set_forkserver_preload(LIBRARIES)
    context = multiprocessing.get_context("forkserver")
    count = context.Value("i", 0)
    process = context.Process(target=_command, args=([*map(str, arguments)], errors, number, how, count))
    process.start()
    process.join(120)
    text = errors.read_text()
    assert "Traceback" not in text, text
    return process.exitcode, count.value, [line for line in text.splitlines() if line.startswith("Error:")]


def end_of(output: Path) -> object:
    """What a run came to."""
    if (output / "result.json").is_file():
        return json.loads((output / "result.json").read_text())["metrics"]
    state = torch.load(output / "checkpoints" / "last.pth", weights_only=True)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    weights = {name: tensor.double().sum().item() for name, tensor in state["state_dict"].items()}
    return state["step"], weights, [{key: line[key] for key in line.keys() - CLOCKS} for line in lines]


def command(kind: str, output: Path) -> list:
    cache = ["--cache", output.with_suffix(".cache")] if kind == "a result" else []
    return [*COMMANDS[kind], "--output", output, *cache]


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMMANDS)
@pytest.mark.parametrize("how", ["killed before", "killed after", "fails"])
def test_nothing_is_lost_between_any_two_renames(kind, how, tmp_path):
    errors = tmp_path / "errors"
    assert run(command(kind, tmp_path / "whole"), errors)[0] == 0
    expected = end_of(tmp_path / "whole")
    for number in itertools.count(1):
        again = command(kind, tmp_path / str(number))
        code, renames, lines = run(again, errors, number, how)
        if renames < number:
            break
        if how == "fails":
            (line,) = lines
            assert code == 1 and line.startswith("Error: cannot write"), line
        else:
            assert code == -signal.SIGKILL
        assert run(again, errors)[::2] == (0, [])
        assert end_of(tmp_path / str(number)) == expected
    assert code == 0 and number > 3


def test_a_lock_file_is_no_link_and_no_pipe_that_is_waited_for(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        files.lock_file(tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")
    with files.lock_file(tmp_path / "pipe"), files.lock_file(tmp_path / "new"):
        assert not (tmp_path / "elsewhere").exists() and (tmp_path / "new").is_file()
