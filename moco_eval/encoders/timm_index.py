"""Which of timm's networks have these tensors? An index over the names and shapes of them all, made by a tool.

`timm_index.txt` has one row for each network: a digest without what depends on the image size, one with it, one of its
modules alone, a number that tells networks apart that share the second and compute differently (padding, epsilon,
activation, windows), and the name.
`tools/index_timm.py` writes it from the installed timm.
"""

import difflib
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

# Tensors that timm's networks have with a classifier and lose without, all of them and nothing else
HEADS = re.compile(
    r"(head|fc|classifier|last_linear|classif|aux_head|head_dist|heads(_dist)?\.\d)\.(weight|bias)"
    r"|head\.(fc|fc2|l|linear|proj|classifier|head_dist\.l|head\.l|[01])\.(weight|bias)"
    r"|head\.fc\.(fc1|fc2|norm)\.(weight|bias)"
    r"|head\.classifier\.(4|linear)\.(weight|bias)"
    r"|head_dist\.linear\.(weight|bias)"
    r"|(head|head_dist|head\.head|head\.head_dist)\.bn\.(weight|bias|running_mean|running_var|num_batches_tracked)"
)
# Parameters whose shape follows the image's size, and buffers that are computed from it
_SIZED = re.compile(r"(^|\.)(\w*pos_embed\w*|relative_position_bias_table|rel_pos_[hw]|attention_biases)$")
_COMPUTED = re.compile(r"(^|\.)(relative_position_index|attn_mask|relative_coords_table|num_batches_tracked)$")
# Where the first convolution of timm's networks is
STEM = re.compile(
    r"(encoder\.)?(patch_embeds?\d?|embeds|pixel_embed)\.|(conv_?)?stem\.|conv_?[01]\.|conv2d_1a|base_layer|layer0\.|body\."
    r"|features\.(0|conv)",
    re.IGNORECASE,
)
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Row:
    """One network of the index.

    Attributes:
        loose, exact: digests of its tensors without and with the shapes that depend on the image size.
        modules: of its modules' names and the first convolution, which one wrong tensor leaves as they are.
        kind: networks of one exact digest and one kind compute the same.
        name: timm's.
    """

    loose: str
    exact: str
    modules: str
    kind: int
    name: str


@cache
def rows() -> tuple[Row, ...]:
    """The whole index."""
    lines = (files("moco_eval.encoders") / "timm_index.txt").read_text().splitlines()
    fields = (line.split() for line in lines if line and not line.startswith("#"))
    return tuple(Row(loose, exact, modules, int(kind), name) for loose, exact, modules, kind, name in fields)


def names() -> list[str]:
    """Every network that the index holds."""
    return [row.name for row in rows()]


def near(name: str) -> str:
    """' Did you mean ...?' with up to three networks, or where to find them all; for the end of an error message."""
    close = difflib.get_close_matches(name, names(), 3, 0.6)
    if not close:
        close = [known for known in names() if name and known.startswith(name)][:3]
    return f" Did you mean {' or '.join(close)}?" if close else " timm.list_models() lists all that there are."


def digests(shapes: Shapes) -> tuple[str, str, str]:
    """Of a backbone's names and shapes, the classifier left out: `loose`, `exact` and `modules` of a row."""
    loose, exact, modules = [], [], {f"{shapes.get(stem(shapes) or '')}"}
    for name, shape in sorted(shapes.items()):
        if HEADS.fullmatch(name) or _COMPUTED.search(name):
            continue
        exact.append(f"{name} {'x'.join(map(str, shape))}")
        loose.append(name if _SIZED.search(name) else exact[-1])
        modules.add(name.rpartition(".")[0])
    return _digest(loose), _digest(exact), _digest(sorted(modules))


def stem(shapes: Shapes) -> str | None:
    """The name of the first convolution, whatever the order of the tensors; None where none is known."""
    convolutions = [name for name in shapes if len(shapes[name]) == 4 and STEM.match(name) and name.endswith(".weight")]
    return min(convolutions, default=None)


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]


def candidates(shapes: Shapes, prefer: str | None = None) -> list[str]:
    """timm's networks with these tensors, one of each kind that computes otherwise; none where timm has none.

    Those for the very image size of the tensors come alone where there are any.

    Args:
        shapes: of a backbone, under timm's names.
        prefer: regular expression on their names: the ones that the tensors' code base has, where there are such.
    """
    loose, exact, _ = digests(shapes)
    alike = [row for row in rows() if row.exact == exact] or [row for row in rows() if row.loose == loose]
    return _of_each_kind(alike, prefer)


def nearest(shapes: Shapes, prefer: str | None = None) -> list[str]:
    """Those with the same modules and first convolution, whatever single tensors say; perhaps but for one module."""
    parts = {name.partition(".")[0] for name in shapes}
    for part in (None, *sorted(parts)):
        rest = {name: shape for name, shape in shapes.items() if name.partition(".")[0] != part}
        modules = digests(rest)[2]
        if alike := [row for row in rows() if row.modules == modules]:
            return _of_each_kind(alike, prefer)
    return []


def _of_each_kind(alike: list[Row], prefer: str | None) -> list[str]:
    preferred = [row for row in alike if prefer and re.search(prefer, row.name)] or alike
    kinds: dict[tuple[str, int], str] = {}
    for row in sorted(preferred, key=lambda row: (len(row.name), row.name)):
        kinds.setdefault((row.exact, row.kind), row.name)
    return list(kinds.values())
