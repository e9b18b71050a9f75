"""Load anyone's encoder with proof: every backbone tensor matched in name, shape and dtype, or an error."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models.resnet import Bottleneck

from moco_eval.encoders import download, hub, zoo
from moco_eval.encoders.architectures import (
    AnyArchitecture,
    Architecture,
    TimmNetwork,
    VisionTransformer,
    architecture,
    names,
    sized,
    with_argument,
)
from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.head import build_head
from moco_eval.encoders.infer import infer
from moco_eval.encoders.layout import Layout, rename
from moco_eval.encoders.layouts import ANYBODYS_VIT, PREFIXED, SAFETENSORS, completed
from moco_eval.encoders.libraries import from_timm, from_torchvision, random_weights, raw_pixels
from moco_eval.encoders.naming import run_name, safe_name, sha256_of_checkpoint
from moco_eval.encoders.network import has_tokens
from moco_eval.encoders.pixel_choice import Doubt, with_pixels
from moco_eval.encoders.prove import doubts, prove
from moco_eval.encoders.recognise import Checkpoint, recognise
from moco_eval.encoders.settings_files import FileSettings, settings_beside, timm_architecture
from moco_eval.encoders.sources import require_source
from moco_eval.encoders.split import Parts, split
from moco_eval.encoders.vit_tensors import at_size, trained_size
from moco_eval.errors import InputError
from moco_eval.preprocessing import Preprocessing
from moco_eval.untrusted.pickle_scan import shown

# what Caffe's ResNets take, and detectron2's configurations for them say
MSRA = Preprocessing(mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0), channels="BGR", range=255)


def load(
    source: str,
    arch: str | None = None,
    encoder: str | None = None,
    seed: int = 0,
    key: str | None = None,
    pixels: Mapping[str, Any] | None = None,
) -> Encoder:
    """Load and prove an encoder; its backbone comes back in eval mode.

    Args:
        source: a checkpoint's path, `random:ARCH`, `torchvision:ARCH[:WEIGHTS]`, `timm:NAME`, `zoo:NAME`,
            `hf:ORG/NAME[/FILE]` or `pixels`.
        arch: overrides the architecture read from the tensors' shapes.
        encoder: 'query' or 'key' (the momentum encoder); by default the one that the method itself evaluates.
        seed: of the weights of `random:`.
        key: of several networks in a file, the one to take: its entry, or what its tensors' names begin with.
        pixels: attributes of a Preprocessing that take the place of the method's own.
    Raises:
        InputError: unreadable, unknown, or one tensor too few, too many, of another shape or not finite; senseless
            pixels, or another size than a ViT takes.
    """
    given = {} if pixels is None else pixels
    if not isinstance(given, Mapping):
        raise InputError(f"--pixels is a {type(given).__name__}; give a dict, such as {{'interpolation': 'bicubic'}}")
    chosen = with_pixels(_load(source, arch, encoder, seed, key, given), given)
    if given and chosen.preprocessing and chosen.arch != "pixels":
        _require_its_size("--pixels", chosen.preprocessing, architecture(chosen.arch))
    return chosen


def _load(
    source: str, arch: str | None, encoder: str | None, seed: int, key: str | None, given: Mapping[str, Any]
) -> Encoder:
    """The encoder with its method's own pixels, and the doubts that `given` leaves of them."""
    if encoder not in (None, "query", "key"):
        raise InputError(f"--encoder is {encoder!r}; it must be query or key")
    if arch is not None:
        architecture(arch)
    require_source(source)
    kind, colon, rest = source.partition(":")
    if colon and kind == "zoo":
        return _from_zoo(rest, arch, encoder, key, given)
    if colon and kind == "hf":
        return _from_hub(rest, arch, encoder, key, given)
    if source != "pixels" and not (colon and kind in ("random", "torchvision", "timm")):
        return _from_file(source, arch, encoder, key, given)
    if key is not None:
        raise InputError(f"--key {key}: {source} is a single network; leave it out")
    if encoder == "key":
        raise InputError(f"--encoder key: {source} has no key encoder; leave it out")
    if source == "pixels":
        loaded = raw_pixels()
    else:
        loaded = {"random": random_weights, "torchvision": from_torchvision, "timm": from_timm}[kind](rest, seed)
    if arch not in (None, loaded.arch):
        raise InputError(f"--arch {arch} contradicts {source}; leave it out")
    return loaded


