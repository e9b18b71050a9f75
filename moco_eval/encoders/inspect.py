"""What there is to know about a checkpoint, for the terminal."""

import hashlib
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.load import load

PROBE_SIZE = 64


def describe(source: str, arch: str | None = None, encoder: str = "query") -> dict[str, Any]:
    """Everything about CHECKPOINT; raises what `load` raises."""
    loaded = load(source, arch, encoder)
    activations = probe_features(loaded)
    return {
        **loaded.record(),
        "encoder": encoder,
        "parameters": sum(parameter.numel() for parameter in loaded.backbone.parameters()),
        "feature_dim": activations.shape[1],
        "head": head_shape(loaded.head),
        "dropped": loaded.dropped,
        "warnings": loaded.warnings,
        "preprocessing": asdict(loaded.preprocessing) if loaded.preprocessing else None,
        "activations": {"sha256": activations_sha256(activations), "first": activations[0, :4].tolist()},
    }


def head_shape(head: nn.Module | None) -> str | None:
    """Such as '2048-2048-128'."""
    if head is None:
        return None
    layers = [layer for layer in head.modules() if isinstance(layer, nn.Linear)]
    return "-".join(str(size) for size in (layers[0].in_features, *(layer.out_features for layer in layers)))


def probe_image(size: int) -> torch.Tensor:
    """A fixed, generated picture of waves in three colours, (1, 3, size, size), values in -1..1."""
    line = torch.linspace(0, 6.2832, size, dtype=torch.float64)
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    waves = [torch.sin(3 * rows + 2 * columns), torch.cos(5 * columns), torch.sin(7 * rows * columns / 6)]
    return torch.stack(waves).float()[None]


@torch.no_grad()
def probe_features(encoder: Encoder) -> torch.Tensor:
    """Pooled feature of the fixed picture, (1, D), whatever the preprocessing: two people can compare theirs."""
    return encoder.backbone.eval()(probe_image(PROBE_SIZE)).flatten(1)


def activations_sha256(features: torch.Tensor) -> str:
    """Of the features at 3 significant digits, so that machines that round differently agree as a rule."""
    return hashlib.sha256(" ".join(f"{value:.2e}" for value in features.flatten().tolist()).encode()).hexdigest()


def format_description(facts: dict[str, Any]) -> str:
    """Lines for the terminal."""
    lines = [
        f"{facts['path']}",
        f"  origin         {facts['origin']}",
        f"  architecture   {facts['arch']}, {facts['parameters'] / 1e6:.2f} M parameters, "
        f"{facts['feature_dim']}-d pooled feature",
        f"  loaded         all {facts['tensors_loaded']} backbone tensors, {facts['encoder']} encoder",
        f"  head           {facts['head'] or 'none'}",
        f"  preprocessing  {_preprocessing(facts['preprocessing'])}",
        f"  pretraining    {_pretraining(facts['pretraining'])}",
        f"  sha256         {facts['sha256']}",
        f"  activations    {facts['activations']['sha256'][:16]}  "
        + " ".join(f"{value:.4g}" for value in facts["activations"]["first"]),
        *(f"  left out       {what}: {why}" for what, why in facts["dropped"]),
        *(f"  warning        {words}" for words in facts["warnings"]),
    ]
    return "\n".join(lines)


def _preprocessing(values: dict[str, Any] | None) -> str:
    if values is None:
        return "not said; the data set's own is taken"
    numbers = {name: ", ".join(f"{value:g}" for value in values[name]) for name in ("mean", "std")}
    return (
        f"{values['channels']} in 0..1, mean {numbers['mean']}, std {numbers['std']}, "
        f"resize {values['resize']}, crop {values['size']}"
    )


def _pretraining(said: dict[str, Any] | None) -> str:
    if said is None:
        return "not said"
    dataset = said.get("dataset")
    name = dataset.get("name") if isinstance(dataset, dict) else dataset
    parts = [said.get("protocol"), f"on {name}" if name else None, f"{said.get('epochs', 'unknown')} epochs"]
    return ", ".join(str(part) for part in parts if part)
