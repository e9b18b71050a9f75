"""What a notebook imports: any encoder, any images, every protocol, in a few lines. The commands call the same.

Nothing here surprises its host: no signal handler, no switch of the process that outlives a call, no output unless
asked for (`moco_eval.set_verbosity`), no file unless a folder is given. Settings are Python values; what is wrong with
an argument is a ValueError that names it.
"""

import contextlib
import functools
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import nn

from moco_eval.classification import judge as judging
from moco_eval.classification.protocols import Protocol, by_name, feature_override, followed_by, kinds, load_config
from moco_eval.classification.task import Task
from moco_eval.config import load as configs
from moco_eval.config.detection import DetectConfig
from moco_eval.config.segmentation import SegmentConfig
from moco_eval.data.boxes.samples import DetectionData
from moco_eval.data.catalogue import open_splits
from moco_eval.data.image_set import ImageSet, require_judgeable
from moco_eval.data.label_option import Labels, parse_labels
from moco_eval.data.masks.samples import SegmentationData
from moco_eval.detection import detect as detection
from moco_eval.detection.task import DetectionTask
from moco_eval.encoders import load as loading
from moco_eval.encoders import wrap as wrapping
from moco_eval.encoders.encoder import Encoder
from moco_eval.errors import InputError, RunFailed, message_of
from moco_eval.features.cache import Source, features_of
from moco_eval.features.expected_pixels import expected_pixels
from moco_eval.preprocessing import Preprocessing
from moco_eval.results import compare as comparing
from moco_eval.results.compare import Comparison
from moco_eval.results.result import Result
from moco_eval.runtime.console import set_verbosity, warn
from moco_eval.runtime.device import choose_device, exact_arithmetic, forked_generator
from moco_eval.runtime.text import without_dashes
from moco_eval.segmentation import segment as segmentation
from moco_eval.segmentation.task import SegmentationTask

__all__ = [
    "Comparison",
    "Encoder",
    "ImageSet",
    "Monitor",
    "Preprocessing",
    "Result",
    "compare",
    "detect",
    "features",
    "images",
    "judge",
    "load",
    "segment",
    "set_verbosity",
    "wrap",
]

P = ParamSpec("P")
T = TypeVar("T")