def _from_file(
    source: str, arch: str | None, encoder: str | None, key: str | None, given: Mapping[str, Any]
) -> Encoder:
    path = Path(source)
    checkpoint = recognise(path, key)
    layout, sha256 = checkpoint.layout, sha256_of_checkpoint(path)
    taken = encoder or checkpoint.default
    parts = split(checkpoint, taken)
    _resample_positions(parts, layout, arch)
    inferred = arch or infer(source, parts.backbone, timm_architecture(path, layout.origin) or layout.prefer)
    settings = settings_beside(path, sha256, layout.origin, inferred)
    chosen = arch or _architecture(checkpoint, inferred, settings)
    shape = architecture(chosen)
    backbone = prove(source, parts.backbone, chosen, parts.warnings)
    norm_eps = _norm_eps(checkpoint, settings)
    pixel_doubt = _pixel_doubt(checkpoint, shape, settings)
    set_norm_eps(backbone, norm_eps)
    loaded = Encoder(
        source=source,
        run_name=run_name(path),
        arch=chosen,
        backbone=backbone,
        feature_dim=shape.feature_dim,
        head=build_head(source, parts.head, shape.feature_dim, parts.warnings),
        origin=_origin(checkpoint) + (f", settings of {settings.name}" if settings.name else ""),
        sha256=sha256,
        tensors_loaded=len(parts.backbone),
        path=path,
        key=key,
        taken=taken,
        which=settings.which or _copied(checkpoint, "which", taken),
        usual=settings.usual or _copied(checkpoint, "usual", layout.usual),
        dropped=parts.dropped,
        warnings=[
            *checkpoint.warnings,
            *parts.warnings,
            *doubts(parts.backbone, layout.folded),
            *settings.warnings,
            *_open_questions(checkpoint, arch, chosen, settings),
            *(pixel_doubt.left(given) if pixel_doubt else []),
        ],
        preprocessing=_preprocessing(checkpoint, shape, settings),
        pretraining=settings.pretraining or _pretraining(checkpoint),
        norm_eps=norm_eps,
        settings=settings.name or None,
        open_pixels=pixel_doubt.keys if pixel_doubt else (),
    )
    return replace(loaded, run_name=loaded.run_name + _chosen(loaded))


def _resample_positions(parts: Parts, layout: Layout, arch: str | None) -> None:
    """Positions for the size that the method evaluates at, where it trained at a larger, or that `arch` says.

    They are interpolated once, as the method does it.
    """
    size = architecture(arch).size if arch else layout.preprocessing and layout.preprocessing.size
    trained = trained_size(parts.backbone)
    if layout.positions is None or None in (size, trained) or size == trained or not (arch or trained > size):  # type: ignore[operator]
        return
    parts.backbone = at_size(parts.backbone, size, *layout.positions)  # type: ignore[arg-type]
    why = "as --arch says" if arch else "at which its method evaluates"
    parts.warnings.append(f"its positions are of images of {trained} pixels and were interpolated for {size}, {why}")


def _chosen(loaded: Encoder) -> str:
    """What a run's name says of an encoder that is not the one its file is known for."""
    other = "" if loaded.which == loaded.usual else f"-{loaded.which}"
    return f"{other}-{safe_name(loaded.key)}" if loaded.key else other


def _from_zoo(name: str, arch: str | None, encoder: str | None, key: str | None, given: Mapping[str, Any]) -> Encoder:
    """A known public checkpoint: fetched where it is not there yet, and held against what its manifest expects."""
    entry = zoo.entry(name)
    loaded = _from_file(str(download.fetch(name)), arch, encoder, key, given)
    if not loaded.origin.startswith(entry.layout):
        loaded.warnings.append(f"the zoo expects {name} in the layout of {entry.layout}, not of {loaded.origin}")
    return replace(loaded, source=f"zoo:{name}", run_name=safe_name(name) + _chosen(loaded))


