"""Small tar shards of small pictures."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def jpeg(number: int) -> bytes:
    """A small picture of its own."""
    held = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((40, 40)).save(held, "JPEG")
    return held.getvalue()


def write(path: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> None:
    """A tar file; its times are fractions, as webdataset writes them, which pax keeps in a header of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members.items():
            about = tarfile.TarInfo(name)
            about.size, about.mtime = len(data), 1.5
            tar.addfile(about, io.BytesIO(data))


def write_shards(folder: Path) -> Path:
    """Nine shards of four pictures in two folders, each with its class beside it."""
    for shard in range(9):
        members = {}
        for i in range(4 * shard, 4 * shard + 4):
            members |= {f"{i:05}.jpg": jpeg(i), f"{i:05}.cls": str(i % 3).encode()}
        write(folder / f"{shard % 2}" / f"shard-{shard:06}.tar", members)
    return folder
