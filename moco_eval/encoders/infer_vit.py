"""Which of timm's transformers do these tensors belong to, with which arguments? Read off names and shapes.

The tensors go by timm's names: VisionTransformer's, Beit's (relative positions) or Eva's (rotary positions, DINOv3).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Transformer:
    """What shapes tell of a transformer of timm's, by the names of its constructor's arguments."""

    img_size: int
    patch_size: int
    in_chans: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float


# timm's networks by kind, each with the shape that its name stands for; the first is taken where none has the width.
_PLAIN = {
    "vit_base_patch16_224": Transformer(224, 16, 3, 768, 12, 12, 4.0),
    "vit_tiny_patch16_224": Transformer(224, 16, 3, 192, 12, 3, 4.0),
    "vit_small_patch16_224": Transformer(224, 16, 3, 384, 12, 6, 4.0),
    "vit_large_patch16_224": Transformer(224, 16, 3, 1024, 24, 16, 4.0),
    "vit_huge_patch14_224": Transformer(224, 14, 3, 1280, 32, 16, 4.0),
    "vit_giant_patch14_224": Transformer(224, 14, 3, 1408, 40, 16, 48 / 11),
    "vit_gigantic_patch14_224": Transformer(224, 14, 3, 1664, 48, 16, 64 / 13),
}
_SWIGLU = {"vit_giant_patch14_dinov2": Transformer(518, 14, 3, 1536, 40, 24, 2.66667 * 2)}
_CLIP = {
    "vit_base_patch16_clip_224": Transformer(224, 16, 3, 768, 12, 12, 4.0),
    "vit_base_patch32_clip_224": Transformer(224, 32, 3, 768, 12, 12, 4.0),
    "vit_large_patch14_clip_224": Transformer(224, 14, 3, 1024, 24, 16, 4.0),
    "vit_huge_patch14_clip_224": Transformer(224, 14, 3, 1280, 32, 16, 4.0),
    "vit_giant_patch14_clip_224": Transformer(224, 14, 3, 1408, 40, 16, 48 / 11),
    "vit_gigantic_patch14_clip_224": Transformer(224, 14, 3, 1664, 48, 16, 64 / 13),
}
_SIGLIP = {
    "vit_base_patch16_siglip_224": Transformer(224, 16, 3, 768, 12, 12, 4.0),
    "vit_large_patch16_siglip_256": Transformer(256, 16, 3, 1024, 24, 16, 4.0),
    "vit_so400m_patch14_siglip_224": Transformer(224, 14, 3, 1152, 27, 16, 3.7362),
}
_BEIT = {
    "beit_base_patch16_224": Transformer(224, 16, 3, 768, 12, 12, 4.0),
    "beit_large_patch16_224": Transformer(224, 16, 3, 1024, 24, 16, 4.0),
}
_DINOV3 = {
    "vit_base_patch16_dinov3": Transformer(256, 16, 3, 768, 12, 12, 4.0),
    "vit_small_patch16_dinov3": Transformer(256, 16, 3, 384, 12, 6, 4.0),
    "vit_large_patch16_dinov3": Transformer(256, 16, 3, 1024, 24, 16, 4.0),
    "vit_huge_plus_patch16_dinov3": Transformer(256, 16, 3, 1280, 32, 20, 4.0),
    "vit_7b_patch16_dinov3": Transformer(256, 16, 3, 4096, 40, 32, 3.0),
}
_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}  # whose heads are not 64 wide


def transformer(tensors: Mapping[str, Tensor]) -> str | None:
    """timm's network with its arguments, `timm:vit_base_patch16_224,init_values=1e-05`; None where it has none.

    Heads are as in timm's network of that width, else 64 wide: no shape tells them but a relative position's.
    """
    kernel, block = tensors.get("patch_embed.proj.weight"), _block(tensors)
    if kernel is None or kernel.ndim != 4 or not min(kernel.shape) or kernel.shape[2] != kernel.shape[3] or not block:
        return None
    if any(name.endswith((".q_bias", "relative_position_bias_table", ".gamma_1")) for name in tensors):
        return (
            _dinov3(tensors, block) if "pos_embed" not in tensors and "reg_token" in tensors else _beit(tensors, block)
        )
    return _plain(tensors, block)


def _block(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the first block."""
    return {name.removeprefix("blocks.0."): tensor for name, tensor in tensors.items() if name.startswith("blocks.0.")}


def _depth(tensors: Mapping[str, Tensor]) -> int:
    return len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})


# Plain positions


def _plain(tensors: Mapping[str, Tensor], block: dict[str, Tensor]) -> str | None:
    """VisionTransformer's: with or without class token, registers, LayerScale, SwiGLU, norms before and after."""
    place = _positions(tensors)
    hidden, back = block.get("mlp.fc1.weight"), block.get("mlp.fc2.weight")
    registers = tensors.get("reg_token")
    if place is None or hidden is None or back is None or hidden.ndim != 2 or back.ndim != 2:
        return None
    if registers is not None and registers.ndim != 3:
        return None
    side, embedded = place
    packed = hidden.shape[0] == 2 * back.shape[1]
    before, pooled = (any(name.startswith(place) for name in tensors) for place in ("norm_pre.", "attn_pool."))
    known = _SIGLIP if pooled else _CLIP if before else _SWIGLU if packed else _PLAIN
    shape = _shape(tensors, side, hidden.shape[0])
    class_token = "cls_token" in tensors
    norm, fc_norm = (any(name.startswith(place) for name in tensors) for place in ("norm.", "fc_norm."))
    arguments: dict[str, Any] = {}
    if not class_token and not pooled:
        arguments["class_token"] = False
    if not pooled and (fc_norm or not class_token):
        arguments |= {"global_pool": "avg"} if fc_norm else {"global_pool": "avg", "fc_norm": False}
    if not norm and not fc_norm:
        arguments["final_norm"] = False
    if registers is not None:
        arguments["reg_tokens"] = registers.shape[1]
    if not embedded and (class_token or registers is not None):
        arguments["no_embed_class"] = True
    scaled = any(".ls1." in name for name in tensors)
    if scaled != packed:
        arguments["init_values"] = 1e-05 if scaled else 0
    if "attn.qkv.bias" not in block:
        arguments["qkv_bias"] = False
    if "attn.q_norm.weight" in block:
        arguments["qk_norm"] = True
    return _named(known, shape, arguments)


