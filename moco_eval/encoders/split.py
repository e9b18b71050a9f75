"""A checkpoint's tensors cut into backbone, projection head and the rest, each with its reason."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moco_eval.encoders.infer import OPTIONAL
from moco_eval.encoders.layout import Rules, rename
from moco_eval.encoders.recognise import OTHERS, Checkpoint, backbones
from moco_eval.errors import InputError


@dataclass
class Parts:
    """A state dict cut up: the backbone under torchvision's or timm's names, the head under its layers' places.

    Both are in fp32, which is what evaluations compute in. `raw` holds both exactly as they are in the file, in its
    order, the head as `fc.`: for exact copies.
    """

    backbone: dict[str, Tensor]
    head: dict[str, Tensor]
    raw: dict[str, Tensor]
    dropped: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, backbone: dict[str, Tensor], head: dict[str, Tensor] | None = None) -> "Parts":
        warnings: list[str] = []
        head = head or {}
        raw = backbone | {f"fc.{name}": tensor for name, tensor in head.items()}
        return cls(_fp32(backbone, warnings), _fp32(head, warnings), raw, [], warnings)


def split(checkpoint: Checkpoint, encoder: str) -> Parts:
    """Cut a checkpoint into the backbone and head of one encoder, and the rest.

    Args:
        encoder: 'query' or 'key'.
    Raises:
        InputError: the file lacks that encoder, or holds a tensor whose purpose is unknown.
    """
    layout = checkpoint.layout
    prefix, head_prefix = layout.prefixes(encoder)
    if prefix is None:
        raise InputError(f"--encoder {encoder}: {_none_at_all(checkpoint)}")
    groups = _groups(checkpoint, encoder, prefix, head_prefix)
    backbone = _renamed(checkpoint, groups["backbone"], prefix, layout.names)
    if not backbone:
        raise InputError(f"{checkpoint.path}: {_absent(checkpoint, encoder)}")
    converted = layout.convert(backbone) if layout.convert else backbone
    parts = Parts.of(converted, _as_linear(_renamed(checkpoint, groups["head"], head_prefix or "", ())))
    if layout.supplied and layout.supplied[0] in converted.keys() - backbone.keys():
        parts.warnings.append(layout.supplied[1])
    if layout.folded:
        _unfold(parts)
    parts.dropped += [*_other(groups["other"], encoder), *_reasons(checkpoint, groups["dropped"]), *checkpoint.dropped]
    return parts


def _groups(checkpoint: Checkpoint, encoder: str, prefix: str, head: str | None) -> dict[str, list[str]]:
    """Names by what they belong to: the backbone, its head, the other encoder, or what the layout drops.

    Raises:
        InputError: a name that belongs to none of them.
    """
    layout = checkpoint.layout
    others = [other for other in layout.prefixes("key" if encoder == "query" else "query") if other is not None]
    groups: dict[str, list[str]] = {"backbone": [], "head": [], "other": [], "dropped": []}
    for name in checkpoint.tensors:
        if any(re.match(mark, name) for mark, _, _ in layout.dropped):
            groups["dropped"].append(name)
        elif head and re.match(head, name):
            groups["head"].append(name)
        elif re.match(prefix, name):
            groups["backbone"].append(name)
        elif any(re.match(other, name) for other in others):
            groups["other"].append(name)
        else:
            raise InputError(
                f"{checkpoint.path}: tensor {name} belongs to no part of a checkpoint of {layout.origin}"
                f"{_way_out(checkpoint)}"
            )
    return groups


def _way_out(checkpoint: Checkpoint) -> str:
    """How to take a backbone all the same, where its prefix tells it from the rest."""
    there = backbones(checkpoint.tensors)
    return f"; to take a backbone without it: --key {there[0].rstrip('.')}" if there else ""


def _none_at_all(checkpoint: Checkpoint) -> str:
    return f"checkpoints of {checkpoint.layout.origin} have only one encoder; leave it out"


def _absent(checkpoint: Checkpoint, encoder: str) -> str:
    """Why a file lacks an encoder, and the way out."""
    if encoder == "key" and "bank" in checkpoint.tensors:
        return "--encoder key: a memory bank has no key encoder, its keys are the bank's slots; take --encoder query"
    other = "key" if encoder == "query" else "query"
    there = checkpoint.layout.prefixes(other)[0]
    if there is not None and any(re.match(there, name) for name in checkpoint.tensors):
        return f"only the {other} encoder is in this file: --encoder {other}"
    return "this file has no backbone, only what belongs on top of one; save the whole network"


def _other(names: list[str], encoder: str) -> list[tuple[str, str]]:
    if not names:
        return []
    if encoder == "query":
        return [(f"key encoder ({len(names)} tensors)", "the query encoder is evaluated; --encoder key takes this one")]
    return [(f"query encoder ({len(names)} tensors)", "the key encoder is evaluated; --encoder query takes this one")]


def _reasons(checkpoint: Checkpoint, names: list[str]) -> list[tuple[str, str]]:
    """Each group of dropped tensors once, with its size where it has several."""
    members: dict[tuple[str, str], list[str]] = {}
    for name in names:
        group = next((part, reason) for mark, part, reason in checkpoint.layout.dropped if re.match(mark, name))
        members.setdefault(group, []).append(name)
    return [(_with_size(part, members[part, reason]), reason) for part, reason in members]


def _with_size(part: str, names: list[str]) -> str:
    if part == OTHERS:
        first = list(dict.fromkeys(name.partition(".")[0] for name in names))
        return f"{part} ({len(names)}: {', '.join(first[:6])}{', ...' if len(first) > 6 else ''})"
    return f"{part} ({len(names)} tensors)" if len(names) > 1 else part


# Names


def _renamed(checkpoint: Checkpoint, names: list[str], prefix: str, rules: Rules) -> dict[str, Tensor]:
    """Tensors without their prefix, under the names of the network that is built here.

    Raises:
        InputError: two tensors come out under one name.
    """
    renamed: dict[str, Tensor] = {}
    for name in names:
        plain = rename(re.sub(f"^({prefix})", "", name), rules)
        if plain in renamed:
            raise InputError(f"{checkpoint.path} holds two tensors for {plain} (the second: {name})")
        renamed[plain] = checkpoint.tensors[name]
    return _joined_attention(renamed)


def _as_linear(head: dict[str, Tensor]) -> dict[str, Tensor]:
    """A projection that is a bare matrix, (D, out) as CLIP has it, as a linear layer's weight."""
    return {"weight": head[""].T.contiguous()} if head.keys() == {""} and head[""].ndim == 2 else head