def _from_hub(rest: str, arch: str | None, encoder: str | None, key: str | None, given: Mapping[str, Any]) -> Encoder:
    """A checkpoint of Hugging Face's hub, with the files of settings that lie beside it there."""
    path = hub.fetch(rest)
    loaded = _from_file(str(path), arch, encoder, key, given)
    return replace(
        loaded,
        source=f"hf:{rest}",
        run_name=safe_name(f"hf-{rest}") + _chosen(loaded),
        origin=f"{loaded.origin}, commit {hub.commit_of(path)[:10]} of hf:{hub.parse(rest).repo}",
    )


# What the shapes do not tell


def _architecture(checkpoint: Checkpoint, inferred: str, settings: FileSettings) -> str:
    """The architecture as the settings or the layout's code base have it; as the shapes say where neither tells.

    Raises:
        InputError: the settings tell of heads or strides that no network built here has.
    """
    if settings.arch or (checkpoint.layout.format == SAFETENSORS and checkpoint.values.get("arch")):
        return settings.arch or str(checkpoint.values["arch"])
    stated = checkpoint.values.get("arch")
    if checkpoint.layout.format and isinstance(stated, str) and isinstance(architecture(inferred), VisionTransformer):
        return stated  # our own file says the heads, which the shapes do not
    if isinstance(architecture(inferred), TimmNetwork):
        return _timm_architecture(checkpoint, inferred, settings)
    plain, comma, channels = inferred.partition(",")
    name = rename(plain, checkpoint.layout.variants)
    if name not in names() and not isinstance(architecture(inferred), VisionTransformer):
        name = plain
    shape = architecture(name)
    if isinstance(shape, VisionTransformer) and settings.heads not in (None, shape.heads):
        name = name.replace("_patch", "_12h_patch")
        if "_12h_12h_" in name or architecture(name).heads != settings.heads:  # type: ignore[union-attr]
            heads = f"{settings.heads} heads, which no {inferred} built here has"
            raise InputError(f"{checkpoint.path}: {settings.name} says {heads}")
    in_3x3 = isinstance(shape, Architecture) and shape.block is Bottleneck and not shape.stride_in_1x1
    if in_3x3 and settings.stride_in_1x1:
        name = f"{name}_msra"
    architecture(name)
    return f"{name}{comma}{channels}"


def _timm_architecture(checkpoint: Checkpoint, inferred: str, settings: FileSettings) -> str:
    """The same with the heads and the activation that the settings or the layout's code base say."""
    name = inferred if settings.activation else rename(inferred, checkpoint.layout.variants)
    if _is_openais(checkpoint):
        name = with_argument(inferred, "act_layer", "quick_gelu")
    network: Any = architecture(name)
    blocks = getattr(network.layers, "blocks", None)
    if settings.heads is not None and blocks is not None and blocks[0].attn.num_heads != settings.heads:
        name = with_argument(name, "num_heads", settings.heads)
    return with_argument(name, "act_layer", settings.activation) if settings.activation else name


def _is_openais(checkpoint: Checkpoint) -> bool:
    """Whether a CLIP is openai's own: by its entries, or by kernels in half precision beside norms in full."""
    if not checkpoint.layout.origin.startswith("CLIP"):
        return False
    kinds = {name.rpartition(".")[0].rpartition(".")[2]: t.dtype for name, t in checkpoint.tensors.items()}
    mixed = (kinds.get("conv1"), kinds.get("ln_post")) == (torch.float16, torch.float32)
    return mixed or {"input_resolution", "context_length", "vocab_size"} & checkpoint.tensors.keys() != set()


