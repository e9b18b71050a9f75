"""Where a run's curves and results go beside its own files: TensorBoard, and by --log W&B and MLflow."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, cast

from moco_eval.errors import InputError
from moco_eval.results import run_files
from moco_eval.runtime import files, lock
from moco_eval.runtime.console import warn
from moco_eval.runtime.printable import one_line

STATE = "loggers.json"
# what --log takes: the package of each and the first version with everything that is called here
PACKAGES = {"wandb": ("wandb", (0, 31)), "mlflow": ("mlflow-skinny", (3, 0))}


class Logger(Protocol):
    """Where figures go."""

    def send(self, key: str, step: int, values: Mapping[str, float]) -> None:
        """The values of a step. `key` says what they are: of one key, each step is there once."""

    def close(self, ended: type[BaseException] | None = None) -> None:
        """Nothing more comes; `ended` is the error that ended the run, if one did."""


class TensorBoard:
    """Event files in OUTPUT/tensorboard; on resume, what is in them from `purge_step` on is not shown any more."""

    def __init__(self, output: Path, purge_step: int | None = None):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(output / "tensorboard"), purge_step=purge_step)

    def send(self, key: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self, ended: type[BaseException] | None = None) -> None:
        self.writer.close()


class Service(Protocol):
    """An open run of W&B or MLflow; `run` is the name by which it is found again."""

    run: str

    def send(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, ended: type[BaseException] | None) -> None: ...


class Remote:
    """The run of a service that belongs to a run directory: one and the same, however often that is resumed.

    OUTPUT/loggers.json keeps its name and, by key, the last step that was sent, so that no step is sent twice. A
    service that fails is given up for this session: the run goes on, and the next session sends what is missing.
    """

    def __init__(self, name: str, output: Path, kind: str, settings: Mapping[str, Any]):
        """
        Args:
            kind: pretrain, watch, or a protocol.
            settings: what defines the run, for a new one.
        Raises:
            InputError: the service cannot be opened, or loggers.json is damaged.
        """
        self.name, self.path = name, output / STATE
        known = _read(self.path).get(name, {})
        self.sent: dict[str, int] = known.get("sent", {})
        opened = _opened(name, output, kind, settings, known.get("run"))
        self.run, self.service = opened.run, cast(Service | None, opened)
        self._remember()

    def send(self, key: str, step: int, values: Mapping[str, float]) -> None:
        if self.service is None or step <= self.sent.get(key, -1):
            return
        try:
            self.service.send(step, values)
        except Exception as error:  # of another's library, whatever it raises: it ends no run of ours
            self._give_up(error)
            return
        self.sent[key] = step
        self._remember()

    def _give_up(self, error: Exception) -> None:
        self.service = None
        warn(
            f"{self.name} fails ({reason(error)}): nothing more goes there; the run itself goes on, and the same "
            "command, run again, sends what is missing"
        )

    def _remember(self) -> None:
        files.write_json(self.path, _read(self.path) | {self.name: {"run": self.run, "sent": self.sent}})

    def close(self, ended: type[BaseException] | None = None) -> None:
        if self.service is None:
            return
        try:
            self.service.close(ended)
        except Exception as error:  # as above
            self._give_up(error)


def reason(error: Exception) -> str:
    """What a library's error says, in a few words."""
    return one_line(next(iter(str(error).strip().splitlines()), "") or type(error).__name__)[:300]


def _read(path: Path) -> dict[str, Any]:
    """What loggers.json says of each service. Raises InputError where it is damaged."""
    if not run_files.is_there(path):
        return {}
    state = files.read_json(path)
    if isinstance(state, dict) and all(_is_sound(service) for service in state.values()):
        return state
    raise InputError(f"{path} is not what moco-eval wrote; remove it, and --log begins new runs")


def _is_sound(service: Any) -> bool:
    sent = service.get("sent") if isinstance(service, dict) else None
    return isinstance(sent, dict) and isinstance(service["run"], str) and all(type(n) is int for n in sent.values())


