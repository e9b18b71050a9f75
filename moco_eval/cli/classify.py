"""The commands of the classification protocols, one for each kind in the table; the suite, and features."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from moco_eval.classification.protocols import USUAL_TASKS, Protocol, feature_override, followed_by, kinds
from moco_eval.classification.protocols import tasks as tasks_named
from moco_eval.cli.options import (
    DATASETS,
    FOLDER,
    Options,
    data_option,
    dataset_options,
    encoder_options,
    extraction_options,
    feature_options,
    json_option,
    limit_option,
    log_option,
    name_option,
    run_options,
    split_options,
    trial_options,
    try_option,
    with_options,
)
from moco_eval.cli.shared import (
    launch_again,
    load_config,
    load_encoder,
    pixels_of,
    require_logs,
    show,
    show_and_log,
    tried,
    warn_of_rate,
)
from moco_eval.config import load as configs
from moco_eval.errors import InputError

# Options of one kind alone
OWN: dict[str, tuple[Callable, ...]] = {
    "knn": (
        click.option(
            "--memory",
            type=click.FloatRange(0, min_open=True),
            metavar="GB",
            help="Of the search's working blocks, in each process.  [default: 1; on a GPU a quarter of what is free]",
        ),
    ),
    **dict.fromkeys(("linear", "finetune"), (try_option,)),
    "svm": (click.option("--low-shot", is_flag=True, help="Train on 1 to 96 images per class, in five samples."),),
}


def command_of(kind: str, rows: tuple[Protocol, ...]) -> click.Command:
    """The command of a kind of protocol, with the options that its protocols have a use for."""
    first = rows[0]
    names = list(dict.fromkeys([*(row.name.name for row in rows), *configs.short_names(kind)]))

    @click.command(kind, help=_help(rows))
    @click.argument("checkpoint")
    @with_options(
        click.option("--protocol", default=first.name.name, show_default=True, help=f"{', '.join(names)}, or a file."),
        *OWN.get(kind, ()),
        dataset_options(first.dataset),
        *([feature_options] if first.frozen else []),
        *([trial_options] if any(row.trials for row in rows) else []),
        data_option,
        limit_option,
        click.option(
            "--also",
            multiple=True,
            metavar="NAME=FOLDER,...",
            help="Further test sets of the same classes, judged too: folders of class folders, or of severities.",
        ),
        encoder_options,
        run_options,
        json_option,
    )
    def command(checkpoint: str, protocol: str, options: Options, **own: Any) -> int:
        return classify(kind, checkpoint, *_own(kind, protocol, options, **own))

    return command


def _help(rows: tuple[Protocol, ...]) -> str:
    """A command's help: what the kind is, an example, and each of its further protocols."""
    kind, data = rows[0].name.kind, rows[0].dataset
    parts = [rows[0].title, f"Example: moco-eval {kind} my_encoder.pth --dataset {data} --data /datasets/{data}"]
    if others := [f"{row.protocol}: {row.title}" for row in rows[1:]]:
        parts.append("\n".join(["\b", *others]))
    return "\n\n".join(parts)


def _own(
    kind: str, protocol: str, options: Options, memory: float | None = None, low_shot: bool = False
) -> tuple[str, Options]:
    """The protocol and the options with those of one kind alone turned into what all kinds have."""
    if memory is not None:
        options = replace(options, overrides=(*options.overrides, f"memory={memory}"))
    if low_shot and not protocol.endswith((".yaml", ".yml")):  # a file says its own protocol
        protocol = f"{protocol}-low-shot"
    return protocol, options


