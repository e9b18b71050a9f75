"""Which of the processes of a run this is."""

import sys
from typing import Any


def rank() -> int:
    group = _group()
    return group.get_rank() if group else 0


def world_size() -> int:
    group = _group()
    return group.get_world_size() if group else 1


def is_main() -> bool:
    return rank() == 0


def _group() -> Any:
    """torch.distributed where this process has joined a group; a process without torch is in none, and stays light."""
    distributed = sys.modules.get("torch.distributed")
    is_initialized = getattr(distributed, "is_initialized", None)  # None while torch is being imported
    return distributed if is_initialized and is_initialized() else None
