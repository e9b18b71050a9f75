"""What --dataset hf:... says: hf:FOLDER, hf:FILE.parquet or hf:ORG/NAME, then :CONFIG and ,KEY=VALUE where needed."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from moco_eval.config.data_name import readable
from moco_eval.config.load import did_you_mean
from moco_eval.errors import InputError

KEYS = ("image", "label", "train", "test", "name")
_CHOICE = re.compile(r",(\w+)=([^,]*)$")
_OF_THE_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class HfName:
    """A data set of Hugging Face's library.

    Attributes:
        place: a folder, a parquet file, or ORG/NAME on the hub.
        config: which of several that it has.
        image, label: columns, where their types leave it open.
        train, test: splits, where their names leave it open.
        name: what to call it.
    """

    place: str
    config: str | None = None
    image: str | None = None
    label: str | None = None
    train: str | None = None
    test: str | None = None
    name: str | None = None

    @property
    def path(self) -> Path:
        return Path(self.place).expanduser()

    @property
    def is_local(self) -> bool:
        return self.path.exists() or not _OF_THE_HUB.fullmatch(self.place)

    @property
    def called(self) -> str:
        """hf: and a name without the folder's place: hf:pets, hf:uoft-cs_cifar100-coarse_label."""
        if self.name:
            return f"hf:{readable(self.name) or 'data'}"
        own = self.path.resolve().name.removesuffix(".parquet") if self.is_local else self.place
        return f"hf:{readable('-'.join(filter(None, (own, self.config, self.label)))) or 'data'}"

    def with_choice(self, **choices: str) -> str:
        """How to write it with this choice, for a message."""
        chosen = replace(self, **choices)
        given = (f",{key}={value}" for key in KEYS if (value := getattr(chosen, key)))
        return "".join([f"hf:{self.place}", f":{self.config}" if self.config else "", *given])


def parse(text: str) -> HfName:
    """The data set that --dataset says.

    Raises:
        InputError: no place, an unknown key, a key twice or without a value.
    """
    rest, choices = text.removeprefix("hf").removeprefix(":"), dict[str, str]()
    while not Path(rest).exists() and (match := _CHOICE.search(rest)):
        rest, (key, value) = rest[: match.start()], match.groups()
        if key not in KEYS:
            raise InputError(f"--dataset {text}: no key {key!r}.{did_you_mean(key, KEYS)}")
        if key in choices or not value:
            raise InputError(f"--dataset {text}: {key} needs one value, such as ,{key}=NAME")
        choices[key] = value
    if not rest:
        raise InputError(
            "--dataset hf needs a place behind it: hf:FOLDER, hf:FILE.parquet or hf:ORG/NAME, such as hf:my_images"
        )
    place, _, config = (rest, "", "") if Path(rest).expanduser().exists() or ":" not in rest else rest.rpartition(":")
    return HfName(place, config or None, **choices)