def _opened(name: str, output: Path, kind: str, settings: Mapping[str, Any], run: str | None) -> Service:
    """A new run of a service, or the one of that name once more. Raises InputError where that cannot be."""
    try:
        if name == "wandb":
            from moco_eval.results.log_wandb import Wandb

            return Wandb(output, kind, settings, run)
        from moco_eval.results.log_mlflow import Mlflow

        return Mlflow(output, kind, settings, run)
    except Exception as error:  # of another's library
        way_out = f"leave --log {name} out"
        if run:
            way_out = f"it began as {run}: go where that is, or take {name} out of {output / STATE} to begin another"
        raise InputError(f"--log {name}: {reason(error)}; {way_out}") from None


def require(names: Sequence[str]) -> None:
    """Raises InputError where a package is missing or too old, nobody is logged in, or the service is not there."""
    for name in dict.fromkeys(names):
        package, least = PACKAGES[name]
        way_out = f'pip install -U "moco-eval[{name}]"'
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            raise InputError(f"--log {name} needs the package {package}: {way_out}") from None
        if tuple(int(part) for part in version.split(".")[:2]) < least:
            wanted = ".".join(map(str, least))
            raise InputError(f"--log {name} needs {package} {wanted} or newer, and {version} is there: {way_out}")
        _check(name)


def _check(name: str) -> None:
    try:
        if name == "wandb":
            from moco_eval.results import log_wandb

            log_wandb.check()
        else:
            from moco_eval.results import log_mlflow

            log_mlflow.check()
    except InputError:
        raise
    except Exception as error:  # of another's library
        raise InputError(f"--log {name}: {reason(error)}; mend that, or leave --log {name} out") from None


def remotes(names: Sequence[str], output: Path, kind: str, settings: Mapping[str, Any]) -> list[Remote]:
    """A run of each service. Raises InputError, as `Remote` does, and leaves none open."""
    services = list[Remote]()
    try:
        for name in dict.fromkeys(names):
            services.append(Remote(name, output, kind, settings))
    except BaseException as error:
        for service in services:
            service.close(type(error))
        raise
    return services


@contextmanager
def closed_after(loggers: Sequence[Logger]) -> Iterator[None]:
    """Within, they are open; at the end each is told what ended the run, if something did."""
    ended = None
    try:
        yield
    except BaseException as error:
        ended = type(error)
        raise
    finally:
        for logger in loggers:
            logger.close(ended)


# Results


def send_result(record: dict[str, Any], output: Path, names: Sequence[str]) -> None:
    """A result record to each service, once: a run with its metrics, and what it is of as settings.

    A service that fails is warned of: the result is in its folder already, and the same command sends it again.

    Raises:
        InputError: loggers.json is damaged, or the folder cannot be written or is in use.
    """
    known = _read(output / STATE)
    missing = [name for name in dict.fromkeys(names) if "result" not in known.get(name, {}).get("sent", {})]
    if not missing:
        return
    with lock.alone(output):
        for name in missing:
            try:
                service = Remote(name, output, record["protocol"], settings_of(record))
            except InputError as error:
                warn(f"{error}; the result is in {output / 'result.json'} all the same")
                continue
            service.send("result", 0, figures_of(record))
            service.close()


def figures_of(record: dict[str, Any]) -> dict[str, float]:
    """PROTOCOL/METRIC, its spread over trials (_std) and its interval over test images (_low, _high).

    The protocol is part of the name: numbers of different protocols never share a column.
    """
    figures: dict[str, float] = {}
    for metric, value in record["metrics"].items():
        name = f"{record['protocol']}/{metric}"
        figures[name] = value
        if (std := record["std"].get(metric)) is not None:
            figures[f"{name}_std"] = std
        if bounds := record["interval"].get(metric):
            figures[f"{name}_low"], figures[f"{name}_high"] = bounds
    return figures


def settings_of(record: dict[str, Any]) -> dict[str, Any]:
    """What a result is of: protocol, data, encoder with its checkpoint, deviations, trials, cost."""
    kept = ("protocol", "dataset", "encoder", "preprocessing", "selection", "over", "engine", "deviations", "cost")
    return {name: record[name] for name in kept if name in record} | {
        "seeds": [trial["seed"] for trial in record["trials"]]
    }
