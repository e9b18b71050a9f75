"""What an encoder is called: its run's name, the hash of its weights."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from moco_eval.runtime import files
from moco_eval.untrusted.path import SUFFIXES
from moco_eval.untrusted.read import shards_of


def run_name(path: Path) -> str:
    """A checkpoint's short name: its stem; RUN-epoch_0012 for RUN/checkpoints/epoch_0012.pth."""
    path = path.absolute()
    name = path.name.removesuffix(".index.json")
    stem = next((name.removesuffix(suffix) for suffix in (".pth.tar", *SUFFIXES) if name.endswith(suffix)), "")
    stem = stem or path.stem
    if path.parent.name == "checkpoints" and path.parent.parent.name:
        stem = f"{path.parent.parent.name}-{stem}"
    return safe_name(stem)


def safe_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._")[:100] or "checkpoint"


def sha256_of_checkpoint(path: Path) -> str:
    """Of a file's bytes; of an index of shards, of these files' names and bytes."""
    shards = shards_of(path)
    if shards is None:
        return files.sha256_of(path)
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard.name} {files.sha256_of(shard)}\n".encode())
    return digest.hexdigest()


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Of names, shapes and bytes, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
