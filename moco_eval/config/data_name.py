"""What a data set is called: a published name, or for your own folder its layout and name: imagefolder:pets."""

import re
from pathlib import Path

from moco_eval.errors import InputError

OWN = ("imagefolder", "flat", "webdataset", "voc-folder", "coco-folder", "mask-folder", "hf")  # layouts of any data
LONGEST = 60  # letters of a name of one's own


def layout_of(name: str) -> str:
    """imagefolder of imagefolder:pets; a published name is its own."""
    layout, _, _ = name.partition(":")
    return layout if layout in OWN else name


def called(name: str, folder: Path | None) -> str:
    """The name in full: a layout of one's own is followed by the folder's name where nothing follows it yet."""
    if name not in OWN or folder is None:
        return name
    return f"{name}:{readable(folder.resolve().name) or 'data'}"


def with_name(dataset: str, own: str | None) -> str:
    """The data set called as --name says. Raises InputError for a published set, or a name without a letter."""
    if own is None:
        return dataset
    if dataset not in OWN and layout_of(dataset) != "hf":
        raise InputError(f"--name {own}: {dataset} has its name; --name is for a folder of your own ({', '.join(OWN)})")
    if not readable(own):
        raise InputError(f"--name {own!r} has no letter or digit; take a name such as my-birds")
    return f"{dataset},name={readable(own)}" if layout_of(dataset) == "hf" else f"{dataset}:{readable(own)}"


def readable(text: str) -> str:
    """What folders, tables and a terminal take as a name: letters, digits, . _ and -."""
    return re.sub(r"[^\w.-]+", "_", text).strip("._")[:LONGEST]


def is_called(name: str, wanted: str) -> bool:
    """Whether a set of that name is the wanted one; any of a layout where only the layout is wanted."""
    return wanted in (name, layout_of(name))


def agree(name: object, other: object) -> bool:
    """Whether two names may be of one set: they agree, but for what data of one's own are called.

    Records before this version had the layout alone. Fingerprints tell data apart.
    """
    return name == other or (isinstance(name, str) and isinstance(other, str) and layout_of(name) == layout_of(other))


def in_path(name: str, *fingerprints: str) -> str:
    """The name as a part of a run directory's; data of one's own end in digits of their fingerprint."""
    digits = [fingerprint[:6] for fingerprint in fingerprints] if layout_of(name) != name else []
    return "-".join([name.replace(":", "-"), *digits])
