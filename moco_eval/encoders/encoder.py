"""What every evaluation takes: a proven backbone, and all that must travel with it."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from moco_eval.errors import InputError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """What the network expects: pixels of 0..`range`, less `mean`, over `std`, their colours in the order `channels`.

    `size` pixels are cut from a resize to `resize`; `mean` and `std` are in the units of `range`, in that order.
    """

    size: int = 224
    resize: int = 256
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    channels: str = "RGB"
    range: int = 1

    def rgb(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of RGB pixels of 0..1."""
        order = 1 if self.channels == "RGB" else -1
        mean, std = self.mean[::order], self.std[::order]
        return (mean, std) if self.range == 1 else (scaled(mean, self.range), scaled(std, self.range))

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as they come back from a file."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessing":
        """Raises InputError for a value that is missing, of another kind or out of its range."""
        try:
            found = cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
        except (TypeError, KeyError) as error:
            raise InputError(f"its preprocessing is damaged: {error}") from None
        numbers, sizes = (*found.mean, *found.std), (found.size, found.resize)
        sound = (
            len(numbers) == 6
            and all(type(value) in (int, float) and math.isfinite(value) for value in numbers)
            and min(numbers[3:]) > 0
            and all(type(side) is int and 0 < side <= 4096 for side in sizes)
            and found.size <= found.resize
            and found.channels in ("RGB", "BGR")
        )
        if not sound:
            raise InputError(f"its preprocessing makes no sense: {found}")
        if type(found.range) is not int or found.range not in (1, 255):
            raise InputError(f"its preprocessing has pixels of 0..{found.range!r}; 1 and 255 are known")
        return found


def scaled(values: tuple[float, ...], by: float) -> tuple[float, ...]:
    return tuple(value / by for value in values)


@dataclass
class Encoder:
    """A loaded encoder with the proof of its load.

    Attributes:
        source: the CHECKPOINT argument as the user gave it.
        run_name: short name for folders and tables ('moco_v2_r50', 'random-resnet18').
        arch: a name that `build.architecture` knows, or 'pixels'.
        backbone: (N, 3, H, W) to pooled features (N, feature_dim); a ResNet with torchvision's module names, `fc` the
            identity, or timm's VisionTransformer.
        feature_dim: length of the pooled feature.
        head: the projection head on the pooled feature, (N, feature_dim) to (N, dim); None where there is none.
        origin: the layout it was recognised as, such as 'facebookresearch/moco v2'.
        sha256: of the checkpoint file's bytes; of the weights themselves for `random:` and `torchvision:`.
        tensors_loaded: how many backbone tensors were matched: all of them.
        path: the file it was read from; None where there is none.
        taken: 'query' or 'key' (the momentum encoder): the part of that file.
        which: the same, or for a copy that `convert` wrote, what it was made of.
        usual: which of them the method's own evaluation takes.
        dropped: (what, why) of each group of tensors in the file that the backbone does not use.
        warnings: doubts, in words.
        preprocessing: what the weights expect; None where the checkpoint does not say (`random:`).
        pretraining: protocol, dataset, epochs, config, deviations of the run that made it, where it says.
        norm_eps: of a ViT's layer norms, where it is not timm's.
        settings: the file beside the checkpoint that told of it, if one did.
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
    path: Path | None = None
    taken: str = "query"
    which: str = "query"
    usual: str = "query"
    dropped: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    preprocessing: Preprocessing | None = None
    pretraining: dict[str, Any] | None = None
    norm_eps: float | None = None
    settings: str | None = None

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
            "preprocessing": self.preprocessing.to_dict() if self.preprocessing else None,
            "norm_eps": self.norm_eps,
            "pretraining": self.pretraining,
        }

    def identity(self) -> dict[str, Any]:
        """What tells its runs from those of another."""
        told = {name: self.record()[name] for name in ("preprocessing", "norm_eps")} if self.settings else {}
        return {"sha256": self.sha256, "arch": self.arch, "which": self.which, **told}

    def deviations(self) -> list[str]:
        """What an evaluation inherits from it, in words."""
        other = [f"the {self.which} encoder instead of the {self.usual} encoder"] if self.which != self.usual else []
        return other + [f"encoder: {words}" for words in (self.pretraining or {}).get("deviations", [])]

    def equivalences(self) -> list[str]:
        """What an evaluation inherits from it that was shown to be harmless, in words."""
        return [f"encoder: {words}" for words in (self.pretraining or {}).get("equivalences", [])]
