"""Encoders in other frameworks' formats; each copy is read back and proven equal.

The detectron2 file is what the official converter writes: facebookresearch/moco@132aea9,
detection/convert-pretrain-to-detectron2.py.
"""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from moco_eval import files, pickles
from moco_eval.config import did_you_mean
from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.layouts import SAFETENSORS
from moco_eval.encoders.load import load
from moco_eval.encoders.parts import Parts, split
from moco_eval.encoders.probe import probe_features
from moco_eval.encoders.prove import prove
from moco_eval.encoders.recognise import recognise
from moco_eval.errors import InputError, RunFailed


def convert(
    source: str, output: Path, to: str, arch: str | None = None, encoder: str | None = None, force: bool = False
) -> str:
    """Write CHECKPOINT's encoder in another format and prove the copy.

    Args:
        to: detectron2 (.pkl), torchvision (.pth, a plain state dict without fc), safetensors.
        force: overwrite.
    Returns:
        One line about what was written and shown.
    Raises:
        InputError: as `load`; the output exists; pixels have no weights.
    """
    if to not in WRITERS:
        raise InputError(f"--to {to!r} is not built yet.{did_you_mean(to, WRITERS)}")
    _require_free(source, output, force)
    loaded = load(source, arch, encoder)
    if not loaded.tensors_loaded:
        raise InputError(f"{source} has no weights to convert")
    try:
        with files.atomic(output) as path:
            copied = WRITERS[to](loaded, encoder, path)
    except OSError as error:
        raise RunFailed(f"cannot write {output}: {error.strerror}") from None
    return f"{output}: {copied} tensors of {loaded.origin} ({loaded.arch}) for {to}, read back: same activations"


def _require_free(source: str, output: Path, force: bool) -> None:
    if output.is_dir():
        raise InputError(f"{output} is a folder; give the name of a file")
    if output.exists() and Path(source).exists() and output.samefile(source):
        raise InputError(f"{output} is the checkpoint itself; give another name")
    if output.exists() and not force:
        raise InputError(f"{output} exists; add --force to overwrite it")


def _write_torchvision(encoder: Encoder, which: str, path: Path) -> int:
    """A plain state dict in fp32 under torchvision's names, without fc."""
    state = encoder.backbone.state_dict()
    with path.open("wb") as file:  # through a file object the bytes do not depend on the file's name
        torch.save(dict(state), file)
    _require_equal(encoder, load(str(path), encoder.arch), path)
    return len(state)


def _write_safetensors(encoder: Encoder, which: str, path: Path) -> int:
    """Backbone and head in fp32, and in the metadata all that travels with them."""
    head = encoder.head.state_dict() if encoder.head is not None else {}
    state = encoder.backbone.state_dict() | {f"head.{name}": tensor for name, tensor in head.items()}
    about = {
        "format": SAFETENSORS,
        "origin": encoder.origin,
        "arch": encoder.arch,
        "which": encoder.which,
        "source_sha256": encoder.sha256,
        "preprocessing": asdict(encoder.preprocessing) if encoder.preprocessing else None,
        "pretraining": encoder.pretraining,
    }
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()},
        path,
        metadata={"moco-eval": json.dumps(about)},  # one entry: several are written in a random order
    )
    _require_equal(encoder, load(str(path), encoder.arch), path)
    return len(state)


def _write_detectron2(encoder: Encoder, which: str, path: Path) -> int:
    """What the official converter writes: the file's own tensors, in its order, the projection head included."""
    state = _as_stored(encoder, which)
    try:
        arrays = {detectron2_name(name): tensor.numpy() for name, tensor in state.items()}
    except TypeError:
        kinds = ", ".join(sorted({str(tensor.dtype) for tensor in state.values()}))
        raise InputError(f"{encoder.source}: numpy, and so detectron2's file, has no type for one of {kinds}") from None
    pickles.write(path, {"model": arrays, "__author__": "MOCO", "matching_heuristics": True})
    back = {torchvision_name(name): torch.from_numpy(array) for name, array in pickles.read(path)["model"].items()}
    if list(back) != list(state) or any(not _same_bytes(back[name], state[name]) for name in state):
        raise RunFailed(f"{path} does not hold the tensors that were written to it")
    parts = Parts.of({name: tensor for name, tensor in back.items() if not name.startswith("fc.")}, {})
    copy = replace(encoder, backbone=prove(str(path), parts.backbone, encoder.arch, []), head=None)
    _require_equal(replace(encoder, head=None), copy, path)
    return len(state)


def _as_stored(encoder: Encoder, which: str) -> dict[str, torch.Tensor]:
    """Backbone and projection head exactly as in the file, in its order."""
    if encoder.source.startswith(("random:", "torchvision:")):
        return encoder.backbone.state_dict()
    stored = split(recognise(Path(encoder.source)), which)
    return stored.raw


def _same_bytes(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(ours, theirs)


def _require_equal(encoder: Encoder, copy: Encoder, path: Path) -> None:
    """Raises RunFailed unless both give the same features of the probe image, bit for bit, and the same head."""
    ours, theirs = probe_features(encoder), probe_features(copy)
    if not torch.equal(ours, theirs):
        raise RunFailed(f"{path}: the copy's activations differ by up to {(ours - theirs).abs().max():.3g}")
    if encoder.head is not None and copy.head is not None and not torch.equal(encoder.head(ours), copy.head(ours)):
        raise RunFailed(f"{path}: the copy's projection head gives other values")


WRITERS: dict[str, Callable[[Encoder, str, Path], int]] = {
    "detectron2": _write_detectron2,
    "torchvision": _write_torchvision,
    "safetensors": _write_safetensors,
}

_TO_DETECTRON2 = (
    (r"^(?!layer)", "stem."),
    (r"layer([1-4])", lambda match: f"res{int(match.group(1)) + 1}"),
    (r"bn([1-3])", r"conv\1.norm"),
    (r"downsample\.0", "shortcut"),
    (r"downsample\.1", "shortcut.norm"),
)
_TO_TORCHVISION = (
    (r"^stem\.", ""),
    (r"^res([2-5])", lambda match: f"layer{int(match.group(1)) - 1}"),
    (r"conv([1-3])\.norm", r"bn\1"),
    (r"shortcut\.norm", "downsample.1"),
    (r"shortcut", "downsample.0"),
)


def detectron2_name(name: str) -> str:
    """'layer1.0.bn3.weight' to 'res2.0.conv3.norm.weight'; what is in no layer goes to the stem."""
    for pattern, replacement in _TO_DETECTRON2:
        name = re.sub(pattern, replacement, name)
    return name


def torchvision_name(name: str) -> str:
    """The way back."""
    for pattern, replacement in _TO_TORCHVISION:
        name = re.sub(pattern, replacement, name)
    return name
