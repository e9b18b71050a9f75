"""A run that was checked and can start: everything resolved, nothing written."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moco_eval.config import load as configs
from moco_eval.config.deviations import differences
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.data.band_transforms import left_out
from moco_eval.data.catalogue import open_images, require_whole, split_deviations
from moco_eval.data.glance import doubts, passed_over
from moco_eval.data.image_set import ImageSet
from moco_eval.encoders.architectures import Architecture, VisionTransformer, architecture, resnet
from moco_eval.errors import InputError
from moco_eval.runtime.device import AMPERE
from pretraining.views import preprocessing, recipes

CANONICAL = {
    "pretrain/moco-v1@1": "moco_v1_r50",
    "pretrain/moco-v2@1": "moco_v2_r50",
    "pretrain/moco-v3-resnet@1": "moco_v3_r50",
    "pretrain/moco-v3-vit@1": "moco_v3_vit_base",
    "pretrain/cifar10-demo@2": "cifar10",
}
# what a paper's table varies; all other differences from the protocol's config are deviations
FREE_KEYS = ("arch", "mechanism", "queue_size", "momentum", "symmetric", "schedule.epochs", "bn", "bn_groups")

# MoCo v3's ResNets: what is published for each length, at batch 4096; 800 is the paper's, the others the repository's
BY_EPOCHS = {
    300: {"optimizer.lr": 4.8, "optimizer.weight_decay": 1e-6, "momentum": 0.99},
    800: {"optimizer.lr": 4.8, "optimizer.weight_decay": 1.5e-6, "momentum": 0.996},
    1000: {"optimizer.lr": 4.8, "optimizer.weight_decay": 1.5e-6, "momentum": 0.996},
}


@dataclass
class Plan:
    """A run that was checked and can start: everything resolved, nothing written yet.

    Attributes:
        config: without any `auto` but `bn`, whose meaning here is in `bn`.
        images: the training images.
        dataset, data: what they were opened by; no `data` for built-in ones.
        processes: R.
        bn: shuffle, split, sync or none.
        steps_per_epoch: whole batches only.
        deviations: in words, where the run leaves its protocol.
        warnings: what will work, but perhaps not as meant.
    """

    config: PretrainConfig
    images: ImageSet
    dataset: str
    data: Path | None
    processes: int
    bn: str
    steps_per_epoch: int
    deviations: list[str]
    warnings: list[str]

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.config.schedule.epochs

    @property
    def chance(self) -> float:
        """The loss when all keys look alike, in nats: log of the candidates, twice that where two losses are summed.

        MoCo v3's losses count 2 tau each, so that is 4 tau log N.
        """
        config = self.config
        candidates = config.queue_size + (config.mechanism not in ("end_to_end", "moco_v3"))
        return math.log(candidates) * (2 if config.symmetric else 1) * self.loss_scale

    @property
    def loss_scale(self) -> float:
        """What a loss counts: 2 tau in MoCo v3."""
        return 2 * self.config.temperature if self.config.mechanism == "moco_v3" else 1

    @property
    def parts(self) -> int:
        """Of a batch, each with a loss of its own; MoCo v3 has one loss, whatever the number of parts it encodes in."""
        return 1 if self.config.mechanism == "moco_v3" else self.config.accumulate

    @property
    def full_step(self) -> int:
        """The step after which the dictionary holds encoded keys only."""
        if self.config.mechanism == "moco":
            return math.ceil(self.config.queue_size / self.config.pushed)
        halvings = 7  # of a slot's random start, after which less than 1 % of it is left
        return halvings * self.steps_per_epoch if self.config.mechanism == "memory_bank" else 0

    @property
    def shuffles(self) -> bool:
        """Whether keys are encoded in other BN groups than their queries; the memory bank's are of another epoch."""
        return self.config.bn_permute and self.bn in ("shuffle", "split") and self.config.mechanism != "memory_bank"

    @property
    def equivalences(self) -> list[str]:
        """In words, where the run differs from its protocol in what was shown to be harmless."""
        config, same = self.config, []
        if config.views.backend == "device":
            same.append("views augmented in batches, with PIL's pixels (docs/protocols/views.md)")
        if config.mechanism == "moco_v3" and config.accumulate > 1:
            same.append(f"the batch encoded in {config.accumulate} parts, its loss and gradient those of the whole")
        return same

    def queue_age(self, step: int) -> float:
        """Mean age of MoCo's keys in steps, those of the start left out."""
        per_step = self.config.pushed
        return (min(step * per_step, self.config.queue_size) / per_step + 1) / 2

    def about(self) -> dict[str, Any]:
        """What travels with the weights, in plain containers."""
        config = self.config.model_dump(mode="json")
        return {
            "arch": self.config.arch,
            "config": config,
            "preprocessing": preprocessing(self.config.views, self.images).to_dict(),
            "pretraining": {
                "protocol": self.config.protocol,
                "dataset": self.images.record(),
                "bn": self.bn,
                "processes": self.processes,
                "deviations": self.deviations,
                "equivalences": self.equivalences,
                "config": config,
            },
        }

    def resolved(self) -> dict[str, Any]:
        """Everything that defines the run; another of these in the same folder is refused."""
        return {
            "command": "pretrain",
            "dataset": self.images.record(),
            "processes": self.processes,
            "bn": self.bn,
            "config": self.config.model_dump(mode="json"),
        }

    def describe(self) -> str:
        """What will run, in a few lines."""
        config = self.config
        symbols = {
            "moco": f"MoCo, K {config.queue_size}, m {config.momentum}",
            "memory_bank": f"memory bank of {len(self.images)} slots, K {config.queue_size} drawn",
            "end_to_end": f"end-to-end, K {config.queue_size} (the batch)",
            "moco_v3": f"MoCo v3, N {config.queue_size} (the batch), m {config.momentum}"
            + (" rising to 1" if config.momentum_schedule == "cosine" else ""),
        }[config.mechanism]
        parts = f" in {config.accumulate} parts" if config.accumulate > 1 else ""
        return "\n".join(
            [
                f"{config.protocol}: {config.arch}, {symbols}, tau {config.temperature}",
                f"data: {self.images.name}, {len(self.images)} images, {config.schedule.epochs} epochs of "
                f"{self.steps_per_epoch} steps, batch {config.batch_size}{parts}, lr {config.optimizer.lr:g}, "
                f"{config.precision}{_compiled(config)}",
                f"bn: {self.bn}"
                + (f" in {config.bn_groups} groups" if self.bn == "split" else "")
                + ("" if self.shuffles or config.mechanism == "moco_v3" else ", keys not permuted"),
                f"chance level of the loss: {self.chance:.4f}"
                + (f"; the queue is filled after {self.full_step} steps" if config.mechanism == "moco" else ""),
                *self._bytes(),
                *(f"warning: {warning}" for warning in self.warnings),
                *(f"differs from {config.protocol}: {deviation}" for deviation in self.deviations),
            ]
        )

    def _bytes(self) -> list[str]:
        """What shuffling moves between processes, where it does."""
        if self.processes == 1 or not self.shuffles:
            return []
        ours, official = shuffle_bytes(self.config, self.processes, self.images)
        return [
            f"shuffling: a process receives {ours / 2**20:.3g} MiB of images a step on average; "
            f"gathering them all in fp32, as the official code does, takes {official / 2**20:.3g} MiB"
        ]


