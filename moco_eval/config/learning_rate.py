"""The learning rate of an epoch, for pretraining and for the linear protocol, or of a step, for fine-tuning."""

import math

from moco_eval.config.base import Schedule
from moco_eval.config.classification import FinetuneSchedule

LEFT = 0.001  # of the learning rate at the last step of a fine-tuning's cosine


def learning_rate(schedule: Schedule, lr: float, epoch: int) -> float:
    """The rate of an epoch, counted from 0. Source: facebookresearch/moco, main_moco.py and the CIFAR-10 demo."""
    epoch += schedule.count_from
    if schedule.kind == "step":
        return _stepped(schedule, lr, epoch)
    return lr * 0.5 * (1 + math.cos(math.pi * epoch / schedule.epochs))


def rate_of_step(schedule: FinetuneSchedule, lr: float, step: int, per_epoch: int) -> float:
    """The rate of a step of fine-tuning, counted from 0 over all epochs of `per_epoch` steps.

    Source: step, OpenSelfSup@1db69ec by way of mmcv's StepLrUpdaterHook; cosine, lightly@e8d317f,
        lightly/utils/scheduler.py.
    """
    if schedule.kind == "step":
        return _stepped(schedule, lr, step // per_epoch)
    last = schedule.epochs * per_epoch - 1
    if step >= last:
        return lr * LEFT
    return lr * (LEFT + (1 - LEFT) * 0.5 * (1 + math.cos(math.pi * step / last)))


def _stepped(schedule: Schedule | FinetuneSchedule, lr: float, epoch: int) -> float:
    return lr * schedule.gamma ** sum(epoch >= milestone for milestone in schedule.milestones)
