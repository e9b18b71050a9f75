"""Checkpoints in the official layout with what exact resuming needs beside it: tensors and plain containers only.

No generator state is stored: every random draw comes from (seed, epoch, image) or (seed, step).
"""

import re
from pathlib import Path
from typing import Any

import torch

from moco_eval.config.pretrain import KeepCheckpoints
from moco_eval.errors import InputError
from moco_eval.runtime import files
from moco_eval.runtime.collectives import union
from moco_eval.runtime.rank import is_main
from pretraining.mechanisms import Mechanism
from pretraining.plan import Plan

FORMAT = "moco-eval/1"


def save(
    folder: Path,
    run: Plan,
    model: Mechanism,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    step: int,
    rows: torch.Tensor,
    unreadable: set[int],
) -> Path:
    """Write last.pth and, where an epoch ends, epoch_NNNN.pth (NNNN epochs done).

    Args:
        folder: the run's checkpoints/.
        run: what travels with the weights, for those who load them.
        model, optimizer, scaler: the state; the scaler's where it is in use.
        step: steps done so far.
        rows: every rank's measurements since the last log line, (R, steps, columns).
        unreadable: indices of the images that could not be read so far.
    Returns:
        The file written.
    """
    state = _state(run, model, optimizer, scaler, step, rows, unreadable)
    epoch, step_in_epoch = divmod(step, run.steps_per_epoch)
    last = folder / "last.pth"
    whole = step_in_epoch == 0
    written = folder / f"epoch_{epoch:04d}.pth" if whole else last
    with files.atomic(written) as path, path.open("wb") as file:
        torch.save(state, file)  # by its name that would stand inside, and the same run be other bytes each time
    if whole:
        with files.atomic(last) as path:
            files.second_name(written, path)
    return written


def _state(
    run: Plan,
    model: Mechanism,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    step: int,
    rows: torch.Tensor,
    unreadable: set[int],
) -> dict[str, Any]:
    """What a checkpoint holds: the official layout, then what resuming needs, then what travels with the weights."""
    about = run.about()
    epoch, step_in_epoch = divmod(step, run.steps_per_epoch)
    return {
        "epoch": epoch,
        "arch": about["arch"],
        "state_dict": {f"module.{name}": tensor for name, tensor in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        **({"scaler": scaler.state_dict()} if scaler.is_enabled() else {}),
        "step": step,
        "sampler": {"seed": run.config.seed, "step": step, "epoch": epoch, "step_in_epoch": step_in_epoch},
        "window": rows,
        "unreadable": sorted(unreadable),
        "format": FORMAT,
        **about,
        "pretraining": {**about["pretraining"], "epochs": epoch, "steps": step},
    }


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
    """Whether there is a state to go on from. Raises InputError where only epochs are left and last.pth is gone.

    What a save that was killed left behind goes: half a file, or the untrained network without its last.pth.
    """
    if is_main():
        for half in folder.glob(".*.pth"):
            half.unlink()
    epochs, last = sorted(folder.glob("epoch_*.pth")), (folder / "last.pth").is_file()
    if len(union({last})) > 1:
        raise InputError(f"not every machine can see {folder / 'last.pth'}; take an --output that all machines share")
    if not last:
        if not epochs or epochs[-1].stem == "epoch_0000":
            return False
        raise InputError(f"{folder} has no last.pth; copy {epochs[-1].name} there to go on, or empty the folder")
    return True


def load(
    folder: Path, model: Mechanism, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> tuple[int, torch.Tensor, set[int]]:
    """Put the newest state back, whole.

    Returns:
        The step, every rank's measurements since the last log line, and the unreadable images, as they were saved.
    Raises:
        InputError: last.pth is damaged or of another model.
    """
    path = folder / "last.pth"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict({name.removeprefix("module."): value for name, value in state["state_dict"].items()})
        optimizer.load_state_dict(state["optimizer"])
        if scaler.is_enabled():
            scaler.load_state_dict(state["scaler"])
        return int(state["step"]), state["window"], set(state["unreadable"])
    except Exception as error:  # whatever a damaged file makes torch raise
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} cannot be resumed from ({reason}); copy the newest epoch_*.pth over it") from None
