"""Maps of features: some test images in two dimensions, by PCA and t-SNE, coloured by class."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from markupsafe import Markup

from moco_eval.data.class_names import readable
from moco_eval.features import sample
from moco_eval.features.sample import Sample
from moco_eval.report.pick import by_encoder, by_test_set, feature
from moco_eval.report.runs import Run
from moco_eval.results import run_files

# Of the classes, which are round and square in turn. Chosen so that two of one shape differ by at least 25 (CIELAB)
# for normal, protanopic and deuteranopic eyes, and each stands out (2.3 : 1) from light and dark paper.
COLOURS = (
    *("#d590b9", "#6aa4fb", "#a01af9", "#e58c06", "#aa416b", "#41aa6b"),
    *("#8d5835", "#c72323", "#2abd05", "#dc389a", "#de6afb", "#5a5ae2"),
)
FREQUENT = 10  # classes that are coloured where there are more than colours
SIDE, MARGIN = 320, 14  # of a map, in its own units
FEWEST = 8  # images that t-SNE is made of
PERPLEXITY = 30  # at most


def maps(runs: Sequence[Run], names: dict[str, str], order: Sequence[str]) -> list[dict[str, Any]]:
    """A group for each test set of which a run left a sample: what is shown, and two maps for each encoder.

    Raises:
        InputError: a sample.npz is damaged.
    """
    groups = []
    for data, tested in by_test_set(runs):
        kept = [run for run in tested if run_files.is_there(run.path / sample.NAME)]
        chosen = by_encoder(kept, names, order, lambda run: feature(run) == "pooled")
        if chosen:
            shown = [_encoder(name, run) for name, run in chosen.items()]
            groups.append({"data": data, "encoders": shown})
    return groups


def _encoder(name: str, run: Run) -> dict[str, Any]:
    assert run.record
    held = sample.read(run.path / sample.NAME)
    held = replace(held, classes=readable(held.classes))
    label, several = _one_label(held)
    shown = coloured(label, len(held.classes))
    total, count = run.record["dataset"].get("images"), len(held.index)
    embedded = tsne(held)
    return {
        "name": name,
        "feature": feature(run),
        "images": _how_many(count, total),
        "classes": len(held.classes),
        "coloured": len(shown),
        "several": several,
        "pca": _map(_pca(held), label, shown, held.classes, f"PCA of {name}", _axes(held.variance)),
        "tsne": None if embedded is None else _map(embedded, label, shown, held.classes, f"t-SNE of {name}"),
        "perplexity": f"{_perplexity(count):g}",
    }


def _how_many(count: int, total: int | None) -> str:
    if total == count:
        return f"all {count:,}"
    return f"{count:,} evenly spread of {total:,}" if total else f"{count:,}"


def _one_label(held: Sample) -> tuple[np.ndarray, bool]:
    """The class of each image, -1 for one of several classes or none; and whether images may have several."""
    if held.label.ndim == 1:
        return held.label, False
    single = (held.label == 1).sum(axis=1) == 1
    return np.where(single, (held.label == 1).argmax(axis=1), -1), True


def coloured(label: np.ndarray, classes: int) -> list[int]:
    """The classes that get a colour: all where there are enough, else those with most images, in their order."""
    count = np.bincount(label[label >= 0], minlength=classes)
    there = np.flatnonzero(count)
    if classes <= len(COLOURS):
        return there.tolist()
    return sorted(there[np.argsort(-count[there], kind="stable")][:FREQUENT].tolist())


# In two dimensions


def _pca(held: Sample) -> np.ndarray:
    """The first two components, each over its own range, (n, 2); a second one of zeros where there is none."""
    two = np.pad(held.components[:, :2].astype(np.float64), ((0, 0), (0, max(0, 2 - held.components.shape[1]))))
    span = np.ptp(two, axis=0)
    return two / np.where(span > 0, span, 1)


def _axes(variance: np.ndarray) -> tuple[str, ...]:
    return tuple(f"component {number}: {100 * share:.0f} %" for number, share in enumerate(variance[:2], 1))


def tsne(held: Sample) -> np.ndarray | None:
    """t-SNE of the principal components, (n, 2), the same each time; None for too few images or equal ones.

    It starts from the first two components, on one thread: sums in another order would lead it elsewhere.

    Source: van der Maaten and Hinton 2008; the start: Kobak and Linderman 2021, Nature Biotechnology 39.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    spread = held.components[:, :1].std()
    if len(held.index) < FEWEST or held.components.shape[1] < 2 or not spread > 0:
        return None
    start = (held.components[:, :2] / spread * 1e-4).astype(np.float32)
    with threadpool_limits(limits=1):
        return TSNE(perplexity=_perplexity(len(start)), init=start, random_state=0).fit_transform(held.components)


