"""About how long a step takes on this machine, from small timed pieces of its real work on random images.

A piece is timed once and kept in the cache. Left out: loading and decoding images, cutting views, fitting classifiers
to features that are there.
"""

import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moco_eval.classification.protocols import by_name, load_config
from moco_eval.config import load as configs
from moco_eval.config.data_name import is_called
from moco_eval.config.detection import DetectConfig
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.config.segmentation import SegmentConfig
from moco_eval.data.boxes import cityscapes, coco, lvis, voc
from moco_eval.data.boxes.scenes import CANVAS
from moco_eval.data.catalogue import preprocessing_for
from moco_eval.data.masks.samples import PUBLISHED
from moco_eval.detection.detector import Detector
from moco_eval.detection.fine_tune import optimizer_for
from moco_eval.detection.inputs import resized
from moco_eval.encoders import zoo
from moco_eval.encoders.architectures import architecture, build_backbone
from moco_eval.encoders.encoder import Encoder
from moco_eval.encoders.load import load
from moco_eval.errors import InputError, RunFailed
from moco_eval.papers.gpu_hours import images_of
from moco_eval.papers.match import Record
from moco_eval.papers.steps import ChainStep
from moco_eval.papers.tables import Row, Table
from moco_eval.results.environment import hardware, processor
from moco_eval.runtime import files
from moco_eval.runtime.console import log, warn
from moco_eval.runtime.device import autocast, choose_device, convolutions, forked_generator, place, wait_for
from moco_eval.runtime.text import duration
from moco_eval.segmentation import evaluate, networks, train
from moco_eval.segmentation.inputs import fitted

CPU_BATCH = 32  # images at once at most: a CPU gains nothing by more
SECONDS = 3.0  # of a timed piece at most; smaller ones come before it, to know
OBJECTS = 4  # boxes of a random image
DETECTION_TEST = {
    "voc": voc.OFFICIAL["2007", "test"],
    "voc07": voc.OFFICIAL["2007", "test"],
    "coco": coco.OFFICIAL["val2017"],
    "lvis-v0.5": coco.OFFICIAL["val2017"],  # whose images its val is on
    "lvis-v1": lvis.IMAGES["v1", "val"],
    "cityscapes": cityscapes.OFFICIAL["val"],
}  # test images
MASK_TEST = {
    "voc-aug": (500, 375),
    "voc2012": (500, 375),
    "cityscapes": (2048, 1024),
    "ade20k": (683, 512),
    "coco-stuff": (640, 480),
    "digits": (CANVAS, CANVAS),
}  # width and height of most test images with masks


@dataclass(frozen=True)
class Cost:
    """Seconds of a step, and where they are from: a record of this machine, a timed piece, or known to be few."""

    seconds: float
    basis: str

    @property
    def phrase(self) -> str:
        if self.basis == "small":
            return "under a minute"
        return f"about {duration(self.seconds)}" + (f", as in {self.basis}" if self.basis != "timed" else "")


@dataclass(frozen=True)
class Probe:
    """A piece of work: one image through a network.

    Attributes:
        kind: forward; train (forward and backward); or those of a detector or a segmentation, with its head.
        size: side of the image in pixels; 0 for a detector, whose recipe says it.
        batch: images that the real work has in a batch, on one GPU.
        recipe: of a detector; with segment/ before it, of a segmentation.
    """

    kind: str
    arch: str
    size: int
    batch: int
    precision: str
    recipe: str = ""

    @property
    def phrase(self) -> str:
        network = f"{self.recipe} on {self.arch}" if self.recipe else f"{self.arch} at {self.size} pixels"
        return f"{network}, {self.kind}, {self.precision}, batch {self.batch}"


def machine() -> str:
    """What the costs are for, in words."""
    device = choose_device("auto")
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    if device.type == "mps":
        return f"MPS of {processor()}"
    return f"{processor()}, {threads} thread{'s' if threads > 1 else ''}"


def costs(steps: Sequence[ChainStep], table: Table, records: Sequence[Record]) -> list[Cost | None]:
    """Of each step, all trials together; None where its data have no known number of images."""
    device = choose_device("auto")
    rows = {row.label: row for row in table.rows}
    return [_cost(step, rows[step.cells[0][0]], table, records, device) for step in steps]