def classify(kind: str, checkpoint: str, protocol: str, options: Options) -> int:
    """Load the encoder, open the data, and evaluate, in as many processes as asked for."""
    options = tried(protocol, kind, options)
    row = followed_by(protocol, kind, options.overrides)
    named = feature_override(row.model, options.feature)  # then the config says the feature
    first = load_config(protocol, kind, row.model, replace(options, batch_size=None), named)
    splits = opened_early(checkpoint, options)
    require_logs(options)

    from moco_eval.api import judged
    from moco_eval.classification.judge import check, prepared, resolved
    from moco_eval.results.run_directory import default_output, holds
    from moco_eval.results.sanity import beside
    from moco_eval.runtime.device import choose_device
    from moco_eval.runtime.launch import processes
    from moco_eval.runtime.rank import is_main

    options_of_task = options if not named else replace(options, feature=None)
    task, regime = open_task(checkpoint, options_of_task, first.seed, splits)
    config = load_config(written := row.code().shipped(protocol, task), kind, row.model, options, named)
    if options.batch_size is None:
        warn_of_rate(config, written, kind)
    output = options.output or default_output(kind, task.encoder, regime, config.protocol)
    if options.dry_run:
        ready = prepared(task, config)
        check(ready, config)
        holds(output, resolved(ready, config))
        choose_device(options.device)
        click.echo(_plan(task, config, output))
        return 0
    if options.nproc > 1:
        return launch_again(options)
    with processes(options.device) as device:
        result = judged(task, config, output, device)
        if is_main():
            text = "\n".join([str(result), *beside(result.record, output.parent)])
            show_and_log(result.record, text, output, options)
    return 0


Splits = tuple[Any, Any]  # training and test images


def opened_early(checkpoint: str, options: Options) -> Splits:
    """The images, before torch is imported; what is wrong with CHECKPOINT, the data or --labels is told here.

    Raises:
        InputError: no such checkpoint, data set, folder, split, preprocessing or labels.
    """
    from moco_eval.data.catalogue import open_splits
    from moco_eval.data.label_option import parse_labels

    pixels_of(checkpoint, options)
    parse_labels(options.labels)
    where = (options.data, options.train_split, options.test_split, options.val_fraction)
    train, test = open_splits(options.called, *where)
    return train.limited(options.limit), test.limited(options.limit)


def open_task(checkpoint: str, options: Options, seed: int, splits: Splits) -> tuple[Any, str]:
    """The encoder on the data: a `task.Task`; and the data's name with what --labels says, for a run directory."""
    from moco_eval.classification.further import open_further
    from moco_eval.classification.task import Task
    from moco_eval.config.data_name import in_path
    from moco_eval.data.label_option import parse_labels

    labels, (train, test) = parse_labels(options.labels), splits
    encoder = load_encoder(checkpoint, options, seed)
    if labels and labels.per_class is None:
        train = labels.of(train, seed)
    task = Task(
        encoder=encoder,
        train=train,
        test=test,
        feature=options.feature or "pooled",
        labels_per_class=labels.per_class if labels else None,
        trials=options.trials,
        cache=options.cache or Path("runs/features"),
        further=open_further(options.also, train),
    )
    names = [
        in_path(test.name, train.fingerprint, test.fingerprint),
        *([labels.name] if labels else []),
        *(f"also-{test.name}" for test in task.further),
    ]
    return task, "-".join(names)


def _plan(task: Any, config: Any, output: Path) -> str:
    encoder, train, test = task.encoder, task.train, task.test
    return "\n".join(
        [
            f"{config.protocol} of {encoder.source}",
            f"encoder: {encoder.origin}, {encoder.arch}, {encoder.tensors_loaded} tensors loaded",
            f"data: {train.name}, {len(train)} training and {len(test)} test images, {len(train.classes)} classes",
            *(
                f"also: {one.name}, {sum(map(len, one.parts))} images in {len(one.parts)} part"
                f"{'s' * (len(one.parts) > 1)}, {len(one.classes)} of {len(train.classes)} classes"
                for one in task.further
            ),
            f"output: {output}",
            configs.dump(config).rstrip(),
        ]
    )


