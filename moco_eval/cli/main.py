"""The command line: parse, load the config, call. Imports happen inside the commands, so --help is instant."""

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from moco_eval import __version__
from moco_eval.errors import InputError, Interrupted, RunFailed, message_of

FOLDER = click.Path(path_type=Path)
DATASETS = (
    "digits (built in), imagefolder, imagenet, cifar10, cifar100, stl10, flowers102, pets, food101, dtd, voc07, "
    "voc-folder"
)  # what can be evaluated on; `moco-eval datasets` says more


def options(*wanted: click.Option | Callable) -> Callable:
    """Several click options as one decorator, shown in the order given."""

    def decorate(command: Callable) -> Callable:
        for option in reversed(wanted):
            command = option(command)
        return command

    return decorate


machine_options = options(
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    click.option("--nproc", type=click.IntRange(1), default=1, show_default=True, help="Processes on this machine."),
    click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Arithmetic; the config's where not given."),
    click.option("--workers", type=click.IntRange(0), help="Loader processes, per process."),
    click.option("--seed", type=click.IntRange(0), help="Seed of everything drawn."),
)
run_options = options(
    click.option("--output", type=FOLDER, help="Run directory; running again in the same place resumes."),
    machine_options,
    click.option("--batch-size", type=click.IntRange(1), help="Over all processes; the learning rate is rescaled."),
    click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any config key; may be repeated."),
    click.option("--dry-run", is_flag=True, help="Check everything, print the plan, do nothing."),
)
extraction_options = options(
    machine_options,
    click.option(
        "--batch-size",
        type=click.IntRange(1),
        default=256,
        show_default=True,
        help="Of the extraction, over all processes; the protocols keep theirs.",
    ),
)
data_options = options(
    click.option("--data", type=FOLDER, help="The data set's folder; or MOCO_EVAL_DATA. digits needs none."),
)
encoder_options = options(
    click.option("--arch", help="Architecture, where the shapes leave it open (the heads of a ViT) or are misread."),
    click.option(
        "--encoder",
        type=click.Choice(["query", "key"]),
        help="key is the momentum encoder.  [default: query; DINO: key]",
    ),
)
split_options = options(
    click.option("--train-split", help="Of voc-folder: a list in ImageSets/Main."),
    click.option("--test-split", help="Of voc-folder: a list in ImageSets/Main."),
)
dataset_options = options(
    click.option("--dataset", default="imagenet", show_default=True, help=f"{DATASETS}."),
    split_options,
)
classification_options = options(
    dataset_options,
    click.option("--feature", help="pooled (default), head, or a stage: layer3, blocks.8."),
    click.option("--cache", type=FOLDER, help="Folder of extracted features.  [default: runs/features]"),
)
trial_options = options(
    click.option(
        "--labels",
        metavar="WHICH",
        help="Train on N-per-class, drawn anew in each trial; 1% or 10% (DATA/1percent.txt), or any list of names.",
    ),
    click.option(
        "--trials", type=click.IntRange(1), default=1, show_default=True, help="Repetitions with their own seeds."
    ),
)

places_options = options(
    click.option("--runs", type=FOLDER, default=Path("runs"), show_default=True, help="Where the results are."),
    click.option("--data", "folders", multiple=True, metavar="NAME=FOLDER", help="Of a data set; may be repeated."),
    click.option("--released", is_flag=True, help="Take the authors' checkpoints instead of pretraining."),
    click.option("--nproc", type=click.IntRange(1), default=1, show_default=True, help="Processes of every step."),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="moco-eval")
def cli() -> None:
    """Train MoCo encoders, and measure how well any encoder transfers, beside the papers' own numbers.

    CHECKPOINT is a file in any known format, or random:resnet50, torchvision:resnet50[:WEIGHTS], timm:NAME, zoo:NAME
    (`moco-eval fetch --list`), pixels.
    """


