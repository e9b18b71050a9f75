"""The learning rate of an epoch, for pretraining and for the linear protocol."""

import math

from moco_eval.config import Schedule


def learning_rate(schedule: Schedule, lr: float, epoch: int) -> float:
    """The rate of an epoch, counted from 0. Source: facebookresearch/moco, main_moco.py and the CIFAR-10 demo."""
    if schedule.kind == "step":
        return lr * schedule.gamma ** sum(epoch >= milestone for milestone in schedule.milestones)
    return lr * 0.5 * (1 + math.cos(math.pi * (epoch + schedule.count_from) / schedule.epochs))
