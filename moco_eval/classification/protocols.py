"""Every classification protocol in one table; the code of a row is imported when it runs.

A new protocol is a module with its `CODE`, a config under configs/, and a row here. The suite, its forecast, the costs
of a table, the command line and the Python API read this table.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moco_eval.config import load as configs
from moco_eval.config.base import Run
from moco_eval.config.classification import (
    FinetuneConfig,
    KnnConfig,
    KnnGridConfig,
    LinearConfig,
    LogisticConfig,
    QuickConfig,
    SvmConfig,
    SweepConfig,
)
from moco_eval.config.protocol_name import ProtocolName
from moco_eval.errors import InputError

if TYPE_CHECKING:  # torch belongs to what runs, not to what names it
    from moco_eval.classification.task import Code


def knn() -> "Code":
    from moco_eval.classification import knn

    return knn.CODE


def knn_grid() -> "Code":
    from moco_eval.classification import knn_grid

    return knn_grid.CODE


def linear() -> "Code":
    from moco_eval.classification import linear

    return linear.CODE


def linear_quick() -> "Code":
    from moco_eval.classification import linear_quick

    return linear_quick.CODE


def linear_sweep() -> "Code":
    from moco_eval.classification import linear_sweep

    return linear_sweep.CODE


def logistic() -> "Code":
    from moco_eval.classification import logistic

    return logistic.CODE


def svm() -> "Code":
    from moco_eval.classification import svm

    return svm.CODE


def svm_low_shot() -> "Code":
    from moco_eval.classification import svm

    return svm.LOW_SHOT


def finetune() -> "Code":
    from moco_eval.classification import finetune

    return finetune.CODE


@dataclass(frozen=True)
class Protocol:
    """A classification protocol.

    Attributes:
        protocol: its name; the name's kind is the command, and the folder of its shipped config.
        title: a sentence for the command's help; the first row of a kind names the command.
        model: of its config.
        code: imports what runs it.
        selection: last-epoch, or which split chose what.
        over: what trials vary where all labels are used: head, labels or finetune.
        short: its names in `suite --tasks`.
        free: config keys that move no number here.
        subset: of labels that the protocol is about, in the words of `label_subsets.PUBLISHED`; None for all of them.
        multi_label: whether it takes images of several classes.
        frozen: whether it judges the encoder's own features.
        trials: whether something is drawn that a repetition draws anew, all labels being used.
        dataset: what the command takes where none is named.
        size: of the images in pixels, where it is the same for every data set.
    """

    protocol: str
    title: str
    model: type[Run]
    code: Callable[[], "Code"]
    selection: str
    over: str = "head"
    short: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    subset: str | None = None
    multi_label: bool = False
    frozen: bool = True
    trials: bool = True
    dataset: str = "imagenet"
    size: int | None = None

    @property
    def name(self) -> ProtocolName:
        """Its name, taken apart."""
        return ProtocolName.parse(self.protocol)


KNN = "Weighted k-nearest-neighbour classification on frozen features."
LINEAR = "Linear classification on frozen features; the backbone is checked bit for bit."
LOGISTIC = "Logistic regression on frozen features; its C chosen on held-out training images."
SVM = "A linear SVM per class on frozen features, as VOC07 classification is judged."
FINETUNE = "Classification by the whole network, fine-tuned end to end from the encoder's weights."
# OpenSelfSup takes SimCLR's lists, as its tools/prepare_data/convert_subset.py says.
ONE_PERCENT, TEN_PERCENT = "ImageNet 1 % (SimCLR's list)", "ImageNet 10 % (SimCLR's list)"

PROTOCOLS = (
    Protocol(
        "knn/instdisc@1",
        KNN,
        KnnConfig,
        knn,
        selection="none: nothing is trained or chosen",
        short=("knn",),
        free=("batch_size", "feature"),
        trials=False,
    ),
    Protocol(
        "knn/grid@1",
        "The same with k, temperature and distance chosen by leave-one-out on the training images.",
        KnnGridConfig,
        knn_grid,
        selection="leave-one-out on train",
        short=("grid",),
        free=("batch_size", "feature"),
        trials=False,
    ),
    Protocol(
        "knn/cifar10-demo@1",
        "The CIFAR-10 demo's: the 128 numbers of the head, k 200, temperature 0.1.",
        KnnConfig,
        knn,
        selection="none: nothing is trained or chosen",
        free=("batch_size", "feature"),
        trials=False,
    ),
    Protocol("linear/moco-lincls@1", LINEAR, LinearConfig, linear, selection="last-epoch"),
    Protocol(
        "linear/mocov3@1", "MoCo v3's recipe, with a rate of its own for ViTs.", LinearConfig, linear, "last-epoch"
    ),
    Protocol(
        "linear/sweep@1",
        "Many heads side by side in one pass, chosen on held-out images.",
        SweepConfig,
        linear_sweep,
        selection="held-out training images",
    ),
    Protocol(
        "linear/mocov3-sweep@1",
        "MoCo v3's as its paper has it: batch 4096, the rate chosen for each encoder, on held-out images.",
        SweepConfig,
        linear_sweep,
        selection="held-out training images",
    ),
    Protocol(
        "linear/quick@1",
        "One head on features of a few epochs of crops, extracted once.",
        QuickConfig,
        linear_quick,
        selection="last-epoch",
        short=("quick",),
    ),
    Protocol(
        "logistic/lbfgs@1",
        LOGISTIC,
        LogisticConfig,
        logistic,
        selection="held-out training images; then all of them",
        short=("logistic",),
        free=("solver", "batch_size"),
    ),
    Protocol(
        "svm/voc07@1",
        SVM,
        SvmConfig,
        svm,
        selection="three-fold cross-validation on the training images",
        short=("svm",),
        free=("batch_size",),
        multi_label=True,
        dataset="voc07",
    ),
    Protocol(
        "svm/voc07-low-shot@1",
        "On 1 to 96 images per class, in five samples.",
        SvmConfig,
        svm_low_shot,
        selection="rest of the training images",
        over="labels",
        short=("low-shot",),
        free=("batch_size",),
        multi_label=True,
        dataset="voc07",
    ),
    Protocol("finetune/lightly@1", FINETUNE, FinetuneConfig, finetune, "last-epoch", over="finetune", frozen=False),
    Protocol(
        "finetune/openselfsup-1percent@1",
        "On ImageNet's 1 % of labels.",
        FinetuneConfig,
        finetune,
        selection="last-epoch",
        over="finetune",
        subset=ONE_PERCENT,
        frozen=False,
    ),
    Protocol(
        "finetune/openselfsup-10percent@1",
        "On ImageNet's 10 % of labels.",
        FinetuneConfig,
        finetune,
        selection="last-epoch",
        over="finetune",
        subset=TEN_PERCENT,
        frozen=False,
    ),
    Protocol(
        "finetune/mocov3-deit@1",
        "MoCo v3's ViTs by DeiT's recipe, 150 epochs.",
        FinetuneConfig,
        finetune,
        selection="last-epoch",
        over="finetune",
        frozen=False,
    ),
    Protocol(
        "finetune/mocov3-transfer@1",
        "MoCo v3's ViT-B on CIFAR-10, CIFAR-100, Flowers or Pets.",
        FinetuneConfig,
        finetune,
        selection="last-epoch",
        over="finetune",
        frozen=False,
        dataset="cifar10",
        size=224,
    ),
    Protocol(
        "finetune/mae@1",
        "MAE's of a ViT-B: mean pooling, layer decay, 100 epochs.",
        FinetuneConfig,
        finetune,
        selection="last-epoch",
        over="finetune",
        frozen=False,
    ),
    Protocol(
        "finetune/ibot@1",
        "iBOT's of a ViT-B: class token, layer decay, 100 epochs.",
        FinetuneConfig,
        finetune,
        selection="last-epoch",
        over="finetune",
        frozen=False,
    ),
)


def kinds() -> dict[str, tuple[Protocol, ...]]:
    """The protocols of each command, in the table's order."""
    names = dict.fromkeys(row.name.kind for row in PROTOCOLS)
    return {kind: tuple(row for row in PROTOCOLS if row.name.kind == kind) for kind in names}


