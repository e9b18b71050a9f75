"""Trials of several processes: who waits for whom, and for how long."""

import os
import threading
import time

import pytest

from moco_eval.classification import trials
from moco_eval.errors import RunFailed


def test_a_process_that_shows_no_life_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "PATIENCE", 0.3)
    began = time.monotonic()
    with pytest.raises(RunFailed, match=r"trial_0.npz is not there: .* not responded for 0 s; .*same command to go on"):
        trials._wait_for(tmp_path / "trial_0.npz", tmp_path / "trial_0.alive")
    assert 0.3 <= time.monotonic() - began < 5
    (tmp_path / "trial_0.alive").touch()  # and never again
    with pytest.raises(RunFailed, match="has not responded"):
        trials._wait_for(tmp_path / "trial_0.npz", tmp_path / "trial_0.alive")


def test_a_process_that_shows_life_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "PATIENCE", 0.6)
    path, alive = tmp_path / "trial_0.npz", tmp_path / "trial_0.alive"

    def work() -> None:
        for beat in range(7):
            time.sleep(0.2)
            alive.touch()
            os.utime(alive, ns=(beat, beat))  # whatever the other machine's clock says
        path.touch()

    thread = threading.Thread(target=work)
    thread.start()
    began = time.monotonic()
    trials._wait_for(path, alive)
    thread.join()
    assert time.monotonic() - began > 1.2


def test_signs_of_life_come_and_go(tmp_path, monkeypatch):
    """One process alone needs none."""
    monkeypatch.setattr(trials, "BEAT", 0.05)
    alive = tmp_path / "trial_0.alive"
    with trials._signs_of_life(alive):
        time.sleep(0.2)
        assert not alive.is_file()
    monkeypatch.setattr(trials, "world_size", lambda: 2)
    with trials._signs_of_life(alive):
        time.sleep(0.3)
        assert alive.is_file()
    assert not alive.is_file()


def test_the_files_of_trials_go_when_the_result_stands(tmp_path):
    """Also a sign of life that a kill has left."""
    for name in ("trial_0.npz", "trial_0.alive", "result.json"):
        (tmp_path / name).touch()
    trials.forget(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