def _open_questions(checkpoint: Checkpoint, override: str | None, arch: str, settings: FileSettings) -> list[str]:
    """What only the user can know, in words; what `override` (--arch) settles is not asked."""
    if settings.arch:
        return []
    shape, layout = architecture(arch), checkpoint.layout
    hugging_face = layout.origin.startswith("Hugging Face") and settings.stride_in_1x1 is None
    if isinstance(shape, TimmNetwork):
        return _of_timm(checkpoint, override, arch, settings)
    if isinstance(shape, VisionTransformer):
        questions = _of_transformer(checkpoint, override, arch, settings, hugging_face)
    else:
        questions = _of_resnet(checkpoint, override, arch, settings)
        if hugging_face and not settings.name:
            questions.append(_HF_RESNET)
        if _is_segmenter(checkpoint) or _says_dilated(checkpoint.values):
            questions.append(_DILATED)
    stated_by_file = layout.preprocessing is None and checkpoint.values.get("preprocessing")
    if shape.channels != 3 and not (stated_by_file or settings.preprocessing):
        questions.append(_CHANNELS.format(channels=shape.channels, s="" if shape.channels == 1 else "s"))
    stated = checkpoint.values.get("arch")
    if isinstance(stated, str) and layout.format is None and not override and not arch.startswith(stated.lower()):
        questions.append(f"the file says that it is a {shown(stated)}; its tensors look like {arch}")
    return questions


def _of_transformer(
    checkpoint: Checkpoint, override: str | None, arch: str, settings: FileSettings, hugging_face: bool
) -> list[str]:
    """Heads, epsilon and pixels, where neither code base nor settings say them."""
    shape, layout = architecture(arch), checkpoint.layout
    assert isinstance(shape, VisionTransformer)
    if hugging_face and settings.heads is None and settings.norm_eps is None:
        return [_HF_VIT.format(heads=shape.heads, size=shape.size)]
    if override or settings.heads is not None or layout.settled or "_12h" in arch or shape.conv_stem:
        return []
    if shape.dim <= 384:
        other = arch.replace("_patch", "_12h_patch")
        return [_HEADS.format(heads=shape.heads, other=other, size=shape.size)]
    plain = layout.origin.startswith(("timm ViT", "torchvision ViT", "OpenMMLab ViT backbone", PREFIXED.origin))
    return [_SQUARE.format(size=shape.size, arch=arch)] if plain and not settings.name else []


def _of_timm(checkpoint: Checkpoint, override: str | None, arch: str, settings: FileSettings) -> list[str]:
    """Activation of CLIP's towers, heads of a width that timm does not have, where nothing says them."""
    layout = checkpoint.layout
    if override or settings.name:
        return []
    if layout.origin.startswith(("CLIP", "Hugging Face CLIP")) and not _is_openais(checkpoint):
        quick = "quick" in arch
        taken, other = ("QuickGELU", "gelu") if quick else ("GELU", "quick_gelu")
        return [_ACTIVATION.format(taken=taken, other=with_argument(arch, "act_layer", other))]
    if "num_heads=" in arch and not layout.settled and not arch.startswith("timm:beit"):  # whose positions tell
        network: Any = architecture(arch)
        return [_TIMM_HEADS.format(heads=dict(network.arguments)["num_heads"], arch=arch)]
    return []


def _of_resnet(checkpoint: Checkpoint, override: str | None, arch: str, settings: FileSettings) -> list[str]:
    """Strides of a detector, padding and pixels of a CIFAR stem, where neither code base nor settings say them."""
    shape, layout, values = architecture(arch), checkpoint.layout, checkpoint.values
    assert isinstance(shape, Architecture)
    if override:
        return []
    if (
        layout.origin.partition(",")[0] == "detectron2"
        and settings.stride_in_1x1 is None
        and "__author__" not in values
    ):
        return [_STRIDE.format(other=f"{arch}_msra")] if shape.block is Bottleneck else []
    if not shape.cifar_stem:
        return []
    if layout.origin.startswith(PREFIXED.origin):
        return [_PADDING.format(other=f"{arch}_pad2")]
    its_own = any(name in values for name in ("pytorch-lightning_version", "opt"))  # what those code bases save
    if layout.origin.startswith(("solo-learn", "PyContrast")) and not its_own:
        other = arch.removesuffix("_pad2") if shape.stem_padding == 2 else f"{arch}_pad2"
        return [_BORROWED.format(origin=layout.origin, padding=shape.stem_padding, other=other)]
    return []


