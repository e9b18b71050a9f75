"""Two runs on the same test images: the paired difference, what it says, and what it could have shown.

See docs/statistics.md.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moco_eval import limits
from moco_eval.config.data_name import agree
from moco_eval.config.protocol_name import kind_and_name
from moco_eval.errors import InputError
from moco_eval.results import matches, run_files
from moco_eval.results.matches import Detected
from moco_eval.results.metrics import SAID, SHARED, TRUE
from moco_eval.results.record import SCHEMA, repeats
from moco_eval.results.statistics import OF_BOXES, Answers, Difference, mcnemar, paired, value
from moco_eval.runtime.printable import one_line
from moco_eval.untrusted import npz

RESAMPLES = 10_000
METRICS = ("top1", "mean_per_class", "mAP", "mIoU")  # those a data set may be judged by
TOLD = (*METRICS, "top5")
VERDICTS = ("behind", "level with", "ahead of")
PIXEL_COUNTS = "pixel_counts.npz"  # of a segmentation: pixels of each test image, (N, 3, C), as `metrics.overlap` takes


@dataclass(frozen=True)
class Run:
    """A finished run: its folder or what it is called, its result record, and what its trials said of each image."""

    folder: Path | str
    record: dict[str, Any]
    answers: Answers | Detected


@dataclass(frozen=True)
class Comparison:
    """B - A in `metric`, percent."""

    a: Run
    b: Run
    metric: str
    difference: float
    over_images: Difference

    @property
    def discordant(self) -> tuple[int, int, float] | None:
        """McNemar's test, for the top-1 of single trials only."""
        return _discordant(self.metric, self.a, self.b)

    @property
    def verdict(self) -> str:
        """What B is to A: 'ahead of', 'behind', or where the interval of the difference holds 0 'level with'."""
        low, high = self.over_images.interval
        return VERDICTS[1 + (low > 0) - (high < 0)]

    @property
    def resamples(self) -> int:
        """How many samples of test images the interval is made from."""
        return _resamples(self.a)

    def __str__(self) -> str:
        """In words, for a terminal."""
        return describe(self)


def compare(a: Path | Run, b: Path | Run, metric: str | None = None) -> Comparison:
    """Compare two runs by one metric, its mean over each run's trials.

    Args:
        a, b: run directories, or runs that are in memory.
        metric: by default the main one of their data set.
    Raises:
        InputError: a folder holds no finished run, or its files are damaged or disagree; or the runs were not tested on
            the same images.
    """
    runs = (a if isinstance(a, Run) else read_run(a)), (b if isinstance(b, Run) else read_run(b))
    require_same_images(*runs)
    metric = metric or main_metric(*runs)
    before, after = (_checked_value(run, metric) for run in runs)
    over_images = paired(metric, runs[0].answers, runs[1].answers, _resamples(runs[0]))
    return Comparison(*runs, metric, after - before, over_images)


def verdict(a: Path, b: Path, metric: str) -> str | None:
    """What the run in folder b is to that in folder a, in a metric that both records have.

    None where there is no telling: a run kept no answers, or the metric is not one that is resampled.

    Raises:
        InputError: as `compare`.
    """
    for folder in (a, b):
        record = run_files.read_record(folder)
        if not (record and has_answers(folder, record) and (metric in TOLD or matches.split_name(metric))):
            return None
    return compare(a, b, metric).verdict


def _resamples(run: Run) -> int:
    return OF_BOXES if isinstance(run.answers, Detected) else RESAMPLES


def _discordant(metric: str, a: Run, b: Run) -> tuple[int, int, float] | None:
    if metric != "top1" or any(len(run.record["trials"]) > 1 for run in (a, b)):
        return None
    assert isinstance(a.answers, Answers) and isinstance(b.answers, Answers)
    return mcnemar(a.answers.right() == 1, b.answers.right() == 1)


# Reading