@cli.command()
@click.argument("config")
@click.option("--dataset", help=f"{DATASETS}, flat or webdataset.")
@data_options
@run_options
@click.option("--max-restarts", type=click.IntRange(0), default=0, help="With --nproc: after a process has died.")
@click.option("--profile", "profiled", type=click.IntRange(1), help="Run so many steps, say what limits, keep nothing.")
def pretrain(
    config: str,
    dataset: str | None,
    data: Path | None,
    nproc: int,
    max_restarts: int,
    profiled: int | None,
    **given: Any,
) -> int:
    """Train an encoder by momentum contrast.

    CONFIG is a file or a shipped name (see `moco-eval configs`): moco-eval pretrain digits --dataset digits
    """
    import torch

    from moco_eval.config.pretrain import PretrainConfig
    from moco_eval.runtime.console import log
    from moco_eval.runtime.device import choose_device
    from moco_eval.runtime.launch import processes
    from moco_eval.runtime.rank import is_main, world_size
    from pretraining.plan import plan
    from pretraining.train import pretrain as train

    if dataset is None:
        raise InputError("pretrain needs --dataset; for example: moco-eval pretrain digits --dataset digits")
    resolved = _config(config, "pretrain", PretrainConfig, given)
    output = given["output"] or Path("runs") / f"pretrain-{Path(config).stem}-{dataset}"
    if nproc > 1 or given["dry_run"]:
        device = choose_device(given["device"]) if given["dry_run"] else torch.device("cpu")
        planned = plan(resolved, dataset, data, nproc, device)
        if given["dry_run"]:
            click.echo(f"{planned.describe()}\noutput: {output}")
            return 0
        return _launch(nproc, max_restarts)
    with processes(given["device"]) as device:
        run = plan(resolved, dataset, data, world_size(), device)
        log(run.describe())
        if profiled:
            from pretraining.profile import profile

            parts = profile(run, device, profiled)
            if is_main():
                click.echo(parts.report())
            return 0
        last = train(run, output, device)
        log(f"done: {last}")
    return 0


@cli.command()
@click.argument("checkpoint")
@encoder_options
def inspect(checkpoint: str, arch: str | None, encoder: str | None) -> None:
    """Whose checkpoint is this? Every tensor accounted for, or it says why not."""
    from moco_eval.encoders.inspect import describe, format_description

    click.echo(format_description(describe(checkpoint, arch, encoder)))


@cli.command()
@click.argument("checkpoint")
@click.argument("out", type=FOLDER)
@click.option("--to", required=True, type=click.Choice(["detectron2", "torchvision", "timm", "safetensors"]))
@click.option("--force", is_flag=True, help="Overwrite OUT.")
@encoder_options
def convert(checkpoint: str, out: Path, to: str, force: bool, arch: str | None, encoder: str | None) -> None:
    """Write an encoder in another framework's format, and prove the copy."""
    from moco_eval.encoders.export.convert import convert as convert_checkpoint

    click.echo(convert_checkpoint(checkpoint, out, to, arch=arch, encoder=encoder, force=force))


@cli.command()
@click.argument("name", required=False)
@click.option("--output", type=FOLDER, metavar="FILE", help="Where to put it; in the cache where not given.")
@click.option("--list", "list_names", is_flag=True, help="Name every known checkpoint.")
def fetch(name: str | None, output: Path | None, list_names: bool) -> None:
    """A known public checkpoint, downloaded and verified: moco-eval fetch moco_v2_800ep

    Prints the file's path. Running it again goes on where it was cut, or verifies what is there.
    """
    from moco_eval.encoders import download, zoo

    if list_names:
        for line in zoo.lines():
            click.echo(line)
        return
    if name is None:
        raise InputError("fetch needs a NAME; moco-eval fetch --list names them")
    click.echo(download.fetch(name, output))


