"""What a run writes down as it goes: measurements, metrics, and the same for loggers."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from moco_eval.errors import RunFailed
from moco_eval.results.loggers import Logger, TensorBoard, remotes
from moco_eval.runtime import files
from moco_eval.runtime.collectives import all_sum, found_by_main, gather, union
from moco_eval.runtime.console import log, tell, warn
from moco_eval.runtime.device import to_host
from moco_eval.runtime.rank import is_main, rank, world_size
from pretraining import signs
from pretraining.alarms import PATIENCE, alarms
from pretraining.moco import Step
from pretraining.plan import Plan

MEANS = ("loss", "accuracy", "feature_std")  # of a step; its signs come after them


class Waiting:
    """How long the training device waits for batches: a CPU until one is made, a GPU until its images are there.

    The GPU's clock is asked, by two events of each step: the host, which launches the augmentation that follows, may
    wait while the GPU still has work, and launches while it has none.
    """

    began: Any  # a time of the host or an event of the GPU; None before the first

    def __init__(self, device: torch.device):
        self.on_gpu, self.began = device.type == "cuda", None
        self.forget()

    def forget(self) -> None:
        self.seconds, self.events = 0.0, list[tuple[Any, Any]]()

    def begin(self) -> None:
        """The step is done, or given to the GPU."""
        self.began = _event() if self.on_gpu else time.perf_counter()

    def images_there(self) -> None:
        """They are on the device, and nothing is done to them yet."""
        if self.on_gpu and self.began is not None:
            self.events.append((self.began, _event()))

    def batch_there(self) -> None:
        """The views are made, or their making is launched."""
        if not self.on_gpu:
            self.seconds += time.perf_counter() - self.began

    def take(self) -> Callable[[], float]:
        """What gives the seconds so far, once a GPU has done what it was given by now; they count from zero again."""
        seconds, events = self.seconds, self.events
        self.forget()
        return lambda: seconds + sum(began.elapsed_time(ended) for began, ended in events) / 1000


def _event() -> "torch.cuda.Event":
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Measurements:
    """Loss, accuracy, spread and signs of each step since the last log line, this process's; and time spent waiting."""

    def __init__(self, run: Plan, device: torch.device):
        self.run, self.waiting, self.signs = run, Waiting(device), signs.names(run)
        self.rows: list[torch.Tensor] = []
        self.unreadable: set[int] = set()
        self.known = 0  # of them, to every rank
        self.restart()

    def restore(self, rows: torch.Tensor, unreadable: set[int]) -> None:
        """Go on from a checkpoint's, which holds every rank's; one of before has no signs."""
        rows = pad(rows, (0, len(MEANS) + len(self.signs) - rows.shape[2]), value=math.nan)
        self.rows, self.unreadable, self.known = list(rows[rank()]), unreadable, len(unreadable)

    def restart(self) -> None:
        """Measure time from now."""
        self.waiting.forget()
        self.started = time.perf_counter()

    def add(self, parts: list[Step], shown: Sequence[torch.Tensor] = ()) -> None:
        """One step, done in parts where gradients are accumulated; nothing is read back from the device here.

        Args:
            shown: the step's signs.
        """
        rows = [torch.stack([part.loss.detach().float(), part.accuracy, part.feature_std.float()]) for part in parts]
        self.rows.append(torch.cat([torch.stack(rows).mean(dim=0), *(sign[None].float() for sign in shown)]))

    def note_unreadable(self, index: list[int]) -> None:
        """Name each unreadable image once, with the reason, from the rank that met it."""
        for bad in set(index) - self.unreadable:
            tell(f"warning: {self.run.images.trouble_with(bad)}; another image is used in its place", "warnings")
        self.unreadable |= set(index)

    def together(self, step: int) -> torch.Tensor:
        """All ranks' rows, (R, steps, columns), and the unreadable images of all, on every rank; waits for the device.

        Raises:
            RunFailed: a loss among them is not finite, or more images were unreadable than bad_images allows.
        """
        self._require_few_unreadable()
        if not self.rows:
            return torch.zeros(world_size(), 0, len(MEANS) + len(self.signs))
        values = gather(torch.stack(self.rows)[None]).cpu()
        self._require_finite(values, step)
        return values

    def line(self, step: int, lr: float) -> Callable[[], dict[str, Any]]:
        """Start to read a line of metrics: the mean over the steps since the last one and over all ranks.

        Returns:
            What gives the line; asked a step later, it finds it arrived and stops no device. It raises as `together`.
        """
        rows, seconds, waited = torch.stack(self.rows), time.perf_counter() - self.started, self.waiting.take()
        unreadable = torch.full_like(rows[:1], len(self.unreadable) - self.known)
        arrives = to_host(gather(torch.cat([rows, unreadable])[None]))
        self.rows = []
        self.restart()
        return lambda: self._line(step, lr, arrives(), seconds, waited())

    def _line(self, step: int, lr: float, values: torch.Tensor, seconds: float, waited: float) -> dict[str, Any]:
        values, unreadable = values[:, :-1], values[:, -1, 0]
        self._require_finite(values, step)
        if self._too_many(self.known + int(unreadable.sum())):  # the same on every rank, if some are counted twice
            self._require_few_unreadable()
        loss, accuracy, feature_std = values[:, :, : len(MEANS)].double().mean(dim=(0, 1)).tolist()
        return {
            "step": step,
            "epoch": step / self.run.steps_per_epoch,
            "loss": loss,
            "accuracy": 100 * accuracy,
            "feature_std": feature_std,
            **signs.of_line(self.signs, values[:, :, len(MEANS) :]),
            **({"queue_age": self.run.queue_age(step)} if self.run.config.mechanism == "moco" else {}),
            "lr": lr,
            "images_per_second": values.shape[1] * self.run.config.batch_size / seconds,
            "data_wait": waited / seconds,
        }

    def _require_finite(self, values: torch.Tensor, step: int) -> None:
        broken = (~values[:, :, 0].isfinite()).any(dim=0).nonzero().flatten()
        if len(broken):
            at = step - values.shape[1] + int(broken[0]) + 1
            loss = values[:, int(broken[0]), 0].mean().item()
            where = f"epoch {(at - 1) // self.run.steps_per_epoch}, step {at}"
            other = ", or bf16 or fp32 in a new run" if self.run.config.precision == "fp16" else ""
            raise RunFailed(f"the loss is {loss} in {where}; a smaller optimizer.lr may help{other}")

    def _too_many(self, unreadable: int) -> bool:
        return unreadable + len(self.run.images.damaged) > self.run.config.bad_images

    def _require_few_unreadable(self) -> None:
        """Collective: from here on every rank knows all of them."""
        self.unreadable = union(self.unreadable)
        self.known = len(self.unreadable)
        if self._too_many(self.known):
            limit = self.run.config.bad_images
            raise RunFailed(f"more than {limit} images cannot be read (the limit is bad_images); mend the data")


