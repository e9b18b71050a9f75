"""What stands beside the numbers of a small set: chance, raw pixels, and what makes a number suspicious."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from moco_eval.config.protocol_name import kind_and_name
from moco_eval.errors import InputError
from moco_eval.results import run_files

SMALL = 10_000  # test images up to which a set may be one that raw pixels already solve
FROZEN = ("knn", "linear", "logistic", "svm")  # protocols that judge one and the same feature
UNTRAINED = ("look untrained", "never saw data in train mode")  # words of the load's doubts


def chance(metric: str, classes: int | None) -> float | None:
    """What guessing reaches in percent, classes being equally frequent; None where that is not known."""
    guesses = {"top1": 1, "mean_per_class": 1, "top5": 5}.get(metric)
    return 100 * min(guesses, classes) / classes if guesses and classes else None


def is_small(record: dict[str, Any]) -> bool:
    """Whether it is a classification of so few images that raw pixels belong beside it."""
    known = chance(next(iter(record["metrics"]), ""), record["dataset"].get("classes")) is not None
    return known and (record["dataset"].get("images") or SMALL + 1) <= SMALL


def beside(record: dict[str, Any], runs: Path | None = None, command: str = "") -> list[str]:
    """Chance and raw pixels on a small set, in lines; none for others.

    Args:
        runs: where a run of raw pixels may lie.
        command: that would judge them; by default the protocol's own.
    """
    if not is_small(record):
        return []
    metric, dataset = next(iter(record["metrics"])), record["dataset"]
    lines = [f"chance: {metric} {chance(metric, dataset['classes']):.2f}"]
    if record["encoder"]["arch"] == "pixels":
        return lines
    pixels = raw_pixels(record, runs) if runs else None
    if pixels:
        return [*lines, f"raw pixels: {metric} {pixels['metrics'][metric]:.2f}"]
    command = command or kind_and_name(record["protocol"])[0]
    return [*lines, f"raw pixels: not measured; moco-eval {command} pixels with the same options measures them"]


def raw_pixels(record: dict[str, Any], runs: Path) -> dict[str, Any] | None:
    """A record of raw pixels by the same protocol on the same images and labels, from a folder of that name."""
    for place in sorted([*runs.glob("*pixels*/result.json"), *runs.glob("*pixels*/*/result.json")]):
        try:
            other = run_files.read_record(place.parent)
        except InputError:
            continue  # some other run's trouble
        if other and other["encoder"]["arch"] == "pixels" and _terms(other) == _terms(record):
            return other
    return None


def _terms(record: dict[str, Any]) -> tuple:
    dataset = record["dataset"]
    about = tuple(dataset.get(key) for key in ("fingerprint", "split", "labels_per_class", "subset"))
    return record["protocol"], list(record["metrics"])[:1], about


def looks_untrained(record: dict[str, Any]) -> list[str]:
    """The doubts of the load that say so, of an encoder that is not meant to be untrained."""
    encoder = record["encoder"]
    if encoder["origin"].startswith("random") or (encoder.get("pretraining") or {}).get("epochs") == 0:
        return []
    return [doubt for doubt in encoder.get("warnings") or () if any(words in doubt for words in UNTRAINED)]


def disagreements(records: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any], str]]:
    """(higher, lower, metric) of protocols that judge the same features of the same images and labels, and differ.

    They differ by more than their intervals over test images: these have nothing in common. Of several such pairs the
    widest is told.

    Args:
        records: of one encoder and feature, on one data set and as many labels.
    """
    judged = [record for record in records if kind_and_name(record["protocol"])[0] in FROZEN]
    apart = []
    for pair in combinations(judged, 2):
        metric = next(iter(pair[0]["metrics"]), "")
        bounds = [record["interval"].get(metric) for record in pair if metric in record["metrics"]]
        if pair[0]["protocol"] == pair[1]["protocol"] or len(bounds) < 2 or not all(bounds):
            continue
        low, high = sorted(pair, key=lambda record: record["metrics"][metric])
        if low["interval"][metric][1] < high["interval"][metric][0]:
            apart.append((high, low, metric))
    return sorted(apart, key=lambda row: row[1]["metrics"][row[2]] - row[0]["metrics"][row[2]])[:1]


def disagreement(high: dict[str, Any], low: dict[str, Any], metric: str) -> str:
    """One of them in words."""
    said = [
        "{} {:.1f} [{:.1f}, {:.1f}]".format(one["protocol"], one["metrics"][metric], *one["interval"][metric])
        for one in (high, low)
    ]
    return (
        f"on the same features {said[0]} and {said[1]} differ by more than their intervals in {metric}: the protocol, "
        "not the encoder, makes that difference; look at the lower one's fit before encoders are compared by it"
    )