@cli.command()
@click.argument("checkpoint")
@click.option(
    "--protocol", default="instdisc", show_default=True, help="instdisc, grid, cifar10-demo, digits, or a file."
)
@click.option(
    "--memory",
    type=click.FloatRange(0, min_open=True),
    metavar="GB",
    help="Of the search's working blocks, in each process.  [default: 1; on a GPU a quarter of what is free]",
)
@classification_options
@data_options
@encoder_options
@run_options
def knn(checkpoint: str, protocol: str, **given: Any) -> int:
    """Weighted k-nearest-neighbour classification on frozen features."""
    from moco_eval.classification import knn as fixed
    from moco_eval.classification import knn_grid
    from moco_eval.config.classification import KnnConfig, judge_model

    given["settings"] += tuple(f"{key}={given[key]}" for key in ("feature", "memory") if given[key] is not None)
    model = judge_model(protocol, "knn", given["settings"])
    config = _config(protocol, "knn", model, given)
    return _classify("knn", fixed.evaluate if model is KnnConfig else knn_grid.evaluate, config, checkpoint, given)


@cli.command()
@click.argument("checkpoint")
@click.option(
    "--protocol", default="moco-lincls", show_default=True, help="moco-lincls, mocov3, sweep, quick, digits, or a file."
)
@classification_options
@trial_options
@data_options
@encoder_options
@run_options
def linear(checkpoint: str, protocol: str, **given: Any) -> int:
    """Linear classification on frozen features; the backbone is checked bit for bit."""
    from moco_eval.classification import linear as on_crops
    from moco_eval.classification import linear_quick, linear_sweep
    from moco_eval.config.classification import QuickConfig, SweepConfig, judge_model

    model = judge_model(protocol, "linear", given["settings"])
    module: Any = {SweepConfig: linear_sweep, QuickConfig: linear_quick}.get(model, on_crops)
    if model is SweepConfig and given["feature"] is not None:
        given["settings"] = (*given["settings"], f"features=[{given['feature']}]")
        given["feature"] = None  # the config says it

    def config(encoder: Any) -> Any:
        return _config(on_crops.recipe_for(protocol, encoder), "linear", model, given)

    first = _config(protocol, "linear", model, given | {"batch_size": None})  # whose encoder is not known yet
    return _classify("linear", module.evaluate, first, checkpoint, given, config)


@cli.command()
@click.argument("checkpoint")
@click.option("--protocol", default="lbfgs", show_default=True, help="lbfgs, digits, or a file.")
@classification_options
@trial_options
@data_options
@encoder_options
@run_options
def logistic(checkpoint: str, protocol: str, **given: Any) -> int:
    """Logistic regression on frozen features; its C chosen on held-out training images."""
    from moco_eval.classification import logistic as protocols
    from moco_eval.config.classification import LogisticConfig

    config = _config(protocol, "logistic", LogisticConfig, given)
    return _classify("logistic", protocols.evaluate, config, checkpoint, given)


@cli.command(context_settings={"default_map": {"dataset": "voc07"}})
@click.argument("checkpoint")
@click.option("--protocol", default="voc07", show_default=True, help="voc07, digits, or a file.")
@click.option("--low-shot", is_flag=True, help="Train on 1 to 96 images per class, in five samples.")
@classification_options
@trial_options
@data_options
@encoder_options
@run_options
def svm(checkpoint: str, protocol: str, low_shot: bool, **given: Any) -> int:
    """A linear SVM per class on frozen features, as VOC07 classification is judged."""
    from moco_eval.classification import svm as protocols
    from moco_eval.config.classification import SvmConfig

    if low_shot and not protocol.endswith((".yaml", ".yml")):  # a file says its own protocol
        protocol = f"{protocol}-low-shot"
    config = _config(protocol, "svm", SvmConfig, given)
    return _classify("svm", protocols.evaluate, config, checkpoint, given)


@cli.command()
@click.argument("checkpoint")
@click.option(
    "--protocol",
    default="lightly",
    show_default=True,
    help="lightly, openselfsup-1percent, openselfsup-10percent, digits, or a file.",
)
@dataset_options
@trial_options
@data_options
@encoder_options
@run_options
def finetune(checkpoint: str, protocol: str, **given: Any) -> int:
    """Classification by the whole network, fine-tuned end to end from the encoder's weights."""
    from moco_eval.classification import finetune as protocols
    from moco_eval.config.classification import FinetuneConfig

    config = _config(protocol, "finetune", FinetuneConfig, given)
    return _classify("finetune", protocols.evaluate, config, checkpoint, given)


