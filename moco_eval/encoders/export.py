"""Encoders in other frameworks' formats; each copy is read back and proven equal.

The detectron2 file is what the official converter writes: facebookresearch/moco@132aea9,
detection/convert-pretrain-to-detectron2.py.
"""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moco_eval import files, pickles
from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.load import load
from moco_eval.encoders.recognise import State, read
from moco_eval.errors import InputError, RunFailed


def convert(
    source: str, output: Path, to: str, arch: str | None = None, encoder: str = "query", force: bool = False
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
    if output.exists() and not force:
        raise InputError(f"{output} exists; add --force to overwrite it")
    loaded = load(source, arch, encoder)
    if not loaded.tensors_loaded:
        raise InputError(f"{source} has no weights to convert")
    write = {"detectron2": _write_detectron2, "torchvision": _write_torchvision, "safetensors": _write_safetensors}
    with files.atomic(output) as path:
        copied = write[to](loaded, encoder, path)
    return f"{output}: {copied} tensors of {loaded.origin} ({loaded.arch}) for {to}, read back and equal bit for bit"


def _write_torchvision(encoder: Encoder, which: str, path: Path) -> int:
    state = encoder.backbone.state_dict()
    torch.save(dict(state), path)
    _require_equal(state, torch.load(path, weights_only=True), path)
    return len(state)


def _write_safetensors(encoder: Encoder, which: str, path: Path) -> int:
    from safetensors.torch import load_file, save_file

    state = {name: tensor.contiguous() for name, tensor in encoder.backbone.state_dict().items()}
    about = {
        "origin": encoder.origin,
        "arch": encoder.arch,
        "source_sha256": encoder.sha256,
        "preprocessing": asdict(encoder.preprocessing) if encoder.preprocessing else None,
        "pretraining": encoder.pretraining,
    }
    save_file(state, path, metadata={"format": "pt", "moco-eval": json.dumps(about)})
    _require_equal(state, load_file(path), path)
    return len(state)


def _write_detectron2(encoder: Encoder, which: str, path: Path) -> int:
    state = _as_stored(encoder, which)
    arrays = {detectron2_name(name): tensor.numpy() for name, tensor in state.items()}
    pickles.write(path, {"model": arrays, "__author__": "MOCO", "matching_heuristics": True})
    back = pickles.read(path)["model"]
    _require_equal(state, {torchvision_name(name): torch.from_numpy(array) for name, array in back.items()}, path)
    return len(state)


def _as_stored(encoder: Encoder, which: str) -> State:
    """The encoder's tensors in the file's own order, the head included, as the official converter takes them."""
    if encoder.source.partition(":")[0] in ("random", "torchvision"):
        return encoder.backbone.state_dict()
    return read(Path(encoder.source)).encoders[which]


def _require_equal(ours: dict[str, torch.Tensor], theirs: dict[str, Any], path: Path) -> None:
    if set(ours) != set(theirs):
        raise RunFailed(f"{path} does not hold the tensors that were written to it")
    changed = [
        name for name in ours if ours[name].dtype != theirs[name].dtype or not torch.equal(ours[name], theirs[name])
    ]
    if changed:
        raise RunFailed(f"{path}: {len(changed)} tensors came back changed, first {changed[0]}")


_TO_DETECTRON2 = (
    (r"^(?!layer)", "stem."),
    (r"layer([1-4])", lambda match: f"res{int(match.group(1)) + 1}"),
    (r"bn([1-3])", r"conv\1.norm"),
    (r"downsample\.0", "shortcut"),
    (r"downsample\.1", "shortcut.norm"),
)
_TO_TORCHVISION = (
    (r"^stem\.", ""),
    (r"res([2-5])", lambda match: f"layer{int(match.group(1)) - 1}"),
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
