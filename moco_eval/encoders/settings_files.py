"""What files of settings beside a checkpoint say about its network: our own, Hugging Face's, timm's, detectron2's."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torchvision.models.resnet import Bottleneck

from moco_eval.config import yaml_read
from moco_eval.encoders import timm_index
from moco_eval.encoders.architectures import Architecture, TimmNetwork, VisionTransformer, architecture, sized
from moco_eval.encoders.image_processor import ForeignProcessor, pixels_of
from moco_eval.encoders.infer import expected
from moco_eval.encoders.layouts import BICUBIC, CLIP, HALVES, HALVES_BICUBIC, IMAGENET, completed
from moco_eval.encoders.pixel_choice import Doubt
from moco_eval.errors import InputError
from moco_eval.preprocessing import INTERPOLATIONS, Preprocessing
from moco_eval.runtime import files
from moco_eval.untrusted.pickle_scan import shown


@dataclass(frozen=True)
class FileSettings:
    """What no tensor's shape tells; None where the file does not say.

    Attributes:
        name: the file.
        preprocessing: what the weights expect.
        pixel_doubt: what of it was taken for want of a file that says it.
        arch: the architecture's name (ours alone says it).
        heads: of a ViT's attention.
        activation: of the MLPs of CLIP or SigLIP, by timm's name.
        norm_eps: of its layer norms.
        stride_in_1x1: a bottleneck strides in its first convolution.
        which, usual: the encoder that a copy was made of, and the one that its method evaluates (ours).
        pretraining: what the copy's source said of it (ours).
        warnings: doubts, in words: files of settings that are another network's.
    """

    name: str
    preprocessing: Preprocessing | None = None
    pixel_doubt: Doubt | None = None
    arch: str | None = None
    heads: int | None = None
    activation: str | None = None
    norm_eps: float | None = None
    stride_in_1x1: bool | None = None
    which: str | None = None
    usual: str | None = None
    pretraining: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()


class _Foreign(ValueError):
    """Settings of another network than the checkpoint's, in words that follow the file's name."""


class _NotBuilt(ValueError):
    """Settings of this very network, which is not built here."""


def settings_beside(checkpoint: Path, sha256: str, origin: str, arch: str) -> FileSettings:
    """What a file of settings in the same folder says; one of another network is left aside with a warning.

    Args:
        sha256: the checkpoint's; ours names the copy that it belongs to.
        origin: the checkpoint's layout.
        arch: what the tensors look like.
    Raises:
        InputError: such a file that cannot be read, makes no sense, or tells of a network that is not built here.
    """
    aside: dict[str, str] = {}
    for name, fits, read in _files(checkpoint, sha256, arch):
        path = checkpoint.with_name(name)
        if not os.path.lexists(path) or not fits(origin) or name in aside:
            continue
        if name in _PROCESSORS and "config.json" in aside:
            aside[name] = "beside that model's config.json"
            continue
        try:
            settings = {key: value for key, value in read(_contents(path)).items() if value is not None}
        except _Foreign as error:
            aside[name] = str(error)
            continue
        except _NotBuilt as error:
            raise InputError(
                f"{path}: {error}; without the file another network would be judged: build yours and give it to "
                "moco_eval.wrap"
            ) from None
        except (InputError, KeyError, TypeError, ValueError, AttributeError, OverflowError, ZeroDivisionError) as error:
            raise InputError(f"{path}: {error}; correct it, or move it away to do without it") from None
        if settings:
            doubts = settings.pop("warnings", ())
            return FileSettings(name, **settings, warnings=(*_left_aside(aside, arch), *doubts))
    return FileSettings("", warnings=_left_aside(aside, arch))


def _left_aside(aside: dict[str, str], arch: str) -> tuple[str, ...]:
    return tuple(f"{name} beside it is {why}, and this a {arch}: it was ignored" for name, why in aside.items())


_PROCESSORS = ("processor_config.json", "preprocessor_config.json")  # transformers looks into the first one first
_File = tuple[str, Callable[[str], bool], Callable[[dict], dict]]


def _files(checkpoint: Path, sha256: str, arch: str) -> list[_File]:
    """Names of files of settings, the layouts they are for, and their readers; the first that says anything counts."""
    plain = _PLAIN[:-1]

    def a_copy(origin: str) -> bool:
        return not origin.startswith("moco-eval")  # whose files say it themselves

    def hugging_face(origin: str) -> bool:
        return origin.startswith(("Hugging Face", "BEiT", *plain))

    def detectron2(origin: str) -> bool:
        return origin.partition(",")[0] == "detectron2"

    return [
        (f"{checkpoint.name}.json", a_copy, lambda values: _ours(values, sha256)),
        ("config.json", _is_plain, lambda values: _timm(values, arch)),
        ("config.json", hugging_face, lambda values: _hugging_face(values, checkpoint, arch)),
        *((name, hugging_face, lambda values: _processor(values, arch)) for name in _PROCESSORS),
        ("config.yaml", detectron2, lambda values: _detectron2(values, arch)),
    ]


_PLAIN = ("timm ViT", "torchvision or timm ResNet", "a state dict under", "timm network")  # layouts of timm's files


def _is_plain(origin: str) -> bool:
    return origin.startswith(_PLAIN)


def timm_architecture(checkpoint: Path, origin: str) -> str | None:
    """The network of timm's zoo that a config.json names, as a regular expression; None where none does.

    It settles which of several with the same tensors a file is; what it says is held against the tensors later.
    """
    path = checkpoint.with_name("config.json")
    if not _is_plain(origin) or not os.path.lexists(path):
        return None
    try:
        name = _contents(path).get("architecture")
    except InputError:
        return None  # the reading of settings says so
    plain = name.partition(".")[0] if isinstance(name, str) else ""
    return f"^{re.escape(plain)}$" if plain in timm_index.names() else None


def _contents(path: Path) -> dict[str, Any]:
    if path.suffix == ".json":
        values = files.read_json(path)
    else:
        _, values = yaml_read.read(path)
    return values if isinstance(values, dict) else {}


def _pixels(values: dict[str, Any] | None) -> dict[str, Any]:
    return {"preprocessing": Preprocessing.from_dict(values)} if values else {}


def _ours(values: dict[str, Any], sha256: str) -> dict[str, Any]:
    """What `convert` wrote beside a copy, if it is this copy's."""
    if values.get("sha256") != sha256:
        return {}
    kept = {name: values.get(name) for name in ("arch", "norm_eps", "which", "usual", "pretraining")}
    if not isinstance(kept["pretraining"], dict | None):
        raise TypeError(f"its pretraining is {kept['pretraining']!r}")
    return kept | _pixels(completed(values.get("preprocessing"), values.get("origin")))


