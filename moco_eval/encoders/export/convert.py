"""Encoders in other frameworks' formats; each copy is read back and proven equal; in its own library too."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from moco_eval import __version__
from moco_eval.config.load import did_you_mean
from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.export import detectron2, verify
from moco_eval.encoders.fingerprint import activations_sha256, probe_features
from moco_eval.encoders.layouts import SAFETENSORS
from moco_eval.encoders.load import load, set_norm_eps
from moco_eval.encoders.prove import prove
from moco_eval.encoders.recognise import recognise
from moco_eval.encoders.split import Parts, split
from moco_eval.errors import InputError, RunFailed
from moco_eval.runtime import files
from moco_eval.untrusted import pickle_read


def convert(
    source: str,
    output: Path,
    to: str,
    arch: str | None = None,
    encoder: str | None = None,
    key: str | None = None,
    force: bool = False,
    pixels: Mapping[str, Any] | None = None,
) -> str:
    """Write CHECKPOINT's encoder in another format and prove the copy.

    Beside OUT goes OUT.json with what travels with the weights, and for detectron2 OUT's name with .yaml, the
    configuration that takes it.

    Args:
        to: detectron2 (.pkl), torchvision (.pth, a plain state dict without fc), timm (the same; safetensors where the
            name ends so), safetensors (with the head, and everything else in its metadata).
        force: overwrite.
        pixels: what nothing tells of the pixels; the copy says it.
    Returns:
        Lines about what was written and shown.
    Raises:
        InputError: as `load`; the output exists; the format has no place for this network.
    """
    if to not in WRITERS:
        raise InputError(f"--to {to!r} is not built yet.{did_you_mean(to, WRITERS)}")
    if to == "detectron2" and output.suffix != ".pkl":
        raise InputError(f"{output} must end in .pkl: from this detectron2 knows how to read it")
    about, settings_file = output.with_name(f"{output.name}.json"), output.with_suffix(".yaml")
    beside = [about, settings_file] if to == "detectron2" else [about]
    _require_free(source, [output, *beside], force)
    loaded = load(source, arch, encoder, key=key, pixels=pixels)
    if loaded.pixel_deviations:
        raise InputError(
            f"--pixels: the copy would call them its own, and they are {loaded.pixel_deviations[0]}; give them "
            "where it is judged"
        )
    if not loaded.tensors_loaded:
        raise InputError(f"{source} has no weights to convert")
    verify.require_place(loaded, to)
    settings, why_none = detectron2.settings_of(loaded, output) if to == "detectron2" else (None, "")
    copied, shown = _write(loaded, files.output_file(output), to, settings, beside)
    files.write_json(about, _about(loaded) | {"format": to, "sha256": files.sha256_of(output)})
    if settings:
        files.write_text(settings_file, detectron2.yaml_of(settings))
    lines = [
        f"{output}: {copied} tensors of {loaded.origin} ({loaded.arch}) for {to}, read back: same activations",
        f"  {shown}",
        f"  beside it: {', '.join(path.name for path in beside if settings or path == about)}",
        *([f"  no {settings_file.name}: {why_none}"] if why_none else []),
        *(f"  {warning}" for warning in _only_beside(loaded, to, about)),
    ]
    return "\n".join(lines)


def _write(
    encoder: Encoder, output: Path, to: str, settings: dict[str, Any] | None, beside: list[Path]
) -> tuple[int, str]:
    """The copy, proven before it takes its name; how many tensors, and what was shown.

    What lies beside an earlier copy goes with it: whatever happens then, nothing tells of another file.
    """
    try:
        with files.atomic(output) as path:
            copied = WRITERS[to](encoder, path)
            shown = verify.prove_in(to, encoder, path, settings)
            for old in beside:
                old.unlink(missing_ok=True)
    except OSError as error:
        raise RunFailed(f"cannot write {output}: {error.strerror}") from None
    except SafetensorError as error:  # a full disk too
        raise RunFailed(f"cannot write {output}: {error}; the old file is unchanged") from None
    return copied, shown


def _only_beside(encoder: Encoder, to: str, about: Path) -> list[str]:
    """What the copy itself cannot say, in words."""
    unsaid = re.search(r"_msra$|_pad2$|_12h_", encoder.arch)
    if to == "safetensors" or not unsaid:
        return []
    return [
        f"the tensors do not show that it is {encoder.arch}: keep {about.name} with it, or give --arch when you read it"
    ]


def _require_free(source: str, outputs: list[Path], force: bool) -> None:
    for output in outputs:
        try:
            folder = output.is_dir()
        except OSError as error:  # a name that the file system does not take
            raise InputError(f"{output} is not a valid name for a file: {error.strerror}") from None
        if folder:
            raise InputError(f"{output} is a folder; give the name of a file")
        files.output_file(output)
        if output.exists() and Path(source).exists() and output.samefile(source):
            raise InputError(f"{output} is the checkpoint itself; give another name")
        if output.exists() and not force:
            raise InputError(f"{output} exists; add --force to overwrite it")


def _about(encoder: Encoder) -> dict[str, Any]:
    """What travels with the weights."""
    return {
        "origin": encoder.origin,
        "arch": encoder.arch,
        "which": encoder.which,
        "usual": encoder.usual,
        "source_sha256": encoder.sha256,
        "preprocessing": encoder.preprocessing.to_dict() if encoder.preprocessing else None,
        "pretraining": encoder.pretraining,
        "norm_eps": encoder.norm_eps,
        "activations_sha256": activations_sha256(probe_features(encoder)),
        "moco_eval": __version__,
    }


def _write_state(encoder: Encoder, path: Path) -> int:
    """A plain state dict in fp32 without a classifier, under torchvision's names or timm's."""
    state = {name: tensor.contiguous() for name, tensor in encoder.backbone.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path, metadata=_metadata(encoder))
    else:
        with path.open("wb") as file:  # through a file object the bytes do not depend on the file's name
            torch.save(state, file)
    copy = load(str(path), encoder.arch)
    set_norm_eps(copy.backbone, encoder.norm_eps)
    _require_equal(encoder, copy, path)
    return len(state)


def _metadata(encoder: Encoder) -> dict[str, str]:
    """All that travels with the weights, in one entry: several are written in a random order."""
    return {"moco-eval": json.dumps(_about(encoder) | {"format": SAFETENSORS})}


def _write_safetensors(encoder: Encoder, path: Path) -> int:
    """Backbone and head in fp32, and in the metadata all that travels with them."""
    head = encoder.head.state_dict() if encoder.head is not None else {}
    state = encoder.backbone.state_dict() | {f"head.{name}": tensor for name, tensor in head.items()}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata=_metadata(encoder))
    _require_equal(encoder, load(str(path), encoder.arch), path)
    return len(state)


def _write_detectron2(encoder: Encoder, path: Path) -> int:
    """What the official converter writes: the file's own tensors, in its order, the projection head included."""
    state = _as_stored(encoder)
    try:
        arrays = {detectron2.to_detectron2(name): tensor.numpy() for name, tensor in state.items()}
    except TypeError:
        kinds = ", ".join(sorted({str(tensor.dtype) for tensor in state.values() if not _known_to_numpy(tensor)}))
        raise InputError(f"{encoder.source}: numpy, and so detectron2's file, has no type for one of {kinds}") from None
    pickle_read.write(path, {"model": arrays, "__author__": "MOCO", "matching_heuristics": True})
    written = pickle_read.read(path)["model"]
    back = {detectron2.from_detectron2(name): torch.from_numpy(array) for name, array in written.items()}
    if list(back) != list(state) or any(not _same_bytes(back[name], state[name]) for name in state):
        raise RunFailed(f"{path} does not hold the tensors that were written to it")
    parts = Parts.of({name: tensor for name, tensor in back.items() if not name.startswith("fc.")})
    copy = replace(encoder, backbone=prove(str(path), parts.backbone, encoder.arch, []), head=None)
    _require_equal(replace(encoder, head=None), copy, path)
    return len(state)


