"""Where each number comes from, and where it leaves its protocol."""

from typing import Any

from moco_eval.config import deviations as configs
from moco_eval.config.base import is_among
from moco_eval.report.pictures import CLASS_METRICS
from moco_eval.report.runs import Run, sha_of
from moco_eval.results.record import repeats


def deviations_by_protocol(runs: list[Run]) -> list[tuple[str, list[tuple[list[str], list[str]]]]]:
    """By protocol: the deviations from it, those that the same runs have together, and these runs."""
    by_protocol: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        record = run.record or {"deviations": ()}
        for deviation in record["deviations"]:
            by_protocol.setdefault(record["protocol"], {}).setdefault(deviation, []).append(run.name)
    return [(protocol, _together(by_protocol[protocol])) for protocol in sorted(by_protocol)]


def _together(deviations: dict[str, list[str]]) -> list[tuple[list[str], list[str]]]:
    by_runs: dict[tuple[str, ...], list[str]] = {}
    for deviation, runs in deviations.items():
        by_runs.setdefault(tuple(runs), []).append(deviation)
    return [(together, list(runs)) for runs, together in by_runs.items()]


def provenance(run: Run, names: dict[str, str]) -> dict[str, Any]:
    """One run's origin, as a heading and pairs of words."""
    about = run.environment
    facts = [("command", about.get("command")), ("folder", str(run.path))]
    facts += _evaluation_facts(run.record) if run.record else _pretraining_facts(run.config)
    hardware, versions = about.get("hardware") or {}, about.get("versions") or {}
    gpus = ", ".join(hardware.get("gpus") or ()) or "no GPU"
    facts += [
        ("hardware", f"{hardware.get('machine')}, {hardware.get('cpus')} CPU cores, {gpus}"),
        ("versions", ", ".join(f"{name} {number}" for name, number in versions.items())),
        ("commit", about.get("commit") or "not from a clone"),
        ("written", about.get("time")),
    ]
    protocol = run.record["protocol"] if run.record else (run.config.get("config") or {}).get("protocol", "")
    encoder = names[sha_of(run)] if run.record else ""
    return {
        "name": run.name,
        "protocol": protocol,
        "encoder": encoder,
        "facts": [f for f in facts if f[1]],
    }


def _evaluation_facts(record: dict[str, Any]) -> list[tuple[str, str]]:
    dataset, encoder, cost = record["dataset"], record["encoder"], record["cost"]
    seeds = ", ".join(str(trial["seed"]) for trial in record["trials"])
    return [
        ("data", _data_line(dataset)),
        ("fingerprint", dataset.get("fingerprint", "")),
        ("weights", f"{encoder['path']} ({encoder['arch']}, {encoder['origin']})"),
        ("sha256", encoder["sha256"]),
        ("trials", f"{repeats(record)}, seeds {seeds}" if record["trials"][1:] else f"one, seed {seeds}"),
        ("selection", record["selection"]),
        ("equivalences", "; ".join(record["equivalences"])),
        ("deviations", "; ".join(record["deviations"]) or "none"),
        ("per class", _per_class(record.get("per_class") or {})),
        ("cost", f"{cost['seconds']:.0f} s on {cost['device']}, {cost['images']} images"),
        ("peak memory", f"{cost['peak_memory_MB']:.0f} MB"),
    ]


def _per_class(scores: dict[str, Any]) -> str:
    """APbb or AP50 of each class, where the record has them."""
    shown = {}
    for name, each in scores.items():
        if isinstance(each, dict):
            shown[name] = next((each[metric] for metric in CLASS_METRICS if each.get(metric) is not None), None)
    return ", ".join(f"{name} {'-' if value is None else f'{value:.1f}'}" for name, value in shown.items())


def _pretraining_facts(values: dict[str, Any]) -> list[tuple[str, str]]:
    dataset, recipe = values.get("dataset"), configs.flatten(values.get("config") or {})
    line = _data_line(dataset) if isinstance(dataset, dict) else str(dataset)
    fingerprint = dataset.get("fingerprint", "") if isinstance(dataset, dict) else ""
    skipped = ("protocol", "expect")
    recipe = {key: value for key, value in recipe.items() if not is_among(key, skipped) and value is not None}
    return [
        ("data", line),
        ("fingerprint", fingerprint),
        ("recipe", ", ".join(f"{key} {value}" for key, value in recipe.items())),
    ]


def _data_line(dataset: dict[str, Any]) -> str:
    few = dataset.get("labels_per_class")
    counts = [f"{dataset[key]} {key}" for key in ("images", "classes") if dataset.get(key)]
    return " ".join(filter(None, (dataset["name"], dataset.get("split")))) + "".join(
        f", {part}" for part in (*counts, *([f"{few} labels per class"] if few else []), dataset.get("subset")) if part
    )
