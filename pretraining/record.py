"""What a run writes down as it goes: metrics, TensorBoard events, a picture of its views."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import save_image

from moco_eval import files
from moco_eval.runtime import all_sum, is_main
from pretraining.plan import Plan
from pretraining.views import TwoViews, preprocessing


class Metrics:
    """metrics.jsonl and TensorBoard, written by the first process; lines after `step` are cut off on resume."""

    def __init__(self, output: Path, step: int, device: torch.device):
        self.path, self.device = output / "metrics.jsonl", device
        if is_main():
            files.cut_lines(self.path, lambda line: 0 < step >= line["step"])
            self.board = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)

    def has(self, name: str, step: int) -> bool:
        """Whether a figure was already written for this step; the first process's answer, on every rank."""
        known = is_main() and any(name in line and line["step"] == step for line in files.read_lines(self.path))
        return bool(all_sum(torch.tensor(float(known), device=self.device)).item())

    def write(self, line: dict[str, Any]) -> None:
        if not is_main():
            return
        files.append_line(self.path, line)
        for name in line.keys() - {"step", "epoch"}:
            self.board.add_scalar(name, line[name], line["step"])

    def close(self) -> None:
        if is_main():
            self.board.close()


def draw_views(run: Plan, path: Path, pairs: int = 8) -> None:
    """A picture of what the network sees: view_q above view_k, one image a column."""
    views = TwoViews(run.images, run.config.views, run.config.seed)
    chosen = [views[0, index][:2] for index in range(0, len(views), max(1, len(views) // pairs))][:pairs]
    expects = preprocessing(run.config.views)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (expects.mean, expects.std))
    rows = torch.stack([pair[0] for pair in chosen] + [pair[1] for pair in chosen]) * std + mean
    with files.atomic(path) as temporary:
        save_image(rows.clamp(0, 1), temporary, nrow=len(chosen), padding=2, pad_value=1.0)
