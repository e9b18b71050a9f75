"""A run that was checked and can start: everything resolved, nothing written."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moco_eval import config as configs
from moco_eval.config import PretrainConfig
from moco_eval.data.images import ImageSet, departures, open_images
from moco_eval.encoders.build import architecture
from moco_eval.errors import InputError
from moco_eval.runtime import warn
from pretraining.moco import chance_loss
from pretraining.views import preprocessing

# what a paper's table varies; all other differences from the protocol's config are deviations
FREE_KEYS = (
    "arch",
    "queue_size",
    "momentum",
    "symmetric",
    "schedule.epochs",
    "bn",
    "bn_groups",
)


@dataclass
class Plan:
    """A run that was checked and can start: everything resolved, nothing written yet."""

    config: PretrainConfig
    images: ImageSet
    data: Path | None
    processes: int
    bn: str
    steps_per_epoch: int
    deviations: list[str]

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.config.schedule.epochs

    @property
    def chance(self) -> float:
        return chance_loss(self.config.queue_size, self.config.symmetric)

    @property
    def queue_full_step(self) -> int:
        pushed = self.config.batch_size * (2 if self.config.symmetric else 1)
        return math.ceil(self.config.queue_size / pushed)

    def about(self) -> dict[str, Any]:
        """What travels with the weights, in plain containers."""
        config = self.config.model_dump(mode="json")
        return {
            "arch": self.config.arch,
            "config": config,
            "preprocessing": preprocessing(self.config.views).to_dict(),
            "pretraining": {
                "protocol": self.config.protocol,
                "dataset": self.images.record(),
                "bn": self.bn,
                "processes": self.processes,
                "deviations": self.deviations,
                "config": config,
            },
        }

    def describe(self) -> str:
        """What will run, in a few lines."""
        config = self.config
        return "\n".join(
            [
                f"{config.protocol}: {config.arch}, K {config.queue_size}, m {config.momentum}, "
                f"tau {config.temperature}",
                f"data: {self.images.name}, {len(self.images)} images, {config.schedule.epochs} epochs of "
                f"{self.steps_per_epoch} steps, batch {config.batch_size}, lr {config.optimizer.lr:g}",
                f"bn: {self.bn}"
                + (f" in {config.bn_groups} groups" if self.bn == "split" else "")
                + ("" if config.bn_permute and self.bn != "none" else ", keys not permuted"),
                f"chance level of the loss: {self.chance:.4f}; the queue is filled after {self.queue_full_step} steps",
                *(f"differs from {config.protocol}: {words}" for words in self.deviations),
            ]
        )


def plan(config: PretrainConfig, dataset: str, data: Path | None, processes: int) -> Plan:
    """Check that a run can start.

    Raises:
        InputError: data that is not there, fewer images than a batch, a batch that the processes or BN groups
            cannot share equally.
    """
    architecture(config.arch)
    images = open_images(dataset, data, "train")
    bn = config.bn if config.bn != "auto" else ("shuffle" if processes > 1 else "split")
    batch = config.batch_size
    if len(images) < batch:
        raise InputError(
            f"{dataset} has {len(images)} images, less than one batch of {batch}; "
            f"take --batch-size {len(images)} or less"
        )
    if batch % processes:
        raise InputError(f"batch_size {batch} does not divide among {processes} processes")
    if bn == "split" and (batch // processes) % config.bn_groups:
        raise InputError(
            f"a batch of {batch // processes} per process does not divide into {config.bn_groups} BN groups; "
            "change batch_size or --set bn_groups=..."
        )
    if bn == "shuffle" and processes == 1:
        warn("bn: shuffle on one process protects nothing: queries and keys share their statistics; take bn: split")
    canonical = _canonical(config)
    differ = configs.differences(config, canonical, FREE_KEYS) + departures(images)
    if bn == "none" or (bn == "shuffle" and processes == 1):
        differ.append(f"bn {bn} on {processes} process(es), which does not protect from leaking")
    if bn == "split" and config.bn_groups != canonical.bn_groups:
        differ.append(f"bn_groups {config.bn_groups} instead of {canonical.bn_groups}")
    return Plan(config, images, data, processes, bn, len(images) // batch, differ)


CANONICAL = {
    "pretrain/moco-v1@1": "moco_v1_r50",
    "pretrain/moco-v2@1": "moco_v2_r50",
    "pretrain/cifar10-demo@1": "cifar10",
}


def _canonical(config: PretrainConfig) -> PretrainConfig:
    if config.protocol not in CANONICAL:
        raise InputError(f"unknown protocol {config.protocol!r}.{configs.did_you_mean(config.protocol, CANONICAL)}")
    return configs.load(CANONICAL[config.protocol], "pretrain", PretrainConfig)
