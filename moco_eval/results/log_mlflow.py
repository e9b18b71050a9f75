"""A run of MLflow, which its own variables direct: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moco_eval.config.deviations import flatten
from moco_eval.errors import Interrupted
from moco_eval.runtime.console import log

PARAMS = 100  # the most that one call takes
LETTERS = 6000  # of a param


def check() -> None:
    """Raises what MLflow raises where its store is not there."""
    from mlflow import MlflowClient

    MlflowClient().search_experiments(max_results=1)


class Mlflow:
    """A new run, or an earlier one once more."""

    def __init__(self, output: Path, kind: str, settings: Mapping[str, Any], run: str | None):
        """
        Args:
            run: the id of an earlier session's.
        """
        from mlflow import MlflowClient

        self.client = MlflowClient()
        self.run = run or self._new(output.resolve().name, kind, settings)
        self.client.update_run(self.run, status="RUNNING")
        log(f"mlflow: run {self.run}")

    def _new(self, name: str, kind: str, settings: Mapping[str, Any]) -> str:
        from mlflow.entities import Param

        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "moco-eval"
        known = self.client.get_experiment_by_name(experiment)
        place = known.experiment_id if known else self.client.create_experiment(experiment)
        tags = {"kind": kind}
        run = self.client.create_run(place, run_name=name, tags=tags).info.run_id
        params = [
            Param(key, str(value)[:LETTERS]) for key, value in flatten(dict(settings)).items() if value is not None
        ]
        for first in range(0, len(params), PARAMS):
            self.client.log_batch(run, params=params[first : first + PARAMS])
        return str(run)

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """An @, which MLflow has in no name, becomes a colon: knn/instdisc:1/top1."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(name.replace("@", ":"), value, now, step) for name, value in values.items()]
        self.client.log_batch(self.run, metrics=metrics)

    def close(self, ended: type[BaseException] | None) -> None:
        stopped = ended is not None and issubclass(ended, Interrupted | KeyboardInterrupt)
        self.client.set_terminated(self.run, "KILLED" if stopped else "FAILED" if ended else "FINISHED")
