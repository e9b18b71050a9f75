"""Data sets of Hugging Face's `datasets` library: saved ones, parquet files, and those of its hub. No script is run."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moco_eval import limits
from moco_eval.config.hf_name import HfName, parse
from moco_eval.data import tables
from moco_eval.data.image_set import ImageSet
from moco_eval.data.index import scan
from moco_eval.data.pixels import other_than_image
from moco_eval.errors import InputError
from moco_eval.runtime.connection import unreachable
from moco_eval.runtime.libraries import silenced

TRAINED_ON = ("train", "training")
TESTED_ON = ("validation", "val", "valid", "dev", "test", "testing")  # the first that is there, as of an imagefolder
SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves
TABLES = ("parquet", "arrow")  # of the library's readers those that run nothing and bring the images along
FIRST = 4  # the version of the library that knows no scripts any more
EXTRA = "pip install 'moco-eval[hf]'"

Splits = dict[str, Any]  # a datasets.Dataset by the name of its split


def require_there(name: str, data: Path | None) -> HfName:
    """What a name says. Raises InputError where the library or a local place is not there; nothing is read yet."""
    wanted = parse(name)
    if data is not None:
        raise InputError(f"--data {data}: --dataset {name} says itself where its images are; leave --data out")
    _library()
    if wanted.is_local and not wanted.path.exists():
        raise InputError(
            f"--dataset {name}: {wanted.path} does not exist; give a folder, a .parquet file, or ORG/NAME of the hub"
        )
    return wanted


def open_training(name: str, data: Path | None) -> ImageSet:
    """The training images to pretrain on, with labels where it has any.

    Raises:
        InputError: as `open_both`, but for missing labels.
    """
    wanted = require_there(name, data)
    splits = _splits(wanted)
    return _images(wanted, splits, _training(wanted, splits), labelled=False)


def open_both(
    name: str, data: Path | None, train: str | None = None, test: str | None = None
) -> tuple[ImageSet, ImageSet]:
    """Training and test images.

    Args:
        train, test: splits, where the name does not choose them.
    Raises:
        InputError: the library or the data are not there; damaged; no split, column of images or labels, or several.
    """
    wanted = require_there(name, data)
    splits = _splits(wanted)
    first = _training(wanted, splits, train)
    second = _split(wanted, splits, "test", test, TESTED_ON)
    if second is None:
        others = [name for name in splits if name != first]
        choice = f"choose one: {wanted.with_choice(test=others[0])}; or " if others else ""
        raise InputError(
            f"{wanted.called} has no split to test on, but {', '.join(splits)}; {choice}--val-fraction 0.2 tests on a "
            "fifth of each class"
        )
    training = _images(wanted, splits, first)
    return training, _images(wanted, splits, second, known=training.classes)


def open_whole(name: str, data: Path | None, share: float) -> ImageSet:
    """The only split, to be parted. Raises InputError where there is one to test on."""
    wanted = require_there(name, data)
    splits = _splits(wanted)
    if own := _split(wanted, splits, "test", None, TESTED_ON) if len(splits) > 1 else None:
        raise InputError(f"--val-fraction {share:g}: {wanted.called} has {own} to test on; leave the option out")
    return _images(wanted, splits, _training(wanted, splits))


# Splits


def _training(wanted: HfName, splits: Splits, given: str | None = None) -> str:
    found = _split(wanted, splits, "train", given, TRAINED_ON)
    if found is None and len(splits) == 1:
        return next(iter(splits))
    if found is None:
        raise InputError(
            f"{wanted.called} has no split called train; it has {', '.join(splits)}. Choose one: "
            f"{wanted.with_choice(train=next(iter(splits)))}"
        )
    return found


def _split(wanted: HfName, splits: Splits, key: str, given: str | None, usual: tuple[str, ...]) -> str | None:
    """The split that is chosen, else the first that is called as usual. Raises InputError for one that is not there."""
    chosen = getattr(wanted, key) or given
    if chosen is not None and chosen not in splits:
        raise InputError(f"{wanted.called} has no split {chosen!r}; it has {', '.join(splits)}")
    return chosen or next((name for name in usual if name in splits), None)


def _images(
    wanted: HfName, splits: Splits, split: str, labelled: bool = True, known: tuple[str, ...] | None = None
) -> ImageSet:
    """The images of a split, their labels where it has any."""
    dataset, title = splits[split], f"{wanted.called} {split}"
    files = tables.TableImages.open(title, dataset.data, tables.image_column(dataset, wanted, title))
    column, labels, classes = tables.label_column(dataset, wanted, title), None, ()
    if column is not None:
        labels, classes = tables.labels_of(dataset, column, title, known)
        if labelled:
            tables.require_labels(labels, wanted, title, [name for name in splits if name not in (split, "train")])
        elif (labels < 0).any():
            labels, classes = None, ()
    elif labelled:
        raise tables.no_labels(dataset, wanted, title)
    limits.require(title, "classes", len(classes))
    return ImageSet(wanted.called, split, classes, labels, files.fingerprint(labels, classes), files=files)


# Opening


def _library() -> Any:
    """The library. Raises InputError where it is not installed, or runs scripts."""
    try:
        import datasets
    except ImportError:
        raise InputError(f"--dataset hf: needs Hugging Face's datasets library; {EXTRA}") from None
    if int(datasets.__version__.partition(".")[0]) < FIRST:
        raise InputError(
            f"datasets {datasets.__version__} runs the scripts that a data set brings along; take {FIRST} or newer: "
            f"{EXTRA}"
        )
    return datasets


def _splits(wanted: HfName) -> Splits:
    """The data set's splits, their images not decoded.

    Raises:
        InputError: it cannot be read, or is none of parquet or arrow.
    """
    if wanted.is_local:
        _require_tables(wanted)
    else:
        _require_hub(wanted)
    library = _library()
    try:
        with _quiet(library):
            opened = _opened(library, wanted)
    except InputError:
        raise
    except Exception as error:  # whatever the library, pyarrow or a server make of it
        raise InputError(_unreadable(library, wanted, error)) from None
    splits = dict(opened) if isinstance(opened, dict) else {str(opened.split or "train"): opened}
    if not splits or not any(map(len, splits.values())):
        raise InputError(f"{wanted.called} is empty; fetch it again")
    return {name: _in_order(dataset) for name, dataset in splits.items()}


def _opened(library: Any, wanted: HfName) -> Any:
    """A Dataset, or several by the name of their split."""
    path = wanted.path
    if wanted.is_local and path.is_dir() and any((path / name).is_file() for name in SAVED):
        return library.load_from_disk(str(path.resolve()), keep_in_memory=False)
    if wanted.is_local and path.is_file():
        return library.load_dataset("parquet", data_files=str(path.resolve()), keep_in_memory=False)
    where = str(path.resolve()) if wanted.is_local else wanted.place
    builder = library.load_dataset_builder(where, wanted.config)
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in TABLES and not (kind == "cache" and not wanted.is_local):  # what an earlier download became
        way = "--dataset imagefolder --data FOLDER reads class folders; " if kind == "imagefolder" else ""
        raise InputError(
            f"{wanted.called} holds {kind}, and images are read from {' and '.join(TABLES)} here; {way}"
            "save_to_disk of the datasets library saves any other as arrow"
        )
    builder.download_and_prepare()
    return builder.as_dataset(in_memory=False)


def _in_order(dataset: Any) -> Any:
    """The data set with its rows as its table has them."""
    return dataset if len(dataset.data) == len(dataset) else dataset.flatten_indices()


def _require_tables(wanted: HfName) -> None:
    """Raises InputError for a local place without tables, or with a file under their name that is none."""
    path = wanted.path
    if path.is_dir():
        names = [
            path / name.decode("utf-8", "surrogateescape") for name, _ in scan(path, b"", (".parquet", ".arrow"))[0]
        ]
    else:
        names = [path] if path.suffix == ".parquet" else []
    if not names:
        raise InputError(
            f"{path} holds no .parquet or .arrow files, as the datasets library writes them; for class folders of "
            "image files take --dataset imagefolder --data FOLDER"
        )
    for name in names:
        with limits.open_regular(name) as file:
            start = file.read(200)
        if name.suffix == ".parquet" and not start.startswith(b"PAR1"):
            what = other_than_image(start).replace("in place of the image", "in place of the table")
            raise InputError(f"{name} is no parquet file{f' but {what}' if what else ''}; fetch it again")


def _require_hub(wanted: HfName) -> None:
    """Raises InputError at once where the hub cannot be reached; a copy of an earlier download is asked for by name."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or (reason := unreachable(constants.ENDPOINT)) is None:
        return
    raise InputError(
        f"hf:{wanted.place}: no such folder here, and the hub cannot be reached ({reason}); for the copy of an earlier "
        "download set HF_HUB_OFFLINE=1"
    )