_HEADS = (
    "the shapes of a ViT do not tell its attention heads, nor that its images are square; {heads} were taken, as DeiT, "
    "DINO and timm have, and {size}x{size} pixels. MoCo v3's have 12: --arch {other}"
)
_CHANNELS = "it takes images of {channels} channel{s} and does not say their mean and deviation: the data set's count"
_ACTIVATION = (
    "no tensor of CLIP tells its activation: openai's weights have QuickGELU, most of OpenCLIP's GELU; {taken} was "
    "taken, for the other: --arch {other}"
)
_TIMM_HEADS = (
    "the shapes of a transformer do not tell its attention heads; {heads} were taken, 64 dimensions each or fewer: "
    "--arch {arch} with another num_heads says others"
)
_SQUARE = (
    "the shapes of a ViT do not tell that its images are square; {size}x{size} pixels were taken: --arch {arch} says so"
)
_HF_VIT = (
    "Hugging Face's weights say neither heads nor epsilon nor the size of images; ViT's were taken ({heads} heads, "
    "1e-12, {size}x{size} pixels; MSN's differ): put its config.json and preprocessor_config.json beside it"
)
_HF_RESNET = (
    "Hugging Face's weights say neither strides nor pixels; torchvision's strides and ImageNet's pixels were taken: "
    "put its config.json and preprocessor_config.json beside it"
)
_DILATED = (
    "it comes from a network with dilated stages, as segmenters as a rule have; no tensor tells, and ordinary strides "
    "were taken: to judge a dilated network, build it and give it to moco_eval.wrap"
)
_BORROWED = (
    "its names are those of {origin}, whose stem's padding ({padding}) and CIFAR pixels were taken, which no shape "
    "tells; for a network of another code base: --arch {other}"
)
_STRIDE = (
    "a detectron2 model does not say its pixels and strides; RGB and the stride in the 3x3 were taken. For one trained "
    "with detectron2's defaults (BGR, stride in the 1x1): --arch {other}, or its config.yaml beside it"
)
_PADDING = "the shapes do not tell the padding of a CIFAR stem; 1 was taken. solo-learn's is 2: --arch {other}"
_SEGMENTER = re.compile(r"(^|\.)(aux_classifier|decode_head|auxiliary_head|aspp|sem_seg_head|segmentation_head)\.")


def _is_segmenter(checkpoint: Checkpoint) -> bool:
    """By a head's name, or by torchvision's classifier of convolutions."""
    convolutions = (name for name, tensor in checkpoint.tensors.items() if tensor.ndim == 4)
    return any(map(_SEGMENTER.search, checkpoint.tensors)) or any(_CONVOLVED.search(name) for name in convolutions)


_CONVOLVED = re.compile(r"(^|\.)classifier\.\d+\.")


def _says_dilated(values: Any, depth: int = 0) -> bool:
    """Whether settings beside the tensors, at a few levels, say so."""
    if not isinstance(values, dict) or depth > 4:
        return False
    stride = values.get("output_stride")
    dilated = stride in (8, 16) or any(_dilates(values.get(name)) for name in DILATIONS)
    return dilated or any(_says_dilated(value, depth + 1) for value in values.values())


DILATIONS = ("replace_stride_with_dilation", "dilations")


