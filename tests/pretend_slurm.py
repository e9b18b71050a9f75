"""SLURM's commands as shell scripts: jobs are kept, and run when a test asks for it."""

import os
import subprocess

from commands import environment

SBATCH = """#!/bin/sh
number=$(( $(ls cluster | grep -c sh$) + 1 ))
cp "$1" cluster/$number.sh
[ -e cluster/refuse ] && echo "sbatch: error: invalid partition specified: gpus" >&2 && exit 1
echo "$number PENDING moco-eval-step" >> cluster/queue
echo "Submitted batch job $number"
"""
SQUEUE = """#!/bin/sh
echo "$@" >> cluster/asked
[ -s cluster/queue ] || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }
cat cluster/queue
"""
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do
  case "$1" in --output|--error) shift 2 ;; *) shift ;; esac
done
exec "$@"
"""


def put(in_tmp, monkeypatch):
    """SLURM's commands in the search path, as far as they are used; returns the folder of the jobs."""
    (in_tmp / "bin").mkdir()
    (in_tmp / "cluster").mkdir()
    for name, script in {"sbatch": SBATCH, "squeue": SQUEUE, "srun": SRUN}.items():
        (in_tmp / "bin" / name).write_text(script)
        (in_tmp / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{in_tmp / 'bin'}:{os.environ['PATH']}")
    return in_tmp / "cluster"


def run_jobs(cluster):
    """Run the scripts of the queue one after another, as SLURM would."""
    for line in (cluster / "queue").read_text().splitlines():
        number = line.split()[0]
        done = subprocess.run(
            ["bash", str(cluster / f"{number}.sh")],
            env=environment() | {"SLURM_JOB_ID": number},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    (cluster / "queue").write_text("")
