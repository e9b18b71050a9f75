"""Which architecture do these tensors belong to? Read off names and shapes, and said in words where it is none."""

import math
import re
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck

from moco_eval.encoders.architectures import (
    ARCHITECTURES,
    CONV_STEMS,
    TRANSFORMERS,
    Architecture,
    build_backbone,
)
from moco_eval.encoders.foreign import kind_of
from moco_eval.encoders.infer_vit import transformer
from moco_eval.encoders.infer_zoo import nearest_in_zoo, require_one, zoo_architectures
from moco_eval.errors import InputError

OPTIONAL = "num_batches_tracked"  # counts that no forward pass reads; files of torch before 0.4.1 lack them


@cache
def expected(arch: str) -> dict[str, Tensor]:
    """Names, shapes and dtypes of an architecture's backbone, without its memory."""
    with torch.device("meta"):
        return dict(build_backbone(arch).state_dict())


def infer(source: str, tensors: Mapping[str, Tensor], prefer: str | None = None) -> str:
    """The architecture of these backbone tensors, under torchvision's names or timm's.

    Args:
        prefer: of several with the same tensors, a regular expression on the name of the one to take.
    Raises:
        InputError: they are of none that we build; the message says what they are.
    """
    plain = _transformer(tensors) if is_transformer(tensors) else _resnet(tensors)
    ours = plain is not None and not plain.startswith("timm:")
    if plain and ours and _has_these(plain, tensors):
        return plain
    zoo = zoo_architectures(tensors, prefer)
    if plain and len(zoo) != 1 and _has_these(plain, tensors):
        return plain
    if zoo:
        return require_one(source, zoo)
    if near := plain or nearest_in_zoo(tensors, prefer):
        return near  # for the proof to say what is wrong
    if kind := kind_of(tensors):
        raise InputError(f"{source}: not an architecture we build: it is {kind.sentence}; {kind.way_out}")
    if is_transformer(tensors) or not (_is_resnet(tensors) or nearest(tensors)[1] >= 0.9):
        raise InputError(
            f"{source}: not an architecture we build: it is {structure(tensors)}; moco_eval.wrap judges any network"
        )
    best, share = nearest(tensors)
    if share < 0.9 and structure(tensors) != structure(expected(best)):
        raise InputError(
            f"{source}: not an architecture we build: it is {structure(tensors)}; the nearest is {best}, "
            f"{structure(expected(best))}; moco_eval.wrap judges any network"
        )
    return best


