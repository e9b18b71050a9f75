"""Any images with masks in folders: train/ and train_masks/, or images/train/ and masks/train/."""

from collections.abc import Sequence
from pathlib import Path

from moco_eval import limits
from moco_eval.data.boxes.samples import Findings
from moco_eval.data.masks.samples import (
    MOST_CLASSES,
    ONE_CLASS,
    MaskSample,
    SegmentationData,
    class_table,
    files_by_stem,
    opened,
    values_of,
)
from moco_eval.errors import InputError

LAYOUT = "a mask-folder has train/, train_masks/, val/, val_masks/, or images/ and masks/ with train/ and val/ in each"
IMAGES, MASKS = ("images", "img"), ("masks", "annotations", "labels")  # folders above those of the splits
TEST_SPLITS = ("test", "val", "validation")


def read_mask_folder(
    root: Path,
    train_split: str | None = None,
    test_split: str | None = None,
    classes: Sequence[str] = (),
    ignored: Sequence[int] = (255,),
    name: str = "mask-folder",
    findings: Findings | None = None,
) -> SegmentationData:
    """Images and masks that share their names, suffixes apart.

    Args:
        train_split: by default train. test_split: by default the first of TEST_SPLITS that is there.
        classes: their names; where not given, the values of the training masks are counted, and are their names.
        ignored: values of pixels without a class.
    Raises:
        InputError: what is missing, with its place.
    """
    train_split = train_split or "train"
    test_split = test_split or next((split for split in TEST_SPLITS if _places(root, split)), None)
    if test_split is None:
        raise InputError(f"{root} has no split {', '.join(TEST_SPLITS)}; {LAYOUT}")
    if train_split == test_split:
        raise InputError(f"--train-split and --test-split are both {test_split}; nothing would be left to test on")
    findings = findings or Findings()
    splits = {split: _samples(root, split, findings) for split in (train_split, test_split)}
    classes = classes or _numbered(root, splits[train_split], ignored, findings.go_on)
    return opened(name, root, classes, splits, class_table(len(classes), ignored), findings)


def _places(root: Path, split: str) -> tuple[Path, Path] | None:
    """The folders of a split's images and masks; None where there are none."""
    pairs = [(root / split, root / f"{split}_masks")]
    pairs += [(root / images / split, root / masks / split) for images in IMAGES for masks in MASKS]
    return next((pair for pair in pairs if pair[0].is_dir() and pair[1].is_dir()), None)


def _samples(root: Path, split: str, findings: Findings) -> list[MaskSample]:
    places = _places(root, split)
    if places is None:
        raise InputError(f"{root} has no images and masks of split {split!r}; {LAYOUT}")
    images, masks = (files_by_stem(place) for place in places)
    findings.begin(split)
    for odd in sorted(set(masks) - set(images)):
        message = f"{masks[odd]} has no image in {places[0]}; put it there, or take the mask away"
        findings.refuse("masks without an image", str(masks[odd]), message)
    missing = places[1]
    return [MaskSample(stem, path, masks.get(stem, missing / f"{stem}.png")) for stem, path in images.items()]


def _numbered(root: Path, samples: Sequence[MaskSample], ignored: Sequence[int], go_on: bool) -> list[str]:
    """Classes that are named by their values, up to the highest that the training masks have."""
    values = [int(value) for value in values_of(samples, go_on) if value not in ignored]
    if not values:
        raise InputError(f"{root}: no training mask has a value other than the ignored {list(ignored)}; {ONE_CLASS}")
    if values[-1] >= MOST_CLASSES:
        raise InputError(
            f"{root}: the training masks have values up to {values[-1]}, and there are at most {MOST_CLASSES} classes; "
            "number the classes from 0, or say with --ignore which values are none"
        )
    return [str(value) for value in range(values[-1] + 1)]


def read_class_names(path: Path) -> list[str]:
    """One name a line, of class 0, 1, and so on.

    Raises:
        InputError: missing, no text, two classes of one name, or fewer than two.
    """
    try:
        lines = limits.read_bytes(path, "list").decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"--classes {path} is no text in UTF-8; give one class name a line") from None
    except OSError as error:
        raise InputError(
            f"--classes {path}: {error.strerror or error}; give a file with one class name a line"
        ) from None
    while lines and not lines[-1].strip():
        lines.pop()
    names = [line.strip() for line in lines]
    if empty := [number for number, name in enumerate(names, 1) if not name]:
        raise InputError(f"--classes {path} line {empty[0]} is empty, and would name class {empty[0] - 1}; name it")
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"--classes {path} has {double[0]!r} twice; give each class a name of its own")
    if len(names) < 2:
        raise InputError(f"--classes {path} names {len(names)} classes; a mask has at least 2")
    return names
