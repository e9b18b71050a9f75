"""`datasets check` for detection: all that is wrong with a folder, by the readers that `detect` uses."""

from collections import Counter
from collections.abc import Hashable, Iterable
from pathlib import Path

import numpy as np

from moco_eval.data.boxes import cityscapes, coco, lvis, voc
from moco_eval.data.boxes.samples import DetectionData, Findings, Sample, grouped, read_image
from moco_eval.data.catalogue import data_folder, row
from moco_eval.data.glance import doubts_about
from moco_eval.errors import InputError
from moco_eval.runtime.files import sha256_of

OFFICIAL = ("voc", "voc07", "coco", "lvis-v0.5", "lvis-v1", "cityscapes")
NAMES = (*OFFICIAL, "voc-folder", "coco-folder")
OBLONG = 500


def known() -> list[str]:
    """A line about each data set that is for detection only."""
    train, test = (
        sum(count for (_, listed), count in voc.OFFICIAL.items() if listed == split) for split in ("trainval", "test")
    )
    splits = {
        "voc": f"{train:,} -> {test:,}",
        "coco": " -> ".join(f"{count:,}" for count in coco.OFFICIAL.values()),
        **{f"lvis-{version}": f"COCO's images, {count:,} classes" for version, count in lvis.CLASSES.items()},
        "cityscapes": " -> ".join(f"{count:,}" for count in cityscapes.OFFICIAL.values()) + ", instances",
        "coco-folder": "annotations/instances_*.json, images",
    }
    return [row(name, contents, "AP, for detect") for name, contents in splits.items()]


def check(
    name: str, data: Path | None, train_split: str | None = None, test_split: str | None = None
) -> tuple[list[str], str | None]:
    """Everything that is wrong with a data set, what is worth saying about it, and what it holds.

    Args:
        name: one of NAMES.
        data: its folder; None where MOCO_EVAL_DATA or DETECTRON2_DATASETS says it.
        train_split, test_split: of voc-folder and coco-folder.
    Returns:
        Lines to print; and what `detect` would refuse the data with, None where it takes them.
    Raises:
        InputError: no folder, or split names for a set whose splits are fixed.
    """
    folder = data_folder(name, data)
    if name in OFFICIAL and (train_split or test_split):
        raise InputError(f"{name} has its own splits; for others take voc-folder or coco-folder")
    lines, refusal = _look(name, folder, train_split, test_split, keypoints=False)
    if name.startswith("coco") and any(
        any(folder.glob(f"{above}annotations/person_keypoints_*.json")) for above in ("", "coco/")
    ):
        more, refusal_there = _look(name, folder, train_split, test_split, keypoints=True)
        lines += ["the same with keypoints:", *(line for line in more if line not in lines)]
        refusal = refusal or refusal_there
    return lines, refusal


def _look(
    name: str, folder: Path, train_split: str | None, test_split: str | None, keypoints: bool
) -> tuple[list[str], str | None]:
    findings = Findings(go_on=True)
    try:
        data = _read(name, folder, train_split, test_split, keypoints, findings)
    except InputError as error:  # nothing can be read beyond this
        return [f"refused: {line}" for line in [*grouped(findings.refused), str(error)]], str(error)
    lines: list[str] = []
    for split, samples in ((data.train_split, data.train), (data.test_split, data.test)):
        findings.begin(split)
        _note_samples(samples, data.classes, findings)
        for path in copies(sample.path for sample in samples):
            findings.note("images that are copies of another in their split", str(path))
        with findings.catching("images that cannot be read", split):
            lines += [f"doubtful: {doubt}" for doubt in doubts(samples, split)]
    for sample in shared_images(data):
        findings.note(f"images that are in {data.train_split} too", str(sample.path))
    lines = [f"refused: {line}" for line in grouped(findings.refused)] + lines
    lines += [f"note: {line}" for line in findings.notes()]
    return [line.replace(f"{folder}/", "") for line in lines] + summary(data), findings.refusal


