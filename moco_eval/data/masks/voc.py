"""Pascal VOC's masks: VOC2012 as published, and with those of SBD (train_aug)."""

from pathlib import Path, PurePath

from moco_eval import limits
from moco_eval.data.boxes.samples import Findings, inside
from moco_eval.data.boxes.voc import VOC_CLASSES
from moco_eval.data.masks.samples import (
    MaskSample,
    SegmentationData,
    class_table,
    files_by_stem,
    opened,
    require_folder,
)
from moco_eval.errors import InputError

CLASSES = ("background", *VOC_CLASSES)
LAYOUT = "give VOCdevkit, or its VOC2012 with JPEGImages/, ImageSets/Segmentation/ and the masks"


def read_voc_aug(root: Path, findings: Findings | None = None) -> SegmentationData:
    """train_aug of 2012 (10,582 images) to val (1,449), masks of SegmentationClassAug. Raises as `_read`.

    An image whose mask is in SegmentationClass has that one, as in mmsegmentation, whose lists, train.txt and aug.txt,
    are taken where there is no other.
    """
    return _read("voc-aug", root, "SegmentationClassAug", (("train_aug",), ("trainaug",), ("train", "aug")), findings)


def read_voc2012(root: Path, findings: Findings | None = None) -> SegmentationData:
    """train of 2012 (1,464 images) to val (1,449), their masks in SegmentationClass. Raises as `_read`."""
    return _read("voc2012", root, "SegmentationClass", (("train",),), findings)


def _read(
    name: str, root: Path, masks: str, train_lists: tuple[tuple[str, ...], ...], findings: Findings | None
) -> SegmentationData:
    """Palette or grey PNGs: 0 background, 1 to 20 the classes, 255 ignored.

    Args:
        train_lists: names that the list of training images may have, or the lists.
    Raises:
        InputError: what is missing, with its place.
    """
    root = next((place for place in (root / "VOCdevkit" / "VOC2012", root / "VOC2012") if place.is_dir()), root)
    lists = require_folder(root / "ImageSets" / "Segmentation", LAYOUT)
    whole = (several for several in train_lists if all((lists / f"{one}.txt").is_file() for one in several))
    train = next(whole, train_lists[0])
    images = files_by_stem(require_folder(root / "JPEGImages", LAYOUT))
    folder = require_folder(root / masks, LAYOUT)

    def sample(stem: str) -> MaskSample:
        own = root / "SegmentationClass" / f"{stem}.png"
        mask = own if own.is_file() else folder / f"{stem}.png"
        return MaskSample(stem, images.get(stem, root / "JPEGImages" / f"{stem}.jpg"), mask)

    splits = {
        "+".join(several): [sample(stem) for one in several for stem in _names(lists / f"{one}.txt")]
        for several in (train, ("val",))
    }
    return opened(name, root, CLASSES, splits, class_table(len(CLASSES), (255,)), findings or Findings())


def _names(path: Path) -> list[str]:
    """The images of a list: a name a line, or DeepLab's pairs of paths."""
    try:
        lines = limits.read_bytes(path, "list").decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text in UTF-8"
        raise InputError(f"cannot read {path}: {reason}; {LAYOUT}") from None
    names = [PurePath(line.split()[0]).stem if line.count("/") else line.split()[0] for line in lines if line.strip()]
    for name in names:
        if not inside(name):
            raise InputError(f"{path} lists {name[:60]!r}, which is no image's name; correct it")
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{path} lists {double!r} twice; leave one")
    return names
