"""What the recipes of ViTs need beyond a copy and a head: drop-path, mean pooling, AdamW with a rate for each layer.

Source: facebookresearch/deit@7e160fe; facebookresearch/mae@efb2a80, models_vit.py and util/lr_decay.py;
bytedance/ibot@da316d8, evaluation/classification_layer_decay.
"""

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moco_eval.config.classification import FinetuneConfig, FinetuneOptimizer
from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.network import has_tokens
from moco_eval.errors import InputError

BLOCK = re.compile(r"blocks\.(\d+)\.")
EMBEDDINGS = ("patch_embed.", "norm_pre.", "cls_token", "reg_token", "pos_embed")  # before the first block


def require_adaptable(encoder: Encoder, config: FinetuneConfig) -> None:
    """Raises InputError where a recipe adapts a transformer and the encoder is none of timm's."""
    settings = {
        "drop_path": (config.drop_path, 0, _has_paths(encoder.backbone)),
        "optimizer.layer_decay": (config.optimizer.layer_decay, 1, _has_paths(encoder.backbone)),
        "pooling": (config.pooling or "null", "null", _has_pooling(encoder.backbone)),
    }
    lacking = [key for key, (value, off, there) in settings.items() if value != off and not there]
    if lacking:
        ways_out = " ".join(f"--set {key}={settings[key][1]}" for key in lacking)
        raise InputError(
            f"{encoder.arch} is no transformer that {' and '.join(lacking)} could adapt; add {ways_out}, or take "
            "--protocol lightly"
        )


def _has_paths(backbone: Any) -> bool:
    blocks = list(getattr(backbone, "blocks", None) or [])
    return bool(blocks) and all(hasattr(block, "drop_path1") and hasattr(block, "drop_path2") for block in blocks)


def _has_pooling(backbone: Any) -> bool:
    return has_tokens(backbone) and hasattr(backbone, "fc_norm") and isinstance(backbone.global_pool, str)


def adapted(backbone: nn.Module, config: FinetuneConfig) -> nn.Module:
    """The copy with drop-path in its blocks, and the pooling that the recipe asks for."""
    if config.drop_path:
        drop_paths(backbone, config.drop_path)
    if config.pooling == "mean" and backbone.global_pool != "avg":
        pool_patches(backbone)
    return backbone


def drop_paths(backbone: Any, rate: float) -> None:
    """In training each sample skips a branch of a block, at a rate that rises in a line from 0 to that of the last."""
    from timm.layers import DropPath

    for block, share in zip(backbone.blocks, torch.linspace(0, rate, len(backbone.blocks)).tolist(), strict=True):
        block.drop_path1, block.drop_path2 = DropPath(share), DropPath(share)


def pool_patches(backbone: Any) -> None:
    """The feature becomes the patch tokens' mean behind a new layer norm, in the place of the last one."""
    norm = copy.deepcopy(backbone.norm)
    norm.reset_parameters()
    backbone.norm, backbone.fc_norm, backbone.global_pool = nn.Identity(), norm, "avg"


def adamw(net: Any, settings: FinetuneOptimizer) -> tuple[torch.optim.Optimizer, list[float]]:
    """AdamW, and the multiple of the learning rate of each of its parameter groups.

    Args:
        net: a classifier of `backbone` and `head`.
    """
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    names: set[str] = getattr(net.backbone, "no_weight_decay", set)()
    plain = [f"backbone.{name}" for name in names]
    if settings.layer_decay == 1:
        groups = param_groups_weight_decay(net, settings.weight_decay, no_weight_decay_list=plain)
    else:
        layers = _Layers(net)
        groups = param_groups_layer_decay(layers, settings.weight_decay, plain, layer_decay=settings.layer_decay)
    multiples = [group.pop("lr_scale", 1.0) for group in groups]
    return torch.optim.AdamW(groups, settings.lr, betas=(0.9, 0.999), eps=1e-8), multiples


class _Layers:
    """A network as timm's layer decay wants it: with a matcher of its layers."""

    def __init__(self, net: nn.Module):
        self.named_parameters = net.named_parameters

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        return layer_of


def layer_of(name: str) -> float:
    """The layer of a parameter: embeddings 0, block i is i + 1, and the norm and head after the blocks are last."""
    plain = name.removeprefix("backbone.")
    if block := BLOCK.match(plain):
        return int(block[1]) + 1
    return 0 if plain.startswith(EMBEDDINGS) else float("inf")
