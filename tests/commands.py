"""Run the command line as a user does: in a process of its own, read from its exit code and its files."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


def start(*arguments: str | Path, cwd: Path | None = None) -> subprocess.Popen:
    """`moco-eval ARGUMENTS`, running."""
    return subprocess.Popen(
        [sys.executable, "-m", "moco_eval", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=cwd,
    )


def moco_eval(*arguments: str | Path, code: int = 0, cwd: Path | None = None) -> tuple[str, str]:
    """Run it to its end; the exit code must be `code`, and no error may be a traceback. Returns stdout, stderr."""
    process = start(*arguments, cwd=cwd)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit code {process.returncode}, expected {code}:\n{out}\n{err}"
    assert "Traceback" not in err, err
    return out, err


def error_line(*arguments: str | Path, code: int = 2, cwd: Path | None = None) -> str:
    """The one line of a command that fails as it should."""
    _, err = moco_eval(*arguments, code=code, cwd=cwd)
    lines = [line for line in err.splitlines() if line.startswith(("Error:", "Interrupted"))]
    assert len(lines) == 1, err
    return lines[0]