@cli.command()
@click.argument("checkpoint")
@click.option("--dataset", help="voc, voc07, coco, voc-folder, coco-folder or digits (built in).")
@click.option(
    "--recipe",
    help="A shipped recipe or a file.  [default by the data: r50_c4_24k, voc07_r50_c4_9k, coco_r50_fpn_1x, "
    "digits_r50_c4]",
)
@click.option("--train-split", help="Of voc-folder and coco-folder.")
@click.option("--test-split", help="Of voc-folder and coco-folder.")
@click.option("--engine", type=click.Choice(["auto", "torchvision", "detectron2"]), default="auto", show_default=True)
@click.option(
    "--trials", type=click.IntRange(1), default=1, show_default=True, help="Fine-tunings with their own seeds."
)
@data_options
@encoder_options
@run_options
def detect(
    checkpoint: str,
    dataset: str | None,
    recipe: str | None,
    train_split: str | None,
    test_split: str | None,
    engine: str,
    trials: int,
    data: Path | None,
    nproc: int,
    **given: Any,
) -> int:
    """Fine-tune a detector on the encoder and measure its average precision."""
    from moco_eval.detection import detect as detection
    from moco_eval.detection.recipe import DEFAULTS
    from moco_eval.encoders.load import load
    from moco_eval.results.run_directory import default_output
    from moco_eval.runtime.device import choose_device
    from moco_eval.runtime.launch import processes
    from moco_eval.runtime.rank import is_main

    if dataset is None:
        raise InputError(
            "detect needs --dataset; for example: moco-eval detect runs/v2/checkpoints/last.pth --dataset voc "
            "--data /datasets/VOCdevkit, or built in: --dataset digits"
        )
    config = _recipe(recipe or DEFAULTS.get(dataset, "r50_c4_24k"), given)
    encoder = load(checkpoint, given["arch"], given["encoder"], config.seed)
    _warn(encoder)
    output = given["output"] or default_output("detect", encoder, dataset, config.protocol)
    task = detection.DetectionTask(encoder, config, dataset, data, train_split, test_split, engine, trials)
    if nproc > 1 or given["dry_run"]:
        planned = detection.plan(task, output, nproc)
        if given["dry_run"]:
            choose_device(given["device"])
            click.echo(planned)
            return 0
        return _launch(nproc)
    with processes(given["device"]) as device:
        record = detection.detect(task, output, device)
        if is_main():
            click.echo(detection.format_table(record))
    return 0


def _recipe(name: str, given: dict[str, Any]) -> Any:
    """A detection recipe with --set and the shared options applied; --batch-size carries rate and schedule along."""
    from moco_eval.config.detection import DetectConfig
    from moco_eval.detection.recipe import rescaled

    before = _config(name, "detect", DetectConfig, given | {"batch_size": None})
    batch = given["batch_size"]
    if batch in (None, before.batch_size):
        return before
    after = rescaled(before, batch)
    old, new = before.schedule, after.schedule
    if os.environ.get("RANK", "0") == "0":
        click.echo(
            f"--batch-size {batch} instead of {before.batch_size}: lr {after.optimizer.lr:g} instead of "
            f"{before.optimizer.lr:g}, {new.iterations} iterations instead of {old.iterations}, steps "
            f"{list(new.steps)} instead of {list(old.steps)}, warm-up {new.warmup} instead of {old.warmup}",
            err=True,
        )
    return after


