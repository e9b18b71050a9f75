"""Known public checkpoints: what configs/zoo.yaml and the user's own manifest say of each."""

import difflib
import os
import re
import urllib.parse
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

from pydantic import Field, field_validator, model_validator

from moco_eval.config import load as configs
from moco_eval.config.base import Model
from moco_eval.errors import InputError

MB = 1_000_000
LARGEST = 16_000 * MB  # no known checkpoint comes near; a stream without end stops here
HEX_DIGITS = {"sha256": 64, "md5": 32}
LOOPBACK = ("127.0.0.1", "localhost")


class Checksum(Model):
    """A published checksum, or the prefix of it that was published; `source` where it is not the entry's."""

    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{6,64}$")
    md5: str | None = Field(None, pattern=r"^[0-9a-f]{6,32}$")
    source: str | None = None

    @model_validator(mode="after")
    def _one_algorithm(self):
        if (self.sha256 is None) == (self.md5 is None):
            raise ValueError("checksum holds one of sha256 and md5")
        return self

    @property
    def algorithm(self) -> str:
        return "md5" if self.sha256 is None else "sha256"

    @property
    def digest(self) -> str:
        return self.sha256 or self.md5 or ""

    @property
    def whole(self) -> bool:
        """Whether it is more than a prefix."""
        return len(self.digest) == HEX_DIGITS[self.algorithm]

    def __str__(self) -> str:
        return f"{self.algorithm} {self.digest}" if self.whole else f"{self.algorithm} starting with {self.digest}"


class Licence(Model):
    """The licence of the repository that publishes the file, or of its models where it names one for them."""

    name: str
    source: str | None = None


class PretrainingFacts(Model):
    """How it was trained, as far as its source says."""

    method: str
    arch: str
    dataset: str
    epochs: int | None = Field(None, gt=0)
    batch_size: int | None = Field(None, gt=0)


class Published(Model):
    """Numbers in percent. A protocol of ours (`linear/moco-lincls@1`) is named where theirs is the same."""

    protocol: str
    dataset: str
    metrics: dict[str, float] = Field(min_length=1)
    source: str | None = None


class Entry(Model):
    """A public checkpoint.

    Attributes:
        url: where the file is; https.
        layout: the row of LAYOUTS that it is expected to be recognised as.
        source: where the facts were read that name no source of their own.
        bytes: the published size.
    """

    url: str
    layout: str
    source: str
    recipe: PretrainingFacts
    checksum: Checksum | None = None
    bytes: int | None = Field(None, gt=0, le=LARGEST)
    licence: Licence | None = None
    published: tuple[Published, ...] = ()
    note: str = ""

    @field_validator("url")
    @classmethod
    def _nobody_can_change_it_on_the_way(cls, url: str) -> str:
        if not is_safe(url):
            raise ValueError("only https is fetched")
        return url

    @property
    def ending(self) -> str:
        """What its file name ends with, such as '.pth.tar'."""
        name = urllib.parse.unquote(PurePosixPath(urllib.parse.urlsplit(self.url).path).name)
        match = re.search(r"\.(pth\.tar|[A-Za-z]\w*)$", name)
        return match[0] if match else ""

    @property
    def top1(self) -> float | None:
        """The first published top-1 accuracy."""
        return next((result.metrics["top1"] for result in self.published if "top1" in result.metrics), None)


class Manifest(Model):
    entries: dict[str, Entry]

    @field_validator("entries")
    @classmethod
    def _names_are_file_names(cls, entries: dict[str, Entry]) -> dict[str, Entry]:
        for name in entries:
            if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
                raise ValueError(f"name {name!r} may hold only small letters, digits, _ and -")
        return entries


def is_safe(url: str) -> bool:
    """Whether it is https, or never leaves this machine."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK)


def entries() -> dict[str, Entry]:
    """The shipped entries and those of the manifest that MOCO_EVAL_ZOO names.

    Raises:
        InputError: the user's manifest does not validate, or has a shipped name.
    """
    known = _shipped()
    path = os.environ.get("MOCO_EVAL_ZOO")
    more = _read(Path(path)) if path else {}
    if both := known.keys() & more.keys():
        raise InputError(f"{path} has an entry {min(both)!r}, which is a shipped one; give it another name")
    return known | more


@cache
def _shipped() -> dict[str, Entry]:
    return _read(configs.folder() / "zoo.yaml")


def _read(path: Path) -> dict[str, Entry]:
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"MOCO_EVAL_ZOO={path} is not a YAML file; see docs/zoo.md for its format")
    return configs.load(str(path), "zoo", Manifest).entries


def entry(name: str) -> Entry:
    """An entry by name.

    Raises:
        InputError: unknown; the message names the closest.
    """
    known = entries()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        way_out = f"Did you mean {near[0]!r}?" if near else "`moco-eval fetch --list` names them."
        raise InputError(f"no checkpoint named {name!r} in the zoo. {way_out}")
    return known[name]


def lines() -> Iterator[str]:
    """A heading, then each entry on a line: name, method, architecture, licence, top-1; - where not published."""
    yield _line("NAME", "METHOD", "ARCHITECTURE", "LICENCE", "TOP-1")
    for name, checkpoint in entries().items():
        licence = checkpoint.licence.name if checkpoint.licence else "-"
        top1 = "-" if checkpoint.top1 is None else f"{checkpoint.top1:.1f}"
        yield _line(name, checkpoint.recipe.method, checkpoint.recipe.arch, licence, top1)


def _line(name: str, method: str, arch: str, licence: str, top1: str) -> str:
    return f"{name:<34} {method:<15} {arch:<18} {licence:<13} {top1:>5}"
