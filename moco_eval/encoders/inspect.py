"""What there is to know about a checkpoint, for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.fingerprint import activations_sha256, probe_features
from moco_eval.encoders.head import head_shape
from moco_eval.encoders.load import load
from moco_eval.encoders.network import Stage
from moco_eval.preprocessing import BANDS


def describe(
    source: str,
    arch: str | None = None,
    encoder: str | None = None,
    key: str | None = None,
    pixels: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything about CHECKPOINT; raises what `load` raises."""
    loaded = load(source, arch, encoder, key=key, pixels=pixels)
    activations = probe_features(loaded)
    return {
        **loaded.record(),
        "network": _network(loaded),
        "parameters": sum(parameter.numel() for parameter in loaded.backbone.parameters()),
        "feature_dim": activations.shape[1],
        "head": head_shape(loaded.head),
        "dropped": loaded.dropped,
        "activations": {"sha256": activations_sha256(activations), "first": activations[0, :4].tolist()},
    }


def _network(loaded: Encoder) -> dict[str, str]:
    """The images that a network takes and its stages, in words."""
    if loaded.arch == "pixels":
        return {"images": "of any channels and size", "stages": ""}
    network = loaded.network
    channels = f"{network.in_channels} channel{'s' if network.in_channels != 1 else ''}"
    size = f"{network.size}x{network.size} pixels" if network.size else "any size"
    return {"images": f"{channels}, {size}", "stages": _stages(network.stages)}


def _stages(stages: Sequence[Stage]) -> str:
    """Names, strides and channels: 'layer1 (stride 4, 256 channels), ...'; a transformer's, all alike, at once."""
    if len(stages) > 1 and len({(stage.stride, stage.channels) for stage in stages}) == 1:
        first, last = stages[0], stages[-1]
        return f"{first.name} to {last.name} (stride {first.stride}, {first.channels} channels)"
    return ", ".join(f"{stage.name} (stride {stage.stride}, {stage.channels} channels)" for stage in stages)


def format_description(facts: dict[str, Any]) -> str:
    """Lines for the terminal."""
    lines = [
        f"{facts['path']}",
        f"  origin         {facts['origin']}",
        f"  architecture   {facts['arch']}, {facts['parameters'] / 1e6:.2f} M parameters, "
        f"{facts['feature_dim']}-d pooled feature",
        f"  pooled feature {facts['pooling']}",
        f"  images         {facts['network']['images']}",
        f"  stages         {facts['network']['stages'] or 'none'}",
        f"  loaded         all {facts['tensors_loaded']} backbone tensors, {facts['which']} encoder",
        f"  head           {facts['head'] or 'none'}",
        f"  preprocessing  {_preprocessing(facts['preprocessing'])}",
        f"  pretraining    {_pretraining(facts['pretraining'])}",
        f"  sha256         {facts['sha256']}",
        f"  activations    {facts['activations']['sha256'][:16]}  "
        + " ".join(f"{value:.4g}" for value in facts["activations"]["first"]),
        *(f"  left out       {part}: {reason}" for part, reason in facts["dropped"]),
        *(f"  warning        {warning}" for warning in facts["warnings"]),
    ]
    return "\n".join(lines)


def _preprocessing(values: dict[str, Any] | None) -> str:
    if values is None:
        return "not said; the data set's own is used"
    numbers = {name: ", ".join(f"{value:g}" for value in values[name]) for name in ("mean", "std")}
    if values["channels"] == BANDS:
        pixels = f"{len(values['mean'])} bands in the units in which they are stored"
    else:
        pixels = f"{values['channels']} in 0..{values['range']}"
    return f"{pixels}, mean {numbers['mean']}, std {numbers['std']}, {_resize(values)}, crop {values['size']}"


def _resize(values: dict[str, Any]) -> str:
    sides = f"{values['resize']}x{values['resize']}" if values["squash"] else values["resize"]
    return f"{values['interpolation']} resize to {sides}{'' if values['antialias'] else ' without antialiasing'}"


def _pretraining(values: dict[str, Any] | None) -> str:
    if values is None:
        return "not said"
    dataset = values.get("dataset")
    name = dataset.get("name") if isinstance(dataset, dict) else dataset
    parts = [values.get("protocol"), f"on {name}" if name else None, f"{values.get('epochs', 'unknown')} epochs"]
    return ", ".join(str(part) for part in parts if part)
