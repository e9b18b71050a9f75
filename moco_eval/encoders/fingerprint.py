"""One generated picture, by whose features two people can tell whether they hold the same network."""

import hashlib

import torch

from moco_eval.encoders.architectures import AnyArchitecture, architecture
from moco_eval.encoders.encoder import Encoder

PROBE_SIZE = 64


def probe_image(arch: AnyArchitecture | None = None) -> torch.Tensor:
    """A fixed picture of waves, (1, C, size, size), values in -1..1; of the size and channels that a network takes."""
    size, channels = (PROBE_SIZE, 3) if arch is None else (arch.size or PROBE_SIZE, arch.channels)
    line = torch.linspace(0, 6.2832, size, dtype=torch.float64)
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    waves = [torch.sin(3 * rows + 2 * columns), torch.cos(5 * columns), torch.sin(7 * rows * columns / 6)]
    return torch.stack([waves[channel % 3] for channel in range(channels)]).float()[None]


@torch.no_grad()
def probe_features(encoder: Encoder) -> torch.Tensor:
    """Pooled feature of the fixed picture, (1, D), whatever the preprocessing: two people can compare theirs."""
    arch = architecture(encoder.arch) if encoder.tensors_loaded else None
    return encoder.backbone.eval()(probe_image(arch)).flatten(1)


def activations_sha256(features: torch.Tensor) -> str:
    """Of the features at 3 significant digits, so that machines that round differently agree as a rule."""
    return hashlib.sha256(" ".join(f"{value:.2e}" for value in features.flatten().tolist()).encode()).hexdigest()
