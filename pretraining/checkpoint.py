"""Checkpoints in the official layout with what exact resuming needs beside it: tensors and plain containers only.

No generator state is stored: every random draw comes from (seed, epoch, image) or (seed, step).
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from moco_eval import files
from moco_eval.config import KeepCheckpoints
from moco_eval.errors import InputError
from pretraining.moco import MoCo

FORMAT = "moco-eval/1"


def save(
    folder: Path,
    model: MoCo,
    optimizer: torch.optim.Optimizer,
    position: dict[str, int],
    window: list[torch.Tensor],
    about: dict[str, Any],
) -> Path:
    """Write last.pth and, where an epoch ends, epoch_NNNN.pth (NNNN epochs done).

    Args:
        folder: the run's checkpoints/.
        position: step (done so far), epoch (the next one), step_in_epoch.
        window: measurements since the last log line.
        about: arch, config, preprocessing, pretraining: carried along for those who load it.
    Returns:
        The file written.
    """
    state = {
        "epoch": position["epoch"],
        "arch": about["arch"],
        "state_dict": {f"module.{name}": tensor for name, tensor in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "step": position["step"],
        "sampler": {"seed": about["config"]["seed"], **position},
        "window": torch.stack(window).cpu() if window else torch.zeros(0, 3),
        "format": FORMAT,
        **about,
        "pretraining": {**about["pretraining"], "epochs": position["epoch"]},
    }
    last = folder / "last.pth"
    whole = position["step_in_epoch"] == 0
    written = folder / f"epoch_{position['epoch']:04d}.pth" if whole else last
    with files.atomic(written) as path:
        torch.save(state, path)
    if whole:
        with files.atomic(last) as path:
            _same_file(written, path)
    return written


def _same_file(written: Path, path: Path) -> None:
    """A second name for a file, or a copy where the file system has no such thing."""
    path.unlink()
    try:
        os.link(written, path)
    except OSError:
        shutil.copyfile(written, path)


def prune(folder: Path, keep: KeepCheckpoints) -> None:
    """Keep the last `keep.last` epochs, every `keep.every`-th, and the untrained epoch 0."""
    epochs = sorted(_epoch(path) for path in folder.glob("epoch_*.pth"))
    for epoch in epochs[: -keep.last]:
        if epoch % keep.every:
            (folder / f"epoch_{epoch:04d}.pth").unlink()


def _epoch(path: Path) -> int:
    match = re.fullmatch(r"epoch_(\d+)", path.stem)
    return int(match.group(1)) if match else 0


def there(folder: Path) -> bool:
    """Whether there is a state to go on from. Raises InputError where only epochs are left and last.pth is gone."""
    epochs = sorted(folder.glob("epoch_*.pth"))
    if epochs and not (folder / "last.pth").is_file():
        raise InputError(f"{folder} has no last.pth; copy {epochs[-1].name} there to go on, or empty the folder")
    return bool(epochs)


def load(folder: Path, model: MoCo, optimizer: torch.optim.Optimizer) -> tuple[dict[str, int], torch.Tensor]:
    """Put the newest state back, whole.

    Returns:
        position (step, epoch, step_in_epoch) and the window.
    Raises:
        InputError: last.pth is damaged or of another model.
    """
    path = folder / "last.pth"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict({name.removeprefix("module."): value for name, value in state["state_dict"].items()})
        optimizer.load_state_dict(state["optimizer"])
        sampler = state["sampler"]
        return {name: int(sampler[name]) for name in ("step", "epoch", "step_in_epoch")}, state["window"]
    except Exception as error:  # whatever a damaged file makes torch raise
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} cannot be resumed from ({reason}); copy the newest epoch_*.pth over it") from None