def in_python(function: Callable[P, T]) -> Callable[P, T]:
    """The function with errors that name its arguments, where the command line's would have dashes."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except (InputError, RunFailed) as error:
            traceback.clear_frames(error.__traceback__)  # loader processes end with the frames that hold them
            raise type(error)(without_dashes(message_of(error))) from error.__cause__

    return called


@in_python
def load(
    source: str | Path,
    *,
    arch: str | None = None,
    encoder: str | None = None,
    key: str | None = None,
    pixels: Mapping[str, Any] | None = None,
) -> Encoder:
    """Any checkpoint, proven: every tensor accounted for, or an error.

    Args:
        source: a file of any known format, random:ARCH, torchvision:ARCH[:WEIGHTS], timm:NAME, zoo:NAME,
            hf:ORG/NAME[/FILE] or pixels.
        arch: overrides the architecture read from the shapes.
        encoder: query or key; by default the one that the method itself evaluates.
        key: of several networks in a file, the one to take: its entry, or what its tensors' names begin with.
        pixels: attributes of a Preprocessing that take the place of the method's own: {"interpolation": "bilinear"}.
    Returns:
        The backbone, (N, C, H, W) to (N, feature_dim), with all that must travel with it.
    Raises:
        ValueError: unreadable, unknown, or one tensor too few, too many, of another shape or not finite; senseless
            pixels.
    """
    with torch.inference_mode(False):  # tensors of inference mode could not be trained on
        loaded = loading.load(str(source), arch, encoder, key=key, pixels=pixels)
    for doubt in loaded.warnings:
        warn(f"{loaded.source}: {doubt}")
    return loaded


@in_python
def wrap(net: nn.Module, preprocessing: Preprocessing, *, name: str = "network") -> Encoder:
    """Any network in memory as an encoder; it is left as it was, tensors and modes.

    Args:
        net: maps (N, C, H, W) float32 to finite features (N, D), of the same D in training and in evaluation mode.
        preprocessing: the pixels that it expects; C is the length of its mean.
        name: what results, folders and tables call it.
    Returns:
        An encoder of that very network: what you train on between two calls is judged as it then is.
    Raises:
        ValueError: it takes no images of that size, or gives no features (N, D).
    """
    return wrapping.wrap(net, preprocessing, name=name)


@in_python
def images(name: str, folder: str | Path | None = None) -> tuple[ImageSet, ImageSet]:
    """Training and test images of a data set by its name: images("cifar10", "/datasets").

    Args:
        name: one of those that `moco-eval datasets` lists, such as digits (built in), cifar10 or imagefolder.
        folder: where its files are; None for what is built in, or for the folder of MOCO_EVAL_DATA.
    Returns:
        The training and the test split, of the same classes.
    Raises:
        ValueError: an unknown name, a missing or incomplete folder.
    """
    try:
        return open_splits(name, Path(folder) if folder is not None else None)
    except InputError as error:  # the command line's --dataset and --data are `name` and `folder` here
        message = str(error).replace("--data FOLDER", "folder").replace("--dataset", "name").replace("--data", "folder")
        raise InputError(message) from None


@in_python
def features(
    encoder: Encoder,
    images: ImageSet,
    *,
    feature: str = "pooled",
    device: str = "auto",
    cache: str | Path | None = None,
    batch_size: int = 256,
    workers: int = 0,
    precision: str = "fp32",
) -> tuple[np.ndarray, dict[str, Any]]:
    """Features of clean crops: resized, cut from the centre, nothing drawn at random.

    Args:
        encoder: of `load` or `wrap`.
        images: N images; labels are not needed.
        feature: pooled, head, or a stage such as layer3 or blocks.8.
        device: auto takes the GPU, or for a wrapped network the device that it lies on; cpu, cuda, cuda:1.
        cache: a folder where they are kept, and taken from the next time.
        batch_size: images at once; it may move the last bits.
        workers: processes that decode images; 0 decodes in this one.
        precision: fp32, tf32 or bf16 of the forward pass; features are float32 in any case.
    Returns:
        Features, (N, D) float32 in the images' order, as the network gives them (not normalised), and their identity:
            weights, images, pixels, feature and precision, on which they depend.
    Raises:
        ValueError: no such feature, or an image that cannot be read.
    """
    if precision not in ("fp32", "tf32", "bf16"):
        raise InputError(f"precision is {precision!r}; take fp32, tf32 or bf16")
    with _as_guest(encoder, device) as (current, place):
        pixels = expected_pixels(current, images)
        source = Source(current, images, pixels, feature, None, precision, batch_size, workers)
        kept = features_of(source, Path(cache) if cache is not None else None, place)
        return kept.tensor().numpy(), source.key()


@in_python
def judge(
    encoder: Encoder,
    train: ImageSet,
    test: ImageSet,
    protocol: str = "knn/instdisc@1",
    *,
    output: str | Path | None = None,
    trials: int = 1,
    seed: int = 0,
    device: str = "auto",
    labels: str | None = None,
    feature: str | None = None,
    cache: str | Path | None = None,
    **settings: Any,
) -> Result:
    """How well an encoder does under a classification protocol, fine-tuning included.

    Args:
        encoder: of `load` or `wrap`.
        train: images with labels that the classifier is fitted to.
        test: images with labels that it is tested on, of the same classes.
        protocol: such as linear/moco-lincls@1; a shipped config such as linear/digits; or a YAML file of one's own.
        output: a run directory, with exactly what the command leaves there; None writes nothing at all.
        trials: repetitions with their own seeds, from `seed` on.
        seed: of the first trial.
        device: auto takes the GPU, or for a wrapped network the device that it lies on.
        labels: 'N-per-class', drawn anew in each trial, '1%', '10%' or a list file; None for all.
        feature: pooled (the protocol's own, as a rule), head or a stage.
        cache: a folder where extracted features are kept.
        settings: values of the config: batch_size=64, schedule={"epochs": 10}.
    Returns:
        Metrics in percent with their spread over trials and their 95 % interval over test images, the deviations from
            the protocol, and the answers: scores (N, classes), predictions (N,).
    Raises:
        ValueError: an argument that is wrong; its message names it.
        RuntimeError: the run failed: a loss or a feature that is not finite.
    """
    config, wanted = _config(protocol, feature, {"seed": seed, **settings}), _checked(train, test, trials, labels)
    if wanted and wanted.per_class is None:
        train = wanted.of(train, seed)
    with _as_guest(encoder, device) as (current, place):
        task = Task(
            encoder=current,
            train=train,
            test=test,
            feature=(None if feature_override(type(config), feature) else feature) or "pooled",
            labels_per_class=wanted.per_class if wanted else None,
            trials=int(trials),
            cache=Path(cache) if cache is not None else None,
        )
        config = _config(protocol, feature, {"seed": seed, **settings}, task)
        return judged(task, config, Path(output) if output is not None else None, place)


def judged(task: Task, config: Any, output: Path | None, device: torch.device) -> Result:
    """A task under a protocol's config: `judge` and every classification command end here. Collective.

    Raises:
        InputError, RunFailed, Interrupted: as `classification.judge` does.
    """
    if output is None:
        judgement = judging.judge_in_memory(task, config, device)
        return Result(judgement.record, judgement.arrays, judgement.resolved)
    record = judging.judge(task, config, output, device)
    return Result(record, Result.read(output).arrays, judging.resolved(judging.prepared(task, config), config))


@in_python
def detect(
    encoder: Encoder,
    data: str | DetectionData,
    recipe: str = "digits_r50_c4",
    *,
    folder: str | Path | None = None,
    output: str | Path | None = None,
    engine: str = "auto",
    trials: int = 1,
    seed: int = 0,
    device: str = "auto",
    **settings: Any,
) -> Result:
    """Fine-tune a detector on the encoder and measure its average precision.

    Args:
        encoder: one that was loaded; a detector is built of its parts, which a wrapped network does not name.
        data: voc, voc07, coco, lvis-v0.5, lvis-v1, cityscapes, voc-folder, coco-folder or digits (built in), or data
            that are open already.
        recipe: a shipped recipe or a file.
        folder: the data set's.
        output: a run directory, where a fine-tuning is also resumed; None keeps nothing.
        engine: detectron2, torchvision, or auto: detectron2 where it is installed.
        trials: fine-tunings with their own seeds, from `seed` on.
        seed: of the first trial.
        device: auto takes the GPU.
        settings: values of the recipe: schedule={"iterations": 100}.
    Returns:
        AP, AP50, AP75 (COCO: APbb, APmk, ...) in percent, their spread and the deviations from the recipe.
    Raises:
        ValueError: an argument that is wrong; its message names it.
        RuntimeError: the run failed: a loss that is not finite.
    """
    _require_encoder(encoder)
    if encoder.wrapped:
        raise InputError(f"encoder {encoder.source!r} is a network in memory; detect takes encoders of moco_eval.load")
    config = configs.load(recipe, "detect", DetectConfig, configs.as_overrides({"seed": seed, **settings}))
    named = {"data": data} if isinstance(data, DetectionData) else {"dataset": data, "data": _path(folder)}
    task = DetectionTask(encoder, config, **named, engine=engine, trials=_at_least_one(trials, "trials"))
    with _as_guest(encoder, device) as (_, place), _process_as_it_was(place), _folder(output) as run:
        return Result(detection.detect(task, run, place))


@in_python
def segment(
    encoder: Encoder,
    data: str | SegmentationData,
    recipe: str = "digits_linear",
    *,
    folder: str | Path | None = None,
    classes: str | Path | None = None,
    ignored: Sequence[int] = (255,),
    output: str | Path | None = None,
    trials: int = 1,
    seed: int = 0,
    device: str = "auto",
    **settings: Any,
) -> Result:
    """Train a semantic segmentation on the encoder and measure its mean intersection over union.

    Args:
        encoder: of a known architecture, whose maps are known; a wrapped network does not name them.
        data: voc-aug, voc2012, cityscapes, ade20k, coco-stuff, mask-folder or digits (built in), or data that are open
            already.
        recipe: a shipped recipe or a file.
        folder: the data set's.
        classes: of mask-folder: a file with a class name a line.
        ignored: of mask-folder: values of pixels without a class.
        output: a run directory, where a training is also resumed; None keeps nothing.
        trials: trainings with their own seeds, from `seed` on.
        seed: of the first trial.
        device: auto takes the GPU.
        settings: values of the recipe: schedule={"iterations": 100}.
    Returns:
        mIoU and pixel accuracy in percent, their spread and the deviations from the recipe.
    Raises:
        ValueError: an argument that is wrong; its message names it.
        RuntimeError: the run failed: a loss that is not finite.
    """
    _require_encoder(encoder)
    if encoder.wrapped:
        raise InputError(f"encoder {encoder.source!r} is a network in memory; segment takes encoders of moco_eval.load")
    config = configs.load(recipe, "segment", SegmentConfig, configs.as_overrides({"seed": seed, **settings}))
    task = SegmentationTask(
        encoder=encoder,
        config=config,
        dataset="" if isinstance(data, SegmentationData) else data,
        data=data if isinstance(data, SegmentationData) else _path(folder),
        classes=_path(classes),
        ignored=tuple(ignored),
        trials=_at_least_one(trials, "trials"),
    )
    with _as_guest(encoder, device) as (_, place), _process_as_it_was(place), _folder(output) as run:
        return Result(segmentation.segment(task, run, place))


@in_python
def compare(a: Result | str | Path, b: Result | str | Path) -> Comparison:
    """Is B better than A? Paired over the same test images; printing it says it in words.

    Args:
        a: a result, or a run directory.
        b: the same, of the other encoder.
    Returns:
        B - A in percentage points of the data set's main metric, with its 95 % interval over test images.
    Raises:
        ValueError: they were not tested on the same images, or hold no answers.
    """
    return comparing.compare(_run("a", a), _run("b", b))


class Monitor:
    """Judges a network while one's own loop trains it, and leaves no trace in the training.

    The network's tensors, gradients, modes and requires_grad, and every random generator, are as they were. In a group
    of processes every process calls it.

    Attributes:
        history: (step, result) of every look.
    """

    def __init__(
        self,
        train: ImageSet,
        test: ImageSet,
        preprocessing: Preprocessing,
        *,
        protocol: str = "knn/instdisc@1",
        every: int = 1,
        name: str = "network",
        **settings: Any,
    ):
        """
        Args:
            train: images with labels that the classifier is fitted to.
            test: images with labels that it is tested on.
            preprocessing: the pixels that the network expects.
            protocol: as in `judge`.
            every: look at each so many steps or epochs, whatever the loop counts; step 0 is looked at.
            name: what results call the network.
            settings: of `judge`, `output` apart; `history` has results to save.
        Raises:
            ValueError: an argument that `judge` refuses; images of one class only; `output`, which takes one look only.
        """
        self.train, self.test, self.preprocessing, self.protocol, self.name = train, test, preprocessing, protocol, name
        self.every, self.settings = in_python(_at_least_one)(every, "every"), settings
        self.history: list[tuple[int, Result]] = []
        self.encoder: Encoder | None = None
        in_python(wrapping.require_sound)(preprocessing)
        in_python(_can_be_judged)(train, test, protocol, **settings)

    def __call__(self, net: nn.Module, step: int) -> Result | None:
        """The result, where this step is one to look at; else None."""
        if step % self.every:
            return None
        if self.encoder is None or self.encoder.backbone is not net:
            self.encoder = wrap(net, self.preprocessing, name=self.name)
        result = judge(self.encoder, self.train, self.test, self.protocol, **self.settings)
        self.history.append((step, result))
        return result


def _can_be_judged(
    train: ImageSet,
    test: ImageSet,
    protocol: str,
    *,
    trials: int = 1,
    labels: str | None = None,
    feature: str | None = None,
    device: str = "auto",
    cache: str | Path | None = None,
    **settings: Any,
) -> None:
    """Raises InputError for what can be refused before there is a network."""
    if "output" in settings:
        raise InputError("output holds one run, and a monitor makes many; save the results of its history instead")
    _config(protocol, feature, settings)
    _checked(train, test, trials, labels)
    require_judgeable(train, test)


def _checked(train: ImageSet, test: ImageSet, trials: int, labels: str | None) -> Labels | None:
    """What `labels` says. Raises InputError for one of these that is wrong."""
    _require_same_classes(train, test)
    _at_least_one(trials, "trials")
    return parse_labels(labels)


def _config(protocol: str, feature: str | None, settings: dict[str, Any], task: Task | None = None) -> Any:
    """The checked config of a protocol, of a shipped config or of a file; of a protocol's, the one for a task."""
    kind, name = _named(protocol)
    if task is not None:
        name = followed_by(name, kind).code().shipped(name, task)
    overrides = configs.as_overrides(settings)
    model = load_config(name, kind).__class__
    return load_config(name, kind, [*overrides, *feature_override(model, feature)])


def _named(protocol: str) -> tuple[str, str]:
    """The kind and the config of what `judge` is to run."""
    if not isinstance(protocol, str):
        raise InputError(f"protocol is a {type(protocol).__name__}; give a name such as linear/moco-lincls@1")
    if protocol.endswith((".yaml", ".yml")):
        values, _ = configs.read_yaml(Path(protocol))
        return by_name(str(values.get("protocol"))).name.kind, protocol
    shipped = {f"{kind}/{name}": (kind, name) for kind in kinds() for name in configs.short_names(kind)}
    if protocol in shipped:
        return shipped[protocol]
    try:
        row: Protocol = by_name(protocol)
    except InputError as error:
        raise InputError(f"protocol: {error}") from None
    return row.name.kind, row.name.name


@contextlib.contextmanager
def _as_guest(encoder: Encoder, device: str) -> Iterator[tuple[Encoder, torch.device]]:
    """The encoder as it is now, and where it is judged: gradients on, no autocast of the host's, exact arithmetic."""
    _require_encoder(encoder)
    if torch.get_default_dtype() != torch.float32:
        raise InputError(
            f"torch's default dtype is {torch.get_default_dtype()}; torch.set_default_dtype(torch.float32) before"
        )
    place, elsewhere = _device(encoder, device), torch.get_default_device().type != "cpu"
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(place.type, enabled=False),
        torch.device("cpu") if elsewhere else contextlib.nullcontext(),
        exact_arithmetic(),
        wrapping.borrowed(encoder),
    ):
        yield wrapping.as_it_is_now(encoder), place