@cli.command()
@click.argument("checkpoint")
@click.option(
    "--tasks",
    metavar="NAMES",
    help="Between commas: knn/instdisc@1 (knn), knn/grid@1 (grid), linear/quick@1 (quick), logistic/lbfgs@1 "
    "(logistic), svm/voc07@1 (svm), svm/voc07-low-shot@1 (low-shot).  [default: knn,quick,logistic; for several labels "
    "an image svm]",
)
@classification_options
@trial_options
@data_options
@encoder_options
@click.option("--output", type=FOLDER, help="Folder of the run directories; running again resumes.")
@extraction_options
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan and about how long it takes.")
def suite(checkpoint: str, tasks: str | None, **given: Any) -> int:
    """Several protocols on features extracted once, in one table: moco-eval suite CHECKPOINT --tasks knn,quick"""
    from moco_eval.classification import suite as suites
    from moco_eval.classification.forecast import describe, forecast
    from moco_eval.results.run_directory import default_output
    from moco_eval.runtime.device import choose_device
    from moco_eval.runtime.launch import processes
    from moco_eval.runtime.rank import is_main

    task, regime = _open(checkpoint, given, given["seed"] or 0)
    output = given["output"] or default_output("suite", task.encoder, regime)
    names = suites.protocols(tasks, task.test.multi_label)
    chosen = suites.items(task, names, output, _shared(given))
    suites.check(chosen)
    if given["dry_run"]:
        needs = suites.needs(chosen, task.cache, given["batch_size"])
        found = forecast(chosen, needs, choose_device(given["device"]), given["nproc"])
        click.echo(describe(chosen, found, output))
        return 0
    if given["nproc"] > 1:
        return _launch(given["nproc"])
    with processes(given["device"]) as device:
        records, extraction = suites.run(chosen, task.cache, device, given["batch_size"])
        if is_main():
            click.echo(suites.table(records, extraction))
    return 0


@cli.command()
@click.argument("checkpoint")
@click.option("--crops", type=click.IntRange(0), default=0, show_default=True, help="Epochs of training crops, too.")
@click.option("--split", type=click.Choice(["train", "test", "both"]), default="both", show_default=True)
@classification_options
@data_options
@encoder_options
@extraction_options
def features(checkpoint: str, crops: int, split: str, **given: Any) -> int:
    """Extract features into the cache, and print their folders: split, crop, shape, dtype, folder."""
    from moco_eval.classification import linear_quick
    from moco_eval.config.classification import QuickConfig
    from moco_eval.config.load import load
    from moco_eval.features import cache
    from moco_eval.features.stages import network
    from moco_eval.runtime.launch import processes
    from moco_eval.runtime.rank import is_main

    if crops and split == "test":
        raise InputError("--crops are of training images; take --split train or both")
    task, _ = _open(checkpoint, given, given["seed"] or 0)
    network(task.encoder, task.feature)  # an encoder without that feature is refused before anything is written
    settings = (f"crops={crops}", f"batch_size={given['batch_size']}", *_shared(given))
    config = load("quick", "linear", QuickConfig, settings)
    wanted = [task.source(task.train, config, one) for one in (None, *linear_quick.crops(config)) if split != "test"]
    wanted += [task.source(task.test, config)] if split != "train" else []
    if given["nproc"] > 1:
        return _launch(given["nproc"])
    with processes(given["device"]) as device:
        for source in wanted:
            found = cache.features_of(source, task.cache, device)
            if is_main():
                click.echo(cache.line(source, found, task.cache))
    return 0


@cli.command()
@click.argument("run_a", type=FOLDER)
@click.argument("run_b", type=FOLDER)
def compare(run_a: Path, run_b: Path) -> None:
    """Is RUN_B better than RUN_A? Paired over the same test images, with what such a test could have seen.

    Both are finished classification runs (folders with result.json and predictions.npz).
    """
    from moco_eval.results import compare as comparison

    click.echo(comparison.describe(comparison.compare(run_a, run_b)))


@cli.command()
@click.argument("table_id", metavar="ID", required=False)
@click.option("--list", "list_tables", is_flag=True, help="Name every table.")
@click.option("--commands", is_flag=True, help="Only the commands that are left to run, as a shell script.")
@places_options
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "markdown", "csv", "latex", "html"]),
    default="text",
    show_default=True,
)
def table(table_id: str | None, list_tables: bool, commands: bool, form: str, **given: Any) -> None:
    """A paper's table with our runs beside it, and how to produce what is missing."""
    from moco_eval.papers import tables

    if list_tables:
        for name, caption in tables.tables():
            click.echo(f"{name:<24} {caption}")
        return
    from moco_eval.papers import match, render, todo

    if table_id is None:
        raise InputError("table needs an ID; moco-eval table --list names them")
    published, places = tables.load_table(table_id), _places(given)
    records = _records(places)
    left = todo.find(published, records, places)
    if commands:
        click.echo(todo.stopping_script(left))
    else:
        click.echo(render.render(match.compare(published, records), form, left))


