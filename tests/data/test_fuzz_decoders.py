"""Thousands of damaged images, annotations and shards: each is read, or refused by InputError in one line.

`python tests/data/test_fuzz_decoders.py KIND COUNT SEED` runs one of KINDS alone and keeps the input that failed.
"""

import contextlib
import copy
import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import environment
from PIL import Image

from moco_eval.data.boxes import check, coco, voc
from moco_eval.data.boxes.samples import image_size, read_image
from moco_eval.data.image_set import decode_bytes
from moco_eval.data.shards import open_shards
from moco_eval.errors import InputError
from moco_eval.report import pictures

MEMORY = 3 << 30  # bytes of address space beyond what the process starts with
LONGEST = 10  # seconds of computing for one input
WAITING = 120  # seconds for one input, also where it waits for other processes
WHOLE = {"images": 40_000, "xml": 5_000, "json": 5_000, "tar": 5_000}
MODES = ("RGB", "L", "P", "1", "RGBA", "CMYK", "LA", "I", "F", "I;16")
EDGES = (0, 1, 0x7F, 0x80, 0xFF)
NUMBERS = (0, 1, 2, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)
VALUES = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**64), 10**400, 0.5, -1e308, float("nan"), float("inf")),
    *("", "x" * 3000, "../x", "/etc/passwd", "a\nb", "\ud800", "\0", "1", "nan", "9" * 500),
    *(
        [],
        {},
        [[]],
        [[[1]]],
        [0] * 8,
        [1e9] * 8,
        [-1e9, 1e9] * 4,
        [2**62] * 4,
        ["a"] * 6,
        {"size": [20, 30], "counts": 1},
    ),
    *(
        {"size": [20, 30], "counts": "0" * 9},
        {"size": [20, 30], "counts": [600, 2**62, 2**62, 2**62, 2**62]},
    ),
)
BOX = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>12</ymax></bndbox>"
XML = (
    "<?xml version='1.0'?><annotation><filename>a.png</filename><size><width>30</width><height>20</height></size>"
    f"<object><name>cat</name><difficult>0</difficult>{BOX}</object><object><name>dog</name>{BOX}</object></annotation>"
).encode()
TOKENS = (
    *(b"<", b">", b"</", b"&#0;", b"&#x41;", b"&amp;", b"]]>", b"<![CDATA[", b"<!--", b"<?x?>", b"\xff\xfe", b"\0"),
    *(b"<!DOCTYPE a [", b"<!ENTITY a 'b'>", b"xmlns='a'", b"xmlns:a='" + b"b" * 300 + b"'", b" a='1' a='2'"),
    *(b"1e999", b"nan", b"-1", b"9" * 5000, b"1_0", b"<object>" * 50, b"<a>" * 3000, b"encoding='utf-16'"),
)


# Inputs


