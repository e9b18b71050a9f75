"""Which runs stand for an encoder, of those tested on the same images."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from moco_eval.config.data_name import layout_of
from moco_eval.config.protocol_name import kind_and_name
from moco_eval.report.runs import Run, sha_of
from moco_eval.results import run_files
from moco_eval.results.record import DENSE

TASKS = ("linear", "knn")  # the protocols whose answers are shown first


def by_test_set(runs: Sequence[Run], dense: bool = False) -> list[tuple[str, list[Run]]]:
    """Runs by the images they were tested on, oldest first: ('digits test', runs).

    Args:
        dense: detections and segmentations, and else classifications.
    """
    groups: dict[tuple, list[Run]] = {}
    plain: dict[tuple, str] = {}
    judged = [run for run in runs if run.record and (run.config["command"] in DENSE) == dense]
    for run in sorted(judged, key=lambda run: run.time):
        assert run.record
        dataset = run.record["dataset"]
        key = (layout_of(dataset["name"]), *(dataset.get(key) for key in ("split", "fingerprint", "images")))
        groups.setdefault(key, []).append(run)
        plain[key] = " ".join(filter(None, (dataset["name"], dataset.get("split"))))  # as the newest calls it
    shared = Counter(plain.values())
    return [
        (name if shared[name] == 1 else f"{name} {str(key[2])[:8]}, {key[3]} images", groups[key])
        for key, name in plain.items()
    ]


def by_encoder(
    runs: Sequence[Run], names: dict[str, str], order: Sequence[str], rank: Callable[[Run], Any]
) -> dict[str, Run]:
    """Of each encoder, in order, the run that ranks highest; of equals the newest."""
    chosen: dict[str, Run] = {}
    for run in runs:
        name = names[sha_of(run)]
        if name not in chosen or rank(run) >= rank(chosen[name]):
            chosen[name] = run
    return {name: chosen[name] for name in order if name in chosen}


def feature(run: Run) -> str:
    """The feature that was judged; the encoder's pooled one unless the run says otherwise."""
    return str((run.config.get("encoder") or {}).get("feature", "pooled"))


def has_answers(run: Run) -> bool:
    """Whether a run said one class of each test image, and kept it."""
    return bool(run.record and "top1" in run.record["metrics"] and run_files.is_there(run.path / "predictions.npz"))


def terms(run: Run) -> tuple:
    """What two runs must share to be set against each other: protocol, labels, feature, deviations of their own."""
    assert run.record
    dataset, own = run.record["dataset"], settings(run.record)
    return run.record["protocol"], dataset.get("labels_per_class"), dataset.get("subset"), feature(run), own


def settings(record: dict[str, Any]) -> tuple[str, ...]:
    """The deviations of the evaluation's own, in words; the others are its encoder's pretraining's."""
    return tuple(said for said in record["deviations"] if not said.startswith("encoder: "))


def preference(run: Run) -> tuple:
    """All labels before few, linear before kNN before all others, pooled features first: the higher the better."""
    protocol, few, subset, judged, _ = terms(run)
    task, _ = kind_and_name(protocol)
    return few is None and subset is None, -TASKS.index(task) if task in TASKS else -len(TASKS), judged == "pooled"


def shared(runs: Sequence[Run], names: dict[str, str], order: Sequence[str]) -> dict[str, Run]:
    """Of each encoder, in order, one run: of what most encoders were judged by, else of what it was judged by."""
    kinds = {terms(run): preference(run) for run in runs}
    same = {
        kind: by_encoder([run for run in runs if terms(run) == kind], names, order, lambda run: 0) for kind in kinds
    }
    preferred = by_encoder(runs, names, order, preference)
    return preferred | max(same.values(), key=lambda some: (len(some), max(map(preference, some.values()))), default={})


def description(run: Run) -> str:
    """A run's protocol, labels and feature in words."""
    protocol, few, subset, judged, _ = terms(run)
    labels = f"{few} labels per class" if few else subset
    return ", ".join(filter(None, (protocol, labels, "" if judged == "pooled" else f"{judged} feature")))


def unlike(run: Run, others: Sequence[Run]) -> str:
    """The settings by which a run left its protocol, where others that are shown with it did not leave it so."""
    own = terms(run)[-1]
    if all(terms(other)[-1] == own for other in others):
        return ""
    return f"with {'; '.join(own)}" if own else "with the protocol's own settings"
