"""The path of a checkpoint: whether a file that can be one is there, and if not, which one may be meant."""

import os
import re
import stat
from pathlib import Path

from moco_eval.untrusted.pickle_scan import DAMAGED, Refused

SUFFIXES = (".pth", ".pth.tar", ".pt", ".th", ".safetensors", ".pkl")


def start_of(path: Path) -> tuple[bytes, os.stat_result]:
    """The first bytes of a file that is a checkpoint of its own, and its size and date."""
    start, about = opened(path)
    if path.suffix == ".distcp" or path.name == ".metadata":
        raise Refused(f"is a part of a folder. {_distributed(path.parent)}")
    if (shard := SHARD.search(path.name)) and int(shard[1]) > 1:
        raise Refused(f"is one of {int(shard[1])} shards of a checkpoint: give their index, {_index(path)}")
    return start, about


def opened(path: Path) -> tuple[bytes, os.stat_result]:
    """The first bytes of a file, and its size and date."""
    try:
        about = path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        if path.is_symlink():
            raise Refused(f"is a link to {path.readlink()}, which does not exist: mend the link") from None
        raise Refused(f"does not exist{_newest(path.parent, '; the newest there is ')}") from None
    if stat.S_ISDIR(about.st_mode):
        raise Refused(_folder(path))
    if not stat.S_ISREG(about.st_mode):
        raise Refused("is not a regular file: copy its contents to one")
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise Refused(f"is empty (0 bytes): {DAMAGED}")
    return start, about


SHARD = re.compile(r"-\d{5}-of-(\d{5})\.")


def _index(shard: Path) -> str:
    """The name of the index that a shard belongs to: the one beside it, or what Hugging Face would call it."""
    usual = f"{SHARD.sub('.', shard.name)}.index.json"
    beside = sorted(file.name for file in shard.parent.glob("*.index.json"))
    return usual if usual in beside or not beside else beside[0]


def _distributed(folder: Path) -> str:
    return (
        f"{folder} was written by torch.distributed.checkpoint: make one file of it with torch's own converter, "
        f"`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} OUT.pth` (dcp_to_torch_save)"
    )


def _folder(path: Path) -> str:
    inside = path / "checkpoints"
    if inside.is_dir():
        return f"is a run directory{_newest(inside, '; give its newest checkpoint: ', full=True)}"
    if (path / ".metadata").is_file() and any(path.glob("*.distcp")):
        return f"is a folder. {_distributed(path)}"
    if (path / "zero_to_fp32.py").is_file():
        return "is a folder of DeepSpeed's: make one file of it with its own zero_to_fp32.py, and give that"
    if index := next(iter(sorted(path.glob("*.index.json"))), None):
        return f"is a folder, not a checkpoint; its shards are listed in {index.name}: give that"
    if any((inner / "data.pkl").is_file() for inner in _folders(path)):
        return "is a folder that a checkpoint was unpacked into: pack it again (zip -0 -r model.pth FOLDER)"
    return f"is a folder, not a checkpoint{_newest(path, '; the newest there is ')}"


def _folders(path: Path) -> list[Path]:
    """It and the folders in it."""
    try:
        return [path, *(inner for inner in path.iterdir() if inner.is_dir())]
    except OSError:
        return [path]


def _newest(folder: Path, prefix: str, full: bool = False) -> str:
    """`prefix` and the newest checkpoint of a folder, or nothing."""
    try:
        files = [file for file in folder.iterdir() if file.name.endswith(SUFFIXES) and file.is_file()]
        newest = max(files, key=lambda file: (file.stat().st_mtime, file.name), default=None)
    except (OSError, ValueError):
        return ""
    return f"{prefix}{newest if full else newest.name}" if newest else ""
