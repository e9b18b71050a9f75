"""Which classes are taken for which."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from moco_eval.data.class_names import readable
from moco_eval.features import sample
from moco_eval.report.pick import by_test_set, description, has_answers, shared, unlike
from moco_eval.report.runs import Run
from moco_eval.results import compare, run_files
from moco_eval.results.statistics import Answers

CLASSES = 20  # at most in a matrix; of more, the pairs that are confused most
PAIRS = 20
CELL = 24


def confusion(runs: Sequence[Run], names: dict[str, str], order: Sequence[str]) -> list[dict[str, Any]]:
    """A group for each test set: a matrix, or the most confused pairs, for each encoder.

    The runs are of one protocol, labels, feature and settings where the encoders have such runs; see `pick.shared`.

    Raises:
        InputError: the predictions or the sample of a run are damaged.
    """
    groups = []
    for data, tested in by_test_set(runs):
        chosen = shared([run for run in tested if has_answers(run)], names, order)
        shown = list(chosen.values())
        if chosen:
            groups.append({"data": data, "encoders": [_encoder(name, run, shown) for name, run in chosen.items()]})
    return groups


def _encoder(name: str, run: Run, shown: Sequence[Run]) -> dict[str, Any]:
    assert run.record
    pairs, classes = count(run)
    names = class_names(run, classes)
    trials = len(run.record["trials"])
    about = (description(run), unlike(run, shown), f"mean of {trials} trials" * (trials > 1))
    small = classes <= CLASSES
    return {
        "name": name,
        "description": ", ".join(filter(None, about)),
        "classes": classes,
        "matrix": matrix(_dense(pairs, classes), names, f"Confusion matrix of {name}") if small else None,
        "pairs": [] if small else most_confused(pairs, names),
    }


Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]  # true class, class it was taken for, how often; (P,) each


def count(run: Run) -> tuple[Pairs, int]:
    """How often images of each class were taken for each, mean over trials, where that was so; and how many classes.

    Raises:
        InputError: predictions.npz is damaged.
    """
    answers = compare.read_run(run.path).answers
    assert run.record and isinstance(answers, Answers) and answers.predictions is not None
    predictions, labels = answers.predictions, answers.labels
    classes = run.record["dataset"].get("classes") or int(max(labels.max(), predictions.max())) + 1
    cells, often = np.unique(labels * classes + predictions, return_counts=True)
    return (cells // classes, cells % classes, often / len(predictions)), classes


def _dense(pairs: Pairs, classes: int) -> np.ndarray:
    """(classes, classes), rows are the truth."""
    true, taken, often = pairs
    counts = np.zeros((classes, classes))
    counts[true, taken] = often
    return counts


def class_names(run: Run, classes: int) -> tuple[str, ...]:
    """Names of the classes where the run left a sample with them, else their numbers."""
    path = run.path / sample.NAME
    held = sample.read(path).classes if run_files.is_there(path) else ()
    return readable(held) if len(held) == classes else tuple(map(str, range(classes)))


def most_confused(pairs: Pairs, classes: Sequence[str]) -> list[dict[str, Any]]:
    """The pairs of classes that are confused most often, the most frequent first; ties by the share of the class."""
    true, taken, often = pairs
    total = np.bincount(true, weights=often, minlength=len(classes))
    wrong = true != taken
    rows = zip(*(array[wrong].tolist() for array in (true, taken, often)))
    first = sorted(rows, key=lambda row: (-row[2], -row[2] / total[row[0]], row[:2]))[:PAIRS]
    return [
        {
            "true": classes[i],
            "taken": classes[j],
            "count": f"{often:.3g}",
            "of": f"{total[i]:g}",
            "share": 100 * often / total[i],
        }
        for i, j, often in first
    ]


# Drawing


def matrix(counts: np.ndarray, classes: Sequence[str], title: str) -> Markup:
    """The matrix as SVG: the darker a cell, the larger its share of its row; numbers are percent of the row."""
    n, left = len(counts), 20 + 6.2 * max(len(_short(name)) for name in classes)
    total = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)
    cells = [_cell(i, j, left, share[i, j], counts[i, j], total[i, 0], classes) for i in range(n) for j in range(n)]
    sides = [_names(number, name, left, n) for number, name in enumerate(classes)]
    bottom = n * CELL + 28 if left < 36 else n * CELL + left + 6  # short names stand upright below their column
    axes = Markup(
        '<text x="{:g}" y="{:g}" text-anchor="middle">predicted</text>'
        '<text text-anchor="middle" transform="translate(9 {:g}) rotate(-90)">true class</text>'
    ).format(left + n * CELL / 2, bottom - 2, n * CELL / 2)
    return Markup(
        '<svg role="img" aria-label="{}" viewBox="0 0 {:g} {:g}" font-size="10" fill="var(--ink)">'
        '<rect x="{:g}" width="{:g}" height="{:g}" fill="var(--accent)" fill-opacity="0.05"/>{}{}'
        '<g fill="var(--muted)">{}</g></svg>'
    ).format(
        title, left + n * CELL, bottom, left, n * CELL, n * CELL, Markup("").join(cells), Markup("").join(sides), axes
    )


def _cell(i: int, j: int, left: float, share: float, count: float, total: float, classes: Sequence[str]) -> Markup:
    if not share:
        return Markup("")
    x, y, percent = left + j * CELL, i * CELL, round(100 * share)
    ink = "var(--paper)" if share > 0.55 else "var(--ink)"
    number = Markup('<text x="{:g}" y="{:g}" text-anchor="middle" fill="{}">{}</text>').format(
        x + CELL / 2, y + CELL / 2 + 3.5, ink, percent
    )
    return Markup(
        '<g><title>{} taken for {}: {:.3g} of {:g} ({:.1f} %)</title>'
        '<rect x="{:g}" y="{:g}" width="{}" height="{}" fill="var(--accent)" fill-opacity="{:.2f}"/>{}</g>'
    ).format(
        classes[i], classes[j], count, total, 100 * share, x, y, CELL, CELL, max(0.08, share),
        number if percent else "",
    )  # fmt: skip


def _names(number: int, name: str, left: float, n: int) -> Markup:
    """A class's name beside its row and, upright where it is one or two letters, below its column."""
    middle, below, short = number * CELL + CELL / 2, n * CELL + 12, _short(name)
    row = Markup('<text x="{:g}" y="{:g}" text-anchor="end">{}</text>').format(left - 5, middle + 3.5, short)
    x = left + middle
    if len(short) <= 2:
        return row + Markup('<text x="{:g}" y="{:g}" text-anchor="middle">{}</text>').format(x, below, short)
    return row + Markup('<text text-anchor="end" transform="translate({:g} {:g}) rotate(-60)">{}</text>').format(
        x + 4, below - 4, short
    )


def _short(name: str) -> str:
    return name if len(name) <= 12 else name[:11] + "…"