def read_run(folder: Path) -> Run:
    """Raises InputError where the folder holds no finished run, or its files are damaged."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give the run directories of two finished evaluations")
    record = run_files.read_record(folder)
    if record is None and run_files.is_there(folder / "result.json"):
        raise InputError(f"{folder / 'result.json'} is no {SCHEMA} record")
    if record is None:
        raise InputError(f"{folder} holds no result.json, so no finished evaluation; run it to its end first")
    return with_answers(folder, record)


def with_answers(folder: Path, record: dict[str, Any]) -> Run:
    """A run whose record has been read. Raises InputError where its answers are not there, or are damaged."""
    kind = kind_and_name(record["protocol"])[0]
    if kind == "detect":
        return Run(folder, record, _read_matches(folder, record))
    if kind == "segment":
        return Run(folder, record, _read_pixels(folder, record))
    return Run(folder, record, _read_answers(folder / "predictions.npz", record))


def has_answers(folder: Path, record: dict[str, Any]) -> bool:
    """Whether a run kept what it said of each test image, so that it can be compared."""
    kind, _ = kind_and_name(record["protocol"])
    if kind == "detect":
        return all(run_files.is_there(place / matches.NAME) for place in _trial_folders(folder, record))
    if kind == "segment":
        return all(run_files.is_there(place / PIXEL_COUNTS) for place in _trial_folders(folder, record))
    return run_files.is_there(folder / "predictions.npz")


def _trial_folders(folder: Path, record: dict[str, Any]) -> list[Path]:
    from moco_eval.results.fine_tuning_task import folders  # with torch behind it

    return folders(folder, [trial["seed"] for trial in record["trials"]])


def _read_matches(folder: Path, record: dict[str, Any]) -> Detected:
    """The matched detections of every trial of a run."""
    if not has_answers(folder, record):
        raise InputError(
            f"{folder} holds no {matches.NAME}, which detections of this version leave; run the evaluation again into "
            "another --output"
        )
    trials = tuple(matches.read(place / matches.NAME) for place in _trial_folders(folder, record))
    images, kinds = record["dataset"].get("images"), [sorted(trial) for trial in trials]
    if (
        not all(kinds)
        or any(one.images != images for trial in trials for one in trial.values())
        or kinds != kinds[:1] * len(kinds)
    ):
        raise InputError(
            f"{folder / matches.NAME} is damaged: it is not of the {images} test images of result.json; run the "
            "evaluation again into another --output"
        )
    return Detected(trials)


def _read_answers(path: Path, record: dict[str, Any]) -> Answers:
    """The predictions of a run: prediction (T, N), or (N,) of one trial; label (N,) or (N, C); scores (T, N, C).

    Runs of version 0.1.0 kept the scores of the first trial only, (N, C).
    """
    if not run_files.is_there(path):
        raise InputError(
            f"{path} does not exist; compare needs the run's answer to each test image: run the evaluation again into "
            "another --output"
        )
    try:
        with npz.Arrays(path) as arrays:
            name, trouble = _answers_of(arrays.headers, record)
            labels, array = (arrays["label"], arrays[name]) if not trouble else (np.zeros(0), np.zeros(0))
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file makes numpy raise
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read ({reason}); run the evaluation again into another --output") from None
    trouble = trouble or _impossible(labels, array, record["dataset"].get("classes"))
    if trouble:
        raise InputError(f"{path} is damaged: {trouble}; run the evaluation again into another --output")
    array = array[None] if array.ndim == labels.ndim else array
    if labels.ndim == 2:
        return Answers(labels, scores=array)
    return Answers(labels.astype(np.int64), predictions=array.astype(np.int64))


def _read_pixels(folder: Path, record: dict[str, Any]) -> Answers:
    """The pixels of a segmentation's test images, of each trial."""
    places = _trial_folders(folder, record)
    shape = record["dataset"].get("images"), 3, record["dataset"].get("classes")
    return Answers.of_pixels(np.stack([_pixels(place / PIXEL_COUNTS, shape) for place in places]))


def _pixels(path: Path, shape: tuple[int | None, ...]) -> np.ndarray:
    if not run_files.is_there(path):
        raise InputError(f"{path} does not exist; run the evaluation again into another --output")
    try:
        with npz.Arrays(path) as arrays:
            header = arrays.headers["counts"]
            fits = header.shape == shape and header.dtype.kind in "iu" and math.prod(header.shape) > 0
            counts = arrays["counts"].astype(np.int64) if fits else np.zeros((1, 3, 1), np.int64)
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file makes numpy raise
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read ({reason}); run the evaluation again into another --output") from None
    least = np.minimum(counts[:, SAID], counts[:, TRUE])
    if not fits or counts.min() < 0 or (counts[:, SHARED] > least).any() or not counts[:, TRUE].any():
        raise InputError(
            f"{path} is damaged: it holds no counts of pixels; run the evaluation again into another --output"
        )
    return counts


