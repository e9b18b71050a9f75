"""moco-eval results, compare, table, reproduce and report."""

import sys
from pathlib import Path
from typing import Any

import click

from moco_eval.cli.options import FOLDER, Options, places_options, require_slurm, sbatch_option, with_options
from moco_eval.errors import InputError

here_option = click.option(
    "--here", is_flag=True, help="Costs timed on this machine, instead of published ones of a GPU."
)


@click.command()
@click.argument("runs", type=FOLDER, default=Path("runs"))
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "csv", "json", "markdown"]),
    default="text",
    show_default=True,
    help="In text, deviations are only counted as yes or no under 'as published'.",
)
@click.option(
    "--html", "page", type=FOLDER, metavar="FILE", help="Write one page of all runs instead, with links to them."
)
def results(runs: Path, form: str, page: Path | None) -> None:
    """List all your own numbers: a row for each metric of each finished run below RUNS.

    Example: moco-eval results runs --format csv > numbers.csv
    """
    if page:
        _write_page(runs, page, form)
        return
    from moco_eval.results import listing

    rows = listing.rows(runs)
    if not rows and form == "text":
        click.echo(f"{runs} holds no finished run", err=True)
        return
    click.echo(listing.render(rows, form))


def _write_page(runs: Path, page: Path, form: str) -> None:
    if form != "text":
        raise InputError(f"--html writes a page and --format {form} a list; give one of the two")
    from moco_eval.report.board import write_board

    write_board(runs, page)
    click.echo(page)


@click.command()
@click.argument("run_a", type=FOLDER)
@click.argument("run_b", type=FOLDER)
def compare(run_a: Path, run_b: Path) -> None:
    """Test whether RUN_B is better than RUN_A, paired over the same test images.

    Example: moco-eval compare runs/knn-first runs/knn-second

    Both are finished classification runs (folders with result.json and predictions.npz).
    """
    from moco_eval.results import compare as comparison

    click.echo(str(comparison.compare(run_a, run_b)))


@click.command()
@click.argument("table_id", metavar="ID", required=False)
@with_options(
    click.option("--list", "list_tables", is_flag=True, help="Name every table."),
    click.option("--commands", is_flag=True, help="Only the commands that are left to run, as a shell script."),
    places_options,
    here_option,
    click.option(
        "--format",
        "form",
        type=click.Choice(["text", "markdown", "csv", "latex", "html"]),
        default="text",
        show_default=True,
    ),
)
def table(table_id: str | None, list_tables: bool, commands: bool, here: bool, form: str, options: Options) -> None:
    """Show a paper's table with your runs beside it, and how to produce what is missing.

    Example: moco-eval table moco-v2-1
    """
    from moco_eval.papers import tables

    if list_tables:
        for name, caption in tables.tables():
            click.echo(f"{name:<24} {caption}")
        return
    from moco_eval.papers import match, render, todo

    if table_id is None:
        raise InputError("table needs an ID; moco-eval table --list names them")
    published, places = tables.load_table(table_id), _places(options)
    records = _records(places)
    left = todo.find(published, records, places, here)
    if commands:
        click.echo(todo.stopping_script(left))
    else:
        click.echo(render.render(match.compare(published, records), form, left))


@click.command()
@click.argument("table_id", metavar="ID", required=False)
@with_options(
    click.option("--rows", multiple=True, metavar="LABEL", help="A row's label or a part of it; may be repeated."),
    places_options,
    here_option,
    click.option("--slurm", is_flag=True, help="Submit what is left as SLURM jobs, and end."),
    sbatch_option,
    click.option("--dry-run", is_flag=True, help="Check everything, print the plan and the commands, do nothing."),
)
def reproduce(
    table_id: str | None, rows: tuple[str, ...], here: bool, slurm: bool, sbatch: tuple[str, ...], options: Options
) -> None:
    """Produce a paper's table from nothing: pretrain, convert and evaluate what is left of its rows, and show it.

    Example: moco-eval reproduce cifar10-demo --data cifar10=/datasets

    ID is a table (see `moco-eval table --list`) or a YAML file of your own. Running it again goes on where it stopped.
    """
    from moco_eval.papers import match, render
    from moco_eval.papers import reproduce as chains
    from moco_eval.papers import slurm as jobs

    if table_id is None:
        raise InputError(
            "reproduce needs an ID; for example: moco-eval reproduce cifar10-demo --data cifar10=/datasets"
        )
    require_slurm(slurm, sbatch)
    places = _places(options)
    records = _records(places) if places.runs.is_dir() else []
    plan = chains.plan(table_id, rows, places, records)
    waiting = jobs.states(places.runs)
    if options.dry_run:
        click.echo(chains.describe(plan, waiting, chains.costs_of(plan, records, here)))
    if plan.left:
        from pretraining.plan import plan as could_start

        chains.check(plan, ["moco-eval", *sys.argv[1:]], could_start)
    if options.dry_run:
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


@click.command()
@click.argument("runs", nargs=-1, required=True, type=FOLDER)
@click.option("--output", type=FOLDER, default=Path("report.html"), show_default=True)
def report(runs: tuple[Path, ...], output: Path) -> None:
    """Write one self-contained HTML page about runs.

    Example: moco-eval report runs --output report.html
    """
    from moco_eval.report.page import write_report

    write_report(list(runs), output)
    click.echo(output)


def _places(options: Options) -> Any:
    """Where things are: a `papers.steps.Places`."""
    from moco_eval.papers.steps import Places

    data = {}
    for pair in options.folders:
        name, equals, folder = pair.partition("=")
        if not (name and equals and folder):
            raise InputError(f"--data {pair} is not NAME=FOLDER; for example --data imagenet=/datasets/imagenet")
        data[name] = Path(folder)
    return Places(options.runs, data, options.nproc, options.released)


def _records(places: Any) -> list[dict[str, Any]]:
    """Our results; none where there is no folder of the default name yet."""
    from moco_eval.results import run_directory

    return run_directory.read(places.runs) if places.runs.is_dir() or places.runs != Path("runs") else []
