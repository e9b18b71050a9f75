"""checkpoints/last.pth of a fine-tuning by iterations: what a detector or a segmentation goes on from."""

from pathlib import Path

import torch
from torch import nn

from moco_eval.errors import InputError
from moco_eval.results.record import Cost
from moco_eval.runtime import collectives, console, device, files, rank


def save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    done: int,
    finished: bool,
    cost: Cost,
    command: str = "detect",
) -> None:
    """Write it, from the first process, once the weights are known to be finite. Collective.

    Args:
        done: iterations so far; `finished`: with what follows the last of them behind it, such as precise BN.
        command: detect or segment.
    """
    device.require_finite_weights(model, done)
    if rank.is_main():
        state = {
            "format": f"moco-eval/{command}@1",
            "iteration": done,
            "finished": finished,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "seconds": cost.seconds,
            "images": cost.images,
        }
        with files.atomic(path) as temporary:
            torch.save(state, temporary)
    collectives.barrier()


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, cost: Cost) -> tuple[int, bool]:
    """Take it up; returns the iterations already done (0 without a file) and whether what follows them is done too.

    Raises:
        InputError: a damaged file, or another network's.
    """
    if not path.is_file():
        return 0, False
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done, finished = int(state["iteration"]), bool(state["finished"])
        cost.seconds, cost.images = state["seconds"], state["images"]
    except Exception as error:  # whatever a damaged file makes torch raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is not readable ({reason}); delete it to start this run again") from None
    console.log(f"resuming from iteration {done} of {path}")
    return done, finished