def _perplexity(images: int) -> float:
    return min(PERPLEXITY, (images - 1) // 3)


# Drawing


def _map(
    points: np.ndarray,
    label: np.ndarray,
    shown: Sequence[int],
    classes: Sequence[str],
    title: str,
    axes: Sequence[str] = (),
) -> Markup:
    """Points as SVG: dots by class, and each coloured class's name at its median."""
    places = _placed(points)
    grey = ~np.isin(label, shown)
    parts = [_dots(places[grey], "var(--muted)", "round", "other images", 0.35)] if grey.any() else []
    for number, index in enumerate(shown):
        cap = ("round", "square")[number % 2]
        parts.append(_dots(places[label == index], COLOURS[number], cap, classes[index], 0.9))
    medians = [(classes[index], *np.median(places[label == index], axis=0)) for index in shown]
    parts += [_label(*median) for median in apart(medians)]
    parts += [_axis(title, sideways) for title, sideways in zip(axes, (False, True))]
    return Markup('<svg role="img" aria-label="{}" viewBox="0 0 {} {}">{}</svg>').format(
        title, SIDE, SIDE, Markup("").join(parts)
    )


def _axis(title: str, sideways: bool) -> Markup:
    x, y = (9.0, SIDE / 2) if sideways else (SIDE / 2, SIDE - 2.0)
    turn = Markup(' transform="rotate(-90 {:g} {:g})"').format(x, y) if sideways else ""
    return Markup('<text x="{:g}" y="{:g}"{} text-anchor="middle" font-size="10" fill="var(--muted)">{}</text>').format(
        x, y, turn, title
    )


def _placed(points: np.ndarray) -> np.ndarray:
    """Points in the map's units, up being up: in the middle, one scale for both directions."""
    low, high = points.min(axis=0), points.max(axis=0)
    scale = (SIDE - 2 * MARGIN) / (max(high - low) or 1)
    return SIDE / 2 + (points - (low + high) / 2) * scale * np.array([1, -1])


def _dots(places: np.ndarray, colour: str, cap: str, title: str, opacity: float) -> Markup:
    """Dots as one path of lines with hardly a length, whose ends are round or square: a dozen bytes each.

    In print, lines without any length have no square ends.
    """
    path = "".join(f"M{x:.1f} {y:.1f}h.01" for x, y in places)
    width = 4.6 if cap == "round" else 4
    return Markup(
        '<path d="{}" fill="none" stroke="{}" stroke-opacity="{:g}" stroke-width="{:g}" stroke-linecap="{}">'
        "<title>{}</title></path>"
    ).format(path, colour, opacity, width, cap, title)


def apart(labels: Sequence[tuple[str, float, float]], height: float = 12) -> list[tuple[str, float, float]]:
    """Names with their places, kept within the map, and moved to the nearest place where none lies on another."""
    placed: list[tuple[str, float, float]] = []
    for name, x, y in sorted(labels, key=lambda label: label[2]):
        x = min(max(x, _half(name)), SIDE - _half(name))
        beside = [at_y for other, at_x, at_y in placed if abs(x - at_x) < _half(name) + _half(other)]
        tried = [y, *(at_y + step for at_y in beside for step in (height, -height))]
        free = [at for at in tried if all(abs(at - at_y) >= height for at_y in beside) and height <= at <= SIDE]
        placed.append((name, x, min(free, key=lambda at: abs(at - y), default=y)))
    return placed


def _half(name: str) -> float:
    """Half the width of a name on the map."""
    return 3.3 * len(_short(name)) + 2


def _label(name: str, x: float, y: float) -> Markup:
    return Markup(
        '<text x="{:.1f}" y="{:.1f}" text-anchor="middle" font-size="11" font-weight="600" fill="var(--ink)" '
        'stroke="var(--paper)" stroke-width="3" paint-order="stroke">{}</text>'
    ).format(x, y - 5, _short(name))  # above, so that a dense group is seen


def _short(name: str) -> str:
    return name if len(name) <= 14 else name[:13] + "…"