def _device(encoder: Encoder, device: str) -> torch.device:
    """Where an encoder is judged. Raises InputError where a wrapped network lies elsewhere."""
    if not encoder.wrapped:
        return choose_device(device)
    there = wrapping.device_of(encoder.backbone)
    wanted = there if device == "auto" else choose_device(device)
    if wanted != there and (wanted.type, wanted.index or 0) != (there.type, there.index or 0):
        raise InputError(f"device {device!r}: {encoder.source} is on {there}; move it there first, or leave out device")
    if there.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"{encoder.source} is on {there}; move it to the CPU or to a GPU first")
    return there


@contextlib.contextmanager
def _process_as_it_was(device: torch.device) -> Iterator[None]:
    """What a fine-tuning draws and switches for the whole process, put back afterwards."""
    benchmark = torch.backends.cudnn.benchmark
    with forked_generator(device):
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = benchmark


@contextlib.contextmanager
def _folder(output: str | Path | None) -> Iterator[Path]:
    """The run directory, or one that is gone afterwards."""
    if output is not None:
        yield Path(output)
        return
    with tempfile.TemporaryDirectory(prefix="moco-eval-") as folder:
        yield Path(folder) / "run"


def _run(name: str, side: Result | str | Path) -> Path | comparing.Run:
    if isinstance(side, Result):
        return comparing.run_in_memory(f"{name} ({side.record['encoder']['path']})", side.record, side.arrays)
    return Path(side)


def _path(folder: str | Path | None) -> Path | None:
    return None if folder is None else Path(folder)


def _at_least_one(number: int, name: str) -> int:
    if not isinstance(number, Integral) or isinstance(number, bool) or number < 1:
        raise InputError(f"{name} is {number!r}; take an integer of at least 1")
    return int(number)


def _require_encoder(encoder: Encoder) -> None:
    if not isinstance(encoder, Encoder):
        raise InputError(f"encoder is a {type(encoder).__name__}; give what moco_eval.load or moco_eval.wrap returns")


def _require_same_classes(train: ImageSet, test: ImageSet) -> None:
    """Raises InputError where two sets number their classes differently."""
    for name, images in (("train", train), ("test", test)):
        if not isinstance(images, ImageSet):
            raise InputError(
                f"{name} is a {type(images).__name__}; give an ImageSet: moco_eval.images, ImageSet.from_..."
            )
        if images.labels is None:
            raise InputError(f"{name} ({images.name}) has no labels; it is for pretraining only")
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        first = f"{odd[0]!r} is only in one of them" if odd else "they are in another order"
        raise InputError(f"train and test have different classes: {first}; give both the same classes=[...]")