def _tasks_help() -> str:
    """The protocols that a suite takes, each with its short name."""
    rows = [row for group in kinds().values() for row in group if row.short]
    names = ", ".join(f"{row.protocol} ({row.short[0]})" for row in rows)
    return f"Between commas: {names}.  [default: knn,quick,logistic; for several labels an image svm]"


@click.command()
@click.argument("checkpoints", metavar="CHECKPOINT...", nargs=-1, required=True)
@with_options(
    click.option("--tasks", metavar="NAMES", help=_tasks_help()),
    click.option(
        "--dataset",
        "datasets",
        multiple=True,
        default=("imagenet",),
        show_default=True,
        help=f"{DATASETS}. May be repeated.",
    ),
    split_options,
    feature_options,
    trial_options,
    click.option(
        "--data",
        "places",
        multiple=True,
        type=FOLDER,
        help="The data set's folder, or MOCO_EVAL_DATA; of several data sets one each, in their order, or one for all.",
    ),
    name_option,
    limit_option,
    encoder_options,
    click.option("--output", type=FOLDER, help="Folder of the run directories; running again resumes."),
    extraction_options,
    click.option("--dry-run", is_flag=True, help="Check everything, print the plan and about how long it takes."),
    log_option,
    json_option,
)
def suite(
    checkpoints: tuple[str, ...],
    tasks: str | None,
    datasets: tuple[str, ...],
    places: tuple[Path, ...],
    options: Options,
) -> int:
    """Extract features once, run several protocols on them, and print one table.

    Example: moco-eval suite my_encoder.pth --dataset imagefolder --data my_images --tasks knn,quick

    Several checkpoints and data sets are judged one after the other; what is done is skipped. One table and one report
    of all of them end it.
    """
    named = tasks_named(tasks) if tasks else None
    if options.name and len(datasets) > 1:
        raise InputError(f"--name {options.name} is for one data set, and there are {len(datasets)}; leave it out")
    wanted = [
        (checkpoint, replace(options, dataset=dataset, data=place))
        for dataset, place in zip(datasets, _one_for_each(places, datasets))
        for checkpoint in checkpoints
    ]
    opened = [opened_early(*each) for each in wanted]
    require_logs(options)

    from moco_eval.classification import suite as suites
    from moco_eval.classification.forecast import describe, forecast
    from moco_eval.runtime.device import choose_device

    planned = [_suite(*each, splits, named, len(wanted) > 1) for each, splits in zip(wanted, opened)]
    batch_size = options.batch_size or suites.BATCH
    if options.dry_run:
        for chosen, _, output in planned:
            needs = suites.needs(chosen, chosen[0].task.cache, batch_size)
            click.echo(describe(chosen, forecast(chosen, needs, choose_device(options.device), options.nproc), output))
        return 0
    return launch_again(options) if options.nproc > 1 else _run_suites(planned, batch_size, options)


def _run_suites(planned: list[Any], batch_size: int, options: Options) -> int:
    """Suites one after the other, with one table at the end; of several a report too."""
    from moco_eval.classification import suite as suites
    from moco_eval.results.loggers import send_result
    from moco_eval.results.run_directory import hold
    from moco_eval.runtime.launch import processes
    from moco_eval.runtime.rank import is_main

    everything, tables = list[Any](), list[str]()
    with processes(options.device) as device:
        for chosen, left_out, output in planned:
            with hold(output):
                records, extraction = suites.run(chosen, chosen[0].task.cache, device, batch_size)
                for record, item in zip(records if is_main() else (), chosen):
                    send_result(record, item.output, options.logs)
            everything += records
            tables.append(suites.table(records, extraction, output.parent, left_out))
        if is_main() and len(planned) == 1:
            show(everything, tables[0], options)
        elif is_main():
            show(everything, suites.overview(everything), options)
            _report([output for _, _, output in planned], (options.output or Path("runs")) / "suite.html")
    return 0


