"""What transformers' image processors say of a network's pixels: preprocessor_config.json, processor_config.json."""

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from moco_eval.encoders.layouts import CLIP, HALVES, HALVES_BICUBIC, IMAGENET
from moco_eval.preprocessing import INTERPOLATIONS, Preprocessing
from moco_eval.untrusted.pickle_scan import shown


class ForeignProcessor(ValueError):
    """The processor of another kind of network, in words that follow the file's name."""


@dataclass(frozen=True)
class Processor:
    """A class of image processors: what it does where its file does not say.

    Attributes:
        pixels: its mean, standard deviation, interpolation, size and whether it squashes.
        square: a plain number is both sides, not the shorter one.
        crop: it cuts the centre.
        convolutional: ResNets have it too.
    """

    pixels: Preprocessing
    square: bool = True
    crop: bool = False
    convolutional: bool = True


# huggingface/transformers 5.24: models/*/image_processing_*.py
_VIT, _WHOLE = Processor(HALVES), replace(HALVES_BICUBIC, squash=False)
PROCESSORS = {
    "ViT": _VIT,
    "ViTHybrid": Processor(_WHOLE, square=False, crop=True),
    "DeiT": Processor(replace(HALVES_BICUBIC, resize=256), crop=True),
    "ConvNext": Processor(replace(_WHOLE, size=384, resize=384), square=False),
    "Bit": Processor(CLIP, square=False, crop=True),
    "DINOv3ViT": Processor(replace(HALVES, mean=IMAGENET.mean, std=IMAGENET.std)),
    "ResNet": _VIT,
    "AutoImage": _VIT,
    "Base": _VIT,
    "CLIP": Processor(CLIP, square=False, crop=True, convolutional=False),
    "Beit": Processor(HALVES_BICUBIC, convolutional=False),
    "Siglip": Processor(HALVES_BICUBIC, square=False, convolutional=False),
}
RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's numbers
_ENDING = r"(FeatureExtractor|ImageProcessor)(Fast|Pil)?$"


def pixels_of(values: dict[str, Any], transformer: bool) -> dict[str, Any] | None:
    """A Preprocessing as plain values; None where nothing is said of pixels.

    Args:
        values: the file's, whose image processor may stand under `image_processor`.
        transformer: whether the network is a ViT; some processors are of no other.
    Raises:
        ForeignProcessor: it is another kind of network's.
        ValueError: it does what is not built here.
    """
    values = values.get("image_processor", values)
    kind = values.get("image_processor_type", values.get("feature_extractor_type"))
    processor = _known(kind, transformer) if isinstance(kind, str) else _VIT
    if not isinstance(kind, str):
        if "image_mean" not in values:
            return None
        if "image_std" not in values:
            raise ValueError("it has an image_mean and no image_std")
    _require_built(values)
    size, resize, squash = _cut(values, processor, kind)
    mean, std = _statistics(values, processor.pixels)
    return {
        "size": size,
        "resize": resize,
        "mean": mean,
        "std": std,
        "channels": "BGR" if values.get("do_flip_channel_order") is True else "RGB",
        "range": 255 if values.get("do_rescale") is False else 1,
        "interpolation": _interpolation(values.get("resample"), processor.pixels.interpolation),
        "squash": squash,
    }


def _known(kind: str, transformer: bool) -> Processor:
    """Raises ForeignProcessor for a kind that no network built here has."""
    processor = PROCESSORS.get(re.sub(_ENDING, "", kind))
    if processor is None or not (transformer or processor.convolutional):
        raise ForeignProcessor(f"a {shown(kind, 40)}'s")
    return processor


def _require_built(values: dict[str, Any]) -> None:
    """Raises ValueError where images are not resized, or are padded."""
    if values.get("do_resize") is False:
        raise ValueError("its do_resize is False: it takes images of any size, and here all are resized to one size")
    if values.get("do_pad") is True:
        raise ValueError("its do_pad is True, and images are not padded here")


def _cut(values: dict[str, Any], processor: Processor, kind: Any) -> tuple[int, int, bool]:
    """Pixels of the crop, of the resize, and whether the resize squashes."""
    if "size" in values:
        resize, squash = _side(values["size"]), _is_square(values["size"], processor)
    else:
        resize, squash = processor.pixels.resize, processor.pixels.squash
    if values.get("crop_pct") or (isinstance(kind, str) and kind.startswith("ConvNext")):
        if resize >= 384:  # warped whole
            return resize, resize, True
        return resize, int(resize / (values.get("crop_pct") or 224 / 256)), False
    if values.get("do_center_crop", processor.crop):
        return _side(values.get("crop_size", processor.pixels.size)), resize, squash
    return resize, resize, squash


def _is_square(size: Any, processor: Processor) -> bool:
    """Whether a resize has both sides given."""
    return "shortest_edge" not in size if isinstance(size, dict) else processor.square


def _side(value: Any) -> int:
    """Raises ValueError for what is no side of a square, nor a shorter side."""
    side = value
    if isinstance(value, dict):
        side = value.get("shortest_edge", value.get("height"))
        if "shortest_edge" not in value and value.get("width", side) != side:
            raise ValueError(f"its size {value!r} is not square, and only square images are cut here")
    if type(side) is not int:
        raise ValueError(f"its size {value!r} is not a number and has neither a shortest_edge nor a height")
    return side


def _interpolation(resample: Any, usual: str) -> str:
    """Raises ValueError for one that is not built here."""
    number = type(resample) is int and 0 <= resample < len(RESAMPLE)
    name = usual if resample is None else RESAMPLE[resample] if number else resample
    if name not in INTERPOLATIONS:
        means = f" ({name})" if number else ""
        raise ValueError(f"its resample is {resample!r}{means}; 2 (bilinear) and 3 (bicubic) are built here")
    return str(name)


def _statistics(values: dict[str, Any], usual: Preprocessing) -> tuple[Any, Any]:
    """Mean and standard deviation of pixels of 0..1, or of 0..255 where they are not rescaled."""
    if values.get("do_normalize") is False:
        mean, std = [0.0] * 3, [1.0] * 3
    else:
        mean, std = (_numbers(values.get(f"image_{name}", getattr(usual, name))) for name in ("mean", "std"))
    factor = 255 * values.get("rescale_factor", 1 / 255)
    if values.get("do_rescale") is False or math.isclose(factor, 1):
        return mean, std
    return [value / factor for value in mean], [value / factor for value in std]


def _numbers(value: Any) -> Any:
    """A single number stands for the three channels."""
    return [value] * 3 if type(value) in (int, float) else value