def _has_these(arch: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether an architecture has exactly these tensors."""
    try:
        return _shapes(expected(arch)) == _shapes(tensors)
    except InputError:  # arguments that timm does not take
        return False


def is_transformer(tensors: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("blocks.") for name in tensors)


def nearest(tensors: Mapping[str, Tensor]) -> tuple[str, float]:
    """The architecture that shares most names and shapes with these tensors, and the share (1 is all)."""
    block = Bottleneck if any(name.endswith("conv3.weight") for name in tensors) else BasicBlock
    resnets = [name for name, arch in ARCHITECTURES.items() if arch.block is block]
    candidates = (_transformers(tensors) if is_transformer(tensors) else resnets) or resnets
    best = max(candidates, key=lambda arch: share(tensors, arch))
    return best, share(tensors, best)


def share(tensors: Mapping[str, Tensor], arch: str) -> float:
    """Of names and shapes that these tensors and an architecture's have, those that both have."""
    ours, theirs = _shapes(tensors), _shapes(expected(arch))
    return len(ours & theirs) / len(ours | theirs)


def _shapes(tensors: Mapping[str, Tensor]) -> set[tuple[str, torch.Size]]:
    return {(name, tensor.shape) for name, tensor in tensors.items() if not name.endswith(OPTIONAL)}


# ResNets


def _resnet(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the ResNet whose stem, depth, width and groups these are, if we know it."""
    stem, first, second = (_kernel(tensors, f"{place}.weight") for place in ("conv1", *_FIRST_BLOCK))
    if stem is None or first is None or second is None:
        return None
    bottleneck = any(name.endswith("conv3.weight") for name in tensors)
    width, groups = stem[0] / 64, second[0] // second[1]
    if not groups:
        return None
    resnet = Architecture(
        Bottleneck if bottleneck else BasicBlock,
        tuple(len(blocks) for blocks in _blocks(tensors).values()),  # type: ignore[arg-type]
        width=width,
        cifar_stem=stem[2:] == (3, 3),
        groups=groups,
        group_width=int(second[0] / groups / width) if bottleneck else 64,
    )
    name = next((name for name, arch in ARCHITECTURES.items() if arch == resnet), None)
    return name and with_channels(name, stem[1])


def with_channels(name: str, channels: int) -> str:
    """An architecture's name with the channels of its images, where they are not 3."""
    return name if channels == 3 else f"{name},channels={channels}"


_FIRST_BLOCK = ("layer1.0.conv1", "layer1.0.conv2")


def _kernel(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    """The shape of a convolution's weight; None where there is no such tensor."""
    tensor = tensors.get(name)
    return tuple(tensor.shape) if tensor is not None and tensor.ndim == 4 and min(tensor.shape) > 0 else None


def _blocks(tensors: Mapping[str, Tensor]) -> dict[str, set[str]]:
    """The blocks of each stage, by number."""
    blocks: dict[str, set[str]] = {}
    for name in tensors:
        if match := re.match(r"layer(\d+)\.(\d+)\.", name):
            blocks.setdefault(match[1], set()).add(match[2])
    return dict(sorted(blocks.items(), key=lambda stage: int(stage[0])))


# Vision transformers


def _transformer(tensors: Mapping[str, Tensor]) -> str | None:
    """The ViT of these tensors; where only the heads are open, the usual ones."""
    names, described = _transformers(tensors), transformer(tensors)
    return names[0] if names and (described is None or _plain(described)) else described


def _plain(described: str) -> bool:
    """Whether a transformer of timm's differs in sizes alone from those that are built here under other names."""
    sizes = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads")
    name, *arguments = described.split(",")
    plain = "clip" not in name and "siglip" not in name and "dino" not in name and "beit" not in name
    return plain and all(argument.startswith(sizes) for argument in arguments)


def _transformers(tensors: Mapping[str, Tensor]) -> list[str]:
    """The ViTs that have these patches, tokens and blocks, the usual number of heads first."""
    tokens = tensors.get("pos_embed")
    if tokens is None or tokens.ndim != 3:
        return []
    side = math.isqrt(max(tokens.shape[1] - 1, 0))
    if side * side + 1 != tokens.shape[1] or not side:
        return []
    stem = _kernel(tensors, "patch_embed.proj.0.weight")
    if stem is not None:
        same = [name for name in CONV_STEMS if (tokens.shape[2], _depth(tensors) + 1) == TRANSFORMERS[name][:2]]
        return [with_channels(_with_stem(name, side), stem[1]) for name in same]
    patches = _kernel(tensors, "patch_embed.proj.weight")
    if patches is None:
        return []
    return [
        with_channels(f"vit_{name}_patch{patches[2]}_{side * patches[2]}", patches[1])
        for name, (dim, depth, _) in TRANSFORMERS.items()
        if (dim, depth) == (patches[0], _depth(tensors))
    ]


def _with_stem(width: str, side: int) -> str:
    """MoCo v3's network with a stem of convolutions for so many patches along one side."""
    return f"vit_conv_{width}" if side == 14 else f"vit_conv_{width}_{side * 16}"


def _depth(tensors: Mapping[str, Tensor]) -> int:
    return len({match[1] for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))})


# In words


def structure(tensors: Mapping[str, Tensor]) -> str:
    """A network's tensors in words: blocks per stage, widths, stem and shortcuts; dim, depth and patches of a ViT."""
    if is_transformer(tensors):
        return _transformer_structure(tensors)
    blocks, stem = _blocks(tensors), _stem(tensors)
    if not _is_resnet(tensors):
        first = ", ".join(list(tensors)[:3])
        return (
            f"no ResNet under torchvision's names and no ViT or other network under timm's (its tensors: {first}, ...)"
        )
    kind = "bottleneck" if any(name.endswith("conv3.weight") for name in tensors) else "basic"
    depth = "-".join(str(len(names)) for names in blocks.values())
    kernels = (_kernel(tensors, f"layer{stage}.0.conv1.weight") for stage in blocks)
    widths = "-".join(str(kernel[0]) if kernel else "?" for kernel in kernels)
    groups = _groups(tensors)
    extras = [extra for mark, extra in _RESNET_EXTRAS.items() if any(re.search(mark, name) for name in tensors)]
    if not any(".downsample." in name or ".shortcut." in name for name in tensors):
        extras.append("shortcuts without parameters")
    extras += _other_channels(stem) if stem else []
    if not any(name.endswith("running_mean") for name in tensors):
        extras.append("norm layers without running statistics")
    parts = [_stem_structure(stem), *extras]
    return (
        f"a ResNet of {len(blocks)} stages of {depth} {kind} blocks, {widths} channels wide"
        f"{f' in {groups} groups' if groups > 1 else ''}, {', '.join(parts)}"
    )


_RESNET_EXTRAS = {
    r"\.(se|attn)\.": "with attention to channels",
    r"\.shortcut\.": "with shortcuts by another name",
    r"^(conv1|layer\d\.\d+\.conv\d)\.\d": "with convolutions in sequences",
    r"\.(aa|blurpool)\.": "with blurred pooling",
}


def _is_resnet(tensors: Mapping[str, Tensor]) -> bool:
    """Whether its names are a ResNet's, with a stem of one convolution or, as a ResNet-C or -D has it, of several."""
    return 0 < len(_blocks(tensors)) <= 8 and _stem(tensors) is not None


def _stem(tensors: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """The shape of the first convolution; it has as many sides as that, and one more, 0, where others follow it."""
    several = _kernel(tensors, "conv1.0.weight")
    return (*several, 0) if several else _kernel(tensors, "conv1.weight")


def _stem_structure(stem: tuple[int, ...] | None) -> str:
    if stem is None:
        return "without a stem"
    if len(stem) > 4:
        return f"a stem of several convolutions, the first of {stem[0]} channels, as a ResNet-C or -D has"
    return f"stem of {stem[0]} channels and {'x'.join(map(str, stem[2:]))} pixels"


def _groups(tensors: Mapping[str, Tensor]) -> int:
    """Groups of the 3x3 convolutions in the bottlenecks: a ResNeXt's."""
    before, grouped = (_kernel(tensors, f"{place}.weight") for place in _FIRST_BLOCK)
    return before[0] // grouped[1] if before and grouped else 1


_EXTRAS = {
    "dist_token": "a distillation token",
    "distillation_token": "a distillation token",
    "ls1.": "LayerScale",
    "reg_token": "register tokens",
    "register_tokens": "register tokens",
    "fc_norm.": "mean pooling over the patches",
    "relative_position": "relative positions",
    "attn.q_norm.": "normalised queries and keys",
    "mlp.w12.": "SwiGLU",
    "norm_pre.": "a norm before the blocks",
    "attn_pool.": "pooling by attention",
}


def _other_channels(stem: tuple[int, ...]) -> list[str]:
    """Of the images that a first convolution takes, where they are not RGB."""
    return [f"for images of {stem[1]} channel{'s' if stem[1] > 1 else ''} instead of 3"] if stem[1] != 3 else []


def _other_widths(tensors: Mapping[str, Tensor]) -> list[str]:
    """What a ViT has otherwise than timm's: sides of the patches, width of the MLPs, biases of the attention."""
    patches, widths = _kernel(tensors, "patch_embed.proj.weight"), tensors.get("blocks.0.mlp.fc1.weight")
    extras = []
    if patches and patches[2] != patches[3]:
        extras.append(f"patches of {patches[2]}x{patches[3]} pixels")
    if widths is not None and widths.ndim == 2 and widths.shape[0] != 4 * widths.shape[1]:
        extras.append(f"MLPs {widths.shape[0] / widths.shape[1]:g} times as wide as the tokens instead of 4")
    if "blocks.0.attn.qkv.weight" in tensors and "blocks.0.attn.qkv.bias" not in tensors:
        extras.append("no biases on queries, keys and values")
    return extras


def _patches(tensors: Mapping[str, Tensor]) -> str:
    stem = any(name.startswith("patch_embed.") and tensor.ndim == 4 for name, tensor in tensors.items())
    return "patches from a stem of convolutions" if stem else "no patches"


def _transformer_structure(tensors: Mapping[str, Tensor]) -> str:
    patches, tokens = _kernel(tensors, "patch_embed.proj.weight"), tensors.get("pos_embed")
    stem = f"patches of {patches[2]} pixels" if patches else _patches(tensors)
    scale = tensors.get("blocks.0.norm1.weight") if tokens is None or not tokens.ndim else tokens
    width = f"of {scale.shape[-1]} dimensions" if scale is not None and scale.ndim else "of unknown width"
    count = f"{tokens.shape[1]} positions" if tokens is not None and tokens.ndim == 3 else "no learnt positions"
    extras = sorted({extra for mark, extra in _EXTRAS.items() if any(mark in name for name in tensors)})
    extras += _other_widths(tensors)
    return (
        f"a vision transformer of {_depth(tensors)} block{'s' if _depth(tensors) != 1 else ''} {width}, {stem}"
        f"{''.join(', ' + channels for channels in _other_channels(patches or (0, 3)))}, {count}"
        f"{', with ' + ', '.join(extras) if extras else ''}"
    )