# Hugging Face


def _hugging_face(values: dict[str, Any], checkpoint: Path, arch: str) -> dict[str, Any]:
    """A model's config.json, with the pixels that preprocessor_config.json says.

    Raises:
        _Foreign: it is of another model.
        _NotBuilt: it has other parts than the networks that are built here.
    """
    if "model_type" not in values:
        return {}
    if isinstance(values.get("vision_config"), dict):  # of images and texts
        values = values["vision_config"] | {"model_type": values["model_type"]}
    _require_this_network(values, arch)
    activation = _ACTIVATIONS.get(values["model_type"].partition("_")[0], {}).get(values.get("hidden_act"))
    odd = {
        "downsample_in_first_stage": values.get("downsample_in_first_stage", False) is not False,
        "hidden_act": activation is None and values.get("hidden_act") not in (None, _activation(values)),
        "qkv_bias": values.get("qkv_bias", True) is not True,
    }
    if wrong := [name for name, true in odd.items() if true]:
        raise _NotBuilt(f"says {wrong[0]}: {values[wrong[0]]!r}, which no network built here has")
    heads, eps = values.get("num_attention_heads"), values.get("layer_norm_eps")
    settings = {
        "heads": int(heads) if heads is not None else None,
        "activation": activation,
        "norm_eps": float(eps) if eps is not None else None,
        "stride_in_1x1": values.get("downsample_in_bottleneck"),
    }
    aside: dict[str, str] = {}
    for path in filter(os.path.lexists, map(checkpoint.with_name, _PROCESSORS)):
        try:
            if pixels := _processor(_contents(path), arch):
                return settings | pixels
        except _Foreign as error:
            aside[path.name] = str(error)
    settings |= _pixels_of_method(values["model_type"], arch)
    return settings | ({"warnings": _left_aside(aside, arch)} if aside else {})


def _processor(values: dict[str, Any], arch: str) -> dict[str, Any]:
    """What the settings of an image processor say; nothing where there are none. Raises _Foreign."""
    try:
        return _pixels(pixels_of(values, not isinstance(architecture(arch), Architecture)))
    except ForeignProcessor as error:
        raise _Foreign(str(error)) from None