def _answers_of(headers: Mapping[str, npz.Header], record: dict[str, Any]) -> tuple[str, str]:
    """Which array has the answers, and what is wrong with it by the headers alone, in words."""
    labels = headers["label"]
    name = "prediction" if len(labels.shape) == 1 else "scores"
    answers, trials, images = headers[name], len(record["trials"]), record["dataset"].get("images")
    shape = (1, *answers.shape) if len(answers.shape) == len(labels.shape) else answers.shape
    if len(labels.shape) not in (1, 2) or shape != (trials, *labels.shape) or not math.prod(labels.shape):
        counted = f"{trials} trials and labels of shape {labels.shape}"
        return name, f"{name} of shape {answers.shape} for {counted}"
    if images is not None and images != labels.shape[0]:
        return name, f"it has {labels.shape[0]:,} answers for {images:,} images"
    if labels.dtype.kind not in "iu" or answers.dtype.kind not in ("iu" if name == "prediction" else "f"):
        return name, f"labels of type {labels.dtype}, {name} of type {answers.dtype}"
    return name, ""


def _impossible(labels: np.ndarray, answers: np.ndarray, classes: int | None) -> str:
    """What no run can have said, in words: classes that there are not, or scores that are no numbers."""
    if labels.ndim == 2:
        if np.isfinite(answers).all() and np.isin(labels, (-1, 0, 1)).all():
            return ""
        return "a score is not finite, or a label is none of 1, 0 and -1"
    lowest = min(int(labels.min()), int(answers.min()))
    highest = max(int(labels.max()), int(answers.max()))
    known = classes or limits.most("classes")
    return "" if lowest >= 0 and highest < known else f"a class is none of {known}"


