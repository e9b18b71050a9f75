"""`datasets check` for detection: all that is wrong with a folder, by the readers that `detect` uses."""

from pathlib import Path

import numpy as np

from moco_eval.data.boxes import coco, voc
from moco_eval.data.boxes.samples import DetectionData, Findings, Sample, grouped, read_image
from moco_eval.data.catalogue import data_folder
from moco_eval.data.glance import doubts_about
from moco_eval.errors import InputError
from moco_eval.runtime.files import sha256_of

OFFICIAL = ("voc", "voc07", "coco")
NAMES = (*OFFICIAL, "voc-folder", "coco-folder")


def known() -> list[str]:
    """A line about each data set that is for detection only."""
    train, test = (
        sum(count for (_, listed), count in voc.OFFICIAL.items() if listed == split) for split in ("trainval", "test")
    )
    splits = {
        "voc": f"{train:,} -> {test:,}",
        "coco": " -> ".join(f"{count:,}" for count in coco.OFFICIAL.values()),
        "coco-folder": "annotations/instances_*.json, images",
    }
    return [f"{name:<12} {contents:<42} AP, for detect" for name, contents in splits.items()]


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
    return (voc.read_voc if name == "voc" else voc.read_voc07)(folder, findings)


def _note_samples(samples: list[Sample], classes: tuple[str, ...], findings: Findings) -> None:
    for sample in samples:
        name = str(sample.image_id)
        if not len(sample.labels):
            findings.note("images without objects", name)
        for kind, marked in (("difficult objects", sample.difficult), ("crowd regions", sample.crowd)):
            for _ in range(marked.sum()):
                findings.note(kind, name)
        rows = np.column_stack([sample.boxes, sample.labels])
        for _ in range(len(rows) - len(np.unique(rows, axis=0))):
            findings.note("objects that stand there twice, with the same box", name)
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
    by_size: dict[int, list[Path]] = {}
    for sample in data.train:
        by_size.setdefault(sample.path.stat().st_size, []).append(sample.path)
    digests: dict[Path, str] = {}

    def digest(path: Path) -> str:
        digests[path] = digests.get(path) or sha256_of(path)
        return digests[path]

    shared = []
    for sample in data.test:
        others = by_size.get(sample.path.stat().st_size, [])
        if sample.path in others or any(digest(sample.path) == digest(other) for other in others):
            shared.append(sample)
    return shared


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