def _as_stored(encoder: Encoder) -> dict[str, torch.Tensor]:
    """Backbone and projection head exactly as in the file, in its order."""
    if encoder.path is None:
        return encoder.backbone.state_dict()
    return split(recognise(encoder.path, encoder.key), encoder.taken).raw


def _known_to_numpy(tensor: torch.Tensor) -> bool:
    try:
        tensor[:0].numpy() if tensor.ndim else tensor.numpy()
    except TypeError:
        return False
    return True


def _same_bytes(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(ours, theirs)


def _require_equal(encoder: Encoder, copy: Encoder, path: Path) -> None:
    """Raises RunFailed unless both give the same features of the probe image, bit for bit, and the same head."""
    ours, theirs = probe_features(encoder), probe_features(copy)
    if not torch.equal(ours, theirs):
        raise RunFailed(f"{path}: the copy's activations differ by up to {(ours - theirs).abs().max():.3g}")
    if encoder.head is not None and copy.head is not None and not torch.equal(encoder.head(ours), copy.head(ours)):
        raise RunFailed(f"{path}: the copy's projection head gives other values")


WRITERS: dict[str, Callable[[Encoder, Path], int]] = {
    "detectron2": _write_detectron2,
    "torchvision": _write_state,
    "timm": _write_state,
    "safetensors": _write_safetensors,
}