def _one_for_each(places: tuple[Path, ...], datasets: tuple[str, ...]) -> tuple[Path | None, ...]:
    """The folder of each data set. Raises InputError where it is not clear which is whose."""
    if len(places) <= 1:
        return (places or (None,)) * len(datasets)
    if len(places) != len(datasets):
        raise InputError(
            f"--data is given {len(places)} times for {len(datasets)} data sets; give one for each, in the order of "
            "--dataset, or one for all"
        )
    return places


def _suite(
    checkpoint: str, options: Options, splits: Splits, named: list[Protocol] | None, one_of_several: bool
) -> tuple[list[Any], list[str], Path]:
    """The tasks of one checkpoint on one data set, why others are left out, and the folder of their run directories."""
    from moco_eval.classification import suite as suites
    from moco_eval.results.run_directory import default_output

    task, regime = open_task(checkpoint, options, options.seed or 0, splits)
    usual = default_output("suite", task.encoder, regime)
    output = usual if options.output is None else options.output / usual.name if one_of_several else options.output
    rows = named or tasks_named(USUAL_TASKS[splits[1].multi_label])
    return *suites.able(suites.items(task, rows, output, options.of_every_config)), output


def _report(folders: list[Path], page: Path) -> None:
    """One page about all of them, and where it is."""
    from moco_eval.report.page import write_report
    from moco_eval.runtime.console import log

    write_report(folders, page)
    log(f"report: {page}")


@click.command()
@click.argument("checkpoint")
@with_options(
    click.option(
        "--crops", type=click.IntRange(0), default=0, show_default=True, help="Epochs of training crops, too."
    ),
    click.option("--split", type=click.Choice(["train", "test", "both"]), default="both", show_default=True),
    dataset_options(),
    feature_options,
    data_option,
    limit_option,
    encoder_options,
    extraction_options,
)
def features(checkpoint: str, crops: int, split: str, options: Options) -> int:
    """Extract features into the cache, and print their folders: split, crop, shape, dtype, folder.

    Example: moco-eval features my_encoder.pth --dataset imagefolder --data my_images
    """
    if crops and split == "test":
        raise InputError("--crops are of training images; take --split train or both")
    splits = opened_early(checkpoint, options)

    from moco_eval.classification import linear_quick
    from moco_eval.config.classification import QuickConfig
    from moco_eval.data.glance import tell_doubts
    from moco_eval.features import cache
    from moco_eval.features.stages import network
    from moco_eval.runtime.launch import processes
    from moco_eval.runtime.rank import is_main

    task, _ = open_task(checkpoint, options, options.seed or 0, splits)
    network(task.encoder, task.feature)  # an encoder without that feature is refused before anything is written
    for images in (task.train, task.test):
        tell_doubts(images)
    overrides = (f"crops={crops}", f"batch_size={options.batch_size}", *options.of_every_config)
    config = configs.load("quick", "linear", QuickConfig, overrides)
    wanted = [task.source(task.train, config, kind) for kind in (None, *linear_quick.crops(config)) if split != "test"]
    wanted += [task.source(task.test, config)] if split != "train" else []
    if options.nproc > 1:
        return launch_again(options)
    with processes(options.device) as device:
        for source in wanted:
            extracted = cache.features_of(source, task.cache, device)
            if is_main():
                click.echo(cache.line(source, extracted, task.cache))
    return 0


