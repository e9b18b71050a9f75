"""One self-contained HTML page about runs: what came out, how it went, how it looks, where it comes from."""

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from moco_eval import __version__, config, files, results
from moco_eval.detection.plots import ROWS, bars_figure, loss_figure
from moco_eval.errors import InputError
from moco_eval.runtime import warn

METRICS = {"top1": "top-1"} | {name: name for name in ("AP50", "AP", "APbb", "APmk", "APkp", "mAP")}
TASKS = {"linear": "linear", "knn": "kNN", "detect": "detection"}
KINDS = ("trained", "other", "random", "pixels")  # the order of the rows
PICTURES = 4  # drawn images per encoder
CLASS_METRICS = ("APbb", "AP50")  # the one shown of each class: COCO's, or VOC's
PICTURE_BYTES, PICTURE_PIXELS = 200_000, 1000  # larger pictures are made smaller
DRAWN_BYTES = 60_000  # and so are drawn images, of which there are many
PAGE_BYTES = 3_000_000


@dataclass
class Run:
    """A run directory as it was read; `record` is None for a pretraining.

    `metrics`: the lines of a pretraining's metrics.jsonl; of a detection run `trials` has those of each fine-tuning.
    """

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    record: dict[str, Any] | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    trials: list[list[dict[str, Any]]] = field(default_factory=list)


@dataclass
class Score:
    """A number of the table; `spread` is a standard deviation over `trials` ('5 heads'), `interval` over images."""

    value: float
    spread: float | None
    trials: str
    interval: tuple[float, float] | None

    @property
    def words(self) -> str:
        return f"{self.value:.1f}" + (f" ± {self.spread:.1f}" if self.spread is not None else "")

    def against(self, other: "Score") -> str:
        """'ahead of', 'behind' or, where the difference is within the spread, 'level with'."""
        difference = self.value - other.value
        if self.spread is not None and other.spread is not None:
            close = abs(difference) <= max(self.spread, other.spread)
        elif self.interval and other.interval:
            close = self.interval[0] <= other.interval[1] and other.interval[0] <= self.interval[1]
        else:
            close = difference == 0
        return "level with" if close else "ahead of" if difference > 0 else "behind"


@dataclass
class Column:
    """One metric of one protocol on the same data with the same settings, by encoder name."""

    task: str
    regime: str
    dataset: str
    metric: str
    protocol: str
    scores: dict[str, Score] = field(default_factory=dict)

    @property
    def best(self) -> float:
        return max(score.value for score in self.scores.values())


def write_report(runs: list[Path], output: Path, title: str = "moco-eval report") -> None:
    """Write the page about these runs.

    Args:
        runs: run directories, or folders that contain some.
        output: the HTML file; it needs no other.
    Raises:
        InputError: a path holds no finished run, a file of a run is damaged, the output cannot be written.
    """
    found = read_runs(runs)
    page = _template().render(title=title, version=__version__, **_contents(found))
    if len(page.encode()) > PAGE_BYTES:
        warn(f"{output} has {len(page.encode()) / 1e6:.1f} MB; report on fewer runs for a lighter page")
    files.write_text(output, page)


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    undefined = jinja2.StrictUndefined
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=undefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html")


def _contents(runs: list[Run]) -> dict[str, Any]:
    """Everything the template shows, section by section."""
    names = encoder_names(runs)
    columns = result_columns(runs, names)
    kinds = {names[_sha(run)]: _kind(run.record["encoder"]) for run in runs if run.record}
    order = sorted(kinds, key=lambda name: (KINDS.index(kinds[name]), name))
    return {
        "summary": summary(columns, order, kinds),
        "columns": columns,
        "encoders": order,
        "kinds": kinds,
        "curves": [_curves(run) for run in runs if any("loss" in line for line in run.metrics)],
        "views": [(run.path.name, _image(run.path / "views.png")) for run in runs if _has(run, "views.png")],
        "neighbours": _neighbours(runs, names, order),
        "detections": _detections(runs, names, order),
        "provenance": [_provenance(run, names) for run in runs],
        "deviations": _deviations(runs),
    }