def seeds_of_images() -> list[bytes]:
    """A small picture in every accepted format, kind of pixels and compression."""
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8))
    compressions = {"TIFF": (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")}
    exif = Image.Exif()
    exif[0x0112] = 6
    seeds = []
    for form in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF", "EPS", "DDS", "AVIF"):
        for mode in MODES:
            image = Image.fromarray(np.zeros((24, 24), np.uint16)) if mode == "I;16" else pixels.convert(mode)
            for more in [{"compression": name} for name in compressions.get(form, (None,))] + [{"exif": exif}]:
                held = io.BytesIO()
                with contextlib.suppress(Exception):  # not every format takes every kind
                    image.save(held, form, **{key: value for key, value in more.items() if value is not None})
                    seeds.append(held.getvalue())
    held = io.BytesIO()
    pixels.save(held, "JPEG", progressive=True)
    return [*seeds, held.getvalue()]


def damaged(data: bytes, draw: random.Random, other: bytes) -> bytes:
    """Cut off, some bytes or numbers changed, or joined with another."""
    chance = draw.random()
    if chance < 0.15:
        return data[: draw.randrange(len(data) + 1)]
    changed = bytearray(data)
    reach = min(len(changed), draw.choice((64, 200, 10**6)))
    for _ in range(draw.choice((1, 1, 2, 3, 8))):
        at = draw.randrange(reach)
        if chance < 0.65:
            changed[at] = draw.choice((*EDGES, draw.randrange(256)))
        elif chance < 0.85:
            size, order = draw.choice((2, 4)), draw.choice(("little", "big"))
            number = draw.choice(NUMBERS) % 256**size
            changed[at : at + size] = number.to_bytes(size, order)
        elif chance < 0.93:
            del changed[at : at + draw.randrange(1, 9)]
        else:
            start = draw.randrange(len(other))
            changed[at:at] = other[start : start + draw.randrange(1, 200)]
        reach = min(reach, len(changed)) or 1
    return bytes(changed)


def damaged_xml(draw: random.Random) -> bytes:
    data = XML
    for _ in range(draw.choice((1, 1, 2, 4))):
        if draw.random() < 0.5:
            data = damaged(data, draw, XML) or XML
        else:
            at, length = draw.randrange(len(data)), draw.choice((0, 0, 1, 5, 20))
            data = data[:at] + draw.choice(TOKENS) + data[at + length :]
    return data


def annotations() -> dict:
    """A small COCO file with polygons, runs and keypoints."""
    shape = [2.0, 2.0, 9.0, 2.0, 9.0, 12.0]
    runs = {"size": [20, 30], "counts": [40, 5, 555]}
    about = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 8, 10], "area": 40.0, "iscrowd": 0}
    return {
        "images": [{"id": 1, "file_name": "a.png", "width": 30, "height": 20}],
        "annotations": [
            about | {"id": 1, "segmentation": [shape]},
            about | {"id": 2, "segmentation": runs, "iscrowd": 1},
            about | {"id": 3, "segmentation": runs | {"counts": "c26>00000e="}, "keypoints": [3, 4, 2], "area": None},
        ],
        "categories": [{"id": 1, "name": "cat", "keypoints": ["nose"]}, {"id": 2, "name": "dog"}],
    }


def damaged_json(draw: random.Random) -> bytes:
    values = annotations()
    if draw.random() < 0.3:
        return damaged(json.dumps(values).encode(), draw, XML)
    for _ in range(draw.choice((1, 1, 2, 4))):
        holder, key = draw.choice(list(places(values)))
        with contextlib.suppress(IndexError, KeyError, TypeError):  # an earlier change took the place away
            holder[key] = copy.deepcopy(draw.choice(VALUES))
            if draw.random() < 0.1:
                del holder[key]
    text = json.dumps(values)
    if draw.random() < 0.02:
        text = text.replace("40.0", "[" * 100_000, 1)
    return text.encode()


def places(values) -> Iterator[tuple]:
    """Every entry of nested lists and dicts, by its holder and its key."""
    for key in list(values) if isinstance(values, dict) else range(len(values)):
        yield values, key
        if isinstance(values[key], dict | list):
            yield from places(values[key])


def tar_of(form: int, name: str, link: bytes) -> bytes:
    """A shard of two images, one of this name, a link of this kind, and a label."""
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w", format=form) as tar:
        for member in ("a.jpg", f"{name}.jpg", "c.jpg", "c.cls"):
            about = tarfile.TarInfo(member)
            about.size, about.mtime = 700, 1.5
            if member == "c.jpg":
                about.type, about.linkname, about.size = link, "a.jpg", 0
            tar.addfile(about, io.BytesIO(bytes(700)))
    return held.getvalue()