@cli.command()
@click.argument("table_id", metavar="ID", required=False)
@click.option("--rows", multiple=True, metavar="LABEL", help="A row's label or a part of it; may be repeated.")
@places_options
@click.option("--slurm", is_flag=True, help="Submit what is left as SLURM jobs, and end.")
@click.option("--sbatch", multiple=True, metavar="KEY=VALUE", help="sbatch's options, with --slurm; may be repeated.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan and the commands, do nothing.")
def reproduce(
    table_id: str | None, rows: tuple[str, ...], slurm: bool, sbatch: tuple[str, ...], dry_run: bool, **given: Any
) -> None:
    """A paper's table from nothing: pretrain, convert and evaluate what is left of its rows, and show it.

    ID is a table (see `moco-eval table --list`) or a YAML file of your own. Running it again goes on where it stopped.
    """
    from moco_eval.papers import match, render
    from moco_eval.papers import reproduce as chains
    from moco_eval.papers import slurm as jobs

    if table_id is None:
        raise InputError(
            "reproduce needs an ID; for example: moco-eval reproduce cifar10-demo --data cifar10=/datasets"
        )
    if sbatch and not slurm:
        raise InputError(f"--sbatch {sbatch[0]} is for SLURM jobs; add --slurm")
    places = _places(given)
    records = _records(places) if places.runs.is_dir() else []
    plan = chains.plan(table_id, rows, places, records)
    waiting = jobs.states(places.runs)
    if dry_run:
        click.echo(chains.describe(plan, waiting, chains.costs_of(plan, records)))
    if plan.left:
        from pretraining.plan import plan as could_start

        chains.check(plan, _as_given(), could_start)
    if dry_run:
        return
    if slurm and plan.left:
        with chains.alone(places.runs):
            for line in jobs.submit(plan.left, places.runs, sbatch):
                click.echo(line)
        click.echo(chains.describe(plan, jobs.states(places.runs)))
        return
    click.echo(chains.describe(plan, waiting), err=True)
    with chains.alone(places.runs) as lock:
        chains.run(plan, waiting, lock)
    click.echo(render.render(match.compare(plan.table, _records(places)), "text"))


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=FOLDER)
@click.option("--output", type=FOLDER, default=Path("report.html"), show_default=True)
def report(runs: tuple[Path, ...], output: Path) -> None:
    """One self-contained HTML page about runs."""
    from moco_eval.report.page import write_report

    write_report(list(runs), output)
    click.echo(output)


@cli.command()
@click.argument("action", type=click.Choice(["list", "show"]), default="list")
@click.argument("name", required=False)
def configs(action: str, name: str | None) -> None:
    """Name the shipped configs, or show one: moco-eval configs show pretrain/cifar10"""
    from moco_eval.config import load as config

    if action == "list":
        for shipped in config.shipped():
            click.echo(shipped)
        return
    if name not in config.shipped():
        raise InputError(f"no shipped config named {name!r}.{config.did_you_mean(str(name), config.shipped())}")
    click.echo((config.folder() / f"{name}.yaml").read_text(encoding="utf-8"), nl=False)


@cli.command()
@click.argument("action", type=click.Choice(["list", "check"]), default="list")
@click.argument("name", required=False)
@data_options
@split_options
def datasets(action: str, name: str | None, data: Path | None, train_split: str | None, test_split: str | None) -> None:
    """Name the data sets, or look whether one is whole: moco-eval datasets check pets --data /datasets"""
    from moco_eval.data import catalogue
    from moco_eval.data.boxes import check as detection

    if action == "list":
        for line in catalogue.known() + detection.known():
            click.echo(line)
        return
    if name is None:
        raise InputError("datasets check needs a NAME; moco-eval datasets names them")
    if name in detection.NAMES:
        lines, refusal = detection.check(name, data, train_split, test_split)
        lines += catalogue.check_too(name, data, train_split, test_split)
    else:
        lines, refusal = catalogue.check(name, data, train_split, test_split), None
    for line in lines:
        click.echo(line)
    if refusal:
        raise InputError(f"detect refuses these data: {refusal}")


