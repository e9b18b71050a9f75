"""Heads, losses and memories of one's own beside a backbone: left out by name, where a known row has no place for them.

A part that no word tells is not left out: it may belong to the forward pass.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from moco_eval.encoders import timm_index
from moco_eval.encoders.layout import Layout, rename
from moco_eval.encoders.layouts import IMAGENET, PREFIXED

ODD_HEAD = "a projection head of a kind that is not read"
REASON = "beside the backbone, for a training of its own"
_WORDS = re.compile(
    r"head|proj|pred|queue|mem|temp|tau|logit|scale|cent(er|re|roid)|cluster|proto|classif|^cls|fc|linear|mlp|loss|crit"
    r"|aux|margin|weight|neck|decoder|label|target|ptr|idx|index|_id|count|step|iter|epoch|momentum|ema|arcface|cosface"
    r"|discrim|text|contrast|dino|ibot|mask|dict|negative|anchor|sinkhorn|whiten|regress|rotation|jigsaw|probe|online"
    r"|bias|alpha|beta|gamma|lambda|threshold|embed|output|feature|align|supcon|simclr|mapp|quanti",
    re.IGNORECASE,
)
_FORWARD = re.compile(
    r"norm|pool|token|stem|conv|^bn\d*$|attn|pos_?emb|patch|^(layer|block|stage)s?\d*$|^embeddings$", re.IGNORECASE
)
_ANATOMY = re.compile(
    r"(conv1|bn1|layer\d+|cls_token|reg_token|pos_embed|patch_embed|rel_pos_bias|rope_embed|blocks|norm|norm_pre|fc_norm"
    r"|attn_pool|conv_stem|conv_head|bn2|stem|stages|layers|levels|features|head\.norm|s[1-4]|final_conv|network)(\.|$)"
)
_SEQUENCE = re.compile(r"((\d+\.)?\w+)?$")  # names below a head that is read
# Rows that go by the network's own names; the others go by a method's, which one's own code may share.
_NETWORKS: tuple[str, ...] = (
    "detectron2",
    "Hugging Face",
    "torchvision",
    "kuangliu",
    "timm",
    "OpenMMLab ViT backbone",
    "lightly's backbone alone",
)
_NETWORKS += ("EfficientNet", "facebookresearch/ConvNeXt", "facebookresearch/dinov3", "microsoft/Swin-Transformer")


def without_own_parts(layout: Layout, tensors: Mapping[str, Tensor]) -> Layout:
    """The row, with what it has no place for among what it drops; as it was where a word for some part is missing."""
    if _is_of_the_zoo(layout, tensors):
        return layout
    prefixes, modules, odd_heads, strange = _sorted(layout, tensors)
    parts: dict[str, list[Tensor]] = {}
    for name in strange:
        parts.setdefault(_part(name, modules), []).append(tensors[name])
    widths = {tensor.shape[0] for name, tensor in tensors.items() if tensor.ndim == 1 and name not in strange}
    beside = all(_is_beside(part, prefixes) for part in parts)
    own = beside and all(_is_own(part, parts[part], widths if _is_outside(part, prefixes) else set()) for part in parts)
    if not own or not (parts or odd_heads):
        return layout
    dropped = [(rf"{re.escape(part)}(\.|$)", part, REASON) for part in parts]
    if odd_heads:
        dropped += [(head, "head", ODD_HEAD) for head in (layout.head, layout.key_head) if head]
        layout = replace(layout, head=None, key_head=None)
    layout = replace(layout, dropped=(*dropped, *layout.dropped))
    return layout if layout.origin.startswith(_NETWORKS) else _as_anybodys(layout, prefixes)


def _is_of_the_zoo(layout: Layout, tensors: Mapping[str, Tensor]) -> bool:
    """Whether all that a row does not drop is a network of timm's, whatever its modules are called."""
    kept = [name for name in tensors if not any(re.match(mark, name) for mark, _, _ in layout.dropped)]
    return bool(timm_index.candidates({name: tuple(tensors[name].shape) for name in kept}))


def _as_anybodys(layout: Layout, prefixes: list[str]) -> Layout:
    """A row of a method whose code this is not: what it says of padding, heads and pixels does not hold."""
    origin = f"{PREFIXED.origin} {prefixes[0]!r}" if prefixes and prefixes[0] else "torchvision or timm ResNet"
    return replace(layout, origin=origin, variants=(), preprocessing=IMAGENET, cifar=None, settled=False)


def has_network(layout: Layout, names: Iterable[str]) -> bool:
    """Whether a backbone's tensors stand where the row has them, and not below a further prefix."""
    return bool(_sorted(layout, names)[0])


def _sorted(layout: Layout, names: Iterable[str]) -> tuple[list[str], set[str], list[str], list[str]]:
    """Prefixes of the backbones, modules that their tensors are in, heads that are not read, and what is strange."""
    prefixes: dict[str, None] = {}
    modules: set[str] = set()
    odd_heads, strange = [], []
    for name in names:
        if any(re.match(mark, name) for mark, _, _ in layout.dropped):
            continue
        if head := _match((layout.head, layout.key_head), name):
            odd_heads += [] if _SEQUENCE.fullmatch(name[head.end() :]) else [name]
        elif (body := _match((layout.query, layout.key), name)) and _of_network(layout, name[body.end() :]):
            prefixes[body[0]] = None
            module = name.rpartition(".")[0]
            while module and module not in modules:
                modules.add(module)
                module = module.rpartition(".")[0]
        else:
            strange.append(name)
    return list(prefixes), modules, odd_heads, strange


def _match(marks: Iterable[str | None], name: str) -> re.Match | None:
    return next((match for mark in marks if mark is not None and (match := re.match(mark, name))), None)


def _of_network(layout: Layout, name: str) -> bool:
    return bool(_ANATOMY.match(rename(name, layout.names)))


def _part(name: str, modules: set[str]) -> str:
    """The first module of a name that no backbone is in: 'projector', or 'student.projector' beside a student."""
    levels = name.split(".")
    parts = (".".join(levels[:count]) for count in range(1, len(levels)))
    return next((part for part in parts if part not in modules), name)


def _is_beside(part: str, prefixes: list[str]) -> bool:
    """Whether it stands where the backbone begins or further out, not in a module of the network."""
    parent = part.rpartition(".")[0]
    return not parent or any(prefix.startswith(f"{parent}.") for prefix in prefixes)


def _is_outside(part: str, prefixes: list[str]) -> bool:
    return not any(part.startswith(prefix) for prefix in prefixes)


def _is_own(part: str, tensors: list[Tensor], widths: set[int]) -> bool:
    """Whether its word tells that it is no part of the forward pass; or its layers stand on a feature as wide as that.

    Args:
        widths: of the backbone's layers, for a part outside of it.
    """
    word = part.rpartition(".")[2]
    if _FORWARD.search(word) or ("embed" in word.lower() and any(tensor.ndim > 2 for tensor in tensors)):
        return False  # embeddings of channels or times, (1, count, dim), are added to the tokens
    on_feature = any(tensor.ndim == 2 and tensor.shape[1] in widths for tensor in tensors)
    return bool(_WORDS.search(word)) or on_feature