def _joined_attention(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values that are stored apart, as the one tensor that timm has."""
    joined: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not (match := re.fullmatch(r"(.*\.attn\.)([qkv])(\.\w+)", name)):
            joined[name] = tensor
            continue
        three = [tensors.get(f"{match[1]}{letter}{match[3]}") for letter in "qkv"]
        if all(part is not None and part.shape == tensor.shape for part in three):
            joined.setdefault(f"{match[1]}qkv{match[3]}", torch.cat(three))
        else:
            joined[name] = tensor
    return joined


# Values


def _unfold(parts: Parts) -> None:
    """Statistics of 0 and 1 for batch norms that have only a scale and a shift, as detectron2 loads them."""
    scales = [name for name in parts.backbone if re.search(r"(^|\.)(bn\d|downsample\.1)\.weight$", name)]
    for name in scales:
        place, scale = name.removesuffix("weight"), parts.backbone[name]
        statistics = {"running_mean": torch.zeros_like(scale), "running_var": torch.ones_like(scale)}
        parts.backbone |= {f"{place}{key}": tensor for key, tensor in statistics.items()}
        parts.raw |= {f"{place}{key}": tensor for key, tensor in statistics.items()}
    parts.warnings.append(
        f"{len(scales)} batch norms have their statistics folded into scale and shift; mean 0 and variance 1 stand "
        "for them, as in detectron2"
    )


def _fp32(tensors: Mapping[str, Tensor], warnings: list[str]) -> dict[str, Tensor]:
    """Half and double weights as fp32; says so. Batch norms' counts are left to the proof."""
    floats = [name for name, t in tensors.items() if t.is_floating_point() and not name.endswith(OPTIONAL)]
    odd = [name for name in floats if tensors[name].dtype != torch.float32]
    if odd:
        kinds = ", ".join(sorted({str(tensors[name].dtype).removeprefix("torch.") for name in odd}))
        warnings.append(f"{len(odd)} tensors are stored as {kinds} and were cast to float32 (first: {odd[0]})")
    return {**tensors, **{name: tensors[name].float() for name in odd}}