class Metrics:
    """metrics.jsonl and loggers, written by the first process; lines after `step` are cut off on resume."""

    def __init__(self, run: Plan, output: Path, step: int, device: torch.device, logs: Sequence[str] = ()):
        """
        Args:
            logs: of --log, beside TensorBoard.
        Raises:
            InputError: a line of metrics.jsonl is damaged, or one of `logs` cannot be opened.
        """
        self.run, self.path, self.device = run, output / "metrics.jsonl", device
        self.recent: deque[dict[str, Any]] = deque(maxlen=PATIENCE)
        self.knn: list[float] = []
        self.loggers: list[Logger] = []
        found_by_main(lambda: self._open(output, step, logs))

    def _open(self, output: Path, step: int, logs: Sequence[str]) -> None:
        """What was written before; a service that lacks some of it is sent that."""
        files.cut_lines(self.path, "step", step or -1)  # the line of chance, of step 0, is written anew
        services = remotes(logs, output, "pretrain", self.run.resolved())
        self.loggers = [TensorBoard(output, purge_step=step + 1), *services]
        for line in files.read_lines(self.path, "step"):
            self._remember(line)
            _send(services, line)

    def _remember(self, line: dict[str, Any]) -> None:
        if "loss" in line:
            self.recent.append(line)
        if "knn_top1" in line:
            self.knn.append(line["knn_top1"])

    def has(self, name: str, step: int) -> bool:
        """Whether a figure was already written for this step; the first process's answer, on every rank."""
        known = is_main() and any(name in line and line["step"] == step for line in files.read_lines(self.path, "step"))
        return bool(all_sum(torch.tensor(float(known), device=self.device)).item())

    def write(self, line: dict[str, Any]) -> None:
        """One line, with the alarms that it sets off; an alarm is said when it starts."""
        if not is_main():
            return
        before = self.recent[-1].get("alarms", []) if self.recent else []
        self._remember(line)
        if "loss" in line:
            sounding = alarms(self.run, list(self.recent), self.knn)
            if sounding:
                line["alarms"] = list(sounding)
            for name in sounding.keys() - set(before):
                warn(f"step {line['step']}: {sounding[name]}")
            if line["step"] % self.run.steps_per_epoch == 0:
                self._tell(line)
        files.append_line(self.path, line)
        _send(self.loggers, line)

    def _tell(self, line: dict[str, Any]) -> None:
        """One line an epoch to stderr."""
        epoch, epochs, wait = round(line["epoch"]), self.run.config.schedule.epochs, 100 * line["data_wait"]
        log(
            f"epoch {epoch} of {epochs}: loss {line['loss']:.3f} (chance {self.run.chance:.3f}), accuracy "
            f"{line['accuracy']:.1f} %, spread {line['feature_std']:.2f}, {line['images_per_second']:.0f} images/s, "
            f"{wait:.0f} % waiting for data"
        )

    def flush(self) -> None:
        """To the disk, before a checkpoint that relies on it."""
        files.flush(self.path)


def _send(loggers: Sequence[Logger], line: dict[str, Any]) -> None:
    """The figures of a line; its kind is that of its first: chance, loss, or knn_top1."""
    values = {name: value for name, value in line.items() if name not in ("step", "epoch", "alarms")}
    for logger in loggers if values else ():
        logger.send(next(iter(values)), line["step"], values)