def damaged_tar(draw: random.Random) -> bytes:
    """Some bytes of a header changed, and its sum made to fit again."""
    form = draw.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT))
    whole = tar_of(form, "b" * draw.choice((3, 90)), draw.choice((b"1", b"2")))
    data = bytearray(damaged(whole, draw, XML))
    if draw.random() < 0.7:
        for start in range(0, len(data) - 511, 512):
            header = data[start : start + 512]
            if b"ustar" in header:
                header[148:156] = b" " * 8
                data[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    return bytes(data)


# Readers


def image_readers(folder: Path) -> tuple[Callable, list[Callable]]:
    """How an input is made, and what reads it."""
    seeds, path = seeds_of_images(), folder / "x.jpg"
    png = next(seed for seed in seeds if seed.startswith(b"\x89PNG"))

    def make(draw: random.Random | None) -> bytes:
        data = damaged(draw.choice(seeds), draw, draw.choice(seeds)) if draw else png
        path.write_bytes(data)
        return data

    readers: list[Callable] = [lambda data: decode_bytes(data, "x"), lambda _: image_size(path)]
    return make, [
        *readers,
        lambda _: image_size(path, True),
        lambda _: read_image(path),
        lambda _: pictures.image(path),
    ]


def xml_readers(folder: Path) -> tuple[Callable, list[Callable]]:
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for split, name in (("train", "a"), ("test", "b")):
        Image.new("RGB", (30, 20)).save(folder / f"JPEGImages/{name}.png")
        (folder / f"Annotations/{name}.xml").write_bytes(XML)
        (folder / f"ImageSets/Main/{split}.txt").write_text(name)

    def make(draw: random.Random | None) -> bytes:
        data = damaged_xml(draw) if draw else XML
        for name, content in zip(draw.sample("ab", 2) if draw else "ab", (data, XML)):
            (folder / f"Annotations/{name}.xml").write_bytes(content)
        return data

    return make, [
        lambda _: voc.read_voc_folder(folder, None, None),
        lambda _: check.check("voc-folder", folder),
    ]


def json_readers(folder: Path) -> tuple[Callable, list[Callable]]:
    (folder / "images").mkdir()
    (folder / "annotations").mkdir()
    Image.new("RGB", (30, 20)).save(folder / "images/a.png")
    splits = ("train2017", "val2017")
    whole = json.dumps(annotations()).encode()

    def make(draw: random.Random | None) -> bytes:
        data = damaged_json(draw) if draw else whole
        for split, content in zip(draw.sample(splits, 2) if draw else splits, (data, whole)):
            (folder / f"annotations/instances_{split}.json").write_bytes(content)
        return data

    return make, [
        lambda _: coco.read_coco_folder(folder, None, None, clip=True),
        lambda _: coco.read_coco_folder(folder, None, None, keypoints=True),
        lambda _: check.check("coco-folder", folder),
    ]


def tar_readers(folder: Path) -> tuple[Callable, list[Callable]]:
    os.environ["MOCO_EVAL_CACHE"] = str(folder / "cache")
    (folder / "shards").mkdir()

    def make(draw: random.Random | None) -> bytes:
        data = damaged_tar(draw) if draw else tar_of(tarfile.PAX_FORMAT, "b", b"1")
        (folder / "shards/a.tar").write_bytes(data)
        return data

    def read(_: bytes) -> None:
        shards, _, _ = open_shards(folder / "shards")
        for index in range(len(shards)):
            assert shards[index]
            shards.read(index)

    return make, [read]


KINDS = {"images": image_readers, "xml": xml_readers, "json": json_readers, "tar": tar_readers}


# Running


def kilobytes(what: str) -> int:
    return int(re.search(rf"{what}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def fuzz(kind: str, count: int, seed: int, folder: Path) -> str:
    """Read `count` damaged inputs. Returns what happened, in words; raises AssertionError about one that failed."""
    draw, refused, longest = random.Random(f"{kind} {seed}"), 0, 0.0
    make, readers = KINDS[kind](folder)
    for read in readers:
        read(make(None))  # what is not damaged
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)  # ends the process, also inside a decoder
    for number in range(count):
        data = make(draw)
        for reader, read in enumerate(readers):
            began = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, LONGEST)
            signal.alarm(WAITING)
            try:
                read(data)
            except InputError as error:
                refused += 1
                assert len(str(error).splitlines()) == 1, f"{kind} {number}: {error}"
            except Exception:
                (folder / "failed").write_bytes(data)
                raise AssertionError(f"{kind} {number}, reader {reader}:\n{traceback.format_exc()}") from None
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.alarm(0)
            longest = max(longest, time.process_time() - began)
    return f"{count} {kind}, {refused} refusals, longest {longest:.1f} s, peak {kilobytes('VmHWM') >> 10} MB"


def main(kinds: str, count: int, seed: int) -> None:
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (1024 * kilobytes("VmSize") + MEMORY,) * 2)
    for kind in kinds.split(","):
        with tempfile.TemporaryDirectory() as folder:
            print(fuzz(kind, count, seed, Path(folder)), flush=True)


def run(kinds: str, count: int, seed: int) -> None:
    """In a process of its own, whose memory is limited."""
    tests = str(Path(__file__).parents[1])
    there = environment()
    command = [sys.executable, __file__, kinds, str(count), str(seed)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=there | {"PYTHONPATH": f"{tests}{os.pathsep}{there['PYTHONPATH']}"}
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"
    print(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_a_few_damaged_inputs_of_each_kind_are_read_or_refused():
    run(",".join(KINDS), 100, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_thousands_of_damaged_inputs_are_read_or_refused(kind):
    run(kind, WHOLE[kind], 0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