# Reading


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The finished evaluations and the pretrainings in these folders, each once.

    Raises:
        InputError: a path holds none, or a file is damaged.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        here = [run for folder in _folders(path) if (run := _read(folder))]
        if not here:
            raise InputError(f"{path} holds no finished run (config.yaml with result.json or metrics.jsonl)")
        runs |= {run.path.resolve(): run for run in here}
    return list(runs.values())


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise InputError(f"{path} is no folder; give run directories, or a folder that contains some")
    return sorted(file.parent for file in path.rglob("config.yaml"))


def _read(folder: Path) -> Run | None:
    values, _ = config.read_yaml(folder / "config.yaml")
    if "command" not in values or not (folder / "environment.json").is_file():
        return None
    run = Run(folder, values, files.read_json(folder / "environment.json"), results.finished(folder))
    if run.record is not None and run.record.get("schema") != results.SCHEMA:
        raise InputError(f"{folder / 'result.json'} is no {results.SCHEMA} record")
    if values["command"] == "pretrain" and (folder / "metrics.jsonl").is_file():
        run.metrics = _read_lines(folder / "metrics.jsonl")
    if values["command"] == "detect":
        paths = [folder / "metrics.jsonl", *sorted(folder.glob("trial_*/metrics.jsonl"))]
        run.trials = [lines for path in paths if path.is_file() and (lines := _read_lines(path))]
    return run if run.record or run.metrics else None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that is still being written is passed over."""
    lines = path.read_text(encoding="utf-8").splitlines()
    parsed = []
    for number, line in enumerate(lines, 1):
        try:
            parsed.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise InputError(f"{path} line {number} is not JSON") from None
    return parsed


# Names


def _sha(run: Run) -> str:
    assert run.record
    return run.record["encoder"]["sha256"]


def _kind(encoder: dict[str, Any]) -> str:
    pretraining = encoder["pretraining"]
    if encoder["arch"] == "pixels":
        return "pixels"
    if encoder["origin"].startswith("random") or (pretraining and pretraining.get("epochs") == 0):
        return "random"
    return "trained" if pretraining else "other"


def encoder_names(runs: Sequence[Run]) -> dict[str, str]:
    """A human name for each encoder by its sha256: 'MoCo (epoch 60)', 'random initialisation', 'raw pixels'.

    Where two encoders would share one, the run or the weights' first digits tell them apart.
    """
    encoders = {_sha(run): run.record["encoder"] for run in runs if run.record}
    plain = {sha: _plain_name(encoder) for sha, encoder in encoders.items()}
    longer = {sha: f"{name}, {_run_name(encoders[sha])}" for sha, name in plain.items()}
    longest = {sha: f"{name}, {sha[:8]}" for sha, name in longer.items()}
    shared, still = Counter(plain.values()), Counter(longer.values())
    return {
        sha: name if shared[name] == 1 else longer[sha] if still[longer[sha]] == 1 else longest[sha]
        for sha, name in plain.items()
    }


def _plain_name(encoder: dict[str, Any]) -> str:
    kind = _kind(encoder)
    if kind == "trained":
        return f"MoCo (epoch {encoder['pretraining']['epochs']})"
    return {"pixels": "raw pixels", "random": "random initialisation"}.get(kind) or _run_name(encoder)


def _run_name(encoder: dict[str, Any]) -> str:
    """Of runs/mine/checkpoints/last.pth 'mine', of moco_v2.pth 'moco_v2', of torchvision:resnet50 itself."""
    path = Path(encoder["path"])
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.stem


# The result table


def result_columns(runs: Sequence[Run], names: dict[str, str]) -> list[Column]:
    """The columns, fewest labels first; of two runs of the same thing the newer counts."""
    columns: dict[Any, Column] = {}
    for run in sorted(runs, key=lambda run: run.environment.get("time", "")):
        record = run.record
        for metric in METRICS.keys() & (record["metrics"].keys() if record else ()):
            assert record
            column = columns.setdefault(_key(record, metric), _column(record, metric))
            column.scores[names[_sha(run)]] = _score(record, metric)
    order = sorted(columns, key=lambda key: (key[0] or float("inf"), *map(str, key[1:])))
    return _tell_apart([columns[key] for key in order])


def _key(record: dict[str, Any], metric: str) -> tuple:
    """What a column holds fixed: labels, protocol, data, metric, and the settings that left the protocol."""
    dataset = record["dataset"]
    order = list(TASKS).index(record["protocol"].split("/")[0]) if record["protocol"].split("/")[0] in TASKS else 9
    own = tuple(words for words in record["deviations"] if not words.startswith("encoder: "))
    where = (dataset["name"], dataset.get("split"), dataset.get("fingerprint"))
    return (
        dataset.get("labels_per_class"),
        order,
        record["protocol"],
        where,
        list(METRICS).index(metric),
        own,
        dataset.get("subset", ""),
    )


def _column(record: dict[str, Any], metric: str) -> Column:
    task, few = record["protocol"].split("/")[0], record["dataset"].get("labels_per_class")
    regime = f"{few} labels per class" if few else record["dataset"].get("subset", "all labels")
    return Column(TASKS.get(task, task), regime, record["dataset"]["name"], METRICS[metric], record["protocol"])


def _tell_apart(columns: list[Column]) -> list[Column]:
    """Number the columns that differ only in settings."""
    seen: Counter = Counter()
    for column in columns:
        head = (column.task, column.regime, column.dataset, column.metric, column.protocol)
        seen[head] += 1
        if seen[head] > 1:
            column.regime += f", settings {seen[head]}"
    return columns


def _score(record: dict[str, Any], metric: str) -> Score:
    interval = record["interval"].get(metric)
    spread, trials = record["std"].get(metric), results.repeats(record)
    return Score(record["metrics"][metric], spread, trials, tuple(interval) if interval else None)


def summary(columns: Sequence[Column], encoders: Sequence[str], kinds: dict[str, str]) -> list[str]:
    """What the table says: the first column in numbers, then where each trained encoder stands in all."""
    if not columns:
        return []
    first = columns[0]
    reached = ", ".join(f"{name} {first.scores[name].words}" for name in encoders if name in first.scores)
    what = _what(first)
    what = what if what.startswith("kNN") else what[0].upper() + what[1:]
    sentences = [f"{what} on {first.dataset}, in percent: {reached}."]
    for name in encoders:
        for rival in encoders:
            if kinds[name] == "trained" and kinds[rival] != "trained":
                sentences += _standing(columns, name, rival)
    return sentences


def _what(column: Column) -> str:
    words = f"{column.task} {column.metric}"
    return words if column.task == "detection" else f"{words} with {column.regime}"


def _standing(columns: Sequence[Column], name: str, rival: str) -> list[str]:
    """In which columns one encoder is ahead of another, level, or behind; nothing where they never meet."""
    places: dict[str, list[str]] = {"ahead of": [], "level with": [], "behind": []}
    for column in columns:
        if name in column.scores and rival in column.scores:
            places[column.scores[name].against(column.scores[rival])].append(_what(column))
    judged = {words: where for words, where in places.items() if where}
    if not judged:
        return []
    if len(judged) == 1 and len(columns) > 1:
        ((words, where),) = judged.items()
        return [f"{name} is {words} {rival} in {'all' if where[1:] else 'the'} {_count(where)} they share."]
    parts = [f"{words} {rival} in {', '.join(where)}" for words, where in judged.items()]
    return [f"{name} is {'; '.join(parts)}."]


def _count(where: list[str]) -> str:
    return f"{len(where)} measures" if where[1:] else "one measure"


# Curves

TEXT, ACCENT, MUTED = "#010203", "#040506", "#070809"  # stand for the page's colours, light or dark
COLOURS = {TEXT: "currentColor", ACCENT: "var(--accent)", MUTED: "var(--muted)"}


def _curves(run: Run) -> dict[str, Any]:
    chance = next((line for line in run.metrics if "chance" in line), {})
    steps = [line for line in run.metrics if "loss" in line]
    epochs = [line for line in run.metrics if "knn_top1" in line]
    return {
        "name": run.path.name,
        "loss": _loss_curve(steps, chance.get("chance"), chance.get("queue_full_step")),
        "first": steps[0]["loss"],
        "last": steps[-1]["loss"],
        "chance": chance.get("chance"),
        "knn": _knn_curve(epochs) if epochs else None,
        "knn_last": epochs[-1] if epochs else None,
    }


def _loss_curve(lines: list[dict[str, Any]], chance: float | None, queue_full: int | None) -> Markup:
    figure, axes = _axes("step", "loss (nats)")
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], color=ACCENT, linewidth=1.4)
    if chance is not None:
        axes.axhline(chance, color=MUTED, linewidth=0.9, linestyle=(0, (5, 3)))
        axes.annotate(
            f"chance {chance:.2f}", (0.99, chance), xycoords=("axes fraction", "data"), xytext=(0, 3),
            textcoords="offset points", ha="right", color=MUTED, fontsize=8,
        )  # fmt: skip
    if queue_full is not None and queue_full <= lines[-1]["step"]:
        axes.axvline(queue_full, color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)))
        axes.annotate(
            "queue full", (queue_full, 0.03), xycoords=("data", "axes fraction"), xytext=(4, 0),
            textcoords="offset points", color=MUTED, fontsize=8,
        )  # fmt: skip
    axes.margins(y=0.12)
    return _svg(figure, "Training loss against step")


def _knn_curve(lines: list[dict[str, Any]]) -> Markup:
    figure, axes = _axes("epoch", "kNN top-1 (%)")
    epochs, top1 = [line["epoch"] for line in lines], [line["knn_top1"] for line in lines]
    axes.plot(epochs, top1, color=ACCENT, linewidth=1.4, marker="o", markersize=2.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(y=0.12)
    return _svg(figure, "kNN accuracy against epoch")


def _axes(x: str, y: str):
    figure = Figure(figsize=(4.6, 2.9), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x, color=TEXT, fontsize=9)
    axes.set_ylabel(y, color=TEXT, fontsize=9)
    axes.tick_params(colors=TEXT, labelsize=8, length=3, width=0.6)
    for side, spine in axes.spines.items():
        spine.set(color=MUTED, linewidth=0.6, visible=side in ("left", "bottom"))
    return figure, axes


def _svg(figure: Figure, label: str) -> Markup:
    """The figure as inline SVG in the page's own colours and font, without a word about any address."""
    out = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for colour, name in COLOURS.items():
        text = text.replace(colour, name)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg role="img" aria-label="{label}" \1>', text, count=1)
    return Markup(text)


