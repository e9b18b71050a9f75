"""Which runs stand for an encoder, of those tested on the same images."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from moco_eval.report.read import Run, sha_of

TASKS = ("linear", "knn")  # the protocols whose answers are shown first


def by_test_set(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Classifications by the images they were tested on, oldest first, under a name such as 'digits test'."""
    groups: dict[tuple, list[Run]] = {}
    judged = [run for run in runs if run.record and run.config["command"] != "detect"]
    for run in sorted(judged, key=lambda run: run.environment.get("time", "")):
        assert run.record
        dataset = run.record["dataset"]
        groups.setdefault(tuple(dataset.get(key) for key in ("name", "split", "fingerprint", "images")), []).append(run)
    plain = {key: " ".join(filter(None, key[:2])) for key in groups}
    shared = Counter(plain.values())
    return [
        (name if shared[name] == 1 else f"{name} {str(key[2])[:8]}, {key[3]} images", groups[key])
        for key, name in plain.items()
    ]


def by_encoder(
    runs: Sequence[Run], names: dict[str, str], order: Sequence[str], rank: Callable[[Run], Any]
) -> dict[str, Run]:
    """Of each encoder, in order, the run that ranks highest; of equals the newest."""
    found: dict[str, Run] = {}
    for run in runs:
        name = names[sha_of(run)]
        if name not in found or rank(run) >= rank(found[name]):
            found[name] = run
    return {name: found[name] for name in order if name in found}


def feature(run: Run) -> str:
    """The feature that was judged; the encoder's pooled one unless the run says otherwise."""
    return str((run.config.get("encoder") or {}).get("feature", "pooled"))


def has_answers(run: Run) -> bool:
    """Whether a run said one class of each test image, and kept it."""
    return bool(run.record and "top1" in run.record["metrics"] and (run.path / "predictions.npz").is_file())


def what(run: Run) -> tuple:
    """What must be alike for two runs' answers to be set against each other: protocol, labels, own deviations."""
    assert run.record
    dataset = run.record["dataset"]
    settings = tuple(said for said in run.record["deviations"] if not said.startswith("encoder: "))
    return run.record["protocol"], dataset.get("labels_per_class"), dataset.get("subset"), settings


def preference(run: Run) -> tuple:
    """All labels before few, then linear before kNN before all others: the higher the better."""
    protocol, few, subset, _ = what(run)
    task = protocol.split("/")[0]
    return few is None and subset is None, -TASKS.index(task) if task in TASKS else -len(TASKS)


def words(run: Run) -> str:
    """A run's protocol and labels in words."""
    protocol, few, subset, _ = what(run)
    labels = f"{few} labels per class" if few else subset
    return ", ".join(filter(None, (protocol, labels)))