_BEIT = replace(BICUBIC, mean=HALVES.mean, std=HALVES.std)
METHODS: dict[str, tuple[str, Preprocessing]] = {
    # whose pixels a model_type wants where no image processor says it; read from the method's own code
    "deit": ("DeiT", BICUBIC),  # facebookresearch/deit@012a100: datasets.py
    "vit_mae": ("MAE", BICUBIC),  # facebookresearch/mae@6a2ba40: main_linprobe.py
    "vit_msn": ("MSN", IMAGENET),  # facebookresearch/msn@5474d5f: logistic_eval.py
    "ijepa": ("I-JEPA", IMAGENET),  # facebookresearch/ijepa@52c1ae9: src/transforms.py
    "dinov2": ("DINOv2", BICUBIC),  # facebookresearch/dinov2@05c66df: dinov2/data/transforms.py
    "dinov2_with_registers": ("DINOv2", BICUBIC),
    "dinov3_vit": ("DINOv3", BICUBIC),  # facebookresearch/dinov3@1eac7fc: dinov3/data/transforms.py
    "dinov3_convnext": ("DINOv3", BICUBIC),
    "beit": ("BEiT", _BEIT),  # microsoft/unilm@03380c8: beit/datasets.py
    "data2vec-vision": ("data2vec", BICUBIC),  # facebookresearch/data2vec_vision@b8eddc6: beit/README.md
    "clip": ("CLIP", CLIP),
    "clip_vision_model": ("CLIP", CLIP),
    "siglip": ("SigLIP", HALVES_BICUBIC),  # huggingface/transformers 5.24: models/siglip/image_processing_siglip.py
    "siglip_vision_model": ("SigLIP", HALVES_BICUBIC),
    "swin": ("Swin", BICUBIC),  # microsoft/Swin-Transformer@055c506: data/build.py
    "swinv2": ("Swin", BICUBIC),
    "convnext": ("ConvNeXt", BICUBIC),  # facebookresearch/ConvNeXt@3344059: datasets.py
    "convnextv2": ("ConvNeXt", BICUBIC),
}


def _pixels_of_method(kind: Any, arch: str) -> dict[str, Any]:
    """Where no image processor says the pixels: those of the model's method, and that they were taken."""
    if kind not in METHODS:
        return {}
    method, pixels = METHODS[kind]
    shape = architecture(arch)
    pixels = pixels if isinstance(shape, Architecture) else sized(pixels, shape)
    taken = f"no {_PROCESSORS[1]} says its pixels; {method}'s own were taken for model_type {kind!r}. This settles it"
    return {"preprocessing": pixels, "pixel_doubt": Doubt(("interpolation", "mean", "std"), taken, pixels)}


def _activation(values: dict[str, Any]) -> str:
    """The only one that is built here, but for CLIP's and SigLIP's."""
    if values["model_type"] == "resnet":
        return "relu"
    return "silu" if values["model_type"] == "dinov3_vit" and values.get("use_gated_mlp") else "gelu"


_CLIPS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_ACTIVATIONS: dict[str, dict[Any, str]] = {"clip": _CLIPS, "siglip": _CLIPS, "siglip2": _CLIPS}  # to timm's names
VITS = ("vit", "deit", "vit_msn", "vit_mae", "vit_hybrid", "ijepa")  # model_type of networks with ViT's tensors


def _require_this_network(values: dict[str, Any], arch: str) -> None:
    """Raises _Foreign where model, depths or widths are others than the tensors'; _NotBuilt for oblong images."""
    kind, shape = values["model_type"], architecture(arch)
    if isinstance(shape, TimmNetwork):
        _require_this_transformer(values, shape)
        return
    if kind not in (VITS if isinstance(shape, VisionTransformer) else ("resnet",)):
        raise _Foreign(f"of a model {shown(kind)!r}")
    if isinstance(shape, VisionTransformer):
        sides = values.get("image_size")
        if isinstance(sides, list) and len(set(sides)) > 1:
            raise _NotBuilt(f"says image_size: {sides}, and only square images are cut here")
        ours: dict[str, Any] = {"hidden_size": shape.dim, "num_hidden_layers": shape.depth, "patch_size": shape.patch}
        ours |= {"intermediate_size": 4 * shape.dim, "image_size": shape.size}
    else:
        expansion = shape.block.expansion
        widths = [int(64 * 2**stage * shape.width) * expansion for stage in range(4)]
        ours = {"depths": list(shape.layers), "hidden_sizes": widths, "embedding_size": int(64 * shape.width)}
        ours |= {"layer_type": "bottleneck" if shape.block is Bottleneck else "basic"}
    for name, value in ours.items():
        there = values.get(name)
        there = there[0] if isinstance(there, list) and not isinstance(value, list) and len(set(there)) == 1 else there
        if there not in (None, value):
            raise _Foreign(f"of a {kind} with {name} {shown(there, 40)}, not {value}")


