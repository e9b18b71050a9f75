"""Commands as SLURM jobs, by submitit: steps of a chain wait for each other, and each resumes where it was ended."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moco_eval.errors import InputError, RunFailed
from moco_eval.papers.steps import ChainStep
from moco_eval.runtime import files
from moco_eval.runtime.command import exit_code
from moco_eval.runtime.printable import shell_join

NAME = "moco-eval-"  # a job's name begins so
JOB = re.compile(r"\w{1,40}")
OURS = ("dependency", "kill_on_invalid_dep", "job_name", "output", "error", "open_mode", "signal", "array", "requeue")
ONE_TASK = ("nodes", "ntasks", "ntasks_per_node")
DEFAULTS = {"time": "1-00:00:00"}
REQUEUED = 1000  # times at most that a job whose time is over goes back to the queue
GRACE = 900  # seconds between a preempted job's SIGTERM and what comes next, at most


class Job:
    """A command on a compute node. submitit calls it, and `checkpoint` when SLURM is about to end the job.

    Attributes:
        arguments: the command line after `moco-eval`.
        ended: the file that takes the exit code once it has ended; None where nobody asks.
    """

    def __init__(self, arguments: Sequence[str], ended: Path | None = None) -> None:
        self.arguments, self.ended = tuple(arguments), ended
        self.process: subprocess.Popen | None = None

    def __call__(self) -> None:
        command = [sys.executable, "-m", "moco_eval", *self.arguments]
        self.process = subprocess.Popen(command, preexec_fn=_leave_to_submitit)
        code = exit_code(self.process)
        if code == 3:  # SLURM has told it to stop, and ends the job next; one that ends by itself is not requeued
            time.sleep(GRACE)
        if self.ended:
            files.write_text(self.ended, f"{code}\n")
        if code:
            raise RuntimeError(f"exit code {code}: {shell_join(('moco-eval', *self.arguments))}")

    def checkpoint(self) -> Any:
        """Let the step save what it does; the job that goes on with it. Called from a signal's handler."""
        from submitit.helpers import DelayedSubmission

        process = self.process
        if process and process.returncode is None:
            try:  # not process.wait(), which the handler may have interrupted
                os.kill(process.pid, signal.SIGTERM)
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            except (ProcessLookupError, ChildProcessError):
                pass  # it has ended
        return DelayedSubmission(Job(self.arguments, self.ended))


def _leave_to_submitit() -> None:
    """SLURM sends SIGUSR2 to all processes of a job, and it would end those that do not expect it."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


# Submitting


def submit(steps: Sequence[ChainStep], runs: Path, given: Sequence[str]) -> list[str]:
    """Submit steps that are not in the queue; returns a line about each.

    Args:
        given: sbatch's options, KEY=VALUE or KEY.
    Raises:
        InputError: no submitit, no SLURM, an option that is ours to set.
        RunFailed: sbatch refuses.
    """
    executor, parameters = _executor(runs), _parameters(given)
    ids, waiting, lines = _remembered(runs), states(runs), []
    for step in steps:
        if step.output in waiting:
            continue
        before = next((ids[str(other.output)] for other in steps[::-1] if other.is_before(step)), None)
        number, earlier = _submit(executor, Job(step.arguments), parameters, before), ids.get(str(step.output))
        _remember(runs, ids, step.output, number)
        notes = [f"after job {before}"] if before else []
        notes += [f"job {earlier} has not done it"] if earlier else []
        lines.append(f"job {number}: {step.command}" + (f" ({'; '.join(notes)})" if notes else ""))
    return [*lines, f"what they print: {_jobs(runs).parent}"]


def submit_one(job: Job, output: Path, runs: Path, given: Sequence[str]) -> str:
    """Submit a job that waits for no other; returns its number. Raises as `submit` does.

    Args:
        output: what it leaves, by which `states` knows it.
    """
    number = _submit(_executor(runs), job, _parameters(given), None)
    _remember(runs, _remembered(runs), output, number)
    return number


def check(runs: Path, given: Sequence[str]) -> None:
    """Raises InputError where nothing could be submitted: no submitit, no SLURM, an option that is ours to set."""
    _executor(runs)
    _parameters(given)


def _executor(runs: Path) -> Any:
    try:
        import submitit
    except ImportError:
        raise InputError("--slurm needs submitit; pip install 'moco-eval[slurm]'") from None
    try:
        return submitit.SlurmExecutor(runs / "slurm", max_num_timeout=REQUEUED)
    except RuntimeError:
        raise InputError("--slurm: there is no srun here; run it where SLURM's commands are") from None


def _parameters(given: Sequence[str]) -> dict[str, Any]:
    parameters: dict[str, Any] = dict(DEFAULTS)
    for option in given:
        key, equals, value = option.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if key in OURS or not key:
            raise InputError(f"--sbatch {option!r}: moco-eval sets that itself; for example --sbatch partition=gpu")
        if key in ONE_TASK:
            raise InputError(f"--sbatch {option!r}: a job is one task on one machine; --nproc sets its processes")
        parameters[key] = value if equals else True
    return parameters


def _submit(executor: Any, job: Job, parameters: Mapping[str, Any], before: str | None) -> str:
    more = {**parameters, "job_name": f"{NAME}{job.arguments[0]}", "kill_on_invalid_dep": "yes", "requeue": True}
    executor.update_parameters(additional_parameters=more | ({"dependency": f"afterok:{before}"} if before else {}))
    try:
        return str(executor.submit(job).job_id)
    except Exception as error:  # submitit has its own for each way in which sbatch can fail
        said = str(error).strip().splitlines()
        command = shell_join(("moco-eval", *job.arguments))
        raise RunFailed(f"sbatch refuses {command}: {said[-1] if said else type(error).__name__}") from None


# What SLURM says


def states(runs: Path) -> dict[Path, str]:
    """What SLURM says of each step that is in its queue, by the step's output: 'job 12, pending'.

    Raises:
        RunFailed: squeue does not answer.
    """
    ids = _remembered(runs)
    if not ids:
        return {}
    asked = ["squeue", "--noheader", "--format=%i %T %j", f"--jobs={','.join(ids.values())}"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=120, check=False)
    except FileNotFoundError:  # jobs of another machine
        return {}
    except (OSError, subprocess.SubprocessError) as error:
        raise RunFailed(f"squeue does not answer: {error}") from None
    if done.returncode and "Invalid job id" not in done.stderr:  # it forgets jobs that have ended
        raise RunFailed(f"squeue does not answer: {done.stderr.strip()}")
    lines = [line.split() for line in done.stdout.splitlines()]
    said = {fields[0]: fields[1] for fields in lines if fields[2:] and fields[2].startswith(NAME)}  # numbers come again
    return {Path(output): f"job {number}, {said[number].lower()}" for output, number in ids.items() if number in said}


def _jobs(runs: Path) -> Path:
    return runs / "slurm/jobs.json"


def _remember(runs: Path, ids: dict[str, str], output: Path, number: str) -> None:
    ids[str(output)] = number
    files.write_json(_jobs(runs), ids)


def _remembered(runs: Path) -> dict[str, str]:
    """The job of each step that was ever submitted, by the step's output."""
    path = _jobs(runs)
    jobs = files.read_json(path) if path.is_file() else {}
    if not isinstance(jobs, dict) or not all(isinstance(job, str) and JOB.fullmatch(job) for job in jobs.values()):
        raise InputError(f"{path} does not hold the number of a job for each output; move it away to submit again")
    return jobs
