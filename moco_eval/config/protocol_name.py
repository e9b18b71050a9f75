"""The name of a protocol: what kind of evaluation, which recipe, which version of it."""

import re
from dataclasses import dataclass

from moco_eval.errors import InputError

PATTERN = re.compile(r"([a-z0-9_]+)/([A-Za-z0-9_.-]+)@([1-9][0-9]*)")


@dataclass(frozen=True, order=True)
class ProtocolName:
    """`kind/name@version`, such as linear/moco-lincls@1; a change that moves numbers is a new version.

    Attributes:
        kind: the command that runs it, and the folder of its config: knn, linear, detect, ...
        name: of its shipped config, for classification.
    """

    kind: str
    name: str
    version: int

    @classmethod
    def parse(cls, text: str) -> "ProtocolName":
        """Raises InputError where the text has not the form of a protocol's name."""
        match = PATTERN.fullmatch(text)
        if match is None:
            raise InputError(f"{text!r} is not a protocol; the form is kind/name@version, such as knn/instdisc@1")
        return cls(match[1], match[2], int(match[3]))

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}@{self.version}"


def kind_and_name(text: str) -> tuple[str, str]:
    """Kind and name of a protocol as far as the text has them: what strangers wrote need not have the form.

    detect/voc-mine has them without a version; of a text without a slash all is the kind.
    """
    kind, _, rest = text.partition("/")
    return kind, rest.partition("@")[0]