# Pictures


def _has(run: Run, name: str) -> bool:
    return (run.path / name).is_file()


def _neighbours(runs: list[Run], names: dict[str, str], order: list[str]) -> list[tuple[str, str]]:
    found = {
        names[_sha(run)]: run.path / "neighbours.png" for run in runs if run.record and _has(run, "neighbours.png")
    }
    return [(name, _image(found[name])) for name in order if name in found]


def _detections(runs: list[Run], names: dict[str, str], order: list[str]) -> list[dict[str, Any]]:
    """Detection runs by data and protocol, and in each by encoder: drawn images, bars of the classes, losses.

    The images are the same ones in the same order for each encoder; of two runs of an encoder the newer counts.
    """
    groups: dict[tuple[str, str], dict[str, Run]] = {}
    for run in sorted(runs, key=lambda run: run.environment.get("time", "")):
        if run.record and run.config["command"] == "detect":
            what = run.record["dataset"]["name"], run.record["protocol"]
            groups.setdefault(what, {})[names[_sha(run)]] = run
    return [
        {
            "dataset": dataset,
            "protocol": protocol,
            "runs": [_detection(name, found[name]) for name in order if name in found],
        }
        for (dataset, protocol), found in groups.items()
    ]


def _detection(name: str, run: Run) -> dict[str, Any]:
    assert run.record
    pictures = sorted(run.path.glob("pictures/*.png")) or sorted(run.path.glob("trial_*/pictures/*.png"))
    per_class = {one: scores for one, scores in (run.record.get("per_class") or {}).items() if isinstance(scores, dict)}
    metric = next((m for m in CLASS_METRICS if any(scores.get(m) is not None for scores in per_class.values())), None)
    shades = (TEXT, ACCENT, MUTED)
    return {
        "name": name,
        "images": [_image(path, DRAWN_BYTES) for path in pictures[:PICTURES]],
        "metric": metric,
        "bars": _svg(bars_figure(per_class, metric, shades), f"{metric} of each class") if metric else None,
        "many": len(per_class) > ROWS,
        "losses": _svg(loss_figure(run.trials, shades), "Losses against iteration") if run.trials else None,
    }