def _positions(tensors: Mapping[str, Tensor]) -> tuple[int, bool] | None:
    """Patches along one side, and whether class token and registers have positions of their own."""
    positions = tensors.get("pos_embed")
    if positions is None or positions.ndim != 3:
        return None
    registers = tensors.get("reg_token")
    prefix = ("cls_token" in tensors) + (registers.shape[1] if registers is not None and registers.ndim == 3 else 0)
    for count, embedded in ((positions.shape[1] - prefix, True), (positions.shape[1], False)):
        side = math.isqrt(max(count, 0))
        if side and side * side == count:
            return side, embedded
    return None


# Relative positions, rotary positions


def _beit(tensors: Mapping[str, Tensor], block: dict[str, Tensor]) -> str | None:
    """Beit's: a table of relative positions in each block or one for all, perhaps positions of its own too."""
    shared, own = (tensors.get(f"{place}.relative_position_bias_table") for place in ("rel_pos_bias", "blocks.0.attn"))
    table, hidden = shared if own is None else own, block.get("mlp.fc1.weight")
    if table is None or table.ndim != 2 or hidden is None or hidden.ndim != 2 or "cls_token" not in tensors:
        return None
    side = (math.isqrt(max(table.shape[0] - 3, 0)) + 1) // 2
    if (2 * side - 1) ** 2 + 3 != table.shape[0]:
        return None
    shape = _shape(tensors, side, hidden.shape[0], table.shape[1])
    arguments: dict[str, Any] = {}
    if not any(name.startswith("fc_norm.") for name in tensors):
        arguments["use_fc_norm"] = False
    if own is None:
        arguments["use_rel_pos_bias"] = False
    if shared is not None:
        arguments["use_shared_rel_pos_bias"] = True
    if "pos_embed" in tensors:
        arguments["use_abs_pos_emb"] = True
    if "gamma_1" not in block:
        arguments["init_values"] = 0
    if "attn.q_bias" not in block:
        arguments["qkv_bias"] = False
    return _named(_BEIT, shape, arguments)


def _dinov3(tensors: Mapping[str, Tensor], block: dict[str, Tensor]) -> str | None:
    """Eva's as DINOv3 has it: class token and registers, rotary positions for any size."""
    hidden, gated = block.get("mlp.fc1.weight"), block.get("mlp.fc1_g.weight")
    wide = hidden if gated is None else gated
    if wide is None or wide.ndim != 2 or "cls_token" not in tensors or tensors["reg_token"].ndim != 3:
        return None
    shape = _shape(tensors, 0, wide.shape[0])
    arguments: dict[str, Any] = {"global_pool": "token"}
    usual = {1280: True, 4096: True}.get(shape.embed_dim, False)
    if (gated is not None) != usual:
        arguments["swiglu_mlp"] = gated is not None
    if gated is not None:
        arguments["swiglu_align_to"] = 1
    if tensors["reg_token"].shape[1] != 4:
        arguments["num_reg_tokens"] = tensors["reg_token"].shape[1]
    if "attn.q_bias" in block:
        arguments["qkv_bias"] = True
    return _named(_DINOV3, shape, arguments)


# Names


def _shape(tensors: Mapping[str, Tensor], side: int, hidden: int, heads: int = 0) -> Transformer:
    """Args: side: patches along one side, 0 for any; hidden: width of the MLP; heads: 0 where no shape tells them."""
    dim, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
    ratio = hidden / dim
    if int(dim * ratio) != hidden:  # floats
        ratio = (hidden + 0.5) / dim
    return Transformer(side * patch, patch, channels, dim, _depth(tensors), heads, ratio)


def heads(dim: int) -> int:
    """As timm's transformers of that width have, else 64 wide; narrower where 64 does not divide."""
    return _HEADS.get(dim) or next((dim // width for width in (64, 32, 16, 8) if dim % width == 0), 1)


def _named(known: dict[str, Transformer], shape: Transformer, arguments: dict[str, Any]) -> str:
    """The network of the nearest shape, and what differs from it."""
    name = min(known, key=lambda other: _differences(known[other], shape))
    base = known[name]
    ours = {field.name: getattr(shape, field.name) for field in fields(Transformer)}
    if not ours["num_heads"]:
        same = next((other for other in known.values() if other.embed_dim == shape.embed_dim), None)
        ours["num_heads"] = same.num_heads if same else heads(shape.embed_dim)
    if not ours["img_size"]:
        del ours["img_size"]
    given = {key: value for key, value in ours.items() if not _same(value, getattr(base, key), shape.embed_dim, key)}
    return ",".join([f"timm:{name}", *(f"{key}={value}" for key, value in (given | arguments).items())])


def _differences(base: Transformer, shape: Transformer) -> tuple[bool, ...]:
    return tuple(getattr(base, key) != getattr(shape, key) for key in ("embed_dim", "depth", "patch_size"))


def _same(ours: Any, theirs: Any, dim: int, key: str) -> bool:
    return int(dim * ours) == int(dim * theirs) if key == "mlp_ratio" else ours == theirs
