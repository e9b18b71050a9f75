"""What a classification protocol is given, what it answers, and what it must say of itself."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moco_eval.classification.further import FurtherTest
from moco_eval.data.image_set import ImageSet
from moco_eval.encoders.encoder import Encoder
from moco_eval.features.cache import Features, Source, several_features_of
from moco_eval.features.expected_pixels import expected_pixels
from moco_eval.features.extract import Crops
from moco_eval.preprocessing import Preprocessing


@dataclass(frozen=True)
class Task:
    """What one classification evaluation is about.

    Attributes:
        feature: pooled, head or a stage.
        labels_per_class: train on so many, drawn anew in each trial; None for all.
        cache: the folder of extracted features; None keeps them in memory.
        further: test sets of the same classes that are judged beside `test`.
        interpolation: of test images; None is what the encoder expects.
    """

    encoder: Encoder
    train: ImageSet
    test: ImageSet
    feature: str = "pooled"
    labels_per_class: int | None = None
    trials: int = 1
    cache: Path | None = None
    further: tuple[FurtherTest, ...] = ()
    interpolation: str | None = None
    cached: Counter = field(default_factory=Counter, compare=False)  # images whose features were there, by split

    @property
    def preprocessing(self) -> Preprocessing:
        """What the images become for the encoder. Raises InputError where they have other channels than it takes."""
        pixels = expected_pixels(self.encoder, self.train)
        return replace(pixels, interpolation=self.interpolation) if self.interpolation else pixels

    def training_images(self, seed: int) -> ImageSet:
        """The training images of a trial."""
        return self.train.few_labels(self.labels_per_class, seed) if self.labels_per_class else self.train

    def features(self, images: ImageSet, config: Any, device: torch.device, crops: Crops | None = None) -> Features:
        """Features of a set of images, as `config` says (precision, batch_size, workers). Collective."""
        return self.several([self.source(images, config, crops)], device)[0]

    def further_features(self, config: Any, device: torch.device, feature: str | None = None) -> dict[str, Features]:
        """Of the further test images, by their splits; of another feature than the task's if so asked. Collective."""
        sources = [self.source(part, config, feature=feature) for test in self.further for part in test.parts]
        return {source.images.split: self.several([source], device)[0] for source in sources}

    def several(self, sources: Sequence[Source], device: torch.device) -> list[Features]:
        """Several features of the same images in one pass. Collective."""
        features = several_features_of(sources, self.cache, device)
        self.cached[sources[0].images.split] += len(features[0]) - features[0].passed
        return features

    def source(self, images: ImageSet, config: Any, crops: Crops | None = None, feature: str | None = None) -> Source:
        """What those features depend on; the task's own feature by default."""
        settings = (config.precision, config.batch_size, config.workers)
        return Source(self.encoder, images, self.preprocessing, feature or self.feature, crops, *settings)

    def seeds(self, config: Any) -> range:
        """Of the trials."""
        return range(config.seed, config.seed + self.trials)


@dataclass
class Outcome:
    """What a trial came to.

    Attributes:
        scores: of each test image for each class, (images, classes), on the CPU.
        images: how many images it is about, epochs counted, for the cost.
        notes: what the trial chose or saw besides, plain values; kept beside its metrics. What stands there under
            `deviations`, a list of sentences, is also said of the whole record.
        seconds: of earlier sessions.
        metrics: in percent, where they are not what `judge.metrics` makes of the scores.
        arrays: more about each test image, kept in predictions.npz (of the first trial).
        further: scores of further test images, by their splits.
    """

    scores: torch.Tensor
    images: int
    notes: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    metrics: dict[str, float] | None = None
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    further: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Passes:
    """How many images go through the network: trained on, or forward only, in each trial; or once for all trials."""

    trained: int = 0
    forward: int = 0
    extracted: int = 0


# (task, config, seed, where its state may be kept or None, device); None on ranks that leave the work to the first
Trial = Callable[[Task, Any, int, Path | None, torch.device], Outcome | None]


def as_it_is(task: Task, _config: Any) -> Task:
    """A task that the config does not change."""
    return task


def nothing_more(_task: Task, _config: Any) -> None:
    """No requirement beyond those of every protocol."""


def clean_features(task: Task, config: Any) -> list[Source]:
    """The clean features of the test images and of each trial's training images; the same images once."""
    seeds = task.seeds(config) if task.labels_per_class else [config.seed]
    return [task.source(images, config) for images in (task.test, *map(task.training_images, seeds))]


def own_shipped_config(name: str, _task: Task) -> str:
    """The shipped config that a protocol is held against: the one of its name."""
    return name


@dataclass(frozen=True)
class Code:
    """What runs a protocol: the one contract between a protocol's module and everything that asks for protocols.

    Attributes:
        run_trial: makes the outcome of one seed; called by every process.
        passes: (config, training images, test images) to the images of one trial that go through the network.
        prepare: the task as this config wants it: another feature, more trials. Raises InputError where it cannot be.
        check: what can be refused before anything is written, beyond what every protocol refuses; raises InputError.
        sources: the features that all trials together take, for protocols on extracted features; None for the others.
        own_work: (config, a `probe.Probe`) to about how many seconds one trial takes beside the extraction, and what
            that assumes; timed on random features of the right shape. None where the network's passes are all.
        memory: (config, a `probe.Probe`) to about how many bytes one trial holds beside the network, on the device that
            holds most; of the features those that it copies, not those that stay on the disk.
        summary: (config, trials of the record) to more for the record.
        draw: (task, seed and outcome of the first trial, run directory): pictures.
        shipped: the shipped config that the protocol is held against, where it depends on the encoder or the data.
    """

    run_trial: Trial
    passes: Callable[[Any, int, int], Passes]
    prepare: Callable[[Task, Any], Task] = as_it_is
    check: Callable[[Task, Any], None] = nothing_more
    sources: Callable[[Task, Any], list[Source]] | None = None
    own_work: Callable[[Any, Any], tuple[float, str]] | None = None
    memory: Callable[[Any, Any], float] | None = None
    summary: Callable[[Any, list[dict[str, Any]]], dict[str, Any]] | None = None
    draw: Callable[[Task, int, Outcome, Path], None] | None = None
    shipped: Callable[[str, Task], str] = own_shipped_config