def _dilates(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(part is True or part in (2, 4) for part in value)


def _norm_eps(checkpoint: Checkpoint, settings: FileSettings) -> float | None:
    """Of the layer norms, where it is not timm's."""
    copied = checkpoint.values.get("norm_eps") if checkpoint.layout.format == SAFETENSORS else None
    eps = settings.norm_eps or copied or checkpoint.layout.norm_eps
    if eps is not None and not (isinstance(eps, float) and 0 < eps < 1):
        raise InputError(f"{checkpoint.path}: the layer norms' epsilon is {eps!r}; it must lie between 0 and 1")
    return eps


def set_norm_eps(net: nn.Module, eps: float | None) -> None:
    """Where a code base has layer norms with another epsilon than timm's."""
    for module in net.modules():
        if eps is not None and isinstance(module, nn.LayerNorm):
            module.eps = eps


# What travels with the backbone


def _preprocessing(checkpoint: Checkpoint, arch: AnyArchitecture, settings: FileSettings) -> Preprocessing | None:
    """What the weights expect: as the file itself says, or settings beside it, or its layout.

    Raises:
        InputError: settings with another image size than a ViT has.
    """
    layout = checkpoint.layout
    if layout.preprocessing is None:
        return _own_preprocessing(checkpoint)
    if settings.preprocessing:
        _require_its_size(f"{checkpoint.path}: {settings.name}", settings.preprocessing, arch)
        return settings.preprocessing
    if settings.arch:
        return None  # our own settings say so
    usual = ANYBODYS_VIT.example if _is_anybodys(layout) and _takes_tokens(arch) else _of_layout(layout, arch)
    if arch.channels != usual.in_channels:
        return None
    if not isinstance(arch, Architecture):
        return sized(usual, arch)
    if arch.stride_in_1x1 and layout.origin.startswith("detectron2"):
        return MSRA
    return layout.cifar if arch.cifar_stem else layout.preprocessing


def _of_layout(layout: Layout, arch: AnyArchitecture) -> Preprocessing:
    """What the weights of an architecture expect in this layout, whose files do not say it themselves."""
    assert layout.preprocessing
    name = arch.name if isinstance(arch, TimmNetwork) else ""
    return next((pixels for mark, pixels in layout.pixels if re.search(mark, name)), layout.preprocessing)


def _require_its_size(who: str, pixels: Preprocessing, arch: AnyArchitecture) -> None:
    """Raises InputError where images would have another size than the only one that the network takes."""
    if arch.size not in (None, pixels.size):
        there = f"{pixels.size} pixels, but the network takes {arch.size}"
        raise InputError(f"{who} says images of {there}; correct it")


def _takes_tokens(arch: AnyArchitecture) -> bool:
    """Whether it is a transformer all the way."""
    return isinstance(arch, VisionTransformer) or (isinstance(arch, TimmNetwork) and has_tokens(arch.layers))


def _pixel_doubt(checkpoint: Checkpoint, arch: AnyArchitecture, settings: FileSettings) -> Doubt | None:
    """What no byte of the file tells of its pixels, nor settings beside it."""
    if settings.pixel_doubt or settings.preprocessing or settings.arch:
        return settings.pixel_doubt
    doubt = ANYBODYS_VIT if _is_anybodys(checkpoint.layout) else checkpoint.layout.pixel_doubt
    of_transformers = doubt is ANYBODYS_VIT or isinstance(arch, Architecture)
    return None if of_transformers and not _takes_tokens(arch) else doubt


def _is_anybodys(layout: Layout) -> bool:
    """Whether nothing but a prefix is known of the code base."""
    return layout.origin.startswith(PREFIXED.origin)


def _own_preprocessing(checkpoint: Checkpoint) -> Preprocessing | None:
    values = checkpoint.values.get("preprocessing")
    if values is None:
        return None
    try:
        return Preprocessing.from_dict(completed(values, checkpoint.values.get("origin")))
    except InputError as error:
        raise InputError(f"{checkpoint.path}: {error}") from None


def _origin(checkpoint: Checkpoint) -> str:
    """The layout; for a copy that our `convert` wrote, also what it was made of."""
    made_of = checkpoint.values.get("origin") if checkpoint.layout.format == SAFETENSORS else None
    return f"{checkpoint.layout.origin}, from {made_of}" if made_of else checkpoint.layout.origin


def _copied(checkpoint: Checkpoint, name: str, usual: str) -> str:
    """For a copy that our `convert` wrote, what it was made of."""
    return str(checkpoint.values.get(name, usual)) if checkpoint.layout.format == SAFETENSORS else usual


def _pretraining(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What the file says of its pretraining; others' pretraining checkpoints say how many epochs they have had."""
    values: Any = checkpoint.values.get("pretraining")
    if values is not None and not isinstance(values, dict):
        raise InputError(f"{checkpoint.path}: its pretraining entry is a {type(values).__name__}, not a dict")
    epochs = checkpoint.values.get("epoch")
    if values is None and checkpoint.layout.head and isinstance(epochs, int):
        return {"epochs": epochs}
    return values