@click.command()
@click.argument("checkpoint")
@with_options(
    click.option("--split", type=click.Choice(["train", "test"]), help="Of sets with classes.  [default: test]"),
    click.option(
        "--dataset",
        default="imagefolder",
        show_default=True,
        help=f"{DATASETS}; roxford5k or rparis6k, of landmarks, with their easy, medium and hard rules.",
    ),
    split_options,
    feature_options,
    data_option,
    limit_option,
    encoder_options,
    click.option("--output", type=FOLDER, help="Run directory; running again in the same place resumes."),
    extraction_options,
    click.option("--dry-run", is_flag=True, help="Check everything, print the plan, do nothing."),
    log_option,
    json_option,
)
def retrieve(checkpoint: str, split: str | None, options: Options) -> int:
    """Each image of a split asks for the others of its class: mean average precision and recall at 1, 5 and 10.

    Example: moco-eval retrieve my_encoder.pth --dataset imagefolder --data my_images
    """
    from moco_eval.data.landmarks import COUNTS

    has_queries = options.dataset in COUNTS
    if has_queries and (split or options.train_split or options.test_split or options.val_fraction or options.limit):
        raise InputError(
            f"{options.dataset} is one database with queries of its own; leave --split, --val-fraction and --limit out"
        )
    pixels_of(checkpoint, options)
    opened = _landmarks(options) if has_queries else _by_class(checkpoint, split or "test", options)
    require_logs(options)

    from moco_eval.classification.retrieval import Settings
    from moco_eval.results.result import lines
    from moco_eval.results.run_directory import default_output, holds
    from moco_eval.runtime.device import choose_device
    from moco_eval.runtime.launch import processes
    from moco_eval.runtime.rank import is_main

    encoder = load_encoder(checkpoint, options, options.seed or 0)
    protocol, part, data, check, resolved, judged = opened(encoder)
    usual = Settings()
    workers = usual.workers if options.workers is None else options.workers
    settings = Settings(options.precision or usual.precision, options.batch_size or usual.batch_size, workers)
    output = options.output or default_output("retrieve", encoder, part, protocol)
    if options.dry_run:
        check()
        holds(output, resolved(settings))
        choose_device(options.device)
        click.echo(f"{protocol} of {encoder.source}\ndata: {data}\noutput: {output}")
        return 0
    if options.nproc > 1:
        return launch_again(options)
    with processes(options.device) as device:
        record = judged(settings, output, device)
        if is_main():
            show_and_log(record, "\n".join(lines(record)), output, options)
    return 0


# protocol, the data in a path and in words, check, what defines the run, judgement
Retrieval = tuple[str, str, str, Callable[[], None], Callable[..., dict[str, Any]], Callable[..., dict[str, Any]]]


def _by_class(checkpoint: str, split: str, options: Options) -> Callable[[Any], Retrieval]:
    """Retrieval of images of a query's class; the images are opened before torch is imported."""
    from moco_eval.config.data_name import in_path

    images = opened_early(checkpoint, options)[0 if split == "train" else 1]

    def opened(encoder: Any) -> Retrieval:
        from moco_eval.classification.retrieval import PROTOCOL, check, resolved, retrieve

        task, about = _searched(encoder, images, options), f"{len(images)} images of {len(images.classes)} classes"
        part, data = f"{in_path(images.name, images.fingerprint)}-{split}", f"{images.name} {images.split}, {about}"
        return PROTOCOL, part, data, partial(check, task), partial(resolved, task), partial(retrieve, task)

    return opened


def _landmarks(options: Options) -> Callable[[Any], Retrieval]:
    """Retrieval of a query's landmark."""
    from moco_eval.data.catalogue import data_folder
    from moco_eval.data.landmarks import open_landmarks

    name = str(options.dataset)
    landmarks = open_landmarks(name, data_folder(name, options.data))

    def opened(encoder: Any) -> Retrieval:
        from moco_eval.classification.landmarks import PROTOCOL, check, resolved, retrieve

        task = _searched(encoder, landmarks.database, options)
        data = f"{name}, {len(landmarks.queries)} queries in {len(landmarks.database)} images"
        what = (task, landmarks)
        return PROTOCOL, name, data, partial(check, task), partial(resolved, *what), partial(retrieve, *what)

    return opened


def _searched(encoder: Any, images: Any, options: Options) -> Any:
    """A task whose test images are searched in themselves."""
    from moco_eval.classification.task import Task

    return Task(encoder, images, images, options.feature or "pooled", cache=options.cache or Path("runs/features"))


KINDS = [command_of(kind, rows) for kind, rows in kinds().items()]
