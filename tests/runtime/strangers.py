"""What another user of this machine does, in a process of its own; only root can become one."""

import os
import subprocess
import sys

import pytest

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
BECOME = f"import encodings.idna, os, sys; os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})"


def stranger(imports: str, code: str, *arguments: str | int) -> subprocess.Popen:
    """Python code, run by another user, who may not be able to read our Python: what it imports comes first."""
    return subprocess.Popen(
        [sys.executable, "-c", f"import {imports}\n{BECOME}\n{code}", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