@cli.command()
@click.option("--output", type=FOLDER, default=Path("runs/demo"), show_default=True)
@click.option("--device", default="cpu", show_default=True)
def demo(output: Path, device: str) -> None:
    """The whole path on built-in real data, in minutes, on a CPU."""
    from moco_eval.demo import run

    run(output, device)


def _places(given: dict[str, Any]) -> Any:
    """Where things are, from `places_options`: a chain.Places."""
    from moco_eval.papers.steps import Places

    data = {}
    for words in given["folders"]:
        name, equals, folder = words.partition("=")
        if not (name and equals and folder):
            raise InputError(f"--data {words} is not NAME=FOLDER; for example --data imagenet=/datasets/imagenet")
        data[name] = Path(folder)
    return Places(given["runs"], data, given["nproc"], given["released"])


def _as_given() -> list[str]:
    """The command line of this process, as one types it."""
    return ["moco-eval", *sys.argv[1:]]


def _records(places: Any) -> list[dict[str, Any]]:
    """Our results; none where there is no folder of the default name yet."""
    from moco_eval.results.run_directory import read

    return read(places.runs) if places.runs.is_dir() or places.runs != Path("runs") else []


def _config(name: str, kind: str, model: Any, given: dict[str, Any]) -> Any:
    """The config with --set and the shared options applied; --batch-size carries the learning rate along."""
    from moco_eval.config import load as config

    overrides = [*given["settings"], *_shared(given)]
    batch = given["batch_size"]
    if batch is not None:
        overrides += _rescaled(config.merged(name, kind, overrides), batch)
    return config.load(name, kind, model, overrides)


def _shared(given: dict[str, Any]) -> list[str]:
    """The options that are keys of every config, as overrides."""
    return [f"{key}={given[key]}" for key in ("precision", "workers", "seed") if given[key] is not None]


def _rescaled(values: dict[str, Any], batch: int) -> list[str]:
    """What a batch of another size carries along, as overrides: the rate, and the dictionary that is the batch."""
    before, optimizer = values.get("batch_size"), values.get("optimizer")
    overrides, told = [f"batch_size={batch}"], []
    rate = optimizer.get("lr") if isinstance(optimizer, dict) else None
    if isinstance(before, int) and before and isinstance(rate, int | float):
        overrides.append(f"optimizer.lr={rate * batch / before!r}")
        told.append(f"lr {rate * batch / before:g} instead of {rate:g}")
    if isinstance(before, int) and before and isinstance(rates := values.get("learning_rates"), list):
        overrides.append(f"learning_rates={[rate * batch / before for rate in rates]!r}")
        told.append(f"learning rates times {batch / before:g}")
    if values.get("mechanism") == "end_to_end" and isinstance(parts := values.get("accumulate", 1), int) and parts:
        overrides.append(f"queue_size={batch // parts}")
        told.append(f"K {batch // parts} instead of {values.get('queue_size')}")
    if told and batch != before:
        click.echo(f"--batch-size {batch} instead of {before}: {', '.join(told)}", err=True)
    return overrides if batch != before else []


def _warn(encoder: Any) -> None:
    """The doubts of a load, where they would move a number."""
    from moco_eval.runtime.console import warn

    for words in encoder.warnings:
        warn(f"{encoder.source}: {words}")


def _classify(
    command: str,
    evaluate: Callable,
    config: Any,
    checkpoint: str,
    given: dict[str, Any],
    config_for: Callable[[Any], Any] | None = None,
) -> int:
    """Load the encoder, open the data, and evaluate, in as many processes as asked for.

    `config_for` gives the config where it depends on the encoder.
    """
    from moco_eval.classification.judge import check
    from moco_eval.results.run_directory import default_output
    from moco_eval.runtime.launch import processes

    task, regime = _open(checkpoint, given, config.seed)
    config = config_for(task.encoder) if config_for else config
    output = given["output"] or default_output(command, task.encoder, regime, config.protocol)
    if given["dry_run"]:
        check(task, config.seed, multi_label=command == "svm")
        click.echo(_evaluation_plan(task.encoder, config, task.train, task.test, output))
        return 0
    if given["nproc"] > 1:
        return _launch(given["nproc"])
    with processes(given["device"]) as device:
        _print_record(evaluate(task, config, output, device))
    return 0


