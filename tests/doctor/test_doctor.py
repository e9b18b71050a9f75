"""A machine on one page: pretended machines and what is said of them, small real measurements, the command itself."""

from dataclasses import replace

import pytest
import torch
from commands import error_line, in_process

from moco_eval.config import load as configs
from moco_eval.config.pretrain import PretrainConfig
from moco_eval.data import workers
from moco_eval.doctor import machine, measure
from moco_eval.doctor.checks import BATCH_BYTES, WORKERS, checks
from moco_eval.doctor.machine import Gpu, Machine, links_of
from moco_eval.doctor.page import page
from moco_eval.errors import RunFailed
from moco_eval.papers import cost
from pretraining import forecast
from pretraining.forecast import DATA, Pieces, Room, together

CPU = Machine(
    python="3.11.7",
    torch="2.9.0",
    cuda=None,
    driver="",
    gpus=(),
    mps=False,
    links=(),
    compiler="",
    exchange=None,
    exchange_failure="",
    cpu="a processor",
    cores=16,
    memory=64 * 10**9,
    shared=32 * 10**9,
    shared_free=32 * 10**9,
    temporary="/tmp",
    open_files=4096,
    place="/data",
    disk=2e9,
    decoding=700.0,
)
H200 = Gpu("NVIDIA H200", 141 * 2**30, (9, 0))
GPUS = replace(CPU, cuda="12.8", driver="570.1", gpus=(H200,) * 8, links=("NV18",), exchange=4.5e11, cores=96)
CONTAINER = {"shared": 64 * 2**20, "shared_free": 64 * 2**20}


def broken(here: Machine) -> dict[str, str]:
    """The way out of everything that is broken."""
    return {check.name: check.way_out for check in checks(here) if check.state == "broken"}


def value(here: Machine, name: str) -> str:
    return next(check.value for check in checks(here) if check.name == name)


@pytest.mark.parametrize("here", [CPU, GPUS, replace(GPUS, gpus=(H200,), exchange=None)])
def test_a_sound_machine_has_nothing_broken_or_to_note(here):
    assert {check.state for check in checks(here)} == {"ok"}


def test_eight_gpus_are_named_with_their_links_and_their_exchange():
    assert value(GPUS, "GPUs") == "8 x NVIDIA H200 of 141 GiB"
    assert value(GPUS, "links") == "NV18" and value(GPUS, "bf16, TF32") == "yes, both"
    assert value(GPUS, "NCCL all_reduce") == "450 GB/s between 8 GPUs (bus)"
    volta = replace(GPUS, gpus=(H200, Gpu("Tesla V100", 32 * 2**30, (7, 0))))
    assert value(volta, "GPUs") == "1 x NVIDIA H200 of 141 GiB; 1 x Tesla V100 of 32 GiB"
    assert value(volta, "bf16, TF32").startswith("no")


@pytest.mark.parametrize(
    ("here", "name", "way_out"),
    [
        (replace(CPU, **CONTAINER), str(workers.SHARED_MEMORY), "--shm-size=8g"),
        (replace(GPUS, **CONTAINER), str(workers.SHARED_MEMORY), "--workers 0"),
        (replace(CPU, shared=10**12, shared_free=0), str(workers.SHARED_MEMORY), "need 617 MB"),
        (replace(CPU, temporary="/tmp/" + 71 * "x"), "TMPDIR", "TMPDIR=/tmp"),
        (replace(CPU, temporary="/tmp/" + 40 * "ü"), "TMPDIR", "TMPDIR=/tmp"),
        (replace(GPUS, compiler="no C++ compiler"), "torch.compile", "apt-get install g++"),
        (replace(CPU, open_files=256), "open files", "ulimit -n 4096"),
        (replace(GPUS, exchange=None, exchange_failure="it did not end"), "NCCL all_reduce", "NCCL_P2P_DISABLE=1"),
        (replace(GPUS, gpus=(replace(H200, failure="no kernel image"),)), "GPU 0", "CUDA_VISIBLE_DEVICES"),
        (replace(CPU, driver="570.1"), "torch", "this torch is for CPUs only"),
        (replace(CPU, driver="470.1", cuda="13.0"), "torch", "may be too old for CUDA 13.0"),
    ],
)
def test_what_is_broken_has_a_way_out(here, name, way_out):
    assert list(broken(here)) == [name] and way_out in broken(here)[name]
    shown = page(checks(here), [])
    assert f"BROKEN: {name}: " in shown and shown.endswith(f"broken: {name}")


