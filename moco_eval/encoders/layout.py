"""A row of `layouts.LAYOUTS`: how one code base names its tensors."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from moco_eval.encoders.pixel_choice import Doubt
from moco_eval.preprocessing import Preprocessing

IMAGENET = Preprocessing()
Rules = tuple[tuple[str, str | Callable], ...]  # (regular expression, replacement), applied in order


@dataclass(frozen=True)
class Layout:
    """How one code base names its tensors.

    Attributes:
        origin: the name users see.
        source: repository and files the layout was read from.
        marks: regular expressions, each of which must be found in some tensor name.
        unless: regular expressions, none of which may be found in any.
        format: value of the file's own `format` entry, where it has one.
        query, key: what precedes the backbone of the query and of the momentum encoder; None where there is none.
        usual: which of them the method's own evaluation takes.
        head, key_head: what precedes the projection head, a plain sequence of layers with ReLUs; None where it is
            absent or of another kind.
        names: to torchvision's names (timm's for other networks), applied to what follows the prefix.
        convert: the backbone's tensors under those names to the network's own, where values change too.
        prefer: of several architectures with the same tensors, a regular expression on the method's own.
        positions: how the method interpolates the positions of a transformer for the size that it evaluates at: offset
            and antialias of `vit_tensors.resampled`; None where it evaluates at the size of its training.
        dropped: (regular expression, part, reason) of further tensors that an evaluation does not use.
        variants: what the shapes do not tell of the architecture, as rules on its name.
        supplied: a tensor that `convert` adds where the file lacks it, and the warning that says so.
        preprocessing: what the weights expect; None where the file itself says.
        pixels: (regular expression on timm's name of the architecture, the same for it), where it depends on that.
        cifar: the same for a network with the CIFAR stem; None where nothing says.
        pixel_doubt: what nothing tells of a transformer's pixels.
        norm_eps: of the layer norms, where it is not timm's 1e-6.
        folded: batch norm's statistics are folded into its scale and shift, and 0 and 1 stand for them.
        settled: the code base leaves none of that open.
        refused: why such a file cannot be evaluated, where it cannot.
    """

    origin: str
    source: str
    marks: tuple[str, ...] = ()
    format: str | None = None
    query: str = ""
    key: str | None = None
    usual: str = "query"
    head: str | None = None
    key_head: str | None = None
    names: Rules = ()
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    supplied: tuple[str, str] | None = None
    prefer: str | None = None
    positions: tuple[float, bool] | None = None
    dropped: tuple[tuple[str, str, str], ...] = ()
    variants: Rules = ()
    preprocessing: Preprocessing | None = IMAGENET
    pixels: tuple[tuple[str, Preprocessing], ...] = ()
    cifar: Preprocessing | None = None
    pixel_doubt: Doubt | None = None
    norm_eps: float | None = None
    folded: bool = False
    settled: bool = False
    unless: tuple[str, ...] = ()
    refused: str | None = None

    def prefixes(self, encoder: str) -> tuple[str | None, str | None]:
        """Those of an encoder's backbone and projection head."""
        return (self.query, self.head) if encoder == "query" else (self.key, self.key_head)


def rename(name: str, rules: Rules) -> str:
    """A name after each rule in turn."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
