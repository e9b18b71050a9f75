"""Run the command line as a user does, read from its exit code, its output and its files."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


def start(*arguments: str | Path, cwd: Path | None = None) -> subprocess.Popen:
    """`moco-eval ARGUMENTS` in a process of its own, running."""
    return subprocess.Popen(
        [sys.executable, "-m", "moco_eval", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=cwd,
    )


def descendants(pid: int) -> list[int]:
    """Every process below this one."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
    return [found for child in children for found in (child, *descendants(child))]


def moco_eval(*arguments: str | Path, code: int = 0, cwd: Path | None = None) -> tuple[str, str]:
    """Run it to its end in a process of its own. Returns stdout and stderr.

    The exit code must be `code`, and no error may be a traceback.
    """
    process = start(*arguments, cwd=cwd)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit code {process.returncode}, expected {code}:\n{out}\n{err}"
    assert "Traceback" not in err, err
    return out, err


def in_process(capfd, monkeypatch, *arguments: str | Path, code: int = 0) -> tuple[str, str]:
    """The same through `main` in this process, which spares the seconds of importing torch."""
    from moco_eval.cli.main import main

    monkeypatch.setattr(sys, "argv", ["moco-eval", *map(str, arguments)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    out, err = capfd.readouterr()
    assert ended.value.code == code, err
    return out, err


def error_line(capfd, monkeypatch, *arguments: str | Path, code: int = 2) -> str:
    """The one line of a command that fails as it should."""
    _, err = in_process(capfd, monkeypatch, *arguments, code=code)
    lines = [line for line in err.splitlines() if line.startswith(("Error:", "Interrupted"))]
    assert len(lines) == 1, err
    return lines[0]
