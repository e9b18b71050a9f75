"""What the weights expect, where a file of settings beside the checkpoint says it (Hugging Face, timm)."""

from pathlib import Path
from typing import Any

from moco_eval import files
from moco_eval.encoders.encoder import Preprocessing
from moco_eval.errors import InputError


def preprocessing_beside(checkpoint: Path) -> tuple[Preprocessing, str] | None:
    """The preprocessing, and the file that says it; None where no file does.

    Hugging Face writes `preprocessor_config.json`, timm a `pretrained_cfg` in `config.json`.
    Raises:
        InputError: such a file that cannot be read or makes no sense.
    """
    for name, read in (("preprocessor_config.json", _hugging_face), ("config.json", _timm)):
        path = checkpoint.parent / name
        if not path.is_file():
            continue
        values = files.read_json(path)
        try:
            said = read(values) if isinstance(values, dict) else None
            if said is not None:
                return Preprocessing.from_dict(said), name
        except (InputError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: {error}; correct it, or move it away to go without") from None
    return None


def _hugging_face(values: dict[str, Any]) -> dict[str, Any] | None:
    """Of an image processor: the shorter side or a square, then perhaps a centre crop."""
    if "image_mean" not in values:
        return None
    resize = _side(values.get("size", 224))
    size = _side(values["crop_size"]) if values.get("do_center_crop") and "crop_size" in values else resize
    if values.get("crop_pct"):  # ConvNext's processor: crop from a resize by its inverse
        size, resize = resize, round(resize / values["crop_pct"])
    return {"size": size, "resize": resize, "mean": values["image_mean"], "std": values["image_std"]}


def _side(value: Any) -> int:
    if isinstance(value, dict):
        value = value.get("shortest_edge", value.get("height"))
    return int(value)


def _timm(values: dict[str, Any]) -> dict[str, Any] | None:
    """Of timm's `pretrained_cfg`."""
    said = values.get("pretrained_cfg")
    return of_timm(said) if isinstance(said, dict) and "mean" in said else None


def of_timm(said: dict[str, Any]) -> dict[str, Any]:
    """timm's settings of a model's weights: the crop's side, and its share of the resize."""
    size = int(said["input_size"][-1])
    return {"size": size, "resize": int(size / said.get("crop_pct", 0.875)), "mean": said["mean"], "std": said["std"]}