def run_in_memory(name: str, record: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Run:
    """A run that no folder holds. Raises InputError where it has no answer to each image: a detection."""
    if "label" not in arrays:
        raise InputError(f"{name} ({record['protocol']}) holds no answer to each image; give its run directory")
    if arrays["label"].ndim == 1:
        return Run(name, record, Answers(arrays["label"], predictions=arrays["prediction"]))
    return Run(name, record, Answers(arrays["label"], scores=arrays["scores"]))


def require_same_images(a: Run, b: Run) -> None:
    """Raises InputError where the runs were not tested on the same images with the same labels."""
    for key in ("name", "split", "fingerprint", "images"):
        ours, theirs = (run.record["dataset"].get(key) for run in (a, b))
        if ours != theirs and not (key == "name" and agree(ours, theirs)):
            raise InputError(
                f"the runs were not tested on the same images: {key} is {ours} in {a.folder} and {theirs} in {b.folder}"
            )
    if isinstance(a.answers, Detected) or isinstance(b.answers, Detected):
        _require_same_objects(a, b)
        return
    labels = a.answers.labels, b.answers.labels
    if labels[0].shape != labels[1].shape:
        raise InputError(
            f"the runs were not tested on the same images: labels of shape {labels[0].shape} in {a.folder} and "
            f"of shape {labels[1].shape} in {b.folder}"
        )
    different = np.flatnonzero((labels[0] != labels[1]).reshape(len(labels[0]), -1).any(axis=1))
    if len(different):
        raise InputError(
            f"the runs were not tested on the same images: {len(different)} of {len(labels[0])} have another label in "
            f"{b.folder} than in {a.folder} (first: image {different[0]})"
        )


def _require_same_objects(a: Run, b: Run) -> None:
    """Raises InputError where two detections do not share a kind of average precision over the same objects."""
    shared = _common_kinds(a, b)
    if not shared:
        raise InputError(f"the runs were not judged alike: {a.folder} is {_sort(a)} and {b.folder} is {_sort(b)}")
    for kind in shared:
        both = [run.answers.trials[0][kind] for run in (a, b) if isinstance(run.answers, Detected)]
        if not all(np.array_equal(*(getattr(one, name) for one in both)) for name in ("object_image", "object_label")):
            raise InputError(
                f"the runs were not tested on the same images: {b.folder} has other objects than {a.folder}"
            )


def _sort(run: Run) -> str:
    if isinstance(run.answers, Detected):
        return f"a detection with {', '.join(run.answers.trials[0])}"
    return "a classification"


def _common_kinds(a: Run, b: Run) -> list[str]:
    if not (isinstance(a.answers, Detected) and isinstance(b.answers, Detected)):
        return []
    return [kind for kind in a.answers.trials[0] if kind in b.answers.trials[0]]


def main_metric(a: Run, b: Run) -> str:
    """The metric by which the data set is judged: the first of the record's."""
    if isinstance(a.answers, Detected):
        return _common_kinds(a, b)[0]
    assert isinstance(b.answers, Answers)
    known = [name for name in a.record["metrics"] if name in METRICS and name in b.record["metrics"]]
    several = a.answers.labels.ndim == 2
    fitting = [name for name in known if (name in ("mAP", "mIoU")) == several]
    if not fitting:
        named = " and ".join(", ".join(run.record["metrics"]) or "none" for run in (a, b))
        raise InputError(f"the runs share no metric of {', '.join(METRICS)} that fits their labels; they have {named}")
    return fitting[0]


def _checked_value(run: Run, metric: str) -> float:
    """The metric as the run's answers give it, which must be what the record says."""
    computed, recorded = value(metric, run.answers), run.record["metrics"][metric]
    if not isinstance(recorded, int | float) or not abs(computed - recorded) <= 0.01:  # nor where it is not a number
        raise InputError(
            f"{run.folder}: result.json says {metric} {recorded}, but {_file(run)} gives {computed:.2f}; they are not "
            "of one run: run the evaluation again into another --output"
        )
    return computed


def _file(run: Run) -> str:
    if isinstance(run.answers, Detected):
        return matches.NAME
    return "predictions.npz" if run.answers.pixels is None else PIXEL_COUNTS


# What is said


def describe(done: Comparison) -> str:
    """The comparison in words, for a terminal."""
    dataset, images = done.a.record["dataset"], _images(done.a)
    where = " ".join(filter(None, (dataset.get("name"), dataset.get("split"))))
    lines = [*not_alike(done.a, done.b), f"B - A in {done.metric}, percent, on the same {images} images of {where}", ""]
    lines += _table([_row(name, run, done.metric) for name, run in (("A", done.a), ("B", done.b))])
    lines += ["", *_verdict(done)]
    if isinstance(done.a.answers, Detected):
        lines.append(NOT_COVERED)
    if any(len(run.record["trials"]) > 1 for run in (done.a, done.b)):
        lines.append("Each run counts by its mean over trials. The interval and p are over test images, given these")
        lines.append("trials; the spread over trials (±) stands beside them and is not in them.")
    for name, run, other in (("A", done.a, done.b), ("B", done.b, done.a)):
        own = [deviation for deviation in run.record["deviations"] if deviation not in other.record["deviations"]]
        lines += [f"only {name}: {deviation}" for deviation in own]
    return "\n".join(map(one_line, lines))


NOT_COVERED = (
    "The interval covers the test images, not the spread of fine-tuning: another seed moves AP too (--trials)."
)


def _images(run: Run) -> int:
    return len(run.answers) if isinstance(run.answers, Detected) else len(run.answers.labels)


def not_alike(a: Run, b: Run) -> list[str]:
    """What makes the difference more than one of encoders, said first."""
    protocols = [run.record["protocol"] for run in (a, b)]
    labels = [_labels(run.record["dataset"]) for run in (a, b)]
    reasons = []
    if protocols[0] != protocols[1]:
        reasons.append(f"A is {protocols[0]} and B is {protocols[1]}")
    if labels[0] != labels[1]:
        reasons.append(f"A was trained on {labels[0]} and B on {labels[1]}")
    return [f"NOT A DIFFERENCE OF ENCODERS ALONE: {'; '.join(reasons)}"] if reasons else []


def _labels(dataset: dict[str, Any]) -> str:
    few = dataset.get("labels_per_class")
    return f"{few} labels per class" if few else dataset.get("subset") or "all labels"


def _row(name: str, run: Run, metric: str) -> list[str]:
    record = run.record
    std, interval = record["std"].get(metric), record["interval"].get(metric)
    return [
        name,
        str(run.folder),
        record["protocol"],
        f"{record['metrics'][metric]:.2f}" + (f" ± {std:.2f} ({repeats(record)})" if std is not None else ""),
        f"[{interval[0]:.2f}, {interval[1]:.2f}] over test images" if interval else "",
    ]


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _verdict(done: Comparison) -> list[str]:
    test, (low, high) = done.over_images, done.over_images.interval
    lines = [
        f"B is {done.verdict} A.",
        f"B - A {done.difference:+.2f}, 95 % interval [{low:+.2f}, {high:+.2f}] over test images, {p_words(test.p)} "
        f"(paired bootstrap, {done.resamples:,} resamples, two-sided)",
    ]
    if discordant := done.discordant:
        only_a, only_b, p = discordant
        lines.append(f"McNemar's exact test: {p_words(p)} (only A is right on {only_a} images, only B on {only_b})")
    if test.standard_error == 0:
        return [*lines, "No image tells the runs apart, so this test cannot say what difference it could have seen."]
    return [*lines, f"Such a test sees a difference of {test.detectable:.2f} points or more with 80 % power at 5 %."]


def p_words(p: float) -> str:
    """A p value in words."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
