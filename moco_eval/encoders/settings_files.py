"""What files of settings beside a checkpoint say about its network: our own, Hugging Face's, timm's, detectron2's."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moco_eval.errors import InputError
from moco_eval.preprocessing import Preprocessing
from moco_eval.runtime import files


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


def settings_beside(checkpoint: Path, sha256: str, origin: str) -> FileSettings | None:
    """What a file of settings in the same folder says; None where there is none for this layout.

    Args:
        sha256: the checkpoint's; ours names the copy that it belongs to.
        origin: the checkpoint's layout.
    Raises:
        InputError: such a file that cannot be read, makes no sense, or tells of a network that is not built here.
    """
    for name, fits, read in _files(checkpoint, sha256):
        path = checkpoint.with_name(name)
        if not path.is_file() or not fits(origin):
            continue
        try:
            settings = {key: value for key, value in read(_contents(path)).items() if value is not None}
        except (InputError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: {error}; correct it, or move it away to go without") from None
        if settings:
            return FileSettings(name, **settings)
    return None


def _files(checkpoint: Path, sha256: str) -> list[tuple[str, Callable[[str], bool], Callable[[dict], dict]]]:
    """Names of files of settings, the layouts they are for, and their readers; the first that says anything counts."""
    plain = ("timm ViT", "torchvision or timm ResNet", "a state dict under")

    def a_copy(origin: str) -> bool:
        return not origin.startswith("moco-eval")  # whose files say it themselves

    def hugging_face(origin: str) -> bool:
        return origin.startswith(("Hugging Face", *plain))

    def timm(origin: str) -> bool:
        return origin.startswith(plain)

    def detectron2(origin: str) -> bool:
        return origin == "detectron2"

    return [
        (f"{checkpoint.name}.json", a_copy, lambda values: _ours(values, sha256)),
        ("config.json", timm, _timm),
        ("config.json", hugging_face, lambda values: _hugging_face(values, checkpoint)),
        ("preprocessor_config.json", hugging_face, lambda values: _pixels(_processor(values))),
        ("config.yaml", detectron2, _detectron2),
    ]


def _contents(path: Path) -> dict[str, Any]:
    if path.suffix == ".json":
        values = files.read_json(path)
    else:
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            raise InputError(f"is not readable YAML ({str(error).splitlines()[0]})") from None
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


def _hugging_face(values: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """A model's config.json, with the pixels that preprocessor_config.json says.

    Raises:
        InputError: a network with other parts than those that are built here.
    """
    if "model_type" not in values:
        return {}
    odd = {
        "downsample_in_first_stage": values.get("downsample_in_first_stage", False) is not False,
        "hidden_act": values.get("hidden_act") not in (None, "relu" if values["model_type"] == "resnet" else "gelu"),
        "embedding_size": values["model_type"] == "resnet" and values.get("embedding_size", 64) != 64,
        "qkv_bias": values.get("qkv_bias", True) is not True,
    }
    if wrong := [name for name, true in odd.items() if true]:
        raise InputError(f"says {wrong[0]}: {values[wrong[0]]!r}, which no network built here has")
    heads, eps = values.get("num_attention_heads"), values.get("layer_norm_eps")
    settings = {
        "heads": int(heads) if heads is not None else None,
        "norm_eps": float(eps) if eps is not None else None,
        "stride_in_1x1": values.get("downsample_in_bottleneck"),
    }
    processor = checkpoint.with_name("preprocessor_config.json")
    return settings | (_pixels(_processor(_contents(processor))) if processor.is_file() else {})


def _processor(values: dict[str, Any]) -> dict[str, Any] | None:
    """Of an image processor: the shorter side or a square, then perhaps a centre crop."""
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


def _timm(values: dict[str, Any]) -> dict[str, Any]:
    """timm's `pretrained_cfg`."""
    settings = values.get("pretrained_cfg")
    return _pixels(of_timm(settings)) if isinstance(settings, dict) and "mean" in settings else {}


def of_timm(settings: dict[str, Any]) -> dict[str, Any]:
    """timm's settings of a model's weights: the crop's side, and its share of the resize."""
    size, mean, std = int(settings["input_size"][-1]), settings["mean"], settings["std"]
    return {"size": size, "resize": int(size / settings.get("crop_pct", 0.875)), "mean": mean, "std": std}


def _detectron2(values: dict[str, Any]) -> dict[str, Any]:
    """The whole configuration that detectron2 leaves in its output folder."""
    model, channels = values["MODEL"], values["INPUT"]["FORMAT"]
    pixels = {"mean": model["PIXEL_MEAN"], "std": model["PIXEL_STD"], "channels": channels, "range": 255}
    return _pixels(pixels) | {"stride_in_1x1": bool(model["RESNETS"]["STRIDE_IN_1X1"])}