@contextlib.contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Without the library's words about its attempts, and its bars where nobody looks."""
    hidden = not sys.stderr.isatty() and library.utils.is_progress_bar_enabled()
    if hidden:
        library.disable_progress_bars()
    try:
        with silenced("datasets", "huggingface_hub", "fsspec"):
            yield
    finally:
        if hidden:
            library.enable_progress_bars()


def _unreadable(library: Any, wanted: HfName, error: Exception) -> str:
    """Why a data set cannot be opened, on one line, and the way out."""
    reason = " ".join(str(error.__cause__ or error).split())[:200] or type(error).__name__
    if isinstance(error, ValueError) and ("Config name is missing" in reason or "BuilderConfig" in reason):
        where = str(wanted.path.resolve()) if wanted.is_local else wanted.place
        with _quiet(library):
            names = library.get_dataset_config_names(where)
        asked = f"no configuration {wanted.config!r}" if wanted.config else "several configurations"
        return (
            f"{wanted.called} has {asked}; choose one, such as hf:{wanted.place}:{names[0]}; it has {', '.join(names)}"
        )
    if not wanted.is_local:
        return f"hf:{wanted.place} cannot be had from the hub ({reason}); give a folder, or another ORG/NAME"
    return f"hf:{wanted.place} cannot be read ({reason}); fetch it again"
