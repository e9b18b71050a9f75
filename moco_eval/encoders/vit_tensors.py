"""A transformer's tensors as timm's networks have them, where a change of names is not enough.

Each function takes the tensors of a backbone by timm's names and gives new ones; none changes what it is given. A name
that is missing is left missing: the proof of load says so.
"""

import re

import torch
from torch import Tensor
from torch.nn import functional

from moco_eval.errors import InputError

Tensors = dict[str, Tensor]


# DINOv2


def registers(tensors: Tensors) -> Tensors:
    """The class token's own position added to the token, since registers stand between it and the patches.

    The sum is the one that DINOv2's forward pass takes. Without registers nothing changes.
    """
    token, positions = tensors.get("cls_token"), tensors.get("pos_embed")
    if "reg_token" not in tensors or token is None or positions is None or positions.ndim != 3:
        return tensors
    if token.shape != positions[:, :1].shape:
        return tensors
    return tensors | {"cls_token": token + positions[:, :1], "pos_embed": positions[:, 1:]}


def gated(tensors: Tensors) -> Tensors:
    """SwiGLU's gate and value, stored apart, as the one tensor that timm's packed MLP has."""
    joined: Tensors = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*\.mlp\.)fc1_([gx])(\.\w+)", name)
        both = [tensors.get(f"{match[1]}fc1_{part}{match[3]}") for part in "gx"] if match else []
        if match and all(part is not None and part.shape == tensor.shape for part in both):
            joined.setdefault(f"{match[1]}fc1{match[3]}", torch.cat(both))
        else:
            joined[name] = tensor
    return joined


def dinov2(tensors: Tensors) -> Tensors:
    return registers(gated(tensors))


def resampled(positions: Tensor, side: int, offset: float, antialias: bool) -> Tensor:
    """Positions of patches for another number of patches, as DINOv2 interpolates them.

    Args:
        positions: (1, H*H, D), without those of other tokens.
        side: patches along one side of the new grid.
        offset: added to `side` in the scale factor, as DINO's code does (0.1); with 0 the size itself is given.
    Returns:
        (1, side*side, D).
    Source: facebookresearch/dinov2@b8931f7: dinov2/models/vision_transformer.py, interpolate_pos_encoding.
    """
    count, dim = positions.shape[1:]
    old = round(count**0.5)
    grid = positions.float().reshape(1, old, old, dim).permute(0, 3, 1, 2)
    scale = float(side + offset) / old
    given = {"scale_factor": (scale, scale)} if offset else {"size": (side, side)}
    grid = functional.interpolate(grid, mode="bicubic", antialias=antialias, **given)
    assert grid.shape[-1] == side
    return grid.permute(0, 2, 3, 1).reshape(1, side * side, dim)


def trained_size(tensors: Tensors) -> int | None:
    """Pixels along one side of the images that a transformer's positions are of; None where it has none."""
    kernel, positions = tensors.get("patch_embed.proj.weight"), tensors.get("pos_embed")
    if kernel is None or kernel.ndim != 4 or not min(kernel.shape) or positions is None or positions.ndim != 3:
        return None
    count = positions.shape[1] - _prefix(tensors)
    side = round(max(count, 0) ** 0.5)
    return side * kernel.shape[2] if side and side * side == count else None