def _read(
    name: str, folder: Path, train_split: str | None, test_split: str | None, keypoints: bool, findings: Findings
) -> DetectionData:
    if name == "coco":
        return coco.read_coco(folder, keypoints, findings)
    if name == "coco-folder":
        return coco.read_coco_folder(folder, train_split, test_split, keypoints=keypoints, findings=findings)
    if name == "voc-folder":
        return voc.read_voc_folder(folder, train_split, test_split, findings=findings)
    if name.startswith("lvis-"):
        return lvis.read_lvis(folder, name.removeprefix("lvis-"), findings)
    if name == "cityscapes":
        return cityscapes.read_cityscapes_instances(folder, findings)
    return (voc.read_voc if name == "voc" else voc.read_voc07)(folder, findings)


def _note_samples(samples: list[Sample], classes: tuple[str, ...], findings: Findings) -> None:
    for sample in samples:
        name = str(sample.image_id)
        if not len(sample.labels):
            findings.note("images without objects", name)
        for kind, marked in (("difficult objects", sample.difficult), ("crowd regions", sample.crowd)):
            for _ in range(marked.sum()):
                findings.note(kind, name)
        if max(sample.size) > OBLONG * min(sample.size):
            findings.note(f"images more than {OBLONG} times as long as wide, which a recipe may refuse", name)
        rows = np.column_stack([sample.boxes, sample.labels])
        for _ in range(len(rows) - len(np.unique(rows, axis=0))):
            findings.note("objects that are listed twice, with the same box", name)
        for mask in sample.masks:
            if mask is None:
                findings.note("objects without a mask, in images that have some", name)
    for label, count in enumerate(objects_of(samples, len(classes))):
        if count == 0:
            findings.note("classes without objects", classes[label])


def doubts(samples: list[Sample], split: str) -> list[str]:
    """What is doubtful about the pixels of a few images, in words. Raises InputError where none can be read."""
    paths = [sample.path for sample in samples]
    return doubts_about(split, len(paths), lambda i: read_image(paths[i]), lambda i: str(paths[i]), "say")


def objects_of(samples: list[Sample], classes: int) -> np.ndarray:
    """How many objects of each class there are, without crowd regions."""
    labels = [sample.labels[~sample.crowd] for sample in samples]
    return np.bincount(np.concatenate([np.zeros(0, np.int64), *labels]), minlength=classes)


def shared_images(data: DetectionData) -> list[Sample]:
    """The test images whose file, or a copy of it, is also trained on."""
    tested = {sample.path: sample.path.stat().st_size for sample in data.test}
    sizes = set(tested.values())
    trained = {path: size for path in (sample.path for sample in data.train) if (size := path.stat().st_size) in sizes}
    contents = _contents(trained | tested)
    known = {contents[path] for path in trained}
    return [sample for sample in data.test if contents[sample.path] in known]


def copies(paths: Iterable[Path]) -> list[Path]:
    """The files that have the content of one before them."""
    first: dict[Hashable, Path] = {}
    contents = _contents({path: path.stat().st_size for path in paths})
    return [path for path, content in contents.items() if first.setdefault(content, path) != path]


def _contents(sizes: dict[Path, int]) -> dict[Path, Hashable]:
    """Keys of files, equal where their content is: the size; where that is shared, some bytes; then a digest."""
    keys: dict[Path, Hashable] = dict(sizes)
    for tell in (_middle, sha256_of):
        times = Counter(keys.values())
        keys |= {path: (key, tell(path)) for path, key in keys.items() if times[key] > 1}
    return keys


def _middle(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size // 2 - 2048, 0))
        return file.read(4096)


def summary(data: DetectionData) -> list[str]:
    """What the splits hold, and the objects of each class."""
    counts = [objects_of(samples, len(data.classes)) for samples in (data.train, data.test)]
    lines = [
        f"{data.name} {split}: {len(samples):,} images, {count.sum():,} objects"
        for split, samples, count in zip((data.train_split, data.test_split), (data.train, data.test), counts)
    ]
    if data.keypoints:
        lines.append(f"{len(data.keypoints)} keypoints, of which a mirror exchanges {len(data.keypoint_pairs)} pairs")
    lines.append(f"{len(data.classes)} classes; fingerprint {data.fingerprint}")
    width = max((len(name) for name in data.classes), default=0)
    rows = [f"  {name:<{width}} {train:>8,} {test:>8,}" for name, train, test in zip(data.classes, *counts)]
    return lines + rows
