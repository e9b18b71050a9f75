"""A command is never silent: a line at least every 30 seconds without a terminal, a log in its run directory."""

import logging
import re
import subprocess
import sys
import time
import warnings

import pytest
from commands import environment, in_process

from moco_eval.config.base import usual_workers
from moco_eval.runtime import command, console, heartbeat
from moco_eval.runtime.libraries import kept_quiet

KNN = ["knn", "pixels", "--dataset", "digits", "--protocol", "digits", "--output", "run"]


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(console, "SILENCE", 0.2)
    monkeypatch.setattr(heartbeat, "EVERY", 0.02)


def test_a_loop_says_how_far_it_is(impatient, capfd):
    with command.running("moco-eval x"), heartbeat.signs_of_life(), console.progress("train", 10, images=32) as advance:
        for _ in range(4):
            advance()
        time.sleep(0.5)
    lines = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"train: 4 of 10 \(40 %\), [\d,.]+ images/s, .* left", lines[0])
    assert 1 <= len(lines) <= 3  # one for each silence, not for each look


def test_work_without_a_count_says_that_it_goes_on(impatient, capfd):
    with command.running("moco-eval x"), heartbeat.signs_of_life():
        time.sleep(0.4)
    assert "at work for" in capfd.readouterr().err


@pytest.mark.parametrize(("voice", "rank"), [(command.QUIET, "0"), (command.USUAL, "1")])
def test_the_quiet_and_the_other_processes_say_nothing(voice, rank, impatient, capfd, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    with command.running("moco-eval x"), heartbeat.signs_of_life():
        command.speak(voice)
        time.sleep(0.4)
    assert capfd.readouterr().err == ""


@pytest.mark.library
def test_a_guest_is_left_in_peace(impatient, capfd, tmp_path):
    with console.progress("train", 10) as advance, console.logged(tmp_path):
        advance()
        time.sleep(0.4)
    assert capfd.readouterr().err == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("speed", "words"), [(85.4, "85 images/s"), (0.314, "0.31 images/s"), (3.0, "3 images/s")])
def test_a_slow_rate_is_no_zero(speed, words):
    assert console.rate(speed, "images") == words


# The log, quiet and verbose


def test_a_run_keeps_its_log(in_tmp, capfd, monkeypatch):
    _, said = in_process(capfd, monkeypatch, *KNN)
    log = (in_tmp / "run" / "log.txt").read_text()
    assert "moco-eval knn pixels" in log.splitlines()[0]
    assert all(line in log for line in said.splitlines())
    in_process(capfd, monkeypatch, *KNN)  # whoever looks again leaves no trace
    assert (in_tmp / "run" / "log.txt").read_text() == log


def test_the_log_says_how_a_run_ended(in_tmp, capfd, monkeypatch):
    def failing(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("moco_eval.classification.trials.kept", failing)
    in_process(capfd, monkeypatch, *KNN, code=3)
    assert "ended by KeyboardInterrupt" in (in_tmp / "run" / "log.txt").read_text()


def test_quiet_says_results_alone(in_tmp, capfd, monkeypatch):
    out, err = in_process(capfd, monkeypatch, *KNN, "--quiet")
    assert out.startswith("knn/instdisc@1") and err == ""
    assert "result: run/result.json" in (in_tmp / "run" / "log.txt").read_text()


@pytest.mark.parametrize("voice", [command.USUAL, command.VERBOSE])
def test_libraries_speak_to_the_log_or_when_asked(voice, capfd, tmp_path):
    with command.running("moco-eval x"), kept_quiet():
        command.speak(voice)
        with console.logged(tmp_path):
            warnings.warn("an old argument", stacklevel=1)
            logging.getLogger("torch.utils.cpp_extension").warning("No CUDA runtime is found")
    shown, log = capfd.readouterr().err, (tmp_path / "log.txt").read_text()
    assert "an old argument" in log and "No CUDA runtime is found" in log
    assert ("No CUDA runtime is found" in shown) == ("an old argument" in shown) == (voice == command.VERBOSE)


def test_the_two_words_are_options_of_every_command():
    from moco_eval.cli.main import cli

    for one in cli.commands.values():
        names = [name for option in one.params for name in option.opts]
        assert names.count("--quiet") == names.count("--verbose") == 1


# Loader processes


@pytest.mark.parametrize(("cores", "processes", "workers"), [(64, "8", 8), (64, "", 8), (16, "8", 2), (2, "", 2)])
def test_workers_are_the_cores_of_a_process_at_most_eight(cores, processes, workers, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert usual_workers() == workers


def test_the_thread_brings_no_console_with_it():
    code = "import sys; from moco_eval.cli.main import main; sys.argv = ['moco-eval', '--version']\n"
    code += "try: main()\nexcept SystemExit: sys.exit('moco_eval.runtime.console' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True).returncode == 0