def _image(path: Path, limit: int = PICTURE_BYTES) -> str:
    """A picture as a data address; one of more bytes is made smaller. Raises InputError where it is none."""
    data, kind = path.read_bytes(), "png"
    try:
        with Image.open(path) as image:
            image.load()
            if len(data) > limit:
                data, kind = _smaller(image), "jpeg"
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is not a readable picture: {error}") from None
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _smaller(image: Image.Image) -> bytes:
    image = image.convert("RGB")
    image.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()


# Provenance


def _deviations(runs: list[Run]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """By protocol: each departure from it, and the runs that have it."""
    found: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        for words in run.record["deviations"] if run.record else ():
            found.setdefault(run.record["protocol"], {}).setdefault(words, []).append(run.path.name)  # type: ignore[index]
    return [(protocol, list(departures.items())) for protocol, departures in sorted(found.items())]


def _provenance(run: Run, names: dict[str, str]) -> dict[str, Any]:
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
    encoder = names[_sha(run)] if run.record else ""
    return {
        "name": run.path.name,
        "protocol": protocol,
        "encoder": encoder,
        "facts": [f for f in facts if f[1]],
    }


def _evaluation_facts(record: dict[str, Any]) -> list[tuple[str, str]]:
    dataset, encoder, cost = record["dataset"], record["encoder"], record["cost"]
    seeds = ", ".join(str(trial["seed"]) for trial in record["trials"])
    return [
        ("data", _data_words(dataset)),
        ("fingerprint", dataset.get("fingerprint", "")),
        ("weights", f"{encoder['path']} ({encoder['arch']}, {encoder['origin']})"),
        ("sha256", encoder["sha256"]),
        ("trials", f"{results.repeats(record)}, seeds {seeds}" if record["trials"][1:] else f"one, seed {seeds}"),
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
    dataset, recipe = values.get("dataset"), config.flatten(values.get("config") or {})
    words = _data_words(dataset) if isinstance(dataset, dict) else str(dataset)
    fingerprint = dataset.get("fingerprint", "") if isinstance(dataset, dict) else ""
    skipped = ("protocol", "expect")
    recipe = {key: value for key, value in recipe.items() if not key.startswith(skipped) and value is not None}
    return [
        ("data", words),
        ("fingerprint", fingerprint),
        ("recipe", ", ".join(f"{key} {value}" for key, value in recipe.items())),
    ]


def _data_words(dataset: dict[str, Any]) -> str:
    few = dataset.get("labels_per_class")
    counts = [f"{dataset[key]} {key}" for key in ("images", "classes") if dataset.get(key)]
    return " ".join(filter(None, (dataset["name"], dataset.get("split")))) + "".join(
        f", {words}"
        for words in (*counts, *([f"{few} labels per class"] if few else []), dataset.get("subset"))
        if words
    )
