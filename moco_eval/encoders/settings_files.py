"""What files of settings beside a checkpoint say about its network: our own, Hugging Face's, timm's, detectron2's."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchvision.models.resnet import Bottleneck

from moco_eval.config import yaml_read
from moco_eval.encoders.architectures import TimmNetwork, VisionTransformer, architecture
from moco_eval.encoders.infer import expected
from moco_eval.errors import InputError
from moco_eval.preprocessing import Preprocessing
from moco_eval.runtime import files
from moco_eval.untrusted.pickle_scan import shown


@dataclass(frozen=True)
class FileSettings:
    """What no tensor's shape tells; None where the file does not say.

    Attributes:
        name: the file.
        preprocessing: what the weights expect.
        arch: the architecture's name (ours alone says it).
        heads: of a ViT's attention.
        norm_eps: of its layer norms.
        stride_in_1x1: a bottleneck strides in its first convolution.
        which, usual: the encoder that a copy was made of, and the one that its method evaluates (ours).
        pretraining: what the copy's source said of it (ours).
        warnings: doubts, in words: files of settings that are another network's.
    """

    name: str
    preprocessing: Preprocessing | None = None
    arch: str | None = None
    heads: int | None = None
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
        if name == _PROCESSOR and "config.json" in aside:
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
            raise InputError(f"{path}: {error}; correct it, or move it away to go without") from None
        if settings:
            doubts = settings.pop("warnings", ())
            return FileSettings(name, **settings, warnings=(*_left_aside(aside, arch), *doubts))
    return FileSettings("", warnings=_left_aside(aside, arch))


def _left_aside(aside: dict[str, str], arch: str) -> tuple[str, ...]:
    return tuple(f"{name} beside it is {why}, and this a {arch}: it was left aside" for name, why in aside.items())


_PROCESSOR = "preprocessor_config.json"
_File = tuple[str, Callable[[str], bool], Callable[[dict], dict]]


def _files(checkpoint: Path, sha256: str, arch: str) -> list[_File]:
    """Names of files of settings, the layouts they are for, and their readers; the first that says anything counts."""
    plain = ("timm ViT", "torchvision or timm ResNet", "a state dict under")

    def a_copy(origin: str) -> bool:
        return not origin.startswith("moco-eval")  # whose files say it themselves

    def hugging_face(origin: str) -> bool:
        return origin.startswith(("Hugging Face", *plain))

    def timm(origin: str) -> bool:
        return origin.startswith(plain)

    def detectron2(origin: str) -> bool:
        return origin.partition(",")[0] == "detectron2"

    return [
        (f"{checkpoint.name}.json", a_copy, lambda values: _ours(values, sha256)),
        ("config.json", timm, lambda values: _timm(values, arch)),
        ("config.json", hugging_face, lambda values: _hugging_face(values, checkpoint, arch)),
        (_PROCESSOR, hugging_face, lambda values: _pixels(_processor(values))),
        ("config.yaml", detectron2, lambda values: _detectron2(values, arch)),
    ]


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
    return kept | _pixels(values.get("preprocessing"))


# Hugging Face


def _hugging_face(values: dict[str, Any], checkpoint: Path, arch: str) -> dict[str, Any]:
    """A model's config.json, with the pixels that preprocessor_config.json says.

    Raises:
        _Foreign: it is of another model.
        _NotBuilt: it has other parts than the networks that are built here.
    """
    if "model_type" not in values:
        return {}
    _require_this_network(values, arch)
    odd = {
        "downsample_in_first_stage": values.get("downsample_in_first_stage", False) is not False,
        "hidden_act": values.get("hidden_act") not in (None, "relu" if values["model_type"] == "resnet" else "gelu"),
        "qkv_bias": values.get("qkv_bias", True) is not True,
    }
    if wrong := [name for name, true in odd.items() if true]:
        raise _NotBuilt(f"says {wrong[0]}: {values[wrong[0]]!r}, which no network built here has")
    heads, eps = values.get("num_attention_heads"), values.get("layer_norm_eps")
    settings = {
        "heads": int(heads) if heads is not None else None,
        "norm_eps": float(eps) if eps is not None else None,
        "stride_in_1x1": values.get("downsample_in_bottleneck"),
    }
    processor = checkpoint.with_name(_PROCESSOR)
    if not os.path.lexists(processor):
        return settings
    try:
        return settings | _pixels(_processor(_contents(processor)))
    except _Foreign as error:
        return settings | {"warnings": _left_aside({_PROCESSOR: str(error)}, arch)}


VITS = ("vit", "deit", "vit_msn", "vit_mae", "vit_hybrid", "ijepa")  # model_type of networks with ViT's tensors


def _require_this_network(values: dict[str, Any], arch: str) -> None:
    """Raises _Foreign where model, depths or widths are others than the tensors'; _NotBuilt for oblong images."""
    kind, shape = values["model_type"], architecture(arch)
    if isinstance(shape, TimmNetwork):
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


def _processor(values: dict[str, Any]) -> dict[str, Any] | None:
    """Of an image processor: the shorter side or a square, then perhaps a centre crop."""
    kind = values.get("image_processor_type", values.get("feature_extractor_type"))
    if isinstance(kind, str) and not re.match(r"(ViT|DeiT|ConvNext|Bit|ResNet|AutoImage|Base)", kind):
        raise _Foreign(f"a {shown(kind, 40)}'s")
    if "image_mean" not in values:
        return None
    if values.get("do_normalize") is False:
        values = values | {"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
    resize = _side(values.get("size", 224))
    size = _side(values["crop_size"]) if values.get("do_center_crop") and "crop_size" in values else resize
    if values.get("crop_pct"):  # ConvNext's processor: crop from a resize by its inverse
        size, resize = resize, round(resize / values["crop_pct"])
    bgr = values.get("do_flip_channel_order") is True
    whole = values.get("do_rescale") is False
    return {
        "size": size,
        "resize": resize,
        "mean": values["image_mean"],
        "std": values["image_std"],
        "channels": "BGR" if bgr else "RGB",
        "range": 255 if whole else 1,
    }


def _side(value: Any) -> int:
    if isinstance(value, dict):
        value = value.get("shortest_edge", value.get("height"))
    if type(value) is not int:
        raise ValueError(f"its size {value!r} is neither a number nor has it a shortest_edge or a height")
    return value


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
    if plain == arch:
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
        ValueError: the images are not square.
    """
    *_, height, width = settings["input_size"]
    if height != width:
        raise _NotBuilt(f"says images of {height}x{width} pixels, and only square ones are cut here")
    size, mean, std = int(width), settings["mean"], settings["std"]
    return {"size": size, "resize": int(size / (settings.get("crop_pct") or 0.875)), "mean": mean, "std": std}


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
