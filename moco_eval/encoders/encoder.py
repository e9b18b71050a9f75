"""What every evaluation takes: a proven backbone, and all that must travel with it."""

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """What the network expects: RGB in 0..1, less `mean`, over `std`; `size` pixels cut from a resize to `resize`."""

    size: int = 224
    resize: int = 256
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    channels: str = "RGB"

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as they come back from a file."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessing":
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


@dataclass
class Encoder:
    """A loaded encoder with the proof of its load.

    Attributes:
        source: the CHECKPOINT argument as the user gave it.
        run_name: short name for folders and tables ('moco_v2_r50', 'random-resnet18').
        arch: a key of `build.ARCHITECTURES`, or 'pixels'.
        backbone: (N, 3, H, W) to pooled features (N, feature_dim); torchvision's module names, `fc` the identity.
        feature_dim: length of the pooled feature.
        head: the projection head on the pooled feature, (N, feature_dim) to (N, dim); None where there is none.
        origin: the layout it was recognised as, such as 'facebookresearch/moco v2'.
        sha256: of the checkpoint file's bytes; of the weights themselves for `random:` and `torchvision:`.
        tensors_loaded: how many backbone tensors were matched: all of them.
        which: 'query' or 'key' (MoCo's momentum encoder).
        dropped: (what, why) of each group of tensors in the file that the backbone does not use.
        warnings: doubts, in words.
        preprocessing: what the weights expect; None where the checkpoint does not say (`random:`).
        pretraining: protocol, dataset, epochs, config, deviations of the run that made it, where it says.
    """

    source: str
    run_name: str
    arch: str
    backbone: nn.Module
    feature_dim: int
    head: nn.Module | None
    origin: str
    sha256: str
    tensors_loaded: int
    which: str = "query"
    dropped: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    preprocessing: Preprocessing | None = None
    pretraining: dict[str, Any] | None = None

    def record(self) -> dict[str, Any]:
        """The `encoder` part of a result record."""
        return {
            "path": self.source,
            "sha256": self.sha256,
            "origin": self.origin,
            "arch": self.arch,
            "which": self.which,
            "tensors_loaded": self.tensors_loaded,
            "warnings": self.warnings,
            "pretraining": self.pretraining,
        }

    def identity(self) -> dict[str, str]:
        """What tells its runs from those of another."""
        return {"sha256": self.sha256, "arch": self.arch, "which": self.which}

    def deviations(self) -> list[str]:
        """What an evaluation inherits from it, in words."""
        key = ["the key encoder instead of the query encoder"] if self.which == "key" else []
        return key + [f"encoder: {words}" for words in (self.pretraining or {}).get("deviations", [])]

    def equivalences(self) -> list[str]:
        """What an evaluation inherits from it that was shown to be harmless, in words."""
        return [f"encoder: {words}" for words in (self.pretraining or {}).get("equivalences", [])]
