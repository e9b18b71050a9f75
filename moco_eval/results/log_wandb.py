"""A run of Weights & Biases, which its own variables direct: WANDB_PROJECT, WANDB_ENTITY, WANDB_DIR, WANDB_MODE."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moco_eval.errors import InputError
from moco_eval.runtime.console import log


def check() -> None:
    """Raises InputError where nobody is logged in, or WANDB_MODE is disabled."""
    import wandb

    mode = wandb.setup(settings=wandb.Settings(silent=True)).settings.mode
    if mode == "disabled":
        raise InputError("--log wandb, and WANDB_MODE is disabled; leave one of them out, or take WANDB_MODE=offline")
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        raise InputError("--log wandb: nobody is logged in; run wandb login, or set WANDB_MODE=offline")


class Wandb:
    """A new run, or an earlier one once more; figures stand over `step`, which W&B's own counter of calls is not."""

    def __init__(self, output: Path, kind: str, settings: Mapping[str, Any], run: str | None):
        """
        Args:
            run: PROJECT/ID of an earlier session.
        """
        import wandb

        self.run = run or f"{os.environ.get('WANDB_PROJECT') or 'moco-eval'}/{secrets.token_hex(4)}"
        project, _, name = self.run.rpartition("/")
        self.opened = wandb.init(
            project=project,
            id=name,
            name=output.resolve().name,
            job_type=kind,
            dir=None if os.environ.get("WANDB_DIR") else str(output),
            config=None if run else dict(settings),
            resume="must" if run else "allow",
            settings=wandb.Settings(console="off", silent=True),
        )
        self.opened.define_metric("*", step_metric="step")
        folder = self.opened.settings.sync_dir
        log(f"wandb: offline; send it by: wandb sync {folder}" if self.opened.offline else f"wandb: {self.opened.url}")

    def send(self, step: int, values: Mapping[str, float]) -> None:
        self.opened.log({"step": step, **values})

    def close(self, ended: type[BaseException] | None) -> None:
        self.opened.finish(exit_code=int(ended is not None))
