"""CHECKPOINT as the user gives it, looked at without torch: a file that is there, or a name of a known kind."""

import re
from pathlib import Path

from moco_eval.errors import InputError
from moco_eval.untrusted.path import start_of
from moco_eval.untrusted.pickle_scan import Refused

KINDS = ("random", "torchvision", "timm", "zoo", "hf")
_ARCHITECTURE = re.compile(r"(wide_)?resne(x)?t\d+\w*|vit_\w+")
_PLAIN = re.compile(r"[\w-]+")  # neither a folder nor a suffix: perhaps a name


def require_source(source: str) -> None:
    """Raises InputError where CHECKPOINT is not `pixels`, not a name of a known kind, and not a file with contents."""
    kind, colon, name = source.partition(":")
    if source == "pixels" or (colon and kind in KINDS):
        if kind == "zoo":
            from moco_eval.encoders import zoo

            zoo.entry(name)
        if kind == "hf":
            from moco_eval.encoders import hub

            hub.parse(name)
        return
    path = Path(source)
    if not _PLAIN.fullmatch(source) or path.exists() or path.is_symlink():
        try:
            start_of(path)
        except Refused as error:
            raise InputError(f"{path} {error}") from None
        except OSError:
            return  # its reader says why
        return
    if _ARCHITECTURE.fullmatch(source):
        raise InputError(
            f"{source} does not exist; for the network itself take random:{source} (random weights) or "
            f"torchvision:{source} (trained on ImageNet's labels)"
        )
    raise InputError(
        f"{source} does not exist; CHECKPOINT is a file, or random:resnet50, torchvision:resnet50, timm:NAME, zoo:NAME "
        "(moco-eval fetch --list), hf:ORG/NAME, pixels"
    )