@pytest.mark.parametrize(
    ("here", "name"),
    [
        (replace(CPU, compiler="no C++ compiler"), "torch.compile"),
        (replace(CPU, disk=None), "disk"),
        (replace(CPU, shared_free=WORKERS * BATCH_BYTES), str(workers.SHARED_MEMORY)),
    ],
)
def test_what_only_costs_speed_is_a_note(here, name):
    assert [check.name for check in checks(here) if check.state == "note"] == [name] and not broken(here)


def test_no_limit_and_no_shared_memory_are_fine():
    here = replace(CPU, open_files=-1, shared=None, shared_free=None)
    assert not broken(here) and value(here, "open files") == "no limit"


def test_the_bounds_are_those_of_the_loader(monkeypatch, tmp_path):
    """The doctor calls broken exactly what a loader refuses."""
    longest = "/" + (workers.LONGEST_TMPDIR - 1) * "x"
    assert not broken(replace(CPU, temporary=longest)) and broken(replace(CPU, temporary=longest + "x"))
    least = WORKERS * BATCH_BYTES
    assert not broken(replace(CPU, shared_free=least)) and broken(replace(CPU, shared_free=least - 1))
    for free, refused in ((least, False), (least - 4096, True)):
        room = type("Room", (), {"f_bavail": free // 4096, "f_frsize": 4096})
        monkeypatch.setattr(workers.os, "statvfs", lambda _, room=room: room)
        monkeypatch.setattr(workers, "SHARED_MEMORY", tmp_path)
        try:
            workers.prefetch(WORKERS, BATCH_BYTES)
        except RunFailed:
            assert refused
        else:
            assert not refused


TOPOLOGY = """\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\x1b[0m
GPU0\t X \tNV18\tPIX\t0-47
GPU1\tNV18\t X \tSYS\t0-47
NIC0\tPIX\tSYS\t X \t

Legend:
  X    = Self
"""


def test_links_are_those_between_gpus():
    assert links_of(TOPOLOGY) == ("NV18",)
    assert links_of("") == ()


# Measurements


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    measure.draw_photos(folder)
    return folder


def test_photos_are_of_imagenets_size(photos):
    sizes = [path.stat().st_size for path in photos.iterdir()]
    assert len(sizes) == measure.PHOTOS and 80_000 < sum(sizes) / len(sizes) < 140_000


def test_this_machine_is_measured(photos, monkeypatch):
    monkeypatch.setattr(measure, "DISK_BYTES", 2 << 20)
    monkeypatch.setattr(machine, "compile_failure", lambda device: "")
    here = machine.look(photos)
    assert here.cores >= 1 and here.memory > 10**8 and here.decoding > 1
    assert here.disk is None or here.disk > 1e5
    assert here.gpus or value(here, "GPUs").startswith("none")


def test_each_gpu_is_tried(monkeypatch):
    """One that cannot multiply has the reason, and the others theirs; here there is none, so all of them fail."""
    about = type("Properties", (), {"name": "NVIDIA H200", "total_memory": 141 * 2**30})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    real = torch.ones

    def lost(*shape, device=None):
        if device == "cuda:3":
            raise RuntimeError("CUDA error: device-side assert triggered\nmore")
        return real(*shape)

    monkeypatch.setattr(torch, "ones", lost)
    gpus = machine._gpus()
    assert [gpu.failure for gpu in gpus] == [*[""] * 3, "CUDA error: device-side assert triggered", *[""] * 4]
    assert gpus[0] == H200


def test_a_folder_that_cannot_be_written_has_no_rate(tmp_path):
    assert measure.disk_rate(tmp_path / "not there") is None


def test_an_exchange_between_two_processes():
    assert measure.exchange_rate(2, "cpu", 1 << 20) > 1e5


@pytest.mark.slow
def test_an_exchange_that_fails_says_why():
    with pytest.raises(RunFailed, match="nowhere"):
        measure.exchange_rate(2, "nowhere", 1 << 20)


# Forecasts

RECIPE = configs.load("moco_v2_r50", "pretrain", PretrainConfig)
EIGHT = Room(torch.device("cuda"), 8, 96, 2e9)


def recipe_with(room=EIGHT, processes=8, **pieces):
    seconds = {"network": 3600.0, "augmentation": 0.0, "worker": 3600.0, "reading": 0.0} | pieces
    return together("moco_v2_r50", "imagenet", RECIPE, processes, Pieces(**seconds), room)


def test_devices_cores_and_disk_work_beside_each_other():
    busy = recipe_with(augmentation=400.0)
    assert (busy.seconds, busy.limit) == (4000.0, "network")
    assert busy.options == "--dataset imagenet --nproc 8"
    starved = recipe_with(worker=96 * 7200.0)
    assert (starved.seconds, starved.limit) == (7200.0, "loader")
    assert starved.options == "--dataset imagenet --nproc 8 --workers 12"
    assert recipe_with(reading=9000.0).limit == "disk"


def test_a_device_that_needs_more_loader_processes_gets_them():
    assert recipe_with(worker=80 * 3600.0).options.endswith("--workers 10")


def test_more_processes_than_cores_make_no_more_views():
    few = recipe_with(replace(EIGHT, cores=2), worker=7200.0)
    assert few.seconds == 3600.0 and few.options.endswith("--workers 1")


def test_a_cpu_is_device_and_cores():
    room = Room(torch.device("cpu"), 0, 4, None)
    alone = recipe_with(room, 1, network=1000.0, worker=4000.0)
    assert (alone.seconds, alone.limit) == (2000.0, "network") and "--workers" not in alone.options


def test_every_shipped_recipe_is_forecast(photos, monkeypatch):
    shipped = {name.removeprefix("pretrain/") for name in configs.shipped() if name.startswith("pretrain/")}
    assert set(DATA) == shipped
    monkeypatch.setattr(cost, "timed_anew", lambda probe, device: 0.01)
    monkeypatch.setattr(forecast, "_worker", lambda *_: 0.002)
    monkeypatch.setattr(forecast, "_augmentation", lambda *_: 0.0)
    monkeypatch.setattr(forecast, "by_device", lambda config, device: {"precision": "bf16", "compile": True})
    rows = {each.recipe: each for each in forecast.forecasts(EIGHT, photos)}
    assert rows["moco_v2_r50"].processes == 8 and rows["cifar10"].processes == rows["digits"].processes == 1
    images = 200 * 1_281_167
    monitored = 20 * (1_281_167 + 50_000)
    assert rows["moco_v2_r50"].seconds == pytest.approx((2 * images + monitored) * 0.01 / 8)
    monkeypatch.setattr(cost, "timed_anew", lambda probe, device: None)
    rows = {each.recipe: each for each in forecast.forecasts(EIGHT, photos)}
    assert {each.limit for each in rows.values()} == {"memory"}
    ways_out = {"moco_v3_r50": "--batch-size 1024"}  # the batch norms of its backbone want the whole batch
    assert {name: each.options for name, each in rows.items()} == dict.fromkeys(rows, "--set accumulate=4") | ways_out


# The command


@pytest.mark.parametrize(
    ("here", "code"), [(CPU, 0), (replace(GPUS, **CONTAINER), 1), (replace(CPU, temporary="/tmp/" + 80 * "x"), 1)]
)
def test_the_command_ends_with_1_where_something_is_broken(here, code, monkeypatch, capfd):
    monkeypatch.setattr(machine, "look", lambda photos: here)
    row = forecast.Forecast("cifar10", "cifar10", 1, "bf16", 3600.0, "network", "--dataset cifar10")
    monkeypatch.setattr(forecast, "forecasts", lambda room, photos: [row])
    out, _ = in_process(capfd, monkeypatch, "doctor", code=code)
    assert "cifar10" in out and "60 min" in out and "the network's arithmetic" in out
    assert ("BROKEN" in out) == bool(code) and "\x1b" not in out


def test_a_gpu_that_does_not_work_has_no_forecast(monkeypatch, capfd):
    monkeypatch.setattr(machine, "look", lambda photos: replace(GPUS, gpus=(replace(H200, failure="lost"),)))
    monkeypatch.setattr(forecast, "forecasts", lambda room, photos: pytest.fail("timed"))
    assert "GPU 0" in in_process(capfd, monkeypatch, "doctor", code=1)[0]


def test_no_folder_for_temporary_files_is_said(monkeypatch, capfd):
    def nowhere(**_):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.TemporaryDirectory", nowhere)
    assert "set TMPDIR to one that can" in error_line(capfd, monkeypatch, "doctor", code=1)
