"""Rates of this machine, each measured in a few seconds: decoding, reading, exchanging between GPUs."""

import contextlib
import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from moco_eval.data.augment.decode import photo
from moco_eval.data.catalogue import open_images
from moco_eval.errors import InputError, RunFailed, message_of
from moco_eval.runtime import rendezvous

PHOTOS = 16
PHOTO_SIDES = (500, 375)  # pixels, the most frequent in ImageNet
DISK_BYTES = 128 << 20
EXCHANGED_BYTES = 256 << 20
EXCHANGE_SECONDS = 40  # until an all_reduce that does not end is given up


def draw_photos(folder: Path) -> None:
    """JPEG files of about the size and detail of ImageNet's (110 kB), drawn at random, into a `flat` data set."""
    generator = np.random.default_rng(0)
    for number in range(PHOTOS):
        coarse = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(PHOTO_SIDES, Image.Resampling.BICUBIC), dtype=np.int16)
        grainy = smooth + generator.normal(0, 16, smooth.shape).astype(np.int16)
        Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:02}.jpg", quality=90)


def decoding_rate(folder: Path) -> float:
    """Images per second of one core, decoded as loader processes do it; the best of three rounds."""
    images, rates = open_images("flat", folder, "pretrain"), []
    for _ in range(3):
        began = time.perf_counter()
        for index in range(len(images)):
            photo(images, index)
        rates.append(len(images) / (time.perf_counter() - began))
    return max(rates)


def disk_rate(folder: Path) -> float | None:
    """Bytes per second of reading a file that is in no cache; None where the folder cannot be written."""
    block = os.urandom(1 << 20)
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:  # has no name, and is gone whatever happens
            for _ in range(DISK_BYTES >> 20):
                file.write(block)
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            began = time.perf_counter()
            while file.read(8 << 20):
                pass
            return DISK_BYTES / (time.perf_counter() - began)
    except OSError:
        return None


def exchange_rate(ranks: int, device: str = "cuda", count: int = EXCHANGED_BYTES) -> float:
    """Bus bandwidth of an all_reduce between processes of this machine, one a GPU, in bytes per second.

    Args:
        device: cuda, of which each process takes one, or cpu.
        count: bytes that each process has.
    Raises:
        RunFailed: it fails, or does not end.
    """
    with tempfile.TemporaryDirectory() as folder, rendezvous.private_meeting():
        result = Path(folder) / "seconds"
        arguments = (ranks, device, count, str(result))
        started = torch.multiprocessing.start_processes(_rank, arguments, ranks, join=False, start_method="spawn")
        assert started is not None
        try:
            deadline = time.monotonic() + EXCHANGE_SECONDS
            while not started.join(timeout=max(0.1, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    raise RunFailed(f"it did not end within {EXCHANGE_SECONDS} s")
        except RunFailed:
            raise
        except Exception as error:  # of whatever a rank raised
            raise RunFailed(message_of(error).strip().splitlines()[-1]) from None
        finally:
            for process in started.processes:
                process.kill()
        return 2 * (ranks - 1) / ranks * count / float(result.read_text())


def _rank(rank: int, ranks: int, kind: str, count: int, result: str) -> None:
    """Seconds of an all_reduce, the fastest of five, written by rank 0."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    device = torch.device("cuda", rank) if kind == "cuda" else torch.device(kind)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    rendezvous.join(device, timedelta(seconds=EXCHANGE_SECONDS))
    tensor, took = torch.ones(count // 4, device=device), []
    for _ in range(6):
        _wait(device)
        began = time.perf_counter()
        dist.all_reduce(tensor)
        _wait(device)
        took.append(time.perf_counter() - began)
    if rank == 0:
        Path(result).write_text(str(min(took[1:])))
    dist.destroy_process_group()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def place_of_data() -> Path:
    """The folder whose disk is measured: of MOCO_EVAL_DATA if it can be written, else the current one."""
    given = os.environ.get("MOCO_EVAL_DATA")
    if given:
        with contextlib.suppress(InputError, OSError):
            folder = Path(given)
            if folder.is_dir() and os.access(folder, os.W_OK):
                return folder
    return Path.cwd()
