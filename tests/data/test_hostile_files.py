"""Regular files only, of a size, each folder once: what is larger than any honest file is refused before it is read."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from commands import environment
from PIL import Image

from moco_eval import limits
from moco_eval.data import index, pixels
from moco_eval.data.benchmarks import read_benchmark
from moco_eval.data.boxes import check, coco, voc
from moco_eval.data.boxes.samples import read_image
from moco_eval.data.boxes.segmentation import area_of, read_mask
from moco_eval.data.catalogue import open_images
from moco_eval.data.in_memory import stl10
from moco_eval.data.label_subsets import read_list
from moco_eval.data.shards import members, open_shards
from moco_eval.errors import InputError
from moco_eval.features import sample
from moco_eval.report import pictures

OBJECT = "<object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"
JPEG = io.BytesIO()
Image.new("RGB", (20, 20), (200, 100, 50)).save(JPEG, "JPEG")


@pytest.fixture(autouse=True)
def no_hang(tmp_path, monkeypatch):
    """What waits for a pipe is ended."""

    def ended(*_: object) -> None:
        raise TimeoutError("it waits")

    monkeypatch.setenv("MOCO_EVAL_CACHE", str(tmp_path / "cache"))
    before = signal.signal(signal.SIGALRM, ended)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def voc_folder(root: Path) -> Path:
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    for split, name in (("train", "a"), ("test", "b")):
        (root / f"JPEGImages/{name}.jpg").write_bytes(JPEG.getvalue())
        (root / f"Annotations/{name}.xml").write_text(f"<annotation>{OBJECT}</annotation>")
        (root / f"ImageSets/Main/{split}.txt").write_text(name)
    return root


def coco_folder(root: Path, segmentation: object = None) -> Path:
    (root / "images").mkdir(parents=True)
    (root / "annotations").mkdir()
    (root / "images/a.jpg").write_bytes(JPEG.getvalue())
    about = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 8, 8], "segmentation": segmentation}
    values = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 20, "height": 20}],
        "annotations": [about],
        "categories": [{"id": 1, "name": "cat"}],
    }
    for split in ("train2017", "val2017"):
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(values))
    return root


def image_folder(root: Path) -> Path:
    for folder in ("train/a", "train/b"):
        (root / folder).mkdir(parents=True)
        (root / folder / "1.jpg").write_bytes(JPEG.getvalue())
    return root


def benchmark_folder(root: Path) -> Path:
    (root / "dtd/dtd/labels").mkdir(parents=True)
    (root / "dtd/dtd/images").mkdir()
    for part in ("train1", "val1", "test1"):
        (root / f"dtd/dtd/labels/{part}.txt").write_text("a/1.jpg")
    return root


def tar_folder(root: Path) -> Path:
    root.mkdir()
    with tarfile.open(root / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    return root


def stl10_folder(root: Path) -> Path:
    (root / "stl10_binary").mkdir(parents=True)
    return root


def empty_folder(root: Path) -> Path:
    root.mkdir()
    return root


# What makes a folder, what lies in it, and what reads it.
PLACES = {
    "flat": (image_folder, "train/a/1.jpg", lambda root: open_images("flat", root, "train")),
    "imagefolder": (image_folder, "train/b/2.PNG", lambda root: open_images("imagefolder", root, "train")),
    "webdataset": (tar_folder, "a.tar", open_shards),
    "torchvision's lists": (
        benchmark_folder,
        "dtd/dtd/labels/val1.txt",
        lambda root: read_benchmark("dtd", root, "train"),
    ),
    "VOC image": (voc_folder, "JPEGImages/a.jpg", lambda root: voc.read_voc_folder(root, None, None)),
    "VOC XML": (voc_folder, "Annotations/a.xml", lambda root: voc.read_voc_folder(root, None, None)),
    "VOC list": (voc_folder, "ImageSets/Main/test.txt", lambda root: voc.read_voc_folder(root, None, None)),
    "VOC classification": (voc_folder, "JPEGImages/b.jpg", lambda root: open_images("voc-folder", root, "test")),
    "COCO image": (coco_folder, "images/a.jpg", lambda root: coco.read_coco_folder(root, None, None)),
    "COCO json": (
        coco_folder,
        "annotations/instances_val2017.json",
        lambda root: coco.read_coco_folder(root, None, None),
    ),
    "COCO keypoints": (
        coco_folder,
        "annotations/person_keypoints_val2017.json",
        lambda root: coco.read_coco_folder(root, None, None, keypoints=True),
    ),
    "detection's pixels": (image_folder, "train/a/1.jpg", lambda root: read_image(root / "train/a/1.jpg")),
    "STL-10": (stl10_folder, "stl10_binary/test_X.bin", lambda root: stl10(root, "test")),
    "a list of labels": (empty_folder, "list.txt", lambda root: read_list(root / "list.txt")),
    "sample.npz": (empty_folder, "sample.npz", lambda root: sample.read(root / "sample.npz")),
    "the report's picture": (empty_folder, "x.png", lambda root: pictures.image(root / "x.png")),
}


def put_pipe(path: Path) -> None:
    os.mkfifo(path)


def put_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def put_socket(path: Path) -> None:
    there = Path.cwd()
    os.chdir(path.parent)  # the path of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path.name)
    finally:
        os.chdir(there)


@pytest.mark.parametrize(("make", "name", "read"), PLACES.values(), ids=PLACES)
@pytest.mark.parametrize(
    ("put", "kind"), [(put_pipe, "a named pipe"), (put_device, "a device"), (put_socket, "a socket")]
)
def test_what_is_no_regular_file_is_refused_before_it_is_opened(tmp_path, make, name, read, put, kind):
    path = make(tmp_path / "set") / name
    path.unlink(missing_ok=True)
    put(path)
    words = f"{re.escape(str(path))} .*is {kind}, not a regular file; put a copy"
    with pytest.raises(InputError, match=words) as error:
        read(tmp_path / "set")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["VOC image", "VOC XML", "VOC list", "COCO image", "COCO json"])
def test_datasets_check_goes_on_after_a_pipe(tmp_path, name):
    make, where, _ = PLACES[name]
    path = make(tmp_path / "set") / where
    path.unlink()
    put_pipe(path)
    lines, refusal = check.check(f"{name[:4].strip().lower()}-folder", tmp_path / "set")
    assert refusal and "a named pipe" in refusal
    assert any(line.startswith("refused: ") for line in lines)


@pytest.mark.parametrize("dataset", ["flat", "webdataset"])
def test_a_file_that_becomes_a_pipe_after_it_was_listed_is_one_unreadable_image(tmp_path, dataset):
    root = image_folder(tmp_path / "set") if dataset == "flat" else tar_folder(tmp_path / "set")
    images = open_images(dataset, root, "train")
    path = root / ("train/a/1.jpg" if dataset == "flat" else "a.tar")
    path.unlink()
    put_pipe(path)
    with pytest.raises(InputError, match="is a named pipe"):
        images.image(0)


LARGE = {
    "image": ("flat", "VOC image", "COCO image", "detection's pixels"),
    "picture": ("the report's picture",),
    "xml": ("VOC XML",),
    "list": ("VOC list", "a list of labels", "torchvision's lists"),
    "coco": ("COCO json",),
    "stl10": ("STL-10",),
}


@pytest.mark.parametrize(("limit", "place"), [(limit, place) for limit, places in LARGE.items() for place in places])
def test_a_file_beyond_its_limit_is_not_read(tmp_path, limit, place):
    """A terabyte of a hole takes no room on the disk."""
    make, name, read = PLACES[place]
    path = make(tmp_path / "set") / name
    path.touch()
    os.truncate(path, 2**40)
    with pytest.raises(InputError, match=rf"has 1,099,511,627,776 bytes, and {limits.most(limit):,} are the most"):
        images = read(tmp_path / "set")
        images.image(0)  # of a set that is only listed


# Folders


def test_folders_that_link_to_each_other_are_listed_once(tmp_path):
    for i in range(11):
        (tmp_path / f"d{i}").mkdir()
        (tmp_path / f"d{i}/x.jpg").touch()
        for j in range(11):
            (tmp_path / f"d{i}/l{j}").symlink_to(f"../d{j}")
    began = time.perf_counter()
    listed, folders, _ = index.scan(tmp_path, b"", (".jpg",))
    assert [name for name, _ in listed] == sorted(f"d{i}/x.jpg".encode() for i in range(11))
    assert len(folders) == 12 and time.perf_counter() - began < 5


def test_a_folder_is_listed_where_it_lies_and_else_at_its_first_link(tmp_path):
    root, beside = tmp_path / "set", tmp_path / "beside"
    for folder in (root / "m", beside / "deep"):
        folder.mkdir(parents=True)
        (folder / "x.jpg").touch()
    (root / "a").symlink_to(root / "m")
    (root / "z").symlink_to(beside)
    (root / "y").symlink_to(beside)
    listed, _, _ = index.scan(root, b"", (".jpg",))
    assert [name for name, _ in listed] == [b"m/x.jpg", b"y/deep/x.jpg"]


def test_what_two_classes_link_to_is_in_both(tmp_path):
    """As before: each class is a listing of its own."""
    root = image_folder(tmp_path / "set")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/2.jpg").write_bytes(JPEG.getvalue())
    for name in "ab":
        (root / "train" / name / "more").symlink_to(tmp_path / "shared")
    assert open_images("imagefolder", root, "train").labels.tolist() == [0, 0, 1, 1]


# XML


def long_defaults(size: int) -> bytes:
    return (
        f"<!DOCTYPE annotation [<!ATTLIST a b CDATA '{'A' * size}'>]><annotation>{'<a/>' * size}</annotation>".encode()
    )


def long_namespaces(size: int) -> bytes:
    tags = "".join(f"<b{i}/>" for i in range(size))
    return f"<annotation xmlns = '{'A' * size}'>{OBJECT}{tags}</annotation>".encode()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize(("make", "words"), [(long_defaults, "document type"), (long_namespaces, "name space")])
def test_a_small_xml_file_that_fills_the_memory_is_refused(tmp_path, make, words, encoding):
    root = voc_folder(tmp_path / "set")
    (root / "Annotations/a.xml").write_bytes(make(20_000).decode().encode(encoding))
    for read in (lambda: voc.read_voc_folder(root, None, None), lambda: open_images("voc-folder", root, "train")):
        with pytest.raises(InputError, match=rf"a.xml declares .*{words}.*; take"):
            read()


def test_a_short_namespace_is_read_and_left_out(tmp_path):
    root = voc_folder(tmp_path / "set")
    (root / "Annotations/a.xml").write_text(f"<annotation xmlns='http://host/voc'>{OBJECT}</annotation>")
    assert voc.read_voc_folder(root, None, None).train[0].labels.tolist() == [0]


def test_many_nested_elements_are_no_crash(tmp_path):
    root = voc_folder(tmp_path / "set")
    (root / "Annotations/a.xml").write_text(f"<annotation>{'<a>' * 10**5}{'</a>' * 10**5}{OBJECT}</annotation>")
    assert len(voc.read_voc_folder(root, None, None).train[0].labels) == 1


# COCO


@pytest.mark.parametrize(
    "counts",
    [[400, 2**62, 2**62, 2**62, 2**62], [400, 2**63 - 1, 2**63 - 1, 2], [2**64 + 400], [10**400], [400.0], [True]],
    ids=["to the same sum", "and again", "beyond 64 bits", "beyond all", "a float", "a truth"],
)
def test_counts_that_wrap_to_the_right_sum_are_refused(counts):
    with pytest.raises(InputError, match="the counts of its mask are not runs that fill 20x20 pixels"):
        read_mask({"size": [20, 20], "counts": counts}, (20, 20), "x")


@pytest.mark.parametrize(
    ("polygon", "words"),
    [
        ([0, 0, 1e9, 0, 1e9, 1e9], "the number 1e+09, far outside its image; correct"),
        ([0, 0, 5, 0, 5, float("nan")], "a number that is not finite; correct"),
        ([0, 0, 5, 0, 5, -float("inf")], "a number that is not finite"),
        ([0, 0, 20, 20] * 210_000, r"a polygon has 8,820,000 pixels, and 8,388,608 are the most"),
    ],
    ids=["far away", "no number", "infinite", "to and fro"],
)
def test_polygons_whose_outline_fills_the_memory_are_refused(tmp_path, polygon, words):
    with pytest.raises(InputError, match=re.escape(words).replace("\\\\", "")):
        read_mask([polygon], (20, 20), "x")
    root = coco_folder(tmp_path / "set", [polygon])
    with pytest.raises(InputError, match="annotation 1"):
        coco.read_coco_folder(root, None, None)


def test_honest_polygons_are_read_to_the_bit():
    """One that reaches a little outside, and one of very many points."""
    angle = np.linspace(0, 2 * np.pi, 50_000, endpoint=False)
    circle = (320 + 300 * np.stack([np.cos(angle), np.sin(angle)], 1)).ravel().tolist()
    polygons, dropped = read_mask([[-3.5, 0, 9, 0, 9, 700], circle], (640, 640), "x")
    assert dropped == 0 and polygons[0].tolist() == [-3.5, 0, 9, 0, 9, 700] and polygons[1].tolist() == circle
    assert area_of([polygons[1]], (640, 640)) == pytest.approx(np.pi * 300**2, rel=0.01)


@pytest.mark.parametrize("name", ["images", "annotations", "categories"])
def test_an_id_of_thousands_of_digits_is_refused_in_a_short_line(tmp_path, name):
    root = coco_folder(tmp_path / "set")
    path = root / "annotations/instances_val2017.json"
    values = json.loads(path.read_text())
    values[name][0]["id"] = 10**4000
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match="ids that are numbers of at most 15 digits") as error:
        coco.read_coco_folder(root, None, None)
    assert len(str(error.value)) < 500


# Tar


def header(name: bytes, size: int, kind: bytes) -> bytes:
    block = bytearray(512)
    block[: len(name)], block[100:107], block[124:135] = name, b"0000644", b"%011o" % size
    block[156:157], block[257:265], block[148:156] = kind, b"ustar\x0000", b" " * 8
    block[148:155] = b"%06o\0" % sum(block)
    return bytes(block)


def extended(data: bytes) -> bytes:
    return header(b"p", len(data), b"x") + data + bytes(-len(data) % 512)


@pytest.mark.parametrize(
    ("before", "read"),
    [
        (extended(b"99 k=abc\n"), 0),  # a length that does not fit
        (extended(b"4 =\n" * 250_000), 0),
        (extended(b"4 =\n" * 1025), 0),
        (extended(b"4 =\n" * 1024), 1),
        (extended(b"6 k=v\n") * 9, 0),
        (extended(b"6 k=v\n") * 8, 1),
    ],
    ids=["wrong", "a million bytes", "one too many", "just so many", "nine headers", "eight headers"],
)
def test_extended_headers_have_an_end(tmp_path, before, read):
    """What lies behind one that has none is damage, as behind any damaged header; it was 22 s for the second."""
    path = tmp_path / "a.tar"
    path.write_bytes(header(b"first.jpg", 0, b"0") + before + header(b"a.jpg", 0, b"0") + bytes(1024))
    began = time.perf_counter()
    with path.open("rb") as file:
        there = list(members(file.fileno(), path.stat().st_size))
    assert sum(member.whole for member in there) == 1 + read and time.perf_counter() - began < 2
    if not read:
        assert open_shards(tmp_path)[2] == ("a.tar (from byte 512)",)


def test_a_shard_of_too_many_members_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(limits.LIMITS, "members", limits.Limit(3, "members", "tar file"))
    (tmp_path / "a.tar").write_bytes(header(b"a.jpg", 0, b"0") * 4 + bytes(1024))
    with pytest.raises(InputError, match=r"a.tar has 4 members, and 3 are the most .*MOCO_EVAL_LIMITS=N"):
        open_shards(tmp_path)


def test_an_image_in_a_shard_beyond_its_limit_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "a.tar").write_bytes(header(b"a.jpg", 512, b"0") + bytes(512 + 1024))
    shards = open_shards(tmp_path)[0]
    monkeypatch.setitem(limits.LIMITS, "image", limits.Limit(511, "bytes", "image file"))
    with pytest.raises(InputError, match=r"a.tar has 512 bytes, and 511 are the most"):
        shards.read(0)


# Memory

SCRIPT = """
import re, resource, struct, sys, zlib
from pathlib import Path
from moco_eval.data.boxes.samples import image_size, read_image
from moco_eval.data.image_set import decode_bytes
from moco_eval.errors import InputError

