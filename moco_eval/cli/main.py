"""The command line: its commands, and the four ways in which one ends. Imports happen inside the commands."""

import itertools
import os
import re
import shlex
import signal
import sys
import traceback
from typing import Any, NoReturn

import click

from moco_eval import __version__
from moco_eval.cli import classify, detect, doctor, encoders, pretrain, segment, shipped, tables, watch
from moco_eval.errors import InputError, Interrupted, RunFailed, memory_of, message_of
from moco_eval.runtime import command
from moco_eval.runtime.heartbeat import signs_of_life
from moco_eval.runtime.libraries import kept_quiet
from moco_eval.runtime.printable import one_line, printable_streams

GROUPS: dict[str, tuple[click.Command, ...]] = {
    "Train": (pretrain.pretrain,),
    "Judge an encoder": (
        classify.suite,
        *classify.KINDS,
        classify.retrieve,
        detect.detect,
        segment.segment,
        watch.watch,
    ),
    "Your results": (tables.results, tables.compare, tables.report),
    "Papers' tables": (tables.table, tables.reproduce),
    "Encoders": (encoders.inspect, encoders.convert, encoders.fetch, classify.features),
    "What is here": (shipped.configs, shipped.datasets, shipped.demo, doctor.doctor),
}


class Grouped(click.Group):
    """The commands in groups, each with its whole summary."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(str(one.name), one.get_short_help_str(WHOLE)) for one in commands])


WHOLE = 200  # letters of a summary, more than any has


@click.group(cls=Grouped, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="moco-eval")
def cli() -> None:
    """Train MoCo encoders, and measure how well any encoder transfers, beside the papers' own numbers.

    \b
    Your checkpoint, your images, your numbers:
      moco-eval inspect my_encoder.pth
      moco-eval datasets check imagefolder --data my_images
      moco-eval suite my_encoder.pth --dataset imagefolder --data my_images

    CHECKPOINT is a file in any known format, or random:resnet50, torchvision:resnet50[:WEIGHTS], timm:NAME, zoo:NAME
    (`moco-eval fetch --list`), hf:ORG/NAME[/FILE], pixels.
    """


def _voice(context: click.Context, option: click.Parameter, given: bool) -> None:
    """How much the command says; the last of --quiet and --verbose counts."""
    if given:
        command.speak(str(option.name))


def _voice_options() -> list[click.Parameter]:
    common: dict[str, Any] = {"is_flag": True, "is_eager": True, "expose_value": False, "callback": _voice}
    return [
        click.Option(["--quiet"], help="Say warnings and results alone.", **common),
        click.Option(["--verbose"], help="Say what the libraries say, too.", **common),
    ]


for subcommand in itertools.chain(*GROUPS.values()):
    subcommand.params += _voice_options()
    cli.add_command(subcommand)


def _interrupt(*_: object) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):  # one is enough: a second would break off what the first began
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> None:
    """Run a command; exit 0 done, 1 the run failed, 2 wrong input, 3 interrupted and resumable."""
    typed = shlex.join(["moco-eval", *sys.argv[1:]])
    with printable_streams(), command.running(typed), kept_quiet(), signs_of_life():
        try:
            code = _run()
        except Exception:
            if not _is_one_of_several():
                raise
            click.echo(f"rank {os.environ['RANK']}: {traceback.format_exc()}", err=True)
            code = 1
    if code and _is_one_of_several():
        _leave_at_once(code)
    sys.exit(code)


def _is_one_of_several() -> bool:
    """Whether this is a process of a run of several."""
    return bool(os.environ.get("RANK")) and os.environ.get("WORLD_SIZE", "1") != "1"


def _of_rank() -> str:
    """Which process of several has failed."""
    return f" (rank {os.environ['RANK']})" if _is_one_of_several() else ""


def _leave_at_once(code: int) -> NoReturn:
    """End without the way out of an orderly process: it may wait for the others, who may wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run() -> int:
    """The command's exit code, its errors said."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _interrupt)
    try:
        code = cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = 2
    except (InputError, RunFailed) as error:
        if not getattr(error, "told", False):
            click.echo(f"Error: {one_line(message_of(error))}{_of_rank()}", err=True)
        code = 2 if isinstance(error, InputError) else 1
    except (Interrupted, KeyboardInterrupt, click.Abort) as error:  # before RuntimeError, of which Abort is one
        if os.environ.get("RANK", "0") == "0":  # all processes of a run stop together
            click.echo(
                f"Interrupted: {error}" if str(error) else "Interrupted; run the same command to go on", err=True
            )
        code = 3
    except RuntimeError as error:
        if reason := _of_loader(error) or _of_memory(error):
            click.echo(f"Error: {one_line(reason)}{_of_rank()}", err=True)
            return 1
        if not _is_one_of_several() or not re.search(r"peer|[Cc]onnection|NCCL|Gloo|gloo", str(error)):
            raise
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        click.echo(
            f"rank {os.environ['RANK']} has lost the other processes ({first}); if one of them says why, that is the "
            "reason, otherwise look at the network and the GPUs",
            err=True,
        )
        code = 1
    return code if isinstance(code, int) else 0


def _of_loader(error: RuntimeError) -> str | None:
    """What ended a loader process: torch raises it wherever the process that waits for batches happens to be."""
    if "DataLoader worker" not in str(error):
        return None
    from moco_eval.data.workers import explanation

    return explanation(str(error))


def _of_memory(error: RuntimeError) -> str | None:
    """That a device's memory is full, with the way out; torch may not be imported: its error is known by its name."""
    if type(error).__name__ != "OutOfMemoryError":
        return None
    return f"the memory of the device is full ({memory_of(error)}); take a smaller --batch-size, or --precision bf16"


if __name__ == "__main__":
    main()