def _cost(step: ChainStep, row: Row, table: Table, records: Sequence[Record], device: torch.device) -> Cost | None:
    if step.kind not in ("pretrain", "evaluate"):
        return Cost(30.0, "small")
    if cost := measured(step, row, table, records, device):
        return cost
    seconds = 0.0
    for probe, images in work(step, row):
        each = seconds_per_image(probe, device)
        if each is None or not images:
            return None
        seconds += each * images
    at_once = _number(step.arguments, "--nproc") if device.type == "cuda" else 1  # processes share a CPU
    return Cost(seconds / at_once, "timed")


# A record that tells


def measured(step: ChainStep, row: Row, table: Table, records: Sequence[Record], device: torch.device) -> Cost | None:
    """What the newest record of the same evaluation of the same architecture took on this machine."""
    if step.kind == "pretrain":
        return None  # leaves no record
    column, arch = table.columns[step.cells[0][1]], _arch(step, row)
    alike = [
        record
        for record in records
        if record["protocol"] == column.protocol
        and is_called(record["dataset"]["name"], str(column.dataset))
        and record["encoder"]["arch"] == arch
        and _is_whole(record)
        and _ran_here(record, _number(step.arguments, "--nproc"), device)
    ]
    if not alike:
        return None
    newest = max(alike, key=lambda record: record["environment"].get("time", ""))
    seconds = newest["cost"]["seconds"] / len(newest["trials"]) * _number(step.arguments, "--trials")
    return Cost(seconds, newest.get("run", "an earlier run"))


def _is_whole(record: Record) -> bool:
    """Nothing of it came from a cache or was made smaller."""
    return (
        record.get("cost", {}).get("seconds", 0) > 0
        and not record["cost"].get("cached_images")
        and not {"labels_per_class", "subset"} & record["dataset"].keys()
        and all(deviation.startswith("encoder: ") for deviation in record["deviations"])
    )


def _ran_here(record: Record, processes: int, device: torch.device) -> bool:
    where = record["environment"]
    command = _words(where.get("command"))
    return (
        where.get("hardware") == hardware()
        and record["cost"].get("device", "").startswith(device.type)
        and _number(command, "--nproc") == processes
    )


def _words(command: Any) -> list[str]:
    """The words of a command line that a record holds; none of what is no command line."""
    try:
        return shlex.split(command) if isinstance(command, str) else []
    except ValueError:  # a quote that is never closed
        return []


def _number(arguments: Sequence[str], option: str) -> int:
    """The value of an option in a command; 1 where it is not given, 0 where it is no number."""
    value = _value(arguments, option, "1")
    return int(value) if value.isascii() and value.isdecimal() and len(value) < 10 else 0


def _value(arguments: Sequence[str], option: str, default: str) -> str:
    return next((value for name, value in pairwise(arguments) if name == option), default)


# What a step consists of


def work(step: ChainStep, row: Row) -> list[tuple[Probe, float]]:
    """The pieces of a step, and how many images go through each; 0 where that is not known."""
    if step.kind == "pretrain":
        assert row.recipe
        return list(_pretraining(step, row.recipe.resolved()))
    trials, arch = _number(step.arguments, "--trials"), _arch(step, row)
    kind = step.arguments[0]
    if kind == "detect":
        pieces = _detection(step, configs.load(step.name, "detect", DetectConfig), arch)
    elif kind == "segment":
        pieces = _segmentation(step, configs.load(step.name, "segment", SegmentConfig), arch)
    else:
        pieces = _classification(step, load_config(step.name, kind), arch, _side(step, row), trials)
    return [(probe, trials * images) for probe, images in pieces]


def _pretraining(step: ChainStep, recipe: PretrainConfig) -> Iterator[tuple[Probe, float]]:
    """A query forward and backward and a key forward for each image, twice if symmetric; and the kNN monitor."""
    precision = _value(step.arguments, "--precision", recipe.precision)
    yield from pretraining(recipe, step.dataset, precision, _number(step.arguments, "--nproc"))


def pretraining(recipe: PretrainConfig, dataset: str, precision: str, processes: int) -> Iterator[tuple[Probe, float]]:
    """The pieces of a pretraining on a published data set, and how many images go through each."""
    yield from pretraining_on(images_of(dataset, "train"), images_of(dataset, "test"), recipe, precision, processes)