def at_size(tensors: Tensors, size: int, offset: float, antialias: bool) -> Tensors:
    """The same with positions for images of another size, which must divide into its patches; see `resampled`."""
    patch, positions, prefix = tensors["patch_embed.proj.weight"].shape[2], tensors["pos_embed"], _prefix(tensors)
    if size % patch:
        return tensors
    patches = resampled(positions[:, prefix:], size // patch, offset, antialias)
    return tensors | {"pos_embed": torch.cat([positions[:, :prefix], patches.to(positions.dtype)], dim=1)}


def _prefix(tensors: Tensors) -> int:
    """Positions of tokens that are no patches: the class token's, which is added to it where registers follow."""
    return int("reg_token" not in tensors and "cls_token" in tensors)


# DINOv3


def dinov3(tensors: Tensors) -> Tensors:
    """Biases of queries and values apart, as timm's Eva has them; those of the keys, which the mask makes 0, left out.

    Raises:
        InputError: a mask or rotary periods that DINOv3 does not have, or biases of keys that count.
    """
    _require_periods(tensors)
    converted: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith((".qkv.bias_mask", "rope_embed.periods")):
            continue
        if not name.endswith(".qkv.bias") or tensor.ndim != 1 or len(tensor) % 3:
            converted[name] = tensor
            continue
        place, mask = name.removesuffix("qkv.bias"), tensors.get(f"{name}_mask")
        query, key, value = (tensor if mask is None else _masked(name, tensor, mask)).chunk(3)
        if bool(key.any()):
            raise InputError(f"{name} has biases of keys other than 0, which timm's DINOv3 does not have")
        converted |= {f"{place}q_bias": query, f"{place}v_bias": value}
    return _attention_joined(_without_gate(converted))


def _without_gate(tensors: Tensors) -> Tensors:
    """An MLP whose only first layer came by the name of a gated one's value, as Hugging Face has it, by its own."""
    plain = not any(".mlp.fc1_g." in name for name in tensors)
    return {name.replace(".mlp.fc1_x.", ".mlp.fc1.") if plain else name: tensor for name, tensor in tensors.items()}


def _masked(name: str, bias: Tensor, mask: Tensor) -> Tensor:
    if mask.shape != bias.shape or not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError(f"{name}_mask is not of zeros and ones, as DINOv3's is: its weights were never initialised")
    return torch.where(mask != 0, bias, torch.zeros_like(bias))


def _require_periods(tensors: Tensors) -> None:
    """Raises InputError where the rotary positions are others than 100 ** (0, 2/n, 4/n, ...), as bfloat16 rounds it."""
    periods = tensors.get("rope_embed.periods")
    if periods is None:
        return
    usual = 100.0 ** (torch.arange(periods.numel()) / max(periods.numel(), 1))
    if periods.shape != usual.shape or not torch.allclose(periods.float(), usual, rtol=0.01):
        raise InputError("rope_embed.periods are not DINOv3's, of base 100: such rotary positions are not built here")


# Queries, keys and values apart


def _attention_joined(tensors: Tensors) -> Tensors:
    """As timm's Beit and Eva have them: one weight of all three, and biases of queries and values under names apart."""
    joined: Tensors = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*\.attn\.)([qkv])\.(weight|bias)", name)
        if not match:
            joined[name] = tensor
        elif match[3] == "bias":
            joined[f"{match[1]}{match[2]}_bias"] = tensor
        else:
            three = [tensors.get(f"{match[1]}{letter}.weight") for letter in "qkv"]
            if all(part is not None and part.shape == tensor.shape for part in three):
                joined.setdefault(f"{match[1]}qkv.weight", torch.cat(three))
            else:
                joined[name] = tensor
    return joined


# BEiT, data2vec, SimMIM


def beit(tensors: Tensors) -> Tensors:
    """Without the indices of the relative positions, which timm computes.

    Raises:
        InputError: the indices are others than BEiT's.
    """
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("relative_position_index")}
    for name in tensors.keys() - kept.keys():
        _require_index(name, tensors[name])
    return _attention_joined(kept)


def _require_index(name: str, index: Tensor) -> None:
    from timm.models.beit import gen_relative_position_index

    side = round((index.shape[0] - 1) ** 0.5) if index.ndim == 2 else 0
    usual = gen_relative_position_index((side, side)) if side else index.new_zeros(0)
    if not torch.equal(usual.to(index.dtype), index):
        raise InputError(f"{name} is not as BEiT's: such relative positions are not built here")


# CLIP, SigLIP


def clip(tensors: Tensors) -> Tensors:
    """Class token and positions with timm's axes: (D) to (1, 1, D), (L, D) to (1, L, D)."""
    return _with_axes(tensors, {"cls_token": 3, "pos_embed": 3})


def siglip(tensors: Tensors) -> Tensors:
    """Positions with timm's axes; the pooling's query apart from keys and values."""
    tensors = _with_axes(tensors, {"pos_embed": 3})
    converted: Tensors = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(attn_pool\.)in_proj\.(weight|bias)", name)
        if match and tensor.ndim and len(tensor) % 3 == 0:
            third = len(tensor) // 3
            converted |= {f"{match[1]}q.{match[2]}": tensor[:third], f"{match[1]}kv.{match[2]}": tensor[third:]}
        else:
            converted[name] = tensor
    return converted


def _with_axes(tensors: Tensors, wanted: dict[str, int]) -> Tensors:
    return {name: _axes(tensor, wanted.get(name, tensor.ndim)) for name, tensor in tensors.items()}


def _axes(tensor: Tensor, count: int) -> Tensor:
    return tensor.reshape((1,) * (count - tensor.ndim) + tuple(tensor.shape)) if tensor.ndim < count else tensor