def _open(checkpoint: str, given: dict[str, Any], seed: int) -> tuple[Any, str]:
    """The encoder on the data: a classify.Task; and the data's name with what --labels says, for a run directory."""
    from moco_eval.classification.judge import Task
    from moco_eval.data.catalogue import open_splits
    from moco_eval.data.label_option import parse_labels
    from moco_eval.encoders.load import load

    labels, dataset = parse_labels(given.get("labels")), given["dataset"]
    encoder = load(checkpoint, given["arch"], given["encoder"], seed)
    _warn(encoder)
    train, test = open_splits(dataset, given["data"], given["train_split"], given["test_split"])
    if labels and labels.per_class is None:
        train = labels.of(train, seed)
    task = Task(
        encoder=encoder,
        train=train,
        test=test,
        feature=given.get("feature") or "pooled",
        labels_per_class=labels.per_class if labels else None,
        trials=given.get("trials", 1),
        cache=given.get("cache") or Path("runs/features"),
    )
    return task, f"{dataset}-{labels.name}" if labels else dataset


def _launch(nproc: int, max_restarts: int = 0) -> int:
    """This very command in `nproc` processes."""
    from moco_eval.runtime.launch import launch

    arguments = sys.argv[1:]
    kept = []
    skip = False
    for argument in arguments:
        if not skip and argument != "--nproc" and not argument.startswith("--nproc="):
            kept.append(argument)
        skip = argument == "--nproc"
    return launch(nproc, kept, max_restarts)


def _evaluation_plan(encoder: Any, config: Any, train: Any, test: Any, output: Path) -> str:
    from moco_eval.config.load import dump

    return "\n".join(
        [
            f"{config.protocol} of {encoder.source}",
            f"encoder: {encoder.origin}, {encoder.arch}, {encoder.tensors_loaded} tensors loaded",
            f"data: {train.name}, {len(train)} training and {len(test)} test images, {len(train.classes)} classes",
            f"output: {output}",
            dump(config).rstrip(),
        ]
    )


def _print_record(record: dict[str, Any]) -> None:
    """The numbers of a result record to stdout, from the first process."""
    from moco_eval.results.record import repeats
    from moco_eval.runtime.rank import is_main

    if not is_main():
        return
    for name, value in record["metrics"].items():
        std, low_high = record["std"].get(name), record["interval"].get(name)
        spread = f" ± {std:.2f} ({repeats(record)})" if std is not None else ""
        interval = f"  [{low_high[0]:.2f}, {low_high[1]:.2f}] over test images" if low_high else ""
        click.echo(f"{record['protocol']} {record['dataset']['name']} {name} {value:.2f}{spread}{interval}")
    for words in record["deviations"]:
        click.echo(f"  not comparable with published numbers: {words}")


def _interrupt(*_: object) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):  # one is enough: a second would break off what the first began
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> None:
    """Run a command; exit 0 done, 1 the run failed, 2 wrong input, 3 interrupted and resumable."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _interrupt)
    try:
        code = cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = 2
    except (InputError, RunFailed) as error:
        if not getattr(error, "told", False):
            click.echo(f"Error: {message_of(error)}", err=True)
        code = 2 if isinstance(error, InputError) else 1
    except (Interrupted, KeyboardInterrupt, click.Abort) as error:  # before RuntimeError, of which Abort is one
        if os.environ.get("RANK", "0") == "0":  # all processes of a run stop together
            click.echo(
                f"Interrupted: {error}" if str(error) else "Interrupted; run the same command to go on", err=True
            )
        code = 3
    except RuntimeError as error:
        if os.environ.get("WORLD_SIZE", "1") == "1" or not re.search(r"peer|[Cc]onnection|NCCL|Gloo|gloo", str(error)):
            raise
        code = 1  # another process of this run failed, and says why
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