def kilobytes(what):
    return int(re.search(rf"{what}:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

def png(depth, colour, row):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(bytes(row)) for _ in range(13370)) + packer.flush()
    about = struct.pack(">IIBBBBB", 13370, 13370, depth, colour, 0, 0, 0)
    return b"\\x89PNG\\r\\n\\x1a\\n" + chunk(b"IHDR", about) + chunk(b"IDAT", data) + chunk(b"IEND", b"")

path = Path(sys.argv[1])
data = png(int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
path.write_bytes(data)
resource.setrlimit(resource.RLIMIT_AS, (1024 * kilobytes("VmSize") + (2 << 30),) * 2)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
before = kilobytes("VmRSS")
for read in (lambda: decode_bytes(data, "x").size, lambda: image_size(path, True), lambda: read_image(path).size):
    assert read() == (13370, 13370)
print("MB", (kilobytes("VmHWM") - before) // 1024, "of", len(data))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize(
    ("depth", "colour", "row"),
    [(16, 0, 26741), (8, 2, 40111), (16, 6, 106961)],
    ids=["16-bit grey", "colour", "16-bit colour and alpha"],
)
def test_an_image_of_as_many_pixels_as_may_be_takes_two_gigabytes_at_most(tmp_path, depth, colour, row):
    signal.alarm(600)
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, *map(str, (tmp_path / "x.png", depth, colour, row))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0 and done.stdout.startswith("MB"), done.stdout + done.stderr
    print(done.stdout)


@pytest.mark.parametrize(
    "text", [b"xmlns" * 100_000, b"xmlns=" + b" " * 100_000, b"<a xmlns:b='" + b"c" * 300 + b"'/>"]
)
def test_a_long_name_space_is_refused_at_once(tmp_path, text):
    """Looked for without a bound, one without an end took a time that grows with the square of the file."""
    (tmp_path / "a.xml").write_bytes(b"<annotation>" + text + b"</annotation>")
    began = time.process_time()
    with pytest.raises(InputError, match="name space"):
        voc.read_xml(tmp_path / "a.xml")
    assert time.process_time() - began < 1


def test_what_follows_the_end_of_a_jpeg_is_no_scan_of_it(monkeypatch):
    """A phone's film behind its photo; a small picture in the header, with an end of its own, hides no scans."""
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "JPEG", progressive=True)
    photo = file.getvalue()
    scans = photo.count(b"\xff\xda")
    monkeypatch.setitem(limits.LIMITS, "scans", limits.Limit(0, "pixels in all its scans", "JPEG image"))
    header = b"\xff\xe1\x00\x0a\xff\xd8\xff\xda\xff\xd9ab"
    for data in (photo, photo + b"\xff\xda" * 500, photo[:2] + header + photo[2:]):
        assert pixels.pixels_in_scans(data, 10) == 10 * scans > 10
