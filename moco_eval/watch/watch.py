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
from moco_eval.papers import slurm
from moco_eval.results.loggers import Remote, TensorBoard, closed_after, remotes
from moco_eval.runtime import child
from moco_eval.runtime.console import tell
from moco_eval.runtime.printable import shell_join
from moco_eval.watch import checkpoints
from moco_eval.watch.checkpoints import Found, Memory, Snapshot, State
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
        sbatch: sbatch's options, with which each judgement is a SLURM job; None judges here.

    Raises:
        InputError: no such folder, or the output holds a watch with other arguments.
    """

    folder: Path
    output: Path
    arguments: Sequence[str]
    machine: Sequence[str]
    every: float
    sbatch: Sequence[str] | None = None
    memory: Memory = field(init=False)
    states: dict[Path, State] = field(init=False, default_factory=dict)
    failed: dict[Path, State] = field(init=False, default_factory=dict)  # in this process; a restart tries them again
    gone: set[str] = field(init=False, default_factory=set)  # jobs that left the queue and told nothing, by hash

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise InputError(
                f"{self.folder} is no folder; give the one in which checkpoints appear, or its run directory"
            )
        self.output.mkdir(parents=True, exist_ok=True)
        if self.sbatch is not None:
            slurm.check(self.output, self.sbatch)
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
        """A checkpoint's point; None where it vanished, is no encoder, became a job, or was judged before."""
        state = self.states[path]
        copy = checkpoints.snapshot(path, self.folder, self.output / ".snapshots")
        if copy is None:
            tell(f"{self._name(path)} vanished or was written to; it is looked at again")
            return None
        try:
            return self._judged(copy, state)
        finally:
            if copy.sha256 not in self.memory.waiting:
                shutil.rmtree(copy.path.parent, ignore_errors=True)

    def _judged(self, copy: Snapshot, state: State) -> Point | None:
        if copy.sha256 in self.memory.found:
            self.memory.remember(copy.name, state, copy.sha256)
            return None
        found = Found(copy.name, state, checkpoints.stored_position(copy.path))
        command = self._command(copy)
        if self.sbatch is not None:
            number = slurm.submit_one(
                slurm.Job(command, self._told(copy.sha256)), self._place(copy), self.output, self.sbatch
            )
            self.memory.waiting.add(copy.sha256)
            self.memory.find(copy.sha256, found)
            tell(f"{copy.name} is judged by job {number}")
            return None
        code, told = child.run(command)
        if told or code == 3:
            raise Interrupted(f"stopped at {copy.name}; {AGAIN}")
        return self._settled(copy, found, code)

    def _command(self, copy: Snapshot) -> tuple[str, ...]:
        places = ("--output", str(self._place(copy)), "--cache", str(self._features(copy.sha256)))
        return ("suite", str(copy.path), *self.arguments, *self.machine, *places)

    def _place(self, copy: Snapshot) -> Path:
        return self.output / checkpoints.folder_name(copy)

    def _features(self, sha256: str) -> Path:
        return self.output / ".features" / sha256[:8]

    def _told(self, sha256: str) -> Path:
        """Where a job leaves its exit code."""
        return self.output / "slurm" / f"{sha256[:8]}.exit"

    def _settled(self, copy: Snapshot, found: Found, code: int) -> Point | None:
        """What follows a judgement that ended with this exit code: its point, if it has one."""
        shutil.rmtree(self._features(copy.sha256), ignore_errors=True)
        if code:
            where = f"see {self.output / 'slurm'}" if copy.sha256 in self.memory.waiting else "see above"
            tell(f"{copy.name} was not judged, {where}; the watch goes on")
        if code == 2:  # what it holds
            self.memory.refuse(copy.sha256, f"refused by {shell_join(('moco-eval', *self._command(copy)))}")
        elif code:  # a full disk, a full GPU
            self.failed[self.folder / copy.name] = found.state
            self.memory.forget(copy.sha256)
            return None
        self.memory.waiting.discard(copy.sha256)
        self.memory.find(copy.sha256, found)
        return None if code else self._point(copy.sha256)

    def ended(self) -> Iterator[Point]:
        """The points of the jobs that have ended since."""
        queue = slurm.states(self.output) if self.memory.waiting else {}
        for sha256 in sorted(self.memory.waiting, key=lambda sha256: self.memory.found[sha256].state.written):
            found = self.memory.found[sha256]
            copy = Snapshot(found.name, sha256, self.output / ".snapshots" / sha256[:8] / Path(found.name).name)
            code = self._exit_code(sha256, self._place(copy) in queue)
            if code is None:
                continue
            point = self._settled(copy, found, code)
            self._told(sha256).unlink(missing_ok=True)
            shutil.rmtree(copy.path.parent, ignore_errors=True)
            if point:
                yield point

    def _exit_code(self, sha256: str, queued: bool) -> int | None:
        """Of a job that has ended; 1 of one that left the queue and has told nothing a look later: it was cancelled."""
        try:
            return int(self._told(sha256).read_text())
        except ValueError:
            return 1
        except FileNotFoundError:
            if not queued and sha256 in self.gone:
                return 1
        self.gone = self.gone - {sha256} if queued else self.gone | {sha256}
        return None

    def _point(self, sha256: str) -> Point:
        found = self.memory.found[sha256]
        place = self._place(Snapshot(found.name, sha256, Path(found.name)))
        return read_point(place, found.name, found.state.written, found.stored)

    def curve(self) -> Curve:
        """Of everything that was judged, the names under which it was found first."""
        aside = {*self.memory.refused, *self.memory.waiting}
        points = [self._point(sha256) for sha256 in self.memory.found if sha256 not in aside]
        return curve_of([point for point in points if point.results])


def watch(folder: Watch, once: bool, patience: float | None, logs: Sequence[str] = ()) -> Curve:
    """Judge what is there and what comes, until the patience is over or the process is told to stop.

    Args:
        once: end when everything that is there now has been judged, or submitted.
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
        for point in _points(folder, once, patience):
            curve = folder.curve()
            write(curve, folder.output / "curve.jsonl")
            board.send(point.name, curve.x(point), point.scalars())
            _send(curve, services)
            tell(curve.table())
    if folder.memory.waiting:
        tell(f"{len(folder.memory.waiting)} checkpoints wait for their jobs; {AGAIN}")
    return folder.curve()


def _send(curve: Curve, services: Sequence[Remote]) -> None:
    """The points that a service does not have yet."""
    for service in services:
        for x, point in curve.points:
            service.send(point.name, x, point.scalars())


def _points(folder: Watch, once: bool, patience: float | None) -> Iterator[Point]:
    """The point of each new checkpoint as soon as it is judged."""
    folder.whole()  # the first look tells nothing of what is being written
    last = time.monotonic()
    while True:
        time.sleep(folder.every)
        new = folder.whole()
        for path in new:
            if point := folder.judge(path):
                yield point
        yield from folder.ended()
        last = time.monotonic() if new or folder.memory.waiting else last
        if not new and (once or (patience is not None and time.monotonic() - last > patience)):
            return