def pretraining_on(
    images: int, test: int, recipe: PretrainConfig, precision: str, processes: int
) -> Iterator[tuple[Probe, float]]:
    """The same on so many training images; `test`: those of its kNN monitor."""
    epochs = recipe.schedule.epochs
    precision = "fp32" if precision == "auto" else precision
    batch, size = max(1, recipe.batch_size // recipe.accumulate // processes), recipe.views.size
    train, forward = (Probe(kind, recipe.arch, size, batch, precision) for kind in ("train", "forward"))
    views = images * epochs * (2 if recipe.symmetric else 1)
    yield train, views * (2 if recipe.mechanism == "end_to_end" else 1)
    looks = epochs // recipe.knn.every * (images + test) if recipe.knn else 0
    keys = views if recipe.mechanism in ("moco", "moco_v3") else 0
    again = views if recipe.mechanism == "moco_v3" and recipe.accumulate > 1 else 0
    if keys + again + looks:
        yield forward, keys + again + looks


def _classification(step: ChainStep, config: Any, arch: str, size: int, trials: int) -> Iterator[tuple[Probe, float]]:
    """The images of one trial; features that are extracted once count for all trials together."""
    train, test = images_of(step.dataset, "train"), images_of(step.dataset, "test")
    passes = by_name(config.protocol).code().passes(config, train, test)
    if passes.trained:
        yield Probe("train", arch, size, config.batch_size, config.precision), passes.trained
    yield Probe("forward", arch, size, config.batch_size, config.precision), passes.forward + passes.extracted / trials


def _detection(step: ChainStep, recipe: DetectConfig, arch: str) -> Iterator[tuple[Probe, float]]:
    """Every image of every iteration, a third of that for precise BN, which has no backward; and the test images."""
    test = recipe.scenes.test if recipe.scenes else DETECTION_TEST.get(step.dataset, 0)
    batch = max(1, recipe.batch_size // recipe.accumulate // _number(step.arguments, "--nproc"))
    train, forward = (Probe(kind, arch, 0, batch, recipe.precision, step.name) for kind in ("train", "forward"))
    yield train, (recipe.schedule.iterations + recipe.precise_bn / 3) * recipe.batch_size
    yield forward, test


def _segmentation(step: ChainStep, recipe: SegmentConfig, arch: str) -> Iterator[tuple[Probe, float]]:
    """Every crop of every iteration; and the test images, as many crops as cover them."""
    batch = max(1, recipe.batch_size // _number(step.arguments, "--nproc"))
    train = Probe("train", arch, recipe.views.crop, batch, recipe.precision, f"segment/{step.name}")
    yield train, recipe.schedule.iterations * recipe.batch_size
    test = recipe.scenes.test if recipe.scenes else PUBLISHED[step.dataset][1]
    crops = crops_of(fitted(MASK_TEST[step.dataset], recipe.test.fit), recipe)
    yield replace(train, kind="forward", batch=1), test * crops


def crops_of(size: tuple[int, int], recipe: SegmentConfig) -> float:
    """How many crops a test image of a width and height is worth: those of its windows, or by its pixels."""
    window, stride, crop = recipe.test.window, recipe.test.stride, recipe.views.crop
    if window and stride:
        height, width = (max(side, window) for side in size[::-1])
        return len(list(evaluate.windows((height, width), window, stride))) * (window / crop) ** 2
    return size[0] * size[1] / crop**2


def _arch(step: ChainStep, row: Row) -> str:
    """The architecture of an evaluated encoder."""
    kind, _, rest = step.arguments[1].partition(":")
    if kind == "zoo":
        arch = zoo.entry(rest).recipe.arch
        return f"{arch}_224" if arch.startswith("vit_") and not arch.endswith("_224") else arch  # named without pixels
    if kind in ("random", "torchvision"):
        return rest.split(":")[0]
    assert row.recipe
    return row.recipe.resolved().arch


def _side(step: ChainStep, row: Row) -> int:
    """Of an evaluated image, in pixels."""
    if row.recipe and not step.arguments[1].startswith(("zoo:", "random:", "torchvision:")):
        return row.recipe.resolved().views.size
    return preprocessing_for(step.dataset, None).size


# Timing


def seconds_per_image(probe: Probe, device: torch.device) -> float | None:
    """Of one piece, from the cache where it has been timed before; None where memory is too small for it."""
    probe, key = _here(probe, device)
    known = _known(files.cache_folder("costs.json"))
    if key in known:
        return known[key]
    log(f"timing this machine once: {probe.phrase}")
    return timed_anew(probe, device)


def timed_anew(probe: Probe, device: torch.device) -> float | None:
    """The same, timed now whatever the cache holds, and kept there: an earlier timing may be of a busy machine."""
    probe, key = _here(probe, device)
    path = files.cache_folder("costs.json")
    took = measure(probe, device)
    if took is not None:
        try:
            files.write_json(path, _known(path) | {key: took})
        except (InputError, RunFailed) as error:
            warn(f"the timing is not kept: {error}")
    return took


def _here(probe: Probe, device: torch.device) -> tuple[Probe, str]:
    """A piece as it is timed on a device, and its name in the cache."""
    if device.type == "cpu":
        probe = replace(probe, batch=min(probe.batch, CPU_BATCH))
    return probe, f"{machine()}; torch {torch.__version__}; {probe.phrase}"


def _known(path: Path) -> dict[str, float]:
    """The timings that are there; a damaged file counts as none, and is replaced."""
    try:
        values = files.read_json(path)
    except InputError:
        return {}
    if not isinstance(values, dict):
        return {}
    return {key: value for key, value in values.items() if isinstance(value, float) and 0 < value < math.inf}


def measure(probe: Probe, device: torch.device) -> float | None:
    """Seconds for one whole image, from the largest piece that is likely to take no more than SECONDS.

    Pieces grow. None where not even the smallest fits into memory.
    """
    each = [seconds for _, seconds in timed(_pieces_of(probe)(probe, device), device, SECONDS)]
    return each[-1] if each else None


Pieces = Iterator[tuple[float, Callable[[], None]]]  # images of each, and what runs it


def timed(pieces: Pieces, device: torch.device, most: float) -> Iterator[tuple[float, float]]:
    """Yield the images of each piece and the seconds of one, as long as a piece is likely to take at most `most`.

    Ends where memory does.
    """
    seconds = None
    with forked_generator(device):
        torch.manual_seed(0)
        for images, run in pieces:
            if seconds is not None and seconds * images > most:
                break
            try:
                if seconds is None:
                    run()  # the first builds what later ones find
                seconds = _fastest(run, device, most) / images
            except torch.OutOfMemoryError:
                break
            yield images, seconds


def _pieces_of(probe: Probe) -> Callable[[Probe, torch.device], Pieces]:
    if probe.recipe.startswith("segment/"):
        return _segmenter_pieces
    return _detector_pieces if probe.recipe else encoder_pieces


def _fastest(run: Callable[[], None], device: torch.device, most: float) -> float:
    """Seconds of the fastest of up to four runs (others may be using this machine); of the only one if it is long."""
    took: list[float] = []
    while len(took) < 4 and sum(took) < most:
        began = time.perf_counter()
        run()
        wait_for(device)
        took.append(time.perf_counter() - began)
    return min(took)


def encoder_pieces(probe: Probe, device: torch.device) -> Pieces:
    """Growing batches through an encoder, as parts of whole images; the first of a quarter of their pixels."""
    training = probe.kind == "train"
    net = place(build_backbone(probe.arch), device).train(training)
    if training:
        net.to(memory_format=torch.channels_last)
    sizes = sorted({batch for batch in (2, 8, 32, 128) if batch < probe.batch} | {probe.batch})
    sides = [(2, probe.size)] if architecture(probe.arch).size else [(2, probe.size // 2)]
    for batch, side in sides + [(batch, probe.size) for batch in sizes]:
        images = torch.randn(batch, 3, side, side, device=device)

        def run(images: torch.Tensor = images) -> None:
            with torch.set_grad_enabled(training), autocast(device, probe.precision):
                out = net(images)
            if training:
                with convolutions(device, probe.precision):
                    out.float().square().mean().backward()
                net.zero_grad(set_to_none=True)

        yield batch * (side / probe.size) ** 2, run


def _detector_pieces(probe: Probe, device: torch.device) -> Pieces:
    recipe = configs.load(probe.recipe, "detect", DetectConfig)
    return detector_pieces(load(f"random:{probe.arch}"), recipe, 20, probe.kind == "train", probe.batch, device)


def detector_pieces(
    encoder: Encoder, recipe: DetectConfig, classes: int, training: bool, most: int, device: torch.device
) -> Pieces:
    """Steps of a detector: on a part of an image's pixels with that part of its regions, then on whole images.

    Args:
        most: images of a batch.
    """
    pieces = [(1 / 16, 1), (1 / 4, 1), (1.0, 1)]
    pieces += [(1.0, batch) for batch in sorted({2, most}) if training and 1 < batch <= most]
    for share, batch in pieces:
        less = _smaller(recipe, share)
        keypoints = 17 if recipe.keypoints else 0
        net = place(Detector(encoder, classes, less, keypoints), device).train(training)
        for weights in net.rpn.parameters():
            nn.init.zeros_(weights)  # proposes every anchor; random ones make few boxes of all
        optimizer = optimizer_for(net, less)
        images, targets = _scene(less, share, batch, keypoints, device)

        def run(net: nn.Module = net, given: Any = (images, targets), optimizer: Any = optimizer) -> None:
            with torch.set_grad_enabled(training), autocast(device, recipe.precision):
                out = net(*given) if training else net(given[0])
            if training:
                optimizer.zero_grad()
                with convolutions(device, recipe.precision):
                    sum(out.values()).backward()
                optimizer.step()

        yield batch * share, run


def _segmenter_pieces(probe: Probe, device: torch.device) -> Pieces:
    recipe = configs.load(probe.recipe.removeprefix("segment/"), "segment", SegmentConfig)
    return segmenter_pieces(load(f"random:{probe.arch}"), recipe, 21, probe.kind == "train", probe.batch, device)


def segmenter_pieces(
    encoder: Encoder, recipe: SegmentConfig, classes: int, training: bool, most: int, device: torch.device
) -> Pieces:
    """Steps of a segmentation on growing batches of crops; the first of a quarter of their pixels, if it may be.

    Args:
        most: crops of a batch.
    """
    model = place(networks.build_segmenter(encoder, classes, recipe), device).train(training)
    for body in model.outside:
        place(body, device)
    optimizer = train.optimizer_for(model, recipe)
    crop = recipe.views.crop
    sides = [] if encoder.network.size else [(2, crop // 2)]
    for batch, side in sides + [(size, crop) for size in sorted({1, 2, 8, most}) if size <= most]:
        images = torch.randint(256, (batch, 3, side, side), dtype=torch.uint8, device=device)
        masks = torch.randint(classes, (batch, side, side), dtype=torch.uint8, device=device)

        def run(images: torch.Tensor = images, masks: torch.Tensor = masks) -> None:
            with torch.set_grad_enabled(training), autocast(device, recipe.precision):
                out = model(images, masks) if training else {"scores": model.scores(images, 0)}
            if training:
                optimizer.zero_grad()
                with convolutions(device, recipe.precision):
                    sum(out.values()).backward()
                optimizer.step()

        yield batch * (side / crop) ** 2, run


def _smaller(recipe: DetectConfig, share: float) -> DetectConfig:
    """The recipe with a share of the regions."""

    def part(number: int) -> int:
        return max(1, round(number * share))

    rpn, roi = recipe.rpn, recipe.roi
    counts = ("pre_nms_train", "post_nms_train", "pre_nms_test", "post_nms_test", "batch_per_image")
    fewer = {name: part(getattr(rpn, name)) for name in counts}
    regions = roi.model_copy(update={"batch_per_image": part(roi.batch_per_image)})
    test = recipe.test.model_copy(update={"detections": part(recipe.test.detections)})
    return recipe.model_copy(update={"rpn": rpn.model_copy(update=fewer), "roi": regions, "test": test})


def _scene(recipe: DetectConfig, share: float, batch: int, keypoints: int, device: torch.device) -> tuple[list, list]:
    """Random 4:3 images of a share of the pixels, and random objects on them."""
    sides = sorted(recipe.input.min_size_train)
    width, height = resized((640, 480), sides[len(sides) // 2], recipe.input.max_size)
    height, width = (max(32, round(side * math.sqrt(share))) for side in (height, width))
    images = [torch.randint(256, (3, height, width), dtype=torch.uint8, device=device) for _ in range(batch)]
    corners = torch.rand(batch, OBJECTS, 2) * 0.5
    boxes = torch.cat([corners, corners + 0.2 + 0.3 * torch.rand(batch, OBJECTS, 2)], dim=2)
    boxes = boxes * torch.tensor([width, height, width, height])
    return images, [_target(corners, recipe, keypoints, device) for corners in boxes]


def _target(boxes: torch.Tensor, recipe: DetectConfig, keypoints: int, device: torch.device) -> dict[str, Any]:
    target: dict[str, Any] = {"boxes": boxes.to(device), "labels": torch.ones(len(boxes), dtype=torch.long).to(device)}
    if recipe.masks:
        target["masks"] = [[np.array([x, y, X, y, X, Y, x, Y])] for x, y, X, Y in boxes.double().tolist()]
    if keypoints:
        places = boxes[:, None, :2] + torch.rand(len(boxes), keypoints, 2) * (boxes[:, None, 2:] - boxes[:, None, :2])
        target["keypoints"] = torch.cat([places, torch.full_like(places[..., :1], 2.0)], dim=2).to(device)
    return target