def by_name(protocol: str) -> Protocol:
    """The row of a protocol. Raises InputError for a name that is in no row, with the closest one."""
    for row in PROTOCOLS:
        if row.protocol == protocol:
            return row
    raise InputError(f"no protocol {protocol!r}.{configs.did_you_mean(protocol, [row.protocol for row in PROTOCOLS])}")


def followed_by(config: str, kind: str, overrides: Sequence[str] = ()) -> Protocol:
    """The protocol that a config follows, as it says itself.

    Args:
        config, kind, overrides: as `config.load.load` takes them.
    Raises:
        InputError: no such config, or a protocol that is none of this kind; a config without one is left to its model.
    """
    rows = kinds()[kind]
    protocol = configs.merged(config, kind, overrides).get("protocol", rows[0].protocol)
    for row in rows:
        if row.protocol == protocol:
            return row
    known = [row.protocol for row in rows]
    meant = configs.did_you_mean(str(protocol), known)
    raise InputError(f"protocol {protocol!r} of {config} is none that moco-eval {kind} runs.{meant}")


def load_config(config: str, kind: str, overrides: Sequence[str] = ()) -> Any:
    """A checked config of a classification protocol. Raises InputError as `followed_by` and `config.load.load` do."""
    return configs.load(config, kind, followed_by(config, kind, overrides).model, overrides)


def feature_override(model: type[Run], feature: str | None) -> list[str]:
    """The feature asked for as an override, where the config names its feature; else none, and the task says it."""
    if feature is None:
        return []
    if "features" in model.model_fields:
        return [f"features=[{feature}]"]
    return [f"feature={feature}"] if "feature" in model.model_fields else []


USUAL_TASKS = {False: "knn,quick,logistic", True: "svm"}  # of a suite, by whether an image may have several labels


def tasks(names: str) -> list[Protocol]:
    """The protocols that `suite --tasks` names, in its order.

    Args:
        names: full or short names between commas.
    Raises:
        InputError: an unknown name, or a protocol named twice.
    """
    known = {short: row for row in PROTOCOLS if row.short for short in (row.protocol, row.name.name, *row.short)}
    chosen: list[Protocol] = []
    for name in (part.strip() for part in names.split(",")):
        if name not in known:
            meant = configs.did_you_mean(name, known)
            raise InputError(f"--tasks {names!r}: {name!r} does not work on extracted features.{meant}")
        if known[name] in chosen:
            raise InputError(f"--tasks {names!r} names {known[name].protocol} twice; remove one of them")
        chosen.append(known[name])
    return chosen
