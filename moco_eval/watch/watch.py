"""Judge each new checkpoint of a training, ours or another's, while it goes on.

Each checkpoint is judged by a `moco-eval suite` of its own: a process whose numbers are those of the command run by
hand, and whose failure ends nothing else.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moco_eval.errors import InputError, Interrupted
from moco_eval.results.loggers import Remote, TensorBoard, closed_after, remotes
from moco_eval.runtime import child
from moco_eval.runtime.console import tell
from moco_eval.runtime.printable import shell_join
from moco_eval.watch import checkpoints
from moco_eval.watch.checkpoints import Memory, Snapshot, State
from moco_eval.watch.curve import Curve, Point, curve_of, read_point, write

AGAIN = "run the same command to go on; nothing is judged twice"


@dataclass
class Watch:
    """A watched folder.

    Attributes:
        folder: where checkpoints appear.
        output: where results go; not looked into.
        arguments: of `moco-eval suite` after the checkpoint, those that move numbers: data, tasks.
        machine: further ones that do not: device, processes.
        every: seconds between two looks.

    Raises:
        InputError: no such folder, or the output holds a watch with other arguments.
    """

    folder: Path
    output: Path
    arguments: Sequence[str]
    machine: Sequence[str]
    every: float
    memory: Memory = field(init=False)
    states: dict[Path, State] = field(init=False, default_factory=dict)
    failed: dict[Path, State] = field(init=False, default_factory=dict)  # in this process; a restart tries them again

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise InputError(
                f"{self.folder} is no folder; give the one in which checkpoints appear, or its run directory"
            )
        self.output.mkdir(parents=True, exist_ok=True)
        self.memory = Memory(self.output / "checkpoints.json", shell_join(self.arguments))

    def whole(self) -> list[Path]:
        """New checkpoints that nobody has written to since the last look."""
        before, self.states = self.states, checkpoints.look(self.folder, self.output)
        return [
            path
            for path, state in self.states.items()
            if before.get(path) == state != self.failed.get(path) and not self.memory.has(self._name(path), state)
        ]

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def judge(self, path: Path) -> Point | None:
        """A checkpoint's point; None where it vanished, was judged under another name, or is no encoder."""
        state = self.states[path]
        copy = checkpoints.snapshot(path, self.folder, self.output / ".snapshots")
        if copy is None:
            tell(f"{self._name(path)} vanished or was written to; it is looked at again")
            return None
        try:
            return self._judged(copy, state)
        finally:
            shutil.rmtree(copy.path.parent, ignore_errors=True)

    def _judged(self, copy: Snapshot, state: State) -> Point | None:
        again = any(sha256 == copy.sha256 for _, sha256 in self.memory.known.values())
        if not again:
            place, features = self.output / checkpoints.folder_name(copy), self.output / ".features"
            command = ("suite", str(copy.path), *self.arguments, *self.machine)
            command = (*command, "--output", str(place), "--cache", str(features))
            code, told = child.run(command)
            shutil.rmtree(features, ignore_errors=True)
            if told or code == 3:
                raise Interrupted(f"stopped at {copy.name}; {AGAIN}")
            if code:
                tell(f"{copy.name} was not judged, see above; the watch goes on")
            if code == 2:  # what it holds
                self.memory.refuse(copy.sha256, f"refused by {shell_join(('moco-eval', *command))}")
            elif code:  # a full disk, a full GPU
                self.failed[self.folder / copy.name] = state
                return None
        self.memory.remember(copy.name, state, copy.sha256)
        return None if again or copy.sha256 in self.memory.refused else self._point(copy.name)

    def _point(self, name: str) -> Point:
        state, sha256 = self.memory.known[name]
        place = self.output / checkpoints.folder_name(Snapshot(name, sha256, Path(name)))
        return read_point(place, name, state.written)

    def curve(self) -> Curve:
        """Of everything that was judged, the names under which it was found first."""
        first = {sha256: name for name, (_, sha256) in reversed(self.memory.known.items())}
        points = [self._point(name) for sha256, name in first.items() if sha256 not in self.memory.refused]
        return curve_of([point for point in points if point.results])


def watch(folder: Watch, once: bool, patience: float | None, logs: Sequence[str] = ()) -> Curve:
    """Judge what is there and what comes, until the patience is over or the process is told to stop.

    Args:
        once: end when everything that is there now has been judged.
        patience: seconds without a new checkpoint after which the watch ends; None for never.
        logs: where the curve goes beside TensorBoard: wandb, mlflow.
    Returns:
        The curve.
    Raises:
        InputError: one of `logs` cannot be opened.
        Interrupted: told to stop.
    """
    about = {"folder": str(folder.folder), "arguments": shell_join(folder.arguments)}
    services = remotes(logs, folder.output, "watch", about)
    board = TensorBoard(folder.output)
    with closed_after([board, *services]):
        _send(folder.curve(), services)  # what an earlier watch judged, and one of them lacks
        for path in _coming(folder, once, patience):
            point = folder.judge(path)
            if point is None:
                continue
            curve = folder.curve()
            write(curve, folder.output / "curve.jsonl")
            board.send(point.name, curve.x(point), point.scalars())
            _send(curve, services)
            tell(curve.table())
    return folder.curve()


def _send(curve: Curve, services: Sequence[Remote]) -> None:
    """The points that a service does not have yet."""
    for service in services:
        for x, point in curve.points:
            service.send(point.name, x, point.scalars())


def _coming(folder: Watch, once: bool, patience: float | None) -> Iterator[Path]:
    """New checkpoints, each as soon as it is whole."""
    folder.whole()  # the first look tells nothing of what is being written
    last = time.monotonic()
    while True:
        time.sleep(folder.every)
        new = folder.whole()
        yield from new
        last = time.monotonic() if new else last
        if not new and (once or (patience is not None and time.monotonic() - last > patience)):
            return
