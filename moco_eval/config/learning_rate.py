"""The learning rate of an epoch, for pretraining and for the linear protocol, or of a step, for fine-tuning."""

import math

from moco_eval.config.base import Schedule
from moco_eval.config.classification import FinetuneSchedule
from moco_eval.config.pretrain import PretrainSchedule

LEFT = 0.001  # of the learning rate at the last step of a fine-tuning's cosine


def learning_rate(schedule: Schedule, lr: float, epoch: int) -> float:
    """The rate of an epoch, counted from 0. Source: facebookresearch/moco, main_moco.py and the CIFAR-10 demo."""
    epoch += schedule.count_from
    if schedule.kind == "step":
        return _stepped(schedule, lr, epoch)
    return lr * 0.5 * (1 + math.cos(math.pi * epoch / schedule.epochs))


def rate_in_pretraining(schedule: PretrainSchedule, lr: float, step: int, per_epoch: int) -> float:
    """The rate of a step of pretraining, counted from 0 over all epochs of `per_epoch` steps.

    Per step: lr t/w in the warm-up of w epochs, so 0 at the first step, then half a cosine; t = step / per_epoch.
    Source: facebookresearch/moco-v3@c349e6e, main_moco.py.
    """
    if schedule.per == "epoch":
        return learning_rate(schedule, lr, step // per_epoch)
    t, warmup = step / per_epoch, schedule.warmup_epochs
    if t < warmup:
        return lr * t / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (t - warmup) / (schedule.epochs - warmup)))


def momentum_of_step(momentum: float, step: int, steps: int) -> float:
    """m of a step, counted from 0: by a cosine from `momentum` to 1. Source: arXiv:2104.02057, Sec. 4."""
    return 1 - 0.5 * (1 + math.cos(math.pi * step / steps)) * (1 - momentum)


def rate_of_step(schedule: FinetuneSchedule, lr: float, step: int, per_epoch: int) -> float:
    """The rate of a step of fine-tuning, counted from 0 over all epochs of `per_epoch` steps.

    Source: step, OpenSelfSup@1db69ec by way of mmcv's StepLrUpdaterHook; cosine, lightly@e8d317f,
        lightly/utils/scheduler.py; the others, see `_with_warmup`.
    """
    if schedule.kind == "step":
        return _stepped(schedule, lr, step // per_epoch)
    if schedule.kind != "cosine":
        return _with_warmup(schedule, lr, step, per_epoch)
    last = schedule.epochs * per_epoch - 1
    if step >= last:
        return lr * LEFT
    return lr * (LEFT + (1 - LEFT) * 0.5 * (1 + math.cos(math.pi * step / last)))


def _with_warmup(schedule: FinetuneSchedule, lr: float, step: int, per_epoch: int) -> float:
    """A line from warmup_lr to `lr` in w of E epochs, then half a cosine to min_lr; both ends are not scaled by batch.

    warmup_cosine: t = step / per_epoch, and the cosine runs over the E - w epochs that are left.
    deit: t is the epoch before this one, for its scheduler moves after an epoch, by that epoch's number; the cosine
    runs over all E epochs, so that it begins below `lr`.

    Source: facebookresearch/mae@efb2a80, util/lr_sched.py; facebookresearch/deit@7e160fe, main.py, with timm 0.3.2's
    CosineLRScheduler.
    """
    by_epoch = schedule.kind == "deit"
    t = max(0, step // per_epoch - 1) if by_epoch else step / per_epoch
    warmup, start = schedule.warmup_epochs, 0 if by_epoch else schedule.warmup_epochs
    if t < warmup:
        return schedule.warmup_lr + (lr - schedule.warmup_lr) * t / warmup
    fall = 0.5 * (1 + math.cos(math.pi * (t - start) / (schedule.epochs - start)))
    return schedule.min_lr + (lr - schedule.min_lr) * fall


def _stepped(schedule: Schedule | FinetuneSchedule, lr: float, epoch: int) -> float:
    return lr * schedule.gamma ** sum(epoch >= milestone for milestone in schedule.milestones)