def _require_this_transformer(values: dict[str, Any], network: TimmNetwork) -> None:
    """The same for a transformer of timm's."""
    blocks = getattr(network.layers, "blocks", None)
    if blocks is None or "hidden_size" not in values:
        return
    ours = {"hidden_size": network.feature_dim, "num_hidden_layers": len(blocks)}
    for name, value in ours.items():
        if values.get(name) not in (None, value):
            raise _Foreign(f"of a {shown(values['model_type'], 40)} with {name} {shown(values[name], 40)}, not {value}")


# timm, detectron2


def _timm(values: dict[str, Any], arch: str) -> dict[str, Any]:
    """timm's `pretrained_cfg`.

    Raises:
        _Foreign: it is of another architecture.
        _NotBuilt: of this one, with strides that no network built here has.
    """
    settings = values.get("pretrained_cfg")
    if not isinstance(settings, dict) or "mean" not in settings:
        return {}
    told = _of_architecture(values["architecture"], arch) if "architecture" in values else {}
    arguments = values.get("model_args")
    if isinstance(arguments, dict) and arguments.get("output_stride", 32) != 32:
        raise _NotBuilt(f"says output_stride: {arguments['output_stride']!r}, which no network built here has")
    return _pixels(of_timm(settings)) | told


def _of_architecture(name: Any, arch: str) -> dict[str, Any]:
    """The heads of timm's architecture of that name, or a doubt where it may compute something else.

    Raises:
        _Foreign: it has other tensors.
    """
    import timm

    plain = name.partition(".")[0] if isinstance(name, str) else ""
    shape = architecture(arch)
    if plain == arch.removeprefix("timm:").partition(",")[0]:
        return {"heads": shape.heads} if isinstance(shape, VisionTransformer) else {}
    if not timm.is_model(plain):
        raise _Foreign(f"of an architecture {shown(name, 40)!r}")
    with torch.device("meta"):
        theirs = timm.create_model(plain, pretrained=False, num_classes=0)
    if {key: tensor.shape for key, tensor in theirs.state_dict().items()} != _shapes(arch):
        raise _Foreign(f"of a {plain}")
    if isinstance(shape, VisionTransformer):
        return {"heads": theirs.blocks[0].attn.num_heads}
    same = re.sub(r"^(tv|gluon|ssl|swsl|ig)_", "", plain)
    doubt = f"config.json says that it is a {plain}; its tensors look like {arch}"
    return {} if arch.startswith(same) else {"warnings": (doubt,)}


def _shapes(arch: str) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in expected(arch).items()}


def of_timm(settings: dict[str, Any]) -> dict[str, Any]:
    """timm's settings of a model's weights: the crop's side, and its share of the resize.

    Raises:
        ValueError: the images are not square, or resized or cut in another way than those built here.
    """
    *_, height, width = settings["input_size"]
    if height != width:
        raise _NotBuilt(f"says images of {height}x{width} pixels, and only square ones are cut here")
    size, mode = int(width), settings.get("crop_mode") or "center"
    interpolation = settings.get("interpolation") or "bicubic"  # timm's own default: timm/data/config.py
    if mode not in ("center", "squash"):
        raise ValueError(f"its crop_mode is {mode!r}, which pads images; only center and squash are cut here")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"its interpolation is {interpolation!r}; {' and '.join(INTERPOLATIONS)} are built here")
    return {
        "size": size,
        "resize": int(size / (settings.get("crop_pct") or 0.875)),
        "mean": settings["mean"],
        "std": settings["std"],
        "interpolation": interpolation,
        "squash": mode == "squash",
    }


def _detectron2(values: dict[str, Any], arch: str) -> dict[str, Any]:
    """The whole configuration that detectron2 leaves in its output folder.

    Raises:
        _Foreign: of a network of another depth.
    """
    if "MODEL" not in values:
        return {}
    depth = values["MODEL"].get("RESNETS", {}).get("DEPTH")
    if depth is not None and str(depth) not in re.findall(r"\d+", arch):
        raise _Foreign(f"of a ResNet-{shown(depth, 40)}")
    model, channels = values["MODEL"], values["INPUT"]["FORMAT"]
    pixels = {"mean": model["PIXEL_MEAN"], "std": model["PIXEL_STD"], "channels": channels, "range": 255}
    return _pixels(pixels) | {"stride_in_1x1": bool(model["RESNETS"]["STRIDE_IN_1X1"])}
