"""The doctor's page of a machine with eight GPUs, each the twin of one."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys, twin
twin.install(8)
sys.argv = ["moco-eval", "doctor"]
from moco_eval.cli.main import main
main()
"""


@pytest.mark.slow
def test_the_page_of_eight_gpus(tmp_path):
    """What a twin cannot do is broken there: NCCL between processes of its own, and the compiler."""
    tests = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={"PYTHONPATH": f"{tests.parent}:{tests}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    page = " ".join(run.stdout.split())
    assert run.returncode == 1, run.stderr
    assert "GPUs 8 x the twin of a GPU of 141 GiB" in page
    assert "bf16, TF32 yes, both" in page
    assert "moco_v2_r50 8 bf16" in page and "--nproc 8" in page
    assert "broken: NCCL all_reduce, torch.compile" in page
