"""What every evaluation takes: a proven backbone, and all that must travel with it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from moco_eval.encoders.architectures import architecture
from moco_eval.encoders.network import Network, network_of
from moco_eval.preprocessing import Preprocessing


@dataclass
class Encoder:
    """A loaded encoder with the proof of its load.

    Attributes:
        source: the CHECKPOINT argument as the user gave it.
        run_name: short name for folders and tables ('moco_v2_r50', 'random-resnet18').
        arch: a name that `architectures.architecture` knows, or 'pixels'.
        backbone: (N, C, H, W) to pooled features (N, feature_dim); a ResNet with torchvision's module names, `fc` the
            identity, or a network of timm's.
        feature_dim: length of the pooled feature.
        head: the projection head on the pooled feature, (N, feature_dim) to (N, dim); None where there is none.
        origin: the layout it was recognised as, such as 'facebookresearch/moco v2'.
        sha256: of the checkpoint file's bytes; of the weights themselves for `random:` and `torchvision:`.
        tensors_loaded: how many backbone tensors were matched: all of them.
        path: the file it was read from; None where there is none.
        key: of several networks in that file, the one that was asked for; None where nobody chose.
        taken: 'query' or 'key' (the momentum encoder): the part of that file.
        which: the same, or for a copy that `convert` wrote, what it was made of.
        usual: which of them the method's own evaluation takes.
        dropped: (part, reason) of each group of tensors in the file that the backbone does not use.
        warnings: doubts, in words.
        preprocessing: what the weights expect; None where the checkpoint does not say (`random:`).
        pretraining: protocol, dataset, epochs, config, deviations of the run that made it, where it says.
        norm_eps: of a ViT's layer norms, where it is not timm's.
        settings: the file beside the checkpoint that told of it, if one did.
        pixels: what the user chose of the preprocessing (`--pixels`).
        open_pixels: what of the preprocessing nothing tells, so that choosing it deviates from nothing.
        pixel_deviations: where the chosen pixels are others than the method's own, in words.
        wrapped: whether the backbone is somebody's network in memory; see `wrap.wrap`.
    """

    source: str
    run_name: str
    arch: str
    backbone: nn.Module = field(repr=False)
    feature_dim: int
    head: nn.Module | None = field(repr=False)
    origin: str
    sha256: str
    tensors_loaded: int
    path: Path | None = None
    key: str | None = None
    taken: str = "query"
    which: str = "query"
    usual: str = "query"
    dropped: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    preprocessing: Preprocessing | None = None
    pretraining: dict[str, Any] | None = None
    norm_eps: float | None = None
    settings: str | None = None
    pixels: dict[str, Any] | None = None
    open_pixels: tuple[str, ...] = ()
    pixel_deviations: list[str] = field(default_factory=list)
    wrapped: bool = False

    @property
    def network(self) -> Network:
        """The backbone with what may be asked of it."""
        known = self.tensors_loaded and not self.wrapped
        channels = self.preprocessing.in_channels if self.preprocessing else 3
        return network_of(self.backbone, architecture(self.arch) if known else None, channels)

    def record(self) -> dict[str, Any]:
        """The `encoder` part of a result record."""
        return {
            "path": self.source,
            "sha256": self.sha256,
            "origin": self.origin,
            "arch": self.arch,
            "pooling": self.network.pooling,
            "which": self.which,
            "tensors_loaded": self.tensors_loaded,
            "warnings": self.warnings,
            "preprocessing": self.preprocessing.to_dict() if self.preprocessing else None,
            "norm_eps": self.norm_eps,
            "pretraining": self.pretraining,
            **({"key": self.key} if self.key else {}),
            **({"pixels": self.pixels} if self.pixels else {}),
        }

    def identity(self) -> dict[str, Any]:
        """What tells its runs from those of another."""
        record, names = self.record(), ["norm_eps"] if self.settings else []
        if self.settings or self.pixels or (self.preprocessing and self.preprocessing.interpolation != "bilinear"):
            names.append("preprocessing")
        chosen = {"key": self.key} if self.key else {}
        about = {name: record[name] for name in names}
        return {"sha256": self.sha256, "arch": self.arch, "which": self.which, **chosen, **about}

    def deviations(self) -> list[str]:
        """What an evaluation inherits from it, in words."""
        other = [f"the {self.which} encoder instead of the {self.usual} encoder"] if self.which != self.usual else []
        return [*other, *self.pixel_deviations, *self._of_pretraining("deviations")]

    def equivalences(self) -> list[str]:
        """What an evaluation inherits from it that was shown to be harmless, in words."""
        return self._of_pretraining("equivalences")

    def _of_pretraining(self, kind: str) -> list[str]:
        return [f"encoder: {sentence}" for sentence in (self.pretraining or {}).get(kind, [])]