def _compiled(config: PretrainConfig) -> str:
    return (
        ", compiled, as CUDA graphs" if config.compile == "reduce-overhead" else ", compiled" if config.compile else ""
    )


def shuffle_bytes(config: PretrainConfig, processes: int, images: ImageSet | None = None) -> tuple[float, int]:
    """Bytes of images that one process receives from others in a step: ours (mean over permutations), official.

    Ours: each of its batch/R images comes from another process with probability (R - 1)/R, in uint8, bands in fp32.
    Official (moco/builder.py): every image of every other process, in fp32.
    """
    share = config.batch_size // processes
    directions = 2 if config.symmetric else 1
    image = (images.channels if images else 3) * config.views.size**2
    ours = share * (processes - 1) / processes * image * (4 if images and images.bands else 1) * directions
    return ours, (processes - 1) * share * image * 4 * directions


def plan(
    config: PretrainConfig,
    dataset: str,
    data: Path | None,
    processes: int,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    limit: int | None = None,
) -> Plan:
    """Check that a run can start.

    Args:
        limit: of images, for a small try.
    Raises:
        InputError: data that is not there or too damaged, fewer images than a batch, a batch that the processes,
            parts or BN groups cannot share equally.
    """
    _require_trainable(config)
    images = open_images(dataset, data, "pretrain").limited(limit)
    config = of_channels(config, images)
    usual = "sync" if config.mechanism == "moco_v3" else "shuffle" if processes > 1 else "split"
    bn = config.bn if config.bn != "auto" else usual
    config = config.model_copy(update=by_device(config, device))
    run = Plan(config, images, dataset, data, processes, bn, len(images) // config.batch_size, [], [])
    _require_shares(run)
    run.warnings += _warnings(run) + require_whole(images, config.bad_images)
    run.warnings += passed_over(images) + doubts(images, "pass")
    run.deviations += _deviations(run)
    return run


def _require_trainable(config: PretrainConfig) -> None:
    """Raises InputError where the mechanism does not train the network, or the views are not what it takes."""
    arch = architecture(config.arch)
    if config.mechanism != "moco_v3":
        if isinstance(arch, VisionTransformer):
            raise InputError(
                f"{config.arch} is a ViT, which MoCo v3 trains and mechanism {config.mechanism} does not; start from "
                "moco_v3_vit_base or moco_v3_vit_small"
            )
        resnet(config.arch)
        return
    if config.accumulate > 1 and _normalises_batches(config):
        raise InputError(
            f"accumulate {config.accumulate} would give the batch norms of {config.arch} the statistics of a part of "
            "the batch; take accumulate=1, or a ViT without a stem of convolutions"
        )
    if isinstance(arch, Architecture):
        if config.freeze_patches:
            raise InputError(f"freeze_patches: {config.arch} has no patches; take --set freeze_patches=false")
        if config.positions != "sincos":
            raise InputError(
                f"positions {config.positions}: {config.arch} has no patches to place; take --set positions=sincos"
            )
        return
    if not isinstance(arch, VisionTransformer):
        raise InputError(f"{config.arch} is not trained here; take a ResNet or a ViT, such as vit_base_patch16_224")
    if arch.size != config.views.size:
        raise InputError(
            f"{config.arch} takes images of {arch.size} pixels and views.size is {config.views.size}; "
            f"take --set views.size={arch.size}"
        )
    if arch.dim % 4:
        raise InputError(f"{config.arch} is {arch.dim} wide, which sin-cos positions in two halves do not fill")
    if arch.conv_stem and config.freeze_patches:
        raise InputError(f"freeze_patches: the stem of {config.arch} is trained; take --set freeze_patches=false")


def _normalises_batches(config: PretrainConfig) -> bool:
    """Whether the backbone has batch norms: a ResNet, or a ViT with a stem of convolutions."""
    arch = architecture(config.arch)
    return isinstance(arch, Architecture) or getattr(arch, "conv_stem", False)


def smaller_step(config: PretrainConfig) -> str:
    """The option for a step that takes less memory; MoCo v3 encodes a batch in parts only where that is exact."""
    if config.mechanism == "moco_v3" and _normalises_batches(config):
        return f"--batch-size {max(1, config.batch_size // 4)}"
    return f"--set accumulate={4 * config.accumulate}"


def of_channels(config: PretrainConfig, images: ImageSet) -> PretrainConfig:
    """The config with a network that takes as many channels as the images have.

    Raises:
        InputError: the config names another number, or views that images of bands do not have.
    """
    channels, arch = images.channels, architecture(config.arch)
    assert isinstance(arch, Architecture | VisionTransformer)
    if "," in config.arch and arch.channels != channels:
        raise InputError(
            f"arch {config.arch} takes {arch.channels} channels, and the images of {images.name} have {channels}; take "
            f"--set arch={config.arch.partition(',')[0]}, which follows the images"
        )
    if not images.bands:
        return config
    if config.views.backend == "reference":
        raise InputError(
            f"views.backend reference is PIL's, for RGB of 8 bits, and {images.name} has {channels} bands; take "
            "--set views.backend=device"
        )
    if config.views.recipe == "digits":
        raise InputError(
            f"views.recipe digits slants drawn strokes of 8 bits, and {images.name} has {channels} bands; take "
            "--set views.recipe=moco_v2"
        )
    name = config.arch if channels == 3 or "," in config.arch else f"{config.arch},channels={channels}"
    return config.model_copy(update={"arch": name})


def by_device(config: PretrainConfig, device: torch.device) -> dict[str, Any]:
    """bf16 and compiled encoders on a GPU that has bf16, published arithmetic elsewhere, unless the config says.

    Raises:
        InputError: fp16 on MPS.
    """
    if device.type == "mps" and config.precision == "fp16":
        raise InputError("precision fp16 wants its losses scaled, which MPS does not do; take --precision bf16 or fp32")
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= AMPERE
    chosen = {"precision": "bf16" if fast else "fp32", "compile": fast}
    resolved = {key: value for key, value in chosen.items() if getattr(config, key) == "auto"}
    return resolved | ({"expect": None} if resolved.get("precision") == "bf16" else {})


def _require_shares(run: Plan) -> None:
    config, batch = run.config, run.config.batch_size
    parts = run.processes * config.accumulate
    if run.steps_per_epoch == 0:
        raise InputError(
            f"{run.images.name} has {len(run.images)} images, less than one batch of {batch}; "
            f"take --batch-size {len(run.images)} or less"
        )
    if batch % parts:
        fewer = next(n for n in range(run.processes, 0, -1) if batch % (n * config.accumulate) == 0)
        raise InputError(
            f"batch_size {batch} does not divide among {run.processes} processes"
            + (f" in {config.accumulate} parts" if config.accumulate > 1 else "")
            + f"; take {fewer} of them, or a --batch-size that {parts} divides"
        )
    if run.bn == "split" and (batch // parts) % config.bn_groups:
        raise InputError(
            f"a batch of {batch // parts} per process does not divide into {config.bn_groups} BN groups; "
            "change batch_size or --set bn_groups=..."
        )
    if config.mechanism == "memory_bank" and len(run.images) <= batch:
        raise InputError(f"mechanism memory_bank draws its negatives outside the batch, which holds all {batch} images")


def _warnings(run: Plan) -> list[str]:
    config, keys = run.config, run.config.queue_size
    warnings = []
    if run.bn == "shuffle" and run.processes == 1:
        warnings.append(
            "bn: shuffle on one process protects nothing: queries and keys share statistics; take bn: split"
        )
    if config.mechanism == "moco" and keys % config.pushed:
        warnings.append(
            f"queue_size {keys} is not a multiple of the {config.pushed} keys of a step: the queue wraps around"
        )
    if config.mechanism == "moco" and run.full_step > run.steps:
        warnings.append(f"the {run.steps} steps of the schedule never fill the queue of {keys}: random keys stay in it")
    if config.mechanism == "end_to_end" and config.accumulate > 1:
        warnings.append(
            f"accumulate adds no negatives to end_to_end: a query meets the {keys - 1} other keys of its part"
        )
    return warnings


def _deviations(run: Plan) -> list[str]:
    config, canonical = run.config, _canonical(run.config)
    free: tuple[str, ...] = FREE_KEYS
    per_image = canonical.optimizer.lr / canonical.batch_size
    if config.mechanism == "end_to_end" and math.isclose(config.optimizer.lr, per_image * config.batch_size):
        free += ("batch_size", "optimizer.lr")  # K is the batch, and the rate follows it (P1 Fig. 3)
    if config.mechanism == "moco_v3":
        free += ("accumulate",)  # refused where it is not exact
    if getattr(architecture(config.arch), "conv_stem", False):
        free += ("freeze_patches",)  # the official code freezes no such stem either
    differ = differences(config, canonical, free) + split_deviations(run.images)
    if type(architecture(config.arch)) is not type(architecture(canonical.arch)):
        differ.append(f"arch {config.arch} by the recipe of {canonical.arch}")
    if run.images.bands:
        steps = left_out(recipes(config.views)[1])
        differ.append(f"images of {run.images.channels} bands" + (f": views without {steps}" if steps else ""))
    if config.mechanism == "moco_v3":
        return differ + (["batch statistics of each process alone"] if run.bn == "none" and run.processes > 1 else [])
    leaks = run.bn in ("none", "sync") or (run.bn == "shuffle" and run.processes == 1)
    if leaks and config.mechanism != "memory_bank":
        differ.append(f"bn {run.bn} on {run.processes} process(es), which does not protect from leaking")
    if run.bn == "sync" and config.mechanism == "memory_bank":
        differ.append("bn sync instead of statistics per GPU")
    groups = run.processes * config.accumulate * (config.bn_groups if run.bn == "split" else 1)
    if run.bn in ("split", "shuffle") and not leaks and groups != canonical.bn_groups:
        differ.append(f"batch norm in {groups} groups instead of {canonical.bn_groups}")
    return differ


def _canonical(config: PretrainConfig) -> PretrainConfig:
    """The shipped config of a protocol, in the published arithmetic."""
    if config.protocol not in CANONICAL:
        raise InputError(f"unknown protocol {config.protocol!r}.{configs.did_you_mean(config.protocol, CANONICAL)}")
    loaded = configs.load(CANONICAL[config.protocol], "pretrain", PretrainConfig)
    halved = config.mechanism == "moco_v3" and config.precision == "fp16"  # which it was published in
    published = {"precision": "fp16" if halved else "fp32", "compile": False}
    if config.protocol == "pretrain/moco-v3-resnet@1" and config.schedule.epochs in BY_EPOCHS:
        settings = [f"{key}={value}" for key, value in BY_EPOCHS[config.schedule.epochs].items()]
        loaded = configs.load(CANONICAL[config.protocol], "pretrain", PretrainConfig, settings)
    return loaded.model_copy(update=published)
